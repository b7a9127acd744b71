//! `metrics.jsonl`: one JSON object a line, for steps, evaluations and skipped steps.
//!
//! ```text
//! {"step":10,"tokens":20480,"loss":6.1,"lr":0.0003,"grad_norm":1.2,"tokens_per_s":1410.0,"mfu":0.6,"memory_bytes":573000000}
//! {"step":10,"tokens":20480,"val_loss":6.0,"val_bpb":2.9}
//! {"step":11,"skipped":"the loss is not finite"}
//! ```
//!
//! A student's steps have the keys of [`DistillRecord`](super::DistillRecord). With several ranks, a step has the keys of [`RanksRecord`](super::RanksRecord) as well. A number that is not finite is `null`. Every line is flushed as it is written, so that a killed run loses at most the
//! line it was at.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{EvalRecord, Event, ObserveError, Observer, StepRecord, files};

/// Longer lines are not ours.
const MAX_LINE: u64 = 64 << 10;

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A logged step.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
    /// A step that did not update the parameters.
    Skipped {
        /// The step.
        step: u64,
        /// Why it was skipped.
        skipped: String,
    },
}

impl Line {
    /// The step the line is about.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
            Self::Skipped { step, .. } => *step,
        }
    }
}

/// All of a `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// The logged steps, in order.
    pub steps: Vec<StepRecord>,
    /// The evaluations, in order.
    pub evals: Vec<EvalRecord>,
    /// Steps that were skipped, and why.
    pub skipped: Vec<(u64, String)>,
    /// Lines that could not be read; the last one of a killed run may be torn.
    pub unreadable_lines: u64,
}

/// Reads a `metrics.jsonl`; `None` if there is no such file.
///
/// # Errors
///
/// When the file can't be read. A line that makes no sense is counted, not an error.
pub fn read(path: &Path) -> Result<Option<Metrics>, ObserveError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ObserveError::read(path)(error)),
    };
    let mut metrics = Metrics::default();
    for_each_line(BufReader::new(file), |_, line| {
        match line {
            Some(Line::Step(record)) => metrics.steps.push(record),
            Some(Line::Eval(record)) => metrics.evals.push(record),
            Some(Line::Skipped { step, skipped }) => metrics.skipped.push((step, skipped)),
            None => metrics.unreadable_lines += 1,
        }
        Ok(())
    })
    .map_err(ObserveError::read(path))?;
    Ok(Some(metrics))
}

/// Drops lines after `last_step`, and lines that make no sense, and rewrites the file aside if there were any.
fn truncate(path: &Path, last_step: u64) -> Result<(), ObserveError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ObserveError::read(path)(error)),
    };
    files::replace_with(path, |kept| {
        let mut kept = BufWriter::new(kept);
        for_each_line(BufReader::new(file), |text, line| match line {
            Some(line) if line.step() <= last_step => {
                kept.write_all(text)?;
                kept.write_all(b"\n")
            }
            _ => Ok(()),
        })?;
        kept.flush()
    })
}

/// Calls `each` with every line that is not blank, as bytes without the newline and parsed (`None` if it can't be).
fn for_each_line(
    mut reader: impl BufRead,
    mut each: impl FnMut(&[u8], Option<Line>) -> io::Result<()>,
) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let text = line.trim_ascii();
        if !text.is_empty() {
            each(text, serde_json::from_slice(text).ok())?;
        }
    }
}

/// Appends to `metrics.jsonl`. When a run resumes, what was logged after the checkpoint is dropped first.
#[derive(Debug, Default)]
pub struct MetricsWriter {
    open: Option<(PathBuf, File)>,
}

impl MetricsWriter {
    /// An observer that opens its file at [`Event::RunStarted`].
    pub fn new() -> Self {
        Self::default()
    }

    fn append(&mut self, line: &Line) -> Result<(), ObserveError> {
        let Some((path, file)) = &mut self.open else { return Ok(()) };
        let mut text = serde_json::to_vec(line).map_err(io::Error::from).map_err(ObserveError::write(path))?;
        text.push(b'\n');
        // One write for a whole line, unbuffered: it is in the file when this returns.
        file.write_all(&text).map_err(ObserveError::write(path))
    }
}

impl Observer for MetricsWriter {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::RunStarted(info) => {
                std::fs::create_dir_all(&info.dir).map_err(ObserveError::write(&info.dir))?;
                let path = info.dir.join("metrics.jsonl");
                if info.start_step > 0 {
                    truncate(&path, info.start_step)?;
                } else {
                    files::replace(&path, b"")?;
                }
                let file = File::options().append(true).create(true).open(&path).map_err(ObserveError::write(&path))?;
                self.open = Some((path, file));
                Ok(())
            }
            Event::Step(record) => self.append(&Line::Step(**record)),
            Event::Evaluated(record) => self.append(&Line::Eval((*record).clone())),
            Event::Skipped { step, reason } => {
                self.append(&Line::Skipped { step: *step, skipped: (*reason).to_owned() })
            }
            Event::Finished(_) => {
                if let Some((path, file)) = self.open.take() {
                    file.sync_all().map_err(ObserveError::write(&path))?;
                }
                Ok(())
            }
            Event::Sampled { .. } | Event::Pictured { .. } | Event::Timeline { .. } | Event::CheckpointSaved { .. } => {
                Ok(())
            }
        }
    }
}
