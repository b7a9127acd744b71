//! Causal attention over packed `[q | k | v]` rows, with rotary positions inside and without a T x T matrix.
//!
//! `qkv` is `[B, T, (H + 2 K) E]`: H query heads, then K key heads, then K value heads of width E. A query attends to the keys from its
//! segment's first token to itself. A task owns one key-value head of one batch row with the H / K query heads that share it, packs
//! them into contiguous matrices (rotated and scaled on the way), and walks over blocks of [`BLOCK`] queries: scores, softmax,
//! values. What it keeps is one `[BLOCK, T]` block; backward makes the probabilities again (FlashAttention's trade, arXiv:2205.14135).
//! Bytes moved: each of q, k, v, out once, k and v again per block, mostly from the L2 cache.

use rayon::prelude::*;

use super::matmul::{Into, Mat, Threads, matmul};
use super::simd::{dot, exp_sum, max, vectorized};

/// Queries whose scores exist at once: 64 x 1024 scores in f32 are 256 KiB, within a core's L2 cache.
const BLOCK: usize = 64;

/// Shapes of one call, the reach of each query, and its rotation.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    /// B
    pub batch: usize,
    /// T
    pub tokens: usize,
    /// H
    pub heads: usize,
    /// K; divides H.
    pub kv_heads: usize,
    /// E
    pub head_dim: usize,
    /// First token (inside its row) that each query sees, `[B, T]`; never decreases along a row.
    pub starts: &'a [u32],
    /// Cosines and sines, if positions are rotary.
    pub rope: Option<Rope<'a>>,
}

/// Rotation of each token: tables `[positions, E / 2]` and the position of each token `[B, T]`.
#[derive(Clone, Copy)]
pub(crate) struct Rope<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub positions: &'a [i32],
}

impl Shape<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Softmax's scale, `E^-1/2`.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
    /// First column of head `head` of `q`, `k` or `v`.
    fn column(&self, part: Part, head: usize) -> usize {
        self.head_dim
            * match part {
                Part::Query => head,
                Part::Key => self.heads + head,
                Part::Value => self.heads + self.kv_heads + head,
            }
    }

    /// Copies one head of batch row `b` into `[T, E]`, rotated unless it is a value.
    fn pack(&self, qkv: &[f32], b: usize, part: Part, head: usize, out: &mut [f32]) {
        let (t, e, w) = (self.tokens, self.head_dim, self.width());
        let column = self.column(part, head);
        for (i, row) in out.chunks_exact_mut(e).enumerate() {
            let at = (b * t + i) * w + column;
            row.copy_from_slice(&qkv[at..at + e]);
            if let (Some(rope), false) = (self.rope, part == Part::Value) {
                rope.rotate(rope.positions[b * t + i], row, false);
            }
        }
    }

    /// Undoes the rotation of `pack` on a gradient.
    fn unrotate(&self, b: usize, grad: &mut [f32], stride: usize) {
        let (t, e) = (self.tokens, self.head_dim);
        if let Some(rope) = self.rope {
            for i in 0..t {
                rope.rotate(rope.positions[b * t + i], &mut grad[i * stride..i * stride + e], true);
            }
        }
    }

    /// The queries of block `r` and the keys that they see: rows `[r0, r1)`, columns `[c0, r1)`.
    fn block(&self, b: usize, r0: usize) -> (usize, usize) {
        let r1 = (r0 + BLOCK).min(self.tokens);
        (self.starts[b * self.tokens + r0] as usize, r1)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Query,
    Key,
    Value,
}

impl Rope<'_> {
    /// Rotates the pairs (j, j + E/2) of `row` by the angles of `position` (rotate-half, as GPT-NeoX and Llama), or back.
    fn rotate(&self, position: i32, row: &mut [f32], back: bool) {
        let half = row.len() / 2;
        let at = position as usize * half;
        let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
        let (x, y) = row.split_at_mut(half);
        let sign = if back { -1.0 } else { 1.0 };
        for j in 0..half {
            let (a, b, s) = (x[j], y[j], sign * sin[j]);
            x[j] = a * cos[j] - b * s;
            y[j] = b * cos[j] + a * s;
        }
    }
}

