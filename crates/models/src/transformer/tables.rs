//! Tables of rows: embedding, learned positions, and the head, with the projections of a factorized embedding.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use firebox_tensor::ops::{self, PackedMatrix, Pre, Sequence};

use super::head::Head;
use super::model::{Norm, Transformer};
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

/// Between rows of a factorized embedding and the residual stream: `x weight + bias`
#[derive(Module, Debug)]
pub struct Projection {
    /// `[in, out]`
    pub weight: Param<Tensor<2>>,
    /// `[out]`, of an encoder's embedding.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Projection {
    /// `[.., in] -> [.., out]`, with parameters as this rank of `model` applies them to its tokens.
    pub(super) fn forward<const D: usize>(&self, x: Tensor<D>, model: &Transformer) -> Tensor<D> {
        let bias = self.bias.as_ref().map(|bias| model.of_tokens(bias.val()));
        ops::fused_linear(x, Pre::Nothing, model.of_tokens(self.weight.val()), bias, None)
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
            Some(projection) => projection.forward(x, self),
            None => x,
        }
    }

    /// A parameter that every rank has and applies to its own tokens.
    pub(super) fn of_tokens<const D: usize>(&self, param: Tensor<D>) -> Tensor<D> {
        match self.parallel() {
            Some(parallel) => parallel.of_tokens(param),
            None => param,
        }
    }

    /// What the last block gives, after the final norm where there is one.
    pub(super) fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.norm {
            Some(norm) => norm.forward_with(x, |param| self.of_tokens(param)),
            None => x,
        }
    }

    /// The residual stream after attention or the feed-forward layer, of which this is the norm.
    pub(super) fn after(&self, norm: &Norm, x: Tensor<3>) -> Tensor<3> {
        if self.config().norm_after() { norm.forward_with(x, |param| self.of_tokens(param)) } else { x }
    }

    /// After the final norm all tokens, `[B, T, D]`, of which this rank may have some.
    pub(super) fn normed(&self, x: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        self.all_tokens(self.final_norm(x), sequence)
    }

    /// All tokens, `[B, T, ..]`, of which this rank may have some.
    pub(super) fn all_tokens(&self, x: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        match self.parallel() {
            Some(parallel) => parallel.all_tokens(x, sequence),
            None => x,
        }
    }

    /// Hidden states after the final norm, where there is one, `[B, T, D]`: what an encoder says of its tokens.
    ///
    /// # Panics
    /// If a row is longer than the context, or an id is not in the vocabulary.
    pub fn hidden(&self, batch: &TokenBatch) -> Tensor<3> {
        self.normed(self.last_hidden(batch), &batch.sequence)
    }

    /// What the last block gives.
    pub(super) fn last_hidden(&self, batch: &TokenBatch) -> Tensor<3> {
        let stages = 0..self.n_stages() - 1;
        stages.fold(Flow::Start, |flow, i| self.forward_stage(i, flow, batch, None)).hidden()
    }

    /// Logits of every position, `[B, T, V]`. As in evaluation: without dropout.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), if the model is [divided](Self::sharded) among ranks, or if its head is not the language model's.
    pub fn logits(&self, batch: &TokenBatch) -> Tensor<3> {
        self.assert_whole();
        assert_eq!(
            self.config().head,
            Head::Language,
            "logits: the next token's: use row_logits, token_logits or embed"
        );
        self.head_logits(self.hidden(batch))
    }

    /// Logits from hidden states after the final norm.
    pub(crate) fn head_logits(&self, hidden: Tensor<3>) -> Tensor<3> {
        ops::soft_cap(self.head_table().products(self.before_head(hidden)), self.config().logit_softcap)
    }

    /// Embeds the tokens, with their positions where those are learned.
    pub(crate) fn embed_tokens(&self, inputs: Arc<[i32]>, positions: &[i32], batch: usize, tokens: usize) -> Tensor<3> {
        self.embedded(self.embed.rows(inputs, batch, tokens), positions, None)
    }

    /// The first stage: tokens, positions and token types as the residual stream.
    ///
    /// # Panics
    /// If the batch's sequence is causal and the model an encoder, or the reverse.
    pub(super) fn embed_batch(&self, batch: &TokenBatch) -> Tensor<3> {
        if let (Some(image), Some(patches)) = (&self.config().image, &self.patches) {
            let x = self.embed_patches(batch, image, patches);
            return self.embedded(x, batch.sequence.positions(), None);
        }
        let sequence = &batch.sequence;
        let encoder = self.config().encoder.is_some();
        assert_eq!(
            sequence.is_bidirectional(),
            encoder,
            "an encoder's rows are bidirectional sequences, a decoder's causal ones: make the batch for the model"
        );
        let (b, t) = (sequence.batch(), sequence.tokens());
        let (x, at) = match self.parallel() {
            Some(parallel) => parallel.token_rows(&self.embed, self.config().vocab_size, &batch.inputs, sequence),
            None => (self.embed.rows(batch.inputs.clone(), b, t), 0..b * t),
        };
        let types = batch.extra.as_ref().map(|extra| &extra.token_types[..]).filter(|types| !types.is_empty());
        self.embedded(x, &sequence.positions()[at.clone()], types.map(|types| &types[at]))
    }

    /// The residual stream from rows of tokens. A decoder's rows are first made as wide as the model; an encoder's after all that is added to them, and their norm (ALBERT).
    fn embedded(&self, x: Tensor<3>, positions: &[i32], types: Option<&[i32]>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let project = |x: Tensor<3>| match &self.embed_proj {
            Some(projection) => projection.forward(x, self),
            None => x,
        };
        let rows = |table: &Embedding, ids| ops::embedding(self.of_tokens(table.weight.val()), ids, batch, tokens);
        let encoder = self.config().encoder;
        let mut x = if encoder.is_none() { project(x) } else { x };
        if let Some(table) = &self.positions {
            let offset = encoder.map_or(0, |encoder| encoder.position_offset as i32);
            x = x + rows(table, positions.iter().map(|position| position + offset).collect());
        }
        if let Some(table) = &self.token_types {
            x = x + rows(table, types.map_or_else(|| vec![0; batch * tokens].into(), Into::into));
        }
        if let Some(norm) = &self.embed_norm {
            x = norm.forward_with(x, |param| self.of_tokens(param));
        }
        if encoder.is_none() { x } else { project(x) }
    }
}
