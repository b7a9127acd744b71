//! GELU, SwiGLU and dropout.

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
    dropout_from(x, p, counter, 0)
}

/// The same of a part of a tensor, whose first element is the whole's element `first`: the parts get the whole's mask.
///
/// # Panics
/// If `p` is not in [0, 1).
pub fn dropout_from<const D: usize>(x: Tensor<D>, p: f64, counter: Counter, first: u64) -> Tensor<D> {
    assert!((0.0..1.0).contains(&p), "dropout: probability {p} is not in [0, 1)");
    if p == 0.0 {
        return x;
    }
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_dropout(
            x.into_dispatch(),
            Dropout { p: p as f32, counter, first },
        ));
    }
    let dims = x.dims();
    let mut mask = buffer(dims.iter().product());
    activation::dropout(&vec![1.0; mask.len()], p as f32, counter, first, &mut mask);
    x.clone() * Tensor::from_data(TensorData::new(mask, dims.to_vec()), &x.device())
}

/// See [`gelu`] and [`gelu_exact`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gelu(Form);
/// See [`swiglu`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct SwiGlu;
/// See [`dropout`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropout {
    p: f32,
    counter: Counter,
    first: u64,
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
        map1::<B>(x, &shape, |x, out| activation::dropout(x, self.p, self.counter, self.first, out))
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let shape = dims::<B>(&grad);
        let dy = B::values(grad);
        [dx.write(&shape, |dx| activation::dropout(dy.as_ref(), self.p, self.counter, self.first, dx))]
    }
}
