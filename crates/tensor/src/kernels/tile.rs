//! The inner product of attention: tiles of 8 x 32 sums in registers, over matrices in panels.
//!
//! A matrix `[rows, columns]` in panels is a list of `[rows, 32]` matrices, one per 32 columns. Its rows are whole cache lines, every step
//! of a product is a constant offset, and either side of it can be read as it lies. Against a general product of a block of 64 rows this
//! saves packing, and work above the diagonal of causal scores.
//!
//! Each sum runs over `k` in order, with one rounding per step where the CPU has fused multiply-add: AVX-512, AVX2 and NEON give the same bits.

use super::matmul::Into;
use super::panel::{PANEL, Row};
use super::simd::{Level, level};

/// Rows of a tile.
pub(crate) const STRIP: usize = 8;

/// Where a tile finds its 8 left rows.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// The first 8 rows of panels that start `usize` rows apart.
    Rows(&'a [Row], usize),
    /// Columns `usize..usize + 8` of one panel, whose rows are steps of the product.
    Columns(&'a [Row], usize),
}

/// `out = left right`, or `out += left right`, for 8 rows of `left` and k steps; of one panel's columns at least the first `width`.
///
/// # Panics
/// If an operand is shorter than the product needs.
pub(crate) fn tile(left: Left<'_>, right: &[Row], k: usize, out: &mut [Row], width: usize, into: Into) {
    // SAFETY: the CPU has what `level` reports.
    unsafe { tile_with(level(), left, right, k, out, width, into) }
}

/// See [`tile`].
///
/// # Safety
/// The CPU must have the instructions of `level`.
#[inline(always)]
unsafe fn tile_with(level: Level, left: Left<'_>, right: &[Row], k: usize, out: &mut [Row], width: usize, into: Into) {
    let right = &right[..k];
    let out = &mut out[..STRIP];
    let (a, far) = match left {
        Left::Rows(rows, far) => {
            assert!(k == 0 || (k - 1) / PANEL * far + STRIP <= rows.len(), "tile: left rows");
            (rows.as_ptr().cast::<f32>(), far * PANEL)
        }
        Left::Columns(rows, at) => {
            assert!(k <= rows.len() && at + STRIP <= PANEL, "tile: left columns");
            (rows.as_ptr().cast::<f32>().wrapping_add(at), 0)
        }
    };
    let (b, c) = (right.as_ptr().cast(), out.as_mut_ptr().cast());
    let steps = Steps { a, far, b, k, c, half: width <= PANEL / 2, add: into == Into::Add };
    let by_rows = matches!(left, Left::Rows(..));
    // SAFETY: the checks above keep every index of `Steps` inside the three slices; the instructions are the caller's promise.
    unsafe {
        match (level, by_rows) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, true) => x86::avx512::<true>(steps),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, false) => x86::avx512::<false>(steps),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, true) => x86::avx2::<true>(steps),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, false) => x86::avx2::<false>(steps),
            (Level::Baseline, true) => steps.panel::<[f32; 4], 4, 2, true>(),
            (Level::Baseline, false) => steps.panel::<[f32; 4], 4, 2, false>(),
        }
    }
}

/// One product, checked by [`tile`].
#[derive(Clone, Copy)]
struct Steps {
    a: *const f32,
    /// Values between panels of the left rows.
    far: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    /// Whether 16 columns are enough.
    half: bool,
    add: bool,
}

/// A vector register.
///
/// # Safety
/// The methods may be called only where the CPU has the instructions.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn store(self, at: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// `self * x + y`
    unsafe fn mul_add(self, x: Self, y: Self) -> Self;
}

impl Steps {
    /// The panel in blocks of `M` rows and `N` registers.
    #[inline(always)]
    unsafe fn panel<V: Vector, const M: usize, const N: usize, const BY_ROWS: bool>(self) {
        let width = if self.half { PANEL / 2 } else { PANEL };
        for row in (0..STRIP).step_by(M) {
            for column in (0..width).step_by(N * V::LANES) {
                // SAFETY: the caller's.
                unsafe { self.block::<V, M, N, BY_ROWS>(row, column) };
            }
        }
    }

