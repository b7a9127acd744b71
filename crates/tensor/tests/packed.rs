//! Layers with packed weights against the same layers with the values that their codes mean, on every CPU backend of the build.
#![allow(clippy::unwrap_used)]

mod check;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::{devices, host, values};
use firebox_tensor::ops::{self, LossConfig, PackedMatrix, Pre, Scales};

fn tensor<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values(shape.iter().product(), seed), shape), device)
}

/// Four bits in groups of 32 with zero points, and bytes.
fn matrices(outputs: usize, inputs: usize) -> [(Arc<PackedMatrix>, f64); 2] {
    let groups = inputs.div_ceil(32);
    let codes: Vec<u8> = (0..outputs * inputs.div_ceil(2)).map(|i| (i * 73 % 251) as u8).collect();
    let scales = (0..outputs * groups).map(|i| 0.01 + (i % 7) as f32 * 0.002).collect();
    let zeros = (0..outputs * groups).map(|i| (i % 16) as u8).collect();
    let levels = std::array::from_fn(|c| c as f32);
    let four = PackedMatrix::int4([outputs, inputs], 32, &codes, Scales::F32(scales), Some(zeros), levels).unwrap();
    let bytes: Vec<i8> = (0..outputs * inputs).map(|i| (i * 91 % 255) as u8 as i8).collect();
    let eight = PackedMatrix::int8([outputs, inputs], &bytes, vec![0.003; outputs]).unwrap();
    // Inputs that are rounded to 8 bits are off by up to 1/254 of the largest.
    [(Arc::new(four), 1e-5), (Arc::new(eight), 0.03)]
}

fn assert_near(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    let size = want.iter().fold(1.0f64, |size, x| size.max(x.abs()));
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance * size, "{what}: {got} {want}");
    }
}

#[test]
fn layers_do_what_the_values_of_their_codes_do() {
    for device in devices() {
        for (rows, inputs, outputs) in [(1, 40, 6), (3, 33, 17), (70, 96, 50)] {
            for (w, tolerance) in matrices(outputs, inputs) {
                let full = Tensor::<2>::from_data(TensorData::new(w.dequantized(), [outputs, inputs]), &device);
                let norm = |d: usize| (tensor([d], 5, &device), Some(tensor([d], 6, &device)));
                let pres = |d: usize| {
                    let (weight, bias) = norm(d);
                    [
                        (Pre::Nothing, d),
                        (Pre::LayerNorm { weight: weight.clone(), bias, eps: 1e-5 }, d),
                        (Pre::RmsNorm { weight, eps: 1e-6 }, d),
                        (Pre::Gelu, d),
                        (Pre::GeluExact, d),
                        (Pre::SwiGlu, 2 * d),
                    ]
                };
                for (pre, width) in pres(inputs) {
                    let x: Tensor<3> = tensor([1, rows, width], 1, &device);
                    for (bias, residual) in [(false, false), (true, false), (false, true), (true, true)] {
                        let bias = bias.then(|| tensor([outputs], 2, &device));
                        let residual: Option<Tensor<3>> = residual.then(|| tensor([1, rows, outputs], 3, &device));
                        let what = format!("{pre:?} {rows} {inputs} {outputs}");
                        let got = ops::packed_linear(x.clone(), pre.clone(), w.clone(), bias.clone(), residual.clone());
                        let want = ops::fused_linear(x.clone(), pre.clone(), full.clone().transpose(), bias, residual);
                        assert_eq!(got.dims(), [1, rows, outputs]);
                        assert_near(&host(got), &host(want), tolerance, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn tables_and_heads_do_what_the_values_of_their_codes_do() {
    for device in devices() {
        let (rows, v, d) = (50, 61, 40);
        for (w, tolerance) in matrices(v, d) {
            let full = Tensor::<2>::from_data(TensorData::new(w.dequantized(), [v, d]), &device);
            let ids: Arc<[i32]> = (0..rows).map(|i| (i * 7 % v) as i32).collect();
            let got = ops::packed_rows(&w, &ids, 2, rows / 2, &device);
            assert_eq!(host(got), host(ops::embedding(full.clone(), ids, 2, rows / 2)));
            let hidden: Tensor<2> = tensor([rows, d], 4, &device);
            let targets: Arc<[i32]> = (0..rows).map(|i| (i * 11 % v) as i32 - 5).collect();
            for cap in [0.0, 3.0] {
                let got = ops::packed_cross_entropy(hidden.clone(), &w, &targets, 0.1, cap);
                let (targets, loss) = (targets.clone(), LossConfig::default());
                let want = ops::linear_cross_entropy(hidden.clone(), full.clone(), targets, 0.1, cap, &loss);
                assert_near(&host(got), &host(want), tolerance, "loss");
            }
        }
    }
}
