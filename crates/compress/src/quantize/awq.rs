use rayon::prelude::*;

use super::{Ranges, nearest};
use crate::format::{Group, Params, ScalarFormat};
use crate::matrix::finite;
use crate::{CompressError, Hessian, Matrix, Quantized};

/// Exponents that are tried.
const GRID: usize = 20;
/// Outputs of a weight that judge a scale, evenly spread.
const JUDGES: usize = 512;
/// Ranges that are tried when ends are cut off: 1, 0.95, ... 0.5 of the width.
const CLIPS: usize = 11;

/// What [`awq`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Awq {
    /// By which each input's weights were multiplied before they were rounded: what makes the inputs has to divide by them.
    pub scales: Vec<f32>,
    /// The exponent; at 0 all scales are 1.
    pub alpha: f64,
    /// The weights times `scales`, one for each of those given.
    pub quantized: Vec<Quantized>,
}

/// AWQ (Lin et al., arXiv:2306.00978, section 3.2): the weights that share their inputs are multiplied, input by input, by `mean |x|^alpha`, with the alpha of
/// 0, 0.05, ... 0.95 at which rounding changes the outputs least; with `clip`, then the range of each group is cut where its part of the outputs changes least.
///
/// The scales are divided by `√(max min)`, as in the authors' code. The outputs' error follows from the second moments, so that it counts every input seen;
/// of a weight with more than 512 outputs, 512 judge.
///
/// # Errors
/// [`CompressError`]: rows that are not whole groups, statistics of another width, values that are not finite, `clip` without groups.
pub fn awq(
    weights: &[&Matrix],
    mean_abs: &[f32],
    hessian: &Hessian,
    format: ScalarFormat,
    clip: bool,
) -> Result<Awq, CompressError> {
    if clip && !matches!(format.group(), Group::Of(_)) {
        let (expected, got) = ("a format with groups, as int4", format.to_string());
        return Err(CompressError::Value { what: "AWQ's clipping", expected, got });
    }
    finite("AWQ", mean_abs)?;
    for weight in weights {
        weight.finite("AWQ")?;
        weight.fits("AWQ", mean_abs.len())?;
        weight.fits("AWQ", hessian.width())?;
    }
    let judges: Vec<Matrix> = weights.iter().map(|weight| judges(weight)).collect();
    let mut best = (f64::INFINITY, 0.0, vec![1.0; mean_abs.len()]);
    for step in 0..GRID {
        let alpha = step as f64 / GRID as f64;
        let scales = scales(mean_abs, alpha);
        let inverse: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
        let mut error = 0.0;
        for weight in &judges {
            let back = nearest(&weight.scaled_columns(&scales)?, format, Ranges::Absmax)?.dequantize();
            error += hessian.output_error(weight, &back.scaled_columns(&inverse)?)?;
        }
        if error < best.0 {
            best = (error, alpha, scales);
        }
    }
    let (_, alpha, scales) = best;
    let quantize = |weight: &&Matrix| {
        let scaled = weight.scaled_columns(&scales)?;
        match clip {
            true => clipped(&scaled, hessian, &scales, format),
            false => nearest(&scaled, format, Ranges::Absmax),
        }
    };
    let quantized = weights.iter().map(quantize).collect::<Result<_, _>>()?;
    Ok(Awq { alpha, quantized, scales })
}

fn scales(mean: &[f32], alpha: f64) -> Vec<f32> {
    let raw: Vec<f64> = mean.iter().map(|x| f64::from(*x).powf(alpha).max(1e-4)).collect();
    let (low, high) = raw.iter().fold((f64::INFINITY, 0f64), |(low, high), x| (low.min(*x), high.max(*x)));
    raw.iter().map(|x| (x / (low * high).sqrt()) as f32).collect()
}

fn judges(weight: &Matrix) -> Matrix {
    let count = weight.rows().min(JUDGES);
    let values = (0..count).flat_map(|i| weight.row(i * weight.rows() / count).iter().copied()).collect();
    Matrix::of(count, weight.cols(), values)
}

/// Each group in the range at which its part of the outputs changes least. `weight` is scaled, the second moments are of inputs that are not.
fn clipped(
    weight: &Matrix,
    hessian: &Hessian,
    scales: &[f32],
    format: ScalarFormat,
) -> Result<Quantized, CompressError> {
    let (n, group_len) = (weight.cols(), format.group_len(weight.rows(), weight.cols())?);
    let best = |(at, group): (usize, &[f32])| -> Params {
        let first = at * group_len % n;
        let (low, high) = group.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
        let error = |params: Params| -> f64 {
            let difference = |(i, x): (usize, &f32)| {
                let x = f64::from(*x);
                (f64::from(format.decode(format.encode(x, params), params)) - x) / f64::from(scales[first + i])
            };
            let d: Vec<f64> = group.iter().enumerate().map(difference).collect();
            let row = |i: usize| -> f64 { hessian.row(first + i)[first..].iter().zip(&d).map(|(h, d)| h * d).sum() };
            d.iter().enumerate().map(|(i, d)| d * row(i)).sum()
        };
        let candidates = (0..CLIPS).map(|i| format.params(low, high, 1.0 - 0.05 * i as f32));
        let judged = candidates.map(|params| (error(params), params));
        judged
            .reduce(|best, next| if next.0 < best.0 { next } else { best })
            .map_or(format.params(low, high, 1.0), |best| best.1)
    };
    let params: Vec<Params> = weight.values().par_chunks(group_len).enumerate().map(best).collect();
    Ok(Quantized::nearest(weight, format, group_len, &params))
}

/// SmoothQuant (Xiao et al., arXiv:2211.10438, equation 4): `max |x|^alpha / max |w|^(1 − alpha)` of each input, over all weights that share the inputs. Inputs
/// divided and weights multiplied by it leave the outputs alone, and the largest of each input is closer to the others'. Inputs that are always 0 keep 1.
///
/// # Errors
/// [`CompressError`]: weights of another width, values that are not finite, an alpha outside of 0 to 1.
pub fn smooth_scales(abs_max: &[f32], weights: &[&Matrix], alpha: f64) -> Result<Vec<f32>, CompressError> {
    if !(0.0..=1.0).contains(&alpha) {
        return Err(CompressError::Value { what: "SmoothQuant's alpha", expected: "0 to 1", got: alpha.to_string() });
    }
    finite("SmoothQuant", abs_max)?;
    let mut largest = vec![0f32; abs_max.len()];
    for weight in weights {
        weight.finite("SmoothQuant")?;
        weight.fits("SmoothQuant", abs_max.len())?;
        for row in weight.values().chunks_exact(abs_max.len().max(1)) {
            largest.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
        }
    }
    let scale = |(&x, &w): (&f32, &f32)| match x > 0.0 {
        // The floors of the authors' code.
        true => (f64::from(x).powf(alpha) / f64::from(w.max(1e-5)).powf(1.0 - alpha)).max(1e-5) as f32,
        false => 1.0,
    };
    Ok(abs_max.iter().zip(&largest).map(scale).collect())
}
