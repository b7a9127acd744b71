//! Products of low rank that are added to some columns of an output: what adapters add to a linear layer.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::compute::{compute, multiply};
use super::extension::FusedOps;
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::matmul::{Compute, Into, Mat, matmul};

/// `y`, to whose columns of each piece `scale` times the product of the piece's part of `x` with its part of `up` is added: the second half of what an adapter of low rank
/// (Hu et al., arXiv:2106.09685) adds to the output of a linear layer that may be several in one.
///
/// # Shapes
/// - `y`: `[.., O]`, of which `pieces` are columns; `x`: `[.., P R]` for P pieces; `up`: `[R, C]`, with the columns of the pieces side by side; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit.
pub fn add_low_rank<const D: usize>(
    y: Tensor<D>,
    x: Tensor<D>,
    up: Tensor<2>,
    pieces: &Arc<[Range<usize>]>,
    scale: f64,
) -> Tensor<D> {
    let ([rank, columns], dims) = (up.dims(), y.dims());
    let mut of_x = dims;
    of_x[D - 1] = rank * pieces.len();
    assert_eq!(x.dims(), of_x, "low rank: {} pieces of rank {rank} for an output {dims:?}", pieces.len());
    let widths: usize = pieces.iter().map(Range::len).sum();
    assert_eq!(columns, widths, "low rank: pieces of {widths} columns together");
    assert!(pieces.iter().all(|piece| piece.end <= dims[D - 1]), "low rank: pieces {pieces:?} of {}", dims[D - 1]);
    if is_fused(&y.device()) {
        let op = LowRank { pieces: pieces.clone(), scale: scale as f32, compute: compute() };
        let (y, x, up) = (y.into_dispatch(), x.into_dispatch(), up.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_low_rank(y, x, up, op));
    }
    composed(y, x, up, pieces, scale)
}

/// The reference, of burn's own operations.
pub(super) fn composed<const D: usize>(
    y: Tensor<D>,
    x: Tensor<D>,
    up: Tensor<2>,
    pieces: &[Range<usize>],
    scale: f64,
) -> Tensor<D> {
    let (dims, rank) = (y.dims(), up.dims()[0]);
    let width = dims[D - 1];
    let rows = dims.iter().product::<usize>() / width.max(1);
    let x = x.reshape([rows, rank * pieces.len()]);
    let mut y: Tensor<2> = y.reshape([rows, width]);
    let mut first = 0;
    for (i, piece) in pieces.iter().enumerate() {
        let x = x.clone().narrow(1, i * rank, rank);
        let added = multiply(x, up.clone().narrow(1, first, piece.len())) * scale;
        let sum = y.clone().narrow(1, piece.start, piece.len()) + added;
        y = y.slice_assign([0..rows, piece.clone()], sum);
        first += piece.len();
    }
    y.reshape(dims)
}

/// See [`add_low_rank`]: of y, x and up.
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    pieces: Arc<[Range<usize>]>,
    scale: f32,
    compute: Compute,
}

impl LowRank {
    /// For each piece its number, its columns, and the first of them in `up`.
    fn each(&self) -> impl Iterator<Item = (usize, &Range<usize>, usize)> {
        let firsts = self.pieces.iter().scan(0, |next, piece| {
            let first = *next;
            *next += piece.len();
            Some(first)
        });
        self.pieces.iter().enumerate().zip(firsts).map(|((i, piece), first)| (i, piece, first))
    }

    /// The smaller factor of a product takes the scale.
    fn scaled(&self, values: &[f32]) -> Vec<f32> {
        let mut scaled = buffer(values.len());
        scaled.iter_mut().zip(values).for_each(|(to, from)| *to = from * self.scale);
        scaled
    }
}

