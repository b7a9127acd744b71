//! What a fused operation is: a forward and its vector-Jacobian product over the primitives of a CPU backend.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::TensorMetadata;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::compute::compute;
use super::deferred::{self, Job};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::kernels;
use crate::kernels::half::{Half, Packed};
use crate::kernels::matmul::Into;

/// An operation of `N` float tensors; further arguments are fields. A tensor that is left out is an empty one.
pub(crate) trait Vjp<const N: usize>: Clone + Send + std::fmt::Debug + 'static {
    /// What backward reads of each input.
    const KEEPS: [Keep; N];

    /// The output.
    fn forward<B: HostBackend>(&self, inputs: [FloatTensor<B>; N]) -> FloatTensor<B>;

    /// Gradients with respect to the inputs, from the gradient of the output: each through its [`Sink`], which gives nothing where no
    /// gradient is wanted. Of the inputs, those that are kept are there.
    fn backward<B: HostBackend>(
        &self,
        inputs: [Option<FloatTensor<B>>; N],
        grad: FloatTensor<B>,
        sinks: [Sink<B>; N],
    ) -> [Option<FloatTensor<B>>; N];
}

/// What backward reads of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing: it is not kept.
    Nothing,
    /// A parameter's values, which are there anyway.
    Parameter,
    /// Values that are kept for backward alone: in 16 bits where products are [computed](super::compute::with_compute) in them.
    Activation,
}

/// A value that waits for backward.
#[derive(Clone, Debug)]
pub(crate) enum Kept<B: HostBackend> {
    Nothing,
    Node(NodeId),
    Tensor(FloatTensor<B>),
    Packed(Arc<Packed>, Vec<usize>),
}

impl<B: HostBackend> Kept<B> {
    /// In 16 bits.
    pub fn packed(half: Half, tensor: FloatTensor<B>) -> Self {
        let shape = dims::<B>(&tensor);
        Kept::Packed(Arc::new(Packed::new(half, B::values(tensor).as_ref())), shape)
    }

    /// The values, if they were kept.
    pub fn restore(self, checkpointer: &mut Checkpointer) -> Option<FloatTensor<B>> {
        match self {
            Kept::Nothing => None,
            Kept::Node(id) => Some(checkpointer.retrieve_node_output::<FloatTensor<B>>(id)),
            Kept::Tensor(tensor) => Some(tensor),
            Kept::Packed(packed, shape) => Some(B::tensor(packed.unpack(), &shape)),
        }
    }
}

/// Where the gradient of one input goes: into nothing, into a new buffer, or on top of a gradient that another operation has made.
pub(crate) struct Sink<B: HostBackend> {
    wanted: bool,
    existing: Option<FloatTensor<B>>,
    /// The leaf whose gradient may be [left for later](deferred::defer_weights).
    later: Option<NodeId>,
}

impl<B: HostBackend> Sink<B> {
    /// Into a new buffer, or into nothing.
    pub fn fresh(wanted: bool) -> Self {
        Self { wanted, existing: None, later: None }
    }

    /// Whether the gradient is to be left for later, with [`leave`](Self::leave).
    pub fn is_deferred(&self) -> bool {
        self.later.is_some()
    }

    /// Leaves the gradient that `job` makes for later.
    pub fn leave(self, job: Job) {
        if let Some(leaf) = self.later {
            deferred::defer(leaf, job);
        }
    }

    /// Whether anybody asks for this gradient.
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// The gradient of `shape` that `kernel` writes, or adds to what is there, as it is told.
    pub fn fill(self, shape: &[usize], kernel: impl FnOnce(&mut [f32], Into)) -> Option<FloatTensor<B>> {
        if !self.wanted {
            return None;
        }
        let (mut values, into) = match self.existing {
            Some(existing) => (B::into_vec(existing), Into::Add),
            None => (buffer(shape.iter().product()), Into::Write),
        };
        kernel(&mut values, into);
        Some(B::tensor(values, shape))
    }

    /// The same for a kernel that can only write.
    pub fn write(self, shape: &[usize], kernel: impl FnOnce(&mut [f32])) -> Option<FloatTensor<B>> {
        self.fill(shape, |out, into| match into {
            Into::Write => kernel(out),
            Into::Add => {
                let mut term = buffer(out.len());
                kernel(&mut term);
                kernels::add(out, &term);
                recycle(term);
            }
        })
    }

    /// The same for a kernel that makes the buffer itself, or adds to the one it is given and makes none.
    pub fn replace(
        self,
        shape: &[usize],
        kernel: impl FnOnce(Option<&mut [f32]>) -> Option<Vec<f32>>,
    ) -> Option<FloatTensor<B>> {
        let mut existing = self.existing.map(B::into_vec);
        let made = kernel(existing.as_deref_mut());
        let values = made.or(existing)?;
        if !self.wanted {
            recycle(values);
            return None;
        }
        Some(B::tensor(values, shape))
    }

    /// The same for values that are already there.
    pub fn put(self, shape: &[usize], values: Vec<f32>) -> Option<FloatTensor<B>> {
        match self.existing {
            None => self.wanted.then(|| B::tensor(values, shape)),
            Some(_) => {
                let sum = self.fill(shape, |out, _| kernels::add(out, &values));
                recycle(values);
                sum
            }
        }
    }

