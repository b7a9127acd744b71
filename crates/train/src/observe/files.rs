//! The plain files of a run folder: `run.json`, `recipe.toml`, `summary.json`, `samples/`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Event, ObserveError, Observer};

/// A file of a run folder that is larger than this was not written by Firebox.
const MAX_SMALL_FILE: u64 = 16 << 20;

/// Writes `run.json`, `recipe.toml`, `samples/step-N.txt` and, at the end, `summary.json`.
///
/// At a start it removes what a run that went further left behind: the old summary, and samples after the first step.
#[derive(Debug, Default)]
pub struct RunFiles {
    dir: PathBuf,
}

impl RunFiles {
    /// An observer that learns its folder from [`Event::RunStarted`].
    pub fn new() -> Self {
        Self::default()
    }
}

impl Observer for RunFiles {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::RunStarted(info) => {
                self.dir.clone_from(&info.dir);
                let samples = self.dir.join("samples");
                fs::create_dir_all(&samples).map_err(ObserveError::write(&samples))?;
                remove_if_there(&self.dir.join("summary.json"))?;
                for (step, path) in samples_in(&self.dir)? {
                    if step > info.start_step || info.start_step == 0 {
                        remove_if_there(&path)?;
                    }
                }
                write_json(&self.dir.join("run.json"), info)?;
                if !info.recipe_toml.is_empty() {
                    replace(&self.dir.join("recipe.toml"), info.recipe_toml.as_bytes())?;
                }
                Ok(())
            }
            Event::Sampled { step, text } => {
                replace(&self.dir.join("samples").join(format!("step-{step}.txt")), text.as_bytes())
            }
            Event::Finished(summary) => write_json(&self.dir.join("summary.json"), summary),
            _ => Ok(()),
        }
    }
}

/// The samples of a run folder by step, lowest first.
pub(crate) fn samples_in(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>, ObserveError> {
    numbered(&run_dir.join("samples"), "step-", ".txt")
}

/// Entries `PREFIX N SUFFIX` of a folder, by N; none if there is no such folder.
pub(crate) fn numbered(dir: &Path, prefix: &str, suffix: &str) -> Result<Vec<(u64, PathBuf)>, ObserveError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ObserveError::read(dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(ObserveError::read(dir))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok());
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a file aside, flushes it and moves it into place, so that a reader sees the old content or the new.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), ObserveError> {
    replace_with(path, |file| file.write_all(content))
}

/// As [`replace`], for content that is written piece by piece.
pub(crate) fn replace_with(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ObserveError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".tmp-{}", std::process::id()));
    let aside = PathBuf::from(aside);
    let result = (|| {
        let mut file = File::create(&aside)?;
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    result.map_err(|source| {
        // Best effort: the error that matters is the one above.
        let _ = fs::remove_file(&aside);
        ObserveError::Write { path: path.to_path_buf(), source }
    })
}

/// Writes a value as indented JSON, through [`replace`].
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), ObserveError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::from).map_err(ObserveError::write(path))?;
    text.push(b'\n');
    replace(path, &text)
}

/// Reads a JSON file; `None` if it is not there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, expected: &'static str) -> Result<Option<T>, ObserveError> {
    let Some(text) = read_small(path, MAX_SMALL_FILE)? else { return Ok(None) };
    serde_json::from_slice(&text).map(Some).map_err(|error| ObserveError::Malformed {
        path: path.to_path_buf(),
        expected,
        reason: error.to_string(),
    })
}

/// Reads a text file, lossily and at most `limit` bytes of it; `None` if it is not there.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<Option<String>, ObserveError> {
    Ok(read_small(path, limit)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

fn read_small(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, ObserveError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ObserveError::read(path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(ObserveError::read(path))?;
    Ok(Some(bytes))
}

fn remove_if_there(path: &Path) -> Result<(), ObserveError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ObserveError::write(path)(error)),
        _ => Ok(()),
    }
}
