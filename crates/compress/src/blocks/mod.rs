//! GGUF's quantized formats: rows of blocks, each with its scale.
//!
//! A row of a matrix is cut into blocks of 32 values (256 in the K formats). A block holds one or two numbers in f16, from which the value of each of its
//! small integers follows: `d q`, or `d q + m`. The K formats have a second level: scales (and minima) of blocks of 16 or 32 are integers themselves,
//! under a scale of the 256.
//!
//! | | bits a weight | a block | value |
//! |---|---|---|---|
//! | `Q8_0` | 8.5 | 32 | `d q`, q from −127 to 127 |
//! | `Q5_0` | 5.5 | 32 | `d (q − 16)` |
//! | `Q5_1` | 6 | 32 | `d q + m` |
//! | `Q4_0` | 4.5 | 32 | `d (q − 8)` |
//! | `Q4_1` | 5 | 32 | `d q + m` |
//! | `Q6_K` | 6.5625 | 256 | `d s (q − 32)`, a scale s for each 16 |
//! | `Q4_K` | 4.5 | 256 | `d s q − e m`, s and m of 6 bits for each 32 |

mod k;
mod simple;

use std::fmt;

use half::{bf16, f16};

/// How the values of a tensor are stored in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the format")]
pub enum BlockType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit integers, a scale.
    Q8_0,
    /// 5-bit integers, a scale.
    Q5_0,
    /// 5-bit integers, a scale and a minimum.
    Q5_1,
    /// 4-bit integers, a scale.
    Q4_0,
    /// 4-bit integers, a scale and a minimum.
    Q4_1,
    /// 6-bit integers, scales of two levels.
    Q6_K,
    /// 4-bit integers, scales and minima of two levels.
    Q4_K,
}

use BlockType::{BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0};

/// A tensor that a format cannot hold.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// Rows are not whole blocks.
    #[error(
        "{format}: expected rows of a multiple of {block} values, got {columns}: choose a format with smaller blocks, or keep this tensor in f16"
    )]
    Rows {
        /// The format.
        format: BlockType,
        /// Values of a block.
        block: usize,
        /// Values of a row.
        columns: usize,
    },
    /// Data of another length.
    #[error("{format}: expected {expected} bytes for {values} values, got {got}: the file is torn or no such tensor")]
    Bytes {
        /// The format.
        format: BlockType,
        /// Bytes.
        expected: usize,
        /// Values.
        values: usize,
        /// Bytes.
        got: usize,
    },
    /// A value that has no place in any block.
    #[error(
        "{format}: expected finite values, got {value} at {index}: this model is damaged, or training has diverged"
    )]
    NotFinite {
        /// The format.
        format: BlockType,
        /// Which one.
        index: usize,
        /// The value.
        value: f32,
    },
}

impl BlockType {
    /// All of them, by falling size.
    pub const ALL: [Self; 10] = [F32, F16, BF16, Q8_0, Q6_K, Q5_1, Q5_0, Q4_1, Q4_0, Q4_K];

