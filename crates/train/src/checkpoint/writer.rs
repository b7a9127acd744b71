//! Writing a checkpoint: aside, flushed, renamed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::error::{CheckpointError, is_full};
use super::folder;
use super::manifest::{FileEntry, MANIFEST, Manifest, check_name};
use super::pieces::{Hash, PORTION, PieceWriter, TensorPlan};
use super::tensors::TensorSpec;

/// Writes one checkpoint. Nothing of it is visible until [`finish`](Self::finish) returns; dropped before that, or
/// after any error, it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    step: u64,
    temp: PathBuf,
    /// Held for its lock: see [`folder::create_temp`].
    _lock: Option<File>,
    files: BTreeMap<String, FileEntry>,
    /// Bytes of the finished files.
    written: u64,
    /// Bytes that the file being written will have, as far as is known.
    current: u64,
    /// Whether `temp` is still there and ours.
    open: bool,
}

impl Writer {
    /// Starts the checkpoint `dir/step-N` (with `dir` usually `RUN/checkpoints`), and creates `dir` if it is not there.
    ///
    /// Leftovers of writers that were killed are removed.
    ///
    /// # Errors
    ///
    /// If the folder cannot be created, or this process has another writer open for the same step.
    pub fn create(dir: impl AsRef<Path>, step: u64) -> Result<Self, CheckpointError> {
        let dir = dir.as_ref();
        let made = folder::create_all(dir).and_then(|()| {
            folder::clean(dir);
            folder::create_temp(dir, step)
        });
        let (temp, lock) = made.map_err(|error| explain_full(error, dir, step, 0))?;
        Ok(Self {
            dir: dir.to_owned(),
            step,
            temp,
            _lock: lock,
            files: BTreeMap::new(),
            written: 0,
            current: 0,
            open: true,
        })
    }

    /// The step this checkpoint is of.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Writes a safetensors file with the tensors `specs`, whose bytes `data` gives in the same order.
    ///
    /// `data` is asked for a tensor only when the one before is written and dropped, so a lazy iterator keeps at most
    /// one in memory. An iterator that cannot go on just ends: that is an error here, and leaves no checkpoint.
    /// `metadata` is text kept in the file's header, such as `format = "pt"` for readers of Hugging Face.
    ///
    /// # Errors
    ///
    /// If names repeat, a type narrower than the next tensor's would misalign that, the bytes do not fit the shapes,
    /// there are fewer or more tensors than specs, or the disk fails.
    pub fn tensors<I>(
        &mut self,
        name: &str,
        metadata: &BTreeMap<String, String>,
        specs: &[TensorSpec],
        data: I,
    ) -> Result<(), CheckpointError>
    where
        I: IntoIterator,
        I::Item: AsRef<[u8]>,
    {
        let result = self.try_tensors(name, metadata, specs, data);
        self.settle(result)
    }

    fn try_tensors<I>(
        &mut self,
        name: &str,
        metadata: &BTreeMap<String, String>,
        specs: &[TensorSpec],
        data: I,
    ) -> Result<(), CheckpointError>
    where
        I: IntoIterator,
        I::Item: AsRef<[u8]>,
    {
        let path = self.place(name)?;
        let plan = TensorPlan::new(path, metadata, specs.to_vec(), specs.iter().map(|_| 1))?;
        self.current = plan.size();
        let file = create(plan.path())?;
        let (mut pieces, mut data) = (PieceWriter::new(&plan, file), data.into_iter());
        let hashes = (0..plan.pieces().len()).map(|i| pieces.write(i, &mut data)).collect::<Result<Vec<_>, _>>()?;
        if data.next().is_some() {
            return Err(CheckpointError::invalid("write", plan.path(), format!("{} tensors", specs.len()), "more"));
        }
        pieces.finish()?;
        self.note(name, FileEntry::new(plan.sizes().zip(hashes)));
        Ok(())
    }

