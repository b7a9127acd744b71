//! Tensor parallelism: every rank has a part of each matrix (Megatron-LM, Shoeybi et al., arXiv:1909.08053), and, with sequence parallelism, a part of the tokens
//! between them (Korthikanti et al., arXiv:2205.05198).
//!
//! Attention is divided by heads, the feed-forward layer by its inner width, embedding and head by the vocabulary; norms and positions, and the biases
//! that are added to the residual stream, are on every rank. Each block sums over the ranks twice in forward and twice in backward. Every gradient is
//! complete when backward is done: what all ranks have, they have with the same gradient.
//!
//! With sequence parallelism the residual stream is `[1, part of B T, D]`: the rows of the batch one after the other, divided evenly among the ranks.

use std::ops::Range;
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use firebox_parallel::{CommError, Communicator};
use firebox_tensor::device::is_fused;
use firebox_tensor::ops::collective::{copy_columns_to, copy_to, gather_tokens, part, reduce_from, scatter_tokens};
use firebox_tensor::ops::{self, AttentionConfig, LossConfig, Pre, Sequence};

use super::adapter::of_adapter;
use super::config::{ConfigError, TransformerConfig};
use super::model::{Attention, Linear, Transformer};
use super::tables::Embedding;
use crate::placement::{Placement, Segment};
use crate::stage::TokenBatch;

/// The ranks that share a decoder's matrices, as one of them sees them.
#[derive(Clone, Debug)]
pub struct TensorParallel {
    group: Communicator,
    sequence: bool,
    /// The ranks with the same key-value head.
    same_head: Option<Communicator>,
}

/// A decoder that cannot be divided.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorParallelError {
    /// Its shape is impossible, or does not divide.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The ranks with the same key-value head could not be brought together.
    #[error("tensor parallel: {0}")]
    Comm(#[from] CommError),
    /// Ranks talk through the memory of the CPU.
    #[error("tensor parallel: expected a CPU backend (ndarray, flex), got {0}; run this device on one rank")]
    Device(String),
}

impl TransformerConfig {
    /// Checks that each of `size` ranks gets a part.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that does not divide.
    pub fn validate_parallel(&self, size: usize) -> Result<(), ConfigError> {
        let fail = |field, got: usize, expected: String| Err(ConfigError { field, got: got.to_string(), expected });
        if let Some(experts) = &self.experts {
            let expected = "must be 0 with tensor parallelism, which divides dense layers: divide the experts (ep)";
            return fail("n_experts", experts.n_experts, expected.into());
        }
        self.reduction.validate_parallel()?;
        for (field, value) in [("vocab_size", self.vocab_size), ("d_ff", self.d_ff)] {
            if value < size {
                return fail(field, value, format!("must be at least the {size} ranks of tensor parallelism"));
            }
        }
        if self.n_kv_heads < size && !(size.is_multiple_of(self.n_kv_heads) && self.n_heads.is_multiple_of(size)) {
            let expected = format!(
                "must be at least the {size} ranks of tensor parallelism, or divide them while they divide n_heads = {}",
                self.n_heads
            );
            return fail("n_kv_heads", self.n_kv_heads, expected);
        }
        Ok(())
    }

    /// How the parameter of this name (its path in the module) is divided among `size` ranks.
    pub fn placement(&self, param: &str, size: usize) -> Placement {
        let (name, field) = param.rsplit_once('.').unwrap_or((param, ""));
        if let Some((layer, field)) = of_adapter(param) {
            return self.adapter_placement(layer, field, size);
        }
        let segment = |units, width| Segment { units, width };
        let [qkv, out, input, output] = self.matrices().map(|matrix| matrix.rank == 0);
        // Biases have the columns of their weight.
        let columns = usize::from(field == "weight");
        match name {
            "embed" | "head" => Placement::split(0, [segment(self.vocab_size, 1)]),
            // Of a masked language model: one value per token.
            "task_head" if field == "bias" => Placement::split(0, [segment(self.vocab_size, 1)]),
            // Ranks have factors whole: they divide none (`validate_parallel`).
            _ if field == "factor" => Placement::replicated(),
            _ if name.ends_with("attn.qkv") && qkv => Placement::split(columns, self.stretches(0, size)),
            _ if name.ends_with("mlp.input") && input => Placement::split(columns, self.stretches(2, size)),
            _ if name.ends_with("attn.out") && columns == 1 && out => Placement::split(0, [self.queries(size)]),
            _ if name.ends_with("mlp.output") && columns == 1 && output => Placement::split(0, [segment(self.d_ff, 1)]),
            _ => Placement::replicated(),
        }
    }

