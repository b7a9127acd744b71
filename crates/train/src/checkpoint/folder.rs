//! Names of folders, flushing them, and cleaning up after processes that died.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::error::CheckpointError;

/// What the name of an entry in the checkpoints folder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// `.step-N.gone-*`: being deleted.
    Gone,
    /// `.step-N.tmp-*`: being written.
    Temp,
    /// `.step-N.old-*`: whole, waiting to be replaced.
    Aside,
    /// `step-N`.
    Finished,
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) step: u64,
    pub(super) kind: Kind,
    pub(super) path: PathBuf,
}

/// Where a system cannot lock folders, an unfinished one this old is taken for a leftover.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn finished_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step}"))
}

pub(super) fn temp_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!(".step-{step}.tmp-{}", std::process::id()))
}

/// A name that this process has not used yet. A dead process with the same number may have: then the rename fails and
/// the next name is tried.
fn unused_path(dir: &Path, step: u64, kind: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".step-{step}.{kind}-{}.{n}", std::process::id()))
}

/// Reads a name; `None` for what is not ours.
fn parse(name: &str) -> Option<(u64, Kind)> {
    // `step-07` or `step-+7` would be a second name for the same step.
    let number = |text: &str| text.parse().ok().filter(|n: &u64| n.to_string() == text);
    if let Some(rest) = name.strip_prefix("step-") {
        return Some((number(rest)?, Kind::Finished));
    }
    let (step, suffix) = name.strip_prefix(".step-")?.split_once('.')?;
    let (kind, _) = suffix.split_once('-')?;
    let kind = match kind {
        "tmp" => Kind::Temp,
        "old" => Kind::Aside,
        "gone" => Kind::Gone,
        _ => return None,
    };
    Some((number(step)?, kind))
}

/// All our folders in `dir`, in no particular order.
pub(super) fn scan(dir: &Path) -> Result<Vec<Entry>, CheckpointError> {
    let list = fs::read_dir(dir).map_err(CheckpointError::open("list", dir, "a folder with checkpoints"))?;
    let mut entries = Vec::new();
    for entry in list {
        let entry = entry.map_err(CheckpointError::io("list", dir))?;
        if let Some((step, kind)) = entry.file_name().to_str().and_then(parse) {
            entries.push(Entry { step, kind, path: entry.path() });
        }
    }
    Ok(entries)
}

/// Makes names created, renamed or removed in `dir` survive a power cut.
pub(super) fn sync(dir: &Path) -> Result<(), CheckpointError> {
    // Windows has no flush of a folder; renames there are journaled by NTFS.
    if cfg!(unix) {
        File::open(dir).and_then(|file| file.sync_all()).map_err(CheckpointError::io("flush", dir))?;
    }
    Ok(())
}

/// `create_dir_all`, with each new name flushed.
pub(super) fn create_all(dir: &Path) -> Result<(), CheckpointError> {
    if dir.as_os_str().is_empty() || dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(Path::new(""));
    create_all(parent)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(error) => Err(CheckpointError::io("create the folder", dir)(error)),
        Ok(()) => sync(if parent.as_os_str().is_empty() { Path::new(".") } else { parent }),
    }
}

/// Creates the folder to write `step` in, and locks it for as long as the returned file is open.
///
/// The lock tells [`clean`] in any other process, also one in another container on the same disk, that the folder is in
/// use; the operating system drops it when this process dies, however it dies. `None` where folders cannot be locked.
pub(super) fn create_temp(dir: &Path, step: u64) -> Result<(PathBuf, Option<File>), CheckpointError> {
    let path = temp_path(dir, step);
    // Another process that cleans up may hold the lock of a new folder for a moment; another writer holds it for long.
    for _ in 0..50 {
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A dead process had our number, which is common in containers, or this process writes the step twice.
                match take_abandoned(&path, true) {
                    Some(_lock) => remove(&path).map_err(CheckpointError::io("remove the leftover", &path))?,
                    None => std::thread::sleep(Duration::from_millis(5)),
                }
                continue;
            }
            Err(error) => return Err(CheckpointError::io("create the folder", &path)(error)),
        }
        match File::open(&path).map(|file| (file.try_lock(), file)) {
            // Unless a process that cleans up had removed it before it was locked.
            Ok((Ok(()), file)) if path.is_dir() => return Ok((path, Some(file))),
            Ok((Ok(()) | Err(TryLockError::WouldBlock), _)) => {}
            Ok((Err(TryLockError::Error(_)), _)) => return Ok((path, None)),
            Err(_) if path.is_dir() => return Ok((path, None)),
            Err(_) => {}
        }
    }
    Err(CheckpointError::invalid(
        "create the folder",
        &path,
        "one writer of this step",
        "a second one, the first is open",
    ))
}

/// `Some` if nobody writes in the folder any more; its lock, where there is one, is to be held while it is removed, so
/// that a writer that has just created it waits. `ours`: its name has the number of this process.
fn take_abandoned(path: &Path, ours: bool) -> Option<Option<File>> {
    match File::open(path).map(|file| (file.try_lock(), file)) {
        Ok((Ok(()), file)) => Some(Some(file)),
        Ok((Err(TryLockError::WouldBlock), _)) => None,
        Ok((Err(TryLockError::Error(_)), _)) | Err(_) => {
            let modified = fs::metadata(path).and_then(|m| m.modified()).ok();
            let age = modified.and_then(|time| SystemTime::now().duration_since(time).ok());
            (ours || age.is_some_and(|age| age > ABANDONED_AFTER)).then_some(None)
        }
    }
}

