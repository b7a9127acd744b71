//! A model whose parameters ranks divide among themselves as they do its state (ZeRO-3, arXiv:1910.02054): each has a part of every parameter, and a stage is
//! brought together where it is needed.

use std::collections::{BTreeMap, HashMap};

use burn::module::{ModuleMapper, Param, ParamId};
use burn::tensor::{Device, Shape, Tensor, TensorData};
use firebox_models::Staged;
use firebox_optim::{Average, Clipping, NamedGrads, OptimError, Optimizer, ParamInfo, Parts, is_trainable};
use firebox_parallel::{CommError, Pending};
use firebox_tensor::ops::{is_bf16, to_bf16, to_f32};

use super::Ranks;
use crate::TrainError;
use crate::engine::StageSource;
use crate::model_io::{set_parameters, to_host};
use crate::precision::PrecisionRecipe;

/// This rank's parts of the parameters.
#[derive(Debug)]
pub struct Shards<M> {
    /// Flat, without gradients, by name.
    held: BTreeMap<String, Tensor<1>>,
    /// The model without them: on a device that records gradients, and on one that does not.
    shapes: M,
    plain: M,
    precision: PrecisionRecipe,
}

impl<M: Staged> Shards<M> {
    /// Keeps of the trainable parameters of `model` these parts alone. Of the rest nothing stays, and nothing is made that has not been yet; no more than one
    /// whole parameter is there at a time, if it had not been made.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn take(model: M, parts: &Parts, precision: &PrecisionRecipe) -> Result<Self, OptimError> {
        let trainable: BTreeMap<String, bool> =
            firebox_optim::parameters(&model)?.into_iter().map(|info| (info.name, info.trainable)).collect();
        let mut cut = Cut { path: vec![], trainable, parts, held: BTreeMap::new() };
        let shapes = model.map(&mut cut);
        let plain = shapes.clone().map(&mut Plain);
        Ok(Self { held: cut.held, shapes, plain, precision: precision.clone() })
    }

    /// The model, with names, shapes and devices of its parameters but without their values.
    pub fn shapes(&self) -> &M {
        &self.shapes
    }

    /// The parts: flat, without gradients, in f32 or bfloat16, by name.
    pub fn held(&self) -> &BTreeMap<String, Tensor<1>> {
        &self.held
    }

    /// Every trainable parameter, with the part of its values that is this rank's, in f32.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn values(&self) -> Result<impl Iterator<Item = (ParamInfo, Tensor<1>)>, OptimError> {
        let device = self.held.values().next().map(Tensor::device).unwrap_or_default();
        let trainable = firebox_optim::parameters(&self.shapes)?.into_iter().filter(|info| info.trainable);
        Ok(trainable.map(move |info| {
            let part = self.held.get(&info.name).cloned().map(to_f32);
            let nothing = || Tensor::from_data(TensorData::new(Vec::<f32>::new(), [0]), &device);
            let part = part.unwrap_or_else(nothing);
            (info, part)
        }))
    }

    /// The same model with this rank's parts of averages, in f32; as they are before the first.
    pub fn averaged(&self, average: &Average) -> Self {
        let of = |(name, part): (&String, &Tensor<1>)| (name.clone(), average.of(name).unwrap_or_else(|| part.clone()));
        Self {
            held: self.held.iter().map(of).collect(),
            shapes: self.shapes.clone(),
            plain: self.plain.clone(),
            precision: PrecisionRecipe::default(),
        }
    }

    /// Bytes of the parts.
    pub fn bytes(&self) -> usize {
        self.held.values().map(bytes).sum()
    }

    /// One step of the parts.
    ///
    /// # Errors
    /// As [`Optimizer::step_parts`].
    pub fn step(
        &mut self,
        optimizer: &mut Optimizer,
        lr: f64,
        clipping: &Clipping,
        grads: &mut NamedGrads,
    ) -> Result<(), OptimError> {
        optimizer.step_parts(lr, clipping, &self.shapes, &mut self.held, grads)
    }

    /// Brings stages together, with the other ranks, which must ask for the same ones.
    pub fn gather<'a>(&'a self, ranks: &'a Ranks) -> Gather<'a, M> {
        Gather { ranks, shards: self, coming: None }
    }

    /// The whole model, on the first of the ranks that divide it. All of them must ask.
    ///
    /// # Errors
    /// [`CommError`].
    pub fn whole(&self, ranks: &Ranks) -> Result<Option<M>, CommError> {
        let (group, mut whole) = (&ranks.divisions.dense.shard, HashMap::new());
        for name in ranks.shapes.keys() {
            if group.rank() > 0 {
                if let Some(part) = self.held.get(name) {
                    group.send(to_host(to_f32(part.clone())), 0, TO_WRITE)?;
                }
                continue;
            }
            let mut values = vec![0.0; ranks.elements(name)];
            for (rank, parts) in ranks.divisions.dense.parts.iter().enumerate() {
                let Some(range) = parts.get(name) else { continue };
                let part = match self.held.get(name) {
                    Some(part) if rank == 0 => to_host(to_f32(part.clone())),
                    _ => group.recv(rank, TO_WRITE)?,
                };
                values[range.clone()].copy_from_slice(&part);
            }
            whole.insert(name.clone(), values);
        }
        Ok((group.rank() == 0).then(|| self.precision.hold_trained(set_parameters(self.shapes.clone(), whole))))
    }
}

