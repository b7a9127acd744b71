//! Products of 8-bit integers with sums in 32 bits: exact, so that every unit and any number of threads give the same bits.
//!
//! The instruction (`vpdpbusd`) multiplies unsigned by signed bytes. So inputs are kept with 128 added, and 128 times the sum of an output's codes is taken off
//! its sum again.

use rayon::prelude::*;

use super::{BLOCK, Into, Unit, outputs_per_task, put};
use crate::kernels::panel::Parts;
use crate::kernels::scratch::with_scratch;
use crate::kernels::simd::{reduce, vectorized};

/// What is added to the codes of inputs.
const OFFSET: i32 = 128;

/// Inputs of one instruction.
const STEP: usize = 64;

/// Rows of inputs that one task has.
const ROWS: usize = 64;

/// Rows of inputs whose products are made side by side.
const SIDE: usize = 4;

/// See [`PackedMatrix::int8`](super::PackedMatrix::int8).
pub(super) struct Int8 {
    inputs: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    /// [`OFFSET`] times the sum of each output's codes.
    sums: Vec<i32>,
}

impl Int8 {
    pub fn new(codes: Vec<i8>, inputs: usize, scales: Vec<f32>) -> Self {
        let sum = |row: &[i8]| OFFSET * row.iter().map(|&c| i32::from(c)).sum::<i32>();
        let sums = codes.par_chunks_exact(inputs).map(sum).collect();
        Self { inputs, codes, scales, sums }
    }

    pub fn bytes(&self) -> usize {
        self.codes.len() + 8 * self.scales.len()
    }

    pub fn row(&self, output: usize, out: &mut [f32]) {
        scaled(&self.codes[output * self.inputs..][..self.inputs], self.scales[output], out);
    }

    pub fn product(&self, unit: Unit, x: &[f32], y: &mut [f32], into: Into) {
        let (inputs, outputs) = (self.inputs, self.scales.len());
        let (rows, stride) = (y.len() / outputs, inputs.next_multiple_of(STEP));
        with_scratch(rows * stride / 4, |scratch| {
            let codes: &mut [u8] = bytemuck::cast_slice_mut(scratch);
            let steps: Vec<f32> = codes
                .par_chunks_exact_mut(stride)
                .zip(x.par_chunks_exact(inputs))
                .with_min_len(8)
                .map(|(codes, x)| quantize(x, codes))
                .collect();
            let (codes, steps, y) = (&*codes, &steps, Parts::new(y, outputs));
            let each = outputs_per_task(inputs);
            let tall = rows.div_ceil(ROWS);
            (0..tall * outputs.div_ceil(each)).into_par_iter().for_each(|task| {
                let (row, output) = (task % tall * ROWS, task / tall * each);
                let (n, width) = (ROWS.min(rows - row), each.min(outputs - output));
                // SAFETY: each part of `y` belongs to one task.
                let mut y = unsafe { y.part(row..row + n, output, width) };
                let codes = &codes[row * stride..][..n * stride];
                for first in (0..width).step_by(BLOCK) {
                    let at = output + first;
                    let count = BLOCK.min(width - first);
                    // A block that is not full repeats its last output.
                    let weights: [&[i8]; BLOCK] =
                        std::array::from_fn(|i| &self.codes[(at + i.min(count - 1)) * inputs..][..inputs]);
                    for (i, codes) in codes.chunks(SIDE * stride).enumerate() {
                        let sums = match unit {
                            Unit::Portable => portable(weights, codes, stride),
                            #[cfg(target_arch = "x86_64")]
                            Unit::Avx512 => x86::sums(weights, codes, stride),
                        };
                        for (j, sums) in sums[..codes.len() / stride].iter().enumerate() {
                            let step = steps[row + SIDE * i + j];
                            let y = &mut y.row(SIDE * i + j)[first..first + count];
                            for (k, y) in y.iter_mut().enumerate() {
                                let sum = (sums[k] - self.sums[at + k]) as f32;
                                put(y, sum * (step * self.scales[at + k]), into);
                            }
                        }
                    }
                }
            });
        });
    }
}

vectorized! {
    fn scaled(codes: &[i8], scale: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = f32::from(*code) * scale;
        }
    }
}