    /// Creates a safetensors file for others to write its pieces; [`tensors_written`](Self::tensors_written) follows.
    ///
    /// # Errors
    ///
    /// If the disk fails.
    pub(crate) fn create_tensors(&mut self, name: &str, plan: &TensorPlan) -> Result<(), CheckpointError> {
        self.current = plan.size();
        let result = self.place(name).and_then(|path| create(&path));
        self.settle(result.map(drop))
    }

    /// Notes that all pieces of a safetensors file are on the disk, and their hashes.
    ///
    /// # Errors
    ///
    /// If the file is not of the size that the pieces have together.
    pub(crate) fn tensors_written(
        &mut self,
        name: &str,
        plan: &TensorPlan,
        hashes: impl IntoIterator<Item = Hash>,
    ) -> Result<(), CheckpointError> {
        let size = fs::metadata(plan.path()).map(|found| found.len()).map_err(CheckpointError::io("read", plan.path()));
        let result = size.and_then(|size| match size == plan.size() {
            true => Ok(()),
            false => Err(CheckpointError::torn(
                plan.path(),
                format!("{} bytes, written by all ranks on the same disk", plan.size()),
                format!("{size} bytes"),
            )),
        });
        self.settle(result)?;
        self.note(name, FileEntry::new(plan.sizes().zip(hashes)));
        Ok(())
    }

    /// After an error with a piece: nothing is left behind, and a full disk is explained.
    pub(crate) fn failed(&mut self, error: CheckpointError) -> CheckpointError {
        self.abandon();
        explain_full(error, &self.dir, self.step, self.written + self.current)
    }

    /// The folder in which files wait until the checkpoint is finished.
    pub(crate) fn folder(&self) -> &Path {
        &self.temp
    }

