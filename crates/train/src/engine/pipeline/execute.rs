//! Executes a rank's list.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use burn::tensor::{Device, Tensor, TensorData};
use firebox_models::{Flow, Staged, TokenBatch};
use firebox_optim::NamedGrads;
use firebox_parallel::pipeline::{Action, Payload, Work};
use firebox_parallel::{Communicator, Pending};

use super::{Event, Executed, Pipeline, Shared};
use crate::TrainError;
use crate::engine::{Engine, Pass};
use crate::model_io::to_host;

impl Engine {
    /// Executes a rank's list of the pipeline's plan: adds the gradients of its own parameters over all micro-batches of a step to `total`.
    ///
    /// Micro-batch `i` counts its dropout with `counters[i]`. The model may be whole, or the rank's [part](Pipeline::part). A rank that uses a
    /// parameter without [owning](Pipeline::owner) it (the head's rank, of a tied embedding) gets the owner's sum in `total`: both then take
    /// the same update.
    ///
    /// Every rank is given the batches: those in the middle of the model need their segments and positions, and tokens are small.
    ///
    /// # Errors
    /// [`TrainError::Input`] for other numbers of ranks, micro-batches or counters than the plan's; [`TrainError::Comm`] where a rank is lost or late;
    /// [`TrainError::Offload`] where inputs of stages cannot be written.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn pipeline_gradients<M: Staged>(
        &self,
        model: &M,
        pipeline: &Pipeline,
        batches: &[TokenBatch],
        counters: &[u64],
        group: &Communicator,
        total: &mut NamedGrads,
    ) -> Result<Executed, TrainError> {
        self.pipeline_gradients_seen(model, pipeline, batches, counters, group, total, &mut |_, _| {})
    }

    /// The same; `see` is shown each micro-batch's own gradients of the parameters that this rank owns, a stage of the plan at a time.
    #[allow(clippy::too_many_arguments, reason = "what a step is made of")]
    pub(crate) fn pipeline_gradients_seen<M: Staged>(
        &self,
        model: &M,
        pipeline: &Pipeline,
        batches: &[TokenBatch],
        counters: &[u64],
        group: &Communicator,
        total: &mut NamedGrads,
        see: &mut dyn FnMut(usize, &NamedGrads),
    ) -> Result<Executed, TrainError> {
        let plan = &pipeline.plan;
        for (what, expected, got) in [
            ("ranks of a pipeline", plan.ranks(), group.size()),
            ("micro-batches of a pipeline's step", plan.micro_batches, batches.len()),
            ("counters of a pipeline's step", plan.micro_batches, counters.len()),
        ] {
            if expected != got {
                let (expected, got) = (format!("{expected}, as in its plan"), got.to_string());
                return Err(TrainError::Input { what, expected, got });
            }
        }
        let list = &plan.actions[group.rank()];
        let mut receives = list.iter().filter(|action| matches!(action, Action::Recv { .. }));
        let mut run = Run {
            engine: self,
            model,
            pipeline,
            batches,
            counters,
            group,
            device: model.devices().into_iter().next().unwrap_or_default().inner(),
            shared: pipeline.shared(model)?,
            coming: None,
            values: BTreeMap::new(),
            passes: BTreeMap::new(),
            halves: BTreeMap::new(),
            parts: BTreeMap::new(),
            losses: vec![0.0; batches.len()],
            total,
            see,
        };
        let (clock, began) = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), Instant::now());
        let mut events = Vec::with_capacity(list.len());
        run.expect(receives.next())?;
        for action in list.iter().copied() {
            let start = clock + began.elapsed();
            run.execute(action)?;
            if matches!(action, Action::Recv { .. }) {
                // The next message may come while this rank computes.
                run.expect(receives.next())?;
            }
            events.push(Event { action, start, end: clock + began.elapsed() });
        }
        run.share_totals()?;
        let loss = run.share_loss()?;
        Ok(Executed { loss, events })
    }
}

