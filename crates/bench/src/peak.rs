//! The contender that measures what the machine can do.

use firebox_train::observe::memory;

use crate::error::Result;
use crate::protocol::{Ready, serve};

/// Runs the worker: each turn's value is the peak rate of matrix products, FLOP/s.
///
/// # Errors
/// The streams.
pub fn work() -> Result<()> {
    let software = "gemm".to_owned();
    let ready = Ready { params: 0, loss: 0.0, rss_before_model_bytes: memory::current_bytes(), software };
    serve(&ready, |_, n, _| {
        Ok((0..n)
            .map(|_| firebox_tensor::peak::measure_matmul_flops(firebox_tensor::ops::Compute::F32))
            .fold(0.0, f64::max))
    })
}
