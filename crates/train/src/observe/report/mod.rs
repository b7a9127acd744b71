//! `report.html`: what came of a run, on one page that needs nothing else.
//!
//! The page is made from the files of the run folder alone, so `firebox report RUN` can remake it at any time, also while
//! the run goes on or after it was killed. It loads nothing (its own content security policy forbids that), follows the
//! reader's light or dark setting, and prints.

mod charts;
mod data;
mod page;

pub(crate) use page::{Esc, STYLE};
mod plots;
mod timeline;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Event, ObserveError, Observer, files};

/// Makes `report.html` from what the run folder holds, and returns its path.
///
/// # Errors
///
/// When `run_dir` is no run folder, one of its files is unreadable, or the page can't be written.
pub fn write(run_dir: &Path) -> Result<PathBuf, ObserveError> {
    let run = data::Run::read(run_dir)?;
    let html = page::render(&run)?;
    let path = run_dir.join("report.html");
    files::replace(&path, html.as_bytes())?;
    Ok(path)
}

/// Between two reports of a run that goes on. Drawing takes some hundredths of a second.
const EVERY: Duration = Duration::from_secs(30);

/// Writes the report at the end, and after evaluations while the run goes on.
#[derive(Debug, Default)]
pub struct ReportWriter {
    dir: PathBuf,
    last: Option<Instant>,
}

impl ReportWriter {
    /// An observer that learns its folder from [`Event::RunStarted`]. Those that write files must come before it.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Observer for ReportWriter {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        let due = match event {
            Event::RunStarted(info) => {
                self.dir.clone_from(&info.dir);
                self.last = None;
                false
            }
            Event::Evaluated(_) => self.last.is_none_or(|at| at.elapsed() >= EVERY),
            Event::Finished(_) => true,
            _ => false,
        };
        if due {
            write(&self.dir)?;
            self.last = Some(Instant::now());
        }
        Ok(())
    }
}
