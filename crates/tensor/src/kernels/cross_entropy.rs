//! Linear head and cross-entropy in one, by chunks of rows: the logits of all rows never exist at once.
//!
//! The gradients are made in the forward pass, while a chunk's logits are in the cache (as Liger Kernel does, arXiv:2410.10989, section 3.2):
//! the loss is a scalar, so its upstream gradient only scales them later.

use rayon::prelude::*;

use super::matmul::{Into, Mat, Threads, matmul};
use super::simd::{exp_sum, max, vectorized};

/// Bytes of logits that exist at once: small against a model's activations, large enough for full speed of the products.
const LOGITS_BYTES: usize = 16 << 20;

/// Gradients of the summed loss, before the upstream gradient.
pub(crate) struct Gradients {
    /// With respect to the hidden states, `[n, d]`.
    pub hidden: Vec<f32>,
    /// With respect to the head's weight, `[v, d]`.
    pub weight: Vec<f32>,
}

/// `scale * sum_i -log softmax(hidden_i weight^T)[target_i]` over the rows whose target is not negative; `hidden` is `[n, d]`, `weight`
/// `[v, d]`. The sum runs in f64.
pub(crate) fn linear_cross_entropy(
    hidden: &[f32],
    weight: &[f32],
    d: usize,
    targets: &[i32],
    scale: f32,
    mut gradients: Option<&mut Gradients>,
) -> f32 {
    let v = weight.len() / d;
    let rows = (LOGITS_BYTES / 4 / v.max(1)).clamp(1, targets.len().max(1));
    let mut logits = vec![0f32; rows * v];
    let mut total = 0f64;
    for (c, targets) in targets.chunks(rows).enumerate() {
        let n = targets.len();
        let range = c * rows * d..(c * rows + n) * d;
        let h = Mat::new(&hidden[range.clone()], n, d, d);
        let logits = &mut logits[..n * v];
        matmul(h, Mat::new(weight, v, d, d).t(), logits, v, Into::Write, Threads::All);
        let with_gradient = gradients.is_some();
        let losses: Vec<f32> = logits
            .par_chunks_exact_mut(v)
            .zip(targets.par_iter())
            .map(|(row, &target)| softmax_loss(row, target, scale, with_gradient))
            .collect();
        total += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
        if let Some(g) = gradients.as_deref_mut() {
            let dlogits = Mat::new(logits, n, v, v);
            matmul(dlogits, Mat::new(weight, v, d, d), &mut g.hidden[range], d, Into::Write, Threads::All);
            matmul(dlogits.t(), h, &mut g.weight, d, Into::Add, Threads::All);
        }
    }
    (total * f64::from(scale)) as f32
}

vectorized! {
    /// The row's loss; turns its logits into `scale * (softmax - onehot)` where that is asked for.
    fn softmax_loss(row: &mut [f32], target: i32, scale: f32, with_gradient: bool) -> f32 {
        if target < 0 {
            row.fill(0.0);
            return 0.0;
        }
        let target = target as usize;
        let at_target = row[target];
        let top = max(row);
        let sum = exp_sum(row, top, 1.0);
        if with_gradient {
            let k = scale / sum;
            for x in row.iter_mut() {
                *x *= k;
            }
            row[target] -= scale;
        }
        // A non-finite logit must reach the loss, although `exp` and `max` would hide it.
        if at_target.is_finite() && top.is_finite() { top + sum.ln() - at_target } else { f32::NAN }
    }
}
