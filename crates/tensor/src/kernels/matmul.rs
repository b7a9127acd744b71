//! Matrix products over strided slices, by the `gemm` crate.

use gemm::Parallelism;

/// A row-major `[rows, cols]` matrix inside a slice, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
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
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
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

/// `c = a b` or `c += a b`, with `c` row-major, its rows `c_stride` apart; on the threads of the pool.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn matmul(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, into: Into) {
    assert_eq!(a.cols, b.rows, "matmul: inner dimensions differ");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_fits(c.len(), m, n, c_stride);
    if m == 0 || n == 0 {
        return;
    }
    let add = into == Into::Add;
    let i = |stride: usize| stride as isize;
    // SAFETY: `Mat::new` and the check above keep every index that `gemm` forms from shape and strides inside the three
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
            a.data.as_ptr(),
            i(a.col_stride),
            i(a.row_stride),
            b.data.as_ptr(),
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
