//! A teacher's predictions for all samples of a run, on disk: of each token the k most probable next ones, with their probabilities at the run's temperature.
//!
//! The file is in the run's folder: a line of JSON that says whose predictions of what they are, filled up with spaces to [`HEADER`] bytes, and for each sample
//! `[context, k]` tokens (u32) and as many probabilities (f32), little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::activation::softmax;
use firebox_data::{Dataset, Loader};
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_tensor::ops::{Sequence, SoftTargets, zigzag_part};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::TrainError;
use crate::evaluate::token_batch;
use crate::model_io::to_host;
use crate::ranks::Ranks;

/// The file's name.
const FILE: &str = "teacher-top-k.bin";

/// Bytes before the first sample.
const HEADER: usize = 1024;

/// Bytes of logits that are made at once.
const LOGITS_BYTES: usize = 64 << 20;

/// Whose predictions of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contents {
    /// SHA-256 of the teacher's files.
    teacher: String,
    /// The prepared corpus: a hash of its files and of what shapes its tokens.
    corpus: String,
    seed: u64,
    context: usize,
    vocab: usize,
    k: usize,
    temperature: f64,
    samples: u64,
}

impl Contents {
    /// Those of a run that reads so many samples.
    ///
    /// # Errors
    /// [`TrainError::Io`] where the teacher cannot be read.
    pub fn new(
        teacher: &Path,
        dataset: &Dataset,
        (seed, context, vocab): (u64, usize, usize),
        (k, temperature, samples): (usize, f64, u64),
    ) -> Result<Self, TrainError> {
        let corpus = dataset.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { teacher: hash_model(teacher)?, corpus, seed, context, vocab, k, temperature, samples })
    }

    /// Bytes of a sample.
    fn sample(&self) -> usize {
        self.context * self.k * 8
    }

    fn file(&self) -> Option<u64> {
        (self.sample() as u64).checked_mul(self.samples)?.checked_add(HEADER as u64)
    }

    /// What is another thing in `there`.
    fn difference(&self, there: &Self) -> Option<(String, String)> {
        let of = |contents: &Self| match serde_json::to_value(contents) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (mine, theirs) = (of(self), of(there));
        let (key, mine) = mine.into_iter().find(|(key, value)| theirs.get(key) != Some(value))?;
        Some((format!("{key} {mine}"), theirs.get(&key).map(ToString::to_string).unwrap_or_default()))
    }
}

