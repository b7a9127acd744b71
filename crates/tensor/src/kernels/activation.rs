//! GELU (tanh form), SwiGLU and counted dropout: element-wise kernels with their derivatives.

use rayon::prelude::*;

use super::CHUNK;
use super::simd::{sigmoid, tanh, vectorized};
use crate::random::{Counter, uniform_bits};

/// sqrt(2 / pi)
const C: f32 = 0.797_884_6;
/// Cubic coefficient of the tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415, section 2).
const A: f32 = 0.044_715;

/// `out = gelu(x)`; reads 4 bytes and writes 4 per element.
pub(crate) fn gelu(x: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(o, x)| gelu_chunk(x, o));
}

vectorized! {
    fn gelu_chunk(x: &[f32], out: &mut [f32]) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = 0.5 * x * (1.0 + tanh(C * (x + A * x * x * x)));
        }
    }
}

/// `dx = dy * gelu'(x)`
pub(crate) fn gelu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) {
    dx.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .zip(dy.par_chunks(CHUNK))
        .for_each(|((dx, x), dy)| gelu_backward_chunk(x, dy, dx));
}

vectorized! {
    fn gelu_backward_chunk(x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let t = tanh(C * (x + A * x * x * x));
            let slope = C * (1.0 + 3.0 * A * x * x);
            *dx = dy * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope);
        }
    }
}

/// SwiGLU over packed rows `[gate | up]` of `2 f` values: `out = silu(gate) * up`, rows of `f`
/// (Shazeer, arXiv:2002.05202).
pub(crate) fn swiglu(x: &[f32], f: usize, out: &mut [f32]) {
    if f == 0 {
        return;
    }
    out.par_chunks_mut(f).zip(x.par_chunks(2 * f)).for_each(|(o, x)| {
        let (gate, up) = x.split_at(f);
        swiglu_row(gate, up, o);
    });
}

vectorized! {
    fn swiglu_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g * sigmoid(g) * u;
        }
    }
}

/// Gradient of [`swiglu`] with respect to its packed input.
pub(crate) fn swiglu_backward(x: &[f32], f: usize, dy: &[f32], dx: &mut [f32]) {
    if f == 0 {
        return;
    }
    dx.par_chunks_mut(2 * f).zip(x.par_chunks(2 * f)).zip(dy.par_chunks(f)).for_each(|((dx, x), dy)| {
        let (gate, up) = x.split_at(f);
        let (dgate, dup) = dx.split_at_mut(f);
        swiglu_backward_row(gate, up, dy, dgate, dup);
    });
}

vectorized! {
    fn swiglu_backward_row(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let n = dy.len();
        let (gate, up, dgate, dup) = (&gate[..n], &up[..n], &mut dgate[..n], &mut dup[..n]);
        for i in 0..n {
            let s = sigmoid(gate[i]);
            dup[i] = dy[i] * gate[i] * s;
            dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        }
    }
}

/// Inverted dropout: zeroes an element with probability `p`, scales the others by 1 / (1 - p). The choice is a pure function of
/// `counter` and the element's index, so that backward makes it again instead of storing it.
pub(crate) fn dropout(x: &[f32], p: f32, counter: Counter, out: &mut [f32]) {
    // 32 random bits below the threshold drop the element: resolution 2^-32.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    let scale = 1.0 / (1.0 - p);
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(c, (o, x))| {
        for (i, (o, x)) in o.iter_mut().zip(x).enumerate() {
            let keep = u64::from(uniform_bits(counter, (c * CHUNK + i) as u64)) >= threshold;
            *o = if keep { x * scale } else { 0.0 };
        }
    });
}
