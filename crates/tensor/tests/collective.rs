//! Collectives as operations: what they give, and that each is the other's gradient.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};
use firebox_parallel::{Communicator, WorldError, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::collective::{copy_columns_to, copy_to, gather_tokens, part, reduce_from, scatter_tokens};

/// B, T, D: 10 tokens, of which 3 ranks have 3, 3 and 4.
const SHAPE: [usize; 3] = [2, 5, 3];
const RANKS: usize = 3;

/// The values of a rank: whole numbers, whose sums are exact.
fn values(rank: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * (rank + 1) % 11) as f32 - 4.0).collect()
}

fn sum(n: usize) -> Vec<f32> {
    (0..n).map(|i| (0..RANKS).map(|rank| values(rank, n)[i]).sum()).collect()
}

/// Rank `rank`'s tokens of all.
fn tokens_of(all: &[f32], rank: usize) -> Vec<f32> {
    let mine = part(SHAPE[0] * SHAPE[1], rank, RANKS);
    all[mine.start * SHAPE[2]..mine.end * SHAPE[2]].to_vec()
}

fn tensor(values: Vec<f32>, shape: [usize; 3], device: &Device) -> Tensor<3> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Output and input gradient of each rank for its values as upstream gradient.
fn run(
    input: fn(usize) -> (Vec<f32>, [usize; 3]),
    op: fn(Tensor<3>, &Communicator) -> Tensor<3>,
) -> Vec<[Vec<f32>; 2]> {
    let world: Result<_, WorldError<String>> = spawn(RANKS, move |comm| {
        let device = Backend::NdArray.device().map_err(|error| error.to_string())?.autodiff();
        let (values_in, shape) = input(comm.rank());
        let x = tensor(values_in, shape, &device).require_grad();
        let y = op(x.clone(), &comm);
        let upstream = tensor(values(comm.rank(), y.shape().num_elements()), y.dims(), &device);
        let grads = (y.clone() * upstream).sum().backward();
        Ok([y.inner(), x.grad(&grads).unwrap()].map(|t| t.into_data().try_to_vec().unwrap()))
    });
    world.unwrap()
}

fn whole(rank: usize) -> (Vec<f32>, [usize; 3]) {
    (values(rank, 30), SHAPE)
}

fn divided(rank: usize) -> (Vec<f32>, [usize; 3]) {
    let mine = part(10, rank, RANKS).len();
    (values(rank, 3 * mine), [1, mine, 3])
}

#[test]
fn copy_and_reduce_are_each_others_gradient() {
    for (rank, [y, dx]) in run(whole, copy_to).into_iter().enumerate() {
        assert_eq!((y, dx), (values(rank, 30), sum(30)));
    }
    for (rank, [y, dx]) in run(whole, reduce_from).into_iter().enumerate() {
        assert_eq!((y, dx), (sum(30), values(rank, 30)));
    }
}

#[test]
fn gather_and_scatter_are_each_others_gradient() {
    let all: Vec<f32> = (0..RANKS).flat_map(|rank| divided(rank).0).collect();
    for (rank, [y, dx]) in run(divided, |x, comm| gather_tokens(x, [2, 5], comm)).into_iter().enumerate() {
        assert_eq!((y, dx), (all.clone(), tokens_of(&sum(30), rank)));
    }
    for (rank, [y, dx]) in run(whole, scatter_tokens).into_iter().enumerate() {
        assert_eq!((y, dx), (tokens_of(&sum(30), rank), all.clone()));
    }
}

#[test]
fn only_the_columns_in_common_are_summed() {
    for (rank, [y, dx]) in run(whole, |x, comm| copy_columns_to(x, 1, comm)).into_iter().enumerate() {
        let (own, sum) = (values(rank, 30), sum(30));
        let want: Vec<f32> = (0..30).map(|i| if i % 3 == 0 { own[i] } else { sum[i] }).collect();
        assert_eq!((y, dx), (own, want));
    }
}

#[test]
fn a_group_of_one_costs_nothing() {
    let grads = spawn(1, |comm| {
        let device = Backend::NdArray.device().map_err(|error| error.to_string())?.autodiff();
        let x = tensor(values(0, 30), SHAPE, &device).require_grad();
        let y = gather_tokens(scatter_tokens(reduce_from(copy_to(x.clone(), &comm), &comm), &comm), [2, 5], &comm);
        let same = y.dims() == x.dims();
        Ok::<_, String>((same, x.grad(&y.sum().backward()).unwrap().into_data().try_to_vec::<f32>().unwrap()))
    });
    assert_eq!(grads.unwrap(), [(true, vec![1.0; 30])]);
}
