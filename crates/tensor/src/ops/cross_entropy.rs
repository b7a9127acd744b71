//! The head of a language model and its loss, in one operation.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, activation};
use firebox_parallel::Communicator;

use super::collective::{all_gather, assert_host, part};
use super::compute::{compute, multiply};
use super::extension::FusedOps;
use super::linear::Weight;
use super::preference::Preference;
use super::softcap::{assert_cap, soft_cap};
use super::vjp::{Tracked, dims};
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels::cross_entropy as kernel;
use crate::kernels::matmul::{Compute, Mat};
use crate::kernels::preference::{Pairs, linear_preference};

/// What a language model's loss is besides the cross-entropy; the default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossConfig {
    /// Share of each target that is spread evenly over the vocabulary, in [0, 1) (Szegedy et al., arXiv:1512.00567, section 7; as PyTorch's).
    pub label_smoothing: f64,
    /// Factor of the squared logarithm of softmax's denominator, which keeps it near 0 (PaLM, arXiv:2204.02311, section 5: 1e-4).
    pub z_loss: f64,
}

/// `scale` times the sum of the losses, in nats, of the rows whose target is not negative: with x the logits `hidden_i weight^T`, through
/// [`soft_cap`] with `softcap` (0: as they are), e the label smoothing and z the z-loss,
/// `-(1 - e) log softmax(x)[target_i] - e mean(log softmax(x)) + z (log sum exp x)^2`.
/// A row with any negative target counts nothing, in the loss and in the gradients. With `scale` = 1 / (number of the other rows of the whole
/// batch), the losses of micro-batches add up to the mean loss of the batch, and so do their gradients.
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[V, D]`, `targets`: `N` values; output `[1]`
///
/// # Panics
/// If a target is not below V, the number of targets is not N, or `softcap` or a value of `loss` is out of range.
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Arc<[i32]>,
    scale: f64,
    softcap: f64,
    loss: &LossConfig,
) -> Tensor<1> {
    check(&hidden, &targets, weight.dims()[0], softcap, loss);
    if is_fused(&hidden.device()) {
        let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
        let op = CrossEntropy { targets, scale, softcap, loss: *loss, compute: compute(), shard: None, pairs: None };
        return Tensor::from_dispatch(Dispatch::fused_linear_cross_entropy(hidden, weight, op));
    }
    let logits = soft_cap(multiply(hidden, weight.transpose()), softcap);
    let (losses, kept) = row_losses(logits, &targets, loss);
    (losses * kept).sum() * scale
}

/// The loss of [`linear_cross_entropy`] from logits `[N, V]` that are there: of heads with few outputs.
///
/// # Panics
/// As [`linear_cross_entropy`].
pub fn cross_entropy(logits: Tensor<2>, targets: &[i32], scale: f64, loss: &LossConfig) -> Tensor<1> {
    let classes = logits.dims()[1];
    check(&logits, targets, classes, 0.0, loss);
    let (losses, kept) = row_losses(logits, targets, loss);
    (losses * kept).sum() * scale
}

/// Of logits `[N, V]` the losses of the rows, and for each 1 or, where nothing is to be predicted, 0; both `[N, 1]`.
pub(super) fn row_losses(logits: Tensor<2>, targets: &[i32], loss: &LossConfig) -> (Tensor<2>, Tensor<2>) {
    let (n, device, LossConfig { label_smoothing, z_loss }) = (targets.len(), logits.device(), *loss);
    let log_p = activation::log_softmax(logits.clone(), 1);
    let at: Vec<i32> = targets.iter().map(|&t| t.max(0)).collect();
    let kept: Vec<f32> = targets.iter().map(|&t| f32::from(u8::from(t >= 0))).collect();
    let at = Tensor::<2, Int>::from_data(TensorData::new(at, [n, 1]), &device);
    let kept = Tensor::<2>::from_data(TensorData::new(kept, [n, 1]), &device);
    let log_p_at = log_p.clone().gather(1, at.clone());
    let mut losses = log_p_at.clone() * (label_smoothing - 1.0);
    if label_smoothing > 0.0 {
        losses = losses - log_p.mean_dim(1) * label_smoothing;
    }
    if z_loss > 0.0 {
        let log_sum = logits.gather(1, at) - log_p_at;
        losses = losses + log_sum.clone() * log_sum * z_loss;
    }
    (losses, kept)
}

#[track_caller]
pub(super) fn check(hidden: &Tensor<2>, targets: &[i32], v: usize, softcap: f64, loss: &LossConfig) {
    let n = hidden.dims()[0];
    assert_eq!(targets.len(), n, "cross-entropy: {} targets for {n} rows", targets.len());
    if let Some(bad) = targets.iter().find(|&&t| t >= 0 && t as usize >= v) {
        panic!("cross-entropy: target {bad} is not in the vocabulary of {v}");
    }
    let LossConfig { label_smoothing, z_loss } = *loss;
    assert!((0.0..1.0).contains(&label_smoothing), "cross-entropy: label smoothing {label_smoothing} is not in [0, 1)");
    assert!(z_loss >= 0.0 && z_loss.is_finite(), "cross-entropy: z-loss {z_loss} is not a factor of at least 0");
    assert_cap(softcap);
}

/// The same with this rank's rows of the weight, its [`part`] of the vocabulary. `hidden` is the same on all ranks, and so is the loss; the gradient of
/// `hidden` is this rank's share, to be summed ([`copy_to`](super::collective::copy_to)). The ranks exchange four values of each row, never logits.
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[part of V, D]` with V = `vocab`, `targets`: `N` values; output `[1]`
///
/// # Panics
/// As [`linear_cross_entropy`]; if the device is no CPU backend, or a rank of the group fails.
#[allow(clippy::too_many_arguments)]
pub fn vocab_cross_entropy(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Arc<[i32]>,
    scale: f64,
    softcap: f64,
    loss: &LossConfig,
    vocab: usize,
    group: &Communicator,
) -> Tensor<1> {
    check(&hidden, &targets, vocab, softcap, loss);
    assert_host(&hidden.device());
    let (rows, mine) = (weight.dims()[0], part(vocab, group.rank(), group.size()).len());
    assert_eq!(rows, mine, "cross-entropy: this rank's part of a vocabulary of {vocab} is {mine}, got {rows} rows");
    let shard = Some((vocab, group.clone()));
    let op = CrossEntropy { targets, scale, softcap, loss: *loss, compute: compute(), shard, pairs: None };
    let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::fused_linear_cross_entropy(hidden, weight, op))
}

