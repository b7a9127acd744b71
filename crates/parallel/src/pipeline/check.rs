//! Proves of a plan what its executor relies on.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, Payload, Plan, Work};

/// What a plan was proved to need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// For each rank, the most pairs of a stage and a micro-batch of which it keeps activations at once: from forward to the end of
    /// backward (its weights' half where there are two).
    pub peak: Vec<usize>,
    /// For each rank, the number of messages it sends.
    pub sends: Vec<usize>,
}

/// What is wrong with a plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// An action of another rank, of a stage or micro-batch that there is not, a message that nobody needs, or a whole backward
    /// beside one in halves.
    #[error("rank {rank}: {action} does not belong there")]
    Misplaced {
        /// The rank.
        rank: usize,
        /// Its action.
        action: Action,
    },
    /// The same action twice.
    #[error("rank {rank}: {action} is there twice")]
    Twice {
        /// The rank.
        rank: usize,
        /// Its action.
        action: Action,
    },
    /// An action that is needed is nowhere.
    #[error("{action} is missing on rank {rank}")]
    Missing {
        /// The rank.
        rank: usize,
        /// The action.
        action: Action,
    },
    /// Ranks wait for each other.
    #[error("deadlock: {}", blocked.iter().map(|(rank, action)| format!("rank {rank} waits in {action}")).collect::<Vec<_>>().join("; "))]
    Deadlock {
        /// The action that each rank cannot make.
        blocked: Vec<(usize, Action)>,
    },
    /// More activations are kept than the plan allows.
    #[error("rank {rank} keeps {peak} activations of a stage and micro-batch, of {bound} allowed")]
    Memory {
        /// The rank.
        rank: usize,
        /// What it keeps.
        peak: usize,
        /// What it may keep.
        bound: usize,
    },
    /// A stage's gradients are not added up in the order of the micro-batches, which would change the bits of their sum.
    #[error("rank {rank}: {action} comes after a later micro-batch; gradients are added in the order of micro-batches")]
    Order {
        /// The rank.
        rank: usize,
        /// Its action.
        action: Action,
    },
}

impl Plan {
    /// Proves that each stage goes forward and backward once for each micro-batch, on its rank, with a message wherever a
    /// result is needed elsewhere; that the lists can be executed to their ends with sends that do not wait and receives that do; that no rank
    /// keeps more activations than [`Plan::memory_bound`] says; and that each stage's gradients come in the order of micro-batches.
    ///
    /// # Errors
    ///
    /// The first thing that is not so.
    pub fn check(&self) -> Result<Checked, PlanError> {
        self.check_complete()?;
        let ranks = self.actions.iter().enumerate();
        let sends = |list: &Vec<Action>| list.iter().filter(|action| matches!(action, Action::Send { .. })).count();
        let checked = Checked {
            peak: ranks.map(|(rank, list)| self.check_list(rank, list)).collect::<Result<_, _>>()?,
            sends: self.actions.iter().map(sends).collect(),
        };
        self.check_deadlock()?;
        Ok(checked)
    }

    /// Everything needed is there once, and nothing else.
    fn check_complete(&self) -> Result<(), PlanError> {
        let mut needed: BTreeMap<(usize, usize, usize), Vec<Action>> = BTreeMap::new();
        let halves: BTreeSet<(usize, usize)> = self
            .actions
            .iter()
            .flatten()
            .filter_map(|action| match *action {
                Action::Compute { work: Work::BackwardInput | Work::BackwardWeight, stage, micro_batch } => {
                    Some((stage, micro_batch))
                }
                _ => None,
            })
            .collect();
        for (stage, rank) in self.placement.iter().copied().enumerate() {
            for micro_batch in 0..self.micro_batches {
                let compute = |work| Action::Compute { work, stage, micro_batch };
                let mut of_rank = vec![compute(Work::Forward)];
                if halves.contains(&(stage, micro_batch)) {
                    of_rank.extend([compute(Work::BackwardInput), compute(Work::BackwardWeight)]);
                } else {
                    of_rank.push(compute(Work::Backward));
                }
                for (payload, other) in neighbours(stage, self.stages()) {
                    let to = self.placement[other];
                    if to != rank {
                        of_rank.push(Action::Send { payload, stage, micro_batch, to });
                        let recv = Action::Recv { payload, stage, micro_batch, from: rank };
                        needed.entry((to, stage, micro_batch)).or_default().push(recv);
                    }
                }
                needed.entry((rank, stage, micro_batch)).or_default().extend(of_rank);
            }
        }
        let mut seen: BTreeMap<(usize, usize, usize), Vec<Action>> = BTreeMap::new();
        for (rank, list) in self.actions.iter().enumerate() {
            for action in list.iter().copied() {
                let (stage, micro_batch) = subject(action);
                let key = (rank, stage, micro_batch);
                if !needed.get(&key).is_some_and(|needed| needed.contains(&action)) {
                    return Err(PlanError::Misplaced { rank, action });
                }
                let seen = seen.entry(key).or_default();
                if seen.contains(&action) {
                    return Err(PlanError::Twice { rank, action });
                }
                seen.push(action);
            }
        }
        for (key, needed) in &needed {
            let seen = seen.get(key).map_or(&[][..], Vec::as_slice);
            if let Some(action) = needed.iter().find(|action| !seen.contains(action)) {
                return Err(PlanError::Missing { rank: key.0, action: *action });
            }
        }
        Ok(())
    }

