//! Linear layers, tables and heads whose weights are integers: for inference on the CPU backends.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Device, Tensor, TensorData};

use super::extension::FusedOps;
use super::linear::{Linear, Pre, PreOp, check, or_none, some};
use super::softcap::assert_cap;
use super::vjp::dims;
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::cross_entropy::logits_cross_entropy;
use crate::kernels::linear::start;
use crate::kernels::matmul::Into;
pub use crate::kernels::quantized::{PackedError, PackedMatrix, Scales};

/// Bytes of logits that exist at once.
const LOGITS_BYTES: usize = 16 << 20;

/// `y = pre(x) w^T + b + residual` of a packed weight, without a gradient. See [`PackedMatrix`] for what is rounded.
///
/// # Shapes
/// - `x`: `[.., I]` (`[.., 2 I]` for SwiGLU), `w`: `[O, I]`, `b`: `[O]`, `residual`: `[.., O]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit, or the device is no CPU backend, or one with gradients.
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
    assert_usable(&device);
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

impl PackedLinear {
    /// Of x, the bias, the residual, and the norm's weight and bias; what is empty is not there.
    pub fn forward<B: HostBackend>(&self, inputs: [FloatTensor<B>; 5]) -> FloatTensor<B> {
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
}
