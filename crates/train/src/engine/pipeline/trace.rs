//! What a rank did and when.

use std::io::{self, Write};
use std::time::Duration;

use firebox_parallel::pipeline::{Action, Span, Work};
use serde_json::json;

/// An action that was executed. That of a receive is the time for which the rank waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The action.
    pub action: Action,
    /// When it began, since 1970: the clock that ranks of several processes share.
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

/// Writes what each rank did in the form that `chrome://tracing` and Perfetto read: a row per rank.
///
/// # Errors
/// Those of `out`.
pub fn write_chrome_trace(ranks: &[Vec<Event>], out: &mut dyn Write) -> io::Result<()> {
    let origin = ranks.iter().flatten().map(|event| event.start).min().unwrap_or_default();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let events = ranks.iter().enumerate().flat_map(|(rank, events)| {
        events.iter().map(move |event| {
            let category = match event.action {
                Action::Compute { work: Work::Forward, .. } => "forward",
                Action::Compute { .. } => "backward",
                Action::Send { .. } => "send",
                Action::Recv { .. } => "wait",
            };
            json!({
                "name": event.action.to_string(), "cat": category, "ph": "X", "pid": 0, "tid": rank,
                "ts": micros(event.start.saturating_sub(origin)), "dur": micros(event.end.saturating_sub(event.start)),
            })
        })
    });
    let trace = json!({ "displayTimeUnit": "ms", "traceEvents": events.collect::<Vec<_>>() });
    serde_json::to_writer(&mut *out, &trace)?;
    out.flush()
}
