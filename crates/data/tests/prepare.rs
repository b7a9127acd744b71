//! Whole corpora, from files of every format to token streams.
#![allow(clippy::unwrap_used, missing_docs)]

use firebox_data::{DataConfig, DataError, Dataset, Filters, Progress, Source, ValSplit, prepare};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

fn config() -> DataConfig {
    DataConfig { vocab_size: 300, val_fraction: 0.2, ..DataConfig::default() }
}

/// Distinct documents of a few words.
fn documents(n: usize) -> Vec<String> {
    (0..n)
        .map(|i| {
            format!("Document {i}: {} and {} with {}.\n", i * 7919 % 1000, i * 104_729 % 1000, "word ".repeat(i % 9))
        })
        .collect()
}

fn write_files(dir: &Path, documents: &[String]) {
    std::fs::create_dir_all(dir).unwrap();
    for (i, d) in documents.iter().enumerate() {
        std::fs::write(dir.join(format!("{i:04}.txt")), d).unwrap();
    }
}

fn source(path: &Path) -> Source {
    Source::new([path.to_string_lossy()])
}

fn run(config: &DataConfig, sources: &[Source], cache: &Path) -> Result<(Dataset, Vec<Progress>), DataError> {
    let mut seen = Vec::new();
    prepare(config, sources, cache, &mut |p| seen.push(p)).map(|d| (d, seen))
}

/// The texts of the documents of a stream.
fn texts(data: &Dataset, stream: &firebox_data::TokenStream) -> Vec<String> {
    let mut starts = stream.document_starts(0..stream.len());
    starts.push(stream.len());
    starts
        .windows(2)
        .map(|w| {
            let tokens = stream.tokens(w[0]..w[1]);
            assert!(data.tokenizer.eot().is_none_or(|eot| tokens[0] == eot), "a document without its separator");
            String::from_utf8(data.tokenizer.decode(&tokens)).unwrap()
        })
        .collect()
}

/// All documents, sorted.
fn all_texts(data: &Dataset) -> Vec<String> {
    let mut all = texts(data, &data.val);
    data.train.iter().for_each(|s| all.extend(texts(data, s)));
    all.sort();
    all
}

fn sorted(mut documents: Vec<String>) -> Vec<String> {
    documents.sort();
    documents
}

fn jsonl(documents: &[String], field: &str) -> Vec<u8> {
    let line = |d: &String| format!("{}\n", serde_json::json!({"id": 1, field: d}));
    documents.iter().map(line).collect::<String>().into_bytes()
}

fn parquet(path: &Path, documents: &[String]) {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    let schema = "message m { required int64 id; optional binary text (UTF8); required binary other (UTF8); }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_compression(parquet::basic::Compression::ZSTD(Default::default()))
        .build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, properties.into()).unwrap();
    for group in documents.chunks(70) {
        let mut row_group = writer.next_row_group().unwrap();
        let bytes: Vec<ByteArray> = group.iter().map(|d| ByteArray::from(d.as_str())).collect();
        let ids: Vec<i64> = (0..=group.len() as i64).collect();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        // One null in every group.
        let levels: Vec<i16> = (0..=group.len()).map(|i| i16::from(i != 3.min(group.len()))).collect();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&bytes, Some(&levels), None).unwrap();
        column.close().unwrap();
        let other = vec![ByteArray::from("other"); group.len() + 1];
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&other, None, None).unwrap();
        column.close().unwrap();
        row_group.close().unwrap();
    }
    writer.close().unwrap();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_format_gives_its_documents() {
    let dir = tempfile::tempdir().unwrap();
    let docs = documents(230);
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("a.jsonl"), jsonl(&docs, "text")).unwrap();
    std::fs::write(file("b.jsonl.zst"), zstd::encode_all(&jsonl(&docs, "text")[..], 3).unwrap()).unwrap();
    // Two members: the documents of both are read.
    let (one, two) = docs.split_at(100);
    std::fs::write(file("c.jsonl.gz"), [gzip(&jsonl(one, "text")), gzip(&jsonl(two, "text"))].concat()).unwrap();
    parquet(&file("d.parquet"), &docs);
    write_files(&file("e"), &docs);
    for name in ["a.jsonl", "b.jsonl.zst", "c.jsonl.gz", "d.parquet", "e"] {
        let (data, _) = run(&config(), &[source(&file(name))], &file("cache")).unwrap();
        assert_eq!(all_texts(&data), sorted(docs.clone()), "{name}");
        let stats = &data.stats;
        assert_eq!(stats.documents - stats.dropped_empty, 230);
        assert_eq!(stats.dropped_empty, if name == "d.parquet" { 4 } else { 0 });
        assert_eq!(stats.train_tokens, data.train[0].len());
        assert_eq!(stats.val_bytes, data.val_documents().flatten().collect::<Vec<u8>>().len() as u64);
        assert_eq!(stats.train_bytes + stats.val_bytes, docs.iter().map(|d| d.len() as u64).sum::<u64>());
    }
    let named = source(&file("d.parquet")).with_text_field("other");
    let (data, _) = run(&DataConfig { dedup: false, val_fraction: 0.0, ..config() }, &[named], &file("cache")).unwrap();
    assert_eq!(data.stats.documents, 234);
    assert!(all_texts(&data).iter().all(|t| t == "other"));
}

