//! What each rank does in a step and when: a trace for `chrome://tracing` and Perfetto, from which the report draws its picture.

use std::cell::RefCell;
use std::io::{self, Write};
use std::time::Duration;

use firebox_parallel::pipeline::{Action, Work};
use firebox_parallel::{Place, Recorded, Signature, clock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::engine::pipeline::Event;

/// What something is that a rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Computes forward.
    Forward,
    /// Computes backward, or the half of it for which the stage before waits.
    Backward,
    /// Computes the gradients of weights, where backward is in halves.
    Weights,
    /// Updates parameters.
    Update,
    /// Waits for other ranks.
    Idle,
    /// Waits while data moves.
    Communication,
    /// Data moves while it does something else.
    Background,
}

/// Something that a rank did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What it was.
    pub kind: Kind,
    /// The same in words.
    pub name: String,
    /// When it began, since 1970.
    pub start: Duration,
    /// When it was done.
    pub end: Duration,
    /// Bytes that it sent to other ranks.
    pub bytes: u64,
}

impl Span {
    fn new(kind: Kind, name: String, start: Duration, end: Duration) -> Self {
        Self { kind, name, start, end, bytes: 0 }
    }
}

/// What a rank has sent and waited for, as spans: a call is idle until all others have come, and communication from then on.
pub(crate) fn spans_of(calls: &[Recorded]) -> Vec<Span> {
    let moved = |call: &&Recorded| call.place == Place::Background && call.met < call.end;
    let moved: Vec<(Duration, Duration)> = calls.iter().filter(moved).map(|call| (call.met, call.end)).collect();
    let mut spans = vec![];
    for call in calls {
        let Recorded { operation, place, start, met, end, bytes } = *call;
        let name = Signature { operation, data: None }.to_string();
        let first = spans.len();
        match place {
            Place::Here => {
                spans.push(Span::new(Kind::Idle, format!("waits in {name}"), start, met));
                spans.push(Span { bytes, ..Span::new(Kind::Communication, name, met, end) });
            }
            Place::Background => spans.push(Span { bytes, ..Span::new(Kind::Background, name, met, end) }),
            Place::Awaited => {
                // What the background did meanwhile says what was waited for.
                let mut cuts: Vec<Duration> = moved.iter().flat_map(|(from, to)| [*from, *to]).collect();
                cuts.retain(|cut| start < *cut && *cut < end);
                cuts.extend([start, end]);
                cuts.sort_unstable();
                for piece in cuts.windows(2) {
                    let moves = moved.iter().any(|(from, to)| *from <= piece[0] && piece[1] <= *to);
                    let kind = if moves { Kind::Communication } else { Kind::Idle };
                    spans.push(Span::new(kind, format!("waits for {name}"), piece[0], piece[1]));
                }
            }
        }
        // A message without a wait is of interest for its bytes alone.
        let mut at = 0;
        spans.retain(|span| {
            at += 1;
            at <= first || span.end > span.start || span.bytes > 0
        });
    }
    spans
}

/// Notes what a rank computes in the current step.
#[derive(Debug, Default)]
pub(crate) struct Recorder(RefCell<Notes>);

#[derive(Debug, Default)]
struct Notes {
    /// Where the step is to be shown.
    spans: Option<Vec<Span>>,
    pipeline: Duration,
    busy: Duration,
}

impl Recorder {
    /// A step begins.
    pub fn begin(&self, shown: bool) {
        self.0.replace(Notes { spans: shown.then(Vec::new), ..Notes::default() });
    }

    /// Computes something that has this name.
    pub fn span<R>(&self, kind: Kind, name: impl FnOnce() -> String, compute: impl FnOnce() -> R) -> R {
        if self.0.borrow().spans.is_none() {
            return compute();
        }
        let start = clock();
        let result = compute();
        let span = Span::new(kind, name(), start, clock());
        self.0.borrow_mut().spans.iter_mut().for_each(|spans| spans.push(span.clone()));
        result
    }

