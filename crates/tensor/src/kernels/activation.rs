//! GELU, SwiGLU and counted dropout: element-wise kernels with their derivatives.

use rayon::prelude::*;

use super::CHUNK;
use super::simd::{erf, exp, sigmoid, vectorized};
use crate::random::{Counter, uniform_bits};

/// sqrt(2 / pi)
const C: f32 = 0.797_884_6;
/// Cubic coefficient of the tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415, section 2).
const A: f32 = 0.044_715;
/// 1 / sqrt(2 pi)
const DENSITY: f32 = 0.398_942_3;
/// Slope of the logistic function that is near the normal distribution's (Hendrycks and Gimpel, section 2).
const QUICK: f32 = 1.702;

/// The forms of GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gelu {
    /// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    Tanh,
    /// x / 2 (1 + erf(x / sqrt(2)))
    Exact,
    /// x sigmoid(1.702 x)
    Quick,
}

/// `out = gelu(x)`; reads 4 bytes and writes 4 per element.
pub(crate) fn gelu(x: &[f32], form: Gelu, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(o, x)| gelu_chunk(x, form, o));
}

vectorized! {
    fn gelu_chunk(x: &[f32], form: Gelu, out: &mut [f32]) {
        let pairs = out.iter_mut().zip(x);
        match form {
            // 1 + tanh(u) = 2 sigmoid(2 u)
            Gelu::Tanh => pairs.for_each(|(o, &x)| *o = x * sigmoid(2.0 * C * (x + A * x * x * x))),
            Gelu::Exact => pairs.for_each(|(o, &x)| *o = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
            Gelu::Quick => pairs.for_each(|(o, &x)| *o = x * sigmoid(QUICK * x)),
        }
    }
}

/// `g *= gelu'(x)` and `out = gelu(x)`, which share the costly part.
pub(crate) fn gelu_again(x: &[f32], form: Gelu, g: &mut [f32], out: &mut [f32]) {
    g.par_chunks_mut(CHUNK)
        .zip(out.par_chunks_mut(CHUNK))
        .zip(x.par_chunks(CHUNK))
        .for_each(|((g, out), x)| gelu_again_chunk(x, form, g, out));
}

vectorized! {
    fn gelu_again_chunk(x: &[f32], form: Gelu, g: &mut [f32], out: &mut [f32]) {
        let triples = g.iter_mut().zip(out).zip(x);
        match form {
            Gelu::Tanh => triples.for_each(|((g, o), &x)| {
                let s = sigmoid(2.0 * C * (x + A * x * x * x));
                let slope = 2.0 * C * (1.0 + 3.0 * A * x * x);
                *o = x * s;
                *g *= s + x * s * (1.0 - s) * slope;
            }),
            Gelu::Exact => triples.for_each(|((g, o), &x)| {
                let erf = erf(x * std::f32::consts::FRAC_1_SQRT_2);
                *o = 0.5 * x * (1.0 + erf);
                *g *= 0.5 * (1.0 + erf) + x * DENSITY * exp(-0.5 * x * x);
            }),
            Gelu::Quick => triples.for_each(|((g, o), &x)| {
                let s = sigmoid(QUICK * x);
                *o = x * s;
                *g *= s + x * s * (1.0 - s) * QUICK;
            }),
        }
    }
}

/// `g *= gelu'(x)`
pub(crate) fn gelu_backward(x: &[f32], form: Gelu, g: &mut [f32]) {
    g.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(g, x)| gelu_backward_chunk(x, form, g));
}

vectorized! {
    fn gelu_backward_chunk(x: &[f32], form: Gelu, g: &mut [f32]) {
        let pairs = g.iter_mut().zip(x);
        match form {
            Gelu::Tanh => pairs.for_each(|(g, &x)| {
                let s = sigmoid(2.0 * C * (x + A * x * x * x));
                let slope = 2.0 * C * (1.0 + 3.0 * A * x * x);
                *g *= s + x * s * (1.0 - s) * slope;
            }),
            Gelu::Exact => pairs.for_each(|(g, &x)| {
                let cumulative = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
                *g *= cumulative + x * DENSITY * exp(-0.5 * x * x);
            }),
            Gelu::Quick => pairs.for_each(|(g, &x)| {
                let s = sigmoid(QUICK * x);
                *g *= s + x * s * (1.0 - s) * QUICK;
            }),
        }
    }
}

/// SwiGLU over packed rows `[gate | up]` of `2 f` values: `out = silu(gate) * up`, rows of `f`
/// (Shazeer, arXiv:2002.05202).
pub(crate) fn swiglu(x: &[f32], f: usize, out: &mut [f32]) {
    if f == 0 {
        return;
    }
    let rows = (CHUNK / f).max(1);
    out.par_chunks_mut(rows * f).zip(x.par_chunks(rows * 2 * f)).for_each(|(o, x)| {
        for (o, x) in o.chunks_exact_mut(f).zip(x.chunks_exact(2 * f)) {
            let (gate, up) = x.split_at(f);
            swiglu_row(gate, up, o);
        }
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
    let rows = (CHUNK / f).max(1);
    let (wide, narrow) = (rows * 2 * f, rows * f);
    dx.par_chunks_mut(wide).zip(x.par_chunks(wide)).zip(dy.par_chunks(narrow)).for_each(|((dx, x), dy)| {
        for ((dx, x), dy) in dx.chunks_exact_mut(2 * f).zip(x.chunks_exact(2 * f)).zip(dy.chunks_exact(f)) {
            let (gate, up) = x.split_at(f);
            let (dgate, dup) = dx.split_at_mut(f);
            swiglu_backward_row(gate, up, dy, dgate, dup);
        }
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
/// `counter` and the element's index, counted from `first`, so that backward makes it again instead of storing it.
pub(crate) fn dropout(x: &[f32], p: f32, counter: Counter, first: u64, out: &mut [f32]) {
    // 32 random bits below the threshold drop the element: resolution 2^-32.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    let scale = 1.0 / (1.0 - p);
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(c, (o, x))| {
        for (i, (o, x)) in o.iter_mut().zip(x).enumerate() {
            let keep = u64::from(uniform_bits(counter, first + (c * CHUNK + i) as u64)) >= threshold;
            *o = if keep { x * scale } else { 0.0 };
        }
    });
}