#[test]
fn bytes_that_are_not_utf8_reach_the_tokens_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latin1.txt");
    let text: Vec<u8> = (0..4000).flat_map(|i| [b'G', b'r', 0xf6, 0xdf, b'e', b' ', (i % 256) as u8]).collect();
    std::fs::write(&path, &text).unwrap();
    for tokenizer in ["bpe", "char"] {
        let config = DataConfig { tokenizer: tokenizer.into(), val_split: ValSplit::Tail, ..config() };
        let (data, _) = run(&config, &[source(&path)], &dir.path().join("cache")).unwrap();
        let mut whole = data.tokenizer.decode(&data.train[0].tokens(0..data.train[0].len()));
        whole.extend(data.val_documents().flatten().collect::<Vec<u8>>());
        assert_eq!(whole, text, "{tokenizer}");
        assert_eq!(data.stats.invalid_utf8, 1);
    }
}

#[test]
fn the_split_stays_when_files_are_renamed_and_reordered() {
    let dir = tempfile::tempdir().unwrap();
    let docs = documents(300);
    let mut reversed = docs.clone();
    reversed.reverse();
    write_files(&dir.path().join("a"), &docs);
    write_files(&dir.path().join("b"), &reversed);
    std::fs::write(dir.path().join("c.jsonl"), jsonl(&docs[..150], "text")).unwrap();
    std::fs::write(dir.path().join("d.jsonl"), jsonl(&docs[150..], "text")).unwrap();
    let val = |sources: &[Source]| -> BTreeSet<String> {
        let (data, _) = run(&config(), sources, &dir.path().join("cache")).unwrap();
        assert!(!data.stats.split_fell_back);
        texts(&data, &data.val).into_iter().collect()
    };
    let path = |name: &str| source(&dir.path().join(name));
    let expected = val(&[path("a")]);
    // Binomial: 300 documents at 0.2 are 60, give or take four standard deviations.
    assert!((32..=88).contains(&expected.len()), "{}", expected.len());
    assert_eq!(val(&[path("b")]), expected);
    assert_eq!(val(&[path("c.jsonl"), path("d.jsonl")]), expected);
    assert_eq!(val(&[path("d.jsonl"), path("c.jsonl")]), expected);
    // Adding documents moves none of those that were there.
    let grown = val(&[path("c.jsonl")]);
    assert!(grown.is_subset(&expected) && grown.iter().all(|t| docs[..150].contains(t)));
}

#[test]
fn the_tail_is_nanogpts() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..2000).map(|i| char::from(b'a' + (i * i % 26) as u8)).collect::<String>() + "é中🙂";
    std::fs::write(dir.path().join("t.txt"), &text).unwrap();
    let config = DataConfig {
        tokenizer: "char".into(),
        val_split: ValSplit::Tail,
        val_fraction: 0.1,
        isolate_documents: false,
        ..DataConfig::default()
    };
    let (data, _) = run(&config, &[source(&dir.path().join("t.txt"))], &dir.path().join("cache")).unwrap();
    let chars: Vec<char> = text.chars().collect();
    let n = (0.9 * chars.len() as f64) as usize;
    let expected = |part: &[char]| part.iter().collect::<String>().into_bytes();
    assert_eq!(data.tokenizer.decode(&data.train[0].tokens(0..data.train[0].len())), expected(&chars[..n]));
    assert_eq!(data.val_documents().flatten().collect::<Vec<u8>>(), expected(&chars[n..]));
    assert_eq!((data.stats.train_tokens, data.stats.val_tokens), (n as u64, (chars.len() - n) as u64));
    let batch = data.train_loader(32, 0).unwrap().batch(0, 50);
    assert!(batch.segments.iter().all(|&s| s == 0));
    assert!(batch.positions.chunks(32).all(|row| row.iter().enumerate().all(|(i, &p)| p == i as i32)));
}