    /// Takes notice of what was done in a pipeline.
    pub fn pipeline(&self, events: &[Event]) {
        let mut notes = self.0.borrow_mut();
        if let (Some(first), Some(last)) = (events.first(), events.last()) {
            notes.pipeline += last.end.saturating_sub(first.start);
        }
        for &Event { action, start, end } in events {
            let Action::Compute { work, .. } = action else { continue };
            notes.busy += end.saturating_sub(start);
            let kind = match work {
                Work::Forward => Kind::Forward,
                Work::Backward | Work::BackwardInput => Kind::Backward,
                Work::BackwardWeight => Kind::Weights,
            };
            if let Some(spans) = &mut notes.spans {
                spans.push(Span::new(kind, action.to_string(), start, end));
            }
        }
    }

    /// How long the step's pipeline took, and how much of this the rank computed; zeros without one.
    pub fn pipeline_times(&self) -> (Duration, Duration) {
        let notes = self.0.borrow();
        (notes.pipeline, notes.busy)
    }

    /// The spans of the step, if it is to be shown.
    pub fn take(&self) -> Option<Vec<Span>> {
        self.0.borrow_mut().spans.take()
    }
}

/// The file that `chrome://tracing` and Perfetto read, as far as it is used here.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    #[serde(default)]
    display_time_unit: String,
    #[serde(default)]
    other_data: Value,
    trace_events: Vec<TraceEvent>,
}

#[derive(Debug, Serialize, Deserialize)]
struct TraceEvent {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cat: Option<Kind>,
    ph: char,
    pid: usize,
    #[serde(default)]
    tid: u32,
    /// Microseconds.
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    args: Value,
}

/// Writes what each rank did in a step in the form that `chrome://tracing` and Perfetto read: a process per rank, with a row for what it does and one for
/// what goes on in the background.
///
/// # Errors
/// Those of `out`.
pub fn write_chrome_trace(step: u64, ranks: &[Vec<Span>], out: &mut dyn Write) -> io::Result<()> {
    let origin = ranks.iter().flatten().map(|span| span.start).min().unwrap_or_default();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let mut trace_events = vec![];
    for (pid, spans) in ranks.iter().enumerate() {
        let named = |name: &str, tid, called: String| TraceEvent {
            name: name.into(),
            cat: None,
            ph: 'M',
            pid,
            tid,
            ts: 0.0,
            dur: 0.0,
            args: json!({ "name": called }),
        };
        trace_events.push(named("process_name", 0, format!("rank {pid}")));
        trace_events.push(named("thread_name", 0, "computes and waits".into()));
        trace_events.push(named("thread_name", 1, "sends and receives in the background".into()));
        trace_events.extend(spans.iter().map(|span| TraceEvent {
            name: span.name.clone(),
            cat: Some(span.kind),
            ph: 'X',
            pid,
            tid: u32::from(span.kind == Kind::Background),
            ts: micros(span.start.saturating_sub(origin)),
            dur: micros(span.end.saturating_sub(span.start)),
            args: if span.bytes > 0 { json!({ "bytes": span.bytes }) } else { Value::Null },
        }));
    }
    let trace = Trace { display_time_unit: "ms".into(), other_data: json!({ "step": step }), trace_events };
    serde_json::to_writer(&mut *out, &trace)?;
    out.flush()
}

/// A step and what each rank did in it, from what [`write_chrome_trace`] wrote; times are those since the step's beginning.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(from = "Trace")]
pub(crate) struct Timeline {
    pub step: u64,
    pub ranks: Vec<Vec<Span>>,
}

/// More ranks than any run has: a file that says so is not read.
const MAX_RANKS: usize = 1 << 16;

impl From<Trace> for Timeline {
    fn from(trace: Trace) -> Self {
        let mut ranks: Vec<Vec<Span>> = vec![];
        for event in trace.trace_events {
            let Some(kind) = event.cat.filter(|_| event.pid < MAX_RANKS) else { continue };
            if ranks.len() <= event.pid {
                ranks.resize(event.pid + 1, vec![]);
            }
            let time = |micros: f64| Duration::try_from_secs_f64(micros / 1e6).unwrap_or_default();
            let start = time(event.ts);
            let bytes = event.args["bytes"].as_u64().unwrap_or_default();
            let end = start.saturating_add(time(event.dur));
            ranks[event.pid].push(Span { bytes, ..Span::new(kind, event.name, start, end) });
        }
        Self { step: trace.other_data["step"].as_u64().unwrap_or_default(), ranks }
    }
}

