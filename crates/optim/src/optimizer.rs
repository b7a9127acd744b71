//! AdamW over a module: goes through the parameters by name, keeps their state, saves and restores it.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

use crate::adamw::{AdamWConfig, Moments, step_scaled};
use crate::params::{DecayGroups, DecayRule, ParamInfo, located, map_trainable};
use crate::{NamedGrads, OptimError};

/// AdamW for the parameters of a module.
///
/// State is kept by parameter name, so that it survives a restart and does not depend on burn's random parameter ids.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    decay: DecayRule,
    state: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    shape: Vec<usize>,
    moments: Moments,
}

/// One tensor of a saved optimizer state.
///
/// A parameter `P` has three: `P.m` and `P.v` in its own shape, and `P.steps` of shape `[1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// Parameter name and kind.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

impl AdamW {
    /// An optimizer that has taken no step.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] if one is out of its range.
    pub fn new(config: AdamWConfig, decay: DecayRule) -> Result<Self, OptimError> {
        config.validate()?;
        Ok(Self { config, decay, state: BTreeMap::new() })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// How the parameters of `module` are grouped, to print at the start of a run.
    ///
    /// # Errors
    /// As [`DecayGroups::of`].
    pub fn groups<M: Module>(&self, module: &M) -> Result<DecayGroups, OptimError> {
        DecayGroups::of(module, self.decay)
    }

    /// Takes one step: every trainable parameter of `module` that has a gradient is updated, and its gradient taken out of `grads`.
    ///
    /// A parameter without a gradient stays as it is, without decay and without counting the step, as in PyTorch. A gradient of zeros is
    /// another thing: its parameter decays and its moments fade. Whether gradients are finite is not looked at here:
    /// see [`NamedGrads::global_norm`].
    ///
    /// The update works in place, without a copy of the parameters, if `module` is the only holder of them: drop clones of it before.
    ///
    /// # Errors
    /// [`OptimError`] if the learning rate is out of range, or gradients do not belong to `module`. All is checked before anything changes; `module`
    /// is gone all the same, so make sure of the learning rate beforehand ([`AdamWConfig::validate_lr`]) if it comes from outside.
    pub fn step<M: Module>(&mut self, lr: f64, module: M, grads: &mut NamedGrads) -> Result<M, OptimError> {
        self.step_scaled(lr, 1.0, module, grads)
    }

    /// The same with all gradients multiplied by `grad_scale` on the way: what [`NamedGrads::clip_factor`] returns clips their norm without a
    /// pass over them.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_scaled<M: Module>(
        &mut self,
        lr: f64,
        grad_scale: f64,
        module: M,
        grads: &mut NamedGrads,
    ) -> Result<M, OptimError> {
        self.config.validate_lr(lr)?;
        let trainable = trainable(&module)?;
        check_gradients(&trainable, grads)?;
        for (name, (info, device)) in trainable {
            // Made for parameters without a gradient too, so that a state is either empty or complete.
            let zeros = || Entry { moments: Moments::zeros(info.elements(), &device), shape: info.shape.clone() };
            self.state.entry(name).or_insert_with(zeros);
        }

        let Self { config, decay, state } = self;
        let with_gradient: BTreeSet<String> = grads.iter().map(|(name, _)| name.to_owned()).collect();
        Ok(map_trainable(module, &|name| with_gradient.contains(name), &mut |name, rank, param| {
            let Some(grad) = grads.remove(name) else { return param };
            // The entry leaves the map for the time of the update, so that its tensors have one holder.
            let Some(entry) = state.remove(name) else { return param };
            let weight_decay = if decay.decays(rank) { config.weight_decay } else { 0.0 };
            let (param, moments) = step_scaled(config, lr, weight_decay, grad_scale, param, grad, entry.moments);
            state.insert(name.to_owned(), Entry { moments, ..entry });
            param
        }))
    }

