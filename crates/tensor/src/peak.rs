//! The machine's measured peak: what a share of it (MFU) refers to.

use std::time::{Duration, Instant};

use crate::kernels::matmul::{Compute, Into, Mat, matmul};

/// Peak rate of matrix products in FLOP/s, in f32 or 16 bits, on the threads of the pool, measured for about a third of a second on 768 x 768 x 768
/// (a shape that fits the caches): the best of the runs, since others may use the machine.
pub fn measure_matmul_flops(compute: Compute) -> f64 {
    const N: usize = 768;
    let a = vec![0.5f32; N * N];
    let b = vec![0.25f32; N * N];
    let mut c = vec![0f32; N * N];
    let started = Instant::now();
    let mut best = Duration::MAX;
    while started.elapsed() < Duration::from_millis(350) {
        let run = Instant::now();
        matmul(compute, Mat::new(&a, N, N, N), Mat::new(&b, N, N, N), &mut c, N, Into::Write);
        best = best.min(run.elapsed());
    }
    std::hint::black_box(&c);
    2.0 * (N as f64).powi(3) / best.as_secs_f64()
}
