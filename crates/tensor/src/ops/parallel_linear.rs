//! Linear layers of which each rank of a group has a part of the weight (Megatron-LM, Shoeybi et al., arXiv:1909.08053, section 3), with tokens whole or
//! divided among the ranks outside (sequence parallel, Korthikanti et al., arXiv:2205.05198, section 4.2.2).

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;
use firebox_parallel::{Communicator, Pending, ReduceOp};
use rayon::prelude::*;

use super::collective::{all_gather, all_reduce, assert_host, done, part, reduce_scatter};
use super::extension::FusedOps;
use super::linear::{Linear, Pre, or_none};
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::kernels;

/// `pre(x) w + b` with this rank's columns of `w` and `b`: the same `x` on all ranks, or, with `tokens`, each rank's [`part`] of its rows.
///
/// In backward the gradient of `x` is summed over the group while that of `w` is computed; those of the norm's parameters are summed as well. With `tokens`,
/// only this rank's part of `x` is kept, and gathered again in backward.
///
/// # Shapes
/// - `x`: `[B, T, I]`, or `[1, part of B T, I]` with `tokens` = `[B, T]`; `w`: `[I, O]`, `b`: `[O]`; output `[B, T, O]`
///
/// # Panics
/// If the shapes do not fit, `pre` is no norm, the device is no CPU backend, or a rank of the group fails.
pub fn column_linear(
    x: Tensor<3>,
    pre: Pre,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    tokens: Option<[usize; 2]>,
    group: &Communicator,
) -> Tensor<3> {
    run(x, pre, w, b, None, Side::Column, tokens, group)
}

/// The sum over the group of `pre(x) w` with this rank's rows of `w`, plus `b` and `residual` once; with `tokens`, this rank's [`part`] of its rows.
///
/// # Shapes
/// - `x`: `[B, T, I]` (`[B, T, 2 I]` for SwiGLU), `w`: `[I, O]`, `b`: `[O]`; `residual` and output `[B, T, O]`, or `[1, part of B T, O]` with `tokens` = `[B, T]`
///
/// # Panics
/// If the shapes do not fit, `pre` is a norm, the device is no CPU backend, or a rank of the group fails.
pub fn row_linear(
    x: Tensor<3>,
    pre: Pre,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    residual: Option<Tensor<3>>,
    tokens: Option<[usize; 2]>,
    group: &Communicator,
) -> Tensor<3> {
    run(x, pre, w, b, residual, Side::Row, tokens, group)
}

#[allow(clippy::too_many_arguments)]
fn run(
    x: Tensor<3>,
    pre: Pre,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    residual: Option<Tensor<3>>,
    side: Side,
    tokens: Option<[usize; 2]>,
    group: &Communicator,
) -> Tensor<3> {
    let device = x.device();
    assert_host(&device);
    let norm = matches!(pre, Pre::LayerNorm { .. } | Pre::RmsNorm { .. });
    let inner = matches!(pre, Pre::Gelu | Pre::GeluExact | Pre::QuickGelu | Pre::SwiGlu);
    assert!(if side == Side::Column { !inner } else { !norm }, "{side:?} linear: {pre:?} cannot come before it");
    let ([batch, rows, width], [inputs, outputs]) = (x.dims(), w.dims());
    let expected = if matches!(pre, Pre::SwiGlu) { 2 * inputs } else { inputs };
    assert_eq!(width, expected, "{side:?} linear: input {:?} does not fit a weight of {inputs} inputs", x.dims());
    let mine = tokens.map(|[b, t]| [1, part(b * t, group.rank(), group.size()).len()]);
    let (at_input, at_output) = if side == Side::Column { (mine, tokens) } else { (tokens, mine) };
    let at_input = at_input.unwrap_or([batch, rows]);
    assert_eq!([batch, rows], at_input, "{side:?} linear: input of other tokens than this rank's");
    if let Some(residual) = &residual {
        let [b, t] = at_output.unwrap_or([batch, rows]);
        assert_eq!(residual.dims(), [b, t, outputs], "{side:?} linear: the residual has not the output's shape");
    }
    let (linear, [norm_weight, norm_bias]) = Linear::taken_apart(pre);
    let op = ParallelLinear { linear, side, tokens, group: group.clone() };
    Tensor::from_dispatch(Dispatch::fused_parallel_linear(
        x.into_dispatch(),
        w.into_dispatch(),
        or_none(b, &device).into_dispatch(),
        or_none(residual, &device).into_dispatch(),
        or_none(norm_weight, &device).into_dispatch(),
        or_none(norm_bias, &device).into_dispatch(),
        op,
    ))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Column,
    Row,
}

/// See [`column_linear`] and [`row_linear`]; the inputs are those of [`Linear`].
#[derive(Clone, Debug)]
pub(crate) struct ParallelLinear {
    linear: Linear,
    side: Side,
    /// B and T, where tokens are divided among the ranks outside.
    tokens: Option<[usize; 2]>,
    group: Communicator,
}

impl ParallelLinear {
    /// All tokens of `x`, which has this rank's where they are divided.
    fn gathered<B: HostBackend>(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        let Some([b, t]) = self.tokens else { return x };
        let d = dims::<B>(&x)[2];
        let all = all_gather(&self.group, B::values(x).as_ref(), b * t, d);
        B::tensor(all, &[b, t, d])
    }

