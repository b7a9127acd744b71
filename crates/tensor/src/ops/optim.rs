//! Updates of parameters, outside any graph.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::adapter::HostBackend;
use crate::device::is_fused;
use crate::kernels::{self, CHUNK, adamw as kernel, simd};

/// Numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWHyper {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// `1 - beta1^t`
    pub bias_correction1: f32,
    /// `1 - beta2^t`
    pub bias_correction2: f32,
    /// What gradients are multiplied by first: below 1 where their norm is clipped.
    pub grad_scale: f32,
}

#[backend_extension(NdArray: cfg(feature = "ndarray"), Flex: cfg(feature = "flex"))]
#[allow(missing_docs)]
trait FusedOptim: Backend {
    fn fused_adamw(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        h: AdamWHyper,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn fused_sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;
}

macro_rules! host_backend {
    ($feature:literal, $backend:ident) => {
        #[cfg(feature = $feature)]
        impl FusedOptim for burn::backend::$backend {
            fn fused_adamw(
                param: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                m: FloatTensor<Self>,
                v: FloatTensor<Self>,
                h: AdamWHyper,
            ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
                adamw_host::<Self>(param, grad, m, v, h)
            }
            fn fused_sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
                let x = Self::values(x);
                Self::tensor(vec![squares(x.as_ref())], &[1])
            }
            fn fused_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
                let (mut x, y) = (Self::into_vec(x), Self::values(y));
                assert_eq!(x.len(), y.as_ref().len(), "add: lengths differ");
                kernels::add(&mut x, y.as_ref());
                let n = [x.len()];
                Self::tensor(x, &n)
            }
        }
    };
}
host_backend!("ndarray", NdArray);
host_backend!("flex", Flex);

fn adamw_host<B: HostBackend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    m: FloatTensor<B>,
    v: FloatTensor<B>,
    h: AdamWHyper,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (mut param, grad, mut m, mut v) = (B::into_vec(param), B::values(grad), B::into_vec(m), B::into_vec(v));
    kernel::adamw(&mut param, grad.as_ref(), &mut m, &mut v, h);
    let n = [param.len()];
    (B::tensor(param, &n), B::tensor(m, &n), B::tensor(v, &n))
}

fn squares(x: &[f32]) -> f32 {
    simd::vectorized! {
        fn chunk(x: &[f32]) -> f32 { simd::dot(x, x) }
    }
    let parts: Vec<f32> = x.par_chunks(CHUNK).map(chunk).collect();
    parts.iter().map(|&p| f64::from(p)).sum::<f64>() as f32
}

/// One AdamW step (Loshchilov and Hutter, arXiv:1711.05101) of a flat parameter: returns (param, m, v). On the CPU backends it works
/// in place, on all threads, in one pass, provided that nothing else holds the tensors.
///
/// # Shapes
/// - all `[n]`
///
/// # Panics
/// If the lengths differ, or a tensor is on an autodiff device.
pub fn adamw(
    param: Tensor<1>,
    grad: Tensor<1>,
    m: Tensor<1>,
    v: Tensor<1>,
    h: AdamWHyper,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    if is_fused(&param.device()) {
        let (param, m, v) =
            Dispatch::fused_adamw(param.into_dispatch(), grad.into_dispatch(), m.into_dispatch(), v.into_dispatch(), h);
        return (Tensor::from_dispatch(param), Tensor::from_dispatch(m), Tensor::from_dispatch(v));
    }
    let grad = grad * h.grad_scale;
    let m = m * h.beta1 + grad.clone() * (1.0 - h.beta1);
    let v = v * h.beta2 + grad.clone() * grad * (1.0 - h.beta2);
    let update = m.clone() / h.bias_correction1 / ((v.clone() / h.bias_correction2).sqrt() + h.eps);
    let param = param.clone() - update * h.lr - param * (h.lr * h.weight_decay);
    (param, m, v)
}

/// Sum of the squares of a flat tensor, `[1]`; on the CPU backends in a fixed order.
///
/// # Panics
/// If the tensor is on an autodiff device.
pub fn sum_of_squares(x: Tensor<1>) -> Tensor<1> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_sum_of_squares(x.into_dispatch()));
    }
    (x.clone() * x).sum()
}

/// `x + y` of flat tensors; on the CPU backends in place of `x`, on all threads, provided that nothing else holds it.
///
/// # Panics
/// If the lengths differ, or a tensor is on an autodiff device.
pub fn add(x: Tensor<1>, y: Tensor<1>) -> Tensor<1> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_add(x.into_dispatch(), y.into_dispatch()));
    }
    x + y
}
