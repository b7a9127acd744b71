//! Linear layers with what comes before and after them: a norm or an activation on the way in, bias and residual on the way out.
//!
//! What comes before is made again in backward instead of kept: a pass over values in the cache against a buffer as large as the input,
//! per layer, for the whole step.

use rayon::prelude::*;

use super::activation::{Gelu, gelu, gelu_again, gelu_backward, swiglu, swiglu_backward};
use super::matmul::{Compute, Into, Mat, matmul};
use super::norm::{Norm, norm, norm_backward};
use super::{CHUNK, add, add_chunk, copy, sum_over_rows};
use crate::buffers::{buffer, recycle};

/// What happens to the input of a linear layer.
#[derive(Clone, Copy)]
pub(crate) enum Before<'a> {
    /// Nothing.
    Nothing,
    /// A norm over the input's rows.
    Norm(Norm<'a>),
    /// GELU.
    Gelu(Gelu),
    /// SwiGLU, from rows `[gate | up]`.
    SwiGlu,
}

impl Before<'_> {
    /// Width of `x`'s rows, where the layer has `inputs` inputs.
    pub fn width(self, inputs: usize) -> usize {
        match self {
            Before::SwiGlu => 2 * inputs,
            _ => inputs,
        }
    }

    /// Runs `f` on the layer's input: `x` itself, or a buffer that is made for the time.
    pub fn with<R>(self, x: &[f32], inputs: usize, f: impl FnOnce(&[f32]) -> R) -> R {
        let mut a = match self {
            Before::Nothing => return f(x),
            _ => buffer(x.len() / self.width(inputs).max(1) * inputs),
        };
        match self {
            Before::Nothing => {}
            Before::Norm(n) => norm(x, n, &mut a),
            Before::Gelu(form) => gelu(x, form, &mut a),
            Before::SwiGlu => swiglu(x, inputs, &mut a),
        }
        let result = f(&a);
        recycle(a);
        result
    }
}

/// `y = before(x) w + bias + residual`; `w` is `[inputs, outputs]`, or a transposed view.
pub(crate) fn linear(
    compute: Compute,
    x: &[f32],
    before: Before<'_>,
    w: Mat<'_>,
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    y: &mut [f32],
) {
    let (inputs, outputs) = (w.rows(), w.cols());
    if y.is_empty() {
        return;
    }
    let rows = y.len() / outputs;
    let into = start(bias, residual, outputs, y);
    before.with(x, inputs, |a| matmul(compute, Mat::new(a, rows, inputs, inputs), w, y, outputs, into));
}

/// Writes what a product of `outputs` columns is added to, `bias + residual`, into `y`; or nothing where there is neither.
pub(crate) fn start(bias: Option<&[f32]>, residual: Option<&[f32]>, outputs: usize, y: &mut [f32]) -> Into {
    match (bias, residual) {
        (None, None) => Into::Write,
        (None, Some(residual)) => {
            copy(y, residual);
            Into::Add
        }
        (Some(bias), residual) => {
            // Whole rows, about a chunk of them.
            let step = (CHUNK / outputs).max(1) * outputs;
            y.par_chunks_mut(step).enumerate().for_each(|(i, y)| {
                y.chunks_exact_mut(outputs).for_each(|y| y.copy_from_slice(bias));
                if let Some(residual) = residual {
                    add_chunk(y, &residual[i * step..i * step + y.len()]);
                }
            });
            Into::Add
        }
    }
}

/// Turns `da`, the gradient of GELU's output, into that of its input `x`, and returns GELU's output, which the weight's gradient takes.
pub(crate) fn gelu_gradient(x: &[f32], form: Gelu, da: &mut [f32]) -> Vec<f32> {
    let mut a = buffer(x.len());
    gelu_again(x, form, da, &mut a);
    a
}

/// `dw (+)= before(x)^T dy` in the layout of the weight: `[inputs, outputs]`, or `[outputs, inputs]` where `transposed`.
pub(crate) fn weight_gradient(
    compute: Compute,
    x: &[f32],
    before: Before<'_>,
    dy: Mat<'_>,
    transposed: bool,
    dw: &mut [f32],
    into: Into,
) {
    let inputs = dw.len() / dy.cols().max(1);
    before.with(x, inputs, |a| {
        let a = Mat::new(a, dy.rows(), inputs, inputs);
        let (l, r, width) = if transposed { (dy.t(), a, inputs) } else { (a.t(), dy, dy.cols()) };
        matmul(compute, l, r, dw, width, into);
    });
}

/// `db (+)=` sum of the rows of `dy`.
pub(crate) fn bias_gradient(dy: &[f32], db: &mut [f32], into: Into) {
    let outputs = db.len();
    if outputs == 0 {
        return;
    }
    sum_over_rows(dy.par_chunks(128 * outputs), db, into, |rows, sums| {
        rows.chunks_exact(outputs).for_each(|row| add_chunk(sums, row));
    });
}

/// The gradient of `before` at `x`, from `da`, the gradient of the layer's input: in place of `da` where the shapes allow. Added to `existing`
/// instead where that is given, and nothing returned.
///
/// `norm_gradients` take the gradients of a norm's weight and bias (overwritten); empty for others.
pub(crate) fn input_gradient(
    x: &[f32],
    before: Before<'_>,
    inputs: usize,
    mut da: Vec<f32>,
    existing: Option<&mut [f32]>,
    norm_gradients: [&mut [f32]; 2],
) -> Option<Vec<f32>> {
    let existing = match before {
        Before::Nothing => existing,
        Before::Norm(n) => {
            let added = existing.is_some();
            norm_backward(x, n, &mut da, existing, norm_gradients);
            if added {
                recycle(da);
                return None;
            }
            None
        }
        Before::Gelu(form) => {
            gelu_backward(x, form, &mut da);
            existing
        }
        Before::SwiGlu => {
            let mut dx = buffer(x.len());
            swiglu_backward(x, inputs, &da, &mut dx);
            recycle(std::mem::replace(&mut da, dx));
            existing
        }
    };
    match existing {
        None => Some(da),
        Some(dx) => {
            add(dx, &da);
            recycle(da);
            None
        }
    }
}
