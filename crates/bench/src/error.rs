//! What can go wrong in a benchmark.

use std::io;
use std::path::PathBuf;

use crate::contender::Contender;

/// The result of a step of a benchmark.
pub type Result<T> = std::result::Result<T, Error>;

/// Why there is no result, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, folder or stream.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program that cannot be started.
    #[error("cannot start {what} ({}): {source}; {advice}", program.display())]
    Spawn {
        /// What it is.
        what: String,
        /// Its path.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// A program that a contender needs and that was not named.
    #[error(
        "{contender} needs {what}: start the benchmark by `cargo xtask bench`, which provides it, or give {option}"
    )]
    Program {
        /// Who needs it.
        contender: Contender,
        /// What it is.
        what: &'static str,
        /// The option that names it.
        option: &'static str,
    },
    /// A worker that ended when it should have answered.
    #[error("{contender} died ({status}) while it should {doing}; its last words:\n{stderr}")]
    Died {
        /// Who.
        contender: Contender,
        /// How it ended.
        status: String,
        /// What it was asked for.
        doing: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// A line that is not what the protocol says.
    #[error("a worker's line is not {expected}: `{got}`")]
    Protocol {
        /// What should have come.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// JSON that cannot be read or written.
    #[error("cannot convert {what} from or to JSON: {source}")]
    Json {
        /// What it is.
        what: &'static str,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// Two contenders that do not train the same model.
    #[error("{contender} has {got} parameters, firebox's model {expected}: they must train the same model")]
    OtherModel {
        /// Who.
        contender: Contender,
        /// Firebox's count.
        expected: u64,
        /// Its count.
        got: u64,
    },
    /// A contender in a task that it has no part in.
    #[error("{contender} has no {task}; {advice}")]
    NoPart {
        /// Who.
        contender: Contender,
        /// What it was to do.
        task: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// An unknown name.
    #[error("no {kind} is named `{name}`: known are {known}")]
    Unknown {
        /// What is named.
        kind: &'static str,
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A shape that no model has.
    #[error(transparent)]
    Model(#[from] firebox_models::transformer::ConfigError),
    /// The optimizer.
    #[error(transparent)]
    Optim(#[from] firebox_optim::OptimError),
    /// The training engine.
    #[error(transparent)]
    Train(#[from] Box<firebox_train::TrainError>),
    /// A device.
    #[error(transparent)]
    Device(#[from] firebox_tensor::device::DeviceError),
    /// The pool of threads.
    #[error(transparent)]
    Threads(#[from] firebox_tensor::threads::ThreadsError),
    /// A plot.
    #[error("cannot draw the plot `{plot}`: {reason}")]
    Draw {
        /// Its name.
        plot: String,
        /// What plotters said.
        reason: String,
    },
    /// A document without the markers of a generated section.
    #[error("{} has no line `{marker}`: put it back from the repository's history", path.display())]
    Marker {
        /// The document.
        path: PathBuf,
        /// The marker.
        marker: String,
    },
}

impl Error {
    /// An I/O error on `path` while doing `operation` ("read", "create", ...).
    pub fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }
}

impl From<firebox_train::TrainError> for Error {
    fn from(error: firebox_train::TrainError) -> Self {
        Self::Train(Box::new(error))
    }
}