/// See [`linear_cross_entropy`], and with pairs [`linear_preference`](super::linear_preference).
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    pub(super) targets: Arc<[i32]>,
    pub(super) scale: f64,
    pub(super) softcap: f64,
    pub(super) loss: LossConfig,
    pub(super) compute: Compute,
    /// The whole vocabulary, and the ranks among which it is divided.
    pub(super) shard: Option<(usize, Communicator)>,
    pub(super) pairs: Option<Arc<Preference>>,
}

impl CrossEntropy {
    fn run(&self, hidden: &[f32], weight: Mat<'_>, gradients: Option<kernel::Gradients<'_>>) -> f32 {
        let loss = kernel::Loss {
            scale: self.scale as f32,
            label_smoothing: self.loss.label_smoothing as f32,
            z_loss: self.loss.z_loss as f32,
            compute: self.compute,
            softcap: self.softcap as f32,
        };
        let run = |shard: Option<&kernel::Shard<'_>>| match &self.pairs {
            None => kernel::linear_cross_entropy(hidden, weight, &self.targets, loss, shard, gradients),
            Some(pairs) => {
                let &Preference { ref reference, beta, label_smoothing } = &**pairs;
                let pairs = Pairs { reference, beta, label_smoothing };
                linear_preference(hidden, weight, &self.targets, loss, pairs, shard, gradients)
            }
        };
        let Some((vocab, group)) = &self.shard else { return run(None) };
        run(Some(&kernel::Shard {
            first: part(*vocab, group.rank(), group.size()).start,
            vocab: *vocab,
            largest: vocab.div_ceil(group.size()),
            exchange: &|mine| all_gather(group, mine, group.size(), mine.len()),
        }))
    }
}

pub(crate) fn forward<B: HostBackend>(
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    op: &CrossEntropy,
) -> FloatTensor<B> {
    let (hidden, weight) = (B::values(hidden), Weight::<B>::new(weight));
    B::tensor(vec![op.run(hidden.as_ref(), weight.mat(), None)], &[1])
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
    op: CrossEntropy,
) -> Tracked<B, C> {
    apply_with::<B, C>(hidden, weight, |hidden, weight, gradients| op.run(hidden, weight, gradients))
}

/// The loss that `run` makes of the values of `hidden` and `weight`, with the gradients of both where they are wanted.
pub(super) fn apply_with<B: HostBackend + FusedOps, C: CheckpointStrategy>(
    hidden: Tracked<B, C>,
    weight: Tracked<B, C>,
    run: impl FnOnce(&[f32], Mat<'_>, Option<kernel::Gradients<'_>>) -> f32,
) -> Tracked<B, C> {
    // A head that is not trained costs a product less, and no buffer of its size.
    let wanted = [hidden.is_tracked(), weight.is_tracked()];
    // Without the tracked tensors the values have no other holder, and their buffer is free when the loss is there.
    let ((h, h_node), (w, w_node)) = (hidden.into_parts(), weight.into_parts());
    match Scaled.prepare::<C>([h_node, w_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (h_shape, w_shape) = (dims::<B>(&h), dims::<B>(&w));
            let (h, w) = (B::values(h), Weight::<B>::new(w));
            let gradient = |wanted: bool, n: usize| if wanted { buffer(n) } else { vec![] };
            let mut dh = gradient(wanted[0], h.as_ref().len());
            let mut dw = gradient(wanted[1], w_shape.iter().product());
            let gradients = kernel::Gradients { hidden: &mut dh, weight: &mut dw };
            let loss = run(h.as_ref(), w.mat(), Some(gradients));
            let tensor = |wanted: bool, values, shape: &[usize]| B::tensor(values, if wanted { shape } else { &[0] });
            let gradients = [tensor(wanted[0], dh, &h_shape), tensor(wanted[1], dw, &w_shape)];
            prep.finish(gradients, B::tensor(vec![loss], &[1]))
        }
        OpsKind::UnTracked(prep) => {
            let (h, w) = (B::values(h), Weight::<B>::new(w));
            let loss = run(h.as_ref(), w.mat(), None);
            prep.finish(B::tensor(vec![loss], &[1]))
        }
    }
}
