//! Products with values of 4-bit codes, which become numbers in registers.
//!
//! 128 inputs are a block: 16 words of 8 codes. Step k of a block takes code k of every word, and so the inputs k, k + 8, ...: they are put into this order once
//! for all outputs. A group is some of the words, so that its scale multiplies their sums.

use rayon::prelude::*;

use super::{BLOCK, Into, LEVELS, Scales, Unit, outputs_per_task, put};
use crate::buffers::fresh;
use crate::kernels::matmul::{Compute, Mat, matmul};
use crate::kernels::panel::Parts;
use crate::kernels::scratch::with_scratch;
use crate::kernels::simd::vectorized;

/// Inputs of a block.
const WIDTH: usize = 128;

/// Words of a block, and codes of a word.
const WORDS: usize = 16;
const CODES: usize = 8;

/// From so many rows on, values are decoded once for all of them instead of for each.
const MANY: usize = 16;

/// Values that are decoded at once: 4 MB.
const DECODED: usize = 1 << 20;

/// See [`PackedMatrix::int4`](super::PackedMatrix::int4).
pub(super) struct Int4 {
    inputs: usize,
    outputs: usize,
    /// Bytes of an output's codes: whole words.
    stride: usize,
    codes: Vec<u8>,
    /// Inputs of a group.
    group: usize,
    scales: Scales,
    zeros: Option<Vec<u8>>,
    levels: [f32; LEVELS],
    /// What the levels are, less than their number, where they are evenly spaced by 1.
    offset: Option<f32>,
}

/// Rows of inputs in the order of the steps, and the sums of each block's groups.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    x: &'a [f32],
    sums: &'a [f32],
}

impl Int4 {
    pub fn new(
        inputs: usize,
        group: usize,
        codes: &[u8],
        scales: Scales,
        zeros: Option<Vec<u8>>,
        levels: [f32; LEVELS],
    ) -> Self {
        let (width, stride) = (inputs.div_ceil(2), inputs.div_ceil(CODES) * 4);
        let outputs = codes.len() / width;
        let mut copy = fresh::<u8>(outputs * stride);
        for (copy, codes) in copy.chunks_exact_mut(stride).zip(codes.chunks_exact(width)) {
            copy[..width].copy_from_slice(codes);
        }
        let even = levels.windows(2).all(|pair| pair[1] - pair[0] == 1.0);
        Self {
            inputs,
            outputs,
            stride,
            codes: copy,
            // Inputs that one group covers are one whatever its size.
            group: if group >= inputs { inputs.next_multiple_of(WIDTH) } else { group },
            scales,
            zeros,
            levels,
            offset: even.then_some(-levels[0]),
        }
    }

    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes() + self.zeros.as_ref().map_or(0, Vec::len) + 4 * LEVELS
    }

    /// Groups of an output.
    fn groups(&self) -> usize {
        self.inputs.div_ceil(self.group)
    }

    /// Groups of a block.
    fn per_block(&self) -> usize {
        (WIDTH / self.group).max(1)
    }

    /// A block's first group, and how many it has.
    #[inline(always)]
    fn groups_of(&self, block: usize) -> (usize, usize) {
        let first = block * WIDTH / self.group;
        (first, self.per_block().min(self.groups() - first))
    }

    pub fn row(&self, output: usize, out: &mut [f32]) {
        let codes = &self.codes[output * self.stride..][..self.stride];
        let groups = self.groups();
        for (g, out) in out.chunks_mut(self.group).enumerate() {
            let at = output * groups + g;
            let zero = self.zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros[at]));
            let scale = self.scales.get(at);
            let values = self.levels.map(|level| scale * (level - zero));
            let start = g * self.group / 2;
            for (out, byte) in out.chunks_mut(2).zip(&codes[start..]) {
                out[0] = values[usize::from(byte & 15)];
                if let Some(second) = out.get_mut(1) {
                    *second = values[usize::from(byte >> 4)];
                }
            }
        }
    }

    pub fn product(&self, unit: Unit, x: &[f32], y: &mut [f32], into: Into) {
        let rows = y.len() / self.outputs;
        if rows >= MANY { self.product_of_values(x, y, into) } else { self.product_of_codes(unit, x, y, into) }
    }

    /// Of many rows: some outputs' values are decoded, and multiplied as any matrix.
    fn product_of_values(&self, x: &[f32], y: &mut [f32], into: Into) {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let rows = y.len() / outputs;
        let each = (DECODED / inputs).clamp(1, outputs);
        let x = Mat::new(x, rows, inputs, inputs);
        with_scratch(each * inputs, |values| {
            for first in (0..outputs).step_by(each) {
                let n = each.min(outputs - first);
                let values = &mut values[..n * inputs];
                values.par_chunks_exact_mut(inputs).enumerate().for_each(|(i, out)| self.row(first + i, out));
                let values = Mat::new(values, n, inputs, inputs);
                matmul(Compute::F32, x, values.t(), &mut y[first..], outputs, into);
            }
        });
    }

    /// Of few rows: each weight is decoded in registers, where it is used.
    fn product_of_codes(&self, unit: Unit, x: &[f32], y: &mut [f32], into: Into) {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let rows = y.len() / outputs;
        let blocks = inputs.div_ceil(WIDTH);
        let (width, n_sums) = (blocks * WIDTH, blocks * self.per_block());
        with_scratch(rows * (width + n_sums), |scratch| {
            let (ordered, sums) = scratch.split_at_mut(rows * width);
            for ((x, ordered), sums) in
                x.chunks_exact(inputs).zip(ordered.chunks_exact_mut(width)).zip(sums.chunks_exact_mut(n_sums))
            {
                order(x, self.group.min(WIDTH), ordered, sums);
            }
            let (ordered, sums, y) = (&*ordered, &*sums, Parts::new(y, outputs));
            let each = outputs_per_task(self.stride);
            (0..outputs.div_ceil(each)).into_par_iter().for_each(|task| {
                let output = task * each;
                let count = each.min(outputs - output);
                // SAFETY: each output belongs to one task.
                let mut y = unsafe { y.part(0..rows, output, count) };
                for first in (0..count).step_by(BLOCK) {
                    let n = BLOCK.min(count - first);
                    for (row, (x, sums)) in ordered.chunks_exact(width).zip(sums.chunks_exact(n_sums)).enumerate() {
                        let x = Inputs { x, sums };
                        let out = &mut y.row(row)[first..first + n];
                        let at = output + first;
                        match unit {
                            Unit::Portable => {
                                for (i, y) in out.iter_mut().enumerate() {
                                    put(y, portable(self, at + i, x), into);
                                }
                            }
                            #[cfg(target_arch = "x86_64")]
                            Unit::Avx512 => {
                                let values = x86::outputs(self, at, n, x);
                                for (y, value) in out.iter_mut().zip(values) {
                                    put(y, value, into);
                                }
                            }
                        }
                    }
                }
            });
        });
    }
}

