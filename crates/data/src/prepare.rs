//! From sources to a [`Dataset`]: hash, scan, make the tokenizer, tokenize; or open what the cache already holds.

use crate::cache::{self, Manifest};
use crate::config::{DataConfig, Source, groups};
use crate::error::DataError;
use crate::files::{CorpusFile, list_files};
use crate::loader::{Loader, LoaderConfig, ValBatches};
use crate::read::{Part, read_documents};
use crate::scan::{Fate, Scanned, Scanner, count_chars};
use crate::shard::{SHARD_TOKENS, StreamWriter, TokenStream};
use crate::stats::Stats;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Text that is in memory at once, per thread: enough parts that all threads have work, and little enough that hundreds of
/// threads are no burden. About three batches exist at a time: one read, one waiting, one worked on.
const BATCH_BYTES_PER_THREAD: usize = 2 << 20;

/// What [`prepare`] is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Hashing the files, to find them in the cache.
    Hashing {
        /// Bytes hashed.
        bytes: u64,
        /// Bytes of all files.
        total: u64,
    },
    /// The cache holds this corpus and it is whole.
    Cached,
    /// The cache holds this corpus but it is torn: it is made again.
    Torn {
        /// What is wrong with it.
        reason: String,
    },
    /// First pass: reading, filtering, finding duplicates.
    Scanning {
        /// Documents read.
        documents: u64,
        /// Bytes of text read.
        bytes: u64,
    },
    /// Training a tokenizer.
    TrainingTokenizer {
        /// Bytes of the sample.
        bytes: u64,
        /// Tokens wanted.
        vocab_size: usize,
    },
    /// Second pass: writing tokens.
    Tokenizing {
        /// Bytes of text done.
        bytes: u64,
        /// Bytes of text to do.
        total: u64,
        /// Tokens written.
        tokens: u64,
    },
}

/// A prepared corpus: memory-mapped tokens and the tokenizer that made them.
#[derive(Debug)]
pub struct Dataset {
    /// Training tokens: one stream, or one per source when the sources have weights.
    pub train: Vec<Arc<TokenStream>>,
    /// Weight of each stream of training tokens.
    pub weights: Vec<f64>,
    /// Held-out tokens; empty when `val_fraction` is 0.
    pub val: Arc<TokenStream>,
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What was read, dropped and kept.
    pub stats: Stats,
    /// As in [`DataConfig::isolate_documents`].
    pub isolate_documents: bool,
    /// The folder of the cache: shards, `tokenizer.json`, `dataset.json`.
    pub dir: PathBuf,
}

impl Dataset {
    /// Endless training batches.
    ///
    /// # Errors
    /// [`DataError::TooShort`] when a source has fewer tokens than a row.
    pub fn train_loader(&self, context: usize, seed: u64) -> Result<Loader, DataError> {
        let streams = self.train.iter().cloned().zip(self.weights.iter().copied()).collect();
        Loader::new(streams, LoaderConfig { context, seed, isolate_documents: self.isolate_documents })
    }

    /// One pass over the held-out tokens, up to `rows` rows at a time.
    pub fn val_batches(&self, context: usize, rows: usize) -> ValBatches {
        ValBatches::new(self.val.clone(), context, rows, self.isolate_documents)
    }

    /// The validation documents one by one: the very bytes of the files when the tokenizer is lossless (byte-level and character ones are). For a split by position, the first one is the rest of a document.
    pub fn val_documents(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let mut starts = self.val.document_starts(0..self.val.len());
        if starts.first() != Some(&0) {
            starts.insert(0, 0);
        }
        starts.push(self.val.len());
        (1..starts.len()).map(move |i| self.tokenizer.decode(&self.val.tokens(starts[i - 1]..starts[i])))
    }