vectorized! {
    /// Rounds to steps of the largest magnitude / 127, nearest and ties to even, with [`OFFSET`] added; returns the step, which is NaN where a value is not finite.
    fn quantize(x: &[f32], codes: &mut [u8]) -> f32 {
        // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let top = reduce(x, 0.0, |top, x| top.max(x.abs()), f32::max);
        // 0 where all are finite: `max` would hide a NaN.
        let odd = reduce(x, 0.0, |sum, x| sum + x * 0.0, |a, b| a + b);
        let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
        let (codes, rest) = codes.split_at_mut(x.len());
        for (code, x) in codes.iter_mut().zip(x) {
            let bits = (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
            *code = (bits as i32).wrapping_add(OFFSET) as u8;
        }
        // They meet no weight.
        rest.fill(0);
        top / 127.0 + odd
    }
}

vectorized! {
    fn dot(weights: &[i8], codes: &[u8]) -> i32 {
        let mut sum = 0;
        for (w, x) in weights.iter().zip(codes) {
            sum += i32::from(*w) * i32::from(*x);
        }
        sum
    }
}

/// The sums of up to [`SIDE`] rows of inputs.
fn portable(weights: [&[i8]; BLOCK], codes: &[u8], stride: usize) -> [[i32; BLOCK]; SIDE] {
    let mut sums = [[0; BLOCK]; SIDE];
    for (sums, codes) in sums.iter_mut().zip(codes.chunks_exact(stride)) {
        *sums = weights.map(|weights| dot(weights, codes));
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::{ahead, prefetch};
    use super::{BLOCK, SIDE, STEP};

    /// See [`portable`](super::portable).
    pub fn sums(weights: [&[i8]; BLOCK], codes: &[u8], stride: usize) -> [[i32; BLOCK]; SIDE] {
        let inputs = weights[0].len();
        assert!(stride.is_multiple_of(STEP) && stride >= inputs && weights.iter().all(|w| w.len() == inputs));
        let mut sums = [[0; BLOCK]; SIDE];
        // SAFETY: `Unit::Avx512` says that the instructions are there; weights have `inputs` codes, and rows of inputs `stride`, of which there are as many.
        unsafe {
            match codes.len() / stride {
                0 => {}
                1 => run::<1>(weights, codes, stride, &mut sums),
                2 => run::<2>(weights, codes, stride, &mut sums),
                3 => run::<3>(weights, codes, stride, &mut sums),
                _ => run::<4>(weights, codes, stride, &mut sums),
            }
        }
        sums
    }

    /// # Safety
    /// The CPU must have the instructions; all weights must be as long as the first, `codes` have `N` rows of `stride`, a multiple of [`STEP`] that is not less.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vnni")]
    unsafe fn run<const N: usize>(
        weights: [&[i8]; BLOCK],
        codes: &[u8],
        stride: usize,
        out: &mut [[i32; BLOCK]; SIDE],
    ) {
        let inputs = weights[0].len();
        let ahead = ahead(inputs);
        let mut sums = [[_mm512_setzero_si512(); BLOCK]; N];
        let mut at = 0;
        // SAFETY: the caller's promises; masked bytes are not read.
        unsafe {
            while at + STEP <= inputs {
                weights.iter().for_each(|w| prefetch(w.as_ptr().wrapping_add(at + ahead)));
                let w = weights.map(|w| _mm512_loadu_si512(w.as_ptr().add(at).cast()));
                for (j, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_loadu_si512(codes.as_ptr().add(j * stride + at).cast());
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbusd_epi32(*sum, x, w);
                    }
                }
                at += STEP;
            }
            if at < inputs {
                let mask = u64::MAX >> (STEP - (inputs - at));
                let w = weights.map(|w| _mm512_maskz_loadu_epi8(mask, w.as_ptr().add(at)));
                for (j, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_loadu_si512(codes.as_ptr().add(j * stride + at).cast());
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbusd_epi32(*sum, x, w);
                    }
                }
            }
        }
        for (sums, out) in sums.into_iter().zip(out) {
            *out = fold(sums);
        }
    }

    /// The sum of each register.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512vnni")]
    fn fold([a, b, c, d]: [__m512i; BLOCK]) -> [i32; BLOCK] {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
        let whole = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        let mut out = [0; BLOCK];
        // SAFETY: four values of 32 bits.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), whole) };
        out
    }
}