    /// Query heads go where their key-value head goes, unless that one goes to several ranks.
    fn queries(&self, size: usize) -> Segment {
        if self.n_kv_heads >= size {
            Segment { units: self.n_kv_heads, width: self.n_heads / self.n_kv_heads * self.head_dim }
        } else {
            Segment { units: self.n_heads, width: self.head_dim }
        }
    }

    /// The layers that are packed in a matrix of a block (q, k, v and output of attention, then the feed-forward layer's two), as stretches of its columns.
    pub(super) fn stretches(&self, matrix: usize, size: usize) -> Vec<Segment> {
        let keys = Segment { units: self.n_kv_heads, width: self.head_dim };
        match matrix {
            0 => vec![self.queries(size), keys, keys],
            2 => vec![Segment { units: self.d_ff, width: 1 }; self.ff_in_width() / self.d_ff],
            _ => vec![Segment { units: self.d_model, width: 1 }],
        }
    }

    /// The heads of rank `rank` of `size`: queries, and keys and values.
    pub(super) fn heads(&self, rank: usize, size: usize) -> [usize; 2] {
        let rows = self.placement("attn.out.weight", size).shape(&[self.n_heads * self.head_dim, 1], rank, size)[0];
        [rows / self.head_dim, part(self.n_kv_heads, rank, size).len().max(1)]
    }
}

impl Transformer {
    /// This rank's part of the decoder that [`new`](Self::new) makes of the same seed. With `sequence`, the tokens of the residual stream are divided as
    /// well. All ranks of the group must call it, and then run the same stages on the same batches.
    ///
    /// # Errors
    /// An impossible shape, one that does not divide, a device that is no CPU backend, or a rank that fails.
    pub fn sharded(
        config: &TransformerConfig,
        seed: u64,
        device: &Device,
        group: &Communicator,
        sequence: bool,
    ) -> Result<Self, TensorParallelError> {
        config.validate()?;
        if group.size() == 1 {
            return Ok(Self::new(config, seed, device)?);
        }
        config.validate_parallel(group.size())?;
        if sequence && !config.head.has_table() {
            let expected = "must be language or masked where ranks divide the tokens between matrices: turn sequence parallelism off";
            let (field, got) = ("head", format!("{:?}", config.head));
            return Err(ConfigError { field, got, expected: expected.into() }.into());
        }
        if !is_fused(device) {
            return Err(TensorParallelError::Device(format!("{device:?}")));
        }
        let same_head = if config.n_kv_heads < group.size() {
            group.split(Some((group.rank() * config.n_kv_heads / group.size()) as u32), 0)?
        } else {
            None
        };
        let parallel = TensorParallel { group: group.clone(), sequence, same_head };
        Ok(Self::make(config, seed, device, Some(parallel), None)?)
    }
}

impl TensorParallel {
    /// The ranks that share the matrices.
    pub fn group(&self) -> &Communicator {
        &self.group
    }

    /// Whether the tokens of the residual stream are divided among the ranks.
    pub fn sequence_parallel(&self) -> bool {
        self.sequence
    }

    /// The flat full values of a parameter of which this rank has `part`, of shape `shape`, on every rank. All ranks must call it.
    ///
    /// # Errors
    /// A rank of the group that fails.
    pub fn gather(&self, placement: &Placement, part: &[f32], shape: &[usize]) -> Result<Vec<f32>, CommError> {
        if placement.is_replicated() {
            return Ok(part.to_vec());
        }
        let full = placement.full_shape(shape);
        let lens: Vec<usize> =
            (0..self.size()).map(|rank| placement.shape(&full, rank, self.size()).iter().product()).collect();
        let mut all = vec![0.0; lens.iter().sum()];
        self.group.all_gather(part, &mut all)?;
        let mut rest = all.as_slice();
        let parts: Vec<&[f32]> = lens.iter().filter_map(|len| rest.split_off(..*len)).collect();
        Ok(placement.unshard(&parts, &full))
    }

