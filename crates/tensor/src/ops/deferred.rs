//! The half of a backward pass for which nobody waits: gradients of weights, computed later.

use std::cell::RefCell;
use std::fmt;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, AutodiffBackend, Dispatch};
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::vjp::Tracked;
use crate::adapter::HostBackend;
use crate::buffers::recycle;
use crate::device::is_fused;
use crate::kernels;

/// Gradients of linear layers' weights that a backward pass has left for later, with what they are computed from.
///
/// Dropped, they are never computed.
#[derive(Default)]
pub struct Deferred {
    jobs: Vec<(NodeId, Job)>,
}

/// Makes the gradient of a leaf.
pub(crate) type Job = Box<dyn FnOnce() -> Vec<f32>>;

thread_local! {
    /// Where this thread leaves gradients for later; nowhere outside of [`defer_weights`].
    static LATER: RefCell<Option<Deferred>> = const { RefCell::new(None) };
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Deferred({} gradients)", self.jobs.len())
    }
}

/// Runs `work`, of whose backward passes linear layers leave the gradients of their weights for later, where a weight is a parameter (a leaf) and no
/// gradient was [carried](super::carry_gradient) to it. All other gradients are made: those of inputs, for which an earlier stage may wait, of biases
/// and norms, which cost little, of tables and of the head, which is made in forward.
///
/// What is left is computed with the same operations in the same order, and so has the same bits. It holds the layers' inputs (in f32) and the
/// gradients of their outputs until then. On other devices than the CPU backends nothing is left.
pub fn defer_weights<R>(work: impl FnOnce() -> R) -> (R, Deferred) {
    with_jobs(Deferred::default(), work)
}

/// Runs `work` with these jobs in reach; returns those that are there then.
fn with_jobs<R>(jobs: Deferred, work: impl FnOnce() -> R) -> (R, Deferred) {
    struct Restore(Option<Deferred>);
    impl Drop for Restore {
        fn drop(&mut self) {
            LATER.set(self.0.take());
        }
    }
    let restore = Restore(LATER.replace(Some(jobs)));
    let result = work();
    let jobs = LATER.take().unwrap_or_default();
    drop(restore);
    (result, jobs)
}

impl Deferred {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Takes what another pass has left.
    pub fn append(&mut self, mut other: Deferred) {
        self.jobs.append(&mut other.jobs);
    }

    /// Computes the gradient of `param` that was left, flat and on its inner device: the sum, where several layers have it as their weight. `None` if there is none.
    pub fn compute<const D: usize>(&mut self, param: Tensor<D>) -> Option<Tensor<1>> {
        if self.is_empty() || !is_fused(&param.device()) {
            return None;
        }
        let (grad, rest) = with_jobs(std::mem::take(self), || {
            Tensor::<1>::from_dispatch(Dispatch::fused_deferred(param.into_dispatch())).inner()
        });
        *self = rest;
        (grad.dims() != [0]).then_some(grad)
    }
}

/// Whether weights' gradients of this thread are left for later.
pub(crate) fn is_deferring() -> bool {
    LATER.with_borrow(Option::is_some)
}

/// Leaves one.
pub(crate) fn defer(leaf: NodeId, job: Job) {
    LATER.with_borrow_mut(|later| {
        if let Some(later) = later {
            later.jobs.push((leaf, job));
        }
    });
}

/// Computes those of a leaf; empty if there are none.
pub(crate) fn compute<B: HostBackend + FusedOps, C: CheckpointStrategy>(leaf: &Tracked<B, C>) -> Tracked<B, C> {
    let id = leaf.id();
    let jobs: Vec<Job> = LATER.with_borrow_mut(|later| {
        let jobs = later.iter_mut().flat_map(|later| later.jobs.extract_if(.., |(leaf, _)| *leaf == id));
        jobs.map(|(_, job)| job).collect()
    });
    let sum = jobs.into_iter().map(|job| job()).reduce(|mut sum, term| {
        kernels::add(&mut sum, &term);
        recycle(term);
        sum
    });
    let sum = sum.unwrap_or_default();
    let n = [sum.len()];
    Autodiff::<B, C>::from_inner(B::tensor(sum, &n))
}
