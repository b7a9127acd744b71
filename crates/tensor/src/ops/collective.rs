//! Collectives between ranks as differentiable operations: each is the other's gradient (Shoeybi et al., arXiv:1909.08053, section 3; Korthikanti
//! et al., arXiv:2205.05198, section 4.2.2).
//!
//! | forward | backward | |
//! |---|---|---|
//! | identity | all-reduce | [`copy_to`]: into a region where each rank works on its part of the weights |
//! | all-reduce | identity | [`reduce_from`]: out of it |
//! | all-gather of rows | reduce-scatter | [`gather_rows`]: into it from rows that are divided among the ranks |
//! | reduce-scatter of rows | all-gather | [`scatter_rows`]: out of it |
//!
//! They work on the memory of the CPU backends. Every rank of the group must come to the same operations in the same order, forward and backward.
//! A group of one rank costs nothing.
//!
//! # When a rank fails
//!
//! An operation on tensors returns no error, least of all inside a backward pass. So a failed collective panics with the message of its
//! [`CommError`](firebox_parallel::CommError), which names the rank at fault. Whoever runs the ranks reports the one that failed first: between
//! threads it is [`Threads::run`](firebox_parallel::Threads::run), which catches the panics.

use std::ops::Range;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Device, Tensor};
use firebox_parallel::{Communicator, ReduceOp};

use super::extension::FusedOps;
use super::vjp::{Keep, Sink, Vjp, dims};
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels;

/// The part of `total` items that rank `rank` of `size` has: as even as can be, in the order of the ranks.
pub fn part(total: usize, rank: usize, size: usize) -> Range<usize> {
    rank * total / size..(rank + 1) * total / size
}

/// `x` itself; its gradient is the sum of those of all ranks of the group. All have the same `x`.
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails in backward.
pub fn copy_to<const D: usize>(x: Tensor<D>, group: &Communicator) -> Tensor<D> {
    run(x, Kind::Copy, group)
}

/// The sum of the `x` of all ranks; all have the same gradient.
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails.
pub fn reduce_from<const D: usize>(x: Tensor<D>, group: &Communicator) -> Tensor<D> {
    run(x, Kind::Reduce, group)
}

/// All rows, of which each rank has its [`part`]. A rank's gradient is its part of the sum of the gradients of all ranks.
///
/// # Shapes
/// - `x`: `[part of N, D]`; output `[N, D]` with N = `rows`
///
/// # Panics
/// If `x` is not on a CPU backend or not this rank's part, or a rank of the group fails.
pub fn gather_rows(x: Tensor<2>, rows: usize, group: &Communicator) -> Tensor<2> {
    let (got, mine) = (x.dims()[0], part(rows, group.rank(), group.size()).len());
    assert_eq!(got, mine, "gather_rows: this rank's part of {rows} rows is {mine}, got {got}");
    run(x, Kind::Gather { rows }, group)
}

/// This rank's [`part`] of the rows of the sum of all ranks' `x`. Its gradient is that of all rows, put together from all ranks.
///
/// # Shapes
/// - `x`: `[N, D]`; output `[part of N, D]`
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails.
pub fn scatter_rows(x: Tensor<2>, group: &Communicator) -> Tensor<2> {
    let rows = x.dims()[0];
    run(x, Kind::Scatter { rows }, group)
}

/// `x` itself, of which the ranks have the same columns (or, of a vector, elements) from `from` on: the gradients of these are summed over the group.
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails in backward.
pub fn copy_columns_to<const D: usize>(x: Tensor<D>, from: usize, group: &Communicator) -> Tensor<D> {
    run(x, Kind::Columns { from }, group)
}

fn run<const D: usize>(x: Tensor<D>, kind: Kind, group: &Communicator) -> Tensor<D> {
    if group.size() == 1 {
        return x;
    }
    assert_host(&x.device());
    let op = Collective { kind, group: group.clone() };
    Tensor::from_dispatch(Dispatch::fused_collective(x.into_dispatch(), op))
}

/// The ranks read and write each other's memory, or hand it to MPI.
#[track_caller]
pub(super) fn assert_host(device: &Device) {
    assert!(is_fused(device), "collectives between ranks work on the CPU backends (ndarray, flex), got {device:?}");
}

/// What a collective gave; a panic with the message of its error, see the [module](self).
#[track_caller]
pub(super) fn done<T>(result: firebox_parallel::Result<T>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

/// Sums `values` over the group, in place.
pub(super) fn all_reduce(group: &Communicator, values: &mut [f32]) {
    done(group.all_reduce(values, ReduceOp::Sum));
}

/// All ranks' parts of `rows` rows of `d` values.
pub(super) fn all_gather(group: &Communicator, mine: &[f32], rows: usize, d: usize) -> Vec<f32> {
    let mut all = buffer(rows * d);
    done(group.all_gather(mine, &mut all));
    all
}

/// This rank's part of the sum of all ranks' `values`, rows of `d`.
pub(super) fn reduce_scatter(group: &Communicator, values: &[f32], d: usize) -> Vec<f32> {
    let rows = part(values.len() / d.max(1), group.rank(), group.size()).len();
    let mut mine = buffer(rows * d);
    done(group.reduce_scatter(values, &mut mine, ReduceOp::Sum));
    mine
}

/// See the functions above.
#[derive(Clone, Debug)]
pub(crate) struct Collective {
    kind: Kind,
    group: Communicator,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Copy,
    Reduce,
    Gather { rows: usize },
    Scatter { rows: usize },
    Columns { from: usize },
}

/// Of one input, whose values backward does not need.
impl Vjp<1> for Collective {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let mut shape = dims::<B>(&x);
        let values = match self.kind {
            Kind::Copy | Kind::Columns { .. } => return x,
            Kind::Reduce => {
                let x = B::values(x);
                let mut sum = buffer(x.as_ref().len());
                kernels::copy(&mut sum, x.as_ref());
                all_reduce(&self.group, &mut sum);
                sum
            }
            Kind::Gather { rows } => {
                shape[0] = rows;
                all_gather(&self.group, B::values(x).as_ref(), rows, shape[1])
            }
            Kind::Scatter { .. } => {
                shape[0] = part(shape[0], self.group.rank(), self.group.size()).len();
                reduce_scatter(&self.group, B::values(x).as_ref(), shape[1])
            }
        };
        B::tensor(values, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let mut shape = dims::<B>(&grad);
        let values = match self.kind {
            Kind::Reduce => return [dx.hand_over(grad)],
            Kind::Copy => {
                let mut sum = B::into_vec(grad);
                all_reduce(&self.group, &mut sum);
                sum
            }
            Kind::Columns { from } => {
                let (mut sum, width) = (B::into_vec(grad), shape.last().copied().unwrap_or(0));
                let mut shared: Vec<f32> =
                    sum.chunks_exact(width.max(1)).flat_map(|row| row[from..].iter().copied()).collect();
                all_reduce(&self.group, &mut shared);
                for (row, shared) in sum.chunks_exact_mut(width.max(1)).zip(shared.chunks_exact((width - from).max(1)))
                {
                    row[from..].copy_from_slice(shared);
                }
                sum
            }
            Kind::Gather { .. } => {
                let mine = reduce_scatter(&self.group, B::values(grad).as_ref(), shape[1]);
                shape[0] = mine.len() / shape[1].max(1);
                mine
            }
            Kind::Scatter { rows } => {
                shape[0] = rows;
                all_gather(&self.group, B::values(grad).as_ref(), rows, shape[1])
            }
        };
        [dx.put(&shape, values)]
    }
}
