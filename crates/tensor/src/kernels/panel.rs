//! Matrices in panels: a `[rows, columns]` matrix as a list of `[rows, 32]` matrices, one per 32 columns.
//!
//! Rows of a panel are whole cache lines, and every step of a product over panels is a constant offset ([`tile`](super::tile)).

use std::marker::PhantomData;
use std::ops::Range;

use super::simd::vectorized;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// How many rows ahead of their use they are asked for.
pub(crate) const AHEAD: usize = 12;

/// A row of a panel.
pub(crate) type Row = [f32; PANEL];

/// Some columns of a row-major matrix: one head.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub values: &'a [f32],
    /// Width of the matrix.
    pub stride: usize,
    pub first: usize,
    pub width: usize,
}

impl<'a> Columns<'a> {
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.stride + self.first..][..self.width]
    }

    /// Asks for row `i`, which is needed soon: rows of one head are pages apart, where the hardware does not look ahead.
    #[inline(always)]
    pub fn prefetch(&self, i: usize) {
        #[cfg(target_arch = "x86_64")]
        for at in (0..self.width).step_by(16) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.values.as_ptr().wrapping_add(i * self.stride + self.first + at);
            // SAFETY: a hint, which no address makes fail.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = i;
    }
}

/// Rotations (rotate-half, as GPT-NeoX and Llama): tables `[positions, E / 2]`, and the position of each token.
#[derive(Clone, Copy)]
pub(crate) struct Rope<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub positions: &'a [i32],
}

impl<'a> Rope<'a> {
    /// Cosines and sines of token `i`.
    #[inline(always)]
    pub fn angles(&self, i: usize, half: usize) -> (&'a [f32], &'a [f32]) {
        let at = self.positions[i] as usize * half;
        (&self.cos[at..at + half], &self.sin[at..at + half])
    }
}

vectorized! {
    /// Packs `tokens` into panels `far` rows apart, the first of them into row `at`; each times `factor`, and rotated.
    pub(crate) fn pack(
        from: Columns<'_>,
        tokens: Range<usize>,
        rope: Option<Rope<'_>>,
        factor: f32,
        out: &mut [Row],
        far: usize,
        at: usize,
    ) {
        let half = from.width / 2;
        for (i, at) in tokens.zip(at..) {
            let row = from.row(i);
            from.prefetch(i + AHEAD);
            let Some(rope) = rope else {
                for (x, row) in row.chunks(PANEL).enumerate() {
                    for (out, x) in out[x * far + at].iter_mut().zip(row) {
                        *out = x * factor;
                    }
                }
                continue;
            };
            let (a, b) = row.split_at(half);
            let (cos, sin) = rope.angles(i, half);
            let mut j = 0;
            while j < from.width {
                // As far as one half and one panel go.
                let (x, y, sign, k) = if j < half { (a, b, -factor, j) } else { (b, a, factor, j - half) };
                let n = (PANEL - j % PANEL).min(half - k);
                let out = &mut out[j / PANEL * far + at][j % PANEL..][..n];
                let (x, y, cos, sin) = (&x[k..][..n], &y[k..][..n], &cos[k..][..n], &sin[k..][..n]);
                for i in 0..n {
                    out[i] = x[i] * cos[i] * factor + y[i] * sin[i] * sign;
                }
                j += n;
            }
        }
    }
}

/// `out[c][r] = from[r][c]`
pub(crate) fn transpose(from: &[Row], out: &mut [Row]) {
    for (c, out) in out.iter_mut().enumerate() {
        for (out, from) in out.iter_mut().zip(from) {
            *out = from[c];
        }
    }
}

vectorized! {
    /// Writes the rows of a matrix in panels, each times its factor (or all times the only one), rotated back.
    pub(crate) fn unpack(panels: &[Row], far: usize, factors: &[f32], rope: Option<Rope<'_>>, out: &mut Place<'_>) {
        let (rows, half) = (out.rows.len(), out.width / 2);
        for i in 0..rows {
            let factor = factors[i.min(factors.len() - 1)];
            let out = out.row(i);
            for (x, out) in out.chunks_mut(PANEL).enumerate() {
                for (out, x) in out.iter_mut().zip(&panels[x * far + i]) {
                    *out = x * factor;
                }
            }
            if let Some(rope) = rope {
                let (cos, sin) = rope.angles(i, half);
                let (x, y) = out.split_at_mut(half);
                for (((x, y), cos), sin) in x.iter_mut().zip(y).zip(cos).zip(sin) {
                    (*x, *y) = (*x * cos + *y * sin, *y * cos - *x * sin);
                }
            }
        }
    }
}

/// A row-major matrix whose parts several tasks write.
pub(crate) struct Parts<'a> {
    data: *mut f32,
    len: usize,
    width: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a mutable slice whose one accessor leaves it to the caller that no two parts share a value.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    /// Rows of `width` values.
    pub fn new(data: &'a mut [f32], width: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), width, lifetime: PhantomData }
    }

    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        self.width
    }

    /// Columns `column..column + width` of `rows`.
    ///
    /// # Safety
    /// No other part with one of these values may exist while this one does.
    ///
    /// # Panics
    /// If they are not in the matrix.
    pub unsafe fn part(&self, rows: Range<usize>, column: usize, width: usize) -> Place<'_> {
        assert!(column + width <= self.width && rows.end * self.width <= self.len, "part outside its matrix");
        Place { matrix: self, rows, column, width }
    }
}

/// A part of a matrix that is the holder's alone.
pub(crate) struct Place<'a> {
    matrix: &'a Parts<'a>,
    rows: Range<usize>,
    column: usize,
    width: usize,
}

impl Place<'_> {
    /// Where it starts; its rows are the matrix's stride apart.
    pub fn start(&mut self) -> *mut f32 {
        self.matrix.data.wrapping_add(self.rows.start * self.matrix.width + self.column)
    }

    /// Its row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows.len());
        let at = (self.rows.start + i) * self.matrix.width + self.column;
        // SAFETY: `Parts::part` checked that it is inside the matrix, and its caller promised that nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.matrix.data.add(at), self.width) }
    }
}
