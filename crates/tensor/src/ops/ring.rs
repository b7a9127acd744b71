//! Attention over rows that several ranks have divided: keys and values go round (ring attention, Liu et al., arXiv:2310.01889).
//!
//! Each rank has its tokens' queries, keys and values. At every step it has the keys and values of one rank, which it sends on to the next one while its
//! queries attend to them; the results are joined by the logarithms of their softmax's denominators. With the tokens of [`zigzag`](super::zigzag) all ranks
//! have the same to do at every step, as far as the rows are one document each.
//!
//! In backward keys and values go round again, and behind them their gradient, to which each rank adds what its queries give: first their owner, then the
//! ranks in the order of the ring. The last one sends it home.

use burn::tensor::Tensor;
use firebox_parallel::{Communicator, Pending};
use rayon::prelude::*;

use super::attention::{Attention, AttentionConfig, assert_fits, fused};
use super::collective::{assert_host, done};
use super::sequence::Sequence;
use crate::buffers::{buffer, recycle};
use crate::kernels;
use crate::kernels::attention as kernel;

/// Tags of messages.
const KV: u32 = 0;
const GRADIENT: u32 = 1;

/// [`attention`](super::attention) where the ranks of `group` have divided the rows: `qkv` and the output are those of this rank's tokens. All ranks must call it with
/// parts of the same batch.
///
/// Each rank sends the keys and values of its tokens N - 1 times in forward; in backward as often again, and their gradient N times.
///
/// # Shapes
/// - `qkv`: `[B, part of T, (H + 2 K) E]`; output `[B, part of T, H E]`
///
/// # Panics
/// As `attention`, and if `sequence` is not this rank's [part](Sequence::part), the device is no CPU backend, or a rank of the group fails.
pub fn ring_attention(
    qkv: Tensor<3>,
    config: &AttentionConfig,
    sequence: &Sequence,
    group: &Communicator,
) -> Tensor<3> {
    assert_divided(sequence, group);
    assert_host(&qkv.device());
    assert_fits(&qkv, config, sequence);
    fused(qkv, config, sequence, (group.size() > 1).then(|| group.clone()))
}

/// # Panics
/// If `sequence` is not the part of this rank of `group`.
#[track_caller]
pub(super) fn assert_divided(sequence: &Sequence, group: &Communicator) {
    let (expected, got) = ((group.rank(), group.size()), sequence.divided());
    assert_eq!(got, expected, "attention over divided rows: a sequence of this rank among those that divide them");
}

/// Where this rank stands.
struct Ring<'a> {
    group: &'a Communicator,
    rank: usize,
    size: usize,
}

impl<'a> Ring<'a> {
    fn new(group: &'a Communicator) -> Self {
        Self { group, rank: group.rank(), size: group.size() }
    }

    /// Whose keys and values are here at a step.
    fn owner(&self, step: usize) -> usize {
        (self.rank + self.size - step) % self.size
    }

    fn send(&self, values: Vec<f32>, tag: u32) {
        done(self.group.send(values, (self.rank + 1) % self.size, tag));
    }

    /// What the rank before sends.
    fn start_recv(&self, tag: u32) -> Pending<Vec<f32>> {
        done(self.group.start_recv(self.owner(1), tag))
    }

    /// Calls `work` with the keys and values of each rank in turn, of which the first are this rank's own, and its number. They move on meanwhile.
    fn round(&self, own: Vec<f32>, mut work: impl FnMut(usize, usize, &[f32])) {
        let mut here = own;
        for step in 0..self.size {
            let coming = (step + 1 < self.size).then(|| {
                let coming = self.start_recv(KV);
                let mut copy = buffer(here.len());
                kernels::copy(&mut copy, &here);
                self.send(copy, KV);
                coming
            });
            work(step, self.owner(step), &here);
            recycle(std::mem::take(&mut here));
            if let Some(coming) = coming {
                here = done(coming.wait());
            }
        }
    }
}