impl Vjp<3> for LowRank {
    const KEEPS: [Keep; 3] = [Keep::Nothing, Keep::Activation, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [y, x, up]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let (shape, of_up) = (dims::<B>(&y), dims::<B>(&up));
        let (rank, columns) = (of_up[0], of_up[1]);
        let width = shape.last().copied().unwrap_or_default();
        let (mut y, x, up) = (B::into_vec(y), B::values(x), B::values(up));
        let (rows, inputs) = (y.len() / width.max(1), rank * self.pieces.len());
        let x = self.scaled(x.as_ref());
        for (i, piece, first) in self.each() {
            if rows == 0 || piece.is_empty() {
                continue;
            }
            let x = Mat::new(&x[i * rank..], rows, rank, inputs);
            let up = Mat::new(&up.as_ref()[first..], rank, piece.len(), columns);
            matmul(self.compute, x, up, &mut y[piece.start..], width, Into::Add);
        }
        recycle(x);
        B::tensor(y, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        [_, x, up]: [Option<FloatTensor<B>>; 3],
        grad: FloatTensor<B>,
        [dy, dx, dup]: [Sink<B>; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        let (x, up) = (kept(x), kept(up));
        let (of_x, of_up, of_y) = (dims::<B>(&x), dims::<B>(&up), dims::<B>(&grad));
        let (rank, columns) = (of_up[0], of_up[1]);
        let width = of_y.last().copied().unwrap_or_default();
        let dy = if dy.wanted() { dy.hand_over(grad.clone()) } else { None };
        let (x, up, grad) = (B::values(x), B::values(up), B::values(grad));
        let (rows, inputs) = (grad.as_ref().len() / width.max(1), rank * self.pieces.len());
        let some = |piece: &Range<usize>| rows > 0 && !piece.is_empty();
        let of_piece = |piece: &Range<usize>| Mat::new(&grad.as_ref()[piece.start..], rows, piece.len(), width);
        let dx = dx.fill(&of_x, |dx, into| {
            let up = self.scaled(up.as_ref());
            for (i, piece, first) in self.each().filter(|(_, piece, _)| some(piece)) {
                let up = Mat::new(&up[first..], rank, piece.len(), columns);
                matmul(self.compute, of_piece(piece), up.t(), &mut dx[i * rank..], inputs, into);
            }
            recycle(up);
        });
        let dup = dup.fill(&of_up, |dup, into| {
            let x = self.scaled(x.as_ref());
            for (i, piece, first) in self.each().filter(|(_, piece, _)| some(piece)) {
                let x = Mat::new(&x[i * rank..], rows, rank, inputs);
                matmul(self.compute, x.t(), of_piece(piece), &mut dup[first..], columns, into);
            }
            recycle(x);
        });
        [dy, dx, dup]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::device::Backend;

    fn leaf<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| ((i * 37 + seed * 101) % 53) as f32 / 26.0 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, shape), device).require_grad()
    }

    #[test]
    fn it_is_what_its_reference_is() {
        let device = Backend::NdArray.device().unwrap().autodiff();
        let cases: [&[Range<usize>]; 4] = [&[0..7], &[2..5], &[0..2, 5..7], &[1..2, 2..4, 6..7]];
        for pieces in cases {
            let (rank, columns) = (3, pieces.iter().map(Range::len).sum());
            let shared: Arc<[Range<usize>]> = pieces.into();
            let run = |fused: bool| -> Vec<Vec<f32>> {
                let y = leaf([2, 5, 7], 1, &device);
                let x = leaf([2, 5, rank * pieces.len()], 2, &device);
                let up = leaf([rank, columns], 3, &device);
                let out = match fused {
                    true => add_low_rank(y.clone(), x.clone(), up.clone(), &shared, 0.7),
                    false => composed(y.clone(), x.clone(), up.clone(), pieces, 0.7),
                };
                let weights = leaf([2, 5, 7], 4, &device).detach();
                let grads = (out.clone() * weights).sum().backward();
                let values = |data: TensorData| data.try_into_vec::<f32>().unwrap();
                vec![
                    values(out.into_data()),
                    values(y.grad(&grads).unwrap().into_data()),
                    values(x.grad(&grads).unwrap().into_data()),
                    values(up.grad(&grads).unwrap().into_data()),
                ]
            };
            for (fused, composed) in run(true).into_iter().zip(run(false)) {
                let close = fused.iter().zip(&composed).all(|(a, b)| (a - b).abs() < 1e-5);
                assert!(close, "{pieces:?}: {fused:?} {composed:?}");
            }
        }
    }
}
