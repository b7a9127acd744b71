//! Linear head and cross-entropy in one, by chunks of rows: the logits of all rows never exist at once.
//!
//! The gradients are made in the forward pass, while a chunk's logits are in the cache (as Liger Kernel does, arXiv:2410.10989, section 3.2):
//! the loss is a scalar, so its upstream gradient only scales them later.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{Compute, Into, Mat, matmul};
use super::simd::{exp, exp_sum, max, reduce, sum, tanh, vectorized};
use crate::buffers::{buffer, recycle};

/// Bytes of logits that exist at once, where that is enough rows.
const LOGITS_BYTES: usize = 16 << 20;

/// Fewer rows make the products wait for memory: each reads or writes the whole weight. At V = 50257 and D = 768, 80 rows run at
/// 0.8 of the speed of 256, and 512 at 1.05.
const MIN_ROWS: usize = 256;

/// Bytes that even those may take.
const MAX_LOGITS_BYTES: usize = 64 << 20;

/// What a row's loss is besides its cross-entropy.
#[derive(Clone, Copy)]
pub(crate) struct Loss {
    /// Factor of every row's loss.
    pub scale: f32,
    /// Share of the target that is spread over the vocabulary.
    pub label_smoothing: f32,
    /// Factor of the squared logarithm of softmax's denominator.
    pub z_loss: f32,
    /// In what the head is multiplied.
    pub compute: Compute,
    /// Soft-cap of the logits; 0: none.
    pub softcap: f32,
}

/// Where the gradients of the summed loss go, before the upstream gradient; overwritten. Those that nobody wants are empty, and not computed.
pub(crate) struct Gradients<'a> {
    /// With respect to the hidden states, `[n, d]`.
    pub hidden: &'a mut [f32],
    /// With respect to the head's weight, `[v, d]`.
    pub weight: &'a mut [f32],
}

/// A head whose rows are divided among ranks: this one has those from `first` on.
pub(crate) struct Shard<'a> {
    /// The vocabulary's number of this rank's first row.
    pub first: usize,
    /// V, of all ranks.
    pub vocab: usize,
    /// Rows of the rank that has most: all ranks go through the same chunks.
    pub largest: usize,
    /// Gives the values of all ranks, in their order, for this rank's.
    pub exchange: &'a dyn Fn(&[f32]) -> Vec<f32>,
}

/// The sum of the losses of the rows whose target is not negative; `hidden` is `[n, d]`, `weight` `[v, d]`. The sum runs in f64.
///
/// With a shard, the gradient of `hidden` is this rank's share of it, and all ranks get the same sum.
pub(crate) fn linear_cross_entropy(
    hidden: &[f32],
    weight: Mat<'_>,
    targets: &[i32],
    loss: Loss,
    shard: Option<&Shard<'_>>,
    gradients: Option<Gradients<'_>>,
) -> f32 {
    let (v, with_gradient) = (weight.rows(), gradients.is_some());
    let losses = |_: Range<usize>, logits: &mut [f32], targets: &[i32]| match shard {
        Some(shard) => sharded_losses(logits, targets, &|_| loss, shard, with_gradient),
        None => logits
            .par_chunks_exact_mut(v)
            .zip(targets.par_iter())
            .map(|(row, &target)| row_loss(row, target, loss, with_gradient))
            .collect(),
    };
    by_chunks(hidden, weight, targets, loss, shard.map_or(v, |shard| shard.largest), gradients, losses)
}