/// `out [B, T, H E]` from `qkv [B, T, (H + 2 K) E]`.
pub(crate) fn attention(qkv: &[f32], shape: Shape<'_>, out: &mut [f32]) {
    let Shape { batch, tokens: t, heads, kv_heads, head_dim: e, .. } = shape;
    let g = shape.group();
    if batch * t == 0 {
        return;
    }
    // Each task writes a slab of its own, [T, G E]; the slabs are interleaved into rows afterwards.
    let mut slabs = vec![0f32; batch * t * heads * e];
    slabs.par_chunks_mut(t * g * e).enumerate().for_each(|(task, slab)| {
        let (b, kv) = (task / kv_heads, task % kv_heads);
        let mut pack = vec![0f32; 3 * t * e];
        let (q, rest) = pack.split_at_mut(t * e);
        let (k, v) = rest.split_at_mut(t * e);
        shape.pack(qkv, b, Part::Key, kv, k);
        shape.pack(qkv, b, Part::Value, kv, v);
        let mut p = vec![0f32; BLOCK.min(t) * t];
        for j in 0..g {
            shape.pack(qkv, b, Part::Query, kv * g + j, q);
            for r0 in (0..t).step_by(BLOCK) {
                let (c0, r1) = shape.block(b, r0);
                let (n, c) = (r1 - r0, r1 - c0);
                let p = probabilities(&shape, b, q, k, r0, &mut p);
                let values = Mat::new(&v[c0 * e..], c, e, e);
                matmul(Mat::new(p, n, c, c), values, &mut slab[r0 * g * e + j * e..], g * e, Into::Write, Threads::One);
            }
        }
    });
    interleave(&slabs, batch, t, kv_heads, out, |kv| [(kv * g * e, g * e)]);
}

/// `dqkv` from `qkv` and the gradient of [`attention`]'s output.
pub(crate) fn attention_backward(qkv: &[f32], dout: &[f32], shape: Shape<'_>, dqkv: &mut [f32]) {
    let Shape { batch, tokens: t, heads, kv_heads, head_dim: e, .. } = shape;
    let g = shape.group();
    if batch * t == 0 {
        return;
    }
    let w = (g + 2) * e; // [dq of the group | dk | dv]
    let scale = shape.scale();
    let mut slabs = vec![0f32; batch * kv_heads * t * w];
    slabs.par_chunks_mut(t * w).enumerate().for_each(|(task, slab)| {
        let (b, kv) = (task / kv_heads, task % kv_heads);
        let mut pack = vec![0f32; 3 * t * e];
        let (q, rest) = pack.split_at_mut(t * e);
        let (k, v) = rest.split_at_mut(t * e);
        shape.pack(qkv, b, Part::Key, kv, k);
        shape.pack(qkv, b, Part::Value, kv, v);
        let mut p = vec![0f32; BLOCK.min(t) * t];
        let mut ds = vec![0f32; BLOCK.min(t) * t];
        for j in 0..g {
            let head = kv * g + j;
            shape.pack(qkv, b, Part::Query, head, q);
            for r0 in (0..t).step_by(BLOCK) {
                let (c0, r1) = shape.block(b, r0);
                let (n, c) = (r1 - r0, r1 - c0);
                let probs = probabilities(&shape, b, q, k, r0, &mut p);
                let p = Mat::new(probs, n, c, c);
                let dout = Mat::new(&dout[((b * t + r0) * heads + head) * e..], n, e, heads * e);
                // dV += P^T dO
                matmul(p.t(), dout, &mut slab[c0 * w + (g + 1) * e..], w, Into::Add, Threads::One);
                // dP = dO V^T, then dS = P (dP - rowsum(P dP)) scale
                let ds = &mut ds[..n * c];
                matmul(dout, Mat::new(&v[c0 * e..], c, e, e).t(), ds, c, Into::Write, Threads::One);
                softmax_backward(probs, ds, c, scale);
                let ds = Mat::new(ds, n, c, c);
                // dQ = dS K; dK += dS^T Q
                matmul(ds, Mat::new(&k[c0 * e..], c, e, e), &mut slab[r0 * w + j * e..], w, Into::Write, Threads::One);
                let queries = Mat::new(&q[r0 * e..], n, e, e);
                matmul(ds.t(), queries, &mut slab[c0 * w + g * e..], w, Into::Add, Threads::One);
            }
            shape.unrotate(b, &mut slab[j * e..], w);
        }
        shape.unrotate(b, &mut slab[g * e..], w);
    });
    interleave(&slabs, batch, t, kv_heads, dqkv, |kv| {
        [
            (shape.column(Part::Query, kv * g), g * e),
            (shape.column(Part::Key, kv), e),
            (shape.column(Part::Value, kv), e),
        ]
    });
}