    /// The state for a checkpoint, a tensor at a time, in the order of parameter names; empty before the first step.
    pub fn state(&self) -> impl Iterator<Item = StateTensor> + '_ {
        // Lazily: no more than one tensor is on the host at a time.
        self.entries().map(|(name, kind, Entry { moments, shape })| StateTensor {
            name: kind.of(name),
            shape: kind.shape(shape),
            values: match kind {
                Kind::M => read(&moments.m),
                Kind::V => read(&moments.v),
                Kind::Steps => vec![moments.steps as f32],
            },
        })
    }

    /// Names and shapes of what [`state`](Self::state) gives, in its order, without reading a value from the device.
    pub fn state_shapes(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        self.entries().map(|(name, kind, entry)| (kind.of(name), kind.shape(&entry.shape)))
    }

    fn entries(&self) -> impl Iterator<Item = (&str, Kind, &Entry)> {
        self.state.iter().flat_map(|(name, entry)| Kind::ALL.into_iter().map(move |kind| (name.as_str(), kind, entry)))
    }

    /// Bytes of state held now: 8 per element of a trainable parameter after the first step.
    pub fn state_bytes(&self) -> usize {
        self.state.values().map(|entry| 8 * entry.moments.m.shape().num_elements()).sum()
    }

    /// Replaces the state by a saved one, onto the devices of the parameters of `module`. Tensors may come in any order, from a source that can
    /// fail. The next [`step`](Self::step) is then, bit for bit, the one that would have followed when the state was saved.
    ///
    /// # Errors
    /// The source's own, or [`OptimError::State`] with everything that is missing, unused, of a wrong shape or has impossible values (not finite, a
    /// negative v, steps that are no count). The optimizer is unchanged then.
    pub fn load_state<M, E>(
        &mut self,
        module: &M,
        tensors: impl IntoIterator<Item = Result<StateTensor, E>>,
    ) -> Result<(), E>
    where
        M: Module,
        E: From<OptimError>,
    {
        let expected = trainable(module)?;
        let mut found: BTreeMap<String, Parts> = BTreeMap::new();
        let (mut missing, mut unused, mut wrong) = (vec![], vec![], vec![]);
        for tensor in tensors {
            let tensor = tensor?;
            let known = Kind::split(&tensor.name).and_then(|(param, kind)| Some((param, kind, expected.get(param)?)));
            let Some((param, kind, (info, device))) = known else {
                unused.push(tensor.name);
                continue;
            };
            if let Err(problem) = kind.check(&tensor, info) {
                wrong.push(problem);
            }
            let parts = found.entry(param.to_owned()).or_default();
            let StateTensor { values, .. } = tensor;
            match kind {
                Kind::M => parts.m = Some(on_device(values, device)),
                Kind::V => parts.v = Some(on_device(values, device)),
                Kind::Steps => parts.steps = values.first().map(|&steps| steps as u64),
            }
        }

        let mut state = BTreeMap::new();
        // Nothing at all is the state before the first step; anything else must be whole.
        let fresh = found.is_empty() && unused.is_empty();
        for (name, (info, _)) in expected.into_iter().filter(|_| !fresh) {
            let Parts { m, v, steps } = found.remove(&name).unwrap_or_default();
            let absent = [(Kind::M, m.is_none()), (Kind::V, v.is_none()), (Kind::Steps, steps.is_none())];
            missing.extend(absent.iter().filter(|(_, absent)| *absent).map(|(kind, _)| kind.of(&name)));
            if let (Some(m), Some(v), Some(steps)) = (m, v, steps) {
                state.insert(name, Entry { shape: info.shape, moments: Moments { m, v, steps } });
            }
        }
        if missing.is_empty() && unused.is_empty() && wrong.is_empty() {
            self.state = state;
            Ok(())
        } else {
            Err(OptimError::State { missing, unused, wrong }.into())
        }
    }
}

/// The trainable parameters by name, each with its device without autodiff.
fn trainable<M: Module>(module: &M) -> Result<BTreeMap<String, (ParamInfo, Device)>, OptimError> {
    let all = located(module)?.into_iter();
    Ok(all.filter(|(info, _)| info.trainable).map(|(info, device)| (info.name.clone(), (info, device))).collect())
}

fn check_gradients(trainable: &BTreeMap<String, (ParamInfo, Device)>, grads: &NamedGrads) -> Result<(), OptimError> {
    let known: BTreeSet<&str> = trainable.keys().map(String::as_str).collect();
    let names: Vec<String> =
        grads.iter().filter(|(name, _)| !known.contains(name)).map(|(name, _)| name.to_owned()).collect();
    if !names.is_empty() {
        return Err(OptimError::UnknownGradients { names });
    }
    for (name, grad) in grads.iter() {
        let (expected, got) = (trainable[name].0.elements(), grad.shape().num_elements());
        if expected != got {
            return Err(OptimError::GradientSize { name: name.to_owned(), expected, got });
        }
    }
    Ok(())
}

#[derive(Default)]
struct Parts {
    m: Option<Tensor<1>>,
    v: Option<Tensor<1>>,
    steps: Option<u64>,
}

#[derive(Clone, Copy)]
enum Kind {
    M,
    V,
    Steps,
}

impl Kind {
    fn suffix(self) -> &'static str {
        match self {
            Kind::M => "m",
            Kind::V => "v",
            Kind::Steps => "steps",
        }
    }

    const ALL: [Kind; 3] = [Kind::M, Kind::V, Kind::Steps];

    /// The name of this tensor of a parameter.
    fn of(self, param: &str) -> String {
        format!("{param}.{}", self.suffix())
    }

    /// Its shape, given the parameter's.
    fn shape(self, param: &[usize]) -> Vec<usize> {
        match self {
            Kind::M | Kind::V => param.to_vec(),
            Kind::Steps => vec![1],
        }
    }

    fn split(name: &str) -> Option<(&str, Kind)> {
        let (param, suffix) = name.rsplit_once('.')?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.suffix() == suffix)?;
        Some((param, kind))
    }

    fn check(self, tensor: &StateTensor, info: &ParamInfo) -> Result<(), String> {
        let StateTensor { name, shape, values } = tensor;
        let expected = self.shape(&info.shape);
        if *shape != expected || values.len() != expected.iter().product::<usize>() {
            return Err(format!("{name}: expected shape {expected:?}, got {shape:?} with {} values", values.len()));
        }
        let (possible, words): (fn(&f32) -> bool, _) = match self {
            Kind::M => (|x| x.is_finite(), "finite numbers"),
            Kind::V => (|x| x.is_finite() && *x >= 0.0, "finite numbers, none negative"),
            Kind::Steps => (|x| x.fract() == 0.0 && (0.0..=Moments::MAX_STEPS as f32).contains(x), "a count of steps"),
        };
        match values.iter().find(|value| !possible(value)) {
            Some(value) => Err(format!("{name}: expected {words}, got {value}")),
            None => Ok(()),
        }
    }
}

fn on_device(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let elements = values.len();
    Tensor::from_data(TensorData::new(values, [elements]), device)
}

fn read(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}