    pub(super) fn rank(&self) -> usize {
        self.group.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.group.size()
    }

    /// B and T, where the tokens of the residual stream are divided.
    fn tokens(&self, sequence: &Sequence) -> Option<[usize; 2]> {
        self.sequence.then(|| [sequence.batch(), sequence.tokens()])
    }

    /// The first two dimensions of the residual stream.
    pub(super) fn hidden_tokens(&self, sequence: &Sequence) -> [usize; 2] {
        match self.tokens(sequence) {
            Some([b, t]) => [1, part(b * t, self.rank(), self.size()).len()],
            None => [sequence.batch(), sequence.tokens()],
        }
    }

    /// The number in the whole batch of the first token of this rank's residual stream.
    pub(super) fn first_token(&self, sequence: &Sequence) -> usize {
        match self.tokens(sequence) {
            Some([b, t]) => part(b * t, self.rank(), self.size()).start,
            None => 0,
        }
    }

    /// A parameter that every rank has and applies to its own tokens.
    pub(super) fn of_tokens<const D: usize>(&self, param: Tensor<D>) -> Tensor<D> {
        if self.sequence { copy_to(param, &self.group) } else { param }
    }

    /// The embedding's rows of this rank's tokens, and which of the batch's tokens these are.
    pub(super) fn token_rows(
        &self,
        embed: &Embedding,
        vocab: usize,
        inputs: &[i32],
        sequence: &Sequence,
    ) -> (Tensor<3>, Range<usize>) {
        let (b, t) = (sequence.batch(), sequence.tokens());
        let first = part(vocab, self.rank(), self.size()).start;
        let x = ops::vocab_embedding(embed.weight.val(), first, vocab, inputs, b, t);
        if self.sequence {
            (scatter_tokens(x, &self.group), part(b * t, self.rank(), self.size()))
        } else {
            (reduce_from(x, &self.group), 0..b * t)
        }
    }

    /// `[q | k | v]` of this rank's heads, `[B, T, ..]`.
    pub(super) fn qkv(
        &self,
        attn: &Attention,
        x: Tensor<3>,
        pre: Pre,
        heads: &AttentionConfig,
        sequence: &Sequence,
    ) -> Tensor<3> {
        let shared = self.same_head.as_ref().map(|group| (group, heads.n_heads * heads.head_dim));
        let qkv = self.columns(&attn.qkv, shared, x, pre, sequence);
        match (&attn.q_norm, &attn.k_norm) {
            (Some(q), Some(k)) => {
                let gains = [q, k].map(|norm| copy_to(norm.weight.val(), &self.group));
                ops::qk_norm(qkv, gains, [heads.n_heads, heads.n_kv_heads], q.eps())
            }
            _ => qkv,
        }
    }

    /// From the residual stream into this rank's columns.
    pub(super) fn column(&self, linear: &Linear, x: Tensor<3>, pre: Pre, sequence: &Sequence) -> Tensor<3> {
        self.columns(linear, None, x, pre, sequence)
    }

    /// The same of a layer of which `shared`, the ranks with the same key-value head, have the columns from some one on.
    ///
    /// Every rank makes all of what the layer's adapter has between its two products, of its own tokens where these are divided.
    fn columns(
        &self,
        linear: &Linear,
        shared: Option<(&Communicator, usize)>,
        x: Tensor<3>,
        pre: Pre,
        sequence: &Sequence,
    ) -> Tensor<3> {
        let (weight, bias) = linear.values();
        let (weight, bias) = match shared {
            Some((group, from)) => {
                (copy_columns_to(weight, from, group), bias.map(|bias| copy_columns_to(bias, from, group)))
            }
            None => (weight, bias),
        };
        let tokens = self.tokens(sequence);
        let Some(adapter) = &linear.adapter else {
            return ops::column_linear(x, pre, weight, bias, tokens, &self.group);
        };
        let low = adapter.down(x.clone(), pre.clone(), self.of_tokens(adapter.down.val()));
        let low = match tokens {
            Some(tokens) => gather_tokens(low, tokens, &self.group),
            None => copy_to(low, &self.group),
        };
        let (mut up, mut magnitude) = (adapter.up.val(), adapter.magnitude.as_ref().map(Param::val));
        if let Some((group, from)) = shared {
            // Of the adapter, the columns of its pieces alone.
            let from = adapter.columns_before(from);
            up = copy_columns_to(up, from, group);
            magnitude = magnitude.map(|magnitude| copy_columns_to(magnitude, from, group));
        }
        match magnitude {
            None => adapter.add(ops::column_linear(x, pre, weight, bias, tokens, &self.group), low, up),
            Some(magnitude) => {
                let y = ops::column_linear(x, pre, weight, None, tokens, &self.group);
                let squares = adapter.squares(linear.plain_weight());
                adapter.resize(adapter.add(y, low, up), magnitude, squares, bias, None)
            }
        }
    }

