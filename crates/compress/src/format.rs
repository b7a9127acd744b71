//! In what weights are stored: integers of few bits, NF4 or FP8 with a scale for each group of weights, or GGUF's blocks.
//!
//! | name | a weight | a scale for | value |
//! |---|---|---|---|
//! | `int8` | 8 bits | the tensor | `scale q` |
//! | `int8-channel` | 8 bits | a row | `scale q` |
//! | `int4`, `int3`, `int2` | 4, 3, 2 bits | 64 weights of a row | `scale (q − zero)` |
//! | `nf4` | 4 bits | 64 weights of a row | `scale level[q]` |
//! | `fp8` | E4M3 | the tensor | `scale q` |
//! | `q8_0`, `q4_k`, ... | | | see [`blocks`](crate::blocks) |
//!
//! A name may go on with the group (`-tensor`, `-channel`, `-g32`, `-g64`, `-g128`) and, of integers, with `-sym` or `-asym`: `int4-g128-sym`. Symmetric
//! integers go from `−(2^(bits−1) − 1)` to `2^(bits−1) − 1` and have no zero point; asymmetric ones use all `2^bits` and always hold 0 exactly.
//! Scales of a tensor or of rows are f32, those of groups are rounded to f16, in which they can be stored without loss.

use std::fmt;
use std::str::FromStr;

use half::f16;
use serde::{Deserialize, Serialize};

use crate::CompressError;
use crate::blocks::BlockType;

/// A way to store the weights of a matrix, by its name in recipes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Format {
    /// Each weight by itself, with a scale for its group: what the methods of [`quantize`](crate::quantize) produce.
    Scalar(ScalarFormat),
    /// GGUF's blocks, round to nearest only.
    Blocks(BlockType),
}

/// What a weight becomes, before its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
    /// 3-bit integers.
    Int3,
    /// 2-bit integers.
    Int2,
    /// The 16 levels that are equally likely under a normal distribution (Dettmers et al., arXiv:2305.14314, appendix E).
    Nf4,
    /// Floats of 8 bits: 4 of exponent, 3 of mantissa, no infinities, up to 448 (Micikevicius et al., arXiv:2209.05433).
    Fp8,
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Group {
    /// All of the matrix.
    Tensor,
    /// A row: the weights of one output channel.
    Channel,
    /// So many of a row, one after the other: 32, 64 or 128.
    Of(usize),
}

/// An element, its groups, and whether they have zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScalarFormat {
    element: Element,
    group: Group,
    symmetric: bool,
}

/// Scale and zero point of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    /// At least 0; 0 if all weights are 0.
    pub scale: f32,
    /// The code of 0; 0 in symmetric formats.
    pub zero: i8,
}

/// The levels of NF4, rising, as in the paper's appendix E.
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The largest E4M3 value.
const FP8_MAX: f64 = 448.0;

impl Element {
    /// Bits of a code.
    pub fn bits(self) -> u32 {
        match self {
            Self::Int8 | Self::Fp8 => 8,
            Self::Int4 | Self::Nf4 => 4,
            Self::Int3 => 3,
            Self::Int2 => 2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
            Self::Nf4 => "nf4",
            Self::Fp8 => "fp8",
        }
    }

    fn is_integer(self) -> bool {
        !matches!(self, Self::Nf4 | Self::Fp8)
    }

    fn default_group(self) -> Group {
        match self {
            Self::Int8 | Self::Fp8 => Group::Tensor,
            Self::Int4 | Self::Int3 | Self::Int2 | Self::Nf4 => Group::Of(64),
        }
    }

    fn default_symmetric(self) -> bool {
        matches!(self, Self::Int8 | Self::Nf4 | Self::Fp8)
    }
}

