//! The gradients of a step on their way between the ranks.

use std::collections::{BTreeMap, VecDeque};

use firebox_optim::NamedGrads;
use firebox_parallel::{CommError, Pending};

use super::Ranks;
use crate::TrainError;
use crate::model_io::to_host;

/// Gradients of stages under way, at most: each is a copy.
const UNDER_WAY: usize = 2;

/// What comes from the other ranks, and how much of each.
type Sent = Pending<(Vec<f32>, Vec<usize>)>;

/// The gradients of one step on their way between the ranks.
#[derive(Debug)]
pub struct Exchange<'a> {
    ranks: &'a Ranks,
    sum: BTreeMap<String, Vec<f32>>,
    /// Of which stage, and whether of experts that are divided.
    under_way: VecDeque<(usize, bool, Sent)>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(ranks: &'a Ranks) -> Self {
        Self { ranks, sum: BTreeMap::new(), under_way: VecDeque::new() }
    }

    /// Takes the gradients of a stage, those of one micro-batch; `None` where this rank has no micro-batch while others have one. All ranks make the
    /// same calls.
    ///
    /// # Errors
    /// [`TrainError::Comm`]; [`TrainError::Input`] for a parameter without a gradient, which the ranks could not agree on.
    pub fn stage(&mut self, stage: usize, grads: Option<NamedGrads>) -> Result<(), TrainError> {
        let names = &self.ranks.stages[stage];
        let mut whole = BTreeMap::new();
        if let Some(mut grads) = grads {
            for name in names {
                let grad = grads.remove(name).ok_or_else(|| TrainError::Input {
                    what: "ranks",
                    expected: "a model whose trainable parameters all take part in the loss".into(),
                    got: format!("no gradient of {name}"),
                })?;
                whole.insert(name, to_host(grad));
            }
        }
        for (experts, division) in self.ranks.divisions.all() {
            if experts && !names.iter().any(|name| self.ranks.divisions.is_expert(name)) {
                continue;
            }
            let (mut data, mut counts) = (vec![], vec![0; division.comm.size()]);
            for (parts, count) in division.sums.iter().zip(&mut counts) {
                for (name, values) in &whole {
                    if let Some(part) = parts.get(*name) {
                        data.extend_from_slice(&values[part.clone()]);
                        *count += part.len();
                    }
                }
            }
            self.under_way.push_back((stage, experts, division.comm.start_all_to_all(data, counts)?));
        }
        while self.under_way.len() > UNDER_WAY {
            self.take()?;
        }
        Ok(())
    }

    /// Waits for the oldest, and adds up what came.
    fn take(&mut self) -> Result<(), CommError> {
        let Some((stage, experts, pending)) = self.under_way.pop_front() else { return Ok(()) };
        let (data, counts) = pending.wait()?;
        let Some(division) = self.ranks.divisions.of(experts) else { return Ok(()) };
        let mine = division.added();
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

    pub(super) fn finish(mut self) -> Result<BTreeMap<String, Vec<f32>>, CommError> {
        while !self.under_way.is_empty() {
            self.take()?;
        }
        Ok(self.sum)
    }
}
