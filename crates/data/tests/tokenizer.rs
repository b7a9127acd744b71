//! Round trips of arbitrary bytes, and agreement with the library whose files are read and written.
#![allow(clippy::unwrap_used, missing_docs)]

use firebox_data::{DataError, END_OF_TEXT, Tokenizer};
use proptest::prelude::*;
use std::sync::LazyLock;

const TEXT: &str = "fn main() { println!(\"Hello, world: {}\", 3.14); }\n\
    Ein Tag wie jeder andere, don't you think? We'll see.  Größe, façade, naïve.\n\t\tif x == 10 { return; }\n\
    火箱是蒸汽机车里燃烧的地方。 🙂🙂 ½ of it\r\n";

static BPE: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::train_bpe(&[TEXT.repeat(5).as_bytes()], 420).unwrap());
static LIBRARY: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
    let mut library = tokenizers::Tokenizer::from_bytes(BPE.json()).unwrap();
    library.set_encode_special_tokens(true);
    library
});

/// The same vocabulary with another pre-tokenizer, as Llama 3 and Qwen have one: not the fast path.
static SPLIT: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut file: serde_json::Value = serde_json::from_str(BPE.json()).unwrap();
    file["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+|[^\\s\\p{N}]+"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]});
    Tokenizer::from_json(file.to_string()).unwrap()
});

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        "\\PC{0,80}".prop_map(String::into_bytes),
        prop::collection::vec(prop::sample::select(TEXT.split(' ').collect::<Vec<_>>()), 0..40)
            .prop_map(|words| words.join(" ").into_bytes()),
        Just(END_OF_TEXT.repeat(3).into_bytes()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes_survive(text in bytes()) {
        for tokenizer in [&*BPE, &*SPLIT] {
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids), &text);
            let lengths = tokenizer.token_bytes();
            let sum: u32 = ids.iter().map(|&id| lengths[id as usize]).sum();
            prop_assert_eq!(sum as usize, text.len());
            prop_assert!(!ids.contains(&tokenizer.eot().unwrap()), "text became a separator");
        }
    }

    #[test]
    fn the_fast_path_is_the_library(text in "\\PC{0,80}|[ a-zé'\n\t0-9]{0,80}|.{0,80}") {
        let theirs = LIBRARY.encode_fast(text.as_str(), false).unwrap();
        prop_assert_eq!(BPE.encode(text.as_bytes()).unwrap(), theirs.get_ids());
    }

    #[test]
    fn characters_survive_with_bytes_that_are_not_utf8(text in bytes()) {
        prop_assume!(!text.is_empty());
        let tokenizer = Tokenizer::from_chars_of(&text).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids), &text);
        prop_assert_eq!(tokenizer.eot(), None);
        let lengths = tokenizer.token_bytes();
        prop_assert_eq!(ids.iter().map(|&id| lengths[id as usize] as usize).sum::<usize>(), text.len());
    }
}

#[test]
fn the_whole_text_and_the_cache_agree_with_the_library() {
    let text = TEXT.repeat(3);
    let theirs = LIBRARY.encode_fast(text.as_str(), false).unwrap();
    for _ in 0..3 {
        assert_eq!(BPE.encode(text.as_bytes()).unwrap(), theirs.get_ids());
    }
    let word = "x".repeat(100_000);
    assert_eq!(BPE.decode(&BPE.encode(word.as_bytes()).unwrap()), word.as_bytes());
}

#[test]
fn training_depends_on_the_texts_alone() {
    let lines: Vec<&str> = TEXT.split_inclusive('\n').collect();
    let mut reversed = lines.clone();
    reversed.reverse();
    let train = |texts: &[&str]| {
        let texts: Vec<String> = texts.iter().map(|t| t.repeat(4)).collect();
        Tokenizer::train_bpe(&texts, 400).unwrap().json().to_owned()
    };
    assert_eq!(train(&lines), train(&lines));
    assert_eq!(train(&lines), train(&reversed));
}

#[test]
fn a_vocabulary_has_the_size_that_was_asked_for() {
    for size in [257, 258, 300, 400] {
        let tokenizer = Tokenizer::train_bpe(&[TEXT.repeat(5)], size).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eot()), (size, Some(0)));
        assert_eq!(tokenizer.token_bytes()[0], 0);
    }
    let error = Tokenizer::train_bpe(&[TEXT], 256).unwrap_err();
    assert!(error.to_string().contains("at least 257"), "{error}");
    // Nothing to merge: the bytes alone.
    assert_eq!(Tokenizer::train_bpe::<&str>(&[], 1000).unwrap().vocab_size(), 257);
}

