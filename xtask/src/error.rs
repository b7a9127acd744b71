//! What can go wrong in an xtask. A check that fails is no error but an exit code; an error is a task that could not
//! be done.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

/// The result of a task's step.
pub type Result<T> = std::result::Result<T, Error>;

/// A task that could not be done, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start `{program}`: {source}; {advice}")]
    Spawn { program: String, source: io::Error, advice: &'static str },
    #[error("`{command}` ended with {status}")]
    Failed { command: String, status: ExitStatus },
    #[error("cannot {operation} {}: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("`cargo metadata` on {}: {source}", manifest.display())]
    Metadata { manifest: PathBuf, source: Box<cargo_metadata::Error> },
    #[error("cannot parse {} as TOML: {source}", path.display())]
    Toml { path: PathBuf, source: Box<toml::de::Error> },
    #[error("cargo built `{binary}` but reported no executable")]
    NoExecutable { binary: &'static str },
    #[error("cannot install {what}: {why}")]
    Install { what: String, why: String },
}

impl Error {
    /// An I/O error on `path` while doing `operation` ("read", "create the folder", ...).
    pub fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }
}
