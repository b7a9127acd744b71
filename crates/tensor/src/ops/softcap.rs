//! Soft-caps of logits.

use burn::tensor::Tensor;

/// `cap tanh(x / cap)`: nearly x where that is small, and always in (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2); x itself if `cap` is 0. Composed of
/// burn's operations; [`attention`](super::attention()) and [`linear_cross_entropy`](super::linear_cross_entropy) have it inside.
///
/// # Panics
/// If `cap` is negative or not finite.
pub fn soft_cap<const D: usize>(x: Tensor<D>, cap: f64) -> Tensor<D> {
    assert_cap(cap);
    if cap == 0.0 { x } else { (x * (1.0 / cap)).tanh() * cap }
}

#[track_caller]
pub(super) fn assert_cap(cap: f64) {
    assert!(cap >= 0.0 && cap.is_finite(), "soft-cap {cap} is not a number of at least 0");
}
