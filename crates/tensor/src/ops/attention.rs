//! Causal attention with grouped heads, segments and rotary positions.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Tensor, activation};

use super::compute::compute;
use super::extension::FusedOps;
use super::sequence::{RopeTable, Sequence, rotate_half};
use super::softcap::{assert_cap, soft_cap};
use super::vjp::{Kept, Tracked, dims, give_back, kept};
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels::attention as kernel;

/// Heads of one attention layer.
#[derive(Clone, Debug)]
pub struct AttentionConfig {
    /// H
    pub n_heads: usize,
    /// K; divides H. Each key-value head serves H / K query heads (Ainslie et al., arXiv:2305.13245).
    pub n_kv_heads: usize,
    /// E
    pub head_dim: usize,
    /// How many keys a query sees at most, itself included (Mistral's sliding window, arXiv:2310.06825); all before it if `None`.
    pub window: Option<usize>,
    /// Scores s become `c tanh(s / c)`, which keeps them in (-c, c) (Gemma 2, arXiv:2408.00118, section 2); 0: as they are.
    pub softcap: f64,
    /// Rotations of queries and keys, if positions are rotary.
    pub rope: Option<Arc<RopeTable>>,
}

impl AttentionConfig {
    /// Width of packed rows `[q | k | v]`: `(H + 2 K) E`.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }
}

/// `softmax(cap(q k^T / sqrt(E))) v` per head; a query sees the tokens of its own segment up to itself, at most
/// `window` of them. No T x T matrix is kept on the fused backends.
///
/// # Shapes
/// - `qkv`: `[B, T, (H + 2 K) E]`; output `[B, T, H E]`
///
/// # Panics
/// If the shapes do not fit, the window is 0, the soft-cap is negative or not finite, or a position is beyond the rotary table.
pub fn attention(qkv: Tensor<3>, config: &AttentionConfig, sequence: &Sequence) -> Tensor<3> {
    let [batch, tokens, width] = qkv.dims();
    let AttentionConfig { n_heads: h, n_kv_heads: k, head_dim: e, .. } = *config;
    assert!(k > 0 && h.is_multiple_of(k), "attention: {k} key-value heads do not divide {h} heads");
    assert!(config.window != Some(0), "attention: a query sees itself: give a window of at least 1");
    assert_cap(config.softcap);
    assert_eq!(width, config.qkv_width(), "attention: [q | k | v] of {h} + 2 * {k} heads of {e}, got width {width}");
    assert!(
        batch == sequence.batch() && tokens == sequence.tokens(),
        "attention: input [{batch}, {tokens}], sequence [{}, {}]",
        sequence.batch(),
        sequence.tokens()
    );
    if let Some(rope) = &config.rope {
        let last = sequence.positions().iter().max().copied().unwrap_or(0) as usize;
        assert!(
            last < rope.positions(),
            "attention: position {last} is beyond the rotary table of {}",
            rope.positions()
        );
        assert_eq!(rope.half() * 2, e, "attention: rotary table for heads of {}, got {e}", rope.half() * 2);
    }
    if is_fused(&qkv.device()) {
        let op = Attention { config: config.clone(), sequence: sequence.clone() };
        return Tensor::from_dispatch(Dispatch::fused_attention(qkv.into_dispatch(), op));
    }
    let device = qkv.device();
    let heads = |first: usize, n: usize| {
        let part = qkv.clone().narrow(2, first * e, n * e);
        part.reshape([batch, tokens, n, e]).swap_dims(1, 2)
    };
    let (mut q, mut key) = (heads(0, h), heads(h, k));
    let v = heads(h + k, k);
    if let Some(rope) = &config.rope {
        let rotation = sequence.rotation(rope, &device);
        q = rotate_half(q, rotation.clone());
        key = rotate_half(key, rotation);
    }
    // The H / K query heads of a group are rows of one product: [B, K, (H / K) T, E].
    let g = h / k;
    let q = q.reshape([batch, k, g * tokens, e]);
    let scores = soft_cap(q.matmul(key.swap_dims(2, 3)) * (1.0 / (e as f64).sqrt()), config.softcap);
    let scores = scores.reshape([batch, h, tokens, tokens]);
    // Large, but finite: a row of -inf would turn into NaN.
    let p = activation::softmax(
        scores.mask_fill(sequence.mask(config.window, &device).expand([batch, h, tokens, tokens]), -1e30),
        3,
    );
    let out = p.reshape([batch, k, g * tokens, tokens]).matmul(v);
    out.reshape([batch, h, tokens, e]).swap_dims(1, 2).reshape([batch, tokens, h * e])
}

