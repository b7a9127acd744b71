//! Data parallelism: several ranks train the same model, each on its share of a batch's micro-batches, and ZeRO's division of gradients and optimizer state
//! among them (Rajbhandari et al., arXiv:1910.02054).
//!
//! Micro-batch `i` of a step is computed by rank `i mod n`. As soon as backward has the gradients of a stage, in the background each rank sends every other the
//! part of them that is that rank's; it adds what it gets to its part of the sum in the order of the micro-batches. So the sum has the same bits as on one rank,
//! which goes through the micro-batches in this order, whatever the number of ranks; and nobody holds a sum of all gradients.

use std::collections::{BTreeMap, VecDeque};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use firebox_models::Staged;
use firebox_optim::{NamedGrads, Optimizer, Parts, values};
use firebox_parallel::{CommError, Communicator, Pending, ReduceOp};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::model_io::{set_parameters, to_host};

/// What data-parallel ranks divide among themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Zero {
    /// Nothing: each rank has all parameters, all gradients and the whole state of the optimizer.
    #[default]
    None,
    /// The optimizer's state, and with it the sum of gradients (ZeRO-1 and ZeRO-2, which differ in nothing here: no rank ever holds more of a sum than its part).
    States,
}

impl TryFrom<u8> for Zero {
    type Error = String;

    fn try_from(level: u8) -> Result<Self, String> {
        match level {
            0 => Ok(Self::None),
            1 | 2 => Ok(Self::States),
            _ => Err(format!("expected 0 (nothing is divided), 1 or 2 (optimizer state and gradients), got {level}")),
        }
    }
}

impl From<Zero> for u8 {
    fn from(zero: Zero) -> Self {
        match zero {
            Zero::None => 0,
            Zero::States => 2,
        }
    }
}

/// Gradients of stages under way, at most: each is a copy.
const UNDER_WAY: usize = 2;

/// Elements of parameters that are gathered at once.
const BUCKET: usize = 4 << 20;

/// This rank among those that train together.
#[derive(Debug)]
pub struct Ranks {
    comm: Communicator,
    zero: Zero,
    /// Whose sum of gradients is what, by rank.
    parts: Vec<Parts>,
    /// Trainable parameters by the stage whose backward completes their gradients.
    stages: Vec<Vec<String>>,
    /// Number of elements.
    lengths: BTreeMap<String, usize>,
}

impl Ranks {
    /// For the ranks of `comm`, each of which has the same model.
    ///
    /// # Errors
    /// [`TrainError::Optim`].
    pub fn new<M: Staged>(
        comm: Communicator,
        zero: Zero,
        model: &M,
        optimizer: &Optimizer,
    ) -> Result<Self, TrainError> {
        let mut stages = vec![vec![]; model.n_stages()];
        let mut lengths = BTreeMap::new();
        for info in firebox_optim::parameters(model)?.into_iter().filter(|info| info.trainable) {
            lengths.insert(info.name.clone(), info.elements());
            stages[model.first_stage(&info.name)].push(info.name);
        }
        stages.iter_mut().for_each(|names| names.sort());
        let parts = optimizer.divide(model, comm.size())?;
        Ok(Self { comm, zero, parts, stages, lengths })
    }

