//! Matrix products over strided slices: in f32 by the `gemm` crate, and of operands rounded to 16 bits.

use gemm::Parallelism;

use super::bf16;
use super::half::{Half, unpacked};
use crate::buffers::recycle;

/// In what the operands of matrix products are multiplied; sums are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16: the range of f32 with 8 bits of precision. Twice as fast on CPUs that multiply it.
    Bf16,
    /// Rounded to IEEE half precision: 11 bits of precision, and a range in which small gradients vanish unless the loss is scaled
    /// (Micikevicius et al., arXiv:1710.03740).
    F16,
}

impl Compute {
    /// The type of 16 bits, if it is one.
    pub(crate) fn half(self) -> Option<Half> {
        match self {
            Compute::F32 => None,
            Compute::Bf16 => Some(Half::Bf16),
            Compute::F16 => Some(Half::F16),
        }
    }
}

/// Values of a matrix.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}

/// A row-major `[rows, cols]` matrix inside a slice, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: Values<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// `rows` rows of `cols` values, `stride` apart.
    ///
    /// # Panics
    /// If the last row ends behind the slice.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert_fits(data.len(), rows, cols, stride);
        Self { data: Values::F32(data), rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// A matrix in bfloat16, whose rows touch.
    ///
    /// # Panics
    /// If the last row ends behind the slice.
    pub fn bf16(bits: &'a [u16], rows: usize, cols: usize) -> Self {
        assert_fits(bits.len(), rows, cols, cols);
        Self { data: Values::Bf16(bits), rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values, from the first of the matrix on.
    pub fn values(&self) -> Values<'a> {
        self.data
    }

    /// Values from one row to the next, and from one column to the next: one of them is 1.
    pub fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.col_stride)
    }

    /// The same matrix over values that lie like this one's, if there are any.
    fn over<'b>(self, made: Option<&'b [f32]>) -> Mat<'b>
    where
        'a: 'b,
    {
        let data = made.map_or(self.data, Values::F32);
        Mat { data, rows: self.rows, cols: self.cols, row_stride: self.row_stride, col_stride: self.col_stride }
    }

    /// Columns `first..first + n` of a matrix in f32.
    fn columns(self, first: usize, n: usize) -> Self {
        let data = match self.data {
            Values::F32(values) => Values::F32(&values[(first * self.col_stride).min(values.len())..]),
            bits => bits,
        };
        Self { data, cols: n, ..self }
    }

    /// The same values read as `[cols, rows]`.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// What a product does with the values that its destination holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// `c = a b`
    Write,
    /// `c += a b`
    Add,
}

/// `c = a b` or `c += a b`, with `c` row-major, its rows `c_stride` apart; on the threads of the pool. The operands are rounded as `compute` says.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn matmul(compute: Compute, a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, into: Into) {
    assert_eq!(a.cols, b.rows, "matmul: inner dimensions differ");
    assert_fits(c.len(), a.rows, b.cols, c_stride);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    let half = compute.half();
    if half == Some(Half::Bf16) && bf16::available() {
        return bf16::matmul(a, b, c, c_stride, into);
    }
    if half.is_none()
        && let (Values::F32(_), Values::Bf16(bits)) = (a.data, b.data)
    {
        return unpacked_in_parts(a, b, bits, c, c_stride, into);
    }
    // In f32, of values that are rounded or unpacked first.
    let [a_made, b_made] = [a, b].map(|mat| match (mat.data, half) {
        (Values::F32(_), None) => None,
        (Values::F32(values), Some(half)) => Some(half.rounded(values)),
        (Values::Bf16(bits), _) => Some(unpacked(Half::Bf16, bits)),
    });
    sgemm(a.over(a_made.as_deref()), b.over(b_made.as_deref()), c, c_stride, into);
    [a_made, b_made].into_iter().flatten().for_each(recycle);
}

/// Values that are unpacked at a time: 8 MB of them, which stay in the cache.
const PART: usize = 2 << 20;

/// The product in f32 with a matrix in bfloat16, some of whose rows, as they lie in memory, exist in f32 at a time: a vocabulary's would be larger than all
/// else of a small model.
fn unpacked_in_parts(a: Mat<'_>, b: Mat<'_>, bits: &[u16], c: &mut [f32], c_stride: usize, into: Into) {
    let turned = b.col_stride != 1;
    let (rows, width) = if turned { (b.cols, b.rows) } else { (b.rows, b.cols) };
    let step = (PART / width.max(1)).max(1);
    for first in (0..rows.max(1)).step_by(step) {
        let n = step.min(rows - first);
        let values = unpacked(Half::Bf16, &bits[first * width..(first + n) * width]);
        let part = Mat::new(&values, n, width, width);
        if turned {
            // Some columns of the product.
            sgemm(a, part.t(), &mut c[first..], c_stride, into);
        } else {
            // Some terms of its sums.
            let into = if first == 0 { into } else { Into::Add };
            sgemm(a.columns(first, n), part, c, c_stride, into);
        }
        recycle(values);
    }
}

