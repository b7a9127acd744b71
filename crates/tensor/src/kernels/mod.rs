//! The kernels of the hot path: safe functions over `f32` slices, row-major, multi-threaded by `rayon`'s pool.
//!
//! They know no tensor and no backend. Each is compared on odd shapes with the plain double-precision functions in
//! `tests/reference`, its gradient with finite differences of those.

pub(crate) mod activation;
pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod cross_entropy;
pub(crate) mod embedding;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod panel;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod tile;

/// Elements a task of an element-wise kernel works on: 64 KiB of f32, so that its inputs and outputs stay in a core's L2 cache.
pub(crate) const CHUNK: usize = 16 * 1024;

/// Adds `x` to `y` element by element.
pub(crate) fn add_assign(y: &mut [f32], x: &[f32]) {
    debug_assert_eq!(y.len(), x.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}
