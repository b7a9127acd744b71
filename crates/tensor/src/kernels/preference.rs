//! Linear head and the loss of preferred answers (Rafailov et al., arXiv:2305.18290) in one, by chunks of rows: as for the [cross-entropy](super::cross_entropy), the logits of all rows
//! never exist at once.
//!
//! The loss of a pair is a function of two sums over tokens, so that no token's gradient is known before all are read. But it is that of the token's cross-entropy times a number that its text
//! has. So the head is multiplied twice: once for the sums, and once for the gradients.

use std::ops::Range;

use rayon::prelude::*;

use super::cross_entropy::{Gradients, Loss, Shard, by_chunks, row_loss, sharded_losses};
use super::matmul::Mat;

/// What pairs of texts are compared with.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<'a> {
    /// The logarithm of each text's probability under the reference, the preferred one of each pair first.
    pub reference: &'a [f32],
    /// How much a difference to the reference counts.
    pub beta: f64,
    /// The share of pairs that are taken to be the wrong way round.
    pub label_smoothing: f64,
}

/// `-log sigmoid(x)`, of numbers of any size.
fn minus_log_sigmoid(x: f64) -> f64 {
    (-x).max(0.0) + (-x.abs()).exp().ln_1p()
}

impl Pairs<'_> {
    /// The sum of the pairs' losses, and its slope by each text's logarithm of probability.
    fn losses(&self, log_p: &[f64]) -> (f64, Vec<f64>) {
        let Self { reference, beta, label_smoothing, .. } = *self;
        let (mut total, mut slopes) = (0.0, Vec::with_capacity(log_p.len()));
        for (ours, theirs) in log_p.as_chunks::<2>().0.iter().zip(reference.as_chunks::<2>().0) {
            let gain = |i: usize| ours[i] - f64::from(theirs[i]);
            let margin = beta * (gain(0) - gain(1));
            total += (1.0 - label_smoothing) * minus_log_sigmoid(margin) + label_smoothing * minus_log_sigmoid(-margin);
            // 1 - sigmoid(x) = sigmoid(-x), which is exact for large x.
            let sigmoid = |x: f64| (-minus_log_sigmoid(x)).exp();
            let slope = beta * (label_smoothing * sigmoid(margin) - (1.0 - label_smoothing) * sigmoid(-margin));
            slopes.extend([slope, -slope]);
        }
        (total, slopes)
    }
}

/// The scaled sum of the losses of pairs of texts; `hidden` is `[n, d]`, of as many rows for each text, `weight` `[v, d]`, and rows whose target is negative count nothing.
///
/// With a shard, the gradient of `hidden` is this rank's share of it, and all ranks get the same sum.
pub(crate) fn linear_preference(
    hidden: &[f32],
    weight: Mat<'_>,
    targets: &[i32],
    loss: Loss,
    pairs: Pairs<'_>,
    shard: Option<&Shard<'_>>,
    gradients: Option<Gradients<'_>>,
) -> f32 {
    let (v, largest) = (weight.rows(), shard.map_or(weight.rows(), |shard| shard.largest));
    let per_text = targets.len() / pairs.reference.len().max(1);
    let losses = |logits: &mut [f32], targets: &[i32], of_row: &(dyn Fn(usize) -> Loss + Sync), with_gradient: bool| {
        if let Some(shard) = shard {
            return sharded_losses(logits, targets, of_row, shard, with_gradient);
        }
        let rows = logits.par_chunks_exact_mut(v).zip(targets.par_iter()).enumerate();
        rows.map(|(i, (row, &target))| row_loss(row, target, of_row(i), with_gradient)).collect()
    };
    let mut log_p = vec![0f64; pairs.reference.len()];
    by_chunks(hidden, weight, targets, loss, largest, None, |range: Range<usize>, logits, targets| {
        let of_rows = losses(logits, targets, &|_| loss, false);
        range.zip(&of_rows).for_each(|(row, &loss)| log_p[row / per_text] -= f64::from(loss));
        of_rows
    });
    let (total, slopes) = pairs.losses(&log_p);
    if let Some(gradients) = gradients {
        // The loss of a row is minus the logarithm of its probability.
        let scale = |row: usize| (-slopes[row / per_text] * f64::from(loss.scale)) as f32;
        by_chunks(hidden, weight, targets, loss, largest, Some(gradients), |range, logits, targets| {
            losses(logits, targets, &|i| Loss { scale: scale(range.start + i), ..loss }, true)
        });
    }
    (total * f64::from(loss.scale)) as f32
}