/// A step under way on one rank.
struct Run<'a, M> {
    engine: &'a Engine,
    model: &'a M,
    pipeline: &'a Pipeline,
    batches: &'a [TokenBatch],
    counters: &'a [u64],
    group: &'a Communicator,
    device: Device,
    shared: Vec<Shared>,
    /// The next message of the list.
    coming: Option<Pending<Vec<f32>>>,
    /// What stages have made, here or elsewhere, and nobody has taken yet.
    values: BTreeMap<(Payload, usize, usize), Tensor<3>>,
    /// Stages and micro-batches between forward and backward.
    passes: BTreeMap<(usize, usize), Pass<'a>>,
    /// The gradients that the first half of backward has made.
    halves: BTreeMap<(usize, usize), NamedGrads>,
    /// Gradients that a stage has made of a parameter of another stage of this rank.
    parts: BTreeMap<(String, usize, usize), Tensor<1>>,
    losses: Vec<f64>,
    total: &'a mut NamedGrads,
    see: &'a mut dyn FnMut(usize, &NamedGrads),
}

/// What messages carry, as their tags tell it.
#[derive(Clone, Copy)]
enum Kind {
    Activation,
    Gradient,
    /// A part of the gradient of a shared parameter.
    Part,
    /// Its sum.
    Total,
}

impl From<Payload> for Kind {
    fn from(payload: Payload) -> Self {
        match payload {
            Payload::Activation => Self::Activation,
            Payload::Gradient => Self::Gradient,
        }
    }
}

