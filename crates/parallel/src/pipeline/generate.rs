//! Makes plans: first the order of what each rank computes, as the papers give it, then the messages that follow from it.

use super::{Action, Payload, Plan, Schedule, Work};

/// Numbers for which a schedule is not defined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// No ranks, micro-batches or stages.
    #[error("{schedule} with {what} = 0; at least 1 is needed")]
    Zero {
        /// The schedule.
        schedule: Schedule,
        /// What there is none of.
        what: &'static str,
    },
    /// The interleaved schedule goes through the micro-batches in groups of as many as there are ranks.
    #[error(
        "{schedule} needs micro-batches that are a multiple of its {ranks} ranks, got {micro_batches}; take {next}"
    )]
    Groups {
        /// The schedule.
        schedule: Schedule,
        /// The ranks.
        ranks: usize,
        /// The micro-batches.
        micro_batches: usize,
        /// The next number that is one.
        next: usize,
    },
}

/// What a rank computes, in order: work, stage, micro-batch.
type Order = Vec<(Work, usize, usize)>;

impl Schedule {
    /// Writes the schedule out.
    ///
    /// # Errors
    ///
    /// No ranks, micro-batches or stages; for [`Schedule::Interleaved`], micro-batches that are no multiple of the ranks.
    pub fn plan(self, ranks: usize, micro_batches: usize) -> Result<Plan, ScheduleError> {
        let (p, m, v) = (ranks, micro_batches, self.stages_per_rank());
        for (what, n) in [("ranks", p), ("micro-batches", m), ("stages per rank", v)] {
            if n == 0 {
                return Err(ScheduleError::Zero { schedule: self, what });
            }
        }
        if v > 1 && matches!(self, Self::Interleaved { .. }) && m % p != 0 {
            let next = m.next_multiple_of(p);
            return Err(ScheduleError::Groups { schedule: self, ranks, micro_batches, next });
        }
        let placement: Vec<usize> = (0..p * v).map(|stage| self.rank_of(stage, p)).collect();
        // Each rank's order and memory bound.
        let of_rank = |r: usize| match self {
            Self::AllForwardAllBackward => (one_forward_one_backward(r, m, m), m),
            Self::OneForwardOneBackward => (one_forward_one_backward(r, m, (p - r).min(m)), (p - r).min(m)),
            Self::Interleaved { .. } => interleaved(r, p, m, v),
            Self::ZeroBubbleH1 => (zero_bubble_h1(r, p, m), p.min(m)),
            Self::ZeroBubbleV => (zero_bubble_v(r, p, m), (2 * p).min(2 * m)),
        };
        let (orders, memory_bound): (Vec<Order>, Vec<usize>) = (0..p).map(of_rank).unzip();
        let actions = orders.iter().enumerate().map(|(rank, order)| with_messages(rank, order, &placement)).collect();
        Ok(Plan { placement, micro_batches: m, actions, memory_bound })
    }
}

/// Receives right before what needs it, sends right after what made it.
fn with_messages(rank: usize, order: &Order, placement: &[usize]) -> Vec<Action> {
    let mut actions = vec![];
    let elsewhere = |stage: usize| Some(placement[stage]).filter(|other| *other != rank);
    for (work, stage, micro_batch) in order.iter().copied() {
        let (before, after) = (stage.checked_sub(1), Some(stage + 1).filter(|next| *next < placement.len()));
        let (payload, source, sink) = match work {
            Work::Forward => (Payload::Activation, before, after),
            Work::Backward | Work::BackwardInput => (Payload::Gradient, after, before),
            Work::BackwardWeight => (Payload::Gradient, None, None),
        };
        if let Some((stage, from)) = source.and_then(|stage| Some((stage, elsewhere(stage)?))) {
            actions.push(Action::Recv { payload, stage, micro_batch, from });
        }
        actions.push(Action::Compute { work, stage, micro_batch });
        if let Some(to) = sink.and_then(elsewhere) {
            actions.push(Action::Send { payload, stage, micro_batch, to });
        }
    }
    actions
}