/// Softmax of the scores of the queries from `r0` on, `[n, c]` at the start of `scores`; zero outside each query's reach.
fn probabilities<'a>(shape: &Shape<'_>, b: usize, q: &[f32], k: &[f32], r0: usize, scores: &'a mut [f32]) -> &'a [f32] {
    let (e, t) = (shape.head_dim, shape.tokens);
    let (c0, r1) = shape.block(b, r0);
    let (n, c) = (r1 - r0, r1 - c0);
    let scores = &mut scores[..n * c];
    let keys = Mat::new(&k[c0 * e..], c, e, e);
    matmul(Mat::new(&q[r0 * e..], n, e, e), keys.t(), scores, c, Into::Write, Threads::One);
    for (i, row) in scores.chunks_exact_mut(c).enumerate() {
        let first = shape.starts[b * t + r0 + i] as usize - c0;
        softmax_row(row, first, r0 + i + 1 - c0, shape.scale());
    }
    scores
}

vectorized! {
    /// Softmax over `row[first..end]`, zero elsewhere.
    fn softmax_row(row: &mut [f32], first: usize, end: usize, scale: f32) {
        let reach = &mut row[first..end];
        let top = max(reach);
        let inverse = 1.0 / exp_sum(reach, top, scale);
        for p in reach.iter_mut() {
            *p *= inverse;
        }
        row[..first].fill(0.0);
        row[end..].fill(0.0);
    }
}

vectorized! {
    /// `ds = p * (dp - rowsum(p * dp)) * scale`, in place of dp; rows of `c`.
    fn softmax_backward(p: &[f32], ds: &mut [f32], c: usize, scale: f32) {
        for (p, ds) in p.chunks_exact(c).zip(ds.chunks_exact_mut(c)) {
            let total = dot(p, ds);
            for (ds, p) in ds.iter_mut().zip(p) {
                *ds = p * (*ds - total) * scale;
            }
        }
    }
}

/// Copies the tasks' slabs `[B, K, T, width]` into rows: `place(kv)` lists (column, width) of a slab's consecutive parts.
fn interleave<const N: usize>(
    slabs: &[f32],
    batch: usize,
    t: usize,
    kv_heads: usize,
    out: &mut [f32],
    place: impl Fn(usize) -> [(usize, usize); N] + Sync,
) {
    let row = out.len() / (batch * t);
    let width = slabs.len() / (batch * kv_heads * t);
    out.par_chunks_mut(row).with_min_len(16).enumerate().for_each(|(i, out)| {
        let (b, i) = (i / t, i % t);
        for kv in 0..kv_heads {
            let mut at = ((b * kv_heads + kv) * t + i) * width;
            for (column, n) in place(kv) {
                out[column..column + n].copy_from_slice(&slabs[at..at + n]);
                at += n;
            }
        }
    });
}
