//! Pipeline schedules as data: for each rank a list of actions.
//!
//! A [`Schedule`] makes a [`Plan`]; [`Plan::check`] proves that the plan computes everything once, ends, keeps within its memory bound
//! and adds gradients in the order of the micro-batches; [`Plan::simulate`] times the same lists. Whoever executes a plan makes exactly
//! its actions, each rank those of its list, one after the other.

mod check;
mod cut;
mod generate;
mod picture;
mod simulate;

use std::fmt;

pub use check::{Checked, PlanError};
pub use cut::{CutError, cut};
pub use generate::ScheduleError;
pub use simulate::{Costs, Span, Timeline};

/// What is computed of one stage for one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// The forward pass.
    Forward,
    /// The whole backward pass.
    Backward,
    /// The half of backward for which the stage before waits: the gradient of the stage's input.
    BackwardInput,
    /// The other half, for which nobody waits: the gradients of the stage's parameters.
    BackwardWeight,
}

/// What travels between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Payload {
    /// The output of a stage, for the next one.
    Activation,
    /// The gradient of a stage's input, for the stage before.
    Gradient,
}

/// One entry of a rank's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Computes.
    Compute {
        /// What.
        work: Work,
        /// The stage.
        stage: usize,
        /// The micro-batch.
        micro_batch: usize,
    },
    /// Hands over what `stage` made, without waiting for the receiver.
    Send {
        /// Which of its results.
        payload: Payload,
        /// The stage that made it.
        stage: usize,
        /// The micro-batch.
        micro_batch: usize,
        /// The receiver.
        to: usize,
    },
    /// Waits for what `stage` made on another rank.
    Recv {
        /// Which of its results.
        payload: Payload,
        /// The stage that made it.
        stage: usize,
        /// The micro-batch.
        micro_batch: usize,
        /// The sender.
        from: usize,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |payload: Payload| match payload {
            Payload::Activation => "activation",
            Payload::Gradient => "gradient",
        };
        match *self {
            Self::Compute { work, stage, micro_batch } => {
                let work = match work {
                    Work::Forward => "forward",
                    Work::Backward => "backward",
                    Work::BackwardInput => "backward-input",
                    Work::BackwardWeight => "backward-weight",
                };
                write!(f, "{work} of stage {stage}, micro-batch {micro_batch}")
            }
            Self::Send { payload, stage, micro_batch, to } => {
                write!(f, "send {} of stage {stage}, micro-batch {micro_batch} to rank {to}", name(payload))
            }
            Self::Recv { payload, stage, micro_batch, from } => {
                write!(f, "receive {} of stage {stage}, micro-batch {micro_batch} from rank {from}", name(payload))
            }
        }
    }
}

/// In which order a pipeline works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Schedule {
    /// All forward passes, then all backward passes (GPipe, Huang et al. 2018). Keeps every micro-batch.
    AllForwardAllBackward,
    /// One forward, one backward in turn (PipeDream-Flush, Narayanan et al. 2021). The same bubble, but keeps as many micro-batches as
    /// there are ranks after it, at most.
    OneForwardOneBackward,
    /// 1F1B over several stages per rank, `v` rounds of the ranks (Narayanan et al. 2021): a bubble `v` times smaller for `v`
    /// times the messages and somewhat more memory. The micro-batches must be a multiple of the ranks.
    Interleaved {
        /// Stages per rank.
        stages_per_rank: usize,
    },
    /// Zero bubble, H1 (Qi et al. 2024, arXiv:2401.10241): 1F1B with backward in halves, where the second fills the bubble. A third
    /// of 1F1B's bubble where forward and both halves cost the same, and no more memory than its first rank needs.
    ZeroBubbleH1,
    /// Zero bubble, V (Qi et al. 2024, arXiv:2401.10241 and 2405.15362): two stages per rank, placed like a V, so that the first rank has
    /// the first and last one. No bubble where forward and both halves of backward cost the same, but at the ends, in the memory of 1F1B.
    ZeroBubbleV,
}

impl Schedule {
    /// The number of stages on each rank.
    pub fn stages_per_rank(self) -> usize {
        match self {
            Self::AllForwardAllBackward | Self::OneForwardOneBackward | Self::ZeroBubbleH1 => 1,
            Self::Interleaved { stages_per_rank } => stages_per_rank,
            Self::ZeroBubbleV => 2,
        }
    }

    /// The rank on which a stage is, of `ranks`.
    pub fn rank_of(self, stage: usize, ranks: usize) -> usize {
        match self {
            Self::ZeroBubbleV if stage >= ranks => 2 * ranks - 1 - stage,
            _ => stage % ranks,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllForwardAllBackward => write!(f, "all-forward-all-backward"),
            Self::OneForwardOneBackward => write!(f, "1F1B"),
            Self::Interleaved { stages_per_rank } => write!(f, "interleaved 1F1B, {stages_per_rank} stages a rank"),
            Self::ZeroBubbleH1 => write!(f, "ZB-H1"),
            Self::ZeroBubbleV => write!(f, "ZB-V"),
        }
    }
}

/// A schedule for a number of ranks and micro-batches, written out.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The rank of each stage.
    pub placement: Vec<usize>,
    /// The number of micro-batches of a step.
    pub micro_batches: usize,
    /// What each rank does, in order.
    pub actions: Vec<Vec<Action>>,
    /// How many pairs of a stage and a micro-batch each rank may keep activations of at once.
    pub memory_bound: Vec<usize>,
}

impl Plan {
    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.actions.len()
    }

    /// The number of stages.
    pub fn stages(&self) -> usize {
        self.placement.len()
    }
}