#[test]
fn the_tail_of_many_documents_begins_a_document() {
    let dir = tempfile::tempdir().unwrap();
    // 2 MiB lines documents of several parts too: the boundary falls into the second.
    let long: Vec<String> = (0..3).map(|d| (0..200_000).map(|i| format!("{d} {i}\n")).collect()).collect();
    write_files(&dir.path().join("long"), &long);
    let config = DataConfig { val_split: ValSplit::Tail, val_fraction: 0.5, ..config() };
    let (data, _) = run(&config, &[source(&dir.path().join("long"))], &dir.path().join("cache")).unwrap();
    assert_eq!((data.train[0].documents(), data.val.documents()), (2, 2));
    let joined = [texts(&data, &data.train[0]).concat(), texts(&data, &data.val).concat()].concat();
    assert_eq!(joined, long.concat());
    assert_eq!(data.stats.train_bytes, long.concat().len() as u64 / 2);
}

#[test]
fn few_documents_fall_back_to_the_tail() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("one.txt"), "A single text. ".repeat(200)).unwrap();
    let (data, _) = run(&config(), &[source(dir.path())], &dir.path().join("cache")).unwrap();
    assert!(data.stats.split_fell_back && data.stats.to_string().contains("too few documents"));
    assert_eq!((data.stats.train_bytes, data.stats.val_bytes), (2400, 600));
    let none = DataConfig { val_fraction: 0.0, ..config() };
    let (data, _) = run(&none, &[source(dir.path())], &dir.path().join("cache")).unwrap();
    assert_eq!((data.stats.train_bytes, data.val.len()), (3000, 0));
    assert_eq!(data.val_batches(8, 4).count(), 0);
}

#[test]
fn a_whole_cache_is_used_and_a_torn_one_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    write_files(&dir.path().join("in"), &documents(120));
    let sources = [source(&dir.path().join("in"))];
    let cache = dir.path().join("cache");
    let (first, seen) = run(&config(), &sources, &cache).unwrap();
    assert!(!seen.contains(&Progress::Cached));
    let tokens = |d: &Dataset| (d.train[0].tokens(0..d.train[0].len()), d.val.tokens(0..d.val.len()), d.stats.clone());
    let expected = tokens(&first);
    let folder = first.dir.clone();
    drop(first);
    let (again, seen) = run(&config(), &sources, &cache).unwrap();
    assert!(seen.contains(&Progress::Cached));
    assert_eq!(tokens(&again), expected);
    drop(again);
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    for name in names {
        let path = folder.join(&name);
        let whole = std::fs::read(&path).unwrap();
        let n = whole.len();
        let mut cases: Vec<Option<Vec<u8>>> = vec![None];
        cases.extend([0, 1, 7, 63, 64, 65, n / 3, n / 2, n - 9, n - 1].map(|l| Some(whole[..l.min(n - 1)].to_vec())));
        cases.push(Some([&whole[..], b"\0"].concat()));
        for at in [0, 9, 20, 40, n / 2, n - 1] {
            let mut flipped = whole.clone();
            flipped[at.min(n - 1)] ^= 4;
            // The zeros at the end of a header are not looked at by anyone, and are checked all the same.
            cases.push(Some(flipped));
        }
        for case in cases {
            let what = format!("{name:?} of {n} bytes: {:?}", case.as_ref().map(Vec::len));
            match case {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let (data, seen) = run(&config(), &sources, &cache).unwrap();
            assert!(seen.iter().any(|p| matches!(p, Progress::Torn { .. })), "not noticed: {what}");
            assert_eq!(tokens(&data), expected, "{what}");
            assert_eq!(std::fs::read(&path).unwrap(), whole, "not the same again: {what}");
        }
    }
    // A run that was killed leaves a folder aside: it is cleared away.
    let aside = cache.join(format!("{}.tmp", folder.file_name().unwrap().to_string_lossy()));
    std::fs::create_dir(&aside).unwrap();
    std::fs::write(aside.join("train-00-00000.tokens"), "torn").unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(tokens(&run(&config(), &sources, &cache).unwrap().0), expected);
    assert!(!aside.exists());
}