#[test]
fn files_are_kept_and_their_kind_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    for tokenizer in [&*BPE, &*SPLIT, &Tokenizer::from_chars_of(b"b\na\xff").unwrap()] {
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.json(), tokenizer.json());
        assert_eq!(loaded.kind_name(), tokenizer.kind_name());
        assert_eq!(loaded.encode(b"a\nb").unwrap(), tokenizer.encode(b"a\nb").unwrap());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was left aside");
}

#[test]
fn characters_are_sorted_and_the_library_reads_them() {
    let text = "hello\nwörld 中 \"quoted\" <0xFF>";
    let tokenizer = Tokenizer::from_chars_of(text.as_bytes()).unwrap();
    let mut chars: Vec<char> = text.chars().collect();
    chars.sort_unstable();
    chars.dedup();
    assert_eq!(tokenizer.vocab_size(), chars.len());
    let ids = tokenizer.encode(text.as_bytes()).unwrap();
    let expected: Vec<u32> = text.chars().map(|c| chars.binary_search(&c).unwrap() as u32).collect();
    assert_eq!(ids, expected);
    let library = tokenizers::Tokenizer::from_bytes(tokenizer.json()).unwrap();
    assert_eq!(library.encode_fast(text, false).unwrap().get_ids(), ids);
    assert_eq!(library.decode(&ids, false).unwrap(), text);
}

#[test]
fn an_unknown_character_is_named() {
    let tokenizer = Tokenizer::from_chars_of(b"abc").unwrap();
    let error = tokenizer.encode("abß".as_bytes()).unwrap_err();
    assert!(matches!(error, DataError::UnknownCharacter { vocab_size: 3, .. }));
    assert!(error.to_string().starts_with("the character 'ß' is not among the 3 characters"), "{error}");
    let error = tokenizer.encode(b"ab\xff").unwrap_err();
    assert!(error.to_string().contains("byte 0xFF"), "{error}");
}

#[test]
fn a_tokenizer_with_byte_fallback_keeps_bytes() {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), byte.into());
    }
    for (i, token) in ["\u{2581}", "a", "b", "ab", "</s>"].iter().enumerate() {
        vocab.insert((*token).into(), (256 + i).into());
    }
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 260, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": ["a b"]},
    });
    let tokenizer = Tokenizer::from_json(file.to_string()).unwrap();
    assert_eq!((tokenizer.eot(), tokenizer.kind_name(), tokenizer.vocab_size()), (Some(260), "other", 261));
    assert_eq!(tokenizer.encode(b"ab a\xff").unwrap(), [259, 256, 257, 255]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("ab é a".as_bytes()).unwrap()), "ab é a".as_bytes());
    let bytes = tokenizer.token_bytes();
    assert_eq!([bytes[259], bytes[256], bytes[255], bytes[260]], [2, 1, 1, 0]);
}

/// As that of SmolLM2, which has no token for bytes that UTF-8 never has.
#[test]
fn bytes_of_text_are_counted_without_a_token_for_each_byte() {
    let byte_level = |regex: bool| serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": byte_level(true), "post_processor": null, "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": { "\u{120}": 0, "a": 1, "\u{10a}": 2, "\u{120}a": 3 }, "merges": ["\u{120} a"],
        },
    });
    let tokenizer = Tokenizer::from_json(json.to_string()).unwrap();
    assert_eq!(tokenizer.encode(b"a a\n").unwrap(), [1, 3, 2]);
    assert_eq!(tokenizer.token_bytes(), [1, 1, 1, 2]);
    assert_eq!(tokenizer.decode(&[1, 3, 2]), b"a a\n");
}

#[test]
fn what_is_no_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.json");
    let error = Tokenizer::load(&path).unwrap_err();
    assert!(error.to_string().contains("t.json"), "{error}");
    for text in ["", "{", "[]", "{\"version\": \"1.0\"}", "\u{feff}"] {
        std::fs::write(&path, text).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.starts_with("cannot load the tokenizer") && error.contains("t.json"), "{error}");
    }
    let whole = BPE.json();
    for length in (0..whole.len() - 2).step_by(997) {
        let cut = whole.char_indices().map(|(i, _)| i).find(|&i| i >= length).unwrap();
        assert!(Tokenizer::from_json(whole[..cut].into()).is_err());
    }
}
