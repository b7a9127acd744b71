//! Linear layers.

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::extension::FusedOps;
use super::vjp::{Vjp, buffer, dims};
use crate::adapter::HostBackend;
use crate::device::is_fused;
use crate::kernels::add_assign;
use crate::kernels::matmul::{Into, Mat, Threads, matmul};

/// `y = x w + b`, or `y = x w` without a bias.
///
/// # Shapes
/// - `x`: `[.., I]`, `w`: `[I, O]`, `b`: `[O]`; output `[.., O]`
///
/// # Panics
/// If the shapes do not fit.
pub fn linear<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    check(&x, w.dims()[0]);
    if is_fused(&x.device()) {
        let (x, w) = (x.into_dispatch(), w.into_dispatch());
        return Tensor::from_dispatch(match b {
            Some(b) => Dispatch::fused_linear_bias(x, w, b.into_dispatch()),
            None => Dispatch::fused_linear(x, w, Linear { transposed: false }),
        });
    }
    compose(x, w, b)
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
    if is_fused(&x.device()) {
        let op = Linear { transposed: true };
        return Tensor::from_dispatch(Dispatch::fused_linear(x.into_dispatch(), w.into_dispatch(), op));
    }
    compose(x, w.transpose(), None)
}

#[track_caller]
fn check<const D: usize>(x: &Tensor<D>, inputs: usize) {
    let dims = x.dims();
    assert_eq!(dims[D - 1], inputs, "linear: input {dims:?} does not end in the weight's {inputs} inputs");
}

fn compose<const D: usize>(x: Tensor<D>, w: Tensor<2>, b: Option<Tensor<1>>) -> Tensor<D> {
    let mut dims = x.dims();
    let (inputs, outputs) = (dims[D - 1], w.dims()[1]);
    let rows = dims.iter().product::<usize>() / inputs.max(1);
    dims[D - 1] = outputs;
    let y = x.reshape([rows, inputs]).matmul(w);
    match b {
        Some(b) => (y + b.unsqueeze::<2>()).reshape(dims),
        None => y.reshape(dims),
    }
}

/// `x w`, or `x w^T`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// Whether the weight is `[O, I]`.
    pub transposed: bool,
}

/// `x w + b`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearBias;

/// The weight as `[I, O]`, whatever its layout.
fn weight<'a>(values: &'a [f32], shape: &[usize], transposed: bool) -> (Mat<'a>, usize, usize) {
    let mat = Mat::new(values, shape[0], shape[1], shape[1]);
    if transposed { (mat.t(), shape[1], shape[0]) } else { (mat, shape[0], shape[1]) }
}

fn forward<B: HostBackend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    b: Option<FloatTensor<B>>,
    transposed: bool,
) -> FloatTensor<B> {
    let (mut shape, w_shape) = (dims::<B>(&x), dims::<B>(&w));
    let (x, w, b) = (B::values(x), B::values(w), b.map(B::values));
    let (w, inputs, outputs) = weight(w.as_ref(), &w_shape, transposed);
    let rows = x.as_ref().len() / inputs.max(1);
    let mut y = buffer(rows * outputs);
    let into = match &b {
        Some(b) => {
            y.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(b.as_ref()));
            Into::Add
        }
        None => Into::Write,
    };
    matmul(Mat::new(x.as_ref(), rows, inputs, inputs), w, &mut y, outputs, into, Threads::All);
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    B::tensor(y, &shape)
}

/// (dx, dw, db)
type Gradients<B> = (Option<FloatTensor<B>>, Option<FloatTensor<B>>, Option<FloatTensor<B>>);

fn backward<B: HostBackend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    dy: FloatTensor<B>,
    transposed: bool,
    wanted: [bool; 3],
) -> Gradients<B> {
    let (x_shape, w_shape) = (dims::<B>(&x), dims::<B>(&w));
    let (x, w, dy) = (B::values(x), B::values(w), B::values(dy));
    let (w_mat, inputs, outputs) = weight(w.as_ref(), &w_shape, transposed);
    let rows = x.as_ref().len() / inputs.max(1);
    let x = Mat::new(x.as_ref(), rows, inputs, inputs);
    let dy_mat = Mat::new(dy.as_ref(), rows, outputs, outputs);
    let dx = wanted[0].then(|| {
        let mut dx = buffer(rows * inputs);
        matmul(dy_mat, w_mat.t(), &mut dx, inputs, Into::Write, Threads::All);
        B::tensor(dx, &x_shape)
    });
    let dw = wanted[1].then(|| {
        let mut dw = buffer(inputs * outputs);
        let (a, b) = if transposed { (dy_mat.t(), x) } else { (x.t(), dy_mat) };
        matmul(a, b, &mut dw, w_shape[1], Into::Write, Threads::All);
        B::tensor(dw, &w_shape)
    });
    let db = wanted[2].then(|| {
        let mut db = buffer(outputs);
        dy.as_ref().chunks_exact(outputs).for_each(|row| add_assign(&mut db, row));
        B::tensor(db, &[outputs])
    });
    (dx, dw, db)
}

impl Vjp<2> for Linear {
    fn forward<B: HostBackend>(&self, [x, w]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        forward::<B>(x, w, None, self.transposed)
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w]: [FloatTensor<B>; 2],
        grad: FloatTensor<B>,
        wanted: [bool; 2],
    ) -> [Option<FloatTensor<B>>; 2] {
        let (dx, dw, _) = backward::<B>(x, w, grad, self.transposed, [wanted[0], wanted[1], false]);
        [dx, dw]
    }
}

impl Vjp<3> for LinearBias {
    fn forward<B: HostBackend>(&self, [x, w, b]: [FloatTensor<B>; 3]) -> FloatTensor<B> {
        forward::<B>(x, w, Some(b), false)
    }

    fn backward<B: HostBackend>(
        &self,
        [x, w, _]: [FloatTensor<B>; 3],
        grad: FloatTensor<B>,
        wanted: [bool; 3],
    ) -> [Option<FloatTensor<B>>; 3] {
        let (dx, dw, db) = backward::<B>(x, w, grad, false, wanted);
        [dx, dw, db]
    }
}
