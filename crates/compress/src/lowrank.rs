//! Low rank: a weight as the product of two thin ones.

use crate::linalg::{self, Mat};
use crate::{CompressError, Hessian, Matrix, eigen};

/// `weight ≈ a b`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `[out, rank]`
    pub a: Matrix,
    /// `[rank, in]`
    pub b: Matrix,
}

/// The product of rank `rank` that is nearest to the weight in squares: its truncated singular value decomposition (Eckart and Young, 1936).
///
/// Column `i` of `a` and row `i` of `b` are equally long.
///
/// # Errors
/// [`CompressError`]: a rank that is not from 1 to the smaller side of the weight, values that are not finite.
pub fn truncate(weight: &Matrix, rank: usize) -> Result<LowRank, CompressError> {
    check(weight, rank)?;
    let (out, n) = (weight.rows(), weight.cols());
    let w = wide(weight);
    let whole = Mat::new(&w, out, n, n);
    if out <= n {
        let mut gram = vec![0.0; out * out];
        linalg::gemm(1.0, whole, whole.t(), 0.0, &mut gram, out);
        return Ok(by_outputs(gram, whole, [out, n], rank));
    }
    let mut gram = vec![0.0; n * n];
    linalg::gemm(1.0, whole.t(), whole, 0.0, &mut gram, n);
    let (_, v) = eigen::leading(gram, n, rank);
    let mut a = vec![0.0; out * rank];
    linalg::gemm(1.0, whole, Mat::new(&v, rank, n, n).t(), 0.0, &mut a, rank);
    Ok(balanced(a, v, [out, n], rank))
}

/// The product of rank `rank` whose outputs are nearest to the weight's on the inputs seen: the truncated decomposition of `W L` with `L Lᵀ = XᵀX`, as in
/// SVD-LLM (Wang et al., arXiv:2403.07378, section 3.1). `damping` times the mean of the second moments' diagonal is added to it.
///
/// # Errors
/// As [`truncate`]; a Hessian of another width; [`CompressError::Singular`] if the damping is too small or there were no inputs.
pub fn truncate_for(weight: &Matrix, hessian: &Hessian, rank: usize, damping: f64) -> Result<LowRank, CompressError> {
    check(weight, rank)?;
    weight.fits("low rank", hessian.width())?;
    let (out, n) = (weight.rows(), weight.cols());
    let w = wide(weight);
    let whole = Mat::new(&w, out, n, n);
    let order: Vec<usize> = (0..n).collect();
    let mut moments = hessian.damped(&order, damping);
    let mut product = vec![0.0; out * n];
    if out <= n {
        // The left singular vectors U of W L are the eigenvectors of W H Wᵀ, and of all products U B, B = Uᵀ W is the best one: L is not needed.
        linalg::gemm(1.0, whole, Mat::new(&moments, n, n, n), 0.0, &mut product, n);
        let mut gram = vec![0.0; out * out];
        linalg::gemm(1.0, Mat::new(&product, out, n, n), whole.t(), 0.0, &mut gram, out);
        return Ok(by_outputs(gram, whole, [out, n], rank));
    }
    linalg::cholesky(&mut moments, n).map_err(|pivot| CompressError::Singular {
        operation: "low rank",
        width: n,
        pivot,
    })?;
    linalg::gemm(1.0, whole, Mat::new(&moments, n, n, n), 0.0, &mut product, n);
    let whole = Mat::new(&product, out, n, n);
    let mut gram = vec![0.0; n * n];
    linalg::gemm(1.0, whole.t(), whole, 0.0, &mut gram, n);
    let (_, v) = eigen::leading(gram, n, rank);
    let v = Mat::new(&v, rank, n, n);
    let mut a = vec![0.0; out * rank];
    linalg::gemm(1.0, whole, v.t(), 0.0, &mut a, rank);
    linalg::invert_lower(&mut moments, n);
    let mut b = vec![0.0; rank * n];
    linalg::gemm(1.0, v, Mat::new(&moments, n, n, n), 0.0, &mut b, n);
    Ok(balanced(a, b, [out, n], rank))
}

/// Onto the leading left singular vectors, the eigenvectors of `gram` `[out, out]`.
fn by_outputs(gram: Vec<f64>, w: Mat<'_, f64>, [out, n]: [usize; 2], rank: usize) -> LowRank {
    let (_, u) = eigen::leading(gram, out, rank);
    let mut b = vec![0.0; rank * n];
    linalg::gemm(1.0, Mat::new(&u, rank, out, out), w, 0.0, &mut b, n);
    let a = (0..out).flat_map(|i| (0..rank).map(move |r| (i, r))).map(|(i, r)| u[r * out + i]).collect();
    balanced(a, b, [out, n], rank)
}

