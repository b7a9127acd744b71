//! Tables of rows: embedding, learned positions, and the head.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use firebox_tensor::ops::{self, PackedMatrix, Pre};

use super::model::Decoder;

/// A table of `D`-wide rows.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[rows, D]`
    pub weight: Param<Tensor<2>>,
    /// What is used in its place, see [`Decoder::with_packed`]; `[rows, D]`.
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

impl Decoder {
    /// The table that is the head, `[V, D]`.
    pub(super) fn head_table(&self) -> &Embedding {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The head's weight, `[V, D]`.
    pub(crate) fn head_weight(&self) -> Tensor<2> {
        self.head_table().weight.val()
    }

    /// Logits from hidden states after the final norm.
    pub(crate) fn head_logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        ops::soft_cap(self.head_table().products(hidden), self.config().logit_softcap)
    }

    /// Embeds the tokens, with their positions where those are learned.
    pub(crate) fn embed_tokens(&self, inputs: Arc<[i32]>, positions: &[i32], batch: usize, tokens: usize) -> Tensor<3> {
        let x = self.embed.rows(inputs, batch, tokens);
        match &self.positions {
            Some(table) => x + table.rows(positions.into(), batch, tokens),
            None => x,
        }
    }
}