    /// The number of this rank.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.comm.size()
    }

    /// What is divided.
    pub fn zero(&self) -> Zero {
        self.zero
    }

    /// The part of the optimizer's state that is this rank's, if it is divided.
    pub fn state_parts(&self) -> Option<Parts> {
        (self.zero == Zero::States).then(|| self.parts[self.rank()].clone())
    }

    /// Whether any rank says yes.
    ///
    /// # Errors
    /// [`CommError`], here and below: ranks that are lost, late, or do something else.
    pub fn any(&self, here: bool) -> Result<bool, CommError> {
        let mut flag = [u32::from(here)];
        self.comm.all_reduce(&mut flag, ReduceOp::Max)?;
        Ok(flag[0] != 0)
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn barrier(&self) -> Result<(), CommError> {
        self.comm.barrier()
    }

    /// Of `total` items that the ranks have in turns, all, from this rank's.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn in_turns<const N: usize>(&self, mine: &[[f64; N]], total: usize) -> Result<Vec<[f64; N]>, CommError> {
        let bits: Vec<i64> = mine.as_flattened().iter().map(|x| x.to_bits() as i64).collect();
        let mut all = vec![0i64; total * N];
        self.comm.all_gather(&bits, &mut all)?;
        let items: Vec<[f64; N]> = all.as_chunks::<N>().0.iter().map(|x| x.map(|x| f64::from_bits(x as u64))).collect();
        let n = self.size();
        // Rank r has ceil((total - r) / n) of them.
        let starts: Vec<usize> = (0..n)
            .scan(0, |at, rank| {
                let start = *at;
                *at += (total + n - 1 - rank) / n;
                Some(start)
            })
            .collect();
        Ok((0..total).map(|i| items[starts[i % n] + i / n]).collect())
    }

    /// Sums up what each rank has, in the order of the ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn sums(&self, here: &[f64]) -> Result<Vec<f64>, CommError> {
        let bits: Vec<i64> = here.iter().map(|x| x.to_bits() as i64).collect();
        let mut all = vec![0i64; bits.len() * self.size()];
        self.comm.all_gather(&bits, &mut all)?;
        let of_rank = |rank: usize| &all[rank * bits.len()..][..bits.len()];
        let sum = |i: usize| (0..self.size()).map(|rank| f64::from_bits(of_rank(rank)[i] as u64)).sum();
        Ok((0..bits.len()).map(sum).collect())
    }

    /// The sum of the gradients that [`Exchange`] has brought, as the optimizer of this rank takes them: whole, or where its state is divided, this rank's part.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn finish(&self, exchange: Exchange<'_>, device: &Device) -> Result<NamedGrads, CommError> {
        let sum = exchange.finish()?;
        let tensor = |values: Vec<f32>| {
            let n = values.len();
            Tensor::from_data(TensorData::new(values, [n]), device)
        };
        if self.zero == Zero::States {
            return Ok(sum.into_iter().map(|(name, values)| (name, tensor(values))).collect());
        }
        let names: Vec<String> = self.stages.iter().flatten().cloned().collect();
        let whole = self.gathered(&names, |name| sum.get(name).cloned().unwrap_or_default())?;
        Ok(whole.into_iter().map(|(name, values)| (name, tensor(values))).collect())
    }

    /// The module with the parameters that the ranks have updated, each its parts. Nothing is to be done where each updates all.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn gather_parameters<M: Module>(&self, module: M) -> Result<M, CommError> {
        if self.zero == Zero::None || self.size() == 1 {
            return Ok(module);
        }
        let mine = &self.parts[self.rank()];
        let names: Vec<String> = self.lengths.keys().cloned().collect();
        let updated: BTreeMap<String, Tensor<1>> =
            values(&module).into_iter().map(|(info, values)| (info.name, values)).collect();
        let part = |name: &str| match (mine.get(name), updated.get(name)) {
            (Some(part), Some(values)) => to_host(values.clone().slice([part.clone()])),
            _ => vec![],
        };
        let whole = self.gathered(&names, part)?;
        drop(updated);
        Ok(set_parameters(module, whole.into_iter().collect()))
    }

    /// Whole parameters' worth of what each rank has in parts.
    fn gathered(
        &self,
        names: &[String],
        part: impl Fn(&str) -> Vec<f32>,
    ) -> Result<Vec<(String, Vec<f32>)>, CommError> {
        let mut whole = Vec::with_capacity(names.len());
        let mut first = 0;
        while first < names.len() {
            let (mut last, mut elements) = (first, 0);
            while last < names.len() && (last == first || elements < BUCKET) {
                elements += self.lengths[&names[last]];
                last += 1;
            }
            let names = &names[first..last];
            let data: Vec<f32> = names.iter().flat_map(|name| part(name)).collect();
            let mut all = vec![0f32; elements];
            self.comm.all_gather(&data, &mut all)?;
            let mut out: Vec<Vec<f32>> = names.iter().map(|name| vec![0.0; self.lengths[name]]).collect();
            let mut at = 0;
            for parts in &self.parts {
                for (name, out) in names.iter().zip(&mut out) {
                    if let Some(part) = parts.get(name) {
                        out[part.clone()].copy_from_slice(&all[at..at + part.len()]);
                        at += part.len();
                    }
                }
            }
            whole.extend(names.iter().cloned().zip(out));
            first = last;
        }
        Ok(whole)
    }

    /// A tensor of the optimizer's state, of `elements` elements, from the parts of the ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn state_tensor(&self, optimizer: &Optimizer, name: &str, elements: usize) -> Result<Vec<f32>, CommError> {
        let mut all = vec![0.0; elements];
        self.comm.all_gather(&optimizer.state_part(name), &mut all)?;
        Ok(all)
    }

    /// Begins to add up the gradients of a step.
    pub fn exchange(&self) -> Exchange<'_> {
        Exchange { ranks: self, sum: BTreeMap::new(), under_way: VecDeque::new() }
    }
}

