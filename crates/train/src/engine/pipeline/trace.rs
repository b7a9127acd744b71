//! What a rank did and when.

use std::time::Duration;

use firebox_parallel::pipeline::{Action, Span};

/// An action that was executed. That of a receive is the time for which the rank waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The action.
    pub action: Action,
    /// When it began, since 1970, by the [`clock`](firebox_parallel::clock) that ranks of several processes share.
    pub start: Duration,
    /// When it was done.
    pub end: Duration,
}

impl Event {
    /// A computation as the simulator has it, in seconds from `origin`: a [`Timeline`](firebox_parallel::pipeline::Timeline) of all ranks' spans knows
    /// the share of the bubble, and can be drawn.
    pub fn span(&self, origin: Duration) -> Option<Span> {
        let Action::Compute { work, stage, micro_batch } = self.action else { return None };
        let since = |time: Duration| time.saturating_sub(origin).as_secs_f64();
        Some(Span { work, stage, micro_batch, start: since(self.start), end: since(self.end) })
    }
}
