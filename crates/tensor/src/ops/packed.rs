//! Linear layers, tables and heads whose weights are integers, on the CPU backends: for inference, and linear layers as what adapters are trained on.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::extension::FusedOps;
use super::linear::{Linear, Pre, PreOp, check, or_none, some};
use super::softcap::assert_cap;
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::cross_entropy::logits_cross_entropy;
use crate::kernels::linear::{self as kernel, start};
use crate::kernels::matmul::{Compute, Into, Mat, matmul};
pub use crate::kernels::quantized::{PackedError, PackedMatrix, Scales};

/// Bytes of logits that exist at once.
const LOGITS_BYTES: usize = 16 << 20;

/// `y = pre(x) w^T + b + residual` of a packed weight, which itself has no gradient; that of everything else is as if the weight were what its codes mean. See
/// [`PackedMatrix`] for what is rounded.
///
/// # Shapes
/// - `x`: `[.., I]` (`[.., 2 I]` for SwiGLU), `w`: `[O, I]`, `b`: `[O]`, `residual`: `[.., O]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit, or the device is no CPU backend.
pub fn packed_linear<const D: usize>(
    x: Tensor<D>,
    pre: Pre,
    w: Arc<PackedMatrix>,
    b: Option<Tensor<1>>,
    residual: Option<Tensor<D>>,
) -> Tensor<D> {
    let (mut dims, [outputs, inputs], device) = (x.dims(), w.shape(), x.device());
    check(&x, if matches!(pre, Pre::SwiGlu) { 2 * inputs } else { inputs });
    dims[D - 1] = outputs;
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), dims, "packed linear: the residual does not have the shape of the output");
    }
    if let Some(b) = &b {
        assert_eq!(b.dims(), [outputs], "packed linear: the bias does not have the shape of the output");
    }
    assert!(is_fused(&device), "packed weights are for the CPU backends (ndarray, flex)");
    let (Linear { pre, .. }, norm_parameters) = Linear::taken_apart(pre);
    let [norm_weight, norm_bias] = norm_parameters.map(|p| or_none(p, &device).into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_packed_linear(
        x.into_dispatch(),
        or_none(b, &device).into_dispatch(),
        or_none(residual, &device).into_dispatch(),
        norm_weight,
        norm_bias,
        PackedLinear { pre, weight: w },
    ))
}

/// `table[ids]` as `[B, T, D]`, in f32.
///
/// # Shapes
/// - `table`: `[V, D]`, `ids`: `B * T` values
///
/// # Panics
/// If an id is not in the table, or there are not `batch * tokens` ids.
pub fn packed_rows(table: &PackedMatrix, ids: &[i32], batch: usize, tokens: usize, device: &Device) -> Tensor<3> {
    let [v, d] = table.shape();
    assert_eq!(ids.len(), batch * tokens, "embedding: {} ids for {batch} rows of {tokens} tokens", ids.len());
    let mut values = buffer(ids.len() * d);
    for (&id, row) in ids.iter().zip(values.chunks_exact_mut(d)) {
        let id = usize::try_from(id).ok().filter(|&id| id < v);
        table.row(id.unwrap_or_else(|| panic!("embedding: an id is not in the table of {v} rows")), row);
    }
    Tensor::from_data(TensorData::new(values, [batch, tokens, d]), device)
}

