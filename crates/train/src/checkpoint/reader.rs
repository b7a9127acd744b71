//! Opening checkpoints, and finding the one to go on from.

use std::cmp::Reverse;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::error::CheckpointError;
use super::folder::{self, Entry, Kind};
use super::manifest::{FileEntry, MANIFEST, Manifest};
use super::report::nearest;
use super::tensors::TensorFile;

/// How closely files are compared with the manifest when a checkpoint is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// That each file is there and has its size: quick, and finds what was cut off.
    Sizes,
    /// Also its SHA-256: reads every byte once.
    #[default]
    Hashes,
}

/// A checkpoint folder that was found whole.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Opens a checkpoint folder and compares every file with the manifest, by size and SHA-256.
    ///
    /// # Errors
    ///
    /// If it is absent, no checkpoint, or damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::open_with(path, Verify::Hashes)
    }

    /// [`open`](Self::open) with a choice of how closely to look.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn open_with(path: impl AsRef<Path>, verify: Verify) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let manifest = Manifest::read(path)?;
        manifest.verify(path, verify == Verify::Hashes)?;
        Ok(Self { path: path.to_owned(), manifest })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The step after which it was written.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The metric given when it was written, usually the validation loss.
    pub fn metric(&self) -> Option<f64> {
        self.manifest.metric
    }

    /// Names, relative to the folder, and sizes in bytes of its files, in alphabetical order, without the manifest.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.manifest.files.iter().map(|(name, entry)| (name.as_str(), entry.size))
    }

    /// Whether it has a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.manifest.files.contains_key(name)
    }

    fn find(&self, name: &str) -> Result<(PathBuf, &FileEntry), CheckpointError> {
        // Only names of the manifest, which have been checked, become paths.
        let entry = self.manifest.files.get(name).ok_or_else(|| {
            let near = nearest(name, self.manifest.files.keys().map(String::as_str));
            let near = near.map_or_else(String::new, |near| format!(" (the nearest name there is `{near}`)"));
            CheckpointError::Missing {
                operation: "read from",
                path: self.path.clone(),
                expected: format!("the file `{name}`{near}"),
            }
        })?;
        Ok((self.path.join(name), entry))
    }

    /// The path of a file, for libraries that read it themselves.
    ///
    /// # Errors
    ///
    /// If the manifest has no such file.
    pub fn file(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        Ok(self.find(name)?.0)
    }

    /// The content of a file, compared with its SHA-256 again.
    ///
    /// # Errors
    ///
    /// If the manifest has no such file, or it cannot be read or was changed.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let (path, entry) = self.find(name)?;
        let file = File::open(&path).map_err(CheckpointError::io("read", &path))?;
        let mut bytes = Vec::new();
        // No more than the manifest says, whatever has become of the file since it was checked.
        file.take(entry.size.saturating_add(1)).read_to_end(&mut bytes).map_err(CheckpointError::io("read", &path))?;
        entry.check_bytes(&path, &bytes)?;
        Ok(bytes)
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    ///
    /// As [`bytes`](Self::bytes), and if the content is no `T`.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<T, CheckpointError> {
        let bytes = self.bytes(name)?;
        serde_json::from_slice(&bytes).map_err(|source| CheckpointError::Json {
            operation: "read",
            path: self.path.join(name),
            expected: std::any::type_name::<T>(),
            source,
        })
    }

    /// Opens a safetensors file.
    ///
    /// # Errors
    ///
    /// If the manifest has no such file, or its content is no safetensors.
    pub fn tensors(&self, name: &str) -> Result<TensorFile, CheckpointError> {
        TensorFile::open(self.find(name)?.0)
    }
}

/// A checkpoint that cannot be used, and why.
#[derive(Debug)]
pub struct Skipped {
    /// The folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: CheckpointError,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason.one_line())
    }
}

/// A valid checkpoint, and those that would have come before it but are damaged.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Tell the user about these.
    pub skipped: Vec<Skipped>,
}

/// The newest valid checkpoint in `dir`, a folder of `step-N` folders. Changes nothing on the disk.
///
/// # Errors
///
/// [`CheckpointError::Missing`] if `dir` has no checkpoint or is not there: nothing was saved yet.
/// [`CheckpointError::NoneValid`] if it has some, all of them damaged.
pub fn find_latest(dir: impl AsRef<Path>) -> Result<Found, CheckpointError> {
    let dir = dir.as_ref();
    first_valid(dir, candidates(dir)?)
}

