//! What is remembered of one parameter, and its step.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use firebox_tensor::ops::{Precision, State};

use super::{Algorithm, At, Geometry, Slot};
use crate::params::ParamKind;

/// Steps are counted to 2^24 = 16,777,216, the last integer before which f32, the type of saved states, has no gaps. Counting further
/// would change nothing: β^t is below f32's resolution by then for every β that is accepted.
pub const MAX_STEPS: u64 = 1 << 24;

/// States of fewer elements stay in 32 bits, as in bitsandbytes: they weigh nothing.
const MIN_COMPACT: usize = 4096;

/// What an algorithm remembers of one parameter.
#[derive(Debug, Clone)]
pub struct ParamState {
    kind: ParamKind,
    shape: Vec<usize>,
    /// Tells parameters apart in stochastic rounding.
    salt: u32,
    pub(crate) slots: Vec<Slot>,
    /// One for each slot.
    pub(crate) states: Vec<State>,
    pub(crate) steps: u64,
}

impl ParamState {
    /// The state before the first step of a parameter of `shape`, in 32 bits.
    pub fn new(algorithm: &Algorithm, kind: ParamKind, shape: &[usize], device: &Device) -> Self {
        Self::with_precision(algorithm, kind, shape, Precision::Full, "", device)
    }

    /// The same in fewer bits, but for states of fewer than 4096 elements. `name` tells parameters apart where states are rounded stochastically.
    pub fn with_precision(
        algorithm: &Algorithm,
        kind: ParamKind,
        shape: &[usize],
        precision: Precision,
        name: &str,
        device: &Device,
    ) -> Self {
        Self::of_part(algorithm, kind, shape, &(0..shape.iter().product()), precision, name, device)
    }

    /// The state of a part of the parameter, which is all of it unless the algorithm works by elements: that of the whole, [cut](Self::part), without the whole ever
    /// being there.
    pub(crate) fn of_part(
        algorithm: &Algorithm,
        kind: ParamKind,
        shape: &[usize],
        part: &Range<usize>,
        precision: Precision,
        name: &str,
        device: &Device,
    ) -> Self {
        let mut slots = algorithm.rule().slots(Geometry { kind, shape });
        let is_part = part.len() < shape.iter().product();
        let zeros = |slot: &mut Slot| {
            let stays = slot.exact || slot.elements() < MIN_COMPACT;
            if is_part {
                slot.shape = vec![part.len()];
            }
            State::zeros(slot.elements(), if stays { Precision::Full } else { precision }, slot.signed, device)
        };
        let states = slots.iter_mut().map(zeros).collect();
        let shape = if is_part { vec![part.len()] } else { shape.to_vec() };
        // FNV-1a.
        let salt = name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        Self { kind, shape, salt, slots, states, steps: 0 }
    }

    /// Steps taken, at most [`MAX_STEPS`].
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names and values, flat, on `device`.
    pub fn tensors<'a>(&'a self, device: &'a Device) -> impl Iterator<Item = (&'static str, Tensor<1>)> + 'a {
        self.slots.iter().map(|slot| slot.name).zip(self.states.iter().map(|state| state.get(device)))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.states.iter().map(State::bytes).sum()
    }

    /// Cut to a part of the parameter, which is all of it unless the algorithm works by elements.
    pub(crate) fn part(self, part: &Range<usize>, device: &Device) -> Self {
        if part.len() == self.shape.iter().product::<usize>() {
            return self;
        }
        let slots: Vec<Slot> = self.slots.iter().map(|slot| Slot { shape: vec![part.len()], ..slot.clone() }).collect();
        let states = self.states.iter().map(|state| state.part(part, device)).collect();
        Self { shape: vec![part.len()], slots, states, ..self }
    }

    /// The number of the next step for stochastic rounding.
    pub(crate) fn seed(&self) -> u32 {
        self.salt.wrapping_add((self.steps as u32).wrapping_mul(0x9e37_79b9))
    }
}

impl Algorithm {
    /// One step of a flat parameter, in place on the CPU backends if nothing else holds the tensors. `weight_decay` takes the place of the configuration's,
    /// for parameters that do not decay; the gradient is multiplied by `grad_scale` first. Hyperparameters and `lr` are taken as valid.
    ///
    /// # Shapes
    /// - `param`, `grad`: `[n]`, on one device without autodiff, n the elements of the shape that `state` was made for
    ///
    /// # Panics
    /// If the lengths differ, or `state` was made by another algorithm.
    pub fn step(
        &self,
        lr: f64,
        weight_decay: f64,
        grad_scale: f64,
        param: Tensor<1>,
        grad: Tensor<1>,
        state: &mut ParamState,
    ) -> Tensor<1> {
        state.steps = (state.steps + 1).min(MAX_STEPS);
        let seed = state.seed();
        let geometry = Geometry { kind: state.kind, shape: &state.shape };
        let at = At { lr, weight_decay, grad_scale, t: state.steps, seed, param: geometry };
        self.rule().step(&at, param, grad, &mut state.states)
    }
}
