//! Steps of element-wise optimizers over flat slices: in place, all threads, one pass over memory.

use rayon::prelude::*;

use super::CHUNK;
use super::simd::vectorized;
use crate::ops::formula::with_formula;
use crate::ops::{Formula, Update};

/// Updates `param` and its states; those that the update does not have are empty.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn update(rule: Update, param: &mut [f32], grad: &[f32], states: [&mut [f32]; 3]) {
    let lengths = states.each_ref().map(|state| state.len());
    let expected = std::array::from_fn(|i| if i < rule.states() { param.len() } else { 0 });
    assert!(grad.len() == param.len() && lengths == expected, "update: lengths differ");
    let mut states = states.map(|state| state.chunks_mut(CHUNK));
    let chunks: Vec<_> = param
        .chunks_mut(CHUNK)
        .zip(grad.chunks(CHUNK))
        .map(|(param, grad)| (param, grad, states.each_mut().map(|chunks| chunks.next().unwrap_or_default())))
        .collect();
    chunks.into_par_iter().for_each(|(param, grad, [a, b, c])| chunk(rule, param, grad, a, b, c));
}

vectorized! {
    fn chunk(rule: Update, param: &mut [f32], grad: &[f32], a: &mut [f32], b: &mut [f32], c: &mut [f32]) {
        with_formula!(rule, formula => each(formula, param, grad, a, b, c));
    }
}

/// One loop for each number of states, so that the compiler sees all lengths.
#[inline(always)]
fn each<F: Formula>(formula: F, param: &mut [f32], grad: &[f32], a: &mut [f32], b: &mut [f32], c: &mut [f32]) {
    let n = param.len();
    let grad = &grad[..n];
    match F::STATES {
        0 => {
            for i in 0..n {
                param[i] = formula.step(param[i], grad[i], &mut []);
            }
        }
        1 => {
            let a = &mut a[..n];
            for i in 0..n {
                let mut states = [a[i]];
                param[i] = formula.step(param[i], grad[i], &mut states);
                [a[i]] = states;
            }
        }
        2 => {
            let (a, b) = (&mut a[..n], &mut b[..n]);
            for i in 0..n {
                let mut states = [a[i], b[i]];
                param[i] = formula.step(param[i], grad[i], &mut states);
                [a[i], b[i]] = states;
            }
        }
        _ => {
            let (a, b, c) = (&mut a[..n], &mut b[..n], &mut c[..n]);
            for i in 0..n {
                let mut states = [a[i], b[i], c[i]];
                param[i] = formula.step(param[i], grad[i], &mut states);
                [a[i], b[i], c[i]] = states;
            }
        }
    }
}