/// Removes what dead processes left, and brings back a checkpoint that one was about to replace.
///
/// It is a courtesy: what cannot be removed stays, and is neither an error nor ever taken for a checkpoint.
pub(super) fn clean(dir: &Path) {
    for Entry { step, kind, path } in scan(dir).unwrap_or_default() {
        match kind {
            Kind::Finished => {}
            Kind::Gone => drop(remove(&path)),
            Kind::Temp => {
                if let Some(_lock) = take_abandoned(&path, false) {
                    drop(remove(&path));
                }
            }
            Kind::Aside => {
                let finished = finished_path(dir, step);
                if finished.exists() {
                    drop(discard(dir, step, &path));
                } else {
                    drop(fs::rename(&path, finished));
                }
            }
        }
    }
}

/// Renames `from` to a name of its own of this kind, and returns that.
fn rename_unused(dir: &Path, step: u64, kind: &str, from: &Path) -> io::Result<PathBuf> {
    loop {
        let to = unused_path(dir, step, kind);
        match fs::rename(from, &to) {
            Ok(()) => return Ok(to),
            Err(error) if is_occupied(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Deletes a checkpoint. It is renamed first, so that a half-deleted folder is never taken for one.
pub(super) fn discard(dir: &Path, step: u64, path: &Path) -> io::Result<()> {
    let gone = match rename_unused(dir, step, "gone", path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    // The name must be gone from the disk before the content is.
    if cfg!(unix) {
        File::open(dir)?.sync_all()?;
    }
    remove(&gone)
}

/// Gives the complete folder `temp` the name of its step, replacing a former checkpoint of that step.
///
/// A folder with content cannot be renamed over another, so that the former one is set aside for a moment. Killed in
/// that moment, it is found under the name it has aside ([`Kind::Aside`]), and [`clean`] brings it back.
pub(super) fn publish(dir: &Path, step: u64, temp: &Path) -> Result<PathBuf, CheckpointError> {
    let finished = finished_path(dir, step);
    let error = |source| CheckpointError::io("rename the finished checkpoint to", &finished)(source);
    loop {
        let aside = match rename_unused(dir, step, "old", &finished) {
            Ok(aside) => Some(aside),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(error(e)),
        };
        let renamed = fs::rename(temp, &finished);
        match (renamed, aside) {
            (Ok(()), aside) => {
                sync(dir)?;
                if let Some(aside) = aside {
                    // If this fails the next cleaning does it.
                    drop(discard(dir, step, &aside));
                }
                return Ok(finished);
            }
            // Another process that cleans up brought the former one back, or wrote the same step: again.
            (Err(e), aside) if is_occupied(&e) => {
                if let Some(aside) = aside {
                    drop(discard(dir, step, &aside));
                }
            }
            (Err(e), aside) => {
                if let Some(aside) = aside {
                    drop(fs::rename(aside, &finished));
                }
                return Err(error(e));
            }
        }
    }
}

fn is_occupied(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty)
}

/// `remove_dir_all`, content with what is gone already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Bytes free for this user on the disk of `path`.
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt as _;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
        // SAFETY: `statvfs` is plain numbers, for which all zero bytes are a value; the call writes only into it and
        // reads `path`, a C string that outlives the call.
        let stat = unsafe {
            let mut stat: libc::statvfs = std::mem::zeroed();
            (libc::statvfs(path.as_ptr(), &raw mut stat) == 0).then_some(stat)
        }?;
        // The widths of the fields differ between systems.
        #[allow(clippy::unnecessary_cast)]
        Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_exactly() {
        assert_eq!(parse("step-0"), Some((0, Kind::Finished)));
        assert_eq!(parse("step-18446744073709551615"), Some((u64::MAX, Kind::Finished)));
        assert_eq!(parse(".step-12.tmp-99"), Some((12, Kind::Temp)));
        assert_eq!(parse(".step-12.old-99.0"), Some((12, Kind::Aside)));
        assert_eq!(parse(".step-12.gone-99.7"), Some((12, Kind::Gone)));
        for other in ["step-", "step-07", "step-+7", "step-1x", "step-18446744073709551616", ".step-1", ".step-1.new-2"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_folder_in_use_is_not_cleaned_and_an_abandoned_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lock) = create_temp(dir.path(), 3).unwrap();
        assert!(lock.is_some());
        clean(dir.path());
        assert!(path.is_dir(), "its writer lives");
        assert!(matches!(create_temp(dir.path(), 3), Err(CheckpointError::Invalid { .. })));
        drop(lock);
        clean(dir.path());
        assert!(!path.exists(), "its writer is gone");
    }

    #[test]
    fn a_leftover_with_our_own_process_number_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = temp_path(dir.path(), 3);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("half"), "x").unwrap();
        let (again, _lock) = create_temp(dir.path(), 3).unwrap();
        assert_eq!(again, path);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn what_was_set_aside_comes_back_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let aside = dir.path().join(".step-5.old-1.0");
        fs::create_dir(&aside).unwrap();
        fs::write(aside.join("mark"), "old").unwrap();
        clean(dir.path());
        assert_eq!(fs::read_to_string(dir.path().join("step-5/mark")).unwrap(), "old");
        fs::create_dir(&aside).unwrap();
        clean(dir.path());
        assert!(!aside.exists());
        assert!(dir.path().join("step-5/mark").exists());
    }

    #[test]
    fn free_space_is_known_here() {
        assert!(!cfg!(unix) || free_bytes(Path::new("/")).is_some());
        assert_eq!(free_bytes(Path::new("/no/such/place")), None);
    }
}