/// SHA-256 of a model's files; a checkpoint's manifest has those of all.
pub(crate) fn hash_model(model: &Path) -> Result<String, TrainError> {
    let manifest = model.join(crate::checkpoint::MANIFEST);
    let mut files = vec![manifest.clone()];
    if model.is_file() {
        files = vec![model.to_path_buf()];
    } else if !manifest.is_file() {
        let found = fs::read_dir(model).map_err(TrainError::io("read", model))?;
        let named = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors" || end == "json");
        files = found.filter_map(|entry| Some(entry.ok()?.path())).filter(named).collect();
        files.sort();
    }
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    for path in files {
        let mut file = File::open(&path).map_err(TrainError::io("read", &path))?;
        loop {
            match file.read(&mut buffer).map_err(TrainError::io("read", &path))? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The predictions, mapped into memory.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    map: Arc<Mmap>,
    contents: Contents,
}

impl Cache {
    /// The file in `dir`; made first where there is none, each rank some of the samples.
    ///
    /// # Errors
    /// [`TrainError::Resume`] for a file of another teacher, corpus or run, or a torn one; [`TrainError::Io`]; [`TrainError::Comm`].
    pub fn open(
        dir: &Path,
        contents: Contents,
        teacher: &Transformer,
        loader: &Loader,
        ranks: Option<&Ranks>,
    ) -> Result<Self, TrainError> {
        let (path, first) = (dir.join(FILE), ranks.is_none_or(|ranks| ranks.world_rank() == 0));
        let missing = ranks.map_or(Ok(!path.is_file()), |ranks| ranks.any(first && !path.is_file()))?;
        if missing {
            let aside = dir.join(format!("{FILE}.part"));
            // An error ends the run on all ranks: nobody waits for one that is gone.
            if first {
                fs::create_dir_all(dir).map_err(TrainError::io("create", dir))?;
                begin(&aside, &contents)?;
            }
            ranks.map_or(Ok(false), |ranks| ranks.any(false))?;
            fill(&aside, &contents, teacher, loader, ranks.map_or((0, 1), Ranks::world_place))?;
            ranks.map_or(Ok(false), |ranks| ranks.any(false))?;
            if first {
                fs::rename(&aside, &path).map_err(TrainError::io("rename to", &path))?;
            }
            ranks.map_or(Ok(false), |ranks| ranks.any(false))?;
        }
        Self::check(&path, contents)
    }

    /// Opens a file that must be what is wanted.
    fn check(path: &Path, contents: Contents) -> Result<Self, TrainError> {
        let fail = |expected: String, got: String| Err(TrainError::Resume { path: path.into(), expected, got });
        let file = File::open(path).map_err(TrainError::io("open", path))?;
        // SAFETY: the map is read only; who truncates the file of a run while it goes on ends it.
        let map = unsafe { Mmap::map(&file) }.map_err(TrainError::io("map", path))?;
        let header = map.get(..HEADER).and_then(|header| serde_json::from_slice::<Contents>(header).ok());
        let Some(there) = header else {
            return fail("a teacher's predictions; remove it, and it is made again".into(), "something else".into());
        };
        if let Some((expected, got)) = contents.difference(&there) {
            return fail(format!("predictions of {expected}; remove it, and it is made again"), got);
        }
        if contents.file() != Some(map.len() as u64) {
            let expected =
                format!("{} samples in {:?} bytes; remove it, and it is made again", contents.samples, contents.file());
            return fail(expected, format!("{} bytes", map.len()));
        }
        let cache = Self { map: Arc::new(map), contents };
        let (per_sample, vocab) = (cache.contents.context * cache.contents.k, cache.contents.vocab as u32);
        for sample in 0..cache.contents.samples {
            let (ids, probabilities) = cache.sample(sample);
            if ids.len() != per_sample
                || ids.iter().any(|&id| id >= vocab)
                || probabilities.iter().any(|p| !(0.0..=1.0).contains(p))
            {
                let got = format!("a sample {sample} without them");
                return fail("tokens and probabilities; remove it, and it is made again".into(), got);
            }
        }
        Ok(cache)
    }

    fn sample(&self, sample: u64) -> (Vec<u32>, Vec<f32>) {
        let size = self.contents.sample();
        let bytes =
            self.map.get(HEADER + sample as usize * size..).and_then(|rest| rest.get(..size)).unwrap_or_default();
        let (ids, probabilities) = bytes.split_at(bytes.len() / 2);
        let words = |bytes: &[u8]| bytes.as_chunks::<4>().0.to_vec();
        (
            words(ids).into_iter().map(u32::from_le_bytes).collect(),
            words(probabilities).into_iter().map(f32::from_le_bytes).collect(),
        )
    }

    /// What the teacher predicts for a batch whose rows are samples from `first` on, or one rank's part of their tokens; none where the file ends before.
    pub fn targets(&self, first: u64, sequence: &Sequence) -> Option<SoftTargets> {
        let (k, rows, tokens) = (self.contents.k, sequence.batch() as u64, sequence.whole().tokens());
        if first + rows > self.contents.samples || tokens != self.contents.context {
            return None;
        }
        let (mut ids, mut probabilities) = (vec![], vec![]);
        for sample in first..first + rows {
            let (of_ids, of_probabilities) = self.sample(sample);
            ids.extend(of_ids);
            probabilities.extend(of_probabilities);
        }
        let (rank, size) = sequence.divided();
        if size > 1 {
            let all: Vec<usize> = (0..rows as usize * tokens).collect();
            let mine = zigzag_part(&all, tokens, rank, size);
            ids = mine.iter().flat_map(|&at| ids[at * k..(at + 1) * k].to_vec()).collect();
            probabilities = mine.iter().flat_map(|&at| probabilities[at * k..(at + 1) * k].to_vec()).collect();
        }
        Some(SoftTargets::TopK { k, ids: ids.into(), probabilities: probabilities.into() })
    }
}

/// The file with its header and without its samples.
fn begin(path: &Path, contents: &Contents) -> Result<(), TrainError> {
    let io = || TrainError::io("write", path);
    let mut header = serde_json::to_vec(contents).map_err(std::io::Error::from).map_err(io())?;
    header.resize(HEADER, b' ');
    let mut file = File::create(path).map_err(io())?;
    file.write_all(&header).map_err(io())?;
    let too_large = || std::io::Error::other("more bytes than a file can have: set distill.cache_top_k lower");
    file.set_len(contents.file().ok_or_else(too_large).map_err(io())?).map_err(io())
}

/// Writes this rank's samples.
fn fill(
    path: &Path,
    contents: &Contents,
    teacher: &Transformer,
    loader: &Loader,
    (rank, ranks): (usize, usize),
) -> Result<(), TrainError> {
    let io = || TrainError::io("write", path);
    let mut file = OpenOptions::new().write(true).open(path).map_err(io())?;
    let at_once = (LOGITS_BYTES / (4 * contents.context * contents.vocab).max(1)).clamp(1, 16) as u64;
    for (i, first) in (0..contents.samples).step_by(at_once as usize).enumerate() {
        if i % ranks != rank {
            continue;
        }
        let rows = at_once.min(contents.samples - first) as usize;
        let batch = token_batch(loader.batch(first, rows), 1);
        let mut bytes = Vec::with_capacity(rows * contents.sample());
        for (ids, probabilities) in top_k(teacher, &batch, contents) {
            bytes.extend(ids.into_iter().flat_map(u32::to_le_bytes));
            bytes.extend(probabilities.into_iter().flat_map(f32::to_le_bytes));
        }
        file.seek(SeekFrom::Start(HEADER as u64 + first * contents.sample() as u64)).map_err(io())?;
        file.write_all(&bytes).map_err(io())?;
    }
    file.sync_all().map_err(io())
}

/// For each row of a batch, the most probable tokens of all its positions, in falling order; of equal ones, the first.
fn top_k(teacher: &Transformer, batch: &TokenBatch, contents: &Contents) -> Vec<(Vec<u32>, Vec<f32>)> {
    let probabilities = to_host(softmax(teacher.logits(batch) / contents.temperature, 2));
    let (v, k) = (contents.vocab, contents.k);
    let of_row = |row: &[f32]| {
        let (mut ids, mut kept) = (vec![], vec![]);
        for p in row.chunks_exact(v) {
            let mut order: Vec<u32> = (0..v as u32).collect();
            let best = |a: &u32, b: &u32| p[*b as usize].total_cmp(&p[*a as usize]).then(a.cmp(b));
            if k < v {
                order.select_nth_unstable_by(k - 1, best);
                order.truncate(k);
            }
            order.sort_unstable_by(best);
            kept.extend(order.iter().map(|&id| p[id as usize]));
            ids.extend(order);
        }
        (ids, kept)
    };
    probabilities.chunks_exact(contents.context * v).map(of_row).collect()
}
