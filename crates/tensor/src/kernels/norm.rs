//! LayerNorm (Ba et al., arXiv:1607.06450) and RMSNorm (Zhang and Sennrich, arXiv:1910.07467) over rows of `d` values.
//!
//! Backward recomputes a row's mean and scale: two passes over a row that is in the cache anyway, against 8 bytes a row to keep.

use rayon::prelude::*;

use super::matmul::Into;
use super::simd::{LANES, fold_lanes, sum, vectorized};
use super::{add_assign, sum_over_rows};

/// Rows that one task works on. Fixed, so that partial sums of the weights' gradients are added in one order on any number of threads.
const ROWS: usize = 128;

/// The same for rows of many heads.
const QK_ROWS: usize = 16;

/// Parameters of a norm over rows of `weight.len()` values.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    /// `[d]`
    pub weight: &'a [f32],
    /// `[d]`
    pub bias: Option<&'a [f32]>,
    /// Whether the mean is subtracted: LayerNorm.
    pub center: bool,
    /// Added to the variance, or to the mean square.
    pub eps: f32,
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` of each row; without the mean unless `center`.
pub(crate) fn norm(x: &[f32], n: Norm<'_>, out: &mut [f32]) {
    let d = n.weight.len();
    out.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).for_each(|(o, x)| rows(x, n, o));
}

/// Mean (0 unless `center`) and reciprocal standard deviation of a row.
#[inline(always)]
fn statistics(x: &[f32], center: bool, eps: f32) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = if center { sum(x) / d } else { 0.0 };
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for k in 0..LANES {
            let c = chunk[k] - mean;
            lanes[k] += c * c;
        }
    }
    let mut squares = fold_lanes(lanes, |a, b| a + b);
    for &v in rest {
        squares += (v - mean) * (v - mean);
    }
    (mean, 1.0 / (squares / d + eps).sqrt())
}

vectorized! {
    fn rows(x: &[f32], n: Norm<'_>, out: &mut [f32]) {
        let d = n.weight.len();
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let (mean, r) = statistics(x, n.center, n.eps);
            for ((o, x), w) in out.iter_mut().zip(x).zip(n.weight) {
                *o = (x - mean) * r * w;
            }
            if let Some(bias) = n.bias {
                for (o, b) in out.iter_mut().zip(bias) {
                    *o += b;
                }
            }
        }
    }
}

/// Gradients of [`norm`]: turns `g` from the gradient of the output into that of `x`, and adds it to `existing` where that is given. `dweight` and `dbias`
/// (empty: not wanted) are summed over the rows and overwritten.
pub(crate) fn norm_backward(
    x: &[f32],
    n: Norm<'_>,
    g: &mut [f32],
    existing: Option<&mut [f32]>,
    [dweight, dbias]: [&mut [f32]; 2],
) {
    let d = n.weight.len();
    let mut sums = vec![0.0; d + dbias.len()];
    let chunk = d * ROWS;
    let inputs = g.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
    match existing {
        None => sum_over_rows(inputs, &mut sums, Into::Write, |(g, x), sums| {
            rows_backward(x, n, g, &mut [], sums);
        }),
        Some(existing) => {
            sum_over_rows(inputs.zip(existing.par_chunks_mut(chunk)), &mut sums, Into::Write, |((g, x), dx), sums| {
                rows_backward(x, n, g, dx, sums);
            });
        }
    }
    if !dweight.is_empty() {
        dweight.copy_from_slice(&sums[..d]);
    }
    dbias.copy_from_slice(&sums[d..]);
}

vectorized! {
    /// `dx` is empty, or what the gradient is added to; `sums` holds those of the weight, and of the bias if it is longer.
    fn rows_backward(x: &[f32], n: Norm<'_>, g: &mut [f32], dx: &mut [f32], sums: &mut [f32]) {
        let d = n.weight.len();
        let (dw, db) = sums.split_at_mut(d);
        for (i, (x, g)) in x.chunks_exact(d).zip(g.chunks_exact_mut(d)).enumerate() {
            row_backward(x, n, g, dw, db);
            if !dx.is_empty() {
                add_assign(&mut dx[i * d..(i + 1) * d], g);
            }
        }
    }
}

/// RMSNorm of the heads of queries and keys in rows `[q | k | v]`: one gain for every query head, one for every key head.
#[derive(Clone, Copy)]
pub(crate) struct QkNorm<'a> {
    /// Of queries and of keys, both of E values.
    pub norms: [Norm<'a>; 2],
    /// Query heads, and key heads.
    pub heads: [usize; 2],
}

impl QkNorm<'_> {
    /// Where values begin, and the width of a row, with E values a head.
    fn widths(&self) -> (usize, usize) {
        let ([h, k], e) = (self.heads, self.norms[0].weight.len());
        ((h + k) * e, (h + 2 * k) * e)
    }
}

/// Rows of `[q | k | v]` with their queries and keys normalized.
pub(crate) fn qk_norm(x: &[f32], n: QkNorm<'_>, out: &mut [f32]) {
    let ([h, _], [q, k], (values, width)) = (n.heads, n.norms, n.widths());
    let split = h * q.weight.len();
    out.par_chunks_mut(width * QK_ROWS).zip(x.par_chunks(width * QK_ROWS)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            rows(&x[..split], q, &mut out[..split]);
            rows(&x[split..values], k, &mut out[split..values]);
            out[values..].copy_from_slice(&x[values..]);
        }
    });
}

/// Gradients of [`qk_norm`]: turns `g` from the gradient of the output into that of `x`, and overwrites those of the gains.
pub(crate) fn qk_norm_backward(x: &[f32], n: QkNorm<'_>, g: &mut [f32], [dq, dk]: [&mut [f32]; 2]) {
    let ([h, _], [q, k], (values, width)) = (n.heads, n.norms, n.widths());
    let e = q.weight.len();
    let split = h * e;
    let mut sums = vec![0.0; 2 * e];
    let chunks = g.par_chunks_mut(width * QK_ROWS).zip(x.par_chunks(width * QK_ROWS));
    sum_over_rows(chunks, &mut sums, Into::Write, |(g, x), sums| {
        let (q_sums, k_sums) = sums.split_at_mut(e);
        for (g, x) in g.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            rows_backward(&x[..split], q, &mut g[..split], &mut [], q_sums);
            rows_backward(&x[split..values], k, &mut g[split..values], &mut [], k_sums);
        }
    });
    dq.copy_from_slice(&sums[..e]);
    dk.copy_from_slice(&sums[e..]);
}

/// With xhat = (x - mean) r and h = dy * weight: dx = r (h - mean(h) - xhat mean(h * xhat)); the middle term falls where no mean was
/// subtracted.
#[inline(always)]
fn row_backward(x: &[f32], n: Norm<'_>, g: &mut [f32], dw: &mut [f32], db: &mut [f32]) {
    let d = x.len();
    let (mean, r) = statistics(x, n.center, n.eps);
    let (weight, g, dw) = (&n.weight[..d], &mut g[..d], &mut dw[..d]);
    if !db.is_empty() {
        add_assign(db, g);
    }
    let (mut h_sum, mut hx_sum) = ([0f32; LANES], [0f32; LANES]);
    let full = d / LANES * LANES;
    for i in (0..full).step_by(LANES) {
        let (x, weight) = (&x[i..i + LANES], &weight[i..i + LANES]);
        let (g, dw) = (&mut g[i..i + LANES], &mut dw[i..i + LANES]);
        for k in 0..LANES {
            let c = x[k] - mean;
            dw[k] += g[k] * c * r;
            g[k] *= weight[k];
            h_sum[k] += g[k];
            hx_sum[k] += g[k] * c;
        }
    }
    let (mut h_mean, mut hx_mean) = (fold_lanes(h_sum, |a, b| a + b), fold_lanes(hx_sum, |a, b| a + b));
    for i in full..d {
        let c = x[i] - mean;
        dw[i] += g[i] * c * r;
        g[i] *= weight[i];
        h_mean += g[i];
        hx_mean += g[i] * c;
    }
    h_mean = if n.center { h_mean / d as f32 } else { 0.0 };
    let k = hx_mean / d as f32 * r * r;
    for (g, x) in g.iter_mut().zip(x) {
        *g = r * (*g - h_mean - (x - mean) * k);
    }
}
