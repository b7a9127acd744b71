//! What is remembered of one parameter, and its step.

use burn::tensor::{Device, Tensor};

use super::{Algorithm, At, Geometry, Slot};
use crate::params::ParamKind;

/// Steps are counted to 2^24 = 16,777,216, the last integer before which f32, the type of saved states, has no gaps. Counting further
/// would change nothing: β^t is below f32's resolution by then for every β that is accepted.
pub const MAX_STEPS: u64 = 1 << 24;

/// What an algorithm remembers of one parameter.
#[derive(Debug, Clone)]
pub struct ParamState {
    kind: ParamKind,
    shape: Vec<usize>,
    pub(crate) slots: Vec<Slot>,
    /// Flat; one for each slot.
    pub(crate) tensors: Vec<Tensor<1>>,
    pub(crate) steps: u64,
}

impl ParamState {
    /// The state before the first step of a parameter of `shape`.
    pub fn new(algorithm: &Algorithm, kind: ParamKind, shape: &[usize], device: &Device) -> Self {
        let slots = algorithm.rule().slots(Geometry { kind, shape });
        let tensors = slots.iter().map(|slot| Tensor::zeros([slot.elements()], device)).collect();
        Self { kind, shape: shape.to_vec(), slots, tensors, steps: 0 }
    }

    /// The state of these tensors, in the order of the slots that [`new`](Self::new) makes.
    pub(crate) fn restored(
        kind: ParamKind,
        shape: Vec<usize>,
        slots: Vec<Slot>,
        tensors: Vec<Tensor<1>>,
        steps: u64,
    ) -> Self {
        Self { kind, shape, slots, tensors, steps }
    }

    /// Steps taken, at most [`MAX_STEPS`].
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names and values, flat.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor<1>)> {
        self.slots.iter().map(|slot| slot.name).zip(&self.tensors)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|slot| 4 * slot.elements()).sum()
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
        let geometry = Geometry { kind: state.kind, shape: &state.shape };
        let at = At { lr, weight_decay, grad_scale, t: state.steps, param: geometry };
        self.rule().step(&at, param, grad, &mut state.tensors)
    }
}
