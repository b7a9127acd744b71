//! Comparing a fused operation with its plain reference, and its gradient with finite differences, on every CPU backend of the build.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses some of it

use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::device::Backend;
use firebox_tensor::random::{Counter, Purpose, normal};

/// f32 rounding through sums of a few hundred terms, relative to the largest value.
const TOLERANCE: f64 = 2e-5;

pub fn devices() -> Vec<Device> {
    [Backend::NdArray, Backend::Flex].into_iter().filter_map(|b| b.device().ok()).collect()
}

pub fn values(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| normal(Counter::new(seed, Purpose::Init, 0), i)).collect()
}

pub fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

pub fn host<const D: usize>(t: Tensor<D>) -> Vec<f64> {
    to_f64(&t.into_data().try_to_vec::<f32>().unwrap())
}

#[track_caller]
pub fn close(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let size = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= TOLERANCE * size, "{what}[{i}]: got {g}, expected {w} (largest {size})");
    }
}

/// Compares value and gradients of `fused` with `plain`; both map flat inputs to a flat output.
#[track_caller]
pub fn check(
    what: &str,
    lengths: &[usize],
    fused: impl Fn(Vec<Tensor<1>>) -> Tensor<1>,
    plain: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let inputs: Vec<Vec<f32>> = lengths.iter().enumerate().map(|(i, &n)| values(n, i as u64 + 1)).collect();
    let exact: Vec<Vec<f64>> = inputs.iter().map(|v| to_f64(v)).collect();
    let want = plain(&exact);
    let upstream = values(want.len(), 99);
    let objective =
        |inputs: &[Vec<f64>]| -> f64 { plain(inputs).iter().zip(&upstream).map(|(y, &u)| y * f64::from(u)).sum() };
    for device in devices() {
        let what = format!("{what} on {device:?}");
        let make = |device: &Device| -> Vec<Tensor<1>> {
            inputs.iter().map(|v| Tensor::from_data(TensorData::new(v.clone(), [v.len()]), device)).collect()
        };
        close(&format!("{what}: without gradients"), &host(fused(make(&device))), &want);
        let device = device.autodiff();
        let tensors: Vec<Tensor<1>> = make(&device).into_iter().map(Tensor::require_grad).collect();
        let y = fused(tensors.clone());
        close(&format!("{what}: output"), &host(y.clone()), &want);
        let u = Tensor::from_data(TensorData::new(upstream.clone(), [upstream.len()]), &device);
        let grads = (y * u).sum().backward();
        for (k, tensor) in tensors.iter().enumerate() {
            let got = host(tensor.grad(&grads).unwrap());
            // Up to 24 coordinates, spread over the input: central differences, whose error at 1e-4 is about 1e-8.
            let step = (got.len() / 24).max(1);
            let at: Vec<usize> = (0..got.len()).step_by(step).collect();
            let slope = |i: usize| {
                let mut moved = exact.clone();
                moved[k][i] += 1e-4;
                let up = objective(&moved);
                moved[k][i] -= 2e-4;
                (up - objective(&moved)) / 2e-4
            };
            let size = got.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
            for i in at {
                let want = slope(i);
                assert!(
                    (got[i] - want).abs() <= 5.0 * TOLERANCE * size,
                    "{what}: gradient {k}[{i}]: got {}, expected {want}",
                    got[i]
                );
            }
        }
    }
}
