//! Cuts a model's layers into stages by what they cost.

use std::ops::Range;

/// Layers that cannot be cut as asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CutError {
    /// A stage would have no layer.
    #[error("cannot cut {layers} layers into {stages} stages; each stage needs a layer, and there must be a stage")]
    Stages {
        /// The layers.
        layers: usize,
        /// The stages.
        stages: usize,
    },
    /// A cost is no number or negative.
    #[error("the cost of layer {layer} is {cost}; a cost is finite and not negative")]
    Cost {
        /// The layer.
        layer: usize,
        /// Its cost.
        cost: f64,
    },
}

/// Cuts layers into `stages` contiguous, non-empty ranges such that the dearest range is as cheap as possible.
///
/// The exact optimum by dynamic programming over all cuts, in `O(layers² stages)`. Where several cuts are as good, the later stages get
/// as few layers as they can: the first ranks of a pipeline wait less at its end.
///
/// # Errors
///
/// More stages than layers, or none; a cost that is negative, infinite or NaN.
pub fn cut(costs: &[f64], stages: usize) -> Result<Vec<Range<usize>>, CutError> {
    let layers = costs.len();
    if stages == 0 || stages > layers {
        return Err(CutError::Stages { layers, stages });
    }
    if let Some(layer) = costs.iter().position(|cost| !(cost.is_finite() && *cost >= 0.0)) {
        return Err(CutError::Cost { layer, cost: costs[layer] });
    }
    // Of the first `n` layers in `k` stages: the cost of the dearest, and where the last one begins.
    let mut best = vec![vec![(f64::INFINITY, 0); layers + 1]; stages + 1];
    best[0][0].0 = 0.0;
    for k in 1..=stages {
        for n in k..=layers {
            let mut last = 0.0;
            for begin in (k - 1..n).rev() {
                last += costs[begin];
                let dearest = f64::max(best[k - 1][begin].0, last);
                if dearest < best[k][n].0 {
                    best[k][n] = (dearest, begin);
                }
            }
        }
    }
    let mut end = layers;
    let mut ranges: Vec<Range<usize>> = (1..=stages)
        .rev()
        .map(|k| {
            let begin = best[k][end].1;
            let range = begin..end;
            end = begin;
            range
        })
        .collect();
    ranges.reverse();
    Ok(ranges)
}