/// What comes from the other ranks, and how much of each.
type Sent = Pending<(Vec<f32>, Vec<usize>)>;

/// The gradients of one step on their way between the ranks.
#[derive(Debug)]
pub struct Exchange<'a> {
    ranks: &'a Ranks,
    sum: BTreeMap<String, Vec<f32>>,
    under_way: VecDeque<(usize, Sent)>,
}

impl Exchange<'_> {
    /// Takes the gradients of a stage, those of one micro-batch; `None` where this rank has no micro-batch while others have one. All ranks make the
    /// same calls.
    ///
    /// # Errors
    /// [`TrainError::Comm`]; [`TrainError::Input`] for a parameter without a gradient, which the ranks could not agree on.
    pub fn stage(&mut self, stage: usize, grads: Option<NamedGrads>) -> Result<(), TrainError> {
        let Ranks { comm, parts, stages, .. } = self.ranks;
        let (mut data, mut counts) = (vec![], vec![0; comm.size()]);
        if let Some(mut grads) = grads {
            let mut whole = BTreeMap::new();
            for name in &stages[stage] {
                let grad = grads.remove(name).ok_or_else(|| TrainError::Input {
                    what: "ranks",
                    expected: "a model whose trainable parameters all take part in the loss".into(),
                    got: format!("no gradient of {name}"),
                })?;
                whole.insert(name, to_host(grad));
            }
            for (parts, count) in parts.iter().zip(&mut counts) {
                for (name, values) in &whole {
                    if let Some(part) = parts.get(*name) {
                        data.extend_from_slice(&values[part.clone()]);
                        *count += part.len();
                    }
                }
            }
        }
        self.under_way.push_back((stage, comm.start_all_to_all(data, counts)?));
        while self.under_way.len() > UNDER_WAY {
            self.take()?;
        }
        Ok(())
    }

    /// Waits for the oldest, and adds up what came.
    fn take(&mut self) -> Result<(), CommError> {
        let Some((stage, pending)) = self.under_way.pop_front() else { return Ok(()) };
        let (data, counts) = pending.wait()?;
        let mine = &self.ranks.parts[self.ranks.rank()];
        let mut rest = &data[..];
        // In the order of the ranks, which is that of their micro-batches.
        for _ in counts.iter().filter(|&&count| count > 0) {
            for name in &self.ranks.stages[stage] {
                let Some(part) = mine.get(name) else { continue };
                let (values, others) = rest.split_at(part.len());
                rest = others;
                match self.sum.get_mut(name) {
                    None => drop(self.sum.insert(name.clone(), values.to_vec())),
                    Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x),
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<BTreeMap<String, Vec<f32>>, CommError> {
        while !self.under_way.is_empty() {
            self.take()?;
        }
        Ok(self.sum)
    }
}
