//! LayerNorm and RMSNorm over the last dimension.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::linear::or_none;
use super::vjp::{Keep, Sink, Vjp, dims, kept, map1};
use crate::adapter::HostBackend;
use crate::buffers::recycle;
use crate::device::is_fused;
use crate::kernels::norm as kernel;

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
        return run(x, weight, bias, op);
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
        return run(x, weight, None, op);
    }
    scaled(x, weight, eps)
}

/// RMSNorm of every query head and every key head in `[q | k | v]`, values as they are: attention scores stay bounded however large the projections grow
/// (Dehghani et al., arXiv:2302.05442, section 3.1; per head with a gain of E values, as Qwen 3).
///
/// # Shapes
/// - `qkv`: `[B, T, (H + 2 K) E]`, `gains` of queries and of keys: `[E]`; output as `qkv`
///
/// # Panics
/// If the width is not that of `heads` = [H, K] heads.
pub fn qk_norm(qkv: Tensor<3>, gains: [Tensor<1>; 2], heads: [usize; 2], eps: f64) -> Tensor<3> {
    let ([b, t, width], [h, k], [e]) = (qkv.dims(), heads, gains[0].dims());
    assert_eq!(gains[1].dims(), [e], "qk_norm: gains of other lengths");
    assert_eq!(width, (h + 2 * k) * e, "qk_norm: [q | k | v] of {h} + 2 * {k} heads of {e}, got width {width}");
    let [q, key] = gains;
    if is_fused(&qkv.device()) {
        let op = QkNorm { heads, eps: eps as f32 };
        return Tensor::from_dispatch(Dispatch::fused_qk_norm(
            qkv.into_dispatch(),
            q.into_dispatch(),
            key.into_dispatch(),
            op,
        ));
    }
    let part = |first: usize, n: usize, gain: Tensor<1>| {
        let heads = qkv.clone().narrow(2, first * e, n * e).reshape([b, t, n, e]);
        scaled(heads, gain, eps).reshape([b, t, n * e])
    };
    Tensor::cat(vec![part(0, h, q), part(h, k, key), qkv.clone().narrow(2, (h + k) * e, k * e)], 2)
}

fn run<const D: usize>(x: Tensor<D>, weight: Tensor<1>, bias: Option<Tensor<1>>, op: Norm) -> Tensor<D> {
    let bias = or_none(bias, &x.device()).into_dispatch();
    Tensor::from_dispatch(Dispatch::fused_norm(x.into_dispatch(), weight.into_dispatch(), bias, op))
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

/// `center` subtracts the mean.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub center: bool,
    pub eps: f32,
}

impl Norm {
    /// With its parameters; an empty bias is none.
    pub fn kernel<'a>(self, weight: &'a [f32], bias: &'a [f32]) -> kernel::Norm<'a> {
        kernel::Norm { weight, bias: (!bias.is_empty()).then_some(bias), center: self.center, eps: self.eps }
    }
}

/// Of (x, weight, bias).
impl Vjp<3> for Norm {
    const KEEPS: [Keep; 3] = [Keep::Activation, Keep::Parameter, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [x, weight, bias]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let shape = dims::<B>(&x);
        let (weight, bias) = (B::values(weight), B::values(bias));
        map1::<B>(x, &shape, |x, out| kernel::norm(x, self.kernel(weight.as_ref(), bias.as_ref()), out))
    }

    fn backward<B: HostBackend>(
        &self,
        [x, weight, bias]: [Option<FloatTensor<B>>; 3],
        grad: FloatTensor<B>,
        [dx, dweight, dbias]: [Sink<B>; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        let x = kept(x);
        let shape = dims::<B>(&x);
        let [x, weight, bias] = [x, kept(weight), kept(bias)].map(B::values);
        let mut g = B::into_vec(grad);
        let (mut dw, mut db) = (vec![0.0; weight.as_ref().len()], vec![0.0; bias.as_ref().len()]);
        let dx = dx.replace(&shape, |existing| {
            let added = existing.is_some();
            let n = self.kernel(weight.as_ref(), bias.as_ref());
            kernel::norm_backward(x.as_ref(), n, &mut g, existing, [&mut dw, &mut db]);
            if added {
                recycle(g);
                None
            } else {
                Some(g)
            }
        });
        let n = [db.len()];
        [dx, dweight.put(&[dw.len()], dw), dbias.put(&n, db)]
    }
}

/// See [`qk_norm`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct QkNorm {
    heads: [usize; 2],
    eps: f32,
}

impl QkNorm {
    fn kernel<'a>(self, gains: [&'a [f32]; 2]) -> kernel::QkNorm<'a> {
        let norm = Norm { center: false, eps: self.eps };
        kernel::QkNorm { norms: gains.map(|gain| norm.kernel(gain, &[])), heads: self.heads }
    }
}

/// Of (qkv, gain of queries, gain of keys).
impl Vjp<3> for QkNorm {
    const KEEPS: [Keep; 3] = [Keep::Activation, Keep::Parameter, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [x, q, k]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        let shape = dims::<B>(&x);
        let (q, k) = (B::values(q), B::values(k));
        map1::<B>(x, &shape, |x, out| kernel::qk_norm(x, self.kernel([q.as_ref(), k.as_ref()]), out))
    }

    fn backward<B: HostBackend>(
        &self,
        inputs: [Option<FloatTensor<B>>; 3],
        grad: FloatTensor<B>,
        [dx, dq, dk]: [Sink<B>; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        let shape = dims::<B>(&grad);
        let [x, q, k] = inputs.map(|input| B::values(kept(input)));
        let mut g = B::into_vec(grad);
        let e = q.as_ref().len();
        let (mut q_sums, mut k_sums) = (vec![0.0; e], vec![0.0; e]);
        let n = self.kernel([q.as_ref(), k.as_ref()]);
        kernel::qk_norm_backward(x.as_ref(), n, &mut g, [&mut q_sums, &mut k_sums]);
        [dx.put(&shape, g), dq.put(&[e], q_sums), dk.put(&[e], k_sums)]
    }
}
