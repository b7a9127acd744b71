//! What can go wrong with a checkpoint, said so that one knows what to do.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use super::reader::Skipped;
use super::report::LoadReport;

/// An error of reading, writing or finding a checkpoint.
///
/// `Display` names the operation, what was expected, what was there and what to do; the cause below it, such as the
/// message of the operating system, is in [`source`](std::error::Error::source). [`Self::one_line`] joins the two.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused an operation.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `create`, ...
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The message of the operating system.
        source: io::Error,
    },

    /// The disk, a quota or a limit on file sizes was reached while writing. The unfinished checkpoint has been
    /// removed.
    #[error("no room for the checkpoint {}: it needs at least {}, {}; the unfinished checkpoint was removed and earlier \
             ones are untouched; {}", path.display(), bytes(*needed), free_text(*free), advice(source))]
    Full {
        /// The checkpoint folder that was to be written.
        path: PathBuf,
        /// Bytes that this checkpoint needs as far as it was known when writing stopped.
        needed: u64,
        /// Bytes free for this user after the unfinished checkpoint was removed, where the system tells.
        free: Option<u64>,
        /// The message of the operating system.
        source: io::Error,
    },

    /// There is nothing at this place.
    #[error("cannot {operation} {}: expected {expected}, found nothing there", path.display())]
    Missing {
        /// What was tried, as a verb.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What should have been there.
        expected: String,
    },

    /// A file is cut off or damaged.
    #[error("{} is damaged: expected {expected}, got {got}; use the checkpoint before it (`--resume` does), or copy it \
             again from where it is whole", path.display())]
    Torn {
        /// The damaged file.
        path: PathBuf,
        /// What the manifest or the file's own header promises.
        expected: String,
        /// What is there.
        got: String,
    },

    /// What is there is something else than what was asked for.
    #[error("{} cannot be used: expected {expected}, got {got}", path.display())]
    WrongKind {
        /// The file or folder.
        path: PathBuf,
        /// What was asked for.
        expected: String,
        /// What is there.
        got: String,
    },

    /// A file name that would lead out of the checkpoint folder, or that is no plain name.
    #[error("{} names the file {name:?}, which {reason}; nothing was opened: do not use this checkpoint unless you trust \
             who made it", path.display())]
    UnsafeName {
        /// The manifest or index with the name in it.
        path: PathBuf,
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// The caller of [`Writer`](super::Writer) or [`TensorFile`](super::TensorFile) gave something that does not fit.
    #[error("cannot {operation} {}: expected {expected}, got {got}", path.display())]
    Invalid {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What would have been right.
        expected: String,
        /// What was given.
        got: String,
    },

    /// JSON that does not have the expected form, or a value that cannot be written as JSON.
    #[error("cannot {operation} {}: expected {expected}", path.display())]
    Json {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The type that was expected.
        expected: &'static str,
        /// Where and why it failed.
        source: serde_json::Error,
    },

    /// A tensor that the file does not have.
    #[error("{} has no tensor `{name}`{}", path.display(), nearest_text(nearest.as_deref()))]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name that was asked for.
        name: String,
        /// The name in the file that is most like it.
        nearest: Option<String>,
    },

    /// The tensors are not those of the model.
    #[error("{} does not fit this model: {report}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Everything that does not fit, at once.
        report: Box<LoadReport>,
    },

    /// There are checkpoints, but each of them is damaged.
    #[error("none of the {} checkpoints in {} can be used: {}", skipped.len(), path.display(), skipped_text(skipped))]
    NoneValid {
        /// The folder with the checkpoints.
        path: PathBuf,
        /// Each one with the reason.
        skipped: Vec<Skipped>,
    },
}

impl CheckpointError {
    /// The message and all its causes in one line.
    pub fn one_line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            // Writing to a `String` cannot fail.
            let _ = write!(line, ": {error}");
            cause = error.source();
        }
        line
    }

    /// For `map_err`: the error of `operation` on `path`.
    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.to_owned(), source }
    }

    /// The same for opening what may be absent: then the error is `Missing`.
    pub(super) fn open(operation: &'static str, path: &Path, expected: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::NotFound => {
                Self::Missing { operation, path: path.to_owned(), expected: expected.to_owned() }
            }
            _ => Self::Io { operation, path: path.to_owned(), source },
        }
    }

    pub(crate) fn torn(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Torn { path: path.to_owned(), expected: expected.into(), got: got.into() }
    }

    pub(super) fn invalid(
        operation: &'static str,
        path: &Path,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Invalid { operation, path: path.to_owned(), expected: expected.into(), got: got.into() }
    }
}

/// Whether the error says that there is no more room, wherever the limit comes from.
pub(super) fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// `12.3 MB` with the exact count where rounding hides something.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} bytes") } else { format!("{value:.1} {} ({n} bytes)", UNITS[unit]) }
}

fn free_text(free: Option<u64>) -> String {
    free.map_or_else(|| "how much is free is not known".to_owned(), |n| format!("{} are free", bytes(n)))
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::FileTooLarge => "raise the limit on file sizes (`ulimit -f`), or use a file system without it",
        io::ErrorKind::QuotaExceeded => "delete files that count toward your quota, or keep fewer checkpoints",
        _ => "delete files, keep fewer checkpoints, or choose another disk with `--out`",
    }
}

fn nearest_text(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; the nearest is `{name}`"))
}

fn skipped_text(skipped: &[Skipped]) -> String {
    skipped.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_and_exact() {
        assert_eq!(bytes(999), "999 bytes");
        assert_eq!(bytes(1_234_567), "1.2 MB (1234567 bytes)");
        assert_eq!(bytes(u64::MAX), "18446744.1 TB (18446744073709551615 bytes)");
    }

    #[test]
    fn one_line_has_the_cause() {
        let error = CheckpointError::io("read", Path::new("a/b"))(io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(error.one_line(), "cannot read a/b: permission denied");
    }
}
