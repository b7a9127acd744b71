//! Experts that ranks with data of their own have divided among them (expert parallel).

use std::collections::BTreeSet;

use firebox_models::Staged;
use firebox_optim::{Optimizer, Parts, parameters};
use firebox_parallel::Communicator;

use super::{Axes, Ranks};
use crate::TrainError;

/// The ranks that divide the experts, as one of them sees them.
#[derive(Debug)]
pub(super) struct ExpertRanks {
    /// Those that have the other experts.
    pub ep: Communicator,
    /// Those that have the same: over these, the experts' gradients are added up.
    same: Communicator,
    /// Whose sum of which of their gradients is what, by the ranks of these.
    parts: Vec<Parts>,
    names: BTreeSet<String>,
}

impl ExpertRanks {
    /// None where every rank has all experts.
    pub fn new<M: Staged>(axes: &Axes, model: &M, optimizer: &Optimizer) -> Result<Option<Self>, TrainError> {
        let names = parameters(model)?.into_iter().map(|info| info.name);
        let names: BTreeSet<String> = names.filter(|name| model.is_divided_expert(name)).collect();
        if axes.ep.size() == 1 {
            return Ok(None);
        }
        let mut parts = optimizer.divide(model, axes.expert_dp.size())?;
        parts.iter_mut().for_each(|parts| parts.retain(|name, _| names.contains(name)));
        Ok(Some(Self { ep: axes.ep.clone(), same: axes.expert_dp.clone(), parts, names }))
    }

    /// Whether it is a parameter of theirs.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// Ranks that add up gradients of some parameters, each a part.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub comm: &'a Communicator,
    pub parts: &'a [Parts],
    /// Of whose parameters: experts that are divided, or all others.
    pub experts: bool,
}

impl Sums<'_> {
    /// This rank's part.
    pub fn mine(&self) -> &Parts {
        &self.parts[self.comm.rank()]
    }
}

impl Ranks {
    /// Whether ranks with data of their own have other experts: they must run the same stages at the same time.
    pub fn divide_experts(&self) -> bool {
        self.experts.is_some()
    }

    /// Those that add up the gradients of experts that are divided, or of all other parameters.
    pub(super) fn sums_of(&self, experts: bool) -> Option<Sums<'_>> {
        match (&self.experts, experts) {
            (_, false) => Some(Sums { comm: &self.comm, parts: &self.parts, experts }),
            (Some(of), true) => Some(Sums { comm: &of.same, parts: &of.parts, experts }),
            (None, true) => None,
        }
    }

    /// Both.
    pub(super) fn all_sums(&self) -> impl Iterator<Item = Sums<'_>> {
        [false, true].into_iter().filter_map(|experts| self.sums_of(experts))
    }

    /// Whether a parameter's gradient is added up there.
    pub(super) fn is_of(&self, sums: Sums<'_>, name: &str) -> bool {
        self.experts.as_ref().is_some_and(|experts| experts.has(name)) == sums.experts
    }
}