    /// The sum of all ranks' `y`, or this rank's tokens of it where they are divided; and its shape.
    fn summed<B: HostBackend>(&self, y: FloatTensor<B>) -> (Vec<f32>, Vec<usize>) {
        let shape = dims::<B>(&y);
        if self.tokens.is_none() {
            let mut sum = B::into_vec(y);
            all_reduce(&self.group, &mut sum);
            return (sum, shape);
        }
        let mine = reduce_scatter(&self.group, B::values(y).as_ref(), shape[2]);
        let rows = mine.len() / shape[2].max(1);
        (mine, vec![1, rows, shape[2]])
    }

    /// Begins to sum `partial` over the ranks; where tokens are divided, this rank's part has `len` values.
    fn start_sum(&self, partial: Vec<f32>, len: usize) -> Sum {
        match self.tokens {
            None => Sum::All(done(self.group.start_all_reduce(partial, ReduceOp::Sum))),
            Some(_) => Sum::Part(done(self.group.start_reduce_scatter(partial, buffer(len), ReduceOp::Sum))),
        }
    }

    fn column_backward<B: HostBackend>(
        &self,
        [x, w, _, _, norm_weight, norm_bias]: [Option<FloatTensor<B>>; 6],
        grad: FloatTensor<B>,
        [dx, dw, db, _, dnorm_weight, dnorm_bias]: [Sink<B>; 6],
    ) -> [Option<FloatTensor<B>>; 6] {
        let x = kept(x);
        let shape: Vec<usize> = dims::<B>(&x);
        let x = self.gathered::<B>(x);
        let inputs = || [Some(x.clone()), w.clone(), None, None, norm_weight.clone(), norm_bias.clone()];
        let no = || Sink::fresh(false);
        let fresh = |sink: &Sink<B>| Sink::fresh(sink.wanted());
        let wanted = [fresh(&dx), no(), no(), no(), fresh(&dnorm_weight), fresh(&dnorm_bias)];
        let [partial, _, _, _, norm_weight_part, norm_bias_part] =
            self.linear.backward::<B>(inputs(), grad.clone(), wanted);
        // The ranks sum up the gradient of the input while each computes that of its weight.
        let sum = partial.map(|partial| self.start_sum(B::into_vec(partial), shape.iter().product()));
        let [_, dw, db, ..] = self.linear.backward::<B>(inputs(), grad, [no(), dw, db, no(), no(), no()]);
        let [dnorm_weight, dnorm_bias] =
            [(dnorm_weight, norm_weight_part), (dnorm_bias, norm_bias_part)].map(|(sink, partial)| {
                let mut sum = B::into_vec(partial?);
                all_reduce(&self.group, &mut sum);
                sink.put(&[sum.len()], sum)
            });
        let dx = sum.and_then(|sum| dx.put(&shape, sum.wait()));
        [dx, dw, db, None, dnorm_weight, dnorm_bias]
    }
}

/// A sum over the ranks that is under way.
enum Sum {
    All(Pending<Vec<f32>>),
    Part(Pending<(Vec<f32>, Vec<f32>)>),
}

impl Sum {
    fn wait(self) -> Vec<f32> {
        match self {
            Self::All(sum) => done(sum.wait()),
            Self::Part(part) => {
                let (part, partial) = done(part.wait());
                recycle(partial);
                part
            }
        }
    }
}

impl Vjp<6> for ParallelLinear {
    const KEEPS: [Keep; 6] = Linear::KEEPS;

    fn forward<B: HostBackend>(
        &self,
        [x, w, b, residual, norm_weight, norm_bias]: [FloatTensor<B>; 6],
    ) -> FloatTensor<B> {
        if self.side == Side::Column {
            return self.linear.forward::<B>([self.gathered::<B>(x), w, b, residual, norm_weight, norm_bias]);
        }
        let none = || B::tensor(vec![], &[0]);
        let partial = self.linear.forward::<B>([x, w, none(), none(), norm_weight, norm_bias]);
        let (mut y, shape) = self.summed::<B>(partial);
        let (b, residual) = (B::values(b), B::values(residual));
        let bias = b.as_ref();
        if !bias.is_empty() {
            y.par_chunks_exact_mut(bias.len()).for_each(|row| kernels::add_assign(row, bias));
        }
        if !residual.as_ref().is_empty() {
            kernels::add(&mut y, residual.as_ref());
        }
        B::tensor(y, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        inputs: [Option<FloatTensor<B>>; 6],
        grad: FloatTensor<B>,
        sinks: [Sink<B>; 6],
    ) -> [Option<FloatTensor<B>>; 6] {
        if self.side == Side::Column {
            return self.column_backward(inputs, grad, sinks);
        }
        let [dx, dw, db, dresidual, ..] = sinks;
        let dresidual = if dresidual.wanted() { dresidual.hand_over(grad.clone()) } else { None };
        let no = || Sink::fresh(false);
        let sinks = [dx, dw, db, no(), no(), no()];
        let [dx, dw, db, ..] = self.linear.backward::<B>(inputs, self.gathered::<B>(grad), sinks);
        [dx, dw, db, dresidual, None, None]
    }
}
