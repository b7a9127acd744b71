//! Numbers of 16 bits: rounding to them, and keeping them in buffers of f32, two to a value.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use rayon::prelude::*;

use super::CHUNK;
use super::compact::{hash, to_bf16};
use super::simd::vectorized;
use crate::buffers::{buffer, recycle};

/// A float of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Half {
    /// 8 bits of exponent, as f32, and 8 of precision.
    Bf16,
    /// IEEE 754's: 5 bits of exponent (6e-8 to 65504), and 11 of precision.
    F16,
}

/// The upper half of `x`, rounded to nearest, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding up must not carry a NaN over into infinity or -0.
    (if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { rounded }) >> 16
}

vectorized! {
    fn pack_bf16(values: &[f32], out: &mut [u16]) {
        for (out, x) in out.iter_mut().zip(values) {
            *out = bf16_bits(*x) as u16;
        }
    }
}

vectorized! {
    fn unpack_bf16(values: &[u16], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(values) {
            *out = f32::from_bits(u32::from(*x) << 16);
        }
    }
}

vectorized! {
    fn round_bf16(values: &[f32], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(values) {
            *out = f32::from_bits(bf16_bits(*x) << 16);
        }
    }
}

impl Half {
    /// Rounds to nearest.
    fn pack_chunk(self, values: &[f32], out: &mut [u16]) {
        match self {
            Half::Bf16 => pack_bf16(values, out),
            Half::F16 => out.reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
        }
    }

    fn unpack_chunk(self, values: &[u16], out: &mut [f32]) {
        match self {
            Half::Bf16 => unpack_bf16(values, out),
            Half::F16 => values.reinterpret_cast::<f16>().convert_to_f32_slice(out),
        }
    }

    /// `values`, each rounded to the nearest number of 16 bits.
    pub fn rounded(self, values: &[f32]) -> Vec<f32> {
        let mut out = buffer(values.len());
        out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| match self {
            Half::Bf16 => round_bf16(values, out),
            Half::F16 => {
                let mut bits = [0u16; CHUNK];
                let bits = &mut bits[..values.len()];
                self.pack_chunk(values, bits);
                self.unpack_chunk(bits, out);
            }
        });
        out
    }
}

/// Values that wait in 16 bits each, in a buffer of the pool.
#[derive(Debug)]
pub(crate) struct Packed {
    half: Half,
    len: usize,
    buffer: Vec<f32>,
}

impl Packed {
    /// Rounds to nearest.
    pub fn new(half: Half, values: &[f32]) -> Self {
        let mut buffer = buffer(values.len().div_ceil(2));
        let bits = &mut bytemuck::cast_slice_mut(&mut buffer)[..values.len()];
        bits.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(out, x)| half.pack_chunk(x, out));
        Self { half, len: values.len(), buffer }
    }

    /// The values, in a buffer of the pool.
    pub fn unpack(&self) -> Vec<f32> {
        unpacked(self.half, &bytemuck::cast_slice(&self.buffer)[..self.len])
    }
}

/// The values of the bits, in a buffer of the pool.
pub(crate) fn unpacked(half: Half, bits: &[u16]) -> Vec<f32> {
    let mut out = buffer(bits.len());
    out.par_chunks_mut(CHUNK).zip(bits.par_chunks(CHUNK)).for_each(|(out, x)| half.unpack_chunk(x, out));
    out
}

/// The bits of bfloat16, rounded to nearest, or where there is a seed stochastically: up with the probability that makes the mean right.
/// These are the values of a tensor from its element `first` on.
pub(crate) fn to_bf16_bits(values: &[f32], seed: Option<u32>, first: u32, bits: &mut [u16]) {
    bits.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate().for_each(|(i, (out, x))| match seed {
        None => pack_bf16(x, out),
        Some(seed) => pack_randomly(x, seed, first.wrapping_add((i * CHUNK) as u32), out),
    });
}

vectorized! {
    fn pack_randomly(values: &[f32], seed: u32, first: u32, out: &mut [u16]) {
        for (i, (out, x)) in out.iter_mut().zip(values).enumerate() {
            *out = to_bf16(*x, hash(seed, first.wrapping_add(i as u32)));
        }
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        recycle(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Ties, denormals, the ends of both ranges, and what is not a number.
    fn values() -> Vec<f32> {
        let mut values = vec![
            0.0,
            -0.0,
            1.0,
            1.003_906_3,
            1.011_718_8,
            65504.0,
            65519.9,
            65520.0,
            -1e6,
            6e-8,
            3e-8,
            2.9e-8,
            1e-40,
            3.39e38,
            f32::MAX,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ];
        values.extend((0..20_011u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).filter(|x| !x.is_nan()));
        values
    }

    #[test]
    fn values_are_those_of_the_half_crate() {
        let values = values();
        for half in [Half::Bf16, Half::F16] {
            let want: Vec<f32> = values
                .iter()
                .map(|&x| if half == Half::Bf16 { bf16::from_f32(x).to_f32() } else { f16::from_f32(x).to_f32() })
                .collect();
            for n in [0, 1, 2, 7, 33, values.len()] {
                let packed = Packed::new(half, &values[..n]);
                assert_eq!(packed.buffer.len(), n.div_ceil(2));
                assert_eq!(packed.unpack(), want[..n], "{half:?} {n}");
                assert_eq!(half.rounded(&values[..n]), want[..n], "{half:?} {n}");
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        let values = [0x7fff_ffffu32, 0xffff_ffff, 0x7f80_0001, 0xff80_0001].map(f32::from_bits);
        for half in [Half::Bf16, Half::F16] {
            assert!(Packed::new(half, &values).unpack().iter().all(|x| x.is_nan()), "{half:?}");
        }
    }
}
