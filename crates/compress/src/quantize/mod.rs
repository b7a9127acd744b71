//! Quantization after training: which code each weight gets.
//!
//! | | looks at | changes |
//! |---|---|---|
//! | [`nearest`] | the weights | nothing: each weight is rounded by itself |
//! | [`gptq()`] | second moments of the inputs | later weights of a row, which make up for the rounding of earlier ones |
//! | [`awq()`] | second moments and mean magnitudes of the inputs | inputs that matter get finer steps, by a scale that goes into the layer before |
//! | [`smooth_scales`] | the largest inputs and weights | inputs become easier to quantize and weights harder, by such a scale |

mod awq;
mod gptq;

pub use awq::{Awq, awq, smooth_scales};
pub(crate) use gptq::{BLOCK, spread_errors};
pub use gptq::{Gptq, gptq};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::format::{Params, ScalarFormat};
use crate::{CompressError, Format, Matrix, Quantized};

/// How the range of a group's codes is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ranges {
    /// From the smallest to the largest weight.
    #[default]
    Absmax,
    /// The one of least squared error among 41 that are 1 to 0.2 times as wide: ends are cut off for finer steps in the middle.
    Mse,
}

/// Factors by which ranges shrink in a search.
const SHRINK: usize = 41;

/// `1, 0.98, ... 0.2`.
fn shrinks() -> impl Iterator<Item = f32> {
    (0..SHRINK).map(|i| 1.0 - 0.02 * i as f32)
}

/// Rounds every weight to the nearest value of its group's range.
///
/// # Errors
/// [`CompressError::Group`] if rows are not whole groups, [`CompressError::NotFinite`].
pub fn nearest(weight: &Matrix, format: ScalarFormat, ranges: Ranges) -> Result<Quantized, CompressError> {
    weight.finite("round to nearest")?;
    let group_len = format.group_len(weight.rows(), weight.cols())?;
    let params = group_params(weight, format, group_len, ranges);
    Ok(Quantized::nearest(weight, format, group_len, &params))
}

/// The weights as they come back from any format, each rounded to the nearest value: what a sensitivity is measured with.
///
/// # Errors
/// [`CompressError::Group`], [`CompressError::Block`], [`CompressError::NotFinite`].
pub fn rounded(weight: &Matrix, format: Format) -> Result<Matrix, CompressError> {
    let block = match format {
        Format::Scalar(format) => return Ok(nearest(weight, format, Ranges::Absmax)?.dequantize()),
        Format::Blocks(block) => block,
    };
    let (mut bytes, mut values) = (vec![], vec![0.0; weight.values().len()]);
    block.quantize(weight.values(), weight.cols(), &mut bytes)?;
    block.dequantize(&bytes, &mut values)?;
    Matrix::new(weight.rows(), weight.cols(), values)
}

/// The parameters of all groups.
fn group_params(weight: &Matrix, format: ScalarFormat, group_len: usize, ranges: Ranges) -> Vec<Params> {
    weight.values().par_chunks(group_len.max(1)).map(|group| fit(group, format, ranges)).collect()
}

