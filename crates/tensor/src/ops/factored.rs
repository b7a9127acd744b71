//! Parts of optimizers that keep a number per row and column of a matrix, outside any graph. On the CPU backends each is one pass over memory on all threads;
//! elsewhere it is composed of burn's operations.

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::optim::FusedOptim;
use crate::device::is_fused;

/// Means of the squares of matrices: over columns, and over rows.
///
/// # Shapes
/// - `x`: flat, of n matrices `[rows, columns]`; output `[n rows]` and `[n columns]`
///
/// # Panics
/// If the length does not fit, or the tensor is on an autodiff device.
pub fn mean_squares(x: Tensor<1>, shape: [usize; 3]) -> (Tensor<1>, Tensor<1>) {
    let [n, rows, columns] = shape;
    if is_fused(&x.device()) {
        let (by_row, by_column) = Dispatch::fused_mean_squares(x.into_dispatch(), shape);
        return (Tensor::from_dispatch(by_row), Tensor::from_dispatch(by_column));
    }
    let squares = (x.clone() * x).reshape(shape);
    (squares.clone().mean_dim(2).reshape([n * rows]), squares.mean_dim(1).reshape([n * columns]))
}

/// `x / √max(r c, least)` with a factor r for every row and c for every column.
///
/// # Shapes
/// - `x`: flat, of n matrices `[rows, columns]`; `by_row`: `[n rows]`, `by_column`: `[n columns]`
///
/// # Panics
/// If the lengths do not fit, or a tensor is on an autodiff device.
pub fn divide_by_root(
    x: Tensor<1>,
    shape: [usize; 3],
    by_row: Tensor<1>,
    by_column: Tensor<1>,
    least: f32,
) -> Tensor<1> {
    let [n, rows, columns] = shape;
    if is_fused(&x.device()) {
        let (by_row, by_column) = (by_row.into_dispatch(), by_column.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_divide_by_root(
            x.into_dispatch(),
            by_row,
            by_column,
            shape,
            least,
        ));
    }
    let product = by_row.reshape([n, rows, 1]) * by_column.reshape([n, 1, columns]);
    x / product.clamp_min(least).sqrt().reshape([n * rows * columns])
}

/// `keep y − r c x` with a factor r for every row and c for every column of a matrix; in place of `y` on the CPU backends, provided that nothing else
/// holds it.
///
/// # Shapes
/// - `y`, `x`: `[rows columns]`; `by_row`: `[rows]`, `by_column`: `[columns]`
///
/// # Panics
/// If the lengths do not fit, or a tensor is on an autodiff device.
pub fn subtract_scaled(y: Tensor<1>, keep: f32, x: Tensor<1>, by_row: Tensor<1>, by_column: Tensor<1>) -> Tensor<1> {
    if is_fused(&y.device()) {
        let [x, by_row, by_column] = [x, by_row, by_column].map(Tensor::into_dispatch);
        return Tensor::from_dispatch(Dispatch::fused_subtract_scaled(y.into_dispatch(), x, by_row, by_column, keep));
    }
    let ([rows], [columns]) = (by_row.dims(), by_column.dims());
    let factors = by_row.reshape([rows, 1]) * by_column.reshape([1, columns]);
    y * keep - x * factors.reshape([rows * columns])
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn numbers(n: usize, salt: u32) -> Vec<f32> {
        let hash = |i: u32| crate::kernels::compact::hash(salt, i) as f32 / u32::MAX as f32;
        (0..n as u32).map(|i| hash(i) - 0.4).collect()
    }

    #[track_caller]
    fn assert_close(found: Tensor<1>, expected: &[f64]) {
        let found: Vec<f32> = found.into_data().iter().collect();
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() <= 1e-6 * scale, "{found} {expected}");
        }
    }

    /// Shapes around a task's rows, and one row or column alone.
    #[test]
    fn factored_operations_equal_their_formulas_in_double_precision() {
        let device = Device::default();
        for [n, rows, columns] in [[1, 1, 7], [3, 5, 1], [2, 37, 19], [1, 40, 1000], [2, 3, 17_000]] {
            let values = numbers(n * rows * columns, 1);
            let x = || Tensor::<1>::from_floats(values.as_slice(), &device);
            let at = |i: usize, r: usize, c: usize| f64::from(values[(i * rows + r) * columns + c]);
            let (by_row, by_column) = mean_squares(x(), [n, rows, columns]);
            let (mut expected_rows, mut expected_columns) = (vec![0.0; n * rows], vec![0.0; n * columns]);
            for i in 0..n {
                for r in 0..rows {
                    for c in 0..columns {
                        expected_rows[i * rows + r] += at(i, r, c).powi(2) / columns as f64;
                        expected_columns[i * columns + c] += at(i, r, c).powi(2) / rows as f64;
                    }
                }
            }
            assert_close(by_row, &expected_rows);
            assert_close(by_column, &expected_columns);

            let (r, c) = (numbers(n * rows, 2), numbers(n * columns, 3));
            let tensor = |values: &[f32]| Tensor::<1>::from_floats(values, &device);
            let factor = |i: usize| {
                let (matrix, row, column) = (i / (rows * columns), i / columns, i % columns);
                f64::from(r[row]) * f64::from(c[matrix * columns + column])
            };
            let least = 0.01f32;
            let expected: Vec<f64> =
                (0..values.len()).map(|i| f64::from(values[i]) / factor(i).max(f64::from(least)).sqrt()).collect();
            assert_close(divide_by_root(x(), [n, rows, columns], tensor(&r), tensor(&c), least), &expected);
            if n == 1 {
                let y = numbers(values.len(), 4);
                let expected: Vec<f64> =
                    (0..y.len()).map(|i| 0.9 * f64::from(y[i]) - factor(i) * f64::from(values[i])).collect();
                assert_close(subtract_scaled(tensor(&y), 0.9, x(), tensor(&r), tensor(&c)), &expected);
            }
        }
    }
}
