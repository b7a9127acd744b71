//! Linear layers, alone or fused with what comes before and after them.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Device, Tensor};

use super::activation::{self, gelu, gelu_exact, quick_gelu, swiglu};
use super::compute::{compute, multiply};
use super::extension::FusedOps;
use super::norm::{self, layer_norm, rms_norm};
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::linear as kernel;
use crate::kernels::linear::Before;
use crate::kernels::matmul::{Compute, Into, Mat, matmul};

/// What happens to the input of a linear layer on its way in. On the CPU backends it is made again in backward, so that only the layer's own input is kept.
// Passed once and taken apart: a box would only add an allocation.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum Pre {
    /// Nothing.
    Nothing,
    /// [`layer_norm`]
    LayerNorm {
        /// `[I]`
        weight: Tensor<1>,
        /// `[I]`
        bias: Option<Tensor<1>>,
        /// Added to the variance.
        eps: f64,
    },
    /// [`rms_norm`]
    RmsNorm {
        /// `[I]`
        weight: Tensor<1>,
        /// Added to the mean square.
        eps: f64,
    },
    /// [`gelu`]
    Gelu,
    /// [`gelu_exact`]
    GeluExact,
    /// [`quick_gelu`]
    QuickGelu,
    /// [`swiglu`], from rows `[gate | up]` of `2 I` values.
    SwiGlu,
}

/// `y = x w + b`, or `y = x w` without a bias.
///
/// # Shapes
/// - `x`: `[.., I]`, `w`: `[I, O]`, `b`: `[O]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit.
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    fused_linear(x, Pre::Nothing, w, b, None)
}

/// `y = pre(x) w + b + residual` in one operation.
///
/// # Shapes
/// - `x`: `[.., I]` (`[.., 2 I]` for SwiGLU), `w`: `[I, O]`, `b`: `[O]`, `residual`: `[.., O]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit.
pub fn fused_linear<const D: usize>(
    x: Tensor<D>,
    pre: Pre,
    w: Tensor<2>,
    b: Option<Tensor<1>>,
    residual: Option<Tensor<D>>,
) -> Tensor<D> {
    let (mut dims, [inputs, outputs]) = (x.dims(), w.dims());
    let width = if matches!(pre, Pre::SwiGlu) { 2 * inputs } else { inputs };
    check(&x, width);
    dims[D - 1] = outputs;
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), dims, "linear: the residual does not have the shape of the output");
    }
    let device = x.device();
    if is_fused(&device) {
        let (op, norm_parameters) = Linear::taken_apart(pre);
        let [norm_weight, norm_bias] = norm_parameters.map(|p| or_none(p, &device).into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_linear(
            x.into_dispatch(),
            w.into_dispatch(),
            or_none(b, &device).into_dispatch(),
            or_none(residual, &device).into_dispatch(),
            norm_weight,
            norm_bias,
            op,
        ));
    }
    let a = match pre {
        Pre::Nothing => x,
        Pre::LayerNorm { weight, bias, eps } => layer_norm(x, weight, bias, eps),
        Pre::RmsNorm { weight, eps } => rms_norm(x, weight, eps),
        Pre::Gelu => gelu(x),
        Pre::GeluExact => gelu_exact(x),
        Pre::QuickGelu => quick_gelu(x),
        Pre::SwiGlu => swiglu(x),
    };
    let y = compose(a, w, b);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// `y = x w^T`: a head whose weight has the layout of an embedding.
///
/// # Shapes
/// - `x`: `[.., I]`, `w`: `[O, I]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit.
pub fn linear_transposed<const D: usize>(x: Tensor<D>, w: Tensor<2>) -> Tensor<D> {
    check(&x, w.dims()[1]);
    let device = x.device();
    if is_fused(&device) {
        let none = || or_none::<1>(None, &device).into_dispatch();
        let op = Linear { pre: PreOp::Nothing, transposed: true, compute: compute() };
        let (x, w) = (x.into_dispatch(), w.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_linear(x, w, none(), none(), none(), none(), op));
    }
    compose(x, w.transpose(), None)
}

/// The empty tensor stands for one that is left out.
pub(super) fn or_none<const D: usize>(tensor: Option<Tensor<D>>, device: &Device) -> Tensor<D> {
    tensor.unwrap_or_else(|| Tensor::empty([0; D], device))
}

#[track_caller]
pub(super) fn check<const D: usize>(x: &Tensor<D>, width: usize) {
    let dims = x.dims();
    assert_eq!(dims[D - 1], width, "linear: input {dims:?} does not end in the weight's {width} inputs");
}