#[test]
fn the_key_is_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let docs = documents(50);
    write_files(&dir.path().join("a"), &docs);
    write_files(&dir.path().join("b"), &docs);
    let cache = dir.path().join("cache");
    let folder =
        |config: &DataConfig, name: &str| run(config, &[source(&dir.path().join(name))], &cache).unwrap().0.dir;
    let key = folder(&config(), "a");
    assert_eq!(folder(&config(), "b"), key, "names do not matter");
    assert_eq!(folder(&DataConfig { isolate_documents: false, ..config() }, "a"), key, "what only loading needs");
    assert_ne!(folder(&DataConfig { vocab_size: 310, ..config() }, "a"), key);
    let same_length = docs[7].replace("Document", "document");
    std::fs::write(dir.path().join("b/0007.txt"), same_length).unwrap();
    assert_ne!(folder(&config(), "b"), key, "one byte of one file");
}

#[test]
fn duplicates_and_bad_documents_are_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let long =
        |i: usize| (0..300).map(|j| format!("w{}", (i * 7919 + j * j * 31) % 2003)).collect::<Vec<_>>().join(" ");
    let mut docs: Vec<String> = (0..60).map(long).collect();
    docs.push(docs[3].clone());
    docs.push(docs[4].clone());
    docs.push(docs[5].replacen("w1", "changed", 1));
    docs.push(String::new());
    docs.push("tiny".into());
    docs.push("x".repeat(5000));
    docs.push(format!("{}{}", "#$%&".repeat(200), "word ".repeat(50)));
    docs.push(format!("{}\n", "the same line\n".repeat(100)));
    docs.push(format!("{}\n{}", "y".repeat(3000), long(99)));
    write_files(&dir.path().join("in"), &docs);
    let config = DataConfig {
        near_dedup: Some(0.8),
        filters: Filters {
            min_bytes: Some(10),
            max_bytes: Some(4900),
            max_symbol_ratio: Some(0.5),
            max_line_bytes: Some(2500),
            max_repeated_lines: Some(0.3),
        },
        ..config()
    };
    let (data, _) = run(&config, &[source(&dir.path().join("in"))], &dir.path().join("cache")).unwrap();
    let s = &data.stats;
    let dropped = [
        s.dropped_empty,
        s.dropped_exact,
        s.dropped_near,
        s.dropped_short,
        s.dropped_long,
        s.dropped_symbols,
        s.dropped_line,
        s.dropped_repeated,
    ];
    assert_eq!(dropped, [1, 2, 1, 1, 1, 1, 1, 1]);
    assert_eq!((s.documents, s.train_documents + s.val_documents, s.dropped()), (69, 60, 9));
    assert_eq!(all_texts(&data), sorted(docs[..60].to_vec()));
    let line = s.to_string();
    assert!(line.contains("2 exact duplicates, 1 near duplicates") && !line.contains('\n'), "{line}");
    let all = DataConfig { dedup: false, ..self::config() };
    let (data, _) = run(&all, &[source(&dir.path().join("in"))], &dir.path().join("cache")).unwrap();
    assert_eq!(data.stats.dropped(), 1, "only the empty one");
}

#[test]
fn sources_mix_by_weight() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    write_files(&a, &documents(100));
    write_files(&b, &documents(140)[100..]);
    let cache = dir.path().join("cache");
    let (joined, _) = run(&config(), &[source(&a), source(&b)], &cache).unwrap();
    assert_eq!(joined.train.len(), 1);
    let (mixed, _) = run(&config(), &[source(&a).with_weight(1.0), source(&b).with_weight(3.0)], &cache).unwrap();
    assert_eq!((mixed.train.len(), &mixed.weights[..]), (2, &[1.0, 3.0][..]));
    assert_eq!(all_texts(&mixed), all_texts(&joined));
    let batch = mixed.train_loader(16, 5).unwrap().batch(0, 4096);
    let of_b = mixed.train[1].tokens(0..mixed.train[1].len());
    let from_b = batch.inputs.chunks(16).filter(|row| {
        let row: Vec<u32> = row.iter().map(|&t| t as u32).collect();
        of_b.windows(16).any(|w| w == row)
    });
    // Full rows that occur in b; short rows and rows that both hold blur it a little.
    assert!((2900..3300).contains(&from_b.count()));
    let error = run(&config(), &[source(&a).with_weight(0.0), source(&b)], &cache).unwrap_err();
    assert!(error.to_string().contains("weight"), "{error}");
}

#[test]
fn the_cap_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    write_files(&dir.path().join("in"), &documents(100));
    let config = DataConfig { max_bytes: Some(1000), ..config() };
    let (data, _) = run(&config, &[source(&dir.path().join("in"))], &dir.path().join("cache")).unwrap();
    assert_eq!(data.stats.bytes, 1000);
    // What lies beyond the cap is neither read nor hashed.
    std::fs::write(dir.path().join("in/0099.txt"), "changed").unwrap();
    let (_, seen) = run(&config, &[source(&dir.path().join("in"))], &dir.path().join("cache")).unwrap();
    assert!(seen.contains(&Progress::Cached));
}