/// Puts a row of inputs into the order of the steps, with zeros behind the last, and sums them up by groups of at most a block.
fn order(x: &[f32], group: usize, ordered: &mut [f32], sums: &mut [f32]) {
    let mut padded = [0.0; WIDTH];
    let per_block = WIDTH / group;
    let blocks = ordered.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums.chunks_exact_mut(per_block));
    for (x, (ordered, sums)) in x.chunks(WIDTH).zip(blocks) {
        padded.fill(0.0);
        padded[..x.len()].copy_from_slice(x);
        for (k, step) in ordered.as_chunks_mut::<WORDS>().0.iter_mut().enumerate() {
            for (word, out) in step.iter_mut().enumerate() {
                *out = padded[CODES * word + k];
            }
        }
        for (sum, x) in sums.iter_mut().zip(padded.chunks_exact(group)) {
            *sum = x.iter().sum();
        }
    }
}

vectorized! {
    /// One output of one row.
    fn portable(w: &Int4, output: usize, inputs: Inputs<'_>) -> f32 {
        let codes = &w.codes[output * w.stride..][..w.stride];
        let (groups, per_block) = (w.groups(), w.per_block());
        let mut total = 0.0;
        for (block, x) in inputs.x.as_chunks::<WIDTH>().0.iter().enumerate() {
            let mut words = [0u32; WORDS];
            for (word, bytes) in words.iter_mut().zip(codes[block * WIDTH / 2..].as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*bytes);
            }
            let mut lanes = [0f32; WORDS];
            for (k, x) in x.as_chunks::<WORDS>().0.iter().enumerate() {
                for i in 0..WORDS {
                    let code = words[i] >> (4 * k) & 15;
                    let level = match w.offset {
                        Some(offset) => code as i32 as f32 - offset,
                        None => w.levels[code as usize],
                    };
                    lanes[i] += level * x[i];
                }
            }
            let (first, n) = w.groups_of(block);
            for (g, lanes) in lanes.chunks_exact(WORDS / per_block).enumerate().take(n) {
                let at = output * groups + first + g;
                let zero = w.zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros[at]));
                let sum: f32 = lanes.iter().sum();
                total += w.scales.get(at) * (sum - zero * inputs.sums[block * per_block + g]);
            }
        }
        total
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::{ahead, prefetch};
    use super::{BLOCK, CODES, Inputs, Int4, Scales, WIDTH, WORDS};

    /// `n` outputs from `first` on, of one row.
    pub fn outputs(w: &Int4, first: usize, n: usize, x: Inputs<'_>) -> [f32; BLOCK] {
        let blocks = w.inputs.div_ceil(WIDTH);
        let per_output = w.groups();
        assert!(n <= BLOCK && first + n <= w.outputs);
        assert!(w.codes.len() == w.outputs * w.stride && w.stride == 4 * w.inputs.div_ceil(CODES));
        assert!(w.scales.len() == w.outputs * per_output);
        assert!(w.zeros.as_ref().is_none_or(|zeros| zeros.len() == w.outputs * per_output));
        assert!(x.x.len() == blocks * WIDTH && x.sums.len() == blocks * w.per_block());
        let mut out = [0.0; BLOCK];
        // SAFETY: `Unit::Avx512` says that the instructions are there; the lengths are those that were checked.
        unsafe {
            match (n, &w.scales) {
                (BLOCK, Scales::F32(scales)) => out = run::<BLOCK, f32>(w, first, scales, x),
                (BLOCK, Scales::F16(scales)) => out = run::<BLOCK, u16>(w, first, scales, x),
                (_, Scales::F32(scales)) => {
                    (0..n).for_each(|i| [out[i]] = run::<1, f32>(w, first + i, scales, x));
                }
                (_, Scales::F16(scales)) => {
                    (0..n).for_each(|i| [out[i]] = run::<1, u16>(w, first + i, scales, x));
                }
            }
        }
        out
    }

    trait Scale: Copy {
        /// # Safety
        /// The CPU must have the instructions, and the masked values be there.
        unsafe fn load(at: *const Self, mask: u16) -> __m512;
    }

    impl Scale for f32 {
        #[inline]
        #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
        unsafe fn load(at: *const f32, mask: u16) -> __m512 {
            // SAFETY: the caller's promise.
            unsafe { _mm512_maskz_loadu_ps(mask, at) }
        }
    }

    impl Scale for u16 {
        #[inline]
        #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
        unsafe fn load(at: *const u16, mask: u16) -> __m512 {
            // SAFETY: the caller's promise.
            _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, at.cast()) })
        }
    }

    /// # Safety
    /// The CPU must have the instructions, `R` outputs from `first` on be there, and all lengths fit.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw")]
    unsafe fn run<const R: usize, S: Scale>(w: &Int4, first: usize, scales: &[S], inputs: Inputs<'_>) -> [f32; R] {
        let (groups, per_block) = (w.groups(), w.per_block());
        let codes = w.codes.as_ptr().wrapping_add(first * w.stride);
        let scales = scales.as_ptr().wrapping_add(first * groups);
        let zeros = w.zeros.as_ref().map(|zeros| zeros.as_ptr().wrapping_add(first * groups));
        // Which of a block's groups each word is in.
        let word = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let group_of = _mm512_srl_epi32(word, _mm_cvtsi32_si128((WORDS / per_block).ilog2() as i32));
        let ahead = ahead(w.stride);
        let mut totals = [_mm512_setzero_ps(); R];
        // SAFETY: the caller's promises; masked values are not read.
        unsafe {
            let levels = _mm512_loadu_ps(w.levels.as_ptr());
            for block in 0..w.inputs.div_ceil(WIDTH) {
                let words = (w.stride / 4 - WORDS * block).min(WORDS);
                let word_mask = (u32::from(u16::MAX) >> (WORDS - words)) as u16;
                let (group, n) = w.groups_of(block);
                let group_mask = (u32::from(u16::MAX) >> (WORDS - n)) as u16;
                let x: [__m512; CODES] =
                    std::array::from_fn(|k| _mm512_loadu_ps(inputs.x.as_ptr().add(block * WIDTH + k * WORDS)));
                let sums = _mm512_maskz_loadu_ps(group_mask, inputs.sums.as_ptr().add(block * per_block));
                for (r, total) in totals.iter_mut().enumerate() {
                    let at = codes.add(r * w.stride + block * WIDTH / 2);
                    prefetch(at.wrapping_add(ahead));
                    let codes = _mm512_maskz_loadu_epi32(word_mask, at.cast());
                    // Of an index, the instruction looks at the lowest 4 bits alone.
                    macro_rules! step {
                        ($k:literal, $sum:expr) => {{
                            let index = _mm512_srli_epi32::<{ 4 * $k }>(codes);
                            _mm512_fmadd_ps(_mm512_permutexvar_ps(index, levels), x[$k as usize], $sum)
                        }};
                    }
                    let even = _mm512_mul_ps(_mm512_permutexvar_ps(codes, levels), x[0]);
                    let odd = step!(1, _mm512_setzero_ps());
                    let (even, odd) = (step!(2, even), step!(3, odd));
                    let (even, odd) = (step!(4, even), step!(5, odd));
                    let (even, odd) = (step!(6, even), step!(7, odd));
                    let scale = S::load(scales.add(r * groups + group), group_mask);
                    let of_words = _mm512_permutexvar_ps(group_of, scale);
                    *total = _mm512_fmadd_ps(_mm512_add_ps(even, odd), of_words, *total);
                    if let Some(zeros) = zeros {
                        let zeros = _mm_maskz_loadu_epi8(group_mask, zeros.add(r * groups + group).cast());
                        let zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros));
                        *total = _mm512_fnmadd_ps(_mm512_mul_ps(scale, zeros), sums, *total);
                    }
                }
            }
        }
        totals.map(|total| _mm512_reduce_add_ps(total))
    }
}
