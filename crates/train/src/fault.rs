//! A rank that fails on request, to try out what a cluster and `--elastic` make of it: `FIREBOX_FAULT=RANK:PLACE:STEP:HOW` in the environment.

use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use crate::TrainError;

/// The name of the variable.
const VARIABLE: &str = "FIREBOX_FAULT";

/// Where in a step a rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Before it computes forward.
    Forward,
    /// Amid backward, with gradients on their way.
    Backward,
    /// Where the others wait for its part of the gradients.
    Collective,
    /// While the checkpoint after this step is written, by whichever rank.
    Checkpoint,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Kill,
    Panic,
    Hang,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fault {
    rank: usize,
    place: Place,
    step: u64,
    how: How,
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (rank, place, step, how) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let place = match place {
            "forward" => Place::Forward,
            "backward" => Place::Backward,
            "collective" => Place::Collective,
            "checkpoint" => Place::Checkpoint,
            _ => return None,
        };
        let how = match how {
            "kill" => How::Kill,
            "panic" => How::Panic,
            "hang" => How::Hang,
            _ => return None,
        };
        let fault = Self { rank: rank.parse().ok()?, place, step: step.parse().ok()?, how };
        parts.next().is_none().then_some(fault)
    }
}

/// What the environment asks for; `Err` for what is none.
fn requested() -> &'static Result<Option<Fault>, String> {
    static REQUESTED: OnceLock<Result<Option<Fault>, String>> = OnceLock::new();
    REQUESTED.get_or_init(|| {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(None) };
        Fault::parse(&text).map(Some).ok_or(text)
    })
}

/// Whether the request, if there is one, makes sense.
///
/// # Errors
/// [`TrainError::Input`].
pub(crate) fn check() -> Result<(), TrainError> {
    let expected = "RANK:PLACE:STEP:HOW such as 1:backward:7:kill, with PLACE forward, backward, collective or checkpoint and HOW kill, panic or hang";
    match requested() {
        Ok(_) => Ok(()),
        Err(got) => Err(TrainError::Input { what: VARIABLE, expected: expected.into(), got: got.clone() }),
    }
}

/// Fails, if that is asked of this rank at this place of this step (from 1).
pub(crate) fn at(place: Place, rank: usize, step: u64) {
    if let Ok(Some(fault)) = requested()
        && (fault.rank, fault.place, fault.step) == (rank, place, step)
    {
        match fault.how {
            How::Kill => kill(),
            // PANIC: asked for.
            How::Panic => panic!("as {VARIABLE} asks"),
            How::Hang => loop {
                thread::sleep(Duration::from_secs(1));
            },
        }
    }
}

/// The same for the checkpoint of a step: fails once there is something of it in the folder of checkpoints.
pub(crate) fn at_checkpoint(rank: usize, step: u64, checkpoints: &Path) {
    let here = matches!(requested(), Ok(Some(fault)) if (fault.rank, fault.step) == (rank, step) && fault.place == Place::Checkpoint);
    if !here {
        return;
    }
    let (dir, begun, done) = (checkpoints.to_path_buf(), format!(".step-{step}."), format!("step-{step}"));
    thread::spawn(move || {
        loop {
            let mut entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
            let seen = |name: &str| name.starts_with(&begun) || name == done;
            if entries.any(|entry| entry.file_name().to_str().is_some_and(seen)) {
                kill();
            }
            thread::yield_now();
        }
    });
}

/// Ends the process as the kernel does when memory is short: nothing is said, and nothing put in order.
fn kill() {
    #[cfg(unix)]
    // SAFETY: a signal to this process.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
    }
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read() {
        let fault = Fault { rank: 1, place: Place::Backward, step: 7, how: How::Kill };
        assert_eq!(Fault::parse("1:backward:7:kill"), Some(fault));
        for wrong in ["", "1", "1:backward:7", "x:backward:7:kill", "1:sideways:7:kill", "1:forward:7:kill:now"] {
            assert_eq!(Fault::parse(wrong), None, "{wrong}");
        }
    }
}
