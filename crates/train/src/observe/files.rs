//! The plain files of a run folder: `run.json`, `recipe.toml`, `summary.json`, `samples/`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Event, ObserveError, Observer};
use crate::timeline::write_chrome_trace;

/// A file of a run folder that is larger than this was not written by Firebox.
const MAX_SMALL_FILE: u64 = 16 << 20;

/// Writes `run.json`, `recipe.toml`, `samples/step-N.txt`, `timeline.json` and, at the end, `summary.json`.
///
/// At a start it removes what a run that went further left behind (the old summary, and samples after the first step), and files that a process
/// was writing aside when it was killed.
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
                remove_abandoned(&self.dir)?;
                remove_abandoned(&samples)?;
                remove_if_there(&self.dir.join("summary.json"))?;
                if info.start_step == 0 {
                    remove_if_there(&self.dir.join("timeline.json"))?;
                }
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
            Event::Pictured { step, png } => replace(&self.dir.join("samples").join(format!("step-{step}.png")), png),
            Event::Timeline { step, ranks } => {
                let mut text = vec![];
                let path = self.dir.join("timeline.json");
                write_chrome_trace(*step, ranks, &mut text).map_err(ObserveError::write(&path))?;
                replace(&path, &text)
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

/// Removes the files that [`replace`] was writing in this folder in processes that are gone.
fn remove_abandoned(dir: &Path) -> Result<(), ObserveError> {
    for entry in fs::read_dir(dir).map_err(ObserveError::read(dir))? {
        let entry = entry.map_err(ObserveError::read(dir))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.rsplit_once(ASIDE)?.1.parse::<u32>().ok());
        // One with our own number is not ours: nothing is being written yet. In containers numbers come again.
        if id.is_some_and(|id| id == std::process::id() || !is_alive(id)) {
            remove_if_there(&entry.path())?;
        }
    }
    Ok(())
}

/// Whether a process has this number; true where the system cannot be asked.
fn is_alive(id: u32) -> bool {
    #[cfg(unix)]
    {
        let Ok(id) = libc::pid_t::try_from(id) else { return false };
        // SAFETY: signal 0 is none; the call only says whether it could be sent.
        let sent = unsafe { libc::kill(id, 0) } == 0;
        sent || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
    }
    #[cfg(not(unix))]
    {
        let _ = id;
        true
    }
}

/// Between the name of a file and the number of the process that is writing it.
const ASIDE: &str = ".tmp-";

/// Writes a file aside, flushes it and moves it into place, so that a reader sees the old content or the new.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), ObserveError> {
    replace_with(path, |file| file.write_all(content))
}

/// As [`replace`], for content that is written piece by piece.
pub(crate) fn replace_with(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), ObserveError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!("{ASIDE}{}", std::process::id()));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_what_dead_processes_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (alive, own) = (child.id(), std::process::id());
        let stay =
            [format!("run.json.tmp-{alive}"), "run.json".into(), "a.tmp-x".into(), "b.tmp-".into(), "tmp-7".into()];
        let go = [format!("run.json.tmp-{own}"), format!("step-3.txt.tmp-{}", u32::MAX)];
        for name in stay.iter().chain(&go) {
            fs::write(dir.path().join(name), "half").unwrap();
        }
        remove_abandoned(dir.path()).unwrap();
        let left = |name: &String| dir.path().join(name).exists();
        assert!(stay.iter().all(left) && !go.iter().any(left));
        child.kill().unwrap();
        child.wait().unwrap();
        remove_abandoned(dir.path()).unwrap();
        assert_eq!(left(&stay[0]), !cfg!(unix));
    }
}
