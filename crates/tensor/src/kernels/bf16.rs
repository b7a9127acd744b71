//! Matrix products of bf16 with sums in f32, by the CPU's own instruction (AVX-512 BF16): twice as many multiplications per second as in f32.
//!
//! Both operands are rounded and packed into panels while they are read: of the left 12 rows, of the right 32 columns, two steps of the sum side
//! by side as the instruction takes them. A block of panels that fits into a core's second-level cache is one task.

use rayon::prelude::*;

use super::half::bf16_bits;
use super::matmul::{Into, Mat, Values};
use super::panel::Parts;
use super::scratch::with_scratch;
use super::simd::vectorized;

/// Rows of a left panel.
const ROWS: usize = 12;

/// Columns of a right panel.
const COLUMNS: usize = 32;

/// Pairs of steps that are packed at once: a sum is read and written once for so many.
const PAIRS: usize = 512;

/// Rows of the result, and columns, that are packed at once: 4 MB of each operand.
const BLOCK: usize = 4032;

/// Panels of a task: 96 rows and 256 columns, 700 KB of both at most.
const TASK: (usize, usize) = (8, 8);

/// Whether this machine has the instruction.
pub(crate) fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512bf16")
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A pair of bf16, the first in the lower half.
type Pair = u32;

/// The bits of a value in bfloat16.
trait Value: Copy {
    fn bits(self) -> u32;
}

impl Value for f32 {
    #[inline(always)]
    fn bits(self) -> u32 {
        bf16_bits(self)
    }
}

impl Value for u16 {
    #[inline(always)]
    fn bits(self) -> u32 {
        u32::from(self)
    }
}

#[inline(always)]
fn pair(first: impl Value, second: impl Value) -> Pair {
    second.bits() << 16 | first.bits()
}

/// What is packed of a matrix: `width` lines of `steps`, `stride` values from one line to the next, or where `by_steps` from one step to the next.
#[derive(Clone, Copy)]
struct Lines {
    by_steps: bool,
    stride: usize,
    steps: usize,
    width: usize,
}

impl Lines {
    /// Into a panel of `P` lines: `out[pair of steps][line]`.
    #[inline(always)]
    fn pack<T: Value, const P: usize>(self, from: &[T], out: &mut [Pair]) {
        if self.by_steps { self.pack_steps::<T, P>(from, out) } else { self.pack_lines::<T, P>(from, out) }
    }

    /// The values of one step lie side by side.
    #[inline(always)]
    fn pack_steps<T: Value, const P: usize>(self, from: &[T], out: &mut [Pair]) {
        for (p, out) in out.as_chunks_mut::<P>().0.iter_mut().enumerate() {
            let (lines, rest) = out.split_at_mut(self.width);
            rest.fill(0);
            let first = &from[2 * p * self.stride..][..self.width];
            if 2 * p + 1 < self.steps {
                let second = &from[(2 * p + 1) * self.stride..][..self.width];
                for ((out, x), y) in lines.iter_mut().zip(first).zip(second) {
                    *out = pair(*x, *y);
                }
            } else {
                for (out, x) in lines.iter_mut().zip(first) {
                    *out = pair(*x, 0.0);
                }
            }
        }
    }

    /// The steps of one line lie side by side.
    #[inline(always)]
    fn pack_lines<T: Value, const P: usize>(self, from: &[T], out: &mut [Pair]) {
        let whole = self.steps / 2;
        let mut turned = [[0 as Pair; TURN]; P];
        for (t, out) in out.chunks_mut(TURN * P).enumerate() {
            let n = out.len() / P;
            for (i, turned) in turned[..self.width].iter_mut().enumerate() {
                let from = &from[i * self.stride..][..self.steps];
                let at = t * TURN;
                if at + TURN <= whole {
                    for (out, x) in turned.iter_mut().zip(from[2 * at..][..2 * TURN].as_chunks::<2>().0) {
                        *out = pair(x[0], x[1]);
                    }
                } else {
                    for (k, out) in turned[..n].iter_mut().enumerate() {
                        let at = 2 * (at + k);
                        let second = if at + 1 < self.steps { from[at + 1].bits() } else { 0 };
                        *out = second << 16 | from[at].bits();
                    }
                }
            }
            for (k, out) in out.as_chunks_mut::<P>().0.iter_mut().enumerate() {
                let (lines, rest) = out.split_at_mut(self.width);
                rest.fill(0);
                for (out, turned) in lines.iter_mut().zip(&turned) {
                    *out = turned[k];
                }
            }
        }
    }
}

/// Steps that are turned around at once.
const TURN: usize = 16;

vectorized! {
    fn pack_f32(lines: Lines, panel: usize, from: &[f32], out: &mut [Pair]) {
        if panel == ROWS { lines.pack::<f32, ROWS>(from, out) } else { lines.pack::<f32, COLUMNS>(from, out) }
    }
}

vectorized! {
    fn pack_bf16(lines: Lines, panel: usize, from: &[u16], out: &mut [Pair]) {
        if panel == ROWS { lines.pack::<u16, ROWS>(from, out) } else { lines.pack::<u16, COLUMNS>(from, out) }
    }
}

/// Packs one panel of `width` rows from row `first` on, of steps `at..at + steps`.
fn pack(m: Mat<'_>, first: usize, width: usize, at: usize, steps: usize, panel: usize, out: &mut [Pair]) {
    let (line, step) = m.strides();
    let by_steps = line == 1;
    debug_assert!(by_steps || step == 1);
    let (start, lines) =
        (first * line + at * step, Lines { by_steps, stride: if by_steps { step } else { line }, steps, width });
    match m.values() {
        Values::F32(values) => pack_f32(lines, panel, &values[start..], out),
        Values::Bf16(bits) => pack_bf16(lines, panel, &bits[start..], out),
    }
}

