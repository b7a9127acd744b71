//! Attention, causal or within segments in both directions, with grouped heads and rotary positions.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Tensor, activation};
use firebox_parallel::Communicator;

use super::compute::compute;
use super::extension::FusedOps;
use super::ring;
use super::sequence::{Keys, RopeTable, Sequence, rotate_half};
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
/// `window` of them, or all of its segment where the sequence is [bidirectional](Sequence::bidirectional). No T x T matrix is kept on the fused backends.
///
/// # Shapes
/// - `qkv`: `[B, T, (H + 2 K) E]`; output `[B, T, H E]`
///
/// # Panics
/// If the shapes do not fit, the window is 0 or goes with a bidirectional sequence, the soft-cap is negative or not finite, or a position is beyond the rotary table.
pub fn attention(qkv: Tensor<3>, config: &AttentionConfig, sequence: &Sequence) -> Tensor<3> {
    assert_eq!(sequence.divided().1, 1, "attention: the rows are divided among ranks: use a form of it that knows");
    assert_fits(&qkv, config, sequence);
    if is_fused(&qkv.device()) {
        return fused(qkv, config, sequence, None);
    }
    composed(qkv, config, sequence)
}

/// The operation of the CPU backends; with keys and values of all ranks of `ring`.
pub(super) fn fused(
    qkv: Tensor<3>,
    config: &AttentionConfig,
    sequence: &Sequence,
    ring: Option<Communicator>,
) -> Tensor<3> {
    let op = Attention { config: config.clone(), sequence: sequence.clone(), ring };
    Tensor::from_dispatch(Dispatch::fused_attention(qkv.into_dispatch(), op))
}

/// # Panics
/// See [`attention`].
#[track_caller]
pub(super) fn assert_fits(qkv: &Tensor<3>, config: &AttentionConfig, sequence: &Sequence) {
    let [batch, tokens, width] = qkv.dims();
    let AttentionConfig { n_heads: h, n_kv_heads: k, head_dim: e, .. } = *config;
    assert!(k > 0 && h.is_multiple_of(k), "attention: {k} key-value heads do not divide {h} heads");
    assert!(config.window != Some(0), "attention: a query sees itself: give a window of at least 1");
    assert!(
        config.window.is_none() || !sequence.is_bidirectional(),
        "attention: a window is of causal rows: give none where tokens see those after them"
    );
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
}

fn composed(qkv: Tensor<3>, config: &AttentionConfig, sequence: &Sequence) -> Tensor<3> {
    let [batch, tokens, _] = qkv.dims();
    let AttentionConfig { n_heads: h, n_kv_heads: k, head_dim: e, .. } = *config;
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
    /// The ranks that have divided the rows.
    ring: Option<Communicator>,
}

impl Attention {
    /// With the keys and values of one of the ranks that have divided the rows: `kv`, or this rank's own in `qkv`.
    pub(super) fn call<'a>(&'a self, qkv: &'a [f32], kv: Option<&'a [f32]>, keys: &'a Keys) -> kernel::Call<'a> {
        let AttentionConfig { n_heads, n_kv_heads, head_dim, softcap, rope, .. } = &self.config;
        kernel::Call {
            qkv,
            kv,
            batch: self.sequence.batch(),
            queries: self.sequence.tokens(),
            keys: keys.tokens,
            heads: *n_heads,
            kv_heads: *n_kv_heads,
            head_dim: *head_dim,
            seen: &keys.seen,
            softcap: *softcap as f32,
            rope: rope.as_deref().map(|table| {
                let (cos, sin) = table.tables();
                [self.sequence.positions(), &keys.positions].map(|positions| kernel::Rope { cos, sin, positions })
            }),
        }
    }

    /// Of `qkv`'s rows: the queries' width, and that of all.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.config.n_heads * self.config.head_dim, self.config.qkv_width()]
    }

    /// The keys of each rank that has divided the rows.
    pub(super) fn keys(&self) -> Arc<[Keys]> {
        self.sequence.keys(self.config.window)
    }

    /// The output, and the base-2 logarithms of softmax's denominators, `[B, H, T]`.
    fn run<B: HostBackend>(&self, qkv: FloatTensor<B>) -> [FloatTensor<B>; 2] {
        let (batch, tokens, h, e) =
            (self.sequence.batch(), self.sequence.tokens(), self.config.n_heads, self.config.head_dim);
        let qkv = B::values(qkv);
        let mut out = buffer(batch * tokens * h * e);
        let mut log_sums = buffer(batch * h * tokens);
        match &self.ring {
            None => kernel::attention(self.call(qkv.as_ref(), None, &self.keys()[0]), &mut out, &mut log_sums),
            Some(group) => ring::forward(self, group, qkv.as_ref(), &mut out, &mut log_sums),
        }
        [B::tensor(out, &[batch, tokens, h * e]), B::tensor(log_sums, &[batch, h, tokens])]
    }

    /// The gradient of `qkv` from what [`run`](Self::run) gave and the gradient of the output.
    fn run_backward(&self, qkv: &[f32], out: &[f32], log_sums: &[f32], dout: &[f32]) -> Vec<f32> {
        let mut dqkv = buffer(qkv.len());
        match &self.ring {
            None => {
                let keys = self.keys();
                kernel::attention_backward(self.call(qkv, None, &keys[0]), out, log_sums, dout, &mut dqkv, None);
            }
            Some(group) => ring::backward(self, group, qkv, [out, log_sums, dout], &mut dqkv),
        }
        dqkv
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
        let dqkv = op.run_backward(qkv.as_ref(), out.as_ref(), log_sums.as_ref(), dout.as_ref());
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
