use rayon::prelude::*;

use super::{Ranges, fit, group_params};
use crate::format::{Group, ScalarFormat};
use crate::linalg::{self, Mat};
use crate::{CompressError, Hessian, Matrix, Quantized};

/// Columns that are finished before the ones behind them hear of it (section 3.3, step 2).
pub(crate) const BLOCK: usize = 128;

/// What [`gptq`] can be told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gptq {
    /// What is added to the diagonal of the Hessian, as a part of its mean.
    pub damping: f64,
    /// Begin with the inputs of the largest second moments instead of the first, with ranges from the weights as they were.
    pub act_order: bool,
    /// How ranges are chosen.
    pub ranges: Ranges,
}

impl Default for Gptq {
    fn default() -> Self {
        Self { damping: 0.01, act_order: false, ranges: Ranges::Absmax }
    }
}

/// GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1): input by input, each weight is rounded to its nearest code and the weights of the inputs behind it
/// move so that the outputs change least.
///
/// The ranges of groups come from the weights as they are when their group begins; those of rows and of the tensor from the weights before.
///
/// # Errors
/// [`CompressError`]: rows that are not whole groups, a Hessian of another width, values that are not finite; [`CompressError::Singular`] if the damping
/// is too small or there were no inputs.
pub fn gptq(
    weight: &Matrix,
    hessian: &Hessian,
    format: ScalarFormat,
    options: &Gptq,
) -> Result<Quantized, CompressError> {
    weight.finite("GPTQ")?;
    weight.fits("GPTQ", hessian.width())?;
    let (rows, n) = (weight.rows(), weight.cols());
    let group_len = format.group_len(rows, n)?;
    let mut order: Vec<usize> = (0..n).collect();
    if options.act_order {
        let diagonal = hessian.diagonal();
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
    }
    let factor = hessian.inverse_factor("GPTQ", &order, options.damping)?;

    let mut params = group_params(weight, format, group_len, options.ranges);
    let by_group = matches!(format.group(), Group::Of(_));
    if format.group() == Group::Tensor {
        // One for each row, as rows go their own ways.
        params = params.into_iter().flat_map(|params| std::iter::repeat_n(params, rows)).collect();
    }
    let groups = if by_group { n / group_len } else { 1 };
    let group_of = |input: usize| if by_group { input / group_len } else { 0 };

    let mut codes = vec![0i8; rows * n];
    let mut left: Vec<f64> =
        (0..rows).flat_map(|row| order.iter().map(move |&col| f64::from(weight.row(row)[col]))).collect();
    for from in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - from);
        let mut errors = vec![0.0; rows * width];
        let of_rows = (
            left.par_chunks_mut(n),
            codes.par_chunks_mut(n),
            params.par_chunks_mut(groups),
            errors.par_chunks_mut(width),
        );
        of_rows.into_par_iter().for_each(|(left, codes, params, errors)| {
            for i in from..from + width {
                let (input, factor) = (order[i], &factor[i * n..(i + 1) * n]);
                let group = group_of(input);
                if by_group && !options.act_order && input.is_multiple_of(group_len) {
                    let now: Vec<f32> = left[i..i + group_len].iter().map(|x| *x as f32).collect();
                    params[group] = fit(&now, format, options.ranges);
                }
                let code = format.encode(left[i], params[group]);
                codes[input] = code;
                let error = (left[i] - f64::from(format.decode(code, params[group]))) / factor[i];
                errors[i - from] = error;
                left[i + 1..from + width].iter_mut().zip(&factor[i + 1..]).for_each(|(w, u)| *w -= error * u);
            }
        });
        spread_errors(&mut left, &errors, &factor, [rows, n], from, width);
    }
    if format.group() == Group::Tensor {
        params.truncate(1);
    }
    Ok(Quantized::with_codes(weight, format, group_len, codes, &params))
}

/// The columns behind a block hear of its errors.
pub(crate) fn spread_errors(
    left: &mut [f64],
    errors: &[f64],
    factor: &[f64],
    [rows, n]: [usize; 2],
    from: usize,
    width: usize,
) {
    let next = from + width;
    if next < n && rows > 0 {
        let factor = Mat::new(&factor[from * n + next..], width, n - next, n);
        linalg::gemm(-1.0, Mat::new(errors, rows, width, width), factor, 1.0, &mut left[next..], n);
    }
}