impl ScalarFormat {
    /// The format.
    ///
    /// # Errors
    /// [`CompressError::Name`] for groups other than 32, 64 and 128, and for NF4 or FP8 with zero points.
    pub fn new(element: Element, group: Group, symmetric: bool) -> Result<Self, CompressError> {
        let format = Self { element, group, symmetric };
        if matches!(group, Group::Of(n) if ![32, 64, 128].contains(&n)) || !(symmetric || element.is_integer()) {
            return Err(CompressError::Name { name: format.to_string() });
        }
        Ok(format)
    }

    /// What a weight becomes.
    pub fn element(self) -> Element {
        self.element
    }

    /// Which weights share a scale.
    pub fn group(self) -> Group {
        self.group
    }

    /// Whether there are no zero points.
    pub fn symmetric(self) -> bool {
        self.symmetric
    }

    /// Lowest and highest code. NF4's are the indices of its levels; FP8's are its bits, all of them.
    pub fn codes(self) -> (i8, i8) {
        let half = 1i16 << (self.element.bits() - 1);
        let (low, high) = match self.element {
            Element::Nf4 => (0, 15),
            Element::Fp8 => (-128, 127),
            _ if self.symmetric => (1 - half, half - 1),
            _ => (-half, half - 1),
        };
        (low as i8, high as i8)
    }

    /// Weights of a group in rows of `cols`: the scales of a matrix are as many as its weights divided by this.
    ///
    /// # Errors
    /// [`CompressError::Group`] if rows are not whole groups.
    pub fn group_len(self, rows: usize, cols: usize) -> Result<usize, CompressError> {
        match self.group {
            Group::Tensor => Ok(rows * cols),
            Group::Channel => Ok(cols),
            Group::Of(group) if cols.is_multiple_of(group) => Ok(group),
            Group::Of(group) => Err(CompressError::Group { format: self.to_string(), group, cols }),
        }
    }

    /// Bits that `[rows, cols]` weights take, scales (f32 or, of groups, f16) and zero points (as wide as codes) included.
    ///
    /// # Errors
    /// [`CompressError::Group`].
    pub fn bits(self, rows: usize, cols: usize) -> Result<u64, CompressError> {
        let weights = (rows * cols) as u64;
        let groups = weights / self.group_len(rows, cols)?.max(1) as u64;
        let scale = if matches!(self.group, Group::Of(_)) { 16 } else { 32 };
        let zero = if self.symmetric { 0 } else { u64::from(self.element.bits()) };
        Ok(weights * u64::from(self.element.bits()) + groups * (scale + zero))
    }

    /// Scale and zero point with which the smallest and the largest value are just in range, times `shrink`: below 1, the ends are cut off
    /// for finer steps in the middle.
    pub fn params(self, low: f32, high: f32, shrink: f32) -> Params {
        let (low, high) = (f64::from(low.min(0.0) * shrink), f64::from(high.max(0.0) * shrink));
        let largest = high.max(-low);
        let span = match self.element {
            Element::Nf4 => largest,
            Element::Fp8 => largest / FP8_MAX,
            _ if self.symmetric => largest / f64::from(self.codes().1),
            _ => (high - low) / f64::from((1u32 << self.element.bits()) - 1),
        };
        let scale = self.stored_scale(span as f32);
        let (first, last) = self.codes();
        let zero = match self.symmetric {
            true => 0,
            false => (f64::from(first) + ratio(-low, scale).round_ties_even()).min(f64::from(last)) as i8,
        };
        Params { scale, zero }
    }

    /// Scales of groups have 16 bits.
    fn stored_scale(self, scale: f32) -> f32 {
        match self.group {
            Group::Of(_) => f16::from_f32(scale).min(f16::MAX).to_f32(),
            Group::Tensor | Group::Channel => scale,
        }
    }

    /// The code whose value is nearest.
    #[inline]
    pub fn encode(self, x: f64, params: Params) -> i8 {
        let x = ratio(x, params.scale);
        match self.element {
            Element::Nf4 => {
                NF4_LEVELS.array_windows().map(|&[a, b]| i8::from(x > 0.5 * (f64::from(a) + f64::from(b)))).sum()
            }
            Element::Fp8 => to_fp8(x) as i8,
            _ => {
                let (first, last) = self.codes();
                (x.round_ties_even() + f64::from(params.zero)).clamp(f64::from(first), f64::from(last)) as i8
            }
        }
    }

