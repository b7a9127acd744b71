//! An algorithm over a module: goes through the parameters by name, keeps their state, saves and restores it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use firebox_tensor::ops::Precision;

use crate::algorithm::{Algorithm, Geometry, MAX_STEPS, ParamState, Slot};
use crate::clip::{Clip, Clipping};
use crate::groups::{Assigned, GroupConfig, Groups, Rules};
use crate::params::{DecayRule, New, ParamInfo, ParamKind, located, map_trainable};
use crate::parts::Parts;
use crate::{NamedGrads, OptimError};

/// An optimizer for the parameters of a module.
///
/// State is kept by parameter name, so that it survives a restart and does not depend on burn's random parameter ids.
#[derive(Debug, Clone)]
pub struct Optimizer {
    pub(crate) rules: Rules,
    precision: Precision,
    /// Whether zeros of matrices stay; see [`with_kept_zeros`](Self::with_kept_zeros).
    pub(crate) keep_zeros: bool,
    /// Which part of each parameter is this rank's, where it does not have all; see [`shard`](Self::shard).
    pub(crate) parts: Option<Parts>,
    pub(crate) state: BTreeMap<String, ParamState>,
}

/// One tensor of a saved optimizer state.
///
/// A parameter `P` has one for everything that its algorithm remembers (AdamW: `P.m` and `P.v`, in its own shape), and `P.steps` of shape `[1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// Parameter name and kind.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

impl Optimizer {
    /// An optimizer that has taken no step, with one algorithm for all parameters.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] if one is out of its range.
    pub fn new(algorithm: impl Into<Algorithm>, decay: DecayRule) -> Result<Self, OptimError> {
        Self::with_groups(algorithm, decay, vec![])
    }

    /// The same with groups that are trained in their own way.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`], [`OptimError::Pattern`].
    pub fn with_groups(
        algorithm: impl Into<Algorithm>,
        decay: DecayRule,
        groups: Vec<GroupConfig>,
    ) -> Result<Self, OptimError> {
        let rules = Rules::new(algorithm.into(), decay, groups)?;
        Ok(Self { rules, precision: Precision::Full, keep_zeros: false, parts: None, state: BTreeMap::new() })
    }

    /// The same with states held in fewer bits. A checkpoint has them in 32, so that any precision can go on from any other.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same where an element of a matrix ([`ParamKind::Matrix`]) that is exactly 0 before a step is 0 after it, whatever its gradient and its moments: what is
    /// pruned stays so. What the algorithm remembers of it goes on as if it were not; norms of gradients have it too.
    pub fn with_kept_zeros(self) -> Self {
        Self { keep_zeros: true, ..self }
    }

    /// The same with gradients clipped, by default they are not. It goes for the parameters in no group and for groups without a clipping of their own: the
    /// norm is that of all their gradients as one vector.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`].
    pub fn with_clip(self, clip: Clip) -> Result<Self, OptimError> {
        Ok(Self { rules: self.rules.with_clip(clip)?, ..self })
    }

    /// The same with learning rates multiplied by a number for each parameter of these names, besides what its group says.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] for one that is no factor.
    pub fn with_lr_scales(self, lr_scales: BTreeMap<String, f64>) -> Result<Self, OptimError> {
        Ok(Self { rules: self.rules.with_lr_scales(lr_scales)?, ..self })
    }

    /// The algorithm of the parameters that are in no group.
    pub fn algorithm(&self) -> &Algorithm {
        self.rules.algorithm()
    }

    /// How the parameters of `module` are grouped, to print at the start of a run.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`], [`OptimError::EmptyGroup`] for a group that nothing fits, [`OptimError::NotAPartition`].
    pub fn groups<M: Module>(&self, module: &M) -> Result<Groups, OptimError> {
        self.rules.partition(module)
    }

    /// Checks a learning rate for a step of every group.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] or [`OptimError::DecayTooStrong`].
    pub fn validate_lr(&self, lr: f64) -> Result<(), OptimError> {
        self.rules.validate_lr(lr)
    }

