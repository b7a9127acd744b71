//! LayerNorm (Ba et al., arXiv:1607.06450) and RMSNorm (Zhang and Sennrich, arXiv:1910.07467) over rows of `d` values.
//!
//! Backward recomputes a row's mean and scale: two passes over a row that is in the cache anyway, against 8 bytes a row to keep.

use rayon::prelude::*;

use super::add_assign;
use super::simd::{LANES, dot, sum, vectorized};

/// Rows that one task works on. Fixed, so that partial sums of the weights' gradients are added in one order on any number of threads.
const ROWS: usize = 128;

/// Normalizes each row: `(x - mean) / sqrt(var + eps) * weight + bias` where `bias` is given or `center` is set, without the mean
/// otherwise.
pub(crate) fn norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, center: bool, eps: f32, out: &mut [f32]) {
    let d = weight.len();
    out.par_chunks_mut(d * ROWS).zip(x.par_chunks(d * ROWS)).for_each(|(o, x)| {
        for (o, x) in o.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            row(x, weight, bias, center, eps, o);
        }
    });
}

/// Mean (0 unless `center`) and reciprocal standard deviation of a row.
#[inline(always)]
fn statistics(x: &[f32], center: bool, eps: f32, scratch: &mut [f32]) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = if center { sum(x) / d } else { 0.0 };
    for (s, x) in scratch.iter_mut().zip(x) {
        *s = x - mean;
    }
    (mean, 1.0 / (dot(scratch, scratch) / d + eps).sqrt())
}

vectorized! {
    fn row(x: &[f32], weight: &[f32], bias: Option<&[f32]>, center: bool, eps: f32, out: &mut [f32]) {
        let (_, r) = statistics(x, center, eps, out);
        for (o, w) in out.iter_mut().zip(weight) {
            *o *= r * w;
        }
        if let Some(bias) = bias {
            for (o, b) in out.iter_mut().zip(bias) {
                *o += b;
            }
        }
    }
}

/// Gradients of [`norm`]: `dx` per row; `dweight` and, where there is a bias, `dbias` summed over the rows.
#[allow(clippy::too_many_arguments)] // slices and shapes of one kernel; a struct would only rename them
pub(crate) fn norm_backward(
    x: &[f32],
    weight: &[f32],
    center: bool,
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dweight: &mut [f32],
    mut dbias: Option<&mut [f32]>,
) {
    let d = weight.len();
    let has_bias = dbias.is_some();
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(d * ROWS)
        .zip(x.par_chunks(d * ROWS))
        .zip(dy.par_chunks(d * ROWS))
        .map(|((dx, x), dy)| {
            let mut sums = vec![0.0; if has_bias { 2 * d } else { d }];
            let (dw, db) = sums.split_at_mut(d);
            for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)) {
                row_backward(x, weight, center, eps, dy, dx, dw, db);
            }
            sums
        })
        .collect();
    dweight.fill(0.0);
    if let Some(db) = dbias.as_deref_mut() {
        db.fill(0.0);
    }
    for sums in &partial {
        add_assign(dweight, &sums[..d]);
        if let Some(db) = dbias.as_deref_mut() {
            add_assign(db, &sums[d..]);
        }
    }
}

vectorized! {
    fn row_backward(
        x: &[f32],
        weight: &[f32],
        center: bool,
        eps: f32,
        dy: &[f32],
        dx: &mut [f32],
        dw: &mut [f32],
        db: &mut [f32],
    ) {
        let d = x.len();
        let (mean, r) = statistics(x, center, eps, dx);
        let (weight, dy, dx, dw) = (&weight[..d], &dy[..d], &mut dx[..d], &mut dw[..d]);
        // With xhat = (x - mean) r and g = dy * weight: dx = r (g - mean(g) - xhat mean(g * xhat)); the middle term falls where no
        // mean was subtracted. dx holds x - mean until the second loop.
        for i in 0..d {
            dw[i] += dy[i] * dx[i] * r;
        }
        if !db.is_empty() {
            add_assign(db, dy);
        }
        for i in 0..d {
            dx[i] = dy[i] * weight[i];
        }
        let g_mean = if center { sum(dx) / d as f32 } else { 0.0 };
        let mut gx = [0f32; LANES];
        let lanes = LANES;
        let full = d / lanes * lanes;
        for i in (0..full).step_by(lanes) {
            for k in 0..lanes {
                gx[k] += dx[i + k] * (x[i + k] - mean);
            }
        }
        let mut gx_mean = gx.iter().sum::<f32>();
        for i in full..d {
            gx_mean += dx[i] * (x[i] - mean);
        }
        let k = gx_mean / d as f32 * r * r;
        for i in 0..d {
            dx[i] = r * (dx[i] - g_mean - (x[i] - mean) * k);
        }
    }
}