/// The columns from `from` on of rows of `width`.
fn columns(values: &[f32], width: usize, from: usize) -> Vec<f32> {
    let mut out = buffer(values.len() / width * (width - from));
    for (out, row) in out.chunks_exact_mut(width - from).zip(values.chunks_exact(width)) {
        out.copy_from_slice(&row[from..]);
    }
    out
}

pub(super) fn forward(op: &Attention, group: &Communicator, qkv: &[f32], out: &mut [f32], log_sums: &mut [f32]) {
    let (ring, keys) = (Ring::new(group), op.keys());
    let [queries, width] = op.widths();
    let (mut more, mut more_sums) = (buffer(out.len()), buffer(log_sums.len()));
    ring.round(columns(qkv, width, queries), |step, owner, kv| {
        let call = op.call(qkv, Some(kv), &keys[owner]);
        if step == 0 {
            kernel::attention(call, out, log_sums);
        } else {
            kernel::attention(call, &mut more, &mut more_sums);
            join(&call, [out, log_sums], [&more, &more_sums]);
        }
    });
    recycle(more);
    recycle(more_sums);
}

/// Joins the results of other keys to those that are there, which have a key for each query: its own.
fn join(call: &kernel::Call<'_>, [out, log_sums]: [&mut [f32]; 2], [more, more_sums]: [&[f32]; 2]) {
    let kernel::Call { queries: t, heads, head_dim: e, .. } = *call;
    let shares: Vec<[f32; 2]> = log_sums
        .par_iter_mut()
        .zip(more_sums)
        .map(|(sum, more)| {
            let top = sum.max(*more);
            let all = top + ((*sum - top).exp2() + (*more - top).exp2()).log2();
            let shares = [(*sum - all).exp2(), (*more - all).exp2()];
            *sum = all;
            shares
        })
        .collect();
    let rows = out.par_chunks_exact_mut(heads * e).zip(more.par_chunks_exact(heads * e));
    rows.enumerate().for_each(|(row, (out, more))| {
        let (b, i) = (row / t, row % t);
        for (head, (out, more)) in out.chunks_exact_mut(e).zip(more.chunks_exact(e)).enumerate() {
            let [here, there] = shares[(b * heads + head) * t + i];
            for (out, more) in out.iter_mut().zip(more) {
                *out = here * *out + there * more;
            }
        }
    });
}

pub(super) fn backward(
    op: &Attention,
    group: &Communicator,
    qkv: &[f32],
    [out, log_sums, dout]: [&[f32]; 3],
    dqkv: &mut [f32],
) {
    let (ring, keys) = (Ring::new(group), op.keys());
    let [queries, width] = op.widths();
    let rows = qkv.len() / width;
    let (mut dq, mut more) = (buffer(rows * queries), buffer(rows * queries));
    // The gradient of the keys and values of the next step, under way.
    let mut coming = None;
    ring.round(columns(qkv, width, queries), |step, owner, kv| {
        let call = op.call(qkv, Some(kv), &keys[owner]);
        let mut dkv = buffer(kv.len());
        let into = if step == 0 { &mut dq } else { &mut more };
        kernel::attention_backward(call, out, log_sums, dout, into, Some(&mut dkv));
        if step > 0 {
            kernels::add(&mut dq, &more);
        }
        if let Some(coming) = coming.take() {
            let before: Vec<f32> = done(Pending::wait(coming));
            kernels::add(&mut dkv, &before);
            recycle(before);
        }
        coming = Some(ring.start_recv(GRADIENT));
        ring.send(dkv, GRADIENT);
    });
    let dkv = coming.map(|coming| done(coming.wait())).unwrap_or_default();
    let parts = dq.par_chunks_exact(queries).zip(dkv.par_chunks_exact(width - queries));
    dqkv.par_chunks_exact_mut(width).zip(parts).for_each(|(row, (dq, dkv))| {
        row[..queries].copy_from_slice(dq);
        row[queries..].copy_from_slice(dkv);
    });
    [dq, more, dkv].into_iter().for_each(recycle);
}
