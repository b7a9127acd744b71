//! Second moments of a layer's inputs.

use crate::linalg::{self, Mat};
use crate::{CompressError, Matrix};

/// Second moments `XᵀX` of the inputs `X` of a layer: the Hessian of the squared error of each of its outputs, but for a factor.
#[derive(Debug, Clone, PartialEq)]
pub struct Hessian {
    width: usize,
    values: Vec<f64>,
}

impl Hessian {
    /// From `Σ xᵀx` over all inputs `x`, `[width, width]`.
    ///
    /// # Errors
    /// [`CompressError::Shape`] if it is not square, [`CompressError::NotFinite`].
    pub fn new(width: usize, moments: Vec<f64>) -> Result<Self, CompressError> {
        let operation = "second moments of inputs";
        if moments.len() != width * width {
            let (expected, got) = (format!("{} of {width} inputs", width * width), moments.len().to_string());
            return Err(CompressError::Shape { operation, expected, got });
        }
        if let Some((index, value)) = moments.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            return Err(CompressError::NotFinite { operation, index, value: *value as f32 });
        }
        Ok(Self { width, values: moments })
    }

    /// Inputs of the layer.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `Σ x_i x_j`.
    ///
    /// # Panics
    /// If there is no such input.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.width + j]
    }

    /// `Σ x_i x_j` for all `j`.
    pub(crate) fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.width..][..self.width]
    }

    /// `Σ x_i²` of each input.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.width).map(|i| self.at(i, i)).collect()
    }

    /// `‖(a − b) Xᵀ‖²`: how far the outputs of two weights `[out, in]` are apart on the inputs seen.
    ///
    /// # Errors
    /// [`CompressError::Shape`] for weights of other shapes.
    pub fn output_error(&self, a: &Matrix, b: &Matrix) -> Result<f64, CompressError> {
        a.fits("output error", self.width)?;
        if (a.rows(), a.cols()) != (b.rows(), b.cols()) {
            let [expected, got] = [a, b].map(|x| format!("[{}, {}]", x.rows(), x.cols()));
            return Err(CompressError::Shape { operation: "output error", expected, got });
        }
        let (n, difference) =
            (self.width, a.values().iter().zip(b.values()).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let difference: Vec<f64> = difference.collect();
        let mut product = vec![0.0; difference.len()];
        let rows = Mat::new(&difference, a.rows(), n, n);
        linalg::gemm(1.0, rows, Mat::new(&self.values, n, n, n), 0.0, &mut product, n);
        Ok(difference.iter().zip(&product).map(|(x, y)| x * y).sum::<f64>().max(0.0))
    }

    /// The matrix with rows and columns in the order of `order`, and `damping` times the mean of the diagonal on its diagonal.
    pub(crate) fn damped(&self, order: &[usize], damping: f64) -> Vec<f64> {
        let n = self.width;
        let more = damping * self.diagonal().iter().sum::<f64>() / n.max(1) as f64;
        let mut values = vec![0.0; n * n];
        for (&from, row) in order.iter().zip(values.chunks_exact_mut(n.max(1))) {
            row.iter_mut().zip(order).for_each(|(x, &col)| *x = self.at(from, col));
        }
        (0..n).for_each(|i| values[i * n + i] += more);
        values
    }

    /// The upper triangular `U` with `Uᵀ U = (H + damping)⁻¹`, of rows and columns in `order`: its row `i` is, but for the sign, what the weights behind `i`
    /// gain when weight `i` is held (Frantar et al., arXiv:2210.17323, section 3.3, step 3).
    ///
    /// # Errors
    /// [`CompressError::Singular`].
    pub(crate) fn inverse_factor(
        &self,
        operation: &'static str,
        order: &[usize],
        damping: f64,
    ) -> Result<Vec<f64>, CompressError> {
        let n = self.width;
        // In reversed order H = L Lᵀ becomes H = R Rᵀ with R upper triangular, so that U is R⁻¹: one factorization instead of two and an inverse.
        let reversed: Vec<usize> = order.iter().rev().copied().collect();
        let mut factor = self.damped(&reversed, damping);
        linalg::cholesky(&mut factor, n).map_err(|pivot| CompressError::Singular {
            operation,
            width: n,
            pivot: reversed[pivot],
        })?;
        linalg::invert_lower(&mut factor, n);
        factor.reverse();
        Ok(factor)
    }
}

#[cfg(test)]
impl Hessian {
    /// Of `[n, width]` inputs.
    pub(crate) fn of_inputs(inputs: &[f32], width: usize) -> Self {
        let mut values = vec![0.0; width * width];
        for x in inputs.chunks(width) {
            for i in 0..width {
                (0..width).for_each(|j| values[i * width + j] += f64::from(x[i]) * f64::from(x[j]));
            }
        }
        Self { width, values }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn inputs(rows: usize, width: usize) -> Vec<f32> {
        (0..rows * width).map(|i| ((i * i % 1013) as f32 - 500.0) / 300.0).collect()
    }

    #[test]
    fn outputs_differ_by_what_they_differ_on_the_inputs() {
        let (rows, width) = (50, 7);
        let x = inputs(rows, width);
        let hessian = Hessian::of_inputs(&x, width);
        let matrix = |by: f32| Matrix::new(3, width, (0..3 * width).map(|i| (i as f32).sin() * by).collect()).unwrap();
        let (one, two) = (matrix(1.0), matrix(1.25));
        let output =
            |row: usize, x: &[f32]| -> f64 { x.iter().zip(one.row(row)).map(|(x, w)| f64::from(x * w * 0.25)).sum() };
        let error: f64 = x.chunks(width).map(|x| (0..3).map(|row| output(row, x).powi(2)).sum::<f64>()).sum();
        let ours = hessian.output_error(&one, &two).unwrap();
        assert!((ours / error - 1.0).abs() < 1e-5, "{ours} {error}");
        assert!(hessian.output_error(&one, &one.transposed()).is_err());
    }

    #[test]
    fn the_factor_is_of_the_inverse() {
        let width = 70;
        let hessian = Hessian::of_inputs(&inputs(200, width), width);
        let order: Vec<usize> = (0..width).map(|i| i * 3 % width).collect();
        let [u, h] = [hessian.inverse_factor("test", &order, 0.01).unwrap(), hessian.damped(&order, 0.01)];
        let n = width;
        for i in 0..n {
            assert!(u[i * n..][..i].iter().all(|x| *x == 0.0));
            for j in 0..n {
                // U H Uᵀ is the identity.
                let row: Vec<f64> = (0..n).map(|k| (0..n).map(|l| u[i * n + l] * h[l * n + k]).sum()).collect();
                let one: f64 = row.iter().zip(&u[j * n..][..n]).map(|(x, y)| x * y).sum();
                assert!((one - f64::from(i == j)).abs() < 1e-9, "{i} {j} {one}");
            }
        }
        let error =
            Hessian::new(3, vec![0.0; 9]).unwrap().inverse_factor("GPTQ", &[0, 1, 2], 0.01).unwrap_err().to_string();
        assert!(error.contains("3 inputs are not positive definite"), "{error}");
    }

    #[test]
    fn what_is_no_matrix_of_moments_is_refused() {
        assert!(Hessian::new(2, vec![0.0; 3]).unwrap_err().to_string().contains("4 of 2 inputs, got 3"));
        assert!(Hessian::new(1, vec![f64::NAN]).unwrap_err().to_string().contains("NaN at 0"));
    }
}