    /// From this rank's rows back into the residual stream.
    pub(super) fn row(
        &self,
        linear: &Linear,
        x: Tensor<3>,
        pre: Pre,
        residual: Option<Tensor<3>>,
        sequence: &Sequence,
    ) -> Tensor<3> {
        let ((weight, bias), tokens) = (linear.values(), self.tokens(sequence));
        let Some(adapter) = &linear.adapter else {
            return ops::row_linear(x, pre, weight, bias, residual, tokens, &self.group);
        };
        let low = adapter.down(x.clone(), pre.clone(), adapter.down.val());
        let low = if self.sequence { scatter_tokens(low, &self.group) } else { reduce_from(low, &self.group) };
        let up = self.of_tokens(adapter.up.val());
        match &adapter.magnitude {
            None => adapter.add(ops::row_linear(x, pre, weight, bias, residual, tokens, &self.group), low, up),
            Some(magnitude) => {
                let y = ops::row_linear(x, pre, weight, None, None, tokens, &self.group);
                // Each rank has some of the rows.
                let squares = reduce_from(adapter.squares(linear.plain_weight()), &self.group);
                let (magnitude, bias) = (self.of_tokens(magnitude.val()), bias.map(|bias| self.of_tokens(bias)));
                adapter.resize(adapter.add(y, low, up), magnitude, squares, bias, residual)
            }
        }
    }

    /// The loss of the next token from the residual stream.
    pub(super) fn loss(&self, x: Tensor<3>, model: &Transformer, batch: &TokenBatch, loss: &LossConfig) -> Tensor<1> {
        let x = self.all_tokens(model.final_norm(x), &batch.sequence);
        let x = model.before_head(x);
        let [b, t, d] = x.dims();
        let (x, targets) = (x.reshape([b * t, d]), batch.targets.clone());
        self.cross_entropy(x, model.head_weight(), targets, model, batch, loss)
    }

    /// The loss of rows that all ranks have, `[N, D]`, against the whole vocabulary; this rank has its part of the head.
    pub(super) fn cross_entropy(
        &self,
        x: Tensor<2>,
        head: Tensor<2>,
        targets: Arc<[i32]>,
        model: &Transformer,
        batch: &TokenBatch,
        loss: &LossConfig,
    ) -> Tensor<1> {
        // Tokens that were divided have had their gradients summed where they were put together.
        let x = if self.sequence { x } else { copy_to(x, &self.group) };
        let TransformerConfig { logit_softcap: cap, vocab_size: vocab, .. } = *model.config();
        let scale = batch.loss_scale;
        if let Some(pairs) = batch.preference() {
            return ops::linear_preference(x, head, targets, scale, cap, pairs.clone(), Some((vocab, &self.group)));
        }
        match batch.lesson.as_ref().and_then(|lesson| lesson.taught().soft.as_ref()) {
            Some(soft) => {
                ops::linear_distillation(x, head, targets, scale, cap, loss, soft, Some((vocab, &self.group)))
            }
            None => ops::vocab_cross_entropy(x, head, targets, scale, cap, loss, vocab, &self.group),
        }
    }

    /// All tokens of which this rank may have some, `[B, T, D]`.
    pub(super) fn all_tokens(&self, x: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        match self.tokens(sequence) {
            Some(tokens) => gather_tokens(x, tokens, &self.group),
            None => x,
        }
    }
}
