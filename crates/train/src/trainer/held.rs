//! What a rank holds in memory.

use burn::module::{ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::Trainer;
use crate::ranks::{Shards, bytes};
use crate::task::Model;

/// Bytes that a rank holds from one step to the next, and the gradients of a step beside them: what ZeRO (arXiv:1910.02054) divides. What a stage needs while
/// it runs comes on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Of parameters, or of this rank's parts of them.
    pub parameters: usize,
    /// Of the gradients of the last step, all micro-batches added up: 0 before the first.
    pub gradients: usize,
    /// Of the optimizer's state: 0 before the first step.
    pub state: usize,
}

impl Held {
    /// Of all together.
    pub fn total(&self) -> usize {
        self.parameters + self.gradients + self.state
    }
}

impl<M: Model> Trainer<'_, M> {
    /// Bytes that this rank holds. Parameters that have not been used yet count nothing: they have not been made.
    pub fn held(&self) -> Held {
        struct Visitor(usize);
        impl ModuleVisitor for Visitor {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0 += if param.is_initialized() { bytes(&param.val()) } else { 0 };
            }
        }
        let mut visitor = Visitor(self.shards.as_ref().map_or(0, Shards::bytes));
        self.model().visit(&mut visitor);
        Held { parameters: visitor.0, gradients: self.gradient_bytes, state: self.optimizer.state_bytes() }
    }
}