    fn open(dir: &Path, key: &str, config: &DataConfig, weights: &[f64]) -> Result<Self, DataError> {
        let manifest = Manifest::read(dir, key)?;
        let path = dir.join("tokenizer.json");
        let tokenizer = Tokenizer::load(&path)?;
        if crc32c::crc32c(tokenizer.json().as_bytes()) != manifest.tokenizer_crc32c {
            return Err(DataError::TornShard { path, reason: "the checksum differs".into() });
        }
        let open = |stream: &str, infos| TokenStream::open(dir, stream, infos).map(Arc::new);
        let train: Vec<_> = manifest
            .train
            .iter()
            .enumerate()
            .map(|(g, infos)| open(&format!("train-{g:02}"), infos))
            .collect::<Result<_, _>>()?;
        if train.len() != weights.len() {
            return Err(DataError::TornShard { path: dir.to_owned(), reason: "another number of sources".into() });
        }
        Ok(Self {
            train,
            weights: weights.to_vec(),
            val: open("val", &manifest.val)?,
            tokenizer: Arc::new(tokenizer),
            stats: manifest.stats,
            isolate_documents: config.isolate_documents,
            dir: dir.to_owned(),
        })
    }
}

/// Prepares a corpus, or opens it when `cache_dir` holds it already. Documents are streamed twice and never all in memory;
/// what grows with the corpus is 33 bytes per document, and several hundred with `near_dedup`.
///
/// The cache is written aside and renamed when it is whole. One that is torn is made again. Several processes may prepare
/// the same corpus at once: one does, the others wait.
///
/// # Errors
/// For every way in which sources, settings or disk can be wrong; see [`DataError`].
pub fn prepare(
    config: &DataConfig,
    sources: &[Source],
    cache_dir: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<Dataset, DataError> {
    config.validate()?;
    let (groups, weights) = groups(sources)?;
    let files = list_files(sources, &config.text_field)?;
    let key =
        cache::key(config, sources, &groups, &files, &mut |bytes, total| progress(Progress::Hashing { bytes, total }))?;
    std::fs::create_dir_all(cache_dir).map_err(DataError::io("create", cache_dir))?;
    let _lock = cache::lock(cache_dir)?;
    let dir = cache_dir.join(&key);
    if dir.exists() {
        match Dataset::open(&dir, &key, config, &weights) {
            Ok(dataset) => {
                progress(Progress::Cached);
                return Ok(dataset);
            }
            Err(e) => progress(Progress::Torn { reason: e.to_string() }),
        }
        std::fs::remove_dir_all(&dir).map_err(DataError::io("remove", &dir))?;
    }
    let aside = cache_dir.join(format!("{key}.tmp"));
    if aside.exists() {
        std::fs::remove_dir_all(&aside).map_err(DataError::io("remove", &aside))?;
    }
    std::fs::create_dir(&aside).map_err(DataError::io("create", &aside))?;
    let build = Build {
        config,
        groups: &groups,
        n_groups: weights.len(),
        files: &files,
        dir: &aside,
        shard_tokens: SHARD_TOKENS,
    };
    let built = build.run(key.clone(), progress).and_then(|()| {
        cache::sync_dir(&aside).map_err(DataError::io("write", &aside))?;
        std::fs::rename(&aside, &dir).map_err(DataError::io("rename", &aside))?;
        cache::sync_dir(cache_dir).map_err(DataError::io("write", cache_dir))
    });
    if let Err(e) = built {
        // What a full disk needs most is the space back.
        let _ = std::fs::remove_dir_all(&aside);
        return Err(e);
    }
    Dataset::open(&dir, &key, config, &weights)
}

/// Everything that making the shards needs.
struct Build<'a> {
    config: &'a DataConfig,
    groups: &'a [usize],
    n_groups: usize,
    files: &'a [CorpusFile],
    dir: &'a Path,
    shard_tokens: u64,
}

