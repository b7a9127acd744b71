//! Steps of element-wise optimizers over flat slices: in place, all threads, one pass over memory.

use rayon::prelude::*;

use super::CHUNK;
use super::compact::hash;
use super::scratch::with_scratch;
use super::simd::{self, vectorized};
use crate::ops::formula::with_formula;
use crate::ops::state::{PART, Store};
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

/// The same for states in fewer bits, all of them, in parts of [`PART`] values: each part is read, updated and written back while it is in the cache.
/// `seed`, another one in every step, decides how bfloat16 rounds.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn update_compact(rule: Update, param: &mut [f32], grad: &[f32], states: &mut [Store], seed: u32) {
    let all_fit = states.iter().all(|state| state.len() == param.len());
    assert!(grad.len() == param.len() && states.len() == rule.states() && all_fit, "update: lengths differ");
    let mut parts: Vec<_> = states.iter_mut().map(|state| state.parts_mut().into_iter()).collect();
    let tasks: Vec<_> = param
        .chunks_mut(PART)
        .zip(grad.chunks(PART))
        .map(|(param, grad)| (param, grad, parts.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>()))
        .collect();
    tasks.into_par_iter().enumerate().for_each(|(i, (param, grad, mut states))| {
        let n = param.len();
        with_scratch(3 * PART, |scratch| {
            let (a, rest) = scratch.split_at_mut(PART);
            let (b, c) = rest.split_at_mut(PART);
            let mut values = [&mut a[..n], &mut b[..n], &mut c[..n]];
            states.iter().zip(&mut values).for_each(|(state, values)| state.read(values));
            let [a, b, c] = values.each_mut();
            chunk(rule, param, grad, a, b, c);
            for (s, (state, values)) in states.iter_mut().zip(&values).enumerate() {
                state.write(values, hash(seed, (3 * i + s) as u32));
            }
        });
    });
}

/// Scales every row of `grad` whose norm is more than `share` of its row's in `param`, or of `least` where that is more, down to just that.
pub(crate) fn clip_rows(grad: &mut [f32], param: &[f32], rows: usize, share: f32, least: f32) {
    let columns = grad.len() / rows;
    let tasks = grad.par_chunks_mut(columns).zip(param.par_chunks(columns));
    tasks.with_min_len(CHUNK.div_ceil(columns)).for_each(|(grad, param)| clip_row(grad, param, share, least));
}

vectorized! {
    fn clip_row(grad: &mut [f32], param: &[f32], share: f32, least: f32) {
        let most = simd::dot(param, param).sqrt().max(least) * share;
        let norm = simd::dot(grad, grad).sqrt();
        if norm > most {
            let factor = most / norm;
            grad.iter_mut().for_each(|x| *x *= factor);
        }
    }
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