    #[inline(always)]
    unsafe fn block<V: Vector, const M: usize, const N: usize, const BY_ROWS: bool>(self, row: usize, column: usize) {
        // SAFETY: rows below STRIP and columns below PANEL of `k` steps are inside the slices that `tile` checked.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; M];
            let (mut a, mut b) = (self.a.add(row * if BY_ROWS { PANEL } else { 1 }), self.b.add(column));
            let mut left = self.k;
            while left > 0 {
                let steps = left.min(PANEL);
                for k in 0..steps {
                    let mut x = [V::splat(0.0); N];
                    for (j, x) in x.iter_mut().enumerate() {
                        *x = V::load(b.add(k * PANEL + j * V::LANES));
                    }
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let scalar = if BY_ROWS { a.add(i * PANEL + k) } else { a.add(k * PANEL + i) };
                        let scalar = V::splat(*scalar);
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = scalar.mul_add(x, *sum);
                        }
                    }
                }
                left -= steps;
                b = b.wrapping_add(PANEL * PANEL);
                a = a.wrapping_add(if BY_ROWS { self.far } else { PANEL * PANEL });
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let c = self.c.add((row + i) * PANEL + column + j * V::LANES);
                    if self.add { sum.add(V::load(c)).store(c) } else { sum.store(c) }
                }
            }
        }
    }
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { at.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's.
        unsafe { at.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] + other[i])
    }
    #[inline(always)]
    unsafe fn mul_add(self, x: Self, y: Self) -> Self {
        // Without the instruction, `f32::mul_add` is a slow call.
        let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        std::array::from_fn(|i| if fused { self[i].mul_add(x[i], y[i]) } else { self[i] * x[i] + y[i] })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Steps, Vector};

    /// 16 sums in registers of 32, and the most that fit in whole panels.
    #[target_feature(enable = "avx512f,avx512vl")]
    pub unsafe fn avx512<const BY_ROWS: bool>(steps: Steps) {
        // SAFETY: the caller's.
        unsafe {
            if steps.half { steps.panel::<__m512, 8, 1, BY_ROWS>() } else { steps.panel::<__m512, 8, 2, BY_ROWS>() }
        }
    }

    /// 8 sums in registers of 16.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const BY_ROWS: bool>(steps: Steps) {
        // SAFETY: the caller's.
        unsafe { steps.panel::<__m256, 4, 2, BY_ROWS>() }
    }

    macro_rules! vector {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident) => {
            impl Vector for $type {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller's, here and below.
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                unsafe fn load(at: *const f32) -> Self {
                    // SAFETY: as above.
                    unsafe { $load(at) }
                }
                #[inline(always)]
                unsafe fn store(self, at: *mut f32) {
                    // SAFETY: as above.
                    unsafe { $store(at, self) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn mul_add(self, x: Self, y: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $fma(self, x, y) }
                }
            }
        };
    }
    vector!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_fmadd_ps);
    vector!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_follows_f64() {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let matrix = |rows: usize, seed: usize| -> Vec<Row> {
            (0..rows).map(|i| std::array::from_fn(|j| value(seed + i * PANEL + j))).collect()
        };
        let levels = [
            Level::Baseline,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512,
        ];
        for k in [0, 1, 31, 32, 33, 70] {
            let (rows, columns, right) = (matrix(3 * 9, 1), matrix(k, 5), matrix(k, 9));
            for (left, width) in
                [(Left::Rows(&rows, 9), 32), (Left::Columns(&columns, 16), 32), (Left::Rows(&rows, 9), 16)]
            {
                let mut bits: Option<Vec<Row>> = None;
                for level in levels.into_iter().filter(|&l| l as usize <= level() as usize) {
                    let mut out = matrix(STRIP, 3);
                    for into in [Into::Write, Into::Add] {
                        // SAFETY: levels above this machine's are left out.
                        unsafe { tile_with(level, left, &right, k, &mut out, width, into) };
                    }
                    for (i, out) in out.iter().enumerate() {
                        for (j, &got) in out[..width].iter().enumerate() {
                            let left = |s: usize| match left {
                                Left::Rows(rows, far) => rows[s / PANEL * far + i][s % PANEL],
                                Left::Columns(rows, at) => rows[s][at + i],
                            };
                            let want: f64 = (0..k).map(|s| 2.0 * f64::from(left(s)) * f64::from(right[s][j])).sum();
                            assert!((f64::from(got) - want).abs() < 1e-4, "{level:?} k {k} [{i}, {j}]: {got} {want}");
                        }
                    }
                    // The baseline of x86-64 has no fused multiply-add.
                    if level != Level::Baseline || cfg!(target_arch = "aarch64") {
                        assert_eq!(*bits.get_or_insert_with(|| out.clone()), out, "{level:?}");
                    }
                }
            }
        }
    }
}