/// The parameters of one group.
fn fit(group: &[f32], format: ScalarFormat, ranges: Ranges) -> Params {
    let low = group.iter().fold(0f32, |m, x| m.min(*x));
    let high = group.iter().fold(0f32, |m, x| m.max(*x));
    let widest = format.params(low, high, 1.0);
    if ranges == Ranges::Absmax {
        return widest;
    }
    let error = |params: Params| -> f64 {
        let square =
            |x: &f32| (f64::from(format.decode(format.encode(f64::from(*x), params), params)) - f64::from(*x)).powi(2);
        // Parts of a whole tensor, whose sums are added in the order of the parts: on any number of threads the same.
        let parts: Vec<f64> = group.par_chunks(1 << 14).map(|part| part.iter().map(square).sum()).collect();
        parts.iter().sum()
    };
    let candidates = shrinks().map(|shrink| format.params(low, high, shrink)).map(|params| (error(params), params));
    candidates.reduce(|best, next| if next.0 < best.0 { next } else { best }).map_or(widest, |(_, params)| params)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;
    use crate::format::Element;

    const NAMES: [&str; 14] = [
        "int8",
        "int8-channel",
        "int8-channel-asym",
        "int8-g64",
        "int4",
        "int4-g32",
        "int4-g128-sym",
        "int4-channel",
        "int3",
        "int3-sym",
        "int2",
        "int2-g32-sym",
        "nf4",
        "fp8",
    ];

    fn formats() -> impl Iterator<Item = ScalarFormat> {
        NAMES.into_iter().map(|name| name.parse().unwrap())
    }

    proptest! {
        /// By the definition: no value of the format is nearer to a weight than the one that it gets, 0 is kept, and the error is at most half the step
        /// (and what f16 rounds of a scale).
        #[test]
        fn weights_come_back_as_the_nearest_values(
            seed in prop::collection::vec(-1.0f32..1.0, 384),
            shift in prop_oneof![Just(0.0f32), Just(0.7), Just(-3.0)],
            scale in prop_oneof![Just(0.02f32), Just(1.0), Just(40.0)],
        ) {
            let mut values: Vec<f32> = seed.iter().map(|x| scale * (x + shift)).collect();
            values[5] = 0.0;
            let weight = Matrix::new(3, 128, values).unwrap();
            for format in formats() {
                let packed = nearest(&weight, format, Ranges::Absmax).unwrap();
                let back = packed.dequantize();
                let (first, last) = format.codes();
                for (i, (&x, &y)) in weight.values().iter().zip(back.values()).enumerate() {
                    let params = packed.params(i / packed.group_len());
                    let best = (first..=last)
                        .map(|code| (format.decode(code, params) - x).abs())
                        .filter(|error| !error.is_nan())
                        .fold(f32::INFINITY, f32::min);
                    prop_assert!((y - x).abs() <= best * 1.0001 + 1e-9, "{}: {} became {}", format, x, y);
                    let step = match format.element() {
                        Element::Nf4 => 0.31 * params.scale,
                        Element::Fp8 => (x.abs() / 8.0).max(params.scale / 256.0),
                        _ => params.scale,
                    };
                    // The zero point is rounded too, which cuts up to half a step off an end.
                    let cut = if format.symmetric() { 0.51 } else { 1.01 };
                    let bound = cut * step + x.abs() / 1000.0 + 128.0 * 1e-7;
                    prop_assert!((y - x).abs() <= bound, "{}: {} became {} with {:?}", format, x, y, params);
                }
                prop_assert_eq!(back.values()[5], 0.0);
                let same = Quantized::new(format, [3, 128], packed.codes().to_vec(), packed.scales().to_vec(), packed.zeros().to_vec());
                prop_assert_eq!(&same.unwrap(), &packed);
                prop_assert_eq!(packed.bits_per_weight(), format.bits(3, 128).unwrap() as f64 / 384.0);
            }
        }

        /// The widest range is among those that are searched.
        #[test]
        fn a_search_is_never_worse(seed in prop::collection::vec(-1.0f32..1.0, 256)) {
            let weight = Matrix::new(2, 128, seed.iter().map(|x| x.powi(3)).collect()).unwrap();
            let error = |packed: Quantized| -> f64 {
                packed.dequantize().values().iter().zip(weight.values()).map(|(x, y)| f64::from(x - y).powi(2)).sum()
            };
            for format in formats() {
                let [absmax, mse] = [Ranges::Absmax, Ranges::Mse].map(|ranges| error(nearest(&weight, format, ranges).unwrap()));
                prop_assert!(mse <= absmax * (1.0 + 1e-9), "{}: {} after {}", format, mse, absmax);
            }
        }
    }

    #[test]
    fn zeros_stay_and_what_does_not_fit_is_said() {
        let zeros = Matrix::new(2, 128, vec![0.0; 256]).unwrap();
        for format in formats() {
            for ranges in [Ranges::Absmax, Ranges::Mse] {
                assert_eq!(nearest(&zeros, format, ranges).unwrap().dequantize(), zeros, "{format}");
            }
        }
        let format: ScalarFormat = "int4".parse().unwrap();
        let narrow = Matrix::new(2, 96, vec![0.0; 192]).unwrap();
        assert!(matches!(
            nearest(&narrow, format, Ranges::Absmax),
            Err(CompressError::Group { group: 64, cols: 96, .. })
        ));
        let nan = Matrix::new(1, 64, vec![f32::NAN; 64]).unwrap();
        assert!(matches!(nearest(&nan, format, Ranges::Absmax), Err(CompressError::NotFinite { index: 0, .. })));
        assert!(rounded(&narrow, "q4_k".parse().unwrap()).unwrap_err().to_string().contains("multiple of 256"));
        let torn = Quantized::new(format, [1, 64], vec![0; 64], vec![1.0], vec![]).unwrap_err().to_string();
        assert!(torn.contains("64 codes, 1 scales, 1 zeros, got 64 codes, 1 scales, 0 zeros"), "{torn}");
        let code = Quantized::new(format, [1, 64], vec![9; 64], vec![1.0], vec![0]).unwrap_err();
        assert!(matches!(code, CompressError::Code { code: 9, .. }));
    }

    /// Names in recipes.
    #[test]
    fn formats_are_text() {
        let format: Format = serde_json::from_str("\"int4-g32-sym\"").unwrap();
        assert_eq!(serde_json::to_string(&format).unwrap(), "\"int4-g32-sym\"");
        assert!(serde_json::from_str::<Format>("\"int7\"").unwrap_err().to_string().contains("name of a format"));
        assert_eq!(serde_json::from_str::<Ranges>("\"mse\"").unwrap(), Ranges::Mse);
    }
}
