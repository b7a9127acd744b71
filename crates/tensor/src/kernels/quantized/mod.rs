//! Matrices of integers, as quantization makes them, and their products with rows of f32.
//!
//! With one token a product waits for memory: each weight is read once. So the weights stay as small in memory as in the file, and become numbers in
//! registers. 8 bits multiply as integers ([`int8`]); of 4 bits the values are looked up and multiply in f32 ([`int4`]).

mod int4;
mod int8;

use half::f16;

use super::matmul::Into;
use crate::buffers::fresh;

/// Levels of a 4-bit code.
const LEVELS: usize = 16;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Plain loops, compiled for the machine's vectors.
    Portable,
    /// AVX-512 with its dot product of bytes (VNNI).
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The fastest that this machine has.
pub(crate) fn unit() -> Unit {
    #[cfg(target_arch = "x86_64")]
    {
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        let available = AVAILABLE.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
        });
        if *available {
            return Unit::Avx512;
        }
    }
    Unit::Portable
}

/// Arrays that do not make a matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("packed matrix: {what}: expected {expected}, got {got}")]
pub struct PackedError {
    /// What is wrong.
    pub what: &'static str,
    /// What would fit.
    pub expected: String,
    /// What was given.
    pub got: String,
}

/// Factors of 4-bit codes, one per group of inputs, output by output.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// In f32.
    F32(Vec<f32>),
    /// Bits of IEEE half precision.
    F16(Vec<u16>),
}

impl Scales {
    fn len(&self) -> usize {
        match self {
            Scales::F32(values) => values.len(),
            Scales::F16(bits) => bits.len(),
        }
    }

    fn get(&self, i: usize) -> f32 {
        match self {
            Scales::F32(values) => values[i],
            Scales::F16(bits) => f16::from_bits(bits[i]).to_f32(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::F32(values) => 4 * values.len(),
            Scales::F16(bits) => 2 * bits.len(),
        }
    }
}

/// A `[outputs, inputs]` matrix of 8-bit or 4-bit integers with their scales: the weight of a linear layer, or a table whose rows are looked up.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    store: Store,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix([{}, {}], {} bytes)", self.outputs, self.inputs, self.bytes())
    }
}

enum Store {
    Int8(int8::Int8),
    Int4(int4::Int4),
}

impl PackedMatrix {
    /// The most inputs that [`int8`](Self::int8) takes: sums of more products could overflow 32 bits.
    pub const MAX_INT8_INPUTS: usize = 1 << 15;

    /// Signed bytes with a scale for each output: `w[o][i] = scales[o] codes[o][i]`. In products the inputs of each row are rounded to 8 bits as well (W8A8), to
    /// steps of their largest magnitude / 127, as LLM.int8() does (Dettmers et al., arXiv:2208.07339, section 3).
    ///
    /// # Shapes
    /// - `codes`: `[outputs, inputs]`, row-major; `scales`: `[outputs]`
    ///
    /// # Errors
    /// [`PackedError`]: lengths that do not fit, or more than 32768 inputs.
    pub fn int8([outputs, inputs]: [usize; 2], codes: &[i8], scales: Vec<f32>) -> Result<Self, PackedError> {
        let elements = checked([outputs, inputs])?;
        check_length("codes", codes.len(), elements)?;
        check_length("scales", scales.len(), outputs)?;
        if inputs > Self::MAX_INT8_INPUTS {
            return Err(error("inputs of 8-bit integers", format!("at most {}", Self::MAX_INT8_INPUTS), inputs));
        }
        let mut copy = fresh::<i8>(elements);
        copy.copy_from_slice(codes);
        Ok(Self { outputs, inputs, store: Store::Int8(int8::Int8::new(copy, inputs, scales)) })
    }