impl Build<'_> {
    fn run(&self, key: String, progress: &mut dyn FnMut(Progress)) -> Result<(), DataError> {
        let mut scanned = self.scan(progress)?;
        let tokenizer = self.tokenizer(&mut scanned, progress)?;
        tokenizer.save(self.dir.join("tokenizer.json"))?;
        let mut stats = std::mem::take(&mut scanned.stats);
        stats.files = self.files.len() as u64;
        stats.vocab_size = tokenizer.vocab_size();
        let mut tokenizing = Tokenizing::new(self, &scanned, &tokenizer);
        let (total, mut bytes) = (stats.bytes, 0);
        progress(Progress::Tokenizing { bytes, total, tokens: 0 });
        self.pump(|parts| {
            bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
            tokenizing.batch(&parts)?;
            progress(Progress::Tokenizing { bytes, total, tokens: tokenizing.tokens() });
            Ok(())
        })?;
        tokenizing.finish(key, stats)?.write(self.dir)
    }

    fn scan(&self, progress: &mut dyn FnMut(Progress)) -> Result<Scanned, DataError> {
        let mut scanner = Scanner::new(self.config, self.groups, self.n_groups);
        let (mut documents, mut bytes) = (0, 0);
        progress(Progress::Scanning { documents, bytes });
        self.pump(|parts| {
            documents += parts.iter().filter(|p| p.first).count() as u64;
            bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
            scanner.batch(parts);
            progress(Progress::Scanning { documents, bytes });
            Ok(())
        })?;
        scanner.finish()
    }

    fn tokenizer(&self, scanned: &mut Scanned, progress: &mut dyn FnMut(Progress)) -> Result<Tokenizer, DataError> {
        let vocab_size = self.config.vocab_size;
        match self.config.tokenizer.as_str() {
            "bpe" => {
                let sample = std::mem::take(&mut scanned.sample);
                let bytes = sample.iter().map(|s| s.len() as u64).sum();
                progress(Progress::TrainingTokenizer { bytes, vocab_size });
                Tokenizer::train_bpe(&sample, vocab_size)
            }
            "char" => Tokenizer::from_json(scanned.chars.to_json()),
            path => Tokenizer::load(path),
        }
    }

    /// Reads all documents on a thread of its own and hands them over in batches, so that reading (and decompressing) and
    /// working on them go on at the same time.
    fn pump(&self, mut consume: impl FnMut(Vec<Part>) -> Result<(), DataError>) -> Result<(), DataError> {
        let batch_bytes = BATCH_BYTES_PER_THREAD * rayon::current_num_threads();
        std::thread::scope(|scope| {
            let (send, receive) = std::sync::mpsc::sync_channel::<Vec<Part>>(1);
            let reader = scope.spawn(move || {
                let (mut batch, mut bytes) = (Vec::new(), 0);
                let read = read_documents(self.files, self.config.max_bytes, &mut |part| {
                    // Short documents cost more than their bytes.
                    bytes += part.bytes.len() + 256;
                    batch.push(part);
                    if bytes < batch_bytes {
                        return ControlFlow::Continue(());
                    }
                    bytes = 0;
                    match send.send(std::mem::take(&mut batch)) {
                        Ok(()) => ControlFlow::Continue(()),
                        // The other side gave up with an error of its own.
                        Err(_) => ControlFlow::Break(()),
                    }
                });
                if read.is_ok() && !batch.is_empty() {
                    let _ = send.send(batch);
                }
                read
            });
            for batch in receive {
                consume(batch)?;
            }
            match reader.join() {
                Ok(read) => read,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// The second pass.
struct Tokenizing<'a> {
    groups: &'a [usize],
    fates: &'a [Fate],
    tail: bool,
    tokenizer: &'a Tokenizer,
    /// Per stream of training tokens: characters so far, and the number from which on they are held out.
    chars: Vec<(u64, u64)>,
    train: Vec<StreamWriter>,
    val: StreamWriter,
    bytes: [u64; 2],
    documents: usize,
    fate: Fate,
    source: usize,
}

/// A run of bytes of one document that goes to one stream.
struct Run<'p> {
    bytes: &'p [u8],
    starts_document: bool,
    /// Held out, or of a stream of training tokens.
    group: Option<usize>,
}

impl<'a> Tokenizing<'a> {
    fn new(build: &Build<'a>, scanned: &'a Scanned, tokenizer: &'a Tokenizer) -> Self {
        let writer = |stream: &str| StreamWriter::new(build.dir, stream, tokenizer.vocab_size(), build.shard_tokens);
        // nanoGPT's boundary is int(0.9 * n).
        let share = 1.0 - build.config.val_fraction;
        let boundary = |&n: &u64| (0, if scanned.tail && share < 1.0 { (n as f64 * share) as u64 } else { u64::MAX });
        Self {
            groups: build.groups,
            fates: &scanned.fates,
            tail: scanned.tail,
            tokenizer,
            chars: scanned.group_chars.iter().map(boundary).collect(),
            train: (0..build.n_groups).map(|g| writer(&format!("train-{g:02}"))).collect(),
            val: writer("val"),
            bytes: [0, 0],
            documents: 0,
            fate: Fate::Dropped,
            source: 0,
        }
    }

    fn tokens(&self) -> u64 {
        self.val.tokens + self.train.iter().map(|w| w.tokens).sum::<u64>()
    }

    /// Encodes a batch on all threads, then writes it in order.
    fn batch(&mut self, parts: &[Part]) -> Result<(), DataError> {
        let mut runs = Vec::with_capacity(parts.len());
        for part in parts {
            self.route(part, &mut runs)?;
        }
        let eot = self.tokenizer.eot();
        let encoded: Vec<Vec<u32>> = runs
            .par_iter()
            .with_max_len(32)
            .map(|run| {
                let mut ids = Vec::with_capacity(run.bytes.len() / 3 + 1);
                ids.extend(eot.filter(|_| run.starts_document));
                self.tokenizer.encode_into(run.bytes, &mut ids).map(|()| ids)
            })
            .collect::<Result<_, _>>()?;
        for (run, ids) in runs.iter().zip(&encoded) {
            let writer = match run.group {
                Some(group) => &mut self.train[group],
                None => &mut self.val,
            };
            self.bytes[usize::from(run.group.is_none())] += run.bytes.len() as u64;
            writer.append(ids, run.starts_document)?;
        }
        Ok(())
    }

    /// Where the bytes of a part go.
    fn route<'p>(&mut self, part: &'p Part, runs: &mut Vec<Run<'p>>) -> Result<(), DataError> {
        if part.first {
            let Some(&fate) = self.fates.get(self.documents) else {
                return Err(DataError::ChangedWhileReading(format!("more than {} documents", self.fates.len())));
            };
            (self.fate, self.source) = (fate, part.source);
            self.documents += 1;
        }
        let group = self.groups[self.source];
        let train = match self.fate {
            Fate::Dropped => return Ok(()),
            Fate::Val => None,
            Fate::Train => Some(group),
        };
        if !self.tail {
            runs.push(Run { bytes: &part.bytes, starts_document: part.first, group: train });
            return Ok(());
        }
        let (so_far, boundary) = self.chars[group];
        let (chars, _) = count_chars(&part.bytes);
        self.chars[group].0 += chars;
        let to_train = boundary.saturating_sub(so_far).min(chars);
        let (head, tail) = part.bytes.split_at(byte_of_char(&part.bytes, to_train, chars));
        if !head.is_empty() {
            runs.push(Run { bytes: head, starts_document: part.first, group: train });
        }
        if !tail.is_empty() {
            // A document that is cut by the boundary begins anew on the other side.
            let starts_document = part.first || so_far <= boundary;
            runs.push(Run { bytes: tail, starts_document, group: None });
        }
        Ok(())
    }

    fn finish(self, key: String, mut stats: Stats) -> Result<Manifest, DataError> {
        if self.documents != self.fates.len() {
            return Err(DataError::ChangedWhileReading(format!(
                "{} documents, then {}",
                self.fates.len(),
                self.documents
            )));
        }
        if let Some(empty) = self.train.iter().position(|w| w.tokens == 0) {
            return Err(DataError::EmptyCorpus(format!("nothing to train on is left of source {}", empty + 1)));
        }
        stats.train_documents = self.train.iter().map(|w| w.documents).sum();
        stats.val_documents = self.val.documents;
        [stats.train_bytes, stats.val_bytes] = self.bytes;
        stats.train_tokens = self.train.iter().map(|w| w.tokens).sum();
        stats.val_tokens = self.val.tokens;
        let mut manifest = Manifest::new(key, stats, self.tokenizer.json());
        manifest.train = self.train.into_iter().map(StreamWriter::finish).collect::<Result<_, _>>()?;
        manifest.val = self.val.finish()?;
        Ok(manifest)
    }
}

/// The byte at which character number `n` of `all` begins; a byte that is not UTF-8 is a character.
fn byte_of_char(bytes: &[u8], n: u64, all: u64) -> usize {
    if n == all {
        return bytes.len();
    }
    let mut left = n as usize;
    let mut at = 0;
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if left == 0 {
                return at;
            }
            left -= 1;
            at += c.len_utf8();
        }
        let step = left.min(chunk.invalid().len());
        left -= step;
        at += step;
        if left == 0 && step < chunk.invalid().len() {
            return at;
        }
    }
    at
}