#[test]
fn bad_input_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let error = |config: &DataConfig, path: &Path| {
        let error = run(config, &[source(path)], &cache).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        assert!(
            !cache.exists() || std::fs::read_dir(&cache).unwrap().all(|e| e.unwrap().file_name() == ".lock"),
            "{error}"
        );
        error
    };
    let check = |error: String, parts: &[&str]| {
        assert!(parts.iter().all(|p| error.contains(p)), "{error}\nlacks one of {parts:?}");
    };
    let c = config();
    check(error(&c, &dir.path().join("missing.txt")), &["missing.txt", "no such file"]);
    std::fs::create_dir(dir.path().join("void")).unwrap();
    check(error(&c, &dir.path().join("void")), &["void", "holds no file of text", ".jsonl"]);
    check(error(&c, &file("empty.txt", b"")), &["corpus is empty", "1 are empty"]);
    check(
        error(&c, &file("bad.jsonl", b"{\"text\": \"a\"}\n\n{\"text\" \"b\"}\n")),
        &["bad.jsonl:3:", "not a JSON object"],
    );
    check(
        error(&c, &file("field.jsonl", b"{\"body\": \"a\", \"id\": 3}\n")),
        &["field.jsonl:1:", "`text`", "body, id", "text_field"],
    );
    let zst = zstd::encode_all(&jsonl(&documents(500), "text")[..], 3).unwrap();
    check(error(&c, &file("torn.jsonl.zst", &zst[..zst.len() / 2])), &["torn.jsonl.zst", "zstd", "torn"]);
    check(error(&c, &file("no.jsonl.zst", b"plain text")), &["no.jsonl.zst", "zstd"]);
    let gz = gzip(&jsonl(&documents(500), "text"));
    check(error(&c, &file("torn.jsonl.gz", &gz[..gz.len() - 5])), &["torn.jsonl.gz", "gzip", "torn"]);
    let whole = dir.path().join("whole.parquet");
    parquet(&whole, &documents(100));
    let bytes = std::fs::read(&whole).unwrap();
    check(error(&c, &file("torn.parquet", &bytes[..bytes.len() - 30])), &["torn.parquet", "parquet", "torn"]);
    let named = |field: &str| DataConfig { text_field: field.into(), ..config() };
    check(error(&named("body"), &whole), &["no column `body`", "text, other"]);
    check(error(&named("id"), &whole), &["no text in column `id`", "text, other"]);
    let text = file("text.txt", "some text ".repeat(100).as_bytes());
    check(error(&DataConfig { vocab_size: 100, ..config() }, &text), &["data.vocab_size = 100", "257"]);
    check(error(&DataConfig { val_fraction: 1.0, ..config() }, &text), &["data.val_fraction = 1"]);
    check(error(&DataConfig { tokenizer: "no/such.json".into(), ..config() }, &text), &["no/such.json"]);
    let broken = file("broken.json", b"{}").to_string_lossy().into_owned();
    check(error(&DataConfig { tokenizer: broken, ..config() }, &text), &["broken.json", "cannot load the tokenizer"]);
    let strict = DataConfig { filters: Filters { min_bytes: Some(1 << 20), ..Filters::default() }, ..config() };
    check(error(&strict, &text), &["corpus is empty", "1 were dropped"]);
    let (data, _) = run(&c, &[source(&text)], &cache).unwrap();
    check(data.train_loader(10_000, 0).unwrap_err().to_string(), &["too short", "context 10000"]);
}

#[cfg(unix)]
#[test]
fn an_unreadable_file_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret.txt");
    std::fs::write(&path, "text").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&path).is_ok() {
        // Nothing is forbidden to root; a folder in place of a file is unreadable even then.
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
    }
    let error = run(&config(), &[source(&path)], &dir.path().join("cache")).unwrap_err().to_string();
    assert!(error.contains("secret.txt") && error.starts_with("cannot "), "{error}");
}

#[test]
fn a_recipe_table_parses_strictly() {
    let parse = |text: &str| serde_json::from_str::<DataConfig>(text);
    assert_eq!(parse("{}").unwrap(), DataConfig::default());
    assert_eq!(parse(r#"{"val_split": "tail"}"#).unwrap().val_split, ValSplit::Tail);
    assert!(parse(r#"{"vocabsize": 3}"#).unwrap_err().to_string().contains("vocab_size"));
    let config = DataConfig { near_dedup: Some(0.7), ..config() };
    assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
}
