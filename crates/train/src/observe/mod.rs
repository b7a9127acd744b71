//! What watches a run: the progress line, `metrics.jsonl`, TensorBoard event files, `summary.json`, samples and the
//! HTML report.
//!
//! The training loop tells one [`Observer`] what happens, as [`Event`]s, and knows nothing else. [`Observers`] hands
//! every event on to a list of them; [`Observers::standard`] is the list that `firebox train` uses. All that is known
//! about a run afterwards lies in its folder:
//!
//! ```text
//! RUN/
//!   run.json          what was started: model, data, machine ([`RunInfo`])
//!   recipe.toml       the resolved recipe
//!   metrics.jsonl     a line per logged step, evaluation and skipped step ([`metrics`])
//!   summary.json      the result ([`Summary`]); absent while the run goes on
//!   timeline.json     what each rank did in one step, where that was asked for ([`timeline`](crate::timeline))
//!   baselines.json    what gzip and xz make of the held-out text ([`compare`])
//!   samples/step-N.txt
//!   events.out.tfevents.*    for `tensorboard --logdir RUN`
//!   report.html       made from the files above alone ([`report`]), so it can be remade at any time
//! ```
//!
//! # Example
//!
//! ```
//! use firebox_train::observe::{Event, EvalRecord, Observer, Observers, RunInfo, StepRecord, Summary};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = std::env::temp_dir().join(format!("firebox-observe-doc-{}", std::process::id()));
//! let mut observers = Observers::files(); // `standard()` adds the progress line
//! let info = RunInfo { dir: dir.clone(), name: "tiny".into(), params: 1_000, total_steps: 2, ..RunInfo::default() };
//! observers.on_event(&Event::RunStarted(&info))?;
//! for step in 1..=2 {
//!     let loss = 5.0 / step as f64;
//!     let record = StepRecord { step, tokens: step * 512, loss, lr: 1e-3, grad_norm: 0.9, tokens_per_s: 800.0, ..StepRecord::default() };
//!     observers.on_event(&Event::Step(&record))?;
//! }
//! observers.on_event(&Event::Evaluated(&EvalRecord { step: 2, tokens: 1024, val_loss: 2.6, val_bpb: 1.9, ..EvalRecord::default() }))?;
//! let summary = Summary { params: 1_000, steps: 2, tokens: 1024, wall_s: 1.3, val_bpb: Some(1.9), ..Summary::default() };
//! observers.on_event(&Event::Finished(&summary))?;
//!
//! let html = std::fs::read_to_string(dir.join("report.html"))?;
//! assert!(html.contains("1.900 bits per byte"));
//! # std::fs::remove_dir_all(dir)?;
//! # Ok(())
//! # }
//! ```

pub mod compare;
pub(crate) mod files;
pub mod format;
pub mod memory;
pub mod metrics;
mod progress;
mod record;
pub mod report;
pub mod tensorboard;

use std::io;
use std::path::{Path, PathBuf};

pub use files::RunFiles;
pub use metrics::MetricsWriter;
pub use progress::Progress;
pub use record::{DistillRecord, EvalRecord, RanksRecord, RunInfo, StepRecord, Summary};
pub use report::ReportWriter;
pub use tensorboard::TensorBoard;

use crate::timeline::Span;

/// Something that happened in a run, in the order in which it happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The run starts or resumes; always the first event.
    RunStarted(&'a RunInfo),
    /// A step to be logged is done.
    Step(&'a StepRecord),
    /// The held-out text was evaluated.
    Evaluated(&'a EvalRecord),
    /// The model wrote a text. It is the model's: nothing about it can be trusted.
    Sampled {
        /// Steps done so far.
        step: u64,
        /// What the model wrote.
        text: &'a str,
    },
    /// The model made a picture.
    Pictured {
        /// Steps done so far.
        step: u64,
        /// A PNG file.
        png: &'a [u8],
    },
    /// What each rank did in the step that was to be shown.
    Timeline {
        /// The step.
        step: u64,
        /// By rank.
        ranks: &'a [Vec<Span>],
    },
    /// A checkpoint is whole and in its place.
    CheckpointSaved {
        /// Steps done so far.
        step: u64,
        /// The folder of the checkpoint.
        path: &'a Path,
    },
    /// A step did not update the parameters.
    Skipped {
        /// The step that was skipped.
        step: u64,
        /// Why, in a few words: "the loss is not finite".
        reason: &'a str,
    },
    /// The run is over; always the last event of a run that was not killed.
    Finished(&'a Summary),
}

/// Sees the events of a run.
///
/// An observer may write files and lines; it can't change the run.
pub trait Observer {
    /// Takes notice of `event`.
    ///
    /// # Errors
    ///
    /// When what the observer keeps can't be written, for example because the disk is full.
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError>;
}

/// A list of observers that see every event, in order.
#[derive(Default)]
pub struct Observers(Vec<Box<dyn Observer>>);

impl Observers {
    /// No observers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything a run leaves in its folder, without output to the terminal.
    pub fn files() -> Self {
        let mut all = Self::new();
        all.push(RunFiles::new());
        all.push(MetricsWriter::new());
        all.push(TensorBoard::new());
        // Last, since it reads what the others wrote.
        all.push(ReportWriter::new());
        all
    }

    /// What `firebox train` uses: the progress line or bar and [`Observers::files`].
    pub fn standard() -> Self {
        let mut all = Self::files();
        all.0.insert(0, Box::new(Progress::auto()));
        all
    }

    /// Adds an observer at the end.
    pub fn push(&mut self, observer: impl Observer + 'static) {
        self.0.push(Box::new(observer));
    }
}

impl Observer for Observers {
    /// Hands the event to all, also when one of them fails; the first error is returned.
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        let mut result = Ok(());
        for observer in &mut self.0 {
            let this = observer.on_event(event);
            if result.is_ok() {
                result = this;
            }
        }
        result
    }
}

/// What can go wrong while a run is watched or its report is made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// A file of the run folder could not be written.
    #[error("cannot write {}: {source}; make room or choose another --out, then go on with --resume", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the run folder could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of the run folder does not hold what it should.
    #[error("{} is not readable as {expected}: {reason}; remove the file to go on without it", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What was found.
        reason: String,
    },
    /// The folder is not one of a run.
    #[error("{} is not a run folder: it has neither run.json nor metrics.jsonl; give the folder that `firebox train --out` wrote", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// A plot could not be drawn.
    #[error("cannot draw the plot \"{plot}\": {reason}")]
    Draw {
        /// The plot's title.
        plot: String,
        /// What the drawing library said.
        reason: String,
    },
}

impl ObserveError {
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Write { path: path.to_path_buf(), source }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Read { path: path.to_path_buf(), source }
    }
}
