//! Times a plan with given costs, action by action.

use std::collections::BTreeMap;

use super::check::Progress;
use super::{Action, Payload, Plan, PlanError, Work};

/// What each action takes, in any unit of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Forward of each stage.
    pub forward: Vec<f64>,
    /// The inputs' half of backward of each stage.
    pub backward_input: Vec<f64>,
    /// The weights' half of backward of each stage; a whole backward takes both.
    pub backward_weight: Vec<f64>,
    /// From a send to the arrival of its message, in which neither rank is busy.
    pub message: f64,
}

impl Costs {
    /// The same for forward and each half of backward of every stage, and messages that take no time.
    pub fn uniform(stages: usize) -> Self {
        let ones = vec![1.0; stages];
        Self { forward: ones.clone(), backward_input: ones.clone(), backward_weight: ones, message: 0.0 }
    }

    fn of(&self, work: Work, stage: usize) -> f64 {
        match work {
            Work::Forward => self.forward[stage],
            Work::Backward => self.backward_input[stage] + self.backward_weight[stage],
            Work::BackwardInput => self.backward_input[stage],
            Work::BackwardWeight => self.backward_weight[stage],
        }
    }
}

/// Something that a rank computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// What.
    pub work: Work,
    /// The stage.
    pub stage: usize,
    /// The micro-batch.
    pub micro_batch: usize,
    /// When it began.
    pub start: f64,
    /// When it was done.
    pub end: f64,
}

/// When each rank of a plan computed what.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// For each rank, in order.
    pub ranks: Vec<Vec<Span>>,
}

impl Plan {
    /// Executes the lists in simulated time.
    ///
    /// # Errors
    ///
    /// A plan that [`check`](Self::check) finds wrong.
    ///
    /// # Panics
    ///
    /// Costs of fewer stages than the plan has.
    pub fn simulate(&self, costs: &Costs) -> Result<Timeline, PlanError> {
        self.check()?;
        let mut run = Progress::new(self);
        let mut ranks: Vec<Vec<Span>> = vec![vec![]; self.ranks()];
        let mut now = vec![0.0f64; self.ranks()];
        let mut arrivals: BTreeMap<(usize, Payload, usize, usize), f64> = BTreeMap::new();
        let mut moved = true;
        while moved {
            moved = false;
            for rank in 0..self.ranks() {
                while let Some(action) = run.ready(rank) {
                    match action {
                        Action::Compute { work, stage, micro_batch } => {
                            let start = now[rank];
                            let end = start + costs.of(work, stage);
                            ranks[rank].push(Span { work, stage, micro_batch, start, end });
                            now[rank] = end;
                        }
                        Action::Send { payload, stage, micro_batch, to } => {
                            arrivals.insert((to, payload, stage, micro_batch), now[rank] + costs.message);
                        }
                        Action::Recv { payload, stage, micro_batch, .. } => {
                            let arrival = arrivals.get(&(rank, payload, stage, micro_batch)).copied();
                            now[rank] = now[rank].max(arrival.unwrap_or_default());
                        }
                    }
                    run.advance(rank, action);
                    moved = true;
                }
            }
        }
        Ok(Timeline { ranks })
    }
}

impl Timeline {
    /// The time from the first beginning to the last end.
    pub fn makespan(&self) -> f64 {
        self.ranks.iter().flatten().map(|span| span.end).fold(0.0, f64::max)
    }

    /// How much of the ranks' time until the end of the step is spent on nothing, from 0 to 1.
    pub fn bubble_share(&self) -> f64 {
        let busy: f64 = self.ranks.iter().flatten().map(|span| span.end - span.start).sum();
        let all = self.makespan() * self.ranks.len() as f64;
        if all > 0.0 { 1.0 - busy / all } else { 0.0 }
    }
}