    /// Its name in GGUF tools.
    pub fn name(self) -> &'static str {
        match self {
            F32 => "F32",
            F16 => "F16",
            BF16 => "BF16",
            Q8_0 => "Q8_0",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q6_K => "Q6_K",
            Q4_K => "Q4_K",
        }
    }

    /// Its number in files.
    pub fn id(self) -> u32 {
        match self {
            F32 => 0,
            F16 => 1,
            Q4_0 => 2,
            Q4_1 => 3,
            Q5_0 => 6,
            Q5_1 => 7,
            Q8_0 => 8,
            Q4_K => 12,
            Q6_K => 14,
            BF16 => 30,
        }
    }

    /// The one of this number.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.id() == id)
    }

    /// Values of a block.
    pub fn block_len(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q8_0 | Q5_0 | Q5_1 | Q4_0 | Q4_1 => 32,
            Q6_K | Q4_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q8_0 => 34,
            Q5_0 => 22,
            Q5_1 => 24,
            Q4_0 => 18,
            Q4_1 => 20,
            Q6_K => 210,
            Q4_K => 144,
        }
    }

    /// Bits that a weight takes, scales and all.
    pub fn bits_per_weight(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Bytes of so many values in rows of `columns`.
    ///
    /// # Errors
    /// [`BlockError::Rows`].
    pub fn bytes(self, values: usize, columns: usize) -> Result<usize, BlockError> {
        if !columns.is_multiple_of(self.block_len()) {
            return Err(BlockError::Rows { format: self, block: self.block_len(), columns });
        }
        Ok(values / self.block_len() * self.block_bytes())
    }

    /// Appends the blocks of `values`, rows of `columns` one after the other.
    ///
    /// # Errors
    /// [`BlockError`]: rows that are not whole blocks, values that are not finite.
    pub fn quantize(self, values: &[f32], columns: usize, out: &mut Vec<u8>) -> Result<(), BlockError> {
        let bytes = self.bytes(values.len(), columns)?;
        if let Some((index, &value)) = values.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            return Err(BlockError::NotFinite { format: self, index, value });
        }
        out.reserve(bytes);
        match self {
            F32 => values.iter().for_each(|x| out.extend(x.to_le_bytes())),
            F16 => values.iter().for_each(|x| out.extend(f16::from_f32(*x).to_le_bytes())),
            BF16 => values.iter().for_each(|x| out.extend(bf16::from_f32(*x).to_le_bytes())),
            Q8_0 => blocks(values).for_each(|block| simple::q8_0(block, out)),
            Q5_0 => blocks(values).for_each(|block| simple::with_scale::<5>(block, out)),
            Q5_1 => blocks(values).for_each(|block| simple::with_minimum::<5>(block, out)),
            Q4_0 => blocks(values).for_each(|block| simple::with_scale::<4>(block, out)),
            Q4_1 => blocks(values).for_each(|block| simple::with_minimum::<4>(block, out)),
            Q6_K => blocks(values).for_each(|block| k::q6(block, out)),
            Q4_K => blocks(values).for_each(|block| k::q4(block, out)),
        }
        Ok(())
    }

    /// The values of blocks, as many as `out` has.
    ///
    /// # Errors
    /// [`BlockError::Bytes`]; [`BlockError::Rows`] if `out` is not whole blocks.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) -> Result<(), BlockError> {
        let expected = self.bytes(out.len(), out.len())?;
        if bytes.len() != expected {
            return Err(BlockError::Bytes { format: self, expected, values: out.len(), got: bytes.len() });
        }
        match self {
            F32 => read(bytes, out, f32::from_le_bytes),
            F16 => read(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            BF16 => read(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Q8_0 => each(bytes, out, simple::from_q8_0),
            Q5_0 => each(bytes, out, simple::from_scale::<5, 22>),
            Q5_1 => each(bytes, out, simple::from_minimum::<5, 24>),
            Q4_0 => each(bytes, out, simple::from_scale::<4, 18>),
            Q4_1 => each(bytes, out, simple::from_minimum::<4, 20>),
            Q6_K => each(bytes, out, k::from_q6),
            Q4_K => each(bytes, out, k::from_q4),
        }
        Ok(())
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

fn blocks<const N: usize>(values: &[f32]) -> impl Iterator<Item = &[f32; N]> {
    values.as_chunks().0.iter()
}

fn each<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], block: impl Fn(&[u8; B], &mut [f32; N])) {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0).for_each(|(bytes, out)| block(bytes, out));
}

fn read<const B: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; B]) -> f32) {
    bytes.as_chunks().0.iter().zip(out).for_each(|(bytes, out)| *out = value(*bytes));
}

