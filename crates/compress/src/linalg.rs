//! Products, Cholesky factors and triangular inverses in f64, in blocks, on the threads of the pool.

use rayon::prelude::*;

/// Rows and columns of a diagonal block.
const BLOCK: usize = 64;

/// A row-major matrix inside a slice, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// `rows` rows of `cols` values, `stride` apart, the first at the begin of the slice.
    ///
    /// # Panics
    /// If the last row ends behind the slice.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        assert_fits(data.len(), rows, cols, stride);
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `c = beta c + alpha a b`, with `c`'s rows `stride` apart.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn gemm<T: Copy + 'static>(alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, beta: T, c: &mut [T], stride: usize) {
    assert_eq!(a.cols, b.rows, "gemm: inner dimensions differ");
    assert_fits(c.len(), a.rows, b.cols, stride);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let i = |stride: usize| stride as isize;
    // SAFETY: `Mat::new` and the check above keep every index that `gemm` forms from shape and strides inside the three slices; `c` is borrowed mutably,
    // so that it overlaps neither operand. `gemm` refuses other types than its own floats.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr(),
            1,
            i(stride),
            true,
            a.data.as_ptr(),
            i(a.col_stride),
            i(a.row_stride),
            b.data.as_ptr(),
            i(b.col_stride),
            i(b.row_stride),
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

#[track_caller]
fn assert_fits(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(stride >= cols, "gemm: rows of {cols} values overlap at stride {stride}");
    let need = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
    assert!(len >= need, "gemm: [{rows}, {cols}] at stride {stride} needs {need} values, got {len}");
}

/// `L` with `L Lᵀ = a`, in the place of `a` `[n, n]`, of which the lower triangle is read; zeros above.
///
/// # Errors
/// The pivot that is not positive: `a` is not positive definite.
pub(crate) fn cholesky(a: &mut [f64], n: usize) -> Result<(), usize> {
    for k in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - k);
        // What the columns before take off these.
        let done: Vec<f64> = a[k * n..].chunks_exact(n).flat_map(|row| row[..k].iter().copied()).collect();
        if k > 0 {
            let rows = Mat::new(&done, n - k, k, k);
            gemm(-1.0, rows, Mat::new(&done, width, k, k).t(), 1.0, &mut a[k * n + k..], n);
        }
        let (diagonal, below) = a[k * n..].split_at_mut(width * n);
        for i in 0..width {
            for j in 0..=i {
                let dot: f64 = (0..j).map(|l| diagonal[i * n + k + l] * diagonal[j * n + k + l]).sum();
                let left = diagonal[i * n + k + j] - dot;
                diagonal[i * n + k + j] = match i == j {
                    true if left <= 0.0 || left.is_nan() => return Err(k + i),
                    true => left.sqrt(),
                    false => left / diagonal[j * n + k + j],
                };
            }
            diagonal[i * n + k + i + 1..(i + 1) * n].fill(0.0);
        }
        below.par_chunks_mut(n).for_each(|row| {
            let row = &mut row[k..k + width];
            for j in 0..width {
                let l = &diagonal[j * n + k..][..=j];
                let dot: f64 = row[..j].iter().zip(l).map(|(x, y)| x * y).sum();
                row[j] = (row[j] - dot) / l[j];
            }
        });
    }
    Ok(())
}

/// The inverse of a lower triangular `[n, n]`, in its place.
pub(crate) fn invert_lower(l: &mut [f64], n: usize) {
    for k in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - k);
        let (above, here) = l.split_at_mut(k * n);
        // What is right of the inverse in these rows: -L[k, ..k] inverse[..k, ..k].
        let mut row = vec![0.0; width * k];
        gemm(-1.0, Mat::new(here, width, k, n), Mat::new(above, k, k, n), 0.0, &mut row, k.max(1));
        let mut diagonal = vec![0.0; width * width];
        for i in 0..width {
            diagonal[i * width + i] = 1.0 / here[i * n + k + i];
            for j in 0..i {
                let dot: f64 = (j..i).map(|m| here[i * n + k + m] * diagonal[m * width + j]).sum();
                diagonal[i * width + j] = -dot / here[i * n + k + i];
            }
        }
        if k > 0 {
            gemm(1.0, Mat::new(&diagonal, width, width, width), Mat::new(&row, width, k, k), 0.0, here, n);
        }
        for i in 0..width {
            here[i * n + k..][..width].copy_from_slice(&diagonal[i * width..][..width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_multiply_back_and_inverses_undo() {
        for n in [1, 2, 5, 64, 65, 150] {
            let x: Vec<f64> = (0..n * (n + 3)).map(|i| ((i * 37 % 1009) as f64 - 504.0) / 504.0).collect();
            let mut a = vec![0.0; n * n];
            gemm(1.0, Mat::new(&x, n + 3, n, n).t(), Mat::new(&x, n + 3, n, n), 0.0, &mut a, n);
            (0..n).for_each(|i| a[i * n + i] += 0.1);
            let mut l = a.clone();
            assert_eq!(cholesky(&mut l, n), Ok(()));
            let mut inverse = l.clone();
            invert_lower(&mut inverse, n);
            for i in 0..n {
                for j in 0..n {
                    let product: f64 = (0..n).map(|k| l[i * n + k] * l[j * n + k]).sum();
                    assert!((product - a[i * n + j]).abs() < 1e-10 * n as f64, "{n}: {i} {j}");
                    let one: f64 = (0..n).map(|k| l[i * n + k] * inverse[k * n + j]).sum();
                    assert!((one - f64::from(i == j)).abs() < 1e-9, "{n}: {i} {j} {one}");
                    assert!(j <= i || (l[i * n + j] == 0.0 && inverse[i * n + j] == 0.0));
                }
            }
            a[n * n - 1] = -1.0;
            assert_eq!(cholesky(&mut a, n), Err(n - 1));
        }
    }
}