/// The scaled sum of what `losses` makes of each chunk of rows (their numbers, logits and targets). Where gradients are asked for, it leaves those of the scaled losses
/// in the logits' place. `largest` is the vocabulary of the rank that has most of it.
pub(super) fn by_chunks(
    hidden: &[f32],
    weight: Mat<'_>,
    targets: &[i32],
    loss: Loss,
    largest: usize,
    mut gradients: Option<Gradients<'_>>,
    mut losses: impl FnMut(Range<usize>, &mut [f32], &[i32]) -> Vec<f32>,
) -> f32 {
    let (v, d) = (weight.rows(), weight.cols());
    let fit = |bytes: usize| bytes / (4 * largest.max(1));
    let rows = fit(LOGITS_BYTES).max(fit(MAX_LOGITS_BYTES).min(MIN_ROWS)).clamp(1, targets.len().max(1));
    if let (Some(g), true) = (&mut gradients, targets.is_empty()) {
        g.weight.fill(0.0);
    }
    let mut total = 0f64;
    // From the pool and not a thread's own, so that backward has the memory.
    let mut scratch = buffer(rows * v);
    for (c, targets) in targets.chunks(rows).enumerate() {
        let n = targets.len();
        let range = c * rows * d..(c * rows + n) * d;
        let h = Mat::new(&hidden[range.clone()], n, d, d);
        let logits = &mut scratch[..n * v];
        matmul(loss.compute, h, weight.t(), logits, v, Into::Write);
        total += losses(c * rows..c * rows + n, logits, targets).iter().map(|&l| f64::from(l)).sum::<f64>();
        if let Some(g) = &mut gradients {
            let dlogits = Mat::new(logits, n, v, v);
            let into = if c == 0 { Into::Write } else { Into::Add };
            let Gradients { hidden, weight: dw } = g;
            let of_hidden = || {
                if !hidden.is_empty() {
                    matmul(loss.compute, dlogits, weight, &mut hidden[range], d, Into::Write);
                }
            };
            let of_weight = || {
                if !dw.is_empty() {
                    matmul(loss.compute, dlogits.t(), h, dw, d, into);
                }
            };
            rayon::join(of_hidden, of_weight);
        }
    }
    recycle(scratch);
    (total * f64::from(loss.scale)) as f32
}

/// The sum of the cross-entropies of rows of logits, `[n, v]`, whose target is not negative; overwrites them.
pub(crate) fn logits_cross_entropy(logits: &mut [f32], v: usize, targets: &[i32], softcap: f32) -> f64 {
    let loss = Loss { scale: 1.0, label_smoothing: 0.0, z_loss: 0.0, compute: Compute::F32, softcap };
    let losses: Vec<f32> = logits
        .par_chunks_exact_mut(v.max(1))
        .zip(targets.par_iter())
        .map(|(row, &target)| row_loss(row, target, loss, false))
        .collect();
    losses.iter().map(|&l| f64::from(l)).sum()
}

vectorized! {
    /// The row's loss, not yet scaled; turns its logits into the gradient of the scaled one where that is asked for.
    ///
    /// With l the logarithm of softmax's denominator and e the smoothing, the loss is `l - (1 - e) x_t - e mean(x) + z l^2`, and its gradient
    /// `softmax(x) (1 + 2 z l) - (1 - e) onehot - e / V`. With a cap c, x is `c tanh(logit / c)`, whose slope is `1 - (x / c)^2`.
    pub(super) fn row_loss(row: &mut [f32], target: i32, loss: Loss, with_gradient: bool) -> f32 {
        if target < 0 {
            row.fill(0.0);
            return 0.0;
        }
        let Loss { scale, label_smoothing, z_loss, softcap, .. } = loss;
        let target = target as usize;
        let capped = softcap > 0.0;
        if capped {
            row.iter_mut().for_each(|x| *x = softcap * tanh(*x / softcap));
        }
        let at_target = row[target];
        let mean = if label_smoothing > 0.0 { sum(row) / row.len() as f32 } else { 0.0 };
        let top = max(row);
        // The slope needs the capped logits once more.
        let denominator = if capped {
            reduce(row, 0.0, |sum, x| sum + exp(x - top), |a, b| a + b)
        } else {
            exp_sum(row, top)
        };
        let log = top + denominator.ln();
        if with_gradient {
            let k = scale * (1.0 + 2.0 * z_loss * log) / denominator;
            let spread = scale * label_smoothing / row.len() as f32;
            let slope = |x: f32| if capped { 1.0 - (x / softcap) * (x / softcap) } else { 1.0 };
            if capped {
                row.iter_mut().for_each(|x| *x = (exp(*x - top) * k - spread) * slope(*x));
            } else {
                row.iter_mut().for_each(|x| *x = *x * k - spread);
            }
            row[target] -= scale * (1.0 - label_smoothing) * slope(at_target);
        }
        // A non-finite logit must reach the loss, although `exp` and `max` would hide it.
        if !(at_target.is_finite() && top.is_finite()) {
            return f32::NAN;
        }
        log - at_target + label_smoothing * (at_target - mean) + z_loss * log * log
    }
}

/// What a rank knows of a row's logits: their maximum, the sum of their exponentials above it, their sum, and the target's or 0.
type Part = [f32; 4];

