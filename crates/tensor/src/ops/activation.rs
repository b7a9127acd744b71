//! GELU, SwiGLU and dropout.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Tensor, TensorData};

use super::extension::FusedOps;
use super::vjp::{Keep, Sink, Vjp, dims, kept, map1};
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels::activation;
pub(super) use crate::kernels::activation::Gelu as Form;
use crate::random::Counter;

/// GELU in its tanh form (Hendrycks and Gimpel, arXiv:1606.08415), the activation of GPT-2: PyTorch's
/// `gelu(x, approximate="tanh")`, `gelu_new` in Hugging Face's configs.
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_gelu(x.into_dispatch(), Gelu(Form::Tanh)));
    }
    let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
    x * (inner.tanh() + 1.0) * 0.5
}

/// GELU itself, `x Phi(x)` with the normal distribution's Phi: PyTorch's `gelu(x)`, `gelu` in Hugging Face's configs.
pub fn gelu_exact<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_gelu(x.into_dispatch(), Gelu(Form::Exact)));
    }
    // Not burn's `gelu`, whose backward takes the derivative of the tanh form.
    x.clone() * ((x * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5
}

/// `x sigmoid(1.702 x)`, the form of GELU in CLIP (Radford et al., arXiv:2103.00020): `quick_gelu` in Hugging Face's configs.
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_gelu(x.into_dispatch(), Gelu(Form::Quick)));
    }
    x.clone() * burn::tensor::activation::sigmoid(x * 1.702)
}

/// SwiGLU (Shazeer, arXiv:2002.05202): `silu(gate) * up` for rows `[gate | up]`.
///
/// # Shapes
/// - `x`: `[.., 2 F]`; output `[.., F]`
///
/// # Panics
/// If the last dimension is odd.
pub fn swiglu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let dims = x.dims();
    assert!(dims[D - 1].is_multiple_of(2), "swiglu: input {dims:?} does not end in [gate | up]");
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_swiglu(x.into_dispatch()));
    }
    let f = dims[D - 1] / 2;
    let gate = x.clone().narrow(D - 1, 0, f);
    let up = x.narrow(D - 1, f, f);
    burn::tensor::activation::silu(gate) * up
}

/// Inverted dropout: zeroes each element with probability `p`, scales the others by `1 / (1 - p)`. Which ones is a pure function of `counter` and
/// the element's index. Returns `x` where `p` is 0.
///
/// # Panics
/// If `p` is not in [0, 1).
pub fn dropout<const D: usize>(x: Tensor<D>, p: f64, counter: Counter) -> Tensor<D> {
    let all = 0..x.shape().num_elements();
    dropout_of(x, p, counter, &[all])
}

/// The same of a part of a tensor, which has these runs of the whole's elements one after the other: the parts get the whole's mask.
///
/// # Panics
/// If `p` is not in [0, 1), or the runs are not as long as `x` together.
pub fn dropout_of<const D: usize>(x: Tensor<D>, p: f64, counter: Counter, runs: &[Range<usize>]) -> Tensor<D> {
    assert!((0.0..1.0).contains(&p), "dropout: probability {p} is not in [0, 1)");
    let (n, of_runs) = (x.shape().num_elements(), runs.iter().map(Range::len).sum::<usize>());
    assert_eq!(n, of_runs, "dropout: a tensor of {n} elements, of which {of_runs} are said to be somewhere");
    if p == 0.0 {
        return x;
    }
    let op = Dropout { p: p as f32, counter, runs: runs.into() };
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_dropout(x.into_dispatch(), op));
    }
    let dims = x.dims();
    let mut mask = buffer(n);
    op.run(&vec![1.0; n], &mut mask);
    x.clone() * Tensor::from_data(TensorData::new(mask, dims.to_vec()), &x.device())
}

/// See [`gelu`], [`gelu_exact`] and [`quick_gelu`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gelu(Form);
/// See [`swiglu`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct SwiGlu;
/// See [`dropout`].
#[derive(Clone, Debug)]
pub(crate) struct Dropout {
    p: f32,
    counter: Counter,
    /// Which elements of the whole these are.
    runs: Arc<[Range<usize>]>,
}

impl Dropout {
    fn run(&self, mut x: &[f32], mut out: &mut [f32]) {
        for run in self.runs.iter() {
            let (x, out) = (x.split_off(..run.len()), out.split_off_mut(..run.len()));
            if let (Some(x), Some(out)) = (x, out) {
                activation::dropout(x, self.p, self.counter, run.start as u64, out);
            }
        }
    }
}

impl Vjp<1> for Gelu {
    const KEEPS: [Keep; 1] = [Keep::Activation];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let shape = dims::<B>(&x);
        map1::<B>(x, &shape, |x, out| activation::gelu(x, self.0, out))
    }

    fn backward<B: HostBackend>(
        &self,
        [x]: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let shape = dims::<B>(&grad);
        let (x, mut g) = (B::values(kept(x)), B::into_vec(grad));
        activation::gelu_backward(x.as_ref(), self.0, &mut g);
        [dx.put(&shape, g)]
    }
}

impl Vjp<1> for SwiGlu {
    const KEEPS: [Keep; 1] = [Keep::Activation];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let mut shape = dims::<B>(&x);
        let f = halve_last(&mut shape);
        map1::<B>(x, &shape, |x, out| activation::swiglu(x, f, out))
    }

    fn backward<B: HostBackend>(
        &self,
        [x]: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let x = kept(x);
        let shape = dims::<B>(&x);
        let f = halve_last(&mut shape.clone());
        let (x, dy) = (B::values(x), B::values(grad));
        [dx.write(&shape, |dx| activation::swiglu_backward(x.as_ref(), f, dy.as_ref(), dx))]
    }
}

fn halve_last(shape: &mut [usize]) -> usize {
    match shape.last_mut() {
        Some(last) => {
            *last /= 2;
            *last
        }
        None => 0,
    }
}

impl Vjp<1> for Dropout {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let shape = dims::<B>(&x);
        map1::<B>(x, &shape, |x, out| self.run(x, out))
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let shape = dims::<B>(&grad);
        let dy = B::values(grad);
        [dx.write(&shape, |dx| self.run(dy.as_ref(), dx))]
    }
}