/// `c = a b` or `c += a b` of operands rounded to bf16; the sums run in f32, in one order whatever the number of threads.
///
/// The caller has checked the shapes, and that the instruction is [`available`].
pub(crate) fn matmul(a: Mat<'_>, b: Mat<'_>, c: &mut [f32], c_stride: usize, into: Into) {
    assert!(available(), "bf16 product without its instruction");
    let (m, n, k) = (a.rows(), b.cols(), a.cols());
    if k == 0 {
        if into == Into::Write {
            c.chunks_mut(c_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let b = b.t();
    let c = Parts::new(c, c_stride);
    for column in (0..n).step_by(BLOCK) {
        let columns = BLOCK.min(n - column);
        for at in (0..k).step_by(2 * PAIRS) {
            let steps = (2 * PAIRS).min(k - at);
            let add = into == Into::Add || at > 0;
            for row in (0..m).step_by(BLOCK) {
                let rows = BLOCK.min(m - row);
                block(a, b, &c, Span { row, rows, column, columns, at, steps }, add);
            }
        }
    }
}

/// A part of a product.
#[derive(Clone, Copy)]
struct Span {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    at: usize,
    steps: usize,
}

/// One block of the result and of the steps.
fn block(a: Mat<'_>, b: Mat<'_>, c: &Parts<'_>, span: Span, add: bool) {
    let pairs = span.steps.div_ceil(2);
    let (left, right) = (span.rows.div_ceil(ROWS), span.columns.div_ceil(COLUMNS));
    let (a_len, b_len) = (ROWS * pairs, COLUMNS * pairs);
    with_scratch(left * a_len + right * b_len, |scratch| {
        let (b_panels, a_panels) = bytemuck::cast_slice_mut::<f32, Pair>(scratch).split_at_mut(right * b_len);
        let lefts =
            a_panels.par_chunks_exact_mut(a_len).enumerate().map(|(i, out)| (a, span.row, span.rows, ROWS, i, out));
        let rights = b_panels
            .par_chunks_exact_mut(b_len)
            .enumerate()
            .map(|(i, out)| (b, span.column, span.columns, COLUMNS, i, out));
        lefts.chain(rights).with_min_len(4).for_each(|(from, first, lines, panel, i, out)| {
            pack(from, first + i * panel, panel.min(lines - i * panel), span.at, span.steps, panel, out);
        });
        let (a_panels, b_panels) = (&*a_panels, &*b_panels);
        let tall = left.div_ceil(TASK.0);
        (0..tall * right.div_ceil(TASK.1)).into_par_iter().for_each(|task| {
            let (i, j) = (task % tall * TASK.0, task / tall * TASK.1);
            for j in j..(j + TASK.1).min(right) {
                let width = COLUMNS.min(span.columns - j * COLUMNS);
                for i in i..(i + TASK.0).min(left) {
                    let rows = ROWS.min(span.rows - i * ROWS);
                    let top = span.row + i * ROWS;
                    // SAFETY: every pair of panels is in one task, and its tile of `c` in no other.
                    let mut out = unsafe { c.part(top..top + rows, span.column + j * COLUMNS, width) };
                    let (a, b) = (&a_panels[i * a_len..][..a_len], &b_panels[j * b_len..][..b_len]);
                    #[cfg(target_arch = "x86_64")]
                    x86::tile(a, b, out.start(), c.stride(), (rows, width), add);
                    #[cfg(not(target_arch = "x86_64"))]
                    let _ = (a, b, &mut out, add);
                }
            }
        });
    });
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Pair, ROWS};

    /// One tile: `rows` and `width` of it are there.
    pub fn tile(a: &[Pair], b: &[Pair], c: *mut f32, stride: usize, (rows, width): (usize, usize), add: bool) {
        let pairs = a.len() / ROWS;
        assert!(a.len() == pairs * ROWS && b.len() == pairs * COLUMNS && rows <= ROWS && width <= COLUMNS);
        macro_rules! by_rows {
            ($($m:literal)*) => {
                match rows {
                    // SAFETY: `available` was asserted; the panels are as long as was checked, and `c` is the caller's tile.
                    $($m if width > 16 => unsafe { run::<$m, 2>(a, b, pairs, c, stride, width, add) },
                    // SAFETY: as above.
                    $m => unsafe { run::<$m, 1>(a, b, pairs, c, stride, width, add) },)*
                    _ => {}
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// # Safety
    /// The CPU must have the instructions, the panels `pairs` steps, and `c` the tile.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
    unsafe fn run<const M: usize, const N: usize>(
        a: &[Pair],
        b: &[Pair],
        pairs: usize,
        c: *mut f32,
        stride: usize,
        width: usize,
        add: bool,
    ) {
        let mut sums = [[_mm512_setzero_ps(); N]; M];
        let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
        // SAFETY: the caller's promises; masked lanes are neither read nor written.
        unsafe {
            for _ in 0..pairs {
                let right: [__m512bh; N] =
                    std::array::from_fn(|j| std::mem::transmute(_mm512_loadu_si512(b.add(16 * j).cast())));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left: __m512bh = std::mem::transmute(_mm512_set1_epi32(*a.add(i) as i32));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_dpbf16_ps(*sum, left, right);
                    }
                }
                a = a.add(ROWS);
                b = b.add(COLUMNS);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let mask = (u32::MAX >> (32 - width) >> (16 * j)) as u16;
                    let at = c.wrapping_add(i * stride + 16 * j);
                    let sum = if add { _mm512_add_ps(*sum, _mm512_maskz_loadu_ps(mask, at)) } else { *sum };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }
}
