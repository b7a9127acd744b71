use rayon::prelude::*;

use super::{Sparsity, drop_smallest};
use crate::quantize::{BLOCK, spread_errors};
use crate::{CompressError, Hessian, Matrix};

/// What [`sparsegpt`] can be told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseGpt {
    /// What is added to the diagonal of the Hessian, as a part of its mean.
    pub damping: f64,
}

impl Default for SparseGpt {
    fn default() -> Self {
        Self { damping: 0.01 }
    }
}

/// SparseGPT (Frantar and Alistarh, arXiv:2301.00774, algorithm 1): input by input, weights go and those of the inputs behind move so that the outputs change
/// least. Which ones go is decided for 128 inputs of all outputs together, or for each group of a pattern as its turn comes. The weight comes back with
/// exact zeros.
///
/// # Errors
/// [`CompressError`]: rows that are not whole groups of a pattern, a Hessian of another width, values that are not finite; [`CompressError::Singular`] if the
/// damping is too small or there were no inputs.
pub fn sparsegpt(
    weight: &Matrix,
    hessian: &Hessian,
    sparsity: Sparsity,
    options: &SparseGpt,
) -> Result<Matrix, CompressError> {
    weight.finite("SparseGPT")?;
    weight.fits("SparseGPT", hessian.width())?;
    let (rows, n) = (weight.rows(), weight.cols());
    let pattern = sparsity.of_groups(n)?;
    let order: Vec<usize> = (0..n).collect();
    let factor = hessian.inverse_factor("SparseGPT", &order, options.damping)?;
    let score = |w: f64, input: usize| (w / factor[input * n + input]).powi(2);

    let mut left: Vec<f64> = weight.values().iter().map(|w| f64::from(*w)).collect();
    for from in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - from);
        let mut keep = vec![true; rows * width];
        if pattern.is_none() {
            let of_row = |row: &[f64]| -> Vec<f64> { (from..from + width).map(|i| score(row[i], i)).collect() };
            let scores: Vec<f64> = left.chunks_exact(n).flat_map(of_row).collect();
            drop_smallest(&scores, sparsity.count(scores.len()), &mut keep);
        }
        let mut errors = vec![0.0; rows * width];
        let of_rows = (left.par_chunks_mut(n), keep.par_chunks_mut(width), errors.par_chunks_mut(width));
        of_rows.into_par_iter().for_each(|(left, keep, errors)| {
            for i in from..from + width {
                if let Some((count, m)) = pattern.filter(|(_, m)| i.is_multiple_of(*m)) {
                    let scores: Vec<f64> = (i..i + m).map(|i| score(left[i], i)).collect();
                    drop_smallest(&scores, count, &mut keep[i - from..][..m]);
                }
                if keep[i - from] {
                    continue;
                }
                let factor = &factor[i * n..(i + 1) * n];
                let error = left[i] / factor[i];
                errors[i - from] = error;
                left[i] = 0.0;
                left[i + 1..from + width].iter_mut().zip(&factor[i + 1..]).for_each(|(w, u)| *w -= error * u);
            }
        });
        spread_errors(&mut left, &errors, &factor, [rows, n], from, width);
    }
    Ok(Matrix::of(rows, n, left.into_iter().map(|w| w as f32).collect()))
}
