//! Products in 16 bits and weights in bfloat16, against f32, on every CPU backend of the build.
#![allow(clippy::unwrap_used)]

mod check;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::{devices, host, values};
use firebox_tensor::ops::{
    self, AttentionConfig, Compute, LossConfig, Pre, Sequence, is_bf16, to_bf16, to_f32, with_compute,
};

const SHAPES: [(usize, usize, usize); 3] = [(1, 2, 3), (6, 33, 17), (140, 48, 70)];

fn tensor<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values(shape.iter().product(), seed), shape), device)
}

/// A model of one layer of everything: its loss, and the gradients of its input and its weights.
fn model(weights: [Tensor<2>; 4], rows: usize, device: &Device) -> Vec<Vec<f64>> {
    let autodiff = device.clone().autodiff();
    let leaf = |t: Tensor<2>| Tensor::from_inner(t).require_grad();
    let [table, qkv, out, head] = weights.map(leaf);
    let (vocab, d) = (table.dims()[0], table.dims()[1]);
    let ids: Arc<[i32]> = (0..rows).map(|i| (i * 7 % vocab) as i32).collect();
    let gain = Tensor::<1>::ones([d], &autodiff);
    let x = ops::embedding(table.clone(), ids.clone(), 1, rows);
    let pre = Pre::RmsNorm { weight: gain, eps: 1e-6 };
    let config = AttentionConfig { n_heads: 1, n_kv_heads: 1, head_dim: d, window: None, rope: None, softcap: 0.0 };
    let packed = ops::fused_linear(x.clone(), pre, qkv.clone(), None, None);
    let attended = ops::attention(packed, &config, &Sequence::plain(1, rows));
    let y = ops::fused_linear(attended, Pre::Gelu, out.clone(), None, Some(x));
    let logits = ops::linear_transposed(y.clone(), head.clone()).sum() * 1e-3;
    let loss = ops::linear_cross_entropy(
        y.reshape([rows, d]),
        head.clone(),
        ids,
        1.0 / rows as f64,
        0.0,
        &LossConfig::default(),
    );
    let loss = loss + logits;
    let value = host(loss.clone());
    let grads = loss.backward();
    let gradients = [table, qkv, out, head].map(|w| host(w.grad(&grads).unwrap()));
    [value].into_iter().chain(gradients).collect()
}

fn weights(vocab: usize, d: usize, device: &Device) -> [Tensor<2>; 4] {
    let scale = (d as f64).powf(-0.5);
    [([vocab, d], 1), ([d, 3 * d], 2), ([d, d], 3), ([vocab, d], 4)]
        .map(|(shape, seed)| tensor(shape, seed, device) * scale)
}

#[test]
fn halves_follow_f32() {
    for device in devices() {
        for (rows, d, vocab) in SHAPES {
            let exact = model(weights(vocab, d, &device), rows, &device);
            for (compute, bound) in [(Compute::Bf16, 3e-2), (Compute::F16, 4e-3)] {
                let half = with_compute(compute, || model(weights(vocab, d, &device), rows, &device));
                for (i, (half, exact)) in half.iter().zip(&exact).enumerate() {
                    let size = exact.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
                    let worst = half.iter().zip(exact).fold(0f64, |worst, (a, b)| worst.max((a - b).abs())) / size;
                    let what = format!("{compute:?} on {device:?}, {rows} rows, width {d}, part {i}");
                    assert!(worst < bound, "{what}: {worst}");
                    // It is another precision, and not only for the first product.
                    assert!(worst > 0.0 || half.len() < 8, "{what}: no rounding at all");
                }
            }
        }
    }
}

/// A weight in bfloat16 is the same numbers.
#[test]
fn weights_in_bf16_give_the_bits_of_their_values() {
    for device in devices() {
        for (rows, d, vocab) in SHAPES {
            for compute in [Compute::F32, Compute::Bf16, Compute::F16] {
                let held = || weights(vocab, d, &device).map(|w| to_bf16(w, None));
                let run = |weights| with_compute(compute, || model(weights, rows, &device));
                assert!(held().iter().all(is_bf16));
                assert_eq!(run(held()), run(held().map(to_f32)), "{compute:?} on {device:?}, width {d}");
            }
        }
    }
}

#[test]
fn rounding_is_right_in_the_mean_and_keeps_what_is_exact() {
    for device in devices() {
        let x = tensor([40, 100], 7, &device);
        let (nearest, twice) = (to_f32(to_bf16(x.clone(), None)), 1.0 + 1.0 / 256.0);
        assert_eq!(host(to_f32(to_bf16(nearest.clone(), Some(3)))), host(nearest.clone()));
        assert!(host(nearest).iter().zip(host(x.clone())).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0));
        let mean = (0..400).fold(x.zeros_like(), |sum, seed| sum + to_f32(to_bf16(x.clone(), Some(seed * 31)))) / 400.0;
        for (mean, x) in host(mean).iter().zip(host(x)) {
            // The step is 2^-7 of the value at most; the mean of 400 has a deviation of a fortieth of it.
            assert!((mean - x).abs() < x.abs() / 128.0 / 5.0 * twice, "{mean} {x}");
        }
    }
}
