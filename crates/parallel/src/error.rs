//! What can go wrong between ranks. Ranks are always numbered as in the world, whatever the group.

use std::fmt;
use std::time::Duration;

use crate::collectives::Signature;

/// The result of a call on a communicator.
pub type Result<T, E = CommError> = std::result::Result<T, E>;

/// An error of a communicator. After one in a collective, its group is broken: each later call fails with the same error.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A rank will never take part: it panicked, returned an error, or dropped its communicator.
    #[error("rank {at} in {call}: rank {rank} is gone ({why}); restart from the last checkpoint")]
    RankLost {
        /// The rank that is gone.
        rank: usize,
        /// What became of it.
        why: String,
        /// The rank that noticed.
        at: usize,
        /// What it was doing.
        call: Signature,
    },
    /// Ranks did not come in time.
    #[error(
        "rank {at} in {call}: waited {:.1} s for {}; hung, or slower than the timeout allows",
        waited.as_secs_f64(), Ranks(missing)
    )]
    Timeout {
        /// The ranks that did not come.
        missing: Vec<usize>,
        /// How long it was waited for them.
        waited: Duration,
        /// The rank that gave up.
        at: usize,
        /// What it was doing.
        call: Signature,
    },
    /// Two ranks made different calls.
    #[error(
        "rank {a} called {call_a}, but rank {b} called {call_b}; all ranks of a group must make the same calls in the same order"
    )]
    Mismatch {
        /// A rank.
        a: usize,
        /// What it called.
        call_a: Signature,
        /// Another rank.
        b: usize,
        /// What that one called.
        call_b: Signature,
    },
    /// A call that cannot be right, whatever the others do.
    #[error("{operation}: expected {expected}, got {got}")]
    Argument {
        /// The operation.
        operation: &'static str,
        /// What it needs.
        expected: String,
        /// What came.
        got: String,
    },
    /// A message has another type than the receiver asked for.
    #[error("rank {at} in {call}: rank {from} sent {got}; receive it as what it is")]
    WrongType {
        /// The sender.
        from: usize,
        /// What it sent.
        got: String,
        /// The receiver.
        at: usize,
        /// What it was doing.
        call: Signature,
    },
    /// The machinery under the communicator failed: MPI, or the system could not start a thread.
    #[error("{operation}: {why}")]
    Engine {
        /// What was tried.
        operation: &'static str,
        /// What was said.
        why: String,
    },
}

impl CommError {
    /// The same error as another rank of the group sees it in its own call.
    pub(crate) fn seen_by(mut self, rank: usize, own: Signature) -> Self {
        if let Self::RankLost { at, call, .. } | Self::Timeout { at, call, .. } = &mut self {
            (*at, *call) = (rank, own);
        }
        self
    }
}

/// "rank 3" or "ranks 1, 3".
pub(crate) struct Ranks<'a>(pub &'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.len() == 1 { "rank " } else { "ranks " })?;
        for (i, rank) in self.0.iter().enumerate() {
            write!(f, "{}{rank}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
