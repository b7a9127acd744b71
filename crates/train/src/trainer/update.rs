//! One update of the parameters from the micro-batches of a step.

use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_optim::NamedGrads;

use super::{GRADIENT_NOT_FINITE, LOSS_NOT_FINITE, Skip, Trainer, Updated, is_due, targets};
use crate::TrainError;
use crate::curvature::drawn;
use crate::fault::{self, Place};
use crate::noise::Part;
use crate::ranks::{Ranks, Zero};
use crate::task::{Model, device_of};
use crate::timeline::Kind;

impl<M: Model> Trainer<'_, M> {
    /// Gradients summed over micro-batches, clipped, then the update. Returns the mean loss and the gradients' norm, or why there was no update.
    pub(super) fn update(&mut self, lr: f64, batches: &[TokenBatch]) -> Result<Updated, TrainError> {
        let measured = is_due(self.state.step + 1, self.recipe.watch.noise_scale_every);
        let mut parts = vec![];
        let (loss, mut grads) = match &self.ranks {
            None => {
                self.gradients(batches, |i, batch| self.taught(i, batch.clone()), measured.then_some(&mut parts))?
            }
            Some(ranks) => {
                self.gradients_of_ranks(ranks, batches, |i, batch| self.taught(i, ranks.tokens_of(batch)))?
            }
        };
        #[cfg(test)]
        self.inject(&mut grads);
        self.gradient_bytes = grads.iter().map(|(_, grad)| 4 * grad.dims()[0]).sum();
        let scale = self.state.loss_scale.factor;
        // The one host sync of a step: the norm decides whether the update may happen.
        let squares = match &self.ranks {
            None => self.optimizer.squares(self.model(), &grads)?,
            Some(ranks) => ranks.squares(self.model(), &self.optimizer, &grads)?,
        };
        let clipping = self.optimizer.clipping_of(&squares, scale);
        let (loss, grad_norm) = (loss / scale, clipping.norm);
        if !loss.is_finite() || !grad_norm.is_finite() {
            if loss.is_finite() && self.recipe.precision.back_off(&mut self.state.loss_scale) {
                return Ok(Err(Skip::Overflow(format!("a gradient overflows at loss scale {scale}"))));
            }
            return Ok(Err(if loss.is_finite() { GRADIENT_NOT_FINITE } else { LOSS_NOT_FINITE }));
        }
        self.recipe.precision.grow(&mut self.state.loss_scale);
        if let Some(reason) = self.state.watch.look(&self.recipe.watch, loss, grad_norm) {
            return Ok(Err(Skip::Spike(reason)));
        }
        if measured {
            self.state.noise_scale.take(&parts, grad_norm * grad_norm);
        }
        if let Some(shards) = &mut self.shards {
            let update = || shards.step(&mut self.optimizer, lr, &clipping, &mut grads);
            self.recorder.span(Kind::Update, || "update".into(), update)?;
        } else if let Some(model) = self.model.take() {
            let Self { recorder, optimizer, .. } = self;
            let update = || optimizer.step_clipped(lr, &clipping, model, &mut grads);
            let model = recorder.span(Kind::Update, || "update".into(), update)?;
            self.model = Some(self.gather(model)?);
        }
        Ok(Ok((loss, grad_norm)))
    }

    /// The loss and the gradients of all micro-batches, each as `prepare` makes it; `parts` hear of each.
    fn gradients(
        &self,
        batches: &[TokenBatch],
        prepare: impl Fn(usize, &TokenBatch) -> TokenBatch,
        mut parts: Option<&mut Vec<Part>>,
    ) -> Result<(f64, NamedGrads), TrainError> {
        let (mut loss, mut grads) = (0.0, NamedGrads::new());
        for (i, batch) in batches.iter().enumerate() {
            let mut squares = 0.0;
            let mut see = |grads: &NamedGrads| {
                if parts.is_some() {
                    squares += grads.sum_of_squares();
                }
            };
            let (counter, batch) = (counter(self.state.step, i), prepare(i, batch));
            let forward = || self.engine.forward(self.model(), &batch, counter);
            let mut pass = self.recorder.span(Kind::Forward, || format!("forward of micro-batch {i}"), forward)?;
            let backward = || -> Result<(), TrainError> {
                while let Some(of_stage) = pass.backward(self.model())? {
                    see(&of_stage);
                    grads.add(of_stage);
                }
                Ok(())
            };
            self.recorder.span(Kind::Backward, || format!("backward of micro-batch {i}"), backward)?;
            loss += pass.loss();
            if let Some(parts) = &mut parts {
                let share = targets(&batch) as f64 * batch.loss_scale;
                parts.push(Part { rows: batch.sequence.batch(), share, squares });
            }
        }
        Ok((loss, grads))
    }

    /// The same of this rank's micro-batches, each as `prepare` makes it, added up over the ranks.
    fn gradients_of_ranks(
        &self,
        ranks: &Ranks,
        batches: &[TokenBatch],
        prepare: impl Fn(usize, &TokenBatch) -> TokenBatch,
    ) -> Result<(f64, NamedGrads), TrainError> {
        let model = self.model();
        let device = device_of(model).inner();
        let mut exchange = ranks.exchange();
        let fail_at = |place| fault::at(place, ranks.world_rank(), self.state.step + 1);
        fail_at(Place::Forward);
        if let Some(pipe) = ranks.pipe() {
            let mine = (ranks.rank()..batches.len()).step_by(ranks.size());
            let counters: Vec<u64> = mine.clone().map(|i| counter(self.state.step, i)).collect();
            let batches: Vec<TokenBatch> = mine.map(|i| prepare(i, &batches[i])).collect();
            let pipeline = pipe.pipeline(model, batches.len())?;
            let mut sink = |stage: usize, _: usize, grads: NamedGrads| {
                fail_at(Place::Backward);
                exchange.stage(stage, Some(grads))
            };
            let done = self.engine.pipeline_step(model, &pipeline, &batches, &counters, &pipe.group, &mut sink)?;
            self.recorder.pipeline(&done.events);
            fail_at(Place::Collective);
            let mut grads = ranks.finish(exchange, &device)?;
            if ranks.zero() == Zero::None {
                pipeline.share(model, &pipe.group, &mut grads)?;
            }
            return Ok((ranks.sum(done.loss)?, grads));
        }
        let mut losses = vec![];
        for round in (0..batches.len()).step_by(ranks.size()) {
            let i = round + ranks.rank();
            if let Some(shards) = &self.shards {
                let counter = counter(self.state.step, i);
                let batch = batches.get(i).map(|batch| prepare(i, batch));
                let batch = batch.as_ref().map(|batch| (batch, counter));
                let mut sink = |stage, grads| {
                    fail_at(Place::Backward);
                    exchange.stage(stage, grads)
                };
                let mut source = shards.gather(ranks);
                let loss = self.engine.gradients_by_stage(model, batch, &mut source, &mut sink, &self.recorder)?;
                losses.extend(loss);
                continue;
            }
            let Some(batch) = batches.get(i) else {
                for stage in (0..model.n_stages()).rev() {
                    exchange.stage(stage, None)?;
                }
                continue;
            };
            let counter = counter(self.state.step, i);
            let batch = prepare(i, batch);
            let forward = || self.engine.forward(model, &batch, counter);
            let mut pass = self.recorder.span(Kind::Forward, || format!("forward of micro-batch {i}"), forward)?;
            losses.push(pass.loss());
            let backward = || -> Result<(), TrainError> {
                let mut stage = model.n_stages();
                while let Some(grads) = pass.backward(model)? {
                    stage -= 1;
                    exchange.stage(stage, Some(grads))?;
                    fail_at(Place::Backward);
                }
                for stage in (0..stage).rev() {
                    exchange.stage(stage, Some(NamedGrads::new()))?;
                }
                Ok(())
            };
            self.recorder.span(Kind::Backward, || format!("backward of micro-batch {i}"), backward)?;
        }
        fail_at(Place::Collective);
        let grads = ranks.finish(exchange, &device)?;
        let losses: Vec<[f64; 1]> = ranks.over_context(&losses)?.into_iter().map(|loss| [loss]).collect();
        let losses = ranks.in_turns(&losses, batches.len())?;
        Ok((losses.iter().fold(0.0, |sum, [loss]| sum + loss), grads))
    }

    /// The whole model, where each rank has updated a part of it.
    fn gather(&self, model: M) -> Result<M, TrainError> {
        match &self.ranks {
            Some(ranks) => Ok(self.recipe.precision.hold_trained(ranks.gather_parameters(model)?)),
            None => Ok(model),
        }
    }

    /// Sophia's estimate, from the same inputs with targets that the model draws. One that is not finite is left out.
    pub(super) fn estimate_curvature(&mut self, batches: &[TokenBatch]) -> Result<(), TrainError> {
        let step = self.state.step;
        let drawn = |i, batch: &TokenBatch| match self.model().transformer() {
            Some(model) => drawn(model, batch, self.recipe.seed, counter(step, i)),
            // Only language models have come here.
            None => batch.clone(),
        };
        let mut grads = match &self.ranks {
            Some(ranks) => self.gradients_of_ranks(ranks, batches, drawn)?.1,
            None => self.gradients(batches, drawn, None)?.1,
        };
        // They have chosen experts once more than the step.
        self.model().transformer().map(Transformer::take_expert_load);
        let targets: usize = batches.iter().map(targets).sum();
        grads.scale(1.0 / self.state.loss_scale.factor);
        let finite = grads.all_finite();
        let finite = self.ranks.as_ref().map_or(Ok(finite), |ranks| ranks.any(!finite).map(|any| !any))?;
        let Self { model: Some(model), optimizer, .. } = self else { return Ok(()) };
        if finite {
            optimizer.curvature(model, grads, targets as u64)?;
        }
        Ok(())
    }

    /// The same for one micro-batch and without clipping, each parameter updated as soon as its gradient is complete.
    pub(super) fn update_in_backward(&mut self, lr: f64, batches: &[TokenBatch]) -> Result<Updated, TrainError> {
        // The recipe was checked: there is one.
        let batch = self.taught(0, batches[0].clone());
        let mut pass = self.engine.forward(self.model(), &batch, self.state.step)?;
        let loss = pass.loss();
        if !loss.is_finite() {
            return Ok(Err(LOSS_NOT_FINITE));
        }
        let (mut grad_norm, mut updated) = (0f64, false);
        while let Some(mut grads) = pass.backward(self.model())? {
            grad_norm = grad_norm.hypot(grads.global_norm());
            match grad_norm.is_finite() {
                true => updated |= !grads.is_empty(),
                false if updated => return Err(TrainError::HalfUpdated { step: self.state.step + 1 }),
                false => return Ok(Err(GRADIENT_NOT_FINITE)),
            }
            if let Some(model) = self.model.take() {
                self.model = Some(self.optimizer.step(lr, model, &mut grads)?);
            }
        }
        Ok(Ok((loss, grad_norm)))
    }
}

/// What dropout counts by. Of micro-batches it must differ: the upper bits of the step hold their number.
fn counter(step: u64, micro_batch: usize) -> u64 {
    step | (micro_batch as u64) << 40
}