/// The reciprocal, 0 of 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    /// The largest difference that a block may show: half a step, and what f16 rounds of scale and minimum.
    fn bound(format: BlockType, block: &[f32]) -> f32 {
        let [low, high] = [block.iter().fold(0f32, |m, x| m.min(*x)), block.iter().fold(0f32, |m, x| m.max(*x))];
        let (largest, width) = (high.max(-low), high - low);
        // Small scales are subnormal in f16.
        let rounding = largest / 512.0 + 1e-5;
        match format {
            F32 => 0.0,
            F16 => largest / 2048.0 + 1e-7,
            BF16 => largest / 256.0,
            Q8_0 => largest / 127.0 / 2.0 + rounding,
            // The end without a sign of its own is one step short.
            Q5_0 => largest / 16.0 + rounding,
            Q4_0 => largest / 8.0 + rounding,
            Q5_1 => width / 31.0 / 2.0 + rounding * 2.0,
            Q4_1 => width / 15.0 / 2.0 + rounding * 2.0,
            // A least square may give up an end of a block for its middle.
            Q6_K => largest / 16.0 + rounding,
            Q4_K => width / 8.0 + rounding * 2.0,
        }
    }

    proptest! {
        #[test]
        fn values_come_back_within_half_a_step(
            rows in 1usize..4,
            scale in prop_oneof![Just(0.05f32), Just(1.0), Just(300.0)],
            seed in prop::collection::vec(-1.0f32..1.0, 512),
        ) {
            let values: Vec<f32> = (0..rows * 512).map(|i| scale * seed[i * 7 % 512]).collect();
            for format in BlockType::ALL {
                let mut bytes = vec![];
                format.quantize(&values, 512, &mut bytes).unwrap();
                prop_assert_eq!(bytes.len(), format.bytes(values.len(), 512).unwrap());
                let mut back = vec![f32::NAN; values.len()];
                format.dequantize(&bytes, &mut back).unwrap();
                for (block, back) in values.chunks(256).zip(back.chunks(256)) {
                    let bound = bound(format, block);
                    for (x, y) in block.iter().zip(back) {
                        prop_assert!((x - y).abs() <= bound, "{}: {} became {}, at most {}", format, x, y, bound);
                    }
                }
            }
        }
    }

    #[test]
    fn constants_zeros_and_single_values_survive() {
        for format in BlockType::ALL {
            for values in [vec![0.0; 256], vec![0.25; 256], vec![-3.0; 256], {
                let mut one = vec![0.0; 256];
                one[100] = -2.0;
                one
            }] {
                let mut bytes = vec![];
                format.quantize(&values, 256, &mut bytes).unwrap();
                let mut back = vec![f32::NAN; 256];
                format.dequantize(&bytes, &mut back).unwrap();
                let worst = values.iter().zip(&back).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
                assert!(worst <= 0.02, "{format}: {worst}");
            }
        }
    }

    /// A block with more bits is closer.
    #[test]
    fn more_bits_are_closer() {
        let values: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.737).sin() * (i as f32 * 0.0137).cos()).collect();
        let error = |format: BlockType| {
            let (mut bytes, mut back) = (vec![], vec![0.0; values.len()]);
            format.quantize(&values, 256, &mut bytes).unwrap();
            format.dequantize(&bytes, &mut back).unwrap();
            values.iter().zip(&back).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>()
        };
        let errors = [F32, F16, Q8_0, Q6_K, Q5_1, Q5_0, Q4_K, Q4_0].map(error);
        assert!(errors.is_sorted(), "{errors:?}");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let say = |result: Result<(), BlockError>| result.unwrap_err().to_string();
        assert!(say(Q4_K.quantize(&[0.0; 320], 320, &mut vec![])).contains("multiple of 256 values, got 320"));
        let mut values = [0.0; 32];
        values[3] = f32::NAN;
        assert!(say(Q8_0.quantize(&values, 32, &mut vec![])).contains("got NaN at 3"));
        assert!(say(Q8_0.dequantize(&[0; 33], &mut [0.0; 32])).contains("expected 34 bytes"));
        assert_eq!(BlockType::from_id(14), Some(Q6_K));
        assert_eq!(BlockType::from_id(9), None);
    }
}