    /// The value of a code.
    #[inline]
    pub fn decode(self, code: i8, params: Params) -> f32 {
        match self.element {
            Element::Nf4 => params.scale * NF4_LEVELS[usize::from(code as u8 & 15)],
            Element::Fp8 => params.scale * from_fp8(code as u8),
            _ => params.scale * f32::from(i16::from(code) - i16::from(params.zero)),
        }
    }
}

impl Format {
    /// Bits that `[rows, cols]` weights take, with all that comes with them.
    ///
    /// # Errors
    /// [`CompressError::Group`], [`CompressError::Block`] if rows are not whole groups.
    pub fn bits(self, rows: usize, cols: usize) -> Result<u64, CompressError> {
        match self {
            Self::Scalar(format) => format.bits(rows, cols),
            Self::Blocks(block) => Ok(8 * block.bytes(rows * cols, cols)? as u64),
        }
    }
}

/// 0 with a scale of 0, where every value is 0.
#[inline]
fn ratio(x: f64, scale: f32) -> f64 {
    if scale > 0.0 { x / f64::from(scale) } else { 0.0 }
}

/// The bits of the nearest E4M3 value, ties to even, the largest for what is larger.
fn to_fp8(x: f64) -> u8 {
    let a = x.abs().min(FP8_MAX);
    // The exponent of the step is three below that of the value; below 2^-6 the steps stay.
    let exponent = (((a.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(-6);
    let steps = (a * f64::from(3 - exponent).exp2()).round_ties_even() as i32;
    // 16 steps carry into the exponent by themselves.
    let bits = ((exponent + 7) << 3) + steps - 8;
    bits as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

fn from_fp8(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let a = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        // The exponent of f32, exactly.
        _ => (8.0 + mantissa) * f32::from_bits(((exponent - 10 + 127) as u32) << 23),
    };
    if bits & 0x80 == 0 { a } else { -a }
}

impl fmt::Display for ScalarFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.element.name())?;
        if self.group != self.element.default_group() {
            match self.group {
                Group::Tensor => f.write_str("-tensor")?,
                Group::Channel => f.write_str("-channel")?,
                Group::Of(n) => write!(f, "-g{n}")?,
            }
        }
        match self.symmetric {
            symmetric if symmetric == self.element.default_symmetric() => Ok(()),
            true => f.write_str("-sym"),
            false => f.write_str("-asym"),
        }
    }
}

impl FromStr for ScalarFormat {
    type Err = CompressError;

    fn from_str(name: &str) -> Result<Self, CompressError> {
        let wrong = || CompressError::Name { name: name.to_owned() };
        let mut parts = name.split('-').peekable();
        let element = match parts.next() {
            Some("int8") => Element::Int8,
            Some("int4") => Element::Int4,
            Some("int3") => Element::Int3,
            Some("int2") => Element::Int2,
            Some("nf4") => Element::Nf4,
            Some("fp8") => Element::Fp8,
            _ => return Err(wrong()),
        };
        let group = match parts.peek() {
            Some(&"tensor") => Some(Group::Tensor),
            Some(&"channel") => Some(Group::Channel),
            Some(&"g32") => Some(Group::Of(32)),
            Some(&"g64") => Some(Group::Of(64)),
            Some(&"g128") => Some(Group::Of(128)),
            _ => None,
        };
        if group.is_some() {
            parts.next();
        }
        let symmetric = match parts.next() {
            Some("sym") if element.is_integer() => true,
            Some("asym") if element.is_integer() => false,
            Some(_) => return Err(wrong()),
            None => element.default_symmetric(),
        };
        match parts.next() {
            Some(_) => Err(wrong()),
            None => Self::new(element, group.unwrap_or(element.default_group()), symmetric),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scalar(format) => format.fmt(f),
            Self::Blocks(block) => f.write_str(&block.name().to_lowercase()),
        }
    }
}