    /// Memory and the order of gradients; returns the most that is kept.
    fn check_list(&self, rank: usize, list: &[Action]) -> Result<usize, PlanError> {
        let (mut kept, mut peak) = (0usize, 0);
        let mut next = vec![0; self.stages()];
        for action in list.iter().copied() {
            let Action::Compute { work, stage, micro_batch } = action else { continue };
            match work {
                Work::Forward => {
                    kept += 1;
                    peak = peak.max(kept);
                }
                Work::BackwardInput => {}
                Work::Backward | Work::BackwardWeight => {
                    kept = kept.saturating_sub(1);
                    if micro_batch != next[stage] {
                        return Err(PlanError::Order { rank, action });
                    }
                    next[stage] += 1;
                }
            }
        }
        let bound = self.memory_bound[rank];
        if peak > bound { Err(PlanError::Memory { rank, peak, bound }) } else { Ok(peak) }
    }

    /// Executes the lists as far as they go.
    fn check_deadlock(&self) -> Result<(), PlanError> {
        let mut run = Progress::new(self);
        loop {
            let mut moved = false;
            for rank in 0..self.ranks() {
                while let Some(action) = run.ready(rank) {
                    run.advance(rank, action);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        let blocked: Vec<(usize, Action)> =
            (0..self.ranks()).filter_map(|rank| Some((rank, run.next_action(rank)?))).collect();
        if blocked.is_empty() { Ok(()) } else { Err(PlanError::Deadlock { blocked }) }
    }
}

/// How far each rank is in its list.
pub(super) struct Progress<'a> {
    plan: &'a Plan,
    at: Vec<usize>,
    done: BTreeSet<(usize, usize, Work)>,
    /// What each rank has by its own work or a message: the payload of a stage for a micro-batch.
    has: BTreeSet<(usize, Payload, usize, usize)>,
    sent: BTreeSet<(usize, Payload, usize, usize)>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(plan: &'a Plan) -> Self {
        let (done, has, sent) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        Self { plan, at: vec![0; plan.ranks()], done, has, sent }
    }

    /// The next entry of a rank's list.
    pub(super) fn next_action(&self, rank: usize) -> Option<Action> {
        self.plan.actions[rank].get(self.at[rank]).copied()
    }

    /// The next entry of a rank's list if all it needs is there.
    pub(super) fn ready(&self, rank: usize) -> Option<Action> {
        let last = self.plan.stages() - 1;
        self.next_action(rank).filter(|action| match *action {
            Action::Recv { payload, stage, micro_batch, .. } => {
                self.sent.contains(&(rank, payload, stage, micro_batch))
            }
            Action::Send { payload, stage, micro_batch, .. } => self.has.contains(&(rank, payload, stage, micro_batch)),
            Action::Compute { work, stage, micro_batch } => {
                let did = |work| self.done.contains(&(stage, micro_batch, work));
                match work {
                    Work::Forward => {
                        stage == 0 || self.has.contains(&(rank, Payload::Activation, stage - 1, micro_batch))
                    }
                    Work::Backward | Work::BackwardInput => {
                        let given =
                            stage == last || self.has.contains(&(rank, Payload::Gradient, stage + 1, micro_batch));
                        did(Work::Forward) && given
                    }
                    Work::BackwardWeight => did(Work::BackwardInput),
                }
            }
        })
    }

    /// Notes that a rank has made its next action.
    pub(super) fn advance(&mut self, rank: usize, action: Action) {
        self.at[rank] += 1;
        match action {
            Action::Recv { payload, stage, micro_batch, .. } => {
                self.has.insert((rank, payload, stage, micro_batch));
            }
            Action::Send { payload, stage, micro_batch, to } => {
                self.sent.insert((to, payload, stage, micro_batch));
            }
            Action::Compute { work, stage, micro_batch } => {
                self.done.insert((stage, micro_batch, work));
                match work {
                    Work::Forward => self.has.insert((rank, Payload::Activation, stage, micro_batch)),
                    Work::Backward | Work::BackwardInput => {
                        self.has.insert((rank, Payload::Gradient, stage, micro_batch))
                    }
                    Work::BackwardWeight => false,
                };
            }
        }
    }
}

/// What a stage makes for which other stage.
fn neighbours(stage: usize, stages: usize) -> impl Iterator<Item = (Payload, usize)> {
    let next = Some(stage + 1).filter(|next| *next < stages).map(|next| (Payload::Activation, next));
    let previous = stage.checked_sub(1).map(|previous| (Payload::Gradient, previous));
    next.into_iter().chain(previous)
}

/// The stage and micro-batch of an action.
fn subject(action: Action) -> (usize, usize) {
    match action {
        Action::Compute { stage, micro_batch, .. }
        | Action::Send { stage, micro_batch, .. }
        | Action::Recv { stage, micro_batch, .. } => (stage, micro_batch),
    }
}
