//! Who adds up which gradients, and what of it ZeRO divides.

use std::collections::{BTreeMap, BTreeSet};

use firebox_models::Staged;
use firebox_optim::{Optimizer, Parts, parameters};
use firebox_parallel::{CommError, Communicator};

use super::{Axes, Ranks, gathered};
use crate::TrainError;

/// The ranks that add up the gradients of some parameters, and divide among themselves what [`Zero`](super::Zero) says of these.
#[derive(Debug)]
pub(super) struct Division {
    /// Those that add up.
    pub comm: Communicator,
    /// Of these, those that divide.
    pub shard: Communicator,
    /// And those that have copies of this rank's part.
    replicas: Communicator,
    /// What of parameters, gradients and state is whose, by the ranks of `shard`.
    pub parts: Vec<Parts>,
    /// Who adds up what of the gradients, by the ranks of `comm`.
    pub sums: Vec<Parts>,
}

impl Division {
    fn new(comm: &Communicator, shard: &Communicator, replicas: &Communicator, parts: Vec<Parts>) -> Self {
        let n = replicas.size();
        let sums = (0..n).flat_map(|i| parts.iter().map(move |parts| of_copy(parts, i, n))).collect();
        Self { comm: comm.clone(), shard: shard.clone(), replicas: replicas.clone(), parts, sums }
    }

    /// What is this rank's.
    pub fn mine(&self) -> &Parts {
        &self.parts[self.shard.rank()]
    }

    /// What of the gradients this rank adds up.
    pub fn added(&self) -> &Parts {
        &self.sums[self.comm.rank()]
    }

    /// Sums of gradients as the optimizer takes them, from the sums that each rank has made: whole, or if ZeRO `divides` anything, this rank's part.
    pub fn completed(
        &self,
        names: &[String],
        len: impl Fn(&str) -> usize,
        added: impl FnMut(&str) -> Vec<f32>,
        divides: bool,
    ) -> Result<Vec<(String, Vec<f32>)>, CommError> {
        if !divides {
            return gathered(&self.comm, &self.sums, names, len, added);
        }
        let mine = self.mine();
        let names: Vec<String> = names.iter().filter(|name| mine.contains_key(*name)).cloned().collect();
        if self.replicas.size() == 1 {
            let mut added = added;
            return Ok(names.into_iter().map(|name| (added(&name), name)).map(|(sum, name)| (name, sum)).collect());
        }
        let ranges = mine.iter().map(|(name, part)| (name.clone(), 0..part.len())).collect();
        let n = self.replicas.size();
        let copies: Vec<Parts> = (0..n).map(|i| of_copy(&ranges, i, n)).collect();
        gathered(&self.replicas, &copies, &names, |name| mine[name].len(), added)
    }
}

/// What copy `i` of `n` adds up of parts.
fn of_copy(parts: &Parts, i: usize, n: usize) -> Parts {
    let cut = |part: &std::ops::Range<usize>| part.start + part.len() * i / n..part.start + part.len() * (i + 1) / n;
    parts.iter().map(|(name, part)| (name.clone(), cut(part))).filter(|(_, part)| !part.is_empty()).collect()
}

/// Experts that ranks with data of their own have divided among them (expert parallel), as one of these sees them.
#[derive(Debug)]
pub(super) struct ExpertRanks {
    /// Those that have the other experts.
    pub ep: Communicator,
    /// Those that have the same.
    division: Division,
    names: BTreeSet<String>,
}

impl ExpertRanks {
    /// Whether it is a parameter of theirs.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// All divisions of a model.
#[derive(Debug)]
pub(super) struct Divisions {
    /// Of all parameters but those of experts that are divided.
    pub dense: Division,
    pub experts: Option<ExpertRanks>,
}

impl Divisions {
    pub fn new<M: Staged>(axes: &Axes, model: &M, optimizer: &Optimizer) -> Result<Self, TrainError> {
        let Axes { dp_cp, shard, replicas, ep, expert_dp, .. } = axes;
        let names = parameters(model)?.into_iter().map(|info| info.name);
        let names: BTreeSet<String> = names.filter(|name| model.is_divided_expert(name)).collect();
        let divide = |ranks: usize, experts: bool| -> Result<Vec<Parts>, TrainError> {
            let mut parts = optimizer.divide(model, ranks)?;
            parts.iter_mut().for_each(|parts| parts.retain(|name, _| names.contains(name) == experts));
            Ok(parts)
        };
        let dense = Division::new(dp_cp, shard, replicas, divide(shard.size(), false)?);
        let experts = match ep.size() {
            1 => None,
            // With experts divided there are no copies of what ZeRO divides.
            _ => Some(Division::new(expert_dp, expert_dp, replicas, divide(expert_dp.size(), true)?)),
        };
        let experts = experts.map(|division| ExpertRanks { ep: ep.clone(), division, names });
        Ok(Self { dense, experts })
    }

    /// That of divided experts, or of all other parameters.
    pub fn of(&self, experts: bool) -> Option<&Division> {
        match experts {
            false => Some(&self.dense),
            true => self.experts.as_ref().map(|experts| &experts.division),
        }
    }

    /// Both, each with whether it is that of experts.
    pub fn all(&self) -> impl Iterator<Item = (bool, &Division)> {
        [false, true].into_iter().filter_map(|experts| Some((experts, self.of(experts)?)))
    }

    /// Whether a parameter is one of divided experts.
    pub fn is_expert(&self, name: &str) -> bool {
        self.experts.as_ref().is_some_and(|experts| experts.has(name))
    }

    /// What is this rank's.
    pub fn mine(&self) -> Parts {
        self.all().flat_map(|(_, division)| division.mine().clone()).collect()
    }

    /// Whole parameters from the parts of all ranks.
    pub fn gathered(
        &self,
        names: &[String],
        len: impl Fn(&str) -> usize,
        mut part: impl FnMut(&str) -> Vec<f32>,
    ) -> Result<BTreeMap<String, Vec<f32>>, CommError> {
        let mut whole = BTreeMap::new();
        for (experts, division) in self.all() {
            let names: Vec<String> = names.iter().filter(|name| self.is_expert(name) == experts).cloned().collect();
            whole.extend(gathered(&division.shard, &division.parts, &names, &len, &mut part)?);
        }
        Ok(whole)
    }
}

impl Ranks {
    /// Whether ranks with data of their own have other experts: they must run the same stages at the same time.
    pub fn divide_experts(&self) -> bool {
        self.divisions.experts.is_some()
    }
}