    /// Writes `value` as JSON that people can read. Note that JSON has no NaN or infinity: they become `null`.
    ///
    /// # Errors
    ///
    /// If the value has no form in JSON, such as a map whose keys are no strings, or the disk fails.
    pub fn json(&mut self, name: &str, value: &impl Serialize) -> Result<(), CheckpointError> {
        self.file(name, |sink| {
            let mut text = serde_json::to_vec_pretty(value).map_err(|source| CheckpointError::Json {
                operation: "write",
                path: sink.path.clone(),
                expected: "a value that JSON can hold",
                source,
            })?;
            text.push(b'\n');
            *sink.expected = text.len() as u64;
            sink.write(&text)
        })
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    ///
    /// If the disk fails.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.file(name, |sink| {
            *sink.expected = bytes.len() as u64;
            sink.write(bytes)
        })
    }

    /// Copies the file `from`.
    ///
    /// # Errors
    ///
    /// If `from` cannot be read, or the disk fails.
    pub fn copy(&mut self, name: &str, from: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let from = from.as_ref();
        self.file(name, |sink| {
            let mut file = File::open(from).map_err(CheckpointError::open("copy", from, "a file"))?;
            *sink.expected = file.metadata().map_err(CheckpointError::io("copy", from))?.len();
            let mut buffer = vec![0; PORTION];
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => sink.write(&buffer[..n])?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(CheckpointError::io("copy", from)(error)),
                }
            }
        })
    }

    /// [`finish_with_metric`](Self::finish_with_metric) without a metric.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn finish(self) -> Result<PathBuf, CheckpointError> {
        self.finish_with_metric(None)
    }

    /// Flushes everything, writes the manifest, gives the folder its name `step-N`, and returns its path. A former
    /// checkpoint of the same step is replaced.
    ///
    /// `metric` is what [`find_best`](super::find_best) and [`prune`](super::prune) minimize: the validation loss. One
    /// that is not finite counts as none.
    ///
    /// # Errors
    ///
    /// If the disk fails.
    pub fn finish_with_metric(mut self, metric: Option<f64>) -> Result<PathBuf, CheckpointError> {
        let result = self.seal(metric);
        self.settle(result)
    }

    fn seal(&mut self, metric: Option<f64>) -> Result<PathBuf, CheckpointError> {
        self.check_open()?;
        let folders: BTreeSet<&Path> = self.files.keys().flat_map(|name| Path::new(name).ancestors().skip(1)).collect();
        for inner in folders.into_iter().filter(|path| !path.as_os_str().is_empty()) {
            folder::sync(&self.temp.join(inner))?;
        }
        let text = Manifest::new(self.step, metric, self.files.clone()).text();
        let mut current = text.len() as u64;
        let mut sink = Sink::create(self.temp.join(MANIFEST), &mut current)?;
        sink.write(&text)?;
        sink.close()?;
        folder::sync(&self.temp)?;
        let finished = folder::publish(&self.dir, self.step, &self.temp)?;
        self.open = false;
        Ok(finished)
    }

    /// Writes one file through `fill`, and notes its size and hash.
    fn file(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut Sink<'_>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let result = self.try_file(name, fill);
        self.settle(result)
    }

    fn try_file(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut Sink<'_>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let path = self.place(name)?;
        self.current = 0;
        let mut sink = Sink::create(path, &mut self.current)?;
        fill(&mut sink)?;
        let entry = sink.close()?;
        self.note(name, entry);
        Ok(())
    }

    /// Where a new file of this name goes.
    fn place(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        self.check_open()?;
        check_name(&self.temp, name)?;
        let path = self.temp.join(name);
        if self.files.contains_key(name) {
            return Err(CheckpointError::invalid("write", &path, "each file once", "the same name again"));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(CheckpointError::io("create the folder", parent))?;
        }
        Ok(path)
    }

    fn note(&mut self, name: &str, entry: FileEntry) {
        self.written += entry.size;
        self.current = 0;
        self.files.insert(name.to_owned(), entry);
    }

    fn check_open(&self) -> Result<(), CheckpointError> {
        if self.open {
            return Ok(());
        }
        let path = folder::finished_path(&self.dir, self.step);
        Err(CheckpointError::invalid("go on with", &path, "a writer without errors", "one that failed before"))
    }

    /// After an error: removes the folder at once, so that its space is free for whatever comes next.
    fn settle<T>(&mut self, result: Result<T, CheckpointError>) -> Result<T, CheckpointError> {
        result.map_err(|error| self.failed(error))
    }

    fn abandon(&mut self) {
        if self.open {
            self.open = false;
            // What cannot be removed now is removed by the next writer.
            drop(folder::remove(&self.temp));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// Says in bytes what is missing, if that is what went wrong.
fn explain_full(error: CheckpointError, dir: &Path, step: u64, needed: u64) -> CheckpointError {
    match error {
        CheckpointError::Io { source, .. } if is_full(&source) => CheckpointError::Full {
            path: folder::finished_path(dir, step),
            needed,
            free: folder::free_bytes(dir),
            source,
        },
        other => other,
    }
}

fn create(path: &Path) -> Result<File, CheckpointError> {
    File::create_new(path).map_err(CheckpointError::io("create", path))
}

/// A file that is hashed while it is written.
struct Sink<'a> {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    size: u64,
    /// How large the file will be, for the message if the disk is full before.
    expected: &'a mut u64,
}

impl<'a> Sink<'a> {
    fn create(path: PathBuf, expected: &'a mut u64) -> Result<Self, CheckpointError> {
        let file = create(&path)?;
        Ok(Self { path, file: BufWriter::with_capacity(PORTION, file), hasher: Sha256::new(), size: 0, expected })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        for piece in bytes.chunks(PORTION) {
            self.hasher.update(piece);
            self.file.write_all(piece).map_err(CheckpointError::io("write", &self.path))?;
            self.size += piece.len() as u64;
            *self.expected = self.size.max(*self.expected);
        }
        Ok(())
    }

    fn close(mut self) -> Result<FileEntry, CheckpointError> {
        self.file.flush().map_err(CheckpointError::io("write", &self.path))?;
        self.file.get_ref().sync_all().map_err(CheckpointError::io("flush", &self.path))?;
        Ok(FileEntry::new([(self.size, self.hasher.finalize().into())]))
    }
}
