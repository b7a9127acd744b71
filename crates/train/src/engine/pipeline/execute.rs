//! Executes a rank's list.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use firebox_models::{Flow, Staged, TokenBatch};
use firebox_optim::NamedGrads;
use firebox_parallel::pipeline::{Action, Payload, Work};
use firebox_parallel::{Communicator, Pending, clock};
use firebox_tensor::ops::{Deferred, defer_weights};

use super::{Event, Executed, Pipeline, Shared};
use crate::TrainError;
use crate::engine::{Engine, Pass};
use crate::model_io::to_host;

impl Engine {
    /// Executes a rank's list of the pipeline's plan: adds the gradients of its own parameters over all micro-batches of a step to `total`.
    ///
    /// A rank that uses a parameter without [owning](Pipeline::owner) it (the head's rank, of a tied embedding) gets the owner's sum: both then take
    /// the same update. For the rest see [`pipeline_step`](Self::pipeline_step).
    ///
    /// # Errors
    /// As [`pipeline_step`](Self::pipeline_step).
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
        let mut add = |_: usize, _: usize, grads: NamedGrads| {
            total.add(grads);
            Ok(())
        };
        let executed = self.pipeline_step(model, pipeline, batches, counters, group, &mut add)?;
        pipeline.share(model, group, total)?;
        Ok(executed)
    }

    /// Executes a rank's list of the pipeline's plan. `sink` gets, of a stage of the plan and a micro-batch, the gradients of the parameters that the
    /// stage owns: each stage's in the order of the micro-batches, and in the same order on all ranks at the same place of like pipelines.
    ///
    /// Micro-batch `i` counts its dropout with `counters[i]`. The model may be whole, or the rank's [part](Pipeline::part). Every rank is given all
    /// batches: those in the middle of the model need their segments and positions, and tokens are small.
    ///
    /// What a rank sends is on its way when the list says so, without a wait; it awaits what comes where the list says so, and has taken its place before.
    /// Besides what is in the lists, the gradient of a parameter that stages share goes from each to the owner, for each micro-batch: it is added where
    /// one rank would add it. There the owner never waits for it, since that stage went backward before.
    ///
    /// Where the plan has backward in halves, the first makes the gradients of inputs, biases, norms, tables and the head, and
    /// [leaves](firebox_tensor::ops::defer_weights) those of the matrices of linear layers to the second. On other devices than the CPU backends the first half makes
    /// all of them.
    ///
    /// # Errors
    /// [`TrainError::Input`] for other numbers of ranks, micro-batches or counters than the plan's; [`TrainError::Comm`] where a rank is lost or late;
    /// [`TrainError::Offload`] where inputs of stages cannot be written; what `sink` says.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn pipeline_step<M: Staged>(
        &self,
        model: &M,
        pipeline: &Pipeline,
        batches: &[TokenBatch],
        counters: &[u64],
        group: &Communicator,
        sink: &mut Sink<'_>,
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
            device: device(model),
            shared: pipeline.shared(model)?,
            coming: None,
            values: BTreeMap::new(),
            passes: BTreeMap::new(),
            halves: BTreeMap::new(),
            parts: BTreeMap::new(),
            losses: vec![0.0; batches.len()],
            sink,
        };
        let mut events = Vec::with_capacity(list.len());
        run.post(receives.next())?;
        for action in list.iter().copied() {
            let start = clock();
            run.execute(action)?;
            if matches!(action, Action::Recv { .. }) {
                // The next message may come while this rank computes.
                run.post(receives.next())?;
            }
            events.push(Event { action, start, end: clock() });
        }
        let loss = run.share_loss()?;
        Ok(Executed { loss, events })
    }
}