/// Times of a rank in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Shares {
    /// Of the step, from 0 to 1, in which it computed.
    pub computes: f64,
    /// In which data moved and it stood.
    pub communication: f64,
    /// In which it waited for others.
    pub idle: f64,
    /// Of the time in which data moved, that in which it computed; `None` if none did.
    pub overlap: Option<f64>,
    pub bytes: u64,
}

impl Timeline {
    /// From the first beginning to the last end.
    pub fn length(&self) -> Duration {
        self.ranks.iter().flatten().map(|span| span.end).max().unwrap_or_default()
    }

    pub fn shares(&self, rank: usize) -> Shares {
        let spans = &self.ranks[rank];
        let sum = |kind: Kind| -> f64 {
            let of_kind = spans.iter().filter(|span| span.kind == kind);
            of_kind.map(|span| span.end.saturating_sub(span.start).as_secs_f64()).sum()
        };
        let length = self.length().as_secs_f64().max(f64::MIN_POSITIVE);
        let [idle, communication, background] = [Kind::Idle, Kind::Communication, Kind::Background].map(sum);
        // What moves in the background while the rank waits for it is in both.
        let waits: Vec<(Duration, Duration)> = spans
            .iter()
            .filter(|span| matches!(span.kind, Kind::Idle | Kind::Communication))
            .map(|span| (span.start, span.end))
            .collect();
        let of_background = |span: &&Span| span.kind == Kind::Background;
        let both: f64 = spans
            .iter()
            .filter(of_background)
            .flat_map(|span| waits.iter().map(|(from, to)| span.end.min(*to).saturating_sub(span.start.max(*from))))
            .map(|time| time.as_secs_f64())
            .sum();
        let hidden = (background - both).max(0.0);
        Shares {
            computes: (1.0 - (idle + communication) / length).max(0.0),
            communication: communication / length,
            idle: idle / length,
            overlap: (hidden + communication > 0.0).then(|| hidden / (hidden + communication)),
            bytes: spans.iter().map(|span| span.bytes).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_parallel::Operation;

    use super::*;

    #[test]
    fn a_trace_is_read_back_and_waits_are_told_from_what_moves() {
        let at = Duration::from_millis;
        let call = |place, start, met, end, bytes| Recorded {
            operation: Operation::AllGather,
            place,
            start: at(start),
            met: at(met),
            end: at(end),
            bytes,
        };
        // Data moves in the background from 20 to 60; from 50 to 100 the rank waits for it and for something that does not move.
        let calls = [
            call(Place::Here, 1000, 1005, 1010, 7),
            call(Place::Background, 1015, 1020, 1060, 9),
            call(Place::Awaited, 1050, 1100, 1100, 0),
        ];
        let spans = spans_of(&calls);
        let kinds: Vec<(Kind, u64)> =
            spans.iter().map(|span| (span.kind, (span.end - span.start).as_millis() as u64)).collect();
        let expected = [
            (Kind::Idle, 5),
            (Kind::Communication, 5),
            (Kind::Background, 40),
            (Kind::Communication, 10),
            (Kind::Idle, 40),
        ];
        assert_eq!(kinds, expected);

        let mut json = vec![];
        write_chrome_trace(3, &[vec![], spans.clone()], &mut json).unwrap();
        let timeline: Timeline = serde_json::from_slice(&json).unwrap();
        assert_eq!((timeline.step, timeline.ranks.len(), timeline.length()), (3, 2, at(100)));
        assert_eq!(timeline.ranks[1].len(), spans.len());
        assert_eq!((timeline.ranks[1][2].start, &timeline.ranks[1][2].name), (at(20), &spans[2].name));
        let shares = timeline.shares(1);
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(shares.idle, 0.45) && close(shares.communication, 0.15) && close(shares.computes, 0.4));
        assert!(close(shares.overlap.unwrap(), 30.0 / 45.0) && shares.bytes == 16, "{shares:?}");
        assert_eq!(timeline.shares(0), Shares { computes: 1.0, ..Shares::default() });
    }
}
