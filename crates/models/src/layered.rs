//! A model whose matrices can be compressed, stage by stage.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::stage::{Flow, Staged, TokenBatch};

/// Entries of a parameter of which each scales one input of a matrix: columns of an `[in, out]` weight, or elements of a vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scaled {
    /// The parameter's path in the module.
    pub param: String,
    /// Its columns or elements, as many as the matrix has inputs.
    pub columns: Range<usize>,
}

/// A model that tells what goes into each of its matrices, so that they can be compressed by what they do to real inputs.
///
/// Whoever drives it goes through the stages in order, and needs no more than one stage's parameters in memory.
pub trait Layered: Staged {
    /// The weights `[in, out]` of stage `i` that multiply hidden states, by path, in the order of their use. One that an earlier stage uses too is that stage's alone.
    fn matrices(&self, i: usize) -> Vec<String>;

    /// [`forward_stage`](Staged::forward_stage) in evaluation, where `observe` is handed the input `[N, in]` of each of [`matrices`](Self::matrices), in their order.
    ///
    /// # Panics
    /// As [`forward_stage`](Staged::forward_stage).
    fn forward_observed(
        &self,
        i: usize,
        flow: Flow,
        batch: &TokenBatch,
        observe: &mut dyn FnMut(&str, Tensor<2>),
    ) -> Flow;

    /// What to divide by a vector so that each of the matrix's inputs is divided by its element, and nothing else in the model changes; empty where there is no such
    /// parameter (behind a nonlinearity).
    fn scaled_before(&self, matrix: &str) -> Vec<Scaled>;
}