impl<M: Staged> Run<'_, M> {
    /// Messages of one rank to another with one tag are of one stage and micro-batch.
    fn tag(&self, kind: Kind, stage: usize, micro_batch: usize) -> u32 {
        ((micro_batch * self.pipeline.plan.stages() + stage) * 4 + kind as usize) as u32
    }

    fn rank_of(&self, stage: usize) -> usize {
        self.pipeline.plan.placement[stage]
    }

    /// Takes the place of a message that the list receives next.
    fn expect(&mut self, action: Option<&Action>) -> Result<(), TrainError> {
        if let Some(&Action::Recv { payload, stage, micro_batch, from }) = action {
            self.coming = Some(self.group.start_recv(from, self.tag(payload.into(), stage, micro_batch))?);
        }
        Ok(())
    }

    fn execute(&mut self, action: Action) -> Result<(), TrainError> {
        match action {
            Action::Send { payload, stage, micro_batch, to } => {
                let value = self.take(payload, stage, micro_batch);
                let tag = self.tag(payload.into(), stage, micro_batch);
                self.group.send(value.map(to_host).unwrap_or_default(), to, tag)?;
            }
            Action::Recv { payload, stage, micro_batch, .. } => {
                let values = self.coming.take().map(Pending::wait).transpose()?.unwrap_or_default();
                let sequence = &self.batches[micro_batch].sequence;
                let [b, t] = [sequence.batch(), sequence.tokens()];
                let shape = [b, t, values.len() / (b * t).max(1)];
                let value = Tensor::from_data(TensorData::new(values, shape), &self.device);
                self.values.insert((payload, stage, micro_batch), value);
            }
            Action::Compute { work: Work::Forward, stage, micro_batch } => self.forward(stage, micro_batch)?,
            Action::Compute { work: Work::Backward, stage, micro_batch } => {
                let grads = self.backward(stage, micro_batch)?;
                self.add(micro_batch, grads);
            }
            Action::Compute { work: Work::BackwardInput, stage, micro_batch } => {
                let grads = self.backward(stage, micro_batch)?;
                self.halves.insert((stage, micro_batch), grads);
            }
            Action::Compute { work: Work::BackwardWeight, stage, micro_batch } => {
                let grads = self.halves.remove(&(stage, micro_batch)).unwrap_or_default();
                self.add(micro_batch, grads);
            }
        }
        Ok(())
    }

    fn take(&mut self, payload: Payload, stage: usize, micro_batch: usize) -> Option<Tensor<3>> {
        self.values.remove(&(payload, stage, micro_batch))
    }

    fn forward(&mut self, stage: usize, micro_batch: usize) -> Result<(), TrainError> {
        let before = stage.checked_sub(1).and_then(|before| self.take(Payload::Activation, before, micro_batch));
        let input = before.map_or(Flow::Start, Flow::Hidden);
        let (batch, counter) = (&self.batches[micro_batch], self.counters[micro_batch]);
        let stages = self.pipeline.cut[stage].clone();
        let (pass, output) = self.engine.forward_part(self.model, stages, input, batch, counter)?;
        self.passes.insert((stage, micro_batch), pass);
        match output {
            Flow::Loss(loss) => self.losses[micro_batch] = f64::from(to_host(loss)[0]),
            Flow::Hidden(x) => drop(self.values.insert((Payload::Activation, stage, micro_batch), x)),
            Flow::Start => {}
        }
        Ok(())
    }

    /// Returns the gradients of the parameters that this stage owns; hands on those of its input and of other stages' parameters.
    fn backward(&mut self, stage: usize, micro_batch: usize) -> Result<NamedGrads, TrainError> {
        let upstream = self.take(Payload::Gradient, stage + 1, micro_batch);
        let mut grads = NamedGrads::new();
        let Some(mut pass) = self.passes.remove(&(stage, micro_batch)) else { return Ok(grads) };
        for (name, user) in self.owned(stage) {
            if let Some(part) = self.part(&name, stage, user, micro_batch)? {
                pass.pending.add(NamedGrads::from_iter([(name, part)]));
            }
        }
        pass.upstream = upstream;
        while let Some(complete) = pass.backward(self.model)? {
            grads.add(complete);
        }
        // Of the first stage nobody wants it, and there is one only where the stage is frozen.
        if let (Some(gradient), true) = (pass.upstream.take(), stage > 0) {
            self.values.insert((Payload::Gradient, stage, micro_batch), gradient);
        }
        let used: Vec<(String, usize)> = (self.shared.iter())
            .filter(|shared| shared.users.contains(&stage))
            .map(|shared| (shared.name.clone(), shared.owner))
            .collect();
        for (name, owner) in used {
            let part = pass.pending.remove(&name);
            let to = self.rank_of(owner);
            if to != self.group.rank() {
                let tag = self.tag(Kind::Part, stage, micro_batch);
                self.group.send(part.map(to_host).unwrap_or_default(), to, tag)?;
            } else if let Some(part) = part {
                self.parts.insert((name, stage, micro_batch), part);
            }
        }
        Ok(grads)
    }

    /// The shared parameters that a stage owns, with each other stage that uses them, from the last on.
    fn owned(&self, stage: usize) -> Vec<(String, usize)> {
        let of_stage = self.shared.iter().filter(|shared| shared.owner == stage);
        of_stage.flat_map(|shared| shared.users.iter().map(|user| (shared.name.clone(), *user))).collect()
    }

    /// What a stage has made of the gradient of another's parameter. It is there: the stage went backward before.
    fn part(
        &mut self,
        name: &str,
        owner: usize,
        user: usize,
        micro_batch: usize,
    ) -> Result<Option<Tensor<1>>, TrainError> {
        let (from, tag) = (self.rank_of(user), self.tag(Kind::Part, user, micro_batch));
        if from == self.rank_of(owner) {
            return Ok(self.parts.remove(&(name.to_owned(), user, micro_batch)));
        }
        let values = self.group.recv::<f32>(from, tag)?;
        Ok((!values.is_empty()).then(|| self.flat(values)))
    }

    fn flat(&self, values: Vec<f32>) -> Tensor<1> {
        let n = [values.len()];
        Tensor::from_data(TensorData::new(values, n), &self.device)
    }

    fn add(&mut self, micro_batch: usize, grads: NamedGrads) {
        (self.see)(micro_batch, &grads);
        self.total.add(grads);
    }

    /// Gives the sums of shared gradients to all who use the parameter.
    fn share_totals(&mut self) -> Result<(), TrainError> {
        for shared in std::mem::take(&mut self.shared) {
            let (own, owner) = (self.group.rank(), self.rank_of(shared.owner));
            let mut others: Vec<usize> = shared.users.iter().map(|user| self.rank_of(*user)).collect();
            others.sort_unstable();
            others.dedup();
            others.retain(|rank| *rank != owner);
            let tag = self.tag(Kind::Total, shared.owner, 0);
            if own == owner {
                for to in others {
                    let sum = self.total.get(&shared.name).cloned();
                    self.group.send(sum.map(to_host).unwrap_or_default(), to, tag)?;
                }
            } else if others.contains(&own) {
                let values = self.group.recv::<f32>(owner, tag)?;
                if !values.is_empty() {
                    let sum = self.flat(values);
                    self.total.insert(shared.name, sum);
                }
            }
        }
        Ok(())
    }

    /// The sum of the losses, which the last stage's rank knows.
    fn share_loss(&self) -> Result<f64, TrainError> {
        let sum: f64 = self.losses.iter().sum();
        let mut bits = [sum.to_bits().cast_signed()];
        self.group.broadcast(&mut bits, self.rank_of(self.pipeline.plan.stages() - 1))?;
        Ok(f64::from_bits(bits[0].cast_unsigned()))
    }
}
