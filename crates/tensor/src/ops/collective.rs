//! Collectives between ranks as differentiable operations: each is the other's gradient (Shoeybi et al., arXiv:1909.08053, section 3; Korthikanti
//! et al., arXiv:2205.05198, section 4.2.2).
//!
//! | forward | backward | |
//! |---|---|---|
//! | identity | all-reduce | [`copy_to`]: into a region where each rank works on its part of the weights |
//! | all-reduce | identity | [`reduce_from`]: out of it |
//! | all-gather | reduce-scatter | [`gather_tokens`]: into it from tokens that are divided among the ranks |
//! | reduce-scatter | all-gather | [`scatter_tokens`]: out of it |
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
use std::sync::Arc;

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

/// All tokens, of which each rank has its [`part`]. A rank's gradient is its part of the sum of the gradients of all ranks.
///
/// # Shapes
/// - `x`: `[1, part of B T, D]`; output `[B, T, D]`
///
/// # Panics
/// If `x` is not on a CPU backend or not this rank's part, or a rank of the group fails.
pub fn gather_tokens(x: Tensor<3>, [batch, tokens]: [usize; 2], group: &Communicator) -> Tensor<3> {
    if group.size() == 1 {
        let d = x.dims()[2];
        return x.reshape([batch, tokens, d]);
    }
    let (got, mine) = (x.dims()[1], part(batch * tokens, group.rank(), group.size()).len());
    assert_eq!(got, mine, "gather_tokens: this rank's part of {batch} * {tokens} tokens is {mine}, got {got}");
    run(x, Kind::Gather { batch, tokens }, group)
}

/// This rank's [`part`] of the tokens of the sum of all ranks' `x`. Its gradient is that of all tokens, put together from all ranks.
///
/// # Shapes
/// - `x`: `[B, T, D]`; output `[1, part of B T, D]`
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails.
pub fn scatter_tokens(x: Tensor<3>, group: &Communicator) -> Tensor<3> {
    let [batch, tokens, d] = x.dims();
    if group.size() == 1 {
        return x.reshape([1, batch * tokens, d]);
    }
    run(x, Kind::Scatter { batch, tokens }, group)
}

/// `x` itself, of which the ranks have the same columns (or, of a vector, elements) from `from` on: the gradients of these are summed over the group.
///
/// # Panics
/// If `x` is not on a CPU backend, or a rank of the group fails in backward.
pub fn copy_columns_to<const D: usize>(x: Tensor<D>, from: usize, group: &Communicator) -> Tensor<D> {
    run(x, Kind::Columns { from }, group)
}

/// Rows that each rank sends to each, `counts[0]` of them in the order of the ranks, of which `counts[1]` come from each. Their gradients go back the same way.
///
/// # Shapes
/// - `x`: `[rows sent, D]`; output `[rows received, D]`
///
/// # Panics
/// If `x` is not on a CPU backend or has other rows, or a rank of the group fails or sends other counts.
pub(super) fn exchange_rows(x: Tensor<2>, counts: [Arc<[usize]>; 2], group: &Communicator) -> Tensor<2> {
    let rows = x.dims()[0];
    assert_eq!(
        counts[0].iter().sum::<usize>(),
        rows,
        "exchange: {rows} rows, but {counts:?} are to be sent and received"
    );
    run(x, Kind::Rows { counts }, group)
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

#[derive(Clone, Debug)]
enum Kind {
    Copy,
    Reduce,
    Gather { batch: usize, tokens: usize },
    Scatter { batch: usize, tokens: usize },
    Columns { from: usize },
    Rows { counts: [Arc<[usize]>; 2] },
}

impl Collective {
    fn gather<B: HostBackend>(&self, x: FloatTensor<B>, [b, t]: [usize; 2], shape: &mut Vec<usize>) -> Vec<f32> {
        let d = shape[2];
        *shape = vec![b, t, d];
        all_gather(&self.group, B::values(x).as_ref(), b * t, d)
    }

    fn exchange<B: HostBackend>(
        &self,
        x: FloatTensor<B>,
        [there, back]: [&[usize]; 2],
        shape: &mut [usize],
    ) -> Vec<f32> {
        let d = shape[1];
        let of_rows = |rows: &[usize]| rows.iter().map(|rows| rows * d).collect::<Vec<_>>();
        let (received, counts) = done(self.group.all_to_all(B::values(x).as_ref(), &of_rows(there)));
        assert_eq!(counts, of_rows(back), "exchange: other rows came than were announced");
        shape[0] = back.iter().sum();
        received
    }

    fn scatter<B: HostBackend>(&self, x: FloatTensor<B>, shape: &mut Vec<usize>) -> Vec<f32> {
        let d = shape[2];
        let mine = reduce_scatter(&self.group, B::values(x).as_ref(), d);
        *shape = vec![1, mine.len() / d.max(1), d];
        mine
    }
}

/// Of one input, whose values backward does not need.
impl Vjp<1> for Collective {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let mut shape = dims::<B>(&x);
        let values = match &self.kind {
            Kind::Copy | Kind::Columns { .. } => return x,
            Kind::Reduce => {
                let x = B::values(x);
                let mut sum = buffer(x.as_ref().len());
                kernels::copy(&mut sum, x.as_ref());
                all_reduce(&self.group, &mut sum);
                sum
            }
            Kind::Gather { batch, tokens } => self.gather::<B>(x, [*batch, *tokens], &mut shape),
            Kind::Scatter { .. } => self.scatter::<B>(x, &mut shape),
            Kind::Rows { counts } => self.exchange::<B>(x, [&counts[0], &counts[1]], &mut shape),
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
        let values = match &self.kind {
            Kind::Reduce => return [dx.hand_over(grad)],
            Kind::Copy => {
                let mut sum = B::into_vec(grad);
                all_reduce(&self.group, &mut sum);
                sum
            }
            &Kind::Columns { from } => {
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
            Kind::Gather { .. } => self.scatter::<B>(grad, &mut shape),
            Kind::Scatter { batch, tokens } => self.gather::<B>(grad, [*batch, *tokens], &mut shape),
            Kind::Rows { counts } => self.exchange::<B>(grad, [&counts[1], &counts[0]], &mut shape),
        };
        [dx.put(&shape, values)]
    }
}