/// Of a parameter, in f32 or bfloat16.
pub fn bytes<const D: usize>(tensor: &Tensor<D>) -> usize {
    tensor.shape().num_elements() * if is_bf16(tensor) { 2 } else { 4 }
}

/// The tag of parts of parameters on their way to the rank that writes.
const TO_WRITE: u32 = 0x5a33;

/// Stages on their way.
#[derive(Debug)]
pub struct Gather<'a, M> {
    ranks: &'a Ranks,
    shards: &'a Shards<M>,
    coming: Option<(usize, Pending<Vec<f32>>)>,
}

impl<M: Staged> Gather<'_, M> {
    fn names(&self, stage: usize) -> Vec<String> {
        self.ranks.shapes.keys().filter(|name| self.shards.shapes.uses(stage, name)).cloned().collect()
    }

    fn start(&self, stage: usize) -> Result<Pending<Vec<f32>>, CommError> {
        let (names, held) = (self.names(stage), &self.shards.held);
        let parts = names.iter().filter_map(|name| held.get(name));
        let mine: Vec<f32> = parts.flat_map(|part| to_host(to_f32(part.clone()))).collect();
        let elements = names.iter().map(|name| self.ranks.elements(name)).sum();
        self.ranks.divisions.dense.shard.start_all_gather(mine, elements)
    }
}

impl<M: Staged> StageSource<M> for Gather<'_, M> {
    fn bring(&mut self, stage: usize, record: bool, next: Option<usize>) -> Result<M, TrainError> {
        let came = match self.coming.take() {
            Some((coming, pending)) if coming == stage => pending.wait()?,
            _ => self.start(stage)?.wait()?,
        };
        self.coming = next.map(|next| Ok::<_, CommError>((next, self.start(next)?))).transpose()?;
        let (names, Self { ranks, shards, .. }) = (self.names(stage), self);
        let whole = super::together(&names, &ranks.divisions.dense.parts, |name| ranks.elements(name), &came);
        drop(came);
        let model = if record { &shards.shapes } else { &shards.plain };
        Ok(shards.precision.hold_trained(set_parameters(model.clone(), whole.into_iter().collect())))
    }
}

/// Takes parts out of a model.
struct Cut<'a> {
    path: Vec<String>,
    trainable: BTreeMap<String, bool>,
    parts: &'a Parts,
    held: BTreeMap<String, Tensor<1>>,
}

impl ModuleMapper for Cut<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.join(".");
        if self.trainable.get(&name) != Some(&true) {
            return param;
        }
        let (id, shape, device) = (param.id, param.lazy_shape(), param.lazy_device());
        if let Some(part) = self.parts.get(&name) {
            let values = param.into_value().inner();
            let half = is_bf16(&values);
            // On the host: a slice on a device may hold the whole of it.
            let values = to_host(to_f32(values))[part.clone()].to_vec();
            let held = Tensor::from_data(TensorData::new(values, [part.len()]), &device.clone().inner());
            self.held.insert(name, if half { to_bf16(held, None) } else { held });
        }
        absent(id, shape, device)
    }
}

/// On a device without gradients.
struct Plain;

impl ModuleMapper for Plain {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, shape, device) = (param.id, param.lazy_shape(), param.lazy_device().inner());
        match (param.is_initialized(), is_trainable(&param)) {
            (true, _) => param.map(|tensor| tensor.inner()),
            (false, true) => absent(id, shape, device),
            // Made for both models by whichever needs it first.
            (false, false) => Param::uninitialized(id, |_, _| param.into_value().inner(), device, false, shape),
        }
    }
}

fn absent<const D: usize>(id: ParamId, shape: Shape, device: Device) -> Param<Tensor<D>> {
    let init = |_: &Device, _: bool| -> Tensor<D> {
        // PANIC: stages read what they say that they use, and that is brought before.
        panic!("a parameter was read that is divided among ranks: stages must say what they use")
    };
    Param::uninitialized(id, init, device, true, shape)
}