/// Keeps at most `kept` micro-batches: that many forward passes, then a backward before each further forward.
fn one_forward_one_backward(stage: usize, m: usize, kept: usize) -> Order {
    let mut order: Order = (0..kept).map(|i| (Work::Forward, stage, i)).collect();
    for i in 0..m {
        order.push((Work::Backward, stage, i));
        if kept + i < m {
            order.push((Work::Forward, stage, kept + i));
        }
    }
    order
}

/// As Megatron-LM does it: in groups of `p` micro-batches, each of which goes through all stages of a rank before the next.
fn interleaved(r: usize, p: usize, m: usize, v: usize) -> (Order, usize) {
    if v == 1 {
        let kept = (p - r).min(m);
        return (one_forward_one_backward(r, m, kept), kept);
    }
    let total = m * v;
    let at = |k: usize| (k / p % v, k / (p * v) * p + k % p);
    let forward = |k| {
        let (round, micro_batch) = at(k);
        (Work::Forward, round * p + r, micro_batch)
    };
    let backward = |k| {
        let (round, micro_batch) = at(k);
        (Work::Backward, (v - 1 - round) * p + r, micro_batch)
    };
    let warm = ((p - r - 1) * 2 + (v - 1) * p).min(total);
    let mut order: Order = (0..warm).map(forward).collect();
    for k in 0..total {
        if warm + k < total {
            order.push(forward(warm + k));
        }
        order.push(backward(k));
    }
    (order, (warm + 1).min(total))
}

/// 1F1B in which the weights' half of a backward comes `r` micro-batches after the inputs', so that the memory of each rank is that
/// of the first, and the delayed halves fill the end.
fn zero_bubble_h1(r: usize, p: usize, m: usize) -> Order {
    let mut order: Order = (0..(p - r - 1).min(m)).map(|i| (Work::Forward, r, i)).collect();
    let mut forward = order.len();
    let mut weight = 0;
    for i in 0..m {
        if forward < m {
            order.push((Work::Forward, r, forward));
            forward += 1;
        }
        order.push((Work::BackwardInput, r, i));
        if i >= r {
            order.push((Work::BackwardWeight, r, weight));
            weight += 1;
        }
    }
    order.extend((weight..m).map(|i| (Work::BackwardWeight, r, i)));
    order
}

/// The schedule of the paper's appendix for at least `2p - 1` micro-batches; for fewer, the same without those that are not there.
fn zero_bubble_v(r: usize, p: usize, m: usize) -> Order {
    let n = m.max(2 * p - 1);
    let stages = [r, 2 * p - 1 - r];
    let mut order: Order = vec![];
    // How often each kind of work has been done for each of the two stages.
    let (mut forward, mut input, mut weight) = ([0; 2], [0; 2], [0; 2]);
    let mut push = |work: Work, leg: usize| {
        let count = match work {
            Work::Forward => &mut forward[leg],
            Work::BackwardWeight => &mut weight[leg],
            Work::Backward | Work::BackwardInput => &mut input[leg],
        };
        if *count < m {
            order.push((work, stages[leg], *count));
        }
        *count += 1;
    };
    use Work::{BackwardInput as I, BackwardWeight as W, Forward as F};
    // Down the V until the first micro-batch is back.
    let mut downs = 2 * (p - r) - 1;
    (0..downs).for_each(|_| push(F, 0));
    for _ in 0..r {
        push(F, 1);
        push(F, 0);
    }
    downs += r;
    for _ in 0..p - r {
        push(F, 1);
        push(I, 1);
        push(W, 1);
    }
    // Six units of work for each micro-batch.
    let mut ups = p;
    while ups < downs || downs < n {
        if downs < n {
            push(F, 0);
            downs += 1;
        }
        push(I, 0);
        push(W, 0);
        push(F, 1);
        push(I, 1);
        push(W, 1);
        ups += 1;
    }
    // Inputs first, weights where there is nothing else.
    for _ in 0..r {
        push(I, 0);
        push(I, 1);
    }
    for _ in 0..p - r {
        push(I, 0);
        push(W, 0);
    }
    (0..r).for_each(|_| push(W, 1));
    (0..r).for_each(|_| push(W, 0));
    order
}
