//! Weights' gradients that are left for later have the bits of those that are not.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::{self, Compute, Pre, defer_weights, with_compute};

fn values<const D: usize>(shape: [usize; D], k: usize, device: &Device) -> Tensor<D> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * k + i / 7) % 23) as f32 * 0.1 - 1.0).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn bits<const D: usize>(tensor: Option<Tensor<D>>) -> Option<Vec<u32>> {
    tensor.map(|tensor| tensor.into_data().iter::<f32>().map(f32::to_bits).collect())
}

#[test]
fn what_is_left_for_later_has_the_same_bits() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let leaf = |k| values([33], k, &device).require_grad();
    let pres: [&dyn Fn(&Tensor<1>) -> Pre; 6] = [
        &|_| Pre::Nothing,
        &|gain| Pre::RmsNorm { weight: gain.clone(), eps: 1e-5 },
        &|gain| Pre::LayerNorm { weight: gain.clone(), bias: Some(gain.clone()), eps: 1e-5 },
        &|_| Pre::Gelu,
        &|_| Pre::GeluExact,
        &|_| Pre::SwiGlu,
    ];
    for (compute, (case, pre)) in
        [Compute::F32, Compute::Bf16].into_iter().flat_map(|c| pres.iter().enumerate().map(move |p| (c, p)))
    {
        let width = if case == 5 { 66 } else { 33 };
        let x = values([2, 5, width], 5, &device).require_grad();
        let (gain, bias) = (leaf(3), values([19], 11, &device).require_grad());
        let w = values([33, 19], 7, &device).require_grad();
        let loss = || {
            let layer = || ops::fused_linear(x.clone(), pre(&gain), w.clone(), Some(bias.clone()), None);
            with_compute(compute, || (layer() * values([2, 5, 19], 13, &device)).sum())
        };
        let mut now = loss().backward();
        let (mut grads, mut later) = defer_weights(|| loss().backward());
        let case = format!("{compute:?}, {case}");
        assert!(w.grad_remove(&mut grads).is_none() && !later.is_empty(), "{case}: it is left");
        for other in [&gain, &bias] {
            assert_eq!(bits(other.grad_remove(&mut grads)), bits(other.grad_remove(&mut now)), "{case}");
        }
        assert_eq!(bits(x.grad_remove(&mut grads)), bits(x.grad_remove(&mut now)), "{case}: the input's");
        assert!(later.compute(bias.clone()).is_none());
        assert_eq!(bits(later.compute(w.clone())), bits(w.grad_remove(&mut now)), "{case}: the weight's");
        assert!(later.is_empty() && later.compute(w.clone()).is_none());
    }
}

#[test]
fn two_layers_of_one_weight_are_added_up_and_carried_gradients_are_not_left() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let w = values([8, 8], 7, &device).require_grad();
    let x = values([3, 8], 5, &device);
    let loss = || ops::linear(ops::linear_transposed(x.clone(), w.clone()), w.clone(), None).sum();
    let mut now = loss().backward();
    let (_, mut later) = defer_weights(|| loss().backward());
    assert_eq!(bits(later.compute(w.clone())), bits(w.grad_remove(&mut now)));

    let carried = values([64], 3, &device.clone().inner());
    assert!(ops::carry_gradient(w.clone(), carried).is_none());
    let once = || ops::linear(x.clone(), w.clone(), None).sum();
    let (mut grads, later) = defer_weights(|| once().backward());
    assert!(later.is_empty() && w.grad_remove(&mut grads).is_some());
}