    /// Takes one step: every trainable parameter of `module` that has a gradient is updated, and its gradient taken out of `grads`.
    ///
    /// A parameter without a gradient stays as it is, without decay and without counting the step, as in PyTorch. A gradient of zeros is
    /// another thing: its parameter decays and its moments fade. Whether gradients are finite is not looked at here:
    /// see [`NamedGrads::global_norm`].
    ///
    /// Of the clippings only those are applied that need no norm over several parameters ([`Clip::Adaptive`]): see
    /// [`step_clipped`](Self::step_clipped).
    ///
    /// The update works in place, without a copy of the parameters, if `module` is the only holder of them: drop clones of it before.
    ///
    /// # Errors
    /// [`OptimError`] if the learning rate is out of range, or gradients do not belong to `module`. All is checked before anything changes; `module`
    /// is gone all the same, so make sure of the learning rate beforehand ([`validate_lr`](Self::validate_lr)) if it comes from outside.
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
        self.update(lr, grad_scale, &Clipping::none(), module, grads)
    }

    /// The same with all gradients clipped as configured. `clipping` is what [`clipping`](Self::clipping) says of the same gradients; between the two a caller
    /// can look at the norm, and drop them.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_clipped<M: Module>(
        &mut self,
        lr: f64,
        clipping: &Clipping,
        module: M,
        grads: &mut NamedGrads,
    ) -> Result<M, OptimError> {
        self.update(lr, 1.0, clipping, module, grads)
    }

    /// The norm of all gradients, and by what they are to be scaled; nothing is changed. Where `grads` are `scale` times what they should be, as with a scaled loss,
    /// that is taken out. Reads one number per gradient back from the device.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`], [`OptimError::UnknownGradients`], [`OptimError::GradientSize`].
    pub fn clipping<M: Module>(&self, module: &M, grads: &NamedGrads, scale: f64) -> Result<Clipping, OptimError> {
        Ok(self.clipping_of(&self.squares(module, grads)?, scale))
    }

    /// The squared norms on which clipping rests, of all gradients first. Ranks that have gradients of different parameters or of different
    /// [parts](Self::shard) of them add theirs up, and give the sum to [`clipping_of`](Self::clipping_of).
    ///
    /// # Errors
    /// As [`clipping`](Self::clipping).
    pub fn squares<M: Module>(&self, module: &M, grads: &NamedGrads) -> Result<Vec<f64>, OptimError> {
        let trainable = trainable(module)?;
        self.check_gradients(&trainable, grads)?;
        let mut sums = vec![0.0; 1 + self.rules.clips().len()];
        for ((name, _), squares) in grads.iter().zip(grads.squares()) {
            sums[0] += squares;
            sums[1 + self.rules.assign(&trainable[name].0).clip] += squares;
        }
        Ok(sums)
    }

    /// What [`clipping`](Self::clipping) says, from [`squares`](Self::squares).
    pub fn clipping_of(&self, squares: &[f64], scale: f64) -> Clipping {
        Clipping::new(&self.rules.clips(), &squares[1..], squares[0], scale)
    }

    fn update<M: Module>(
        &mut self,
        lr: f64,
        grad_scale: f64,
        clipping: &Clipping,
        module: M,
        grads: &mut NamedGrads,
    ) -> Result<M, OptimError> {
        self.validate_lr(lr)?;
        let trainable = trainable(&module)?;
        self.check_gradients(&trainable, grads)?;
        self.prepare(&trainable);
        let step = Step { lr, grad_scale, clipping, keep_zeros: self.keep_zeros };
        let with_gradient = trainable.into_iter().filter(|(name, _)| grads.get(name).is_some());
        let assigned: BTreeMap<String, (Assigned, usize)> =
            with_gradient.map(|(name, (info, _))| (name, (self.rules.assign(&info), rows(&info)))).collect();

        let (state, parts) = (&mut self.state, &self.parts);
        Ok(map_trainable(module, &|name| assigned.contains_key(name), &mut |name, _, param| {
            let found = grads.remove(name).zip(state.get_mut(name)).zip(assigned.get(name));
            let Some(((grad, state), &to)) = found else { return param.into() };
            let seed = Some(rounding(state));
            let values = match parts.as_ref().and_then(|parts| parts.get(name)) {
                Some(part) if part.len() < param.dims()[0] => {
                    let updated = step.take(to, param.clone().slice([part.clone()]), grad, state);
                    param.slice_assign([part.clone()], updated)
                }
                _ => step.take(to, param, grad, state),
            };
            New { values, seed }
        }))
    }

    /// Whether the next estimate of the curvature is due before step `step` (from 0): see [`curvature`](Self::curvature).
    pub fn curvature_is_due(&self, step: u64) -> bool {
        matches!(self.algorithm(), Algorithm::Sophia(config) if step.is_multiple_of(config.every))
    }

    /// Takes the gradients of the mean loss of `batch` tokens whose targets were drawn from the model's own predictions as an estimate of the curvature
    /// ([`SophiaConfig`](crate::SophiaConfig)); of other algorithms nothing changes.
    ///
    /// # Errors
    /// [`OptimError::UnknownGradients`], [`OptimError::GradientSize`].
    pub fn curvature<M: Module>(&mut self, module: &M, grads: NamedGrads, batch: u64) -> Result<(), OptimError> {
        let trainable = trainable(module)?;
        self.check_gradients(&trainable, &grads)?;
        self.prepare(&trainable);
        for (name, grad) in grads {
            let algorithm = self.rules.assign(&trainable[&name].0).algorithm;
            if let (Algorithm::Sophia(config), Some(state)) = (algorithm, self.state.get_mut(&name)) {
                let seed = !state.seed();
                config.curvature(grad, batch as f64, &mut state.states, seed);
            }
        }
        Ok(())
    }

    /// Whether [`averaged`](Self::averaged) gives other parameters than those that are trained.
    pub fn averages(&self) -> bool {
        self.rules.algorithms().any(|algorithm| matches!(algorithm, Algorithm::ScheduleFree(_)))
    }

    /// The parameters to evaluate and to keep: for [Schedule-Free](crate::ScheduleFreeConfig) the averages, which are not those that it trains. Others are left alone.
    ///
    /// # Errors
    /// [`OptimError::DuplicateName`].
    pub fn averaged<M: Module>(&self, module: M) -> Result<M, OptimError> {
        let mut configs = BTreeMap::new();
        for (info, _) in located(&module)? {
            if let Algorithm::ScheduleFree(config) = self.rules.assign(&info).algorithm {
                configs.insert(info.name, config);
            }
        }
        Ok(map_trainable(module, &|name| configs.contains_key(name), &mut |name, _, param| match configs
            .get(name)
            .zip(self.state.get(name))
        {
            Some((config, state)) if state.steps > 0 => config.averaged(param, &state.states).into(),
            _ => param.into(),
        }))
    }

    pub(crate) fn check_gradients(
        &self,
        trainable: &BTreeMap<String, (ParamInfo, Device)>,
        grads: &NamedGrads,
    ) -> Result<(), OptimError> {
        let known: BTreeSet<&str> = trainable.keys().map(String::as_str).collect();
        let names: Vec<String> =
            grads.iter().filter(|(name, _)| !known.contains(name)).map(|(name, _)| name.to_owned()).collect();
        if !names.is_empty() {
            return Err(OptimError::UnknownGradients { names });
        }
        for (name, grad) in grads.iter() {
            let expected = match &self.parts {
                None => trainable[name].0.elements(),
                Some(parts) => parts.get(name).map_or(0, Range::len),
            };
            let got = grad.shape().num_elements();
            if expected != got {
                return Err(OptimError::GradientSize { name: name.to_owned(), expected, got });
            }
        }
        Ok(())
    }

    /// Makes the state of parameters that have none.
    pub(crate) fn prepare(&mut self, trainable: &BTreeMap<String, (ParamInfo, Device)>) {
        for (name, (info, device)) in trainable {
            // Made for parameters without a gradient too, so that a state is either empty or complete.
            if self.state.contains_key(name) {
                continue;
            }
            let Assigned { algorithm, kind, .. } = self.rules.assign(info);
            let Some(part) = self.part_of(info) else { continue };
            let zeros = ParamState::of_part(&algorithm, kind, &info.shape, &part, self.precision, name, device);
            self.state.insert(name.clone(), zeros);
        }
    }

    /// What this optimizer has of a parameter.
    fn part_of(&self, info: &ParamInfo) -> Option<Range<usize>> {
        match &self.parts {
            None => Some(0..info.elements()),
            Some(parts) => parts.get(&info.name).cloned(),
        }
    }

    /// The state for a checkpoint, a tensor at a time, in the order of parameter names; empty before the first step.
    pub fn state(&self) -> impl Iterator<Item = StateTensor> + '_ {
        // Lazily: no more than one tensor is on the host at a time.
        self.state.iter().flat_map(|(param, entry)| {
            let tensors = entry.slots.iter().zip(&entry.states).map(|(slot, state)| StateTensor {
                name: state_name(param, slot.name),
                shape: slot.shape.clone(),
                values: state.read(),
            });
            let steps =
                StateTensor { name: state_name(param, STEPS), shape: vec![1], values: vec![entry.steps as f32] };
            tensors.chain([steps])
        })
    }

    /// Names and shapes of what [`state`](Self::state) gives, in its order, without reading a value from the device.
    pub fn state_shapes(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        self.state.iter().flat_map(|(param, entry)| {
            let slots = entry.slots.iter().map(|slot| (state_name(param, slot.name), slot.shape.clone()));
            slots.chain([(state_name(param, STEPS), vec![1])])
        })
    }

    /// Bytes of state held now: 0 before the first step.
    pub fn state_bytes(&self) -> usize {
        self.state.values().map(ParamState::bytes).sum()
    }

    /// Replaces the state by a saved one, onto the devices of the parameters of `module`. Tensors may come in any order, from a source that can
    /// fail. The next [`step`](Self::step) is then, bit for bit, the one that would have followed when the state was saved.
    ///
    /// # Errors
    /// The source's own, or [`OptimError::State`] with everything that is missing, unused (as in the state of another algorithm), of a wrong shape or has
    /// impossible values (not finite, negative where only squares are, steps that are no count). The optimizer is unchanged then.
    pub fn load_state<M, E>(
        &mut self,
        module: &M,
        tensors: impl IntoIterator<Item = Result<StateTensor, E>>,
    ) -> Result<(), E>
    where
        M: Module,
        E: From<OptimError>,
    {
        // The state of what this optimizer has of a parameter, made with its first tensor.
        struct Waiting {
            info: ParamInfo,
            device: Device,
            slots: Vec<Slot>,
            missing: Vec<&'static str>,
            state: Option<ParamState>,
        }
        let wait = |(name, (info, device)): (String, (ParamInfo, Device))| {
            let to = self.rules.assign(&info);
            let slots = to.algorithm.rule().slots(Geometry { kind: to.kind, shape: &info.shape });
            let missing = slots.iter().map(|slot| slot.name).chain([STEPS]).collect();
            (name, Waiting { info, device, slots, missing, state: None })
        };
        let mut waiting: BTreeMap<String, Waiting> = trainable(module)?.into_iter().map(wait).collect();
        let (mut found, mut missing, mut unused, mut wrong) = (false, vec![], vec![], vec![]);
        for tensor in tensors {
            let tensor = tensor?;
            let known = tensor.name.rsplit_once('.').and_then(|(param, kind)| Some((waiting.get_mut(param)?, kind)));
            let expected = known.and_then(|(waiting, kind)| {
                let slot = waiting.slots.iter().position(|slot| slot.name == kind);
                (slot.is_some() || kind == STEPS).then_some((waiting, slot, kind))
            });
            let Some((Waiting { info, device, slots, missing, state }, slot, kind)) = expected else {
                unused.push(tensor.name);
                continue;
            };
            missing.retain(|name| *name != kind);
            found = true;
            let steps = Slot::unsigned(STEPS, &[1]);
            if let Some(problem) = problem(&tensor, slot.map_or(&steps, |i| &slots[i])) {
                wrong.push(problem);
                continue;
            }
            let Some(part) = self.part_of(info) else { continue };
            let Assigned { algorithm, kind, .. } = self.rules.assign(info);
            let state = state.get_or_insert_with(|| {
                ParamState::of_part(&algorithm, kind, &info.shape, &part, self.precision, &info.name, device)
            });
            match slot {
                None => state.steps = tensor.values[0] as u64,
                Some(i) if part.len() < info.elements() => state.states[i].restore(&tensor.values[part], device),
                Some(i) => state.states[i].restore(&tensor.values, device),
            }
        }

        // Nothing at all is the state before the first step; anything else must be whole.
        let fresh = !found && unused.is_empty();
        let mut state = BTreeMap::new();
        for (name, waiting) in waiting.into_iter().filter(|_| !fresh) {
            missing.extend(waiting.missing.iter().map(|kind| state_name(&name, kind)));
            state.extend(waiting.state.map(|state| (name, state)));
        }
        if missing.is_empty() && unused.is_empty() && wrong.is_empty() {
            self.state = state;
            Ok(())
        } else {
            Err(OptimError::State { missing, unused, wrong }.into())
        }
    }
}