fn compose<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    let mut dims = x.dims();
    let (inputs, outputs) = (dims[D - 1], w.dims()[1]);
    let rows = dims.iter().product::<usize>() / inputs.max(1);
    dims[D - 1] = outputs;
    let y = multiply(x.reshape([rows, inputs]), w);
    match b {
        Some(b) => (y + b.unsqueeze::<2>()).reshape(dims),
        None => y.reshape(dims),
    }
}

/// [`Pre`] without its tensors.
#[derive(Clone, Copy, Debug)]
pub(super) enum PreOp {
    Nothing,
    Norm(norm::Norm),
    Gelu(activation::Form),
    SwiGlu,
}

impl PreOp {
    pub fn kernel<'a>(self, weight: &'a [f32], bias: &'a [f32]) -> Before<'a> {
        match self {
            PreOp::Nothing => Before::Nothing,
            PreOp::Norm(op) => Before::Norm(op.kernel(weight, bias)),
            PreOp::Gelu(form) => Before::Gelu(form),
            PreOp::SwiGlu => Before::SwiGlu,
        }
    }
}

/// `pre(x) w + b + residual` of (x, w, b, residual, the norm's weight and bias).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub(super) pre: PreOp,
    /// Whether the weight is `[O, I]`.
    transposed: bool,
    compute: Compute,
}

impl Linear {
    /// With `pre`, and the parameters of its norm.
    pub(super) fn taken_apart(pre: Pre) -> (Self, [Option<Tensor<1>>; 2]) {
        let mut norm_parameters = [None, None];
        let pre = match pre {
            Pre::Nothing => PreOp::Nothing,
            Pre::LayerNorm { weight, bias, eps } => {
                norm_parameters = [Some(weight), bias];
                PreOp::Norm(norm::Norm { center: true, eps: eps as f32 })
            }
            Pre::RmsNorm { weight, eps } => {
                norm_parameters = [Some(weight), None];
                PreOp::Norm(norm::Norm { center: false, eps: eps as f32 })
            }
            Pre::Gelu => PreOp::Gelu(activation::Form::Tanh),
            Pre::GeluExact => PreOp::Gelu(activation::Form::Exact),
            Pre::QuickGelu => PreOp::Gelu(activation::Form::Quick),
            Pre::SwiGlu => PreOp::SwiGlu,
        };
        (Self { pre, transposed: false, compute: compute() }, norm_parameters)
    }
}

/// A weight, in f32 or bfloat16.
pub(super) enum Weight<B: HostBackend> {
    Full(B::Values, [usize; 2]),
    Bits(B::Bits, [usize; 2]),
}

impl<B: HostBackend> Weight<B> {
    pub fn new(tensor: FloatTensor<B>) -> Self {
        let shape = dims::<B>(&tensor);
        let shape = [shape[0], shape[1]];
        match B::bits(tensor) {
            Ok(bits) => Self::Bits(bits, shape),
            Err(tensor) => Self::Full(B::values(tensor), shape),
        }
    }

    pub fn mat(&self) -> Mat<'_> {
        match self {
            Self::Full(values, [rows, cols]) => Mat::new(values.as_ref(), *rows, *cols, *cols),
            Self::Bits(bits, [rows, cols]) => Mat::bf16(bits.as_ref(), *rows, *cols),
        }
    }

    /// As `[I, O]`, whatever its layout.
    fn by_inputs(&self, transposed: bool) -> Mat<'_> {
        if transposed { self.mat().t() } else { self.mat() }
    }
}

pub(super) fn some(values: &[f32]) -> Option<&[f32]> {
    (!values.is_empty()).then_some(values)
}

impl Vjp<6> for Linear {
    const KEEPS: [Keep; 6] = {
        use Keep::{Activation, Nothing, Parameter};
        [Activation, Parameter, Nothing, Nothing, Parameter, Parameter]
    };

