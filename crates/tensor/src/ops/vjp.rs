//! What a fused operation is: a forward and its vector-Jacobian product over the primitives of a CPU backend.

use burn::backend::Autodiff;
use burn::backend::TensorMetadata;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use crate::adapter::HostBackend;

/// An operation of `N` float tensors; further arguments are fields.
pub(crate) trait Vjp<const N: usize>: Clone + Send + std::fmt::Debug + 'static {
    /// The output.
    fn forward<B: HostBackend>(&self, inputs: [FloatTensor<B>; N]) -> FloatTensor<B>;

    /// Gradients with respect to the inputs that are `wanted`, from the gradient of the output.
    fn backward<B: HostBackend>(
        &self,
        inputs: [FloatTensor<B>; N],
        grad: FloatTensor<B>,
        wanted: [bool; N],
    ) -> [Option<FloatTensor<B>>; N];
}

/// A tensor of the autodiff backend.
pub(crate) type Tracked<B, C> = FloatTensor<Autodiff<B, C>>;

#[derive(Debug)]
struct Run<O>(std::marker::PhantomData<O>);

impl<B: HostBackend, O: Vjp<N>, const N: usize> Backward<B, N> for Run<O> {
    type State = (O, [NodeId; N]);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (op, saved) = ops.state;
        let inputs = saved.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let results = op.backward::<B>(inputs, grad, wanted);
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                grads.register::<B>(parent.id, result);
            }
        }
    }
}

/// Runs `op` on tensors of the autodiff backend and records its backward where an input is tracked.
pub(crate) fn apply<B: HostBackend, C: CheckpointStrategy, O: Vjp<N>, const N: usize>(
    op: O,
    inputs: [Tracked<B, C>; N],
) -> Tracked<B, C> {
    let nodes = inputs.each_ref().map(|t| t.node());
    let primitives = || inputs.each_ref().map(|t| t.primitive().clone());
    match Run::<O>(std::marker::PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let saved = inputs.each_ref().map(|t| prep.checkpoint(t));
            let output = op.forward::<B>(primitives());
            prep.finish((op, saved), output)
        }
        OpsKind::UnTracked(prep) => prep.finish(op.forward::<B>(primitives())),
    }
}

/// The shape of a primitive.
pub(crate) fn dims<B: HostBackend>(tensor: &FloatTensor<B>) -> Vec<usize> {
    tensor.shape().to_vec()
}

/// A buffer that a kernel is about to fill.
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// A tensor of `shape` that `kernel` fills from the values of `x`.
pub(crate) fn map1<B: HostBackend>(
    x: FloatTensor<B>,
    shape: &[usize],
    kernel: impl FnOnce(&[f32], &mut [f32]),
) -> FloatTensor<B> {
    let x = B::values(x);
    let mut out = buffer(shape.iter().product());
    kernel(x.as_ref(), &mut out);
    B::tensor(out, shape)
}

/// The same from the values of two tensors.
pub(crate) fn map2<B: HostBackend>(
    x: FloatTensor<B>,
    y: FloatTensor<B>,
    shape: &[usize],
    kernel: impl FnOnce(&[f32], &[f32], &mut [f32]),
) -> FloatTensor<B> {
    let y = B::values(y);
    map1::<B>(x, shape, |x, out| kernel(x, y.as_ref(), out))
}