/// The losses of the rows of `logits`, `[n, v]` of this rank's vocabulary, as [`row_loss`] has them of the whole one. One exchange of [`Part`]s.
/// `of_row` gives that of each row of the chunk.
pub(super) fn sharded_losses(
    logits: &mut [f32],
    targets: &[i32],
    of_row: &(dyn Fn(usize) -> Loss + Sync),
    shard: &Shard<'_>,
    with_gradient: bool,
) -> Vec<f32> {
    let v = (logits.len() / targets.len().max(1)).max(1);
    // The target's place in this rank's rows, if it has it.
    let (first, vocab) = (shard.first, shard.vocab);
    let place = |target: i32| usize::try_from(target).ok()?.checked_sub(first).filter(|&at| at < v);
    let mine: Vec<Part> = logits
        .par_chunks_exact_mut(v)
        .zip(targets.par_iter())
        .enumerate()
        .map(|(i, (row, &target))| row_part(row, place(target), of_row(i)))
        .collect();
    let all = (shard.exchange)(mine.as_flattened());
    let of_ranks: Vec<&[Part]> = all.as_chunks::<4>().0.chunks_exact(targets.len()).collect();
    let losses = logits
        .par_chunks_exact_mut(v)
        .zip(targets.par_iter())
        .enumerate()
        .map(|(i, (row, &target))| {
            if target < 0 {
                row.fill(0.0);
                return 0.0;
            }
            let (loss, parts) = (of_row(i), || of_ranks.iter().map(|parts| parts[i]));
            let top = parts().fold(f32::NEG_INFINITY, |top, [max, ..]| top.max(max));
            let denominator: f32 = parts().map(|[max, sum, ..]| sum * exp(max - top)).sum();
            let sum: f32 = parts().map(|[_, _, sum, _]| sum).sum();
            let at_target: f32 = parts().map(|[.., at_target]| at_target).sum();
            let log = top + denominator.ln();
            if with_gradient {
                let whole = Whole { top, denominator, log, own_top: mine[i][0], vocab };
                row_gradient(row, place(target), loss, &whole);
            }
            // As in `row_loss`.
            if !(at_target.is_finite() && parts().all(|[max, ..]| max.is_finite())) {
                return f32::NAN;
            }
            let mean = sum / vocab as f32;
            log - at_target + loss.label_smoothing * (at_target - mean) + loss.z_loss * log * log
        })
        .collect();
    recycle(all);
    losses
}

/// What the ranks know of a row together.
struct Whole {
    top: f32,
    denominator: f32,
    log: f32,
    /// This rank's maximum.
    own_top: f32,
    vocab: usize,
}

vectorized! {
    /// Leaves in `row` the logits as they are capped, or, without a cap, their exponentials above this rank's maximum.
    fn row_part(row: &mut [f32], at: Option<usize>, loss: Loss) -> Part {
        let capped = loss.softcap > 0.0;
        if capped {
            row.iter_mut().for_each(|x| *x = loss.softcap * tanh(*x / loss.softcap));
        }
        let at_target = at.map_or(0.0, |at| row[at]);
        let total = if loss.label_smoothing > 0.0 { sum(row) } else { 0.0 };
        let top = max(row);
        let denominator = if capped {
            reduce(row, 0.0, |sum, x| sum + exp(x - top), |a, b| a + b)
        } else {
            exp_sum(row, top)
        };
        [top, denominator, total, at_target]
    }
}

vectorized! {
    /// Turns what [`row_part`] left into the gradient, see [`row_loss`].
    fn row_gradient(row: &mut [f32], at: Option<usize>, loss: Loss, whole: &Whole) {
        let Loss { scale, label_smoothing, z_loss, softcap, .. } = loss;
        let &Whole { top, denominator, log, own_top, vocab } = whole;
        let k = scale * (1.0 + 2.0 * z_loss * log) / denominator;
        let spread = scale * label_smoothing / vocab as f32;
        let slope = |x: f32| 1.0 - (x / softcap) * (x / softcap);
        let of_target = scale * (1.0 - label_smoothing);
        if softcap > 0.0 {
            let at_target = at.map_or(0.0, |at| slope(row[at]));
            row.iter_mut().for_each(|x| *x = (exp(*x - top) * k - spread) * slope(*x));
            if let Some(at) = at {
                row[at] -= of_target * at_target;
            }
        } else {
            let k = k * exp(own_top - top);
            row.iter_mut().for_each(|x| *x = *x * k - spread);
            if let Some(at) = at {
                row[at] -= of_target;
            }
        }
    }
}