    /// The same for a tensor that is handed through.
    pub fn hand_over(self, grad: FloatTensor<B>) -> Option<FloatTensor<B>> {
        match self.existing {
            None => self.wanted.then_some(grad),
            Some(_) => {
                let shape = dims::<B>(&grad);
                let values = B::values(grad);
                self.fill(&shape, |out, _| kernels::add(out, values.as_ref()))
            }
        }
    }
}

/// A tensor of the autodiff backend.
pub(crate) type Tracked<B, C> = FloatTensor<Autodiff<B, C>>;

thread_local! {
    /// Nodes inside the graph that have a gradient by now, the last ones at the end. Backward runs through a graph once, on one thread, and burn refuses to run
    /// it again; so a node that is in here when an operation of its consumers runs does have a gradient that can be taken out and added to in
    /// place. Nodes that fall off the front only lose that.
    static WITH_GRADIENT: RefCell<VecDeque<NodeId>> = const { RefCell::new(VecDeque::new()) };

    /// Gradients of leaves that were made in another graph: the first operation to reach the leaf adds to them in place.
    static CARRIED: RefCell<Vec<(NodeId, Vec<f32>)>> = const { RefCell::new(Vec::new()) };
}

/// Leaves the gradient of a leaf for the next backward pass of this thread.
pub(crate) fn carry(leaf: NodeId, grad: Vec<f32>) {
    CARRIED.with_borrow_mut(|carried| carried.push((leaf, grad)));
}

/// Takes the gradient of a leaf that nothing has added to.
pub(crate) fn take_carried(leaf: NodeId) -> Option<Vec<f32>> {
    CARRIED.with_borrow_mut(|carried| {
        let at = carried.iter().position(|(id, _)| *id == leaf)?;
        Some(carried.swap_remove(at).1)
    })
}

/// Consumers of one node are a few operations apart.
const REMEMBERED: usize = 64;

/// Forgets a node; whether it was known.
fn forget(id: NodeId) -> bool {
    WITH_GRADIENT.with_borrow_mut(|nodes| match nodes.iter().rposition(|&n| n == id) {
        Some(at) => nodes.remove(at).is_some(),
        None => false,
    })
}

fn remember(id: NodeId) {
    WITH_GRADIENT.with_borrow_mut(|nodes| {
        if nodes.len() == REMEMBERED {
            nodes.pop_front();
        }
        nodes.push_back(id);
    });
}

#[derive(Debug)]
struct Run<O>(std::marker::PhantomData<O>);

impl<B: HostBackend, O: Vjp<N>, const N: usize> Backward<B, N> for Run<O> {
    type State = (O, [Kept<B>; N]);

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        forget(ops.node.id);
        let (op, kept) = ops.state;
        let inputs = kept.map(|kept| kept.restore(checkpointer));
        let sinks = ops.parents.each_ref().map(|parent| match parent {
            None => Sink { wanted: false, existing: None, later: None },
            Some(parent) => {
                let is_leaf = parent.parents.is_empty();
                // A leaf's gradient can be read, but not taken out.
                let existing = if is_leaf {
                    take_carried(parent.id).map(|values| {
                        let n = [values.len()];
                        B::tensor(values, &n)
                    })
                } else {
                    forget(parent.id).then(|| grads.consume::<B>(parent))
                };
                let later = is_leaf && existing.is_none() && deferred::is_deferring();
                Sink { wanted: true, existing, later: later.then_some(parent.id) }
            }
        });
        let results = op.backward::<B>(inputs, grad, sinks);
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                grads.register::<B>(parent.id, result);
                if !parent.parents.is_empty() {
                    forget(parent.id);
                    remember(parent.id);
                }
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
            let mut keeps = O::KEEPS.into_iter();
            let half = compute().half();
            let kept = inputs.each_ref().map(|t| match (keeps.next(), half) {
                (None | Some(Keep::Nothing), _) => Kept::Nothing,
                (Some(Keep::Activation), Some(half)) => Kept::packed(half, t.primitive().clone()),
                _ => Kept::Node(prep.checkpoint(t)),
            });
            let output = op.forward::<B>(primitives());
            if half.is_some() {
                inputs.into_iter().for_each(|t| give_back::<B>(t.into_parts().0));
            }
            prep.finish((op, kept), output)
        }
        OpsKind::UnTracked(prep) => prep.finish(op.forward::<B>(primitives())),
    }
}

/// Leaves a tensor's memory to the next operation, if this is its last holder.
pub(crate) fn give_back<B: HostBackend>(tensor: FloatTensor<B>) {
    drop(B::values(tensor));
}

/// An input that backward keeps.
///
/// # Panics
/// If `KEEPS` says otherwise.
#[track_caller]
pub(crate) fn kept<T>(input: Option<T>) -> T {
    // PANIC: see above; both are written side by side in an operation.
    input.expect("an input that KEEPS names")
}

/// The shape of a primitive.
pub(crate) fn dims<B: HostBackend>(tensor: &FloatTensor<B>) -> Vec<usize> {
    tensor.shape().to_vec()
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
