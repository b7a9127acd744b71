//! Two thin matrices whose product is close to a given one.

use firebox_compress::lowrank::{LowRank, truncate, truncate_for};
use firebox_compress::{Hessian, Matrix};
use rayon::prelude::*;

use crate::TrainError;

/// Added to the second moments of inputs, to their mean: as GPTQ's.
const DAMPING: f64 = 0.01;

/// `a b` of `[rows, inner]` and `[inner, columns]`.
pub(super) fn product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
    let mut out = vec![0f32; rows * columns];
    if columns == 0 {
        return out;
    }
    out.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
        let mut sum = vec![0f64; columns];
        for (x, b) in a[row * inner..(row + 1) * inner].iter().zip(b.chunks_exact(columns)) {
            sum.iter_mut().zip(b).for_each(|(sum, y)| *sum += f64::from(*x) * f64::from(*y));
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
    });
    out
}

pub(super) fn transposed(a: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| a[i % rows * columns + i / rows]).collect()
}

/// `A [inputs, rank]` and `B [rank, outputs]` with `A B` as close as can be to `weight`, or, on inputs of these second moments, what it makes of them to what the weight makes.
///
/// # Errors
/// Values that are not finite.
pub(super) fn low_rank(
    weight: &[f32],
    [inputs, outputs]: [usize; 2],
    rank: usize,
    hessian: Option<&Hessian>,
) -> Result<[Vec<f32>; 2], TrainError> {
    // There outputs are rows.
    let weight = Matrix::new(outputs, inputs, transposed(weight, inputs, outputs))?;
    let LowRank { a, b } = match hessian {
        Some(hessian) => truncate_for(&weight, hessian, rank, DAMPING)?,
        None => truncate(&weight, rank)?,
    };
    Ok([b.transposed().into_values(), a.transposed().into_values()])
}
