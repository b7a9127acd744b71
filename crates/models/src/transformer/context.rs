//! Context parallelism: every rank has some tokens of each row, and all of the model. Attention alone asks for the tokens of others.
//!
//! A rank is given its [part](TokenBatch::part) of a batch, and runs it as one rank runs a batch; its loss is that of its own targets, and the losses and gradients of
//! the ranks add up to those of the whole.

use burn::tensor::Tensor;
use firebox_parallel::Communicator;
use firebox_tensor::ops::{self, AttentionConfig, Sequence};

use super::config::{ConfigError, TransformerConfig};

/// How attention comes to the keys and values of other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContextKind {
    /// They go round the ranks, while each computes with those it has (Liu et al., arXiv:2310.01889).
    #[default]
    Ring,
    /// Each rank gets all tokens of some heads (DeepSpeed-Ulysses, Jacobs et al., arXiv:2309.14509).
    Ulysses,
}

/// The ranks that share the tokens of each row, as one of them sees them.
#[derive(Clone, Debug)]
pub struct ContextParallel {
    /// The ranks.
    pub group: Communicator,
    /// How attention goes over them.
    pub kind: ContextKind,
}

impl ContextParallel {
    pub(super) fn attention(&self, qkv: Tensor<3>, heads: &AttentionConfig, sequence: &Sequence) -> Tensor<3> {
        match self.kind {
            ContextKind::Ring => ops::ring_attention(qkv, heads, sequence, &self.group),
            ContextKind::Ulysses => ops::ulysses_attention(qkv, heads, sequence, &self.group),
        }
    }
}

impl TransformerConfig {
    /// Checks that rows of tokens can be divided among `size` ranks, where each matrix is divided among `matrices`.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that does not divide.
    pub fn validate_context(&self, kind: ContextKind, size: usize, matrices: usize) -> Result<(), ConfigError> {
        let fail = |field, got: usize, expected: String| Err(ConfigError { field, got: got.to_string(), expected });
        if size > 1 && self.context < 2 * size {
            let expected = format!("must be at least {}: two chunks for each of {size} ranks", 2 * size);
            return fail("context", self.context, expected);
        }
        let even = |rank: usize| {
            let [heads, kv_heads] = self.heads(rank, matrices);
            ops::heads_of_rank(heads, kv_heads, 0, size).is_some()
        };
        if kind == ContextKind::Ulysses && !(0..matrices).all(even) {
            let expected = format!(
                "must be at least the {size} ranks of Ulysses on each of {matrices} of tensor parallelism, or divide them while they divide n_heads = {}: \
                 use the ring, which divides no heads",
                self.n_heads
            );
            return fail("n_kv_heads", self.n_kv_heads, expected);
        }
        Ok(())
    }
}
