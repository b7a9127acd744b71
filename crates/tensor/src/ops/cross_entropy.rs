//! The head of a language model and its loss, in one operation.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, activation};

use super::extension::FusedOps;
use super::vjp::{Tracked, dims};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, zeros};
use crate::device::is_fused;
use crate::kernels::cross_entropy as kernel;

/// `scale * sum_i -log softmax(hidden_i weight^T)[target_i]`, in nats, over the rows whose target is not negative. With `scale` = 1 / (number of
/// such rows of the whole batch), the losses of micro-batches add up to the mean loss of the batch, and so do their gradients.
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[V, D]`, `targets`: `N` values; output `[1]`
///
/// # Panics
/// If a target is not below V, or the number of targets is not N.
pub fn linear_cross_entropy(hidden: Tensor<2>, weight: Tensor<2>, targets: Arc<[i32]>, scale: f64) -> Tensor<1> {
    let ([n, _], [v, _]) = (hidden.dims(), weight.dims());
    assert_eq!(targets.len(), n, "cross-entropy: {} targets for {n} rows", targets.len());
    if let Some(bad) = targets.iter().find(|&&t| t >= 0 && t as usize >= v) {
        panic!("cross-entropy: target {bad} is not in the vocabulary of {v}");
    }
    if is_fused(&hidden.device()) {
        let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_linear_cross_entropy(hidden, weight, targets, scale as f32));
    }
    let device = hidden.device();
    let log_p = activation::log_softmax(hidden.matmul(weight.transpose()), 1);
    let at: Vec<i32> = targets.iter().map(|&t| t.max(0)).collect();
    let kept: Vec<f32> = targets.iter().map(|&t| f32::from(u8::from(t >= 0))).collect();
    let at = Tensor::<2, Int>::from_data(TensorData::new(at, [n, 1]), &device);
    let kept = Tensor::<2>::from_data(TensorData::new(kept, [n, 1]), &device);
    (log_p.gather(1, at) * kept).sum() * -scale
}

pub(crate) fn forward<B: HostBackend>(
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    targets: &[i32],
    scale: f32,
) -> FloatTensor<B> {
    let d = dims::<B>(&weight)[1];
    let (hidden, weight) = (B::values(hidden), B::values(weight));
    let loss = kernel::linear_cross_entropy(hidden.as_ref(), weight.as_ref(), d, targets, scale, None);
    B::tensor(vec![loss], &[1])
}

#[derive(Debug)]
struct Scaled;

/// The gradients that the forward pass made; backward scales them.
impl<B: HostBackend> Backward<B, 2> for Scaled {
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let upstream = B::values(grads.consume::<B>(&ops.node)).as_ref()[0];
        for (parent, grad) in ops.parents.into_iter().zip(ops.state) {
            let Some(parent) = parent else { continue };
            let shape = dims::<B>(&grad);
            let mut values = B::into_vec(grad);
            if upstream != 1.0 {
                values.iter_mut().for_each(|g| *g *= upstream);
            }
            grads.register::<B>(parent.id, B::tensor(values, &shape));
        }
    }
}

pub(crate) fn apply<B: HostBackend + FusedOps, C: CheckpointStrategy>(
    hidden: Tracked<B, C>,
    weight: Tracked<B, C>,
    targets: Arc<[i32]>,
    scale: f32,
) -> Tracked<B, C> {
    let (h, w) = (hidden.primitive().clone(), weight.primitive().clone());
    match Scaled.prepare::<C>([hidden.node(), weight.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (h_shape, w_shape) = (dims::<B>(&h), dims::<B>(&w));
            let (h, w) = (B::values(h), B::values(w));
            let mut gradients = kernel::Gradients { hidden: buffer(h.as_ref().len()), weight: zeros(w.as_ref().len()) };
            let loss =
                kernel::linear_cross_entropy(h.as_ref(), w.as_ref(), w_shape[1], &targets, scale, Some(&mut gradients));
            let state = [B::tensor(gradients.hidden, &h_shape), B::tensor(gradients.weight, &w_shape)];
            prep.finish(state, B::tensor(vec![loss], &[1]))
        }
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>(h, w, &targets, scale)),
    }
}