/// See [`attention`].
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    config: AttentionConfig,
    sequence: Sequence,
}

impl Attention {
    fn shape(&self) -> kernel::Shape<'_> {
        let AttentionConfig { n_heads, n_kv_heads, head_dim, window, softcap, rope } = &self.config;
        kernel::Shape {
            batch: self.sequence.batch(),
            tokens: self.sequence.tokens(),
            heads: *n_heads,
            kv_heads: *n_kv_heads,
            head_dim: *head_dim,
            starts: self.sequence.starts(),
            window: window.unwrap_or(usize::MAX),
            softcap: *softcap as f32,
            rope: rope.as_deref().map(|table| {
                let (cos, sin) = table.tables();
                kernel::Rope { cos, sin, positions: self.sequence.positions() }
            }),
        }
    }
}

impl Attention {
    /// The output, and the base-2 logarithms of softmax's denominators, `[B, H, T]`.
    fn run<B: HostBackend>(&self, qkv: FloatTensor<B>) -> [FloatTensor<B>; 2] {
        let shape = self.shape();
        let qkv = B::values(qkv);
        let mut out = buffer(shape.batch * shape.tokens * shape.heads * shape.head_dim);
        let mut log_sums = buffer(shape.batch * shape.heads * shape.tokens);
        kernel::attention(qkv.as_ref(), shape, &mut out, &mut log_sums);
        [
            B::tensor(out, &[shape.batch, shape.tokens, shape.heads * shape.head_dim]),
            B::tensor(log_sums, &[shape.batch, shape.heads, shape.tokens]),
        ]
    }
}

pub(crate) fn forward<B: HostBackend>(qkv: FloatTensor<B>, op: &Attention) -> FloatTensor<B> {
    let [out, _] = op.run::<B>(qkv);
    out
}

/// Besides the input, backward reads the output (which the next operation keeps anyway) and the logarithms.
#[derive(Debug)]
struct FromOutput;

impl<B: HostBackend> Backward<B, 1> for FromOutput {
    type State = (Attention, [Kept<B>; 2], FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dout = B::values(grads.consume::<B>(&ops.node));
        let (op, saved, log_sums) = ops.state;
        let [Some(parent)] = ops.parents else { return };
        let [qkv, out] = saved.map(|saved| kept(saved.restore(checkpointer)));
        let shape = dims::<B>(&qkv);
        let [qkv, out, log_sums] = [qkv, out, log_sums].map(B::values);
        let mut dqkv = buffer(qkv.as_ref().len());
        kernel::attention_backward(qkv.as_ref(), out.as_ref(), log_sums.as_ref(), dout.as_ref(), op.shape(), &mut dqkv);
        grads.register::<B>(parent.id, B::tensor(dqkv, &shape));
    }
}

pub(crate) fn apply<B: HostBackend + FusedOps, C: CheckpointStrategy>(
    qkv: Tracked<B, C>,
    op: Attention,
) -> Tracked<B, C> {
    let input = qkv.primitive().clone();
    match FromOutput.prepare::<C>([qkv.node()]).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let [out, log_sums] = op.run::<B>(input);
            let saved = match compute().half() {
                None => [Kept::Node(prep.checkpoint(&qkv)), Kept::Tensor(out.clone())],
                Some(half) => [qkv.into_parts().0, out.clone()].map(|t| {
                    let packed = Kept::packed(half, t.clone());
                    give_back::<B>(t);
                    packed
                }),
            };
            prep.finish((op, saved, log_sums), out)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>(input, &op)),
    }
}