/// Takes the gradients of a stage of the plan and a micro-batch.
pub type Sink<'a> = dyn FnMut(usize, usize, NamedGrads) -> Result<(), TrainError> + 'a;

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
    /// The gradients that the first half of backward has made, and those that it has left to the second.
    halves: BTreeMap<(usize, usize), (NamedGrads, Deferred)>,
    /// Gradients that a stage has made of a parameter of another stage of this rank.
    parts: BTreeMap<(String, usize, usize), Tensor<1>>,
    losses: Vec<f64>,
    sink: &'a mut Sink<'a>,
}

impl Pipeline {
    /// Gives the sums of the gradients of parameters that stages share to all ranks that use them, once all micro-batches of a step are added up.
    ///
    /// # Errors
    /// [`TrainError::Comm`] where a rank is lost or late.
    pub fn share<M: Staged>(&self, model: &M, group: &Communicator, total: &mut NamedGrads) -> Result<(), TrainError> {
        for shared in self.shared(model)? {
            let (own, owner) = (group.rank(), self.rank_of(shared.owner));
            let mut others: Vec<usize> = shared.users.iter().map(|user| self.rank_of(*user)).collect();
            others.sort_unstable();
            others.dedup();
            others.retain(|rank| *rank != owner);
            let tag = self.tag(Kind::Total, shared.owner, 0);
            if own == owner {
                for to in others {
                    let sum = total.get(&shared.name).cloned();
                    group.send(sum.map(to_host).unwrap_or_default(), to, tag)?;
                }
            } else if others.contains(&own) {
                let values = group.recv::<f32>(owner, tag)?;
                if !values.is_empty() {
                    let sum = flat(values, &device(model));
                    total.insert(shared.name, sum);
                }
            }
        }
        Ok(())
    }

    /// Messages of one rank to another with one tag are of one stage and micro-batch.
    pub(super) fn tag(&self, kind: Kind, stage: usize, micro_batch: usize) -> u32 {
        ((micro_batch * self.plan.stages() + stage) * 4 + kind as usize) as u32
    }

    pub(super) fn rank_of(&self, stage: usize) -> usize {
        self.plan.placement[stage]
    }
}

/// The device of a model's parameters, without gradients.
pub(super) fn device<M: Staged>(model: &M) -> Device {
    model.devices().into_iter().next().unwrap_or_default().inner()
}

