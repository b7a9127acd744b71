//! The cache of prepared corpora: one folder per content key, complete or absent.

use crate::config::{DataConfig, Source};
use crate::error::DataError;
use crate::files::{Compression, CorpusFile, Format};
use crate::hash::hex;
use crate::shard::ShardInfo;
use crate::stats::Stats;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Raised whenever the same input would give other shards.
const FORMAT: u32 = 1;
const MANIFEST: &str = "dataset.json";

/// What a cache folder holds; written last.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    pub(crate) key: String,
    pub(crate) stats: Stats,
    pub(crate) tokenizer_crc32c: u32,
    pub(crate) train: Vec<Vec<ShardInfo>>,
    pub(crate) val: Vec<ShardInfo>,
}

impl Manifest {
    pub(crate) fn new(key: String, stats: Stats, tokenizer_json: &str) -> Self {
        let tokenizer_crc32c = crc32c::crc32c(tokenizer_json.as_bytes());
        Self { format: FORMAT, key, stats, tokenizer_crc32c, train: Vec::new(), val: Vec::new() }
    }

    /// Writes the manifest: a line of JSON, and a line with its checksum.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), DataError> {
        let path = dir.join(MANIFEST);
        let json = serde_json::to_string(self).map_err(|e| DataError::io("write", &path)(e.into()))?;
        let text = format!("{json}\n{:08x}\n", crc32c::crc32c(json.as_bytes()));
        write_atomically(&path, text.as_bytes())
    }

    /// Reads it back; what is torn or of another version is an error.
    pub(crate) fn read(dir: &Path, key: &str) -> Result<Self, DataError> {
        let path = dir.join(MANIFEST);
        let torn = |reason: &str| DataError::TornShard { path: path.clone(), reason: reason.into() };
        let text = std::fs::read_to_string(&path).map_err(DataError::io("open", &path))?;
        let (json, crc) = text.split_once('\n').ok_or_else(|| torn("no checksum"))?;
        if crc != format!("{:08x}\n", crc32c::crc32c(json.as_bytes())) {
            return Err(torn("the checksum differs"));
        }
        let manifest: Self = serde_json::from_str(json).map_err(|e| torn(&e.to_string()))?;
        if manifest.format != FORMAT || manifest.key != key {
            return Err(torn("it is of another version or corpus"));
        }
        Ok(manifest)
    }
}

/// Writes a file aside, flushes it to the disk and renames it into place.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".tmp-{}", std::process::id()));
    let aside = Path::new(&aside);
    let write = || {
        let mut file = File::create(aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(aside, path)?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(aside);
        DataError::io("write", path)(e)
    })
}

/// Flushes the entries of a folder to the disk, where the system can: a rename is durable only then.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Held while a corpus is prepared, so that several processes prepare it once; freed by the system if one dies.
pub(crate) fn lock(cache_dir: &Path) -> Result<File, DataError> {
    let path = cache_dir.join(".lock");
    let file = File::create(&path).map_err(DataError::io("create", &path))?;
    match file.lock() {
        Ok(()) => Ok(file),
        // Some network file systems have no locks: the rename into place still keeps a cache whole.
        Err(e) if e.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(e) => Err(DataError::io("lock", &path)(e)),
    }
}

/// The key of a cache: a hash of all that decides about the shards, that is the contents of the files in order, how they
/// are read, and the settings that matter. Names, dates and weights do not.
pub(crate) fn key(
    config: &DataConfig,
    sources: &[Source],
    groups: &[usize],
    files: &[CorpusFile],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<String, DataError> {
    let files = within_cap(files, config.max_bytes);
    let total: u64 = files.iter().map(|f| f.bytes).sum();
    let done = AtomicU64::new(0);
    let mut hashes = Vec::with_capacity(files.len());
    progress(0, total);
    // In batches, so that progress can be told from this thread.
    for batch in files.chunks(256) {
        let part: Vec<[u8; 32]> = batch.par_iter().map(|f| hash_file(&f.path, &done)).collect::<Result<_, _>>()?;
        hashes.extend(part);
        progress(done.load(Ordering::Relaxed), total);
    }
    let settings = DataConfig { isolate_documents: true, ..config.clone() };
    let mut all = Sha256::new();
    let mut put = |value: serde_json::Value| {
        let text = value.to_string();
        all.update((text.len() as u64).to_le_bytes());
        all.update(text.as_bytes());
    };
    put(serde_json::json!([FORMAT, crate::shard::SHARD_TOKENS, groups, sources.len(), settings_json(&settings)?]));
    for (file, hash) in files.iter().zip(&hashes) {
        put(serde_json::json!([
            groups[file.source],
            file.source,
            file.format,
            file.compression,
            file.text_field,
            hex(hash)
        ]));
    }
    if !matches!(config.tokenizer.as_str(), "bpe" | "char") {
        put(serde_json::json!(hex(&hash_file(Path::new(&config.tokenizer), &done)?)));
    }
    Ok(hex(&all.finalize()[..16]))
}

/// The settings, without the path of a tokenizer: its contents count.
fn settings_json(config: &DataConfig) -> Result<serde_json::Value, DataError> {
    let mut json = serde_json::to_value(config).map_err(|e| DataError::io("write", Path::new("settings"))(e.into()))?;
    if !matches!(config.tokenizer.as_str(), "bpe" | "char") {
        json["tokenizer"] = "file".into();
        json["vocab_size"] = 0.into();
    }
    Ok(json)
}

/// The files that a cap on bytes lets be read: plain text counts in full, of other files the text is not known.
fn within_cap(files: &[CorpusFile], max_bytes: Option<u64>) -> Vec<&CorpusFile> {
    let Some(max) = max_bytes else { return files.iter().collect() };
    let mut read = std::collections::HashMap::new();
    let mut fits = |f: &&CorpusFile| {
        let read: &mut u64 = read.entry(f.source).or_default();
        let before = *read;
        if f.format == Format::Plain && f.compression == Compression::None {
            *read += f.bytes;
        }
        before < max
    };
    files.iter().filter(|f| fits(f)).collect()
}

fn hash_file(path: &Path, done: &AtomicU64) -> Result<[u8; 32], DataError> {
    let mut file = File::open(path).map_err(DataError::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let got = file.read(&mut buffer).map_err(DataError::io("read", path))?;
        if got == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..got]);
        done.fetch_add(got as u64, Ordering::Relaxed);
    }
}