impl FromStr for Format {
    type Err = CompressError;

    fn from_str(name: &str) -> Result<Self, CompressError> {
        match BlockType::ALL.into_iter().find(|block| block.name().eq_ignore_ascii_case(name)) {
            Some(block) => Ok(Self::Blocks(block)),
            None => name.parse().map(Self::Scalar),
        }
    }
}

impl TryFrom<String> for Format {
    type Error = CompressError;

    fn try_from(name: String) -> Result<Self, CompressError> {
        name.parse()
    }
}

impl From<Format> for String {
    fn from(format: Format) -> String {
        format.to_string()
    }
}

impl From<ScalarFormat> for Format {
    fn from(format: ScalarFormat) -> Self {
        Self::Scalar(format)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_come_back() {
        for name in [
            "int8",
            "int8-channel",
            "int8-asym",
            "int8-g64",
            "int8-channel-asym",
            "int4",
            "int4-g32",
            "int4-g128-sym",
            "int4-channel",
            "int3",
            "int2-sym",
            "nf4",
            "nf4-g128",
            "fp8",
            "fp8-channel",
            "q4_k",
            "q8_0",
            "f16",
        ] {
            assert_eq!(name.parse::<Format>().unwrap().to_string(), name);
        }
        assert_eq!("int4-g64-asym".parse::<Format>().unwrap().to_string(), "int4");
        for name in ["", "int5", "int4-g48", "int4-sym-g64", "nf4-asym", "fp8-sym", "int4-", "int4-g64-asym-x", "q4_2"]
        {
            let error = name.parse::<Format>().unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
        assert!(ScalarFormat::new(Element::Int4, Group::Of(48), true).is_err());
        assert!(ScalarFormat::new(Element::Nf4, Group::Of(64), false).is_err());
    }

    #[test]
    fn bits_count_everything() {
        let bits = |name: &str| name.parse::<Format>().unwrap().bits(8, 128).unwrap();
        assert_eq!(bits("int8"), 8 * 1024 + 32);
        assert_eq!(bits("int8-channel-asym"), 8 * 1024 + 8 * (32 + 8));
        assert_eq!(bits("int3-g128"), 3 * 1024 + 8 * (16 + 3));
        assert_eq!(bits("nf4"), 4 * 1024 + 16 * 16);
        assert_eq!(bits("q4_0"), 4608);
        let error = "int4".parse::<Format>().unwrap().bits(8, 96).unwrap_err().to_string();
        assert!(error.contains("multiple of 64 weights, got 96"), "{error}");
    }

    /// All 256 by the definition in the paper's table 1; and nothing is nearer than what is chosen.
    #[test]
    fn fp8_is_e4m3() {
        let value = |bits: u8| {
            let (sign, e, m) = (if bits > 127 { -1.0 } else { 1.0 }, i32::from(bits >> 3 & 15), f64::from(bits & 7));
            sign * if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) }
        };
        let finite: Vec<u8> = (0..=255).filter(|bits| bits & 0x7f != 0x7f).collect();
        for &bits in &finite {
            assert_eq!(f64::from(from_fp8(bits)), value(bits));
            assert_eq!(to_fp8(value(bits)), bits);
        }
        assert!(from_fp8(0x7f).is_nan() && from_fp8(0xff).is_nan());
        for i in -5000..5000 {
            let x = f64::from(i).powi(3) / 2e8;
            let best = finite.iter().map(|&bits| (value(bits) - x).abs()).fold(f64::INFINITY, f64::min);
            assert_eq!((value(to_fp8(x)) - x).abs(), best, "{x}");
        }
        // Ties go to the even mantissa.
        assert_eq!([to_fp8(17.0), to_fp8(19.0)].map(from_fp8), [16.0, 20.0]);
        assert_eq!([to_fp8(1e9), to_fp8(-1e9)].map(from_fp8), [448.0, -448.0]);
    }
}
