//! AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2) over flat slices, in place, one pass.

use rayon::prelude::*;

use super::CHUNK;
use super::simd::vectorized;
use crate::ops::AdamWHyper;

/// Updates `param`, `m` and `v`; reads 16 bytes and writes 12 per parameter.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], h: AdamWHyper) {
    assert!(param.len() == grad.len() && param.len() == m.len() && param.len() == v.len(), "adamw: lengths differ");
    param
        .par_chunks_mut(CHUNK)
        .zip(grad.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .for_each(|(((p, g), m), v)| chunk(p, g, m, v, h));
}

vectorized! {
    fn chunk(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], h: AdamWHyper) {
        let n = param.len();
        let (grad, m, v) = (&grad[..n], &mut m[..n], &mut v[..n]);
        // mhat / (sqrt(vhat) + eps) with the bias corrections moved into two scalars.
        let step = h.lr / h.bias_correction1;
        let root = 1.0 / h.bias_correction2.sqrt();
        let decay = h.lr * h.weight_decay;
        let (c1, c2) = (1.0 - h.beta1, 1.0 - h.beta2);
        for i in 0..n {
            let g = grad[i] * h.grad_scale;
            m[i] = h.beta1 * m[i] + c1 * g;
            v[i] = h.beta2 * v[i] + c2 * g * g;
            param[i] = param[i] - step * m[i] / (v[i].sqrt() * root + h.eps) - decay * param[i];
        }
    }
}