/// Column `i` of `a` and row `i` of `b` of the same length, which is kindest to what rounds or trains them.
fn balanced(a: Vec<f64>, b: Vec<f64>, [out, n]: [usize; 2], rank: usize) -> LowRank {
    let mut squares = vec![0.0; rank];
    a.chunks_exact(rank).for_each(|row| squares.iter_mut().zip(row).for_each(|(s, x)| *s += x * x));
    let of_b = b.chunks_exact(n).map(|row| row.iter().map(|x| x * x).sum::<f64>());
    let ratio = |(a, b): (&f64, f64)| if *a > 0.0 && b > 0.0 { (b / a).powf(0.25) } else { 1.0 };
    let by: Vec<f64> = squares.iter().zip(of_b).map(ratio).collect();
    let a = a.chunks_exact(rank).flat_map(|row| row.iter().zip(&by).map(|(x, by)| (x * by) as f32)).collect();
    let b = b.chunks_exact(n).zip(&by).flat_map(|(row, by)| row.iter().map(move |x| (x / by) as f32)).collect();
    LowRank { a: Matrix::of(out, rank, a), b: Matrix::of(rank, n, b) }
}

fn wide(weight: &Matrix) -> Vec<f64> {
    weight.values().iter().map(|x| f64::from(*x)).collect()
}

fn check(weight: &Matrix, rank: usize) -> Result<(), CompressError> {
    weight.finite("low rank")?;
    if rank == 0 || rank > weight.rows().min(weight.cols()) {
        let got = format!("{rank} for a weight [{}, {}]", weight.rows(), weight.cols());
        return Err(CompressError::Value { what: "rank", expected: "1 to the smaller side of the weight", got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn values(count: usize, by: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * i % 1009 * by % 1013) as f32 - 506.0) / 506.0).collect()
    }

    fn product(low: &LowRank) -> Matrix {
        let (out, rank, n) = (low.a.rows(), low.a.cols(), low.b.cols());
        let at = |i: usize, j: usize| (0..rank).map(|r| low.a.row(i)[r] * low.b.row(r)[j]).sum();
        Matrix::new(out, n, (0..out * n).map(|at_| at(at_ / n, at_ % n)).collect()).unwrap()
    }

    fn square_error(a: &Matrix, b: &Matrix) -> f64 {
        a.values().iter().zip(b.values()).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// Of all matrices of that rank none is nearer: the squared error is the sum of the squares of the singular values left out.
    #[test]
    fn the_error_is_what_eckart_and_young_say() {
        for (out, n) in [(9, 23), (23, 9), (16, 16)] {
            let weight = Matrix::new(out, n, values(out * n, 37)).unwrap();
            let least = out.min(n);
            let w = wide(&weight);
            let whole = Mat::new(&w, out, n, n);
            let mut gram = vec![0.0; out * out];
            linalg::gemm(1.0, whole, whole.t(), 0.0, &mut gram, out);
            let (squares, _) = eigen::leading(gram, out, least);
            for rank in 1..=least {
                let error = square_error(&product(&truncate(&weight, rank).unwrap()), &weight);
                let left: f64 = squares[rank..].iter().sum();
                assert!((error - left).abs() < 1e-4 * squares[0], "[{out}, {n}], {rank}: {error} for {left}");
            }
        }
    }

    /// On the outputs the one that knows the inputs is better, on the weights the other.
    #[test]
    fn each_is_best_at_what_it_is_for() {
        for (out, n) in [(9, 23), (23, 9)] {
            let weight = Matrix::new(out, n, values(out * n, 37)).unwrap();
            let inputs: Vec<f32> =
                values(200 * n, 53).iter().enumerate().map(|(i, x)| x * (1 + i % n) as f32).collect();
            let hessian = Hessian::of_inputs(&inputs, n);
            let plain = product(&truncate(&weight, 4).unwrap());
            let aware = product(&truncate_for(&weight, &hessian, 4, 1e-6).unwrap());
            let output = |other: &Matrix| hessian.output_error(&weight, other).unwrap();
            assert!(output(&aware) < 0.9 * output(&plain), "{} {}", output(&aware), output(&plain));
            assert!(square_error(&plain, &weight) < square_error(&aware, &weight));
        }
        let weight = Matrix::new(2, 3, vec![1.0; 6]).unwrap();
        assert!(truncate(&weight, 3).unwrap_err().to_string().contains("got 3 for a weight [2, 3]"));
        assert!(truncate(&weight, 0).is_err());
    }
}