/// Hidden states, or their gradient, from a message.
pub(super) fn hidden<M: Staged>(model: &M, values: Vec<f32>, batch: &TokenBatch, device: &Device) -> Tensor<3> {
    let [b, t] = model.hidden_tokens(batch);
    let shape = [b, t, values.len() / (b * t).max(1)];
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn flat(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let n = [values.len()];
    Tensor::from_data(TensorData::new(values, n), device)
}

/// What messages carry, as their tags tell it.
#[derive(Clone, Copy)]
pub(super) enum Kind {
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
    /// Takes the place of a message that the list receives next.
    fn post(&mut self, action: Option<&Action>) -> Result<(), TrainError> {
        if let Some(&Action::Recv { payload, stage, micro_batch, from }) = action {
            self.coming = Some(self.group.start_recv(from, self.pipeline.tag(payload.into(), stage, micro_batch))?);
        }
        Ok(())
    }

    fn execute(&mut self, action: Action) -> Result<(), TrainError> {
        match action {
            Action::Send { payload, stage, micro_batch, to } => {
                let value = self.take(payload, stage, micro_batch);
                let tag = self.pipeline.tag(payload.into(), stage, micro_batch);
                self.group.send(value.map(to_host).unwrap_or_default(), to, tag)?;
            }
            Action::Recv { payload, stage, micro_batch, .. } => {
                let values = self.coming.take().map(Pending::wait).transpose()?.unwrap_or_default();
                let value = hidden(self.model, values, &self.batches[micro_batch], &self.device);
                self.values.insert((payload, stage, micro_batch), value);
            }
            Action::Compute { work: Work::Forward, stage, micro_batch } => self.forward(stage, micro_batch)?,
            Action::Compute { work: Work::Backward, stage, micro_batch } => {
                let (grads, _) = self.backward(stage, micro_batch, false)?;
                (self.sink)(stage, micro_batch, grads)?;
            }
            Action::Compute { work: Work::BackwardInput, stage, micro_batch } => {
                let halves = self.backward(stage, micro_batch, true)?;
                self.halves.insert((stage, micro_batch), halves);
            }
            Action::Compute { work: Work::BackwardWeight, stage, micro_batch } => {
                let (mut grads, mut deferred) = self.halves.remove(&(stage, micro_batch)).unwrap_or_default();
                grads.add(NamedGrads::from_deferred(self.model, &mut deferred, |_| true));
                (self.sink)(stage, micro_batch, grads)?;
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

    /// Returns the gradients of the parameters that this stage owns; hands on those of its input and of other stages' parameters. With `halves`,
    /// leaves gradients for later for which no other stage waits.
    fn backward(
        &mut self,
        stage: usize,
        micro_batch: usize,
        halves: bool,
    ) -> Result<(NamedGrads, Deferred), TrainError> {
        let upstream = self.take(Payload::Gradient, stage + 1, micro_batch);
        let (mut grads, mut deferred) = (NamedGrads::new(), Deferred::default());
        let Some(mut pass) = self.passes.remove(&(stage, micro_batch)) else { return Ok((grads, deferred)) };
        for (name, user) in self.owned(stage) {
            if let Some(part) = self.part(&name, stage, user, micro_batch)? {
                pass.pending.add(NamedGrads::from_iter([(name, part)]));
            }
        }
        pass.upstream = upstream;
        let mut next = || -> Result<Option<NamedGrads>, TrainError> {
            if !halves {
                return pass.backward(self.model);
            }
            let (complete, later) = defer_weights(|| pass.backward(self.model));
            deferred.append(later);
            complete
        };
        while let Some(complete) = next()? {
            grads.add(complete);
        }
        // Of the first stage nobody wants it, and there is one only where the stage is frozen.
        if let (Some(gradient), true) = (pass.upstream.take(), stage > 0) {
            self.values.insert((Payload::Gradient, stage, micro_batch), gradient);
        }
        // Messages are in the order in which they are taken: of two owners on one rank, the later stage goes backward first.
        let mut used: Vec<(String, usize)> = (self.shared.iter())
            .filter(|shared| shared.users.contains(&stage))
            .map(|shared| (shared.name.clone(), shared.owner))
            .collect();
        used.sort_by_key(|(_, owner)| Reverse(*owner));
        for (name, owner) in used {
            pass.pending.add(NamedGrads::from_deferred(self.model, &mut deferred, |other| other == name));
            let part = pass.pending.remove(&name);
            let to = self.pipeline.rank_of(owner);
            if to != self.group.rank() {
                let tag = self.pipeline.tag(Kind::Part, stage, micro_batch);
                self.group.send(part.map(to_host).unwrap_or_default(), to, tag)?;
            } else if let Some(part) = part {
                self.parts.insert((name, stage, micro_batch), part);
            }
        }
        Ok((grads, deferred))
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
        let (from, tag) = (self.pipeline.rank_of(user), self.pipeline.tag(Kind::Part, user, micro_batch));
        if from == self.pipeline.rank_of(owner) {
            return Ok(self.parts.remove(&(name.to_owned(), user, micro_batch)));
        }
        let values = self.group.recv::<f32>(from, tag)?;
        Ok((!values.is_empty()).then(|| flat(values, &self.device)))
    }

    /// The sum of the losses, which the last stage's rank knows.
    fn share_loss(&self) -> Result<f64, TrainError> {
        let sum: f64 = self.losses.iter().sum();
        let mut bits = [sum.to_bits().cast_signed()];
        self.group.broadcast(&mut bits, self.pipeline.rank_of(self.pipeline.plan.stages() - 1))?;
        Ok(f64::from_bits(bits[0].cast_unsigned()))
    }
}
