//! Mixture of experts: products of groups of rows with a matrix each, the router's weights and their gradient, and the sum of what a token's experts say.

use rayon::prelude::*;

use super::CHUNK;
use super::matmul::{Compute, Into, Mat, matmul};
use super::simd::{dot, vectorized};

/// Rows that stand one after the other and go to one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// The expert.
    pub expert: usize,
    /// How many rows.
    pub rows: usize,
}

/// `y (+)= a w(expert)` for each group of the rows of `a`, one group after the other.
pub(crate) fn products<'w>(
    compute: Compute,
    a: &[f32],
    groups: &[Group],
    w: impl Fn(usize) -> Mat<'w>,
    y: &mut [f32],
    into: Into,
) {
    let mut at = 0;
    for group in groups.iter().filter(|group| group.rows > 0) {
        let w = w(group.expert);
        let (inputs, outputs) = (w.rows(), w.cols());
        let a = Mat::new(&a[at * inputs..][..group.rows * inputs], group.rows, inputs, inputs);
        matmul(compute, a, w, &mut y[at * outputs..], outputs, into);
        at += group.rows;
    }
}

/// `dw[expert] (+)= a^T dy` over the rows of each expert's groups; `dw` is `[experts, inputs, outputs]`. Experts without rows get zeros, or keep what is there.
pub(crate) fn weight_gradients(
    compute: Compute,
    [a, dy]: [&[f32]; 2],
    groups: &[Group],
    [inputs, outputs]: [usize; 2],
    dw: &mut [f32],
    into: Into,
) {
    let size = inputs * outputs;
    let mut written = vec![into == Into::Add; dw.len() / size.max(1)];
    let mut at = 0;
    for group in groups.iter().filter(|group| group.rows > 0) {
        // What products round first is the slice.
        let a = Mat::new(&a[at * inputs..][..group.rows * inputs], group.rows, inputs, inputs);
        let dy = Mat::new(&dy[at * outputs..][..group.rows * outputs], group.rows, outputs, outputs);
        let dw = &mut dw[group.expert * size..][..size];
        let into = if std::mem::replace(&mut written[group.expert], true) { Into::Add } else { Into::Write };
        matmul(compute, a.t(), dy, dw, outputs, into);
        at += group.rows;
    }
    for (expert, _) in written.iter().enumerate().filter(|(_, written)| !**written) {
        dw[expert * size..][..size].fill(0.0);
    }
}

/// Softmax of a row, in place.
pub(crate) fn softmax(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// The weights of each token's chosen experts (`k` of them), from rows of `n` logits: their softmax over all experts, of which the chosen get
/// their share of the chosen ones' sum; a single one keeps its own.
pub(crate) fn weights(logits: &[f32], n: usize, chosen: &[u32], k: usize, out: &mut [f32]) {
    out.par_chunks_mut(k).with_min_len(64).zip(chosen.par_chunks(k)).zip(logits.par_chunks(n)).for_each(
        |((out, chosen), logits)| {
            if k == 1 {
                let mut p = logits.to_vec();
                softmax(&mut p);
                out[0] = p[chosen[0] as usize];
            } else {
                // The others cancel out.
                out.iter_mut().zip(chosen).for_each(|(out, &e)| *out = logits[e as usize]);
                softmax(out);
            }
        },
    );
}

/// The gradient of the logits from that of [`weights`], plus that of `aux Σ_e load_e / N P_e n` where `P_e` is the mean over the N tokens of the softmax.
pub(crate) fn weights_backward(
    (logits, n): (&[f32], usize),
    (chosen, k): (&[u32], usize),
    dweights: &[f32],
    (load, aux): (&[u32], f32),
    dlogits: &mut [f32],
) {
    let tokens = logits.len() / n.max(1);
    // What the balancing loss adds for each unit of an expert's probability.
    let pull: Vec<f32> = (load.iter())
        .map(|&load| (f64::from(aux) * n as f64 * f64::from(load) / (tokens as f64).powi(2)) as f32)
        .collect();
    let rows = dlogits.par_chunks_mut(n).with_min_len(64).zip(logits.par_chunks(n));
    rows.zip(chosen.par_chunks(k)).zip(dweights.par_chunks(k)).for_each(|(((dlogits, logits), chosen), dweights)| {
        let mut p = logits.to_vec();
        softmax(&mut p);
        // Both are of a softmax over all experts, but for the weights of several.
        let mut upstream = pull.clone();
        if k == 1 {
            upstream[chosen[0] as usize] += dweights[0];
        }
        let mean: f32 = p.iter().zip(&upstream).map(|(p, u)| p * u).sum();
        for ((d, p), u) in dlogits.iter_mut().zip(&p).zip(&upstream) {
            *d = p * (u - mean);
        }
        if k > 1 {
            let mut w: Vec<f32> = chosen.iter().map(|&e| logits[e as usize]).collect();
            softmax(&mut w);
            let mean: f32 = w.iter().zip(dweights).map(|(w, g)| w * g).sum();
            for ((&e, w), g) in chosen.iter().zip(&w).zip(dweights) {
                dlogits[e as usize] += w * (g - mean);
            }
        }
    });
}

vectorized! {
    fn add_scaled(y: &mut [f32], x: &[f32], scale: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += scale * x;
        }
    }
}

vectorized! {
    fn scaled(y: &mut [f32], x: &[f32], scale: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = scale * x;
        }
    }
}

/// `out[t] += Σ_j weights[t, j] y[rows[t, j]]` in the order of the choices; rows of `d` values, none where the row is negative.
pub(crate) fn combine(y: &[f32], d: usize, weights: &[f32], rows: &[i32], k: usize, out: &mut [f32]) {
    let step = (CHUNK / d.max(1)).max(1);
    out.par_chunks_mut(step * d).enumerate().for_each(|(c, out)| {
        for (t, out) in out.chunks_exact_mut(d).enumerate() {
            let at = (c * step + t) * k;
            for (&row, &weight) in rows[at..at + k].iter().zip(&weights[at..at + k]) {
                if let Ok(row) = usize::try_from(row) {
                    add_scaled(out, &y[row * d..][..d], weight);
                }
            }
        }
    });
}

/// The gradient of `y` in [`combine`]; `choices` are those of the rows.
pub(crate) fn combine_backward_rows(dy: &[f32], d: usize, weights: &[f32], choices: &[u32], k: usize, dx: &mut [f32]) {
    dx.par_chunks_mut(d).with_min_len(64).zip(choices.par_iter()).for_each(|(dx, &choice)| {
        let choice = choice as usize;
        scaled(dx, &dy[choice / k * d..][..d], weights[choice]);
    });
}

/// The gradient of the weights in [`combine`].
pub(crate) fn combine_backward_weights(dy: &[f32], d: usize, y: &[f32], rows: &[i32], k: usize, dw: &mut [f32]) {
    dw.par_iter_mut().with_min_len(64).zip(rows.par_iter()).enumerate().for_each(|(choice, (dw, &row))| {
        *dw = match usize::try_from(row) {
            Ok(row) => dot(&y[row * d..][..d], &dy[choice / k * d..][..d]),
            Err(_) => 0.0,
        };
    });
}