    /// Codes of 4 bits in groups of `group` inputs, the last of which may be shorter: `w[o][i] = scales[o][g] (levels[codes[o][i]] - zeros[o][g])` with g the group
    /// of i. Products multiply these values in f32 (W4A16 in the terms of the papers, with activations in f32).
    ///
    /// # Shapes
    /// - `codes`: `[outputs, ceil(inputs / 2)]` bytes, the first of two codes in the lower half; `scales`, `zeros`: `[outputs, ceil(inputs / group)]`
    ///
    /// # Errors
    /// [`PackedError`]: lengths that do not fit, or a group for which there is no kernel: it has to be a multiple of 8 that divides 128, or a multiple of 128, or
    /// cover all inputs.
    pub fn int4(
        [outputs, inputs]: [usize; 2],
        group: usize,
        codes: &[u8],
        scales: Scales,
        zeros: Option<Vec<u8>>,
        levels: [f32; LEVELS],
    ) -> Result<Self, PackedError> {
        checked([outputs, inputs])?;
        if !Self::has_group(inputs, group) {
            return Err(error("group", "8, 16, 32, 64 or a multiple of 128".into(), group));
        }
        let groups = inputs.div_ceil(group);
        let width = inputs.div_ceil(2);
        check_length("codes", codes.len(), outputs * width)?;
        check_length("scales", scales.len(), outputs * groups)?;
        if let Some(zeros) = &zeros {
            check_length("zero points", zeros.len(), outputs * groups)?;
        }
        let store = Store::Int4(int4::Int4::new(inputs, group, codes, scales, zeros, levels));
        Ok(Self { outputs, inputs, store })
    }

    /// Whether [`int4`](Self::int4) takes groups of this size.
    pub fn has_group(inputs: usize, group: usize) -> bool {
        group > 0 && (group.is_multiple_of(128) || group.is_multiple_of(8) && 128 % group == 0 || group >= inputs)
    }

    /// `[outputs, inputs]`
    pub fn shape(&self) -> [usize; 2] {
        [self.outputs, self.inputs]
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::Int8(w) => w.bytes(),
            Store::Int4(w) => w.bytes(),
        }
    }

    /// The values of a row, in f32.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as one.
    pub fn row(&self, output: usize, out: &mut [f32]) {
        assert!(output < self.outputs, "packed matrix: row {output} of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "packed matrix: a row has {} values", self.inputs);
        match &self.store {
            Store::Int8(w) => w.row(output, out),
            Store::Int4(w) => w.row(output, out),
        }
    }

    /// All values, `[outputs, inputs]` in f32: what the codes mean.
    pub fn dequantized(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.outputs * self.inputs];
        for (o, row) in values.chunks_exact_mut(self.inputs.max(1)).enumerate() {
            self.row(o, row);
        }
        values
    }

    /// `y = x w^T` or `y += x w^T`, rows of `inputs` and `outputs` values.
    pub(crate) fn product(&self, x: &[f32], y: &mut [f32], into: Into) {
        self.product_on(unit(), x, y, into);
    }

    fn product_on(&self, unit: Unit, x: &[f32], y: &mut [f32], into: Into) {
        let rows = y.len().checked_div(self.outputs).unwrap_or(0);
        assert!(x.len() == rows * self.inputs && y.len() == rows * self.outputs, "packed product: shapes do not fit");
        if y.is_empty() {
            return;
        }
        match &self.store {
            Store::Int8(w) => w.product(unit, x, y, into),
            Store::Int4(w) => w.product(unit, x, y, into),
        }
    }
}

fn error(what: &'static str, expected: String, got: impl std::fmt::Display) -> PackedError {
    PackedError { what, expected, got: got.to_string() }
}

fn checked([outputs, inputs]: [usize; 2]) -> Result<usize, PackedError> {
    match outputs.checked_mul(inputs) {
        Some(elements) if elements > 0 => Ok(elements),
        _ => Err(error("shape", "at least one row and column".into(), format!("[{outputs}, {inputs}]"))),
    }
}

fn check_length(what: &'static str, got: usize, expected: usize) -> Result<(), PackedError> {
    if got == expected { Ok(()) } else { Err(error(what, format!("{expected} of them"), got)) }
}

/// Writes or adds.
#[inline(always)]
fn put(y: &mut f32, value: f32, into: Into) {
    match into {
        Into::Write => *y = value,
        Into::Add => *y += value,
    }
}

/// How many outputs one task has: about 64 KB of weights of `row_bytes` each, in whole blocks of [`BLOCK`].
fn outputs_per_task(row_bytes: usize) -> usize {
    ((64 << 10) / row_bytes.max(1)).clamp(BLOCK, 256).next_multiple_of(BLOCK)
}

