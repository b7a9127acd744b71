//! LayerNorm and RMSNorm over the last dimension.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::vjp::{Vjp, buffer, dims};
use crate::adapter::HostBackend;
use crate::device::is_fused;
use crate::kernels::norm;

/// LayerNorm (Ba et al., arXiv:1607.06450): `(x - mean) / sqrt(var + eps) * weight + bias`, `var` biased as in PyTorch.
///
/// # Shapes
/// - `x`: `[.., D]`, `weight` and `bias`: `[D]`; output as `x`
///
/// # Panics
/// If the last dimension is not D.
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Option<Tensor<1>>, eps: f64) -> Tensor<D> {
    check(&x, &weight);
    if is_fused(&x.device()) {
        let op = Norm { center: true, eps: eps as f32 };
        let (x, w) = (x.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(match bias {
            Some(bias) => Dispatch::fused_norm_bias(x, w, bias.into_dispatch(), NormBias(op)),
            None => Dispatch::fused_norm(x, w, op),
        });
    }
    let centered = x.clone() - x.mean_dim(D - 1);
    let y = scaled(centered, weight, eps);
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// RMSNorm (Zhang and Sennrich, arXiv:1910.07467): `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Shapes
/// - `x`: `[.., D]`, `weight`: `[D]`; output as `x`
///
/// # Panics
/// If the last dimension is not D.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    check(&x, &weight);
    if is_fused(&x.device()) {
        let op = Norm { center: false, eps: eps as f32 };
        return Tensor::from_dispatch(Dispatch::fused_norm(x.into_dispatch(), weight.into_dispatch(), op));
    }
    scaled(x, weight, eps)
}

#[track_caller]
fn check<const D: usize>(x: &Tensor<D>, weight: &Tensor<1>) {
    let (dims, [d]) = (x.dims(), weight.dims());
    assert_eq!(dims[D - 1], d, "norm: input {dims:?} does not end in the weight's {d} values");
}

fn scaled<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean_square = (x.clone() * x.clone()).mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * weight.unsqueeze()
}

/// Norm without a bias; `center` subtracts the mean.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub center: bool,
    pub eps: f32,
}

/// Norm with a bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormBias(pub Norm);

impl Norm {
    fn run<B: HostBackend>(&self, x: FloatTensor<B>, w: FloatTensor<B>, b: Option<FloatTensor<B>>) -> FloatTensor<B> {
        let shape = dims::<B>(&x);
        let (x, w, b) = (B::values(x), B::values(w), b.map(B::values));
        let mut out = buffer(x.as_ref().len());
        norm::norm(x.as_ref(), w.as_ref(), b.as_ref().map(AsRef::as_ref), self.center, self.eps, &mut out);
        B::tensor(out, &shape)
    }

    fn run_backward<B: HostBackend>(
        &self,
        x: FloatTensor<B>,
        w: FloatTensor<B>,
        dy: FloatTensor<B>,
        bias: bool,
    ) -> [FloatTensor<B>; 3] {
        let shape = dims::<B>(&x);
        let (x, w, dy) = (B::values(x), B::values(w), B::values(dy));
        let d = w.as_ref().len();
        let (mut dx, mut dw, mut db) = (buffer(x.as_ref().len()), buffer(d), buffer(if bias { d } else { 0 }));
        let db_out = bias.then_some(&mut db[..]);
        norm::norm_backward(x.as_ref(), w.as_ref(), self.center, self.eps, dy.as_ref(), &mut dx, &mut dw, db_out);
        let n = db.len();
        [B::tensor(dx, &shape), B::tensor(dw, &[d]), B::tensor(db, &[n])]
    }
}

impl Vjp<2> for Norm {
    fn forward<B: HostBackend>(&self, [x, w]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        self.run::<B>(x, w, None)
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w]: [FloatTensor<B>; 2],
        grad: FloatTensor<B>,
        _: [bool; 2],
    ) -> [Option<FloatTensor<B>>; 2] {
        let [dx, dw, _] = self.run_backward::<B>(x, w, grad, false);
        [Some(dx), Some(dw)]
    }
}

impl Vjp<3> for NormBias {
    fn forward<B: HostBackend>(&self, [x, w, b]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        self.0.run::<B>(x, w, Some(b))
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w, _]: [FloatTensor<B>; 3],
        grad: FloatTensor<B>,
        _: [bool; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        self.0.run_backward::<B>(x, w, grad, true).map(Some)
    }
}
