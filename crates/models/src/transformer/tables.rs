//! Tables of rows: embedding, learned positions, and the head, with the projections of a factorized embedding.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use firebox_tensor::ops::{self, PackedMatrix, Pre};

use super::model::Transformer;
use crate::stage::{Flow, Staged, TokenBatch};

/// A table of `D`-wide rows.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[rows, D]`
    pub weight: Param<Tensor<2>>,
    /// What is used in its place, see [`Transformer::with_packed`]; `[rows, D]`.
    #[module(skip)]
    pub(super) packed: Option<Arc<PackedMatrix>>,
}

impl Embedding {
    /// The rows of `ids`, `[B, T, D]`.
    pub(super) fn rows(&self, ids: Arc<[i32]>, batch: usize, tokens: usize) -> Tensor<3> {
        match &self.packed {
            Some(table) => ops::packed_rows(table, &ids, batch, tokens, &self.weight.lazy_device()),
            None => ops::embedding(self.weight.val(), ids, batch, tokens),
        }
    }

    /// As a head: the products of hidden states with every row, `[B, T, D] -> [B, T, rows]`.
    pub(super) fn products(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.packed {
            Some(table) => ops::packed_linear(hidden, Pre::Nothing, table.clone(), None, None),
            None => ops::linear_transposed(hidden, self.weight.val()),
        }
    }
}

/// Between rows of a factorized embedding and the residual stream: `x weight`
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`
    pub weight: Param<Tensor<2>>,
}

impl Projection {
    /// `[.., in] -> [.., out]`, with a weight that first goes through `way`.
    pub(super) fn forward<const D: usize>(&self, x: Tensor<D>, way: impl Fn(Tensor<2>) -> Tensor<2>) -> Tensor<D> {
        ops::fused_linear(x, Pre::Nothing, way(self.weight.val()), None, None)
    }
}

impl Transformer {
    /// The table that is the head, `[V, D]`.
    pub(super) fn head_table(&self) -> &Embedding {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The head's weight, `[V, D]`.
    pub(crate) fn head_weight(&self) -> Tensor<2> {
        self.head_table().weight.val()
    }

    /// Hidden states as wide as the head's rows.
    pub(super) fn before_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.head_proj {
            Some(projection) => projection.forward(x, |weight| weight),
            None => x,
        }
    }

    /// Hidden states after the final norm, `[B, T, D]`.
    ///
    /// # Panics
    /// If a row is longer than the context, or an id is not in the vocabulary.
    pub fn hidden(&self, batch: &TokenBatch) -> Tensor<3> {
        let flow = (0..self.n_stages() - 1).fold(Flow::Start, |flow, i| self.forward_stage(i, flow, batch, None));
        let x = flow.hidden();
        match self.parallel() {
            Some(parallel) => parallel.normed(x, &self.norm, &batch.sequence),
            None => self.norm.forward(x),
        }
    }

    /// Logits of every position, `[B, T, V]`. As in evaluation: without dropout.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), and if the model is [divided](Self::sharded) among ranks.
    pub fn logits(&self, batch: &TokenBatch) -> Tensor<3> {
        self.assert_whole();
        self.head_logits(self.hidden(batch))
    }

    /// Logits from hidden states after the final norm.
    pub(crate) fn head_logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        ops::soft_cap(self.head_table().products(self.before_head(hidden)), self.config().logit_softcap)
    }

    /// Embeds the tokens, with their positions where those are learned.
    pub(crate) fn embed_tokens(&self, inputs: Arc<[i32]>, positions: &[i32], batch: usize, tokens: usize) -> Tensor<3> {
        let x = self.embed.rows(inputs, batch, tokens);
        let x = match &self.embed_proj {
            Some(projection) => projection.forward(x, |weight| weight),
            None => x,
        };
        match &self.positions {
            Some(table) => x + table.rows(positions.into(), batch, tokens),
            None => x,
        }
    }
}