/// How many bytes behind a code of a block its fellow in a later block lies, which is asked for meanwhile: the hardware does not look ahead where the
/// rows of a block are read side by side.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ahead(row_bytes: usize) -> usize {
    const ENOUGH: usize = 4 << 10;
    let block = BLOCK * row_bytes.max(1);
    block * ENOUGH.div_ceil(block)
}

/// Asks for the memory at `at`, which need not be anyone's.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which no address makes fail.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// Outputs whose products are made side by side.
const BLOCK: usize = 4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hashed(i: usize, seed: usize) -> usize {
        (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33
    }

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (hashed(i, seed) % 2001) as f32 / 1000.0 - 1.0).collect()
    }

    fn units() -> Vec<Unit> {
        let mut units = vec![Unit::Portable];
        if unit() != Unit::Portable {
            units.push(unit());
        }
        units
    }

    const SHAPES: [(usize, usize, usize); 10] = [
        (1, 1, 1),
        (1, 5, 8),
        (2, 4, 63),
        (3, 7, 64),
        (5, 33, 130),
        (4, 130, 65),
        (17, 9, 257),
        (1, 301, 768),
        (66, 70, 96),
        (40, 3, 1),
    ];

    /// The definition: inputs rounded to integers, a sum of integers, and two factors.
    #[test]
    fn products_of_bytes_are_the_sums_of_integers() {
        for (rows, outputs, inputs) in SHAPES {
            let x = values(rows * inputs, 3);
            let codes: Vec<i8> = (0..outputs * inputs).map(|i| hashed(i, 5) as i8).collect();
            let scales: Vec<f32> = values(outputs, 7).iter().map(|s| s.abs() * 0.01 + 1e-3).collect();
            let w = PackedMatrix::int8([outputs, inputs], &codes, scales.clone()).unwrap();
            let mut want = vec![0f64; rows * outputs];
            for (x, want) in x.chunks_exact(inputs).zip(want.chunks_exact_mut(outputs)) {
                let top = x.iter().fold(0f32, |top, x| top.max(x.abs()));
                let rounded: Vec<i64> = x.iter().map(|x| (x * (127.0 / top)).round_ties_even() as i64).collect();
                for (o, want) in want.iter_mut().enumerate() {
                    let sum: i64 = rounded.iter().zip(&codes[o * inputs..]).map(|(x, w)| x * i64::from(*w)).sum();
                    *want = sum as f64 * f64::from(top) / 127.0 * f64::from(scales[o]);
                }
            }
            for unit in units() {
                for into in [Into::Write, Into::Add] {
                    let mut y = vec![0.5; rows * outputs];
                    w.product_on(unit, &x, &mut y, into);
                    let start = if into == Into::Add { 0.5 } else { 0.0 };
                    for (i, (y, want)) in y.iter().zip(&want).enumerate() {
                        let error = (f64::from(*y) - start - want).abs();
                        assert!(error < 1e-6 + 1e-5 * want.abs(), "{unit:?} {rows}x{outputs}x{inputs} {i}: {y} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_four_bits_are_those_of_their_values() {
        let even: [f32; 16] = std::array::from_fn(|c| c as f32 - 8.0);
        let uneven: [f32; 16] = std::array::from_fn(|c| (c as f32 - 7.3).powi(3) / 400.0);
        for (rows, outputs, inputs) in SHAPES {
            for group in [8, 32, 64, 128, 256, 1 << 20] {
                let groups = inputs.div_ceil(group);
                let x = values(rows * inputs, 3);
                let codes: Vec<u8> = (0..outputs * inputs.div_ceil(2)).map(|i| hashed(i, 9) as u8).collect();
                let scales = values(outputs * groups, 11);
                let zeros: Vec<u8> = (0..outputs * groups).map(|i| (hashed(i, 13) % 16) as u8).collect();
                for (case, levels) in [even, uneven, even, uneven].into_iter().enumerate() {
                    let stored = match case {
                        0 | 3 => Scales::F32(scales.clone()),
                        _ => Scales::F16(scales.iter().map(|s| f16::from_f32(*s).to_bits()).collect()),
                    };
                    let zeros = (case >= 2).then(|| zeros.clone());
                    let value = |o: usize, i: usize| {
                        let byte = codes[o * inputs.div_ceil(2) + i / 2];
                        let (code, g) =
                            (if i.is_multiple_of(2) { byte & 15 } else { byte >> 4 }, o * groups + i / group);
                        let zero = zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros[g]));
                        stored.get(g) * (levels[usize::from(code)] - zero)
                    };
                    let values: Vec<f32> = (0..outputs * inputs).map(|i| value(i / inputs, i % inputs)).collect();
                    let w = PackedMatrix::int4([outputs, inputs], group, &codes, stored.clone(), zeros.clone(), levels)
                        .unwrap();
                    assert_eq!(w.dequantized(), values);
                    for unit in units() {
                        for into in [Into::Write, Into::Add] {
                            let mut y = vec![0.5; rows * outputs];
                            w.product_on(unit, &x, &mut y, into);
                            let start = if into == Into::Add { 0.5 } else { 0.0 };
                            for (i, y) in y.iter().enumerate() {
                                let (x, w) = (&x[i / outputs * inputs..][..inputs], &values[i % outputs * inputs..]);
                                let want: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                                let scale: f64 = x.iter().zip(w).map(|(x, _)| f64::from(x.abs())).sum();
                                let error = (f64::from(*y) - start - want).abs();
                                assert!(
                                    error < 1e-5 * (1.0 + scale),
                                    "{unit:?} {rows}x{outputs}x{inputs} group {group} case {case} {i}: {y} {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_reaches_the_product() {
        let eight = PackedMatrix::int8([5, 70], &[1; 350], vec![1.0; 5]).unwrap();
        let four = PackedMatrix::int4([5, 70], 32, &[0x99; 175], Scales::F32(vec![1.0; 15]), None, [1.0; 16]).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for rows in [1, 40] {
                let mut x = vec![1.0; 70 * rows];
                x[69] = bad;
                for w in [&eight, &four] {
                    for unit in units() {
                        let mut y = vec![0.0; 5 * rows];
                        w.product_on(unit, &x, &mut y, Into::Write);
                        assert!(y[..5].iter().all(|y| !y.is_finite()), "{unit:?} {bad}: {y:?}");
                        assert!(y[5..].iter().all(|y| (y - 70.0).abs() < 1e-4), "{unit:?} {bad}: {y:?}");
                    }
                }
            }
        }
        // A row of zeros has no largest magnitude.
        for unit in units() {
            let mut y = [1.0; 5];
            eight.product_on(unit, &[0.0; 70], &mut y, Into::Write);
            assert_eq!(y, [0.0; 5]);
        }
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        let refused = |result: Result<PackedMatrix, PackedError>| result.unwrap_err().what;
        let four = |group, codes: usize, scales: usize, zeros: Option<usize>| {
            let (scales, zeros) = (Scales::F16(vec![0; scales]), zeros.map(|n| vec![0; n]));
            PackedMatrix::int4([3, 65], group, &vec![0; codes], scales, zeros, [0.0; 16])
        };
        assert_eq!(refused(PackedMatrix::int8([2, 3], &[0; 5], vec![1.0; 2])), "codes");
        assert_eq!(refused(PackedMatrix::int8([2, 3], &[0; 6], vec![1.0; 3])), "scales");
        assert_eq!(refused(PackedMatrix::int8([0, 3], &[], vec![])), "shape");
        assert_eq!(refused(PackedMatrix::int8([usize::MAX, 3], &[], vec![])), "shape");
        assert_eq!(refused(PackedMatrix::int8([1, 40_000], &[0; 40_000], vec![1.0])), "inputs of 8-bit integers");
        assert_eq!(refused(four(24, 99, 9, None)), "group");
        assert_eq!(refused(four(32, 98, 9, None)), "codes");
        assert_eq!(refused(four(32, 99, 6, None)), "scales");
        assert_eq!(refused(four(32, 99, 9, Some(3))), "zero points");
        assert_eq!(four(32, 99, 9, Some(9)).unwrap().bytes(), 3 * 36 + 18 + 9 + 64);
    }
}