    fn forward<B: HostBackend>(&self, inputs: [FloatTensor<B>; 6]) -> FloatTensor<B> {
        let [x, w, b, residual, norm_weight, norm_bias] = inputs;
        let (mut shape, w) = (dims::<B>(&x), Weight::<B>::new(w));
        let [x, b, residual] = [x, b, residual].map(B::values);
        let [norm_weight, norm_bias] = [norm_weight, norm_bias].map(B::values);
        let w = w.by_inputs(self.transposed);
        if let Some(last) = shape.last_mut() {
            *last = w.cols();
        }
        let mut y = buffer(shape.iter().product());
        let before = self.pre.kernel(norm_weight.as_ref(), norm_bias.as_ref());
        kernel::linear(self.compute, x.as_ref(), before, w, some(b.as_ref()), some(residual.as_ref()), &mut y);
        B::tensor(y, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w, _, _, norm_weight, norm_bias]: [Option<FloatTensor<B>>; 6],
        grad: FloatTensor<B>,
        [dx, dw, db, dresidual, dnorm_weight, dnorm_bias]: [Sink<B>; 6],
    ) -> [Option<FloatTensor<B>>; 6] {
        let (x, w) = (kept(x), kept(w));
        let (x_shape, w_shape) = (dims::<B>(&x), dims::<B>(&w));
        let dresidual = if dresidual.wanted() { dresidual.hand_over(grad.clone()) } else { None };
        let (x, w, dy) = (B::values(x), Weight::<B>::new(w), B::values(grad));
        let [norm_weight, norm_bias] = [kept(norm_weight), kept(norm_bias)].map(B::values);
        let w_mat = w.by_inputs(self.transposed);
        let (inputs, outputs) = (w_mat.rows(), w_mat.cols());
        let rows = dy.as_ref().len() / outputs.max(1);
        let before = self.pre.kernel(norm_weight.as_ref(), norm_bias.as_ref());
        let dy_mat = Mat::new(dy.as_ref(), rows, outputs, outputs);

        let db = db.fill(&[outputs], |db, into| kernel::bias_gradient(dy.as_ref(), db, into));
        if let (Before::Gelu(form), true, true) = (before, dx.wanted(), dw.wanted()) {
            let mut da = buffer(rows * inputs);
            matmul(self.compute, dy_mat, w_mat.t(), &mut da, inputs, Into::Write);
            let a = kernel::gelu_gradient(x.as_ref(), form, &mut da);
            let dx = dx.put(&x_shape, da);
            if dw.is_deferred() {
                let compute = self.compute;
                let transposed = self.transposed;
                dw.leave(Box::new(move || {
                    let mut dw = buffer(inputs * outputs);
                    let dy = Mat::new(dy.as_ref(), rows, outputs, outputs);
                    kernel::weight_gradient(compute, &a, Before::Nothing, dy, transposed, &mut dw, Into::Write);
                    recycle(a);
                    dw
                }));
                return [dx, None, db, dresidual, None, None];
            }
            let dw = dw.fill(&w_shape, |dw, into| {
                kernel::weight_gradient(self.compute, &a, Before::Nothing, dy_mat, self.transposed, dw, into);
            });
            recycle(a);
            return [dx, dw, db, dresidual, None, None];
        }
        let (dw, later) = if dw.is_deferred() { (None, Some(dw)) } else { (Some(dw), None) };
        let mut norm_gradients = [(&dnorm_weight, norm_weight.as_ref()), (&dnorm_bias, norm_bias.as_ref())]
            .map(|(sink, values)| vec![0.0; if sink.wanted() { values.len() } else { 0 }]);
        let input_wanted = dx.wanted() || norm_gradients.iter().any(|g| !g.is_empty());
        let values: &[f32] = x.as_ref();
        let of_weight = || {
            dw?.fill(&w_shape, |dw, into| {
                kernel::weight_gradient(self.compute, values, before, dy_mat, self.transposed, dw, into);
            })
        };
        let of_input = || {
            if !input_wanted {
                None
            } else if matches!(before, Before::Nothing) {
                dx.fill(&x_shape, |dx, into| matmul(self.compute, dy_mat, w_mat.t(), dx, inputs, into))
            } else {
                let mut da = buffer(rows * inputs);
                matmul(self.compute, dy_mat, w_mat.t(), &mut da, inputs, Into::Write);
                let norm_gradients = norm_gradients.each_mut().map(|g| &mut g[..]);
                dx.replace(&x_shape, |existing| {
                    kernel::input_gradient(values, before, inputs, da, existing, norm_gradients)
                })
            }
        };
        // Two products that know nothing of each other: threads that are done with their part of one need not wait for the others'.
        let (dw, dx) = rayon::join(of_weight, of_input);
        let [dnorm_weight, dnorm_bias] = [(dnorm_weight, 0), (dnorm_bias, 1)].map(|(sink, i)| {
            let values = std::mem::take(&mut norm_gradients[i]);
            let shape = [values.len()];
            sink.put(&shape, values)
        });
        if let Some(later) = later {
            let op = *self;
            later.leave(Box::new(move || {
                let mut dw = buffer(inputs * outputs);
                let before = op.pre.kernel(norm_weight.as_ref(), norm_bias.as_ref());
                let dy = Mat::new(dy.as_ref(), rows, outputs, outputs);
                kernel::weight_gradient(op.compute, x.as_ref(), before, dy, op.transposed, &mut dw, Into::Write);
                dw
            }));
        }
        [dx, dw, db, dresidual, dnorm_weight, dnorm_bias]
    }
}