/// What a step is for every parameter.
pub(crate) struct Step<'a> {
    pub lr: f64,
    pub grad_scale: f64,
    pub clipping: &'a Clipping,
    pub keep_zeros: bool,
}

impl Step<'_> {
    /// Of one parameter of so many rows, or of a part of it; flat.
    pub fn take(
        &self,
        (to, rows): (Assigned, usize),
        param: Tensor<1>,
        grad: Tensor<1>,
        state: &mut ParamState,
    ) -> Tensor<1> {
        let grad = match to.adaptive {
            Some(adaptive) => adaptive.clip(grad, self.clipping.scale, &param, rows),
            None => grad,
        };
        let scale = self.grad_scale * self.clipping.factor(to.clip);
        let zeros = (self.keep_zeros && to.kind == ParamKind::Matrix).then(|| param.clone().equal_elem(0.0));
        let updated = to.algorithm.step(self.lr * to.lr_scale, to.weight_decay, scale, param, grad, state);
        match zeros {
            Some(zeros) => updated.mask_fill(zeros, 0.0),
            None => updated,
        }
    }
}

/// Of whose norms adaptive clipping speaks.
pub(crate) fn rows(info: &ParamInfo) -> usize {
    if info.shape.len() < 2 { 1 } else { info.shape[0].max(1) }
}

