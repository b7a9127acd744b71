//! What of the ranks' work is shown: counts of a step, and the timeline of one.

use std::time::Duration;

use firebox_parallel::{Traffic, clock};

use super::Trainer;
use crate::TrainError;
use crate::observe::{Event, Observer, RanksRecord};
use crate::task::Model;
use crate::timeline::{Span, spans_of};

/// The step after a start whose timeline is recorded: by then nothing is done for the first time.
const SHOWN: u64 = 10;

/// Before a step.
pub(super) struct Before {
    at: Duration,
    traffic: Traffic,
}

/// What this rank did in a step.
pub(super) struct Worked {
    /// Bytes, messages; the times, in ns, of all, waiting, data moving while it stood and while it computed, its pipeline, computing in this.
    numbers: [u64; 8],
    /// If the step is shown.
    spans: Option<Vec<Span>>,
}

impl<M: Model> Trainer<'_, M> {
    /// Records what each rank does in the tenth step from here, or the last if that is earlier, and tells observers
    /// ([`Event::Timeline`](crate::observe::Event::Timeline)).
    pub fn with_timeline(mut self) -> Self {
        self.shown = Some((self.state.step + SHOWN).min(self.recipe.train.steps));
        self
    }

    /// A step begins.
    pub(super) fn before_step(&self) -> Before {
        let shown = self.shown == Some(self.state.step + 1);
        self.recorder.begin(shown);
        let traffic = match &self.ranks {
            None => Traffic::default(),
            Some(ranks) => {
                if shown {
                    ranks.meter().record();
                }
                ranks.meter().traffic()
            }
        };
        Before { at: clock(), traffic }
    }

    /// It is done.
    pub(super) fn after_step(&self, before: &Before) -> Worked {
        let all = clock() - before.at;
        let mut spans = self.recorder.take();
        let mut traffic = Traffic::default();
        if let Some(ranks) = &self.ranks {
            traffic = ranks.meter().traffic() - before.traffic;
            spans.iter_mut().for_each(|spans| spans.extend(spans_of(&ranks.meter().recorded())));
        }
        let Traffic { bytes, messages, idle, exposed, hidden } = traffic;
        let (pipeline, busy) = self.recorder.pipeline_times();
        let [all, idle, exposed, hidden, pipeline, busy] =
            [all, idle, exposed, hidden, pipeline, busy].map(|time| time.as_nanos() as u64);
        Worked { numbers: [bytes, messages, all, idle, exposed, hidden, pipeline, busy], spans }
    }

    /// What the ranks have done in a step, where there are several. All must ask.
    pub(super) fn seen(&self, worked: &Worked) -> Result<Option<RanksRecord>, TrainError> {
        let Some(ranks) = &self.ranks else { return Ok(None) };
        let of_ranks = ranks.numbers(worked.numbers)?;
        let [bytes_sent, messages_sent, all, idle, exposed, hidden, _, busy] =
            std::array::from_fn(|i| of_ranks.iter().map(|numbers| numbers[i]).sum());
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        // Ranks begin together: the one that takes longest says when a pipeline is done.
        let longest = of_ranks.iter().map(|[.., pipeline, _]| *pipeline).max().unwrap_or_default();
        let busy = share(busy, longest * of_ranks.len() as u64);
        Ok(Some(RanksRecord {
            bytes_sent,
            messages_sent,
            idle: share(idle, all).unwrap_or_default(),
            communication: share(exposed, all).unwrap_or_default(),
            overlap: share(hidden, exposed + hidden),
            bubble: busy.map(|busy| (1.0 - busy).max(0.0)),
        }))
    }

    /// Tells what each rank did in the step that is done, if it is the one to be shown. All must ask.
    pub(super) fn show(&self, worked: Worked, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(spans) = worked.spans else { return Ok(()) };
        let ranks = match &self.ranks {
            None => vec![spans],
            Some(ranks) => {
                let told = ranks.writings(&serde_json::to_vec(&spans).unwrap_or_default())?;
                told.iter().map(|told| serde_json::from_slice(told).unwrap_or_default()).collect()
            }
        };
        Ok(observer.on_event(&Event::Timeline { step: self.state.step, ranks: &ranks })?)
    }
}
