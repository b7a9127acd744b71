//! Matrices in panels: a `[rows, columns]` matrix as a list of `[rows, 32]` matrices, one per 32 columns.
//!
//! Rows of a panel are whole cache lines, and every step of a product over panels is a constant offset ([`tile`](super::tile)).

use std::ops::Range;

use super::simd::vectorized;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

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
            prefetch(from, i + 12);
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
    /// `out = factor * row i` of a matrix in panels, rotated back by `angles` (cosines and sines).
    pub(crate) fn unpack_row(
        panels: &[Row],
        far: usize,
        i: usize,
        factor: f32,
        angles: Option<(&[f32], &[f32])>,
        out: &mut [f32],
    ) {
        for (x, out) in out.chunks_mut(PANEL).enumerate() {
            for (out, x) in out.iter_mut().zip(&panels[x * far + i]) {
                *out = x * factor;
            }
        }
        if let Some((cos, sin)) = angles {
            let (x, y) = out.split_at_mut(cos.len());
            for (((x, y), cos), sin) in x.iter_mut().zip(y).zip(cos).zip(sin) {
                (*x, *y) = (*x * cos + *y * sin, *y * cos - *x * sin);
            }
        }
    }
}

/// Asks for a row that is needed soon: rows of one head are pages apart, where the hardware does not look ahead.
#[inline(always)]
fn prefetch(from: Columns<'_>, i: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..from.width).step_by(16) {
        let at = from.values.as_ptr().wrapping_add(i * from.stride + from.first + at);
        // SAFETY: a hint, which no address makes fail.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) };
    }
}