/// See [`matmul`], which has checked the shapes.
fn sgemm(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, into: Into) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let (Values::F32(a_values), Values::F32(b_values)) = (a.data, b.data) else { unreachable!("unpacked by matmul") };
    let add = into == Into::Add;
    let i = |stride: usize| stride as isize;
    // SAFETY: `Mat::new` and `matmul`'s check keep every index that `gemm` forms from shape and strides inside the three
    // slices; `c` is borrowed mutably, so that it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            i(c_stride),
            add,
            a_values.as_ptr(),
            i(a.col_stride),
            i(a.row_stride),
            b_values.as_ptr(),
            i(b.col_stride),
            i(b.row_stride),
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
}

#[track_caller]
fn assert_fits(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(stride >= cols, "matmul: rows of {cols} values overlap at stride {stride}");
    let need = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
    assert!(len >= need, "matmul: [{rows}, {cols}] at stride {stride} needs {need} values, got {len}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 37 % 1009) as f32 - 504.0) / 504.0).collect()
    }

    /// Products of values that are rounded beforehand differ by the order of their sums alone.
    #[test]
    fn halves_follow_f64_of_rounded_operands() {
        let shapes = [
            (1, 1, 1),
            (12, 32, 2),
            (13, 33, 7),
            (97, 65, 131),
            (5, 300, 1030),
            (200, 17, 64),
            (25, 49, 2100),
            (3, 4, 0),
        ];
        for (compute, half) in [(Compute::Bf16, Half::Bf16), (Compute::F16, Half::F16)] {
            for (m, n, k) in shapes {
                let (a, b) = (values(m * k, 1), values(k * n, 5));
                let (ra, rb) = (half.rounded(&a), half.rounded(&b));
                for (turn_a, turn_b, into) in [
                    (false, false, Into::Write),
                    (true, false, Into::Add),
                    (false, true, Into::Add),
                    (true, true, Into::Write),
                ] {
                    let mat = |values, rows, cols, turned| match turned {
                        false => Mat::new(values, rows, cols, cols),
                        true => Mat::new(values, cols, rows, rows).t(),
                    };
                    let at = |values: &[f32], i, j, rows, cols, turned: bool| {
                        f64::from(if turned { values[j * rows + i] } else { values[i * cols + j] })
                    };
                    let mut c = vec![0.5; m * n];
                    matmul(compute, mat(&a, m, k, turn_a), mat(&b, k, n, turn_b), &mut c, n, into);
                    for (x, got) in c.iter().enumerate() {
                        let (i, j) = (x / n, x % n);
                        let sum: f64 = (0..k).map(|s| at(&ra, i, s, m, k, turn_a) * at(&rb, s, j, k, n, turn_b)).sum();
                        let want = sum + if into == Into::Add { 0.5 } else { 0.0 };
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 2e-6 * (k as f64).max(4.0), "{compute:?} {m}x{n}x{k} [{i}, {j}]: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn matrices_in_bfloat16_follow_f64_however_many_parts_they_have() {
        for (rows, cols) in [(5, 7), (1, 3), (3, 1), (2051, 1031)] {
            let rounded = Half::Bf16.rounded(&values(rows * cols, 3));
            let bits: Vec<u16> = rounded.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let at = |i: usize, j: usize| f64::from(f32::from_bits(u32::from(bits[i * cols + j]) << 16));
            for turned in [false, true] {
                let (k, n) = if turned { (cols, rows) } else { (rows, cols) };
                let (m, a) = (2, values(2 * k, 1));
                for into in [Into::Write, Into::Add] {
                    let b = Mat::bf16(&bits, rows, cols);
                    let mut c = vec![0.5; m * n];
                    matmul(Compute::F32, Mat::new(&a, m, k, k), if turned { b.t() } else { b }, &mut c, n, into);
                    for (x, got) in c.iter().enumerate() {
                        let (i, j) = (x / n, x % n);
                        let b = |s| if turned { at(j, s) } else { at(s, j) };
                        let sum: f64 = (0..k).map(|s| f64::from(a[i * k + s]) * b(s)).sum();
                        let want = sum + if into == Into::Add { 0.5 } else { 0.0 };
                        let error = (f64::from(*got) - want).abs();
                        assert!(error < 2e-6 * (k as f64).max(4.0), "{rows}x{cols} {turned} [{i}, {j}]: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_reaches_the_product() {
        for compute in [Compute::F32, Compute::Bf16, Compute::F16] {
            for bad in [f32::NAN, f32::INFINITY, 1e38] {
                let mut c = [0.0; 4];
                matmul(
                    compute,
                    Mat::new(&[bad, 2.0], 2, 1, 1),
                    Mat::new(&[10.0, 20.0], 1, 2, 2),
                    &mut c,
                    2,
                    Into::Write,
                );
                assert!(!c[0].is_finite() && c[3] == 40.0, "{compute:?} {bad}: {c:?}");
            }
        }
    }
}