/// By what a parameter in bfloat16 is rounded after the next step: another seed than that of the state.
pub(crate) fn rounding(state: &ParamState) -> u32 {
    state.seed().rotate_left(16)
}

/// The name of the count of steps in a saved state.
pub(crate) const STEPS: &str = "steps";

pub(crate) fn state_name(param: &str, kind: &str) -> String {
    format!("{param}.{kind}")
}

/// The trainable parameters by name, each with its device without autodiff.
pub(crate) fn trainable<M: Module>(module: &M) -> Result<BTreeMap<String, (ParamInfo, Device)>, OptimError> {
    let all = located(module)?.into_iter();
    Ok(all.filter(|(info, _)| info.trainable).map(|(info, device)| (info.name.clone(), (info, device))).collect())
}

/// What is wrong with a saved tensor.
pub(crate) fn problem(tensor: &StateTensor, slot: &Slot) -> Option<String> {
    let StateTensor { name, shape, values } = tensor;
    if *shape != slot.shape || values.len() != slot.elements() {
        return Some(format!("{name}: expected shape {:?}, got {shape:?} with {} values", slot.shape, values.len()));
    }
    let (possible, words): (fn(&f32) -> bool, _) = match (slot.name, slot.signed) {
        (STEPS, _) => (|x| x.fract() == 0.0 && (0.0..=MAX_STEPS as f32).contains(x), "a count of steps"),
        (_, true) => (|x| x.is_finite(), "finite numbers"),
        (_, false) => (|x| x.is_finite() && *x >= 0.0, "finite numbers, none negative"),
    };
    let value = values.iter().find(|value| !possible(value))?;
    Some(format!("{name}: expected {words}, got {value}"))
}
