//! What ranks that have parts of a model do together: evaluate it, and put it together again.

use std::collections::HashMap;

use firebox_models::{Flow, Staged, TokenBatch};
use firebox_optim::{parameters, values};
use firebox_parallel::Communicator;

use super::Pipeline;
use super::execute::{Kind, device, hidden};
use crate::TrainError;
use crate::model_io::{set_parameters, to_host};

impl Pipeline {
    /// The loss of each batch as in evaluation, on every rank. Each has its [part](Self::part) of the model, and all the batches.
    ///
    /// # Errors
    /// [`TrainError::Comm`] where a rank is lost or late.
    pub fn losses<M: Staged>(
        &self,
        model: &M,
        batches: &[TokenBatch],
        group: &Communicator,
    ) -> Result<Vec<f64>, TrainError> {
        let (model, rank, last) = (model.valid(), group.rank(), self.plan.stages() - 1);
        let device = device(&model);
        let mine = (0..=last).filter(|stage| self.rank_of(*stage) == rank);
        let mut work: Vec<(usize, usize)> = mine.flat_map(|s| (0..batches.len()).map(move |k| (s, k))).collect();
        // A batch moves on by a stage at a time, so what is needed is always made before.
        work.sort_unstable_by_key(|(stage, k)| (stage + k, *stage));
        let mut bits = vec![0i64; batches.len()];
        let mut waiting: HashMap<(usize, usize), Flow> = HashMap::new();
        for (stage, k) in work {
            let batch = &batches[k];
            let input = match stage.checked_sub(1) {
                None => Flow::Start,
                Some(before) if self.rank_of(before) == rank => waiting.remove(&(before, k)).unwrap_or(Flow::Start),
                Some(before) => {
                    let values = group.recv(self.rank_of(before), self.tag(Kind::Activation, before, 0))?;
                    Flow::Hidden(hidden(&model, values, batch, &device))
                }
            };
            let output = self.cut[stage].clone().fold(input, |flow, i| model.forward_stage(i, flow, batch, None));
            match output {
                Flow::Loss(loss) => bits[k] = f64::from(to_host(loss)[0]).to_bits().cast_signed(),
                Flow::Hidden(x) if self.rank_of(stage + 1) != rank => {
                    group.send(to_host(x), self.rank_of(stage + 1), self.tag(Kind::Activation, stage, 0))?;
                }
                flow => drop(waiting.insert((stage, k), flow)),
            }
        }
        group.broadcast(&mut bits, self.rank_of(last))?;
        Ok(bits.into_iter().map(|bits| f64::from_bits(bits.cast_unsigned())).collect())
    }

    /// The whole model, on rank `to` alone, from the parts of all: each parameter comes from its [owner](Self::owner). Takes the shapes from `whole`,
    /// a model whose parameters are replaced, on that rank, before they are initialized.
    ///
    /// # Errors
    /// [`TrainError::Comm`] where a rank is lost or late; [`TrainError::Optim`] if two parameters have one path.
    pub fn gather<M: Staged>(
        &self,
        part: &M,
        whole: M,
        to: usize,
        group: &Communicator,
    ) -> Result<Option<M>, TrainError> {
        let rank = group.rank();
        let names = parameters(&whole)?.into_iter().map(|info| info.name);
        let mut mine: HashMap<String, _> = values(part).into_iter().map(|(info, value)| (info.name, value)).collect();
        let mut found = HashMap::new();
        for name in names {
            let (owner, tag) = (self.owner(&whole, &name), self.tag(Kind::Total, 0, 0));
            let own = mine.remove(&name).filter(|_| owner == rank).map(to_host);
            match own {
                Some(values) if rank == to => drop(found.insert(name, values)),
                Some(values) => group.send(values, to, tag)?,
                None if rank == to => drop(found.insert(name, group.recv(owner, tag)?)),
                None => {}
            }
        }
        Ok((rank == to).then(|| set_parameters(whole, found)))
    }
}