/// The valid checkpoint in `dir` with the lowest metric; of equal ones the newest.
///
/// # Errors
///
/// As [`find_latest`]; checkpoints without a metric do not count.
pub fn find_best(dir: impl AsRef<Path>) -> Result<Found, CheckpointError> {
    let dir = dir.as_ref();
    let mut unreadable = Vec::new();
    let mut rated = Vec::new();
    for entry in candidates(dir)? {
        match Manifest::read(&entry.path) {
            Ok(manifest) => rated.extend(manifest.metric.map(|metric| (metric, entry))),
            Err(reason) => unreadable.push(Skipped { path: entry.path, reason }),
        }
    }
    // Stable: among equals the newest stays first.
    rated.sort_by(|a, b| a.0.total_cmp(&b.0));
    if rated.is_empty() && unreadable.is_empty() {
        let expected = "a checkpoint with a validation loss (evaluate before saving)".into();
        return Err(CheckpointError::Missing { operation: "find the best in", path: dir.to_owned(), expected });
    }
    let mut found =
        first_valid(dir, rated.into_iter().map(|(_, entry)| entry).collect()).map_err(|error| match error {
            CheckpointError::NoneValid { path, mut skipped } => {
                skipped.append(&mut unreadable);
                CheckpointError::NoneValid { path, skipped }
            }
            CheckpointError::Missing { path, .. } if !unreadable.is_empty() => {
                CheckpointError::NoneValid { path, skipped: std::mem::take(&mut unreadable) }
            }
            other => other,
        })?;
    found.skipped.append(&mut unreadable);
    Ok(found)
}

/// Opens what a user may mean by a checkpoint: a `step-N` folder, or the newest valid one of a run folder or of its
/// `checkpoints` folder.
///
/// # Errors
///
/// As [`Checkpoint::open`] and [`find_latest`].
pub fn resolve(path: impl AsRef<Path>) -> Result<Found, CheckpointError> {
    let path = path.as_ref();
    if !path.join(MANIFEST).exists() {
        let inner = path.join("checkpoints");
        if inner.is_dir() {
            return find_latest(inner);
        }
        if path.is_dir() && !candidates(path)?.is_empty() {
            return find_latest(path);
        }
    }
    Ok(Found { checkpoint: Checkpoint::open(path)?, skipped: Vec::new() })
}

/// What may be a checkpoint, the newest first. A folder set aside counts, after the finished one of its step: see
/// [`folder::publish`].
fn candidates(dir: &Path) -> Result<Vec<Entry>, CheckpointError> {
    let mut entries = folder::scan(dir)?;
    entries.retain(|entry| matches!(entry.kind, Kind::Finished | Kind::Aside));
    entries.sort_by_key(|entry| Reverse((entry.step, entry.kind)));
    Ok(entries)
}

fn first_valid(dir: &Path, entries: Vec<Entry>) -> Result<Found, CheckpointError> {
    let mut skipped = Vec::new();
    for entry in entries {
        match open_entry(&entry, Verify::Hashes) {
            Ok(checkpoint) => return Ok(Found { checkpoint, skipped }),
            Err(reason) => skipped.push(Skipped { path: entry.path, reason }),
        }
    }
    if skipped.is_empty() {
        let expected = "a checkpoint (a folder named step-N)".into();
        return Err(CheckpointError::Missing { operation: "find one in", path: dir.to_owned(), expected });
    }
    Err(CheckpointError::NoneValid { path: dir.to_owned(), skipped })
}

/// Opens a folder whose name says which step it should be.
pub(super) fn open_entry(entry: &Entry, verify: Verify) -> Result<Checkpoint, CheckpointError> {
    let manifest = Manifest::read(&entry.path)?;
    if manifest.step != entry.step {
        return Err(CheckpointError::WrongKind {
            path: entry.path.clone(),
            expected: format!("the checkpoint of step {}, as its name says", entry.step),
            got: format!("that of step {}: it was renamed", manifest.step),
        });
    }
    manifest.verify(&entry.path, verify == Verify::Hashes)?;
    Ok(Checkpoint { path: entry.path.clone(), manifest })
}