/// [`linear_cross_entropy`](super::linear_cross_entropy) of a packed head, without a gradient, label smoothing or z-loss. The logits of all rows never exist at
/// once.
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[V, D]`, `targets`: `N` values; output `[1]`
///
/// # Panics
/// If a target is not below V, the number of targets is not N, `softcap` is out of range, or the device is no CPU backend, or one with gradients.
pub fn packed_cross_entropy(
    hidden: Tensor<2>,
    weight: &PackedMatrix,
    targets: &[i32],
    scale: f64,
    softcap: f64,
) -> Tensor<1> {
    let (device, [n, d], v) = (hidden.device(), hidden.dims(), weight.shape()[0]);
    assert_usable(&device);
    assert_eq!(d, weight.shape()[1], "cross-entropy: the head does not have the width of the hidden states");
    assert_eq!(targets.len(), n, "cross-entropy: {} targets for {n} rows", targets.len());
    if let Some(bad) = targets.iter().find(|&&t| t >= 0 && t as usize >= v) {
        panic!("cross-entropy: target {bad} is not in the vocabulary of {v}");
    }
    assert_cap(softcap);
    // PANIC: Firebox's tensors are f32.
    let hidden = hidden.into_data().try_into_vec::<f32>().expect("an f32 tensor");
    let rows = (LOGITS_BYTES / (4 * v)).max(64);
    let mut total = 0f64;
    for (hidden, targets) in hidden.chunks(rows * d).zip(targets.chunks(rows)) {
        let mut logits = buffer(targets.len() * v);
        weight.product(hidden, &mut logits, Into::Write);
        total += logits_cross_entropy(&mut logits, v, targets, softcap as f32);
        recycle(logits);
    }
    Tensor::from_data(TensorData::new(vec![(total * scale) as f32], [1]), &device)
}

/// As the loaders of models check before there is one.
#[track_caller]
fn assert_usable(device: &Device) {
    assert!(
        is_fused(device) && !device.is_autodiff(),
        "packed weights are for inference on a CPU backend (ndarray, flex)"
    );
}

/// See [`packed_linear`].
#[derive(Clone, Debug)]
pub(crate) struct PackedLinear {
    pre: PreOp,
    weight: Arc<PackedMatrix>,
}

/// Values that are decoded at once in backward: 4 MB.
const DECODED: usize = 1 << 20;

impl PackedLinear {
    /// `da (+)= dy w`, rows of `outputs` and `inputs` values.
    fn input_gradient(&self, dy: &[f32], da: &mut [f32], into: Into) {
        let [outputs, inputs] = self.weight.shape();
        let rows = dy.len() / outputs.max(1);
        let height = (DECODED / inputs.max(1)).clamp(1, outputs.max(1));
        let mut decoded = buffer(height * inputs);
        for first in (0..outputs).step_by(height) {
            let n = height.min(outputs - first);
            let tile = &mut decoded[..n * inputs];
            tile.par_chunks_exact_mut(inputs).enumerate().for_each(|(i, row)| self.weight.row(first + i, row));
            let into = if first == 0 { into } else { Into::Add };
            let dy = Mat::new(&dy[first..], rows, n, outputs);
            matmul(Compute::F32, dy, Mat::new(tile, n, inputs, inputs), da, inputs, into);
        }
        recycle(decoded);
    }
}

/// Of x, the bias, the residual, and the norm's weight and bias; what is empty is not there.
impl Vjp<5> for PackedLinear {
    const KEEPS: [Keep; 5] = [Keep::Activation, Keep::Nothing, Keep::Nothing, Keep::Parameter, Keep::Parameter];

    fn forward<B: HostBackend>(&self, inputs: [FloatTensor<B>; 5]) -> FloatTensor<B> {
        let [x, b, residual, norm_weight, norm_bias] = inputs;
        let mut shape = dims::<B>(&x);
        let [x, b, residual, norm_weight, norm_bias] = [x, b, residual, norm_weight, norm_bias].map(B::values);
        let [outputs, inputs] = self.weight.shape();
        if let Some(last) = shape.last_mut() {
            *last = outputs;
        }
        let mut y = buffer(shape.iter().product());
        let into = start(some(b.as_ref()), some(residual.as_ref()), outputs, &mut y);
        let before = self.pre.kernel(norm_weight.as_ref(), norm_bias.as_ref());
        before.with(x.as_ref(), inputs, |x| self.weight.product(x, &mut y, into));
        B::tensor(y, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        [x, _, _, norm_weight, norm_bias]: [Option<FloatTensor<B>>; 5],
        grad: FloatTensor<B>,
        [dx, db, dresidual, dnorm_weight, dnorm_bias]: [Sink<B>; 5],
    ) -> [Option<FloatTensor<B>>; 5] {
        let x = kept(x);
        let (x_shape, [outputs, inputs]) = (dims::<B>(&x), self.weight.shape());
        let dresidual = if dresidual.wanted() { dresidual.hand_over(grad.clone()) } else { None };
        let (x, dy) = (B::values(x), B::values(grad));
        let [norm_weight, norm_bias] = [kept(norm_weight), kept(norm_bias)].map(B::values);
        let before = self.pre.kernel(norm_weight.as_ref(), norm_bias.as_ref());
        let db = db.fill(&[outputs], |db, into| kernel::bias_gradient(dy.as_ref(), db, into));
        let mut norm_gradients = [(&dnorm_weight, norm_weight.as_ref()), (&dnorm_bias, norm_bias.as_ref())]
            .map(|(sink, values)| vec![0.0; if sink.wanted() { values.len() } else { 0 }]);
        let input_wanted = dx.wanted() || norm_gradients.iter().any(|g| !g.is_empty());
        let dx = if !input_wanted {
            None
        } else if matches!(self.pre, PreOp::Nothing) {
            dx.fill(&x_shape, |dx, into| self.input_gradient(dy.as_ref(), dx, into))
        } else {
            let mut da = buffer(dy.as_ref().len() / outputs.max(1) * inputs);
            self.input_gradient(dy.as_ref(), &mut da, Into::Write);
            let norm_gradients = norm_gradients.each_mut().map(|g| &mut g[..]);
            dx.replace(&x_shape, |existing| {
                kernel::input_gradient(x.as_ref(), before, inputs, da, existing, norm_gradients)
            })
        };
        let [dnorm_weight, dnorm_bias] = [(dnorm_weight, 0), (dnorm_bias, 1)].map(|(sink, i)| {
            let values = std::mem::take(&mut norm_gradients[i]);
            let shape = [values.len()];
            sink.put(&shape, values)
        });
        [dx, db, dresidual, dnorm_weight, dnorm_bias]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::device::Backend;
    use crate::ops::fused_linear;

    fn leaf<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 37 + seed * 101) % 53) as f32 / 26.0 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, shape), device).require_grad()
    }

    /// Gradients through packed codes are those of a dense layer with the values of the codes: so close as the products in f32 that both make.
    #[test]
    fn gradients_are_those_of_the_values() {
        let device = Backend::NdArray.device().unwrap().autodiff();
        let (outputs, inputs) = (12, 64);
        let codes: Vec<u8> = (0..outputs * inputs / 2).map(|i| (i as u32).wrapping_mul(2_654_435_761) as u8).collect();
        let levels = std::array::from_fn(|c| (c as f32 - 7.5) * (1.0 + c as f32 / 30.0));
        let scales = Scales::F32((0..outputs * 2).map(|i| 0.02 + 0.001 * i as f32).collect());
        let packed = Arc::new(PackedMatrix::int4([outputs, inputs], 32, &codes, scales, None, levels).unwrap());
        let dense = Tensor::<2>::from_data(TensorData::new(packed.dequantized(), [outputs, inputs]), &device);
        for kind in 0..4 {
            let run = |is_packed: bool| -> Vec<Vec<f32>> {
                let width = if kind == 2 { 2 * inputs } else { inputs };
                let x = leaf([2, 9, width], 1, &device);
                let (weight, bias) = (leaf([inputs], 2, &device), leaf([outputs], 3, &device));
                let residual = leaf([2, 9, outputs], 4, &device);
                let pre = match kind {
                    0 => Pre::Nothing,
                    1 => Pre::RmsNorm { weight: weight.clone(), eps: 1e-5 },
                    2 => Pre::SwiGlu,
                    _ => Pre::Gelu,
                };
                let (b, r) = (Some(bias.clone()), Some(residual.clone()));
                let y = match is_packed {
                    true => packed_linear(x.clone(), pre, packed.clone(), b, r),
                    false => fused_linear(x.clone(), pre, dense.clone().transpose(), b, r),
                };
                // The input is used twice: its second gradient is added to the first.
                let loss = (y.clone() * leaf([2, 9, outputs], 5, &device).detach()).sum() + (x.clone() * 0.5).sum();
                let grads = loss.backward();
                let mut found = vec![y.into_data().try_into_vec::<f32>().unwrap()];
                found.push(x.grad(&grads).unwrap().into_data().try_into_vec().unwrap());
                found.push(bias.grad(&grads).unwrap().into_data().try_into_vec().unwrap());
                found.push(residual.grad(&grads).unwrap().into_data().try_into_vec().unwrap());
                found.extend((kind == 1).then(|| weight.grad(&grads).unwrap().into_data().try_into_vec().unwrap()));
                found
            };
            for (a, b) in run(true).into_iter().zip(run(false)) {
                let close = a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs()));
                assert!(close, "{kind}: {a:?} {b:?}");
            }
        }
    }
}
