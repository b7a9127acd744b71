//! The kernels of the hot path: safe functions over `f32` slices, row-major, multi-threaded by `rayon`'s pool.
//!
//! They know no tensor and no backend. Each is compared on odd shapes with the plain double-precision functions in
//! `tests/reference`, its gradient with finite differences of those.

use rayon::prelude::*;

use matmul::Into;

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod compact;
pub(crate) mod cross_entropy;
pub(crate) mod distillation;
pub(crate) mod embedding;
pub(crate) mod experts;
pub(crate) mod factored;
pub(crate) mod fake_quant;
pub(crate) mod half;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod panel;
pub(crate) mod preference;
pub(crate) mod quantized;
pub(crate) mod relations;
pub(crate) mod scratch;
pub(crate) mod simd;
mod softmax;
pub(crate) mod tile;
pub(crate) mod update;

/// Elements a task of an element-wise kernel works on: 64 KiB of f32, so that its inputs and outputs stay in a core's L2 cache.
pub(crate) const CHUNK: usize = 16 * 1024;

/// Adds `x` to `y` element by element.
pub(crate) fn add_assign(y: &mut [f32], x: &[f32]) {
    debug_assert_eq!(y.len(), x.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

simd::vectorized! {
    fn add_chunk(y: &mut [f32], x: &[f32]) {
        add_assign(y, x);
    }
}

/// [`add_assign`] on all threads.
pub(crate) fn add(y: &mut [f32], x: &[f32]) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| add_chunk(y, x));
}

/// `y = x`, on all threads.
pub(crate) fn copy(y: &mut [f32], x: &[f32]) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| y.copy_from_slice(x));
}

/// Sums the rows of a `[n, width]` matrix that `row` adds one after the other into the sums it is given, in an order that does not depend on
/// the number of threads; `sums` is overwritten or added to.
pub(crate) fn sum_over_rows<T: Send>(
    chunks: impl IndexedParallelIterator<Item = T>,
    sums: &mut [f32],
    into: Into,
    rows: impl Fn(T, &mut [f32]) + Sync + Send,
) {
    let width = sums.len();
    let partial: Vec<Vec<f32>> = chunks
        .map(|chunk| {
            let mut partial = vec![0.0; width];
            rows(chunk, &mut partial);
            partial
        })
        .collect();
    if into == Into::Write {
        sums.fill(0.0);
    }
    for partial in &partial {
        add_assign(sums, partial);
    }
}
