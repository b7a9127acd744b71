//! The start and the end of a backward pass in the middle of a model.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Dispatch};
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::vjp::{Keep, Sink, Tracked, Vjp, carry, give_back, take_carried};
use crate::adapter::HostBackend;
use crate::device::is_fused;

/// A tensor `[1]` whose backward gives `output` the gradient `upstream`: with it, a backward pass starts at a tensor that is no scalar, from a
/// gradient that was computed elsewhere. Its value says nothing.
///
/// On the CPU backends `upstream` is handed over as it is, and `output` is not kept.
///
/// # Shapes
/// - `output` (on an autodiff device) and `upstream` (on its inner device) have the same
///
/// # Panics
/// If the shapes differ.
pub fn seed<const D: usize>(output: Tensor<D>, upstream: Tensor<D>) -> Tensor<1> {
    let (got, expected) = (upstream.dims(), output.dims());
    assert_eq!(got, expected, "seed: a gradient of {got:?} for an output of {expected:?}");
    let upstream = Tensor::from_inner(upstream);
    if is_fused(&output.device()) {
        return Tensor::from_dispatch(Dispatch::fused_seed(output.into_dispatch(), upstream.into_dispatch()));
    }
    (output * upstream).sum()
}

#[derive(Debug)]
struct Seed;

impl<B: HostBackend> Backward<B, 1> for Seed {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        drop(grads.consume::<B>(&ops.node));
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, ops.state);
        }
    }
}

/// The value of a seed.
pub(crate) fn forward<B: HostBackend>() -> FloatTensor<B> {
    B::tensor(vec![0.0], &[1])
}

pub(crate) fn apply<B: HostBackend + FusedOps, C: CheckpointStrategy>(
    output: Tracked<B, C>,
    upstream: Tracked<B, C>,
) -> Tracked<B, C> {
    let (primitive, node) = output.into_parts();
    give_back::<B>(primitive);
    match Seed.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(upstream.into_primitive(), forward::<B>()),
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>()),
    }
}

/// Leaves `grad` for the leaf, if it is not empty, and gives back what was left for it before.
pub(crate) fn exchange<B: HostBackend, C: CheckpointStrategy>(
    leaf: &Tracked<B, C>,
    grad: Tracked<B, C>,
) -> Tracked<B, C> {
    let before = take_carried(leaf.id()).unwrap_or_default();
    let grad = B::into_vec(grad.into_primitive());
    if !grad.is_empty() {
        carry(leaf.id(), grad);
    }
    let n = [before.len()];
    Autodiff::<B, C>::from_inner(B::tensor(before, &n))
}

/// `x` itself, as a value inside the graph. Where several operations use a leaf, autodiff adds their gradients up in new tensors, since it must keep
/// the sum; on the CPU backends those of a value inside the graph are added in place. So `x` is a leaf that is about to be used more than once.
pub fn enter<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_enter(x.into_dispatch()));
    }
    x
}

/// See [`enter`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Enter;

impl Vjp<1> for Enter {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        x
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        [dx.hand_over(grad)]
    }
}

/// Has the next backward pass of this thread that reaches the leaf `param` add to `grad`, in place on the CPU backends, instead of making a gradient
/// of its own: what two graphs share, such as a tied embedding, then has one gradient and never two. Returns the gradient that was left for this leaf
/// before and that no pass has taken; an empty `grad` asks for it alone.
///
/// On other devices `grad` comes back as it is: add it to what the pass makes.
///
/// # Shapes
/// - `param`: any, a leaf on an autodiff device; `grad`: as many elements, flat, on its inner device, or none
pub fn carry_gradient<const D: usize>(param: Tensor<D>, grad: Tensor<1>) -> Option<Tensor<1>> {
    let back = if is_fused(&param.device()) {
        let grad = Tensor::<1>::from_inner(grad).into_dispatch();
        Tensor::<1>::from_dispatch(Dispatch::fused_carry(param.into_dispatch(), grad)).inner()
    } else {
        grad
    };
    (back.dims() != [0]).then_some(back)
}
