//! Updates of parameters, outside any graph.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use super::formula::Update;
use super::state::{Held, State, Store};
use super::vjp::dims;
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels::compact::hash;
use crate::kernels::half::{Half, to_bf16_bits, unpacked};
use crate::kernels::{self, CHUNK, factored, simd, update as kernel};

#[backend_extension(NdArray: cfg(feature = "ndarray"), Flex: cfg(feature = "flex"))]
#[allow(missing_docs)]
pub(super) trait FusedOptim: Backend {
    fn fused_update(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        rule: Update,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    fn fused_update_compact(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        states: Arc<Mutex<Vec<Store>>>,
        rule: Update,
        seed: u32,
    ) -> FloatTensor<Self>;
    fn fused_sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_clip_rows(
        grad: FloatTensor<Self>,
        param: FloatTensor<Self>,
        rows: usize,
        share: f32,
        least: f32,
    ) -> FloatTensor<Self>;
    fn fused_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_release(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_to_bf16(x: FloatTensor<Self>, seed: Option<u32>, first: u32) -> FloatTensor<Self>;
    fn fused_to_f32(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_zeros_like(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_read(x: FloatTensor<Self>, out: Arc<Mutex<Vec<f32>>>) -> FloatTensor<Self>;
    fn fused_mean_squares(x: FloatTensor<Self>, shape: [usize; 3]) -> (FloatTensor<Self>, FloatTensor<Self>);
    fn fused_divide_by_root(
        x: FloatTensor<Self>,
        by_row: FloatTensor<Self>,
        by_column: FloatTensor<Self>,
        shape: [usize; 3],
        least: f32,
    ) -> FloatTensor<Self>;
    fn fused_subtract_scaled(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        by_row: FloatTensor<Self>,
        by_column: FloatTensor<Self>,
        keep: f32,
    ) -> FloatTensor<Self>;
}

macro_rules! host_backend {
    ($feature:literal, $backend:ident) => {
        #[cfg(feature = $feature)]
        impl FusedOptim for burn::backend::$backend {
            fn fused_update(
                param: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                a: FloatTensor<Self>,
                b: FloatTensor<Self>,
                c: FloatTensor<Self>,
                rule: Update,
            ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
                update_host::<Self>(param, grad, [a, b, c], rule)
            }
            fn fused_update_compact(
                param: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                states: Arc<Mutex<Vec<Store>>>,
                rule: Update,
                seed: u32,
            ) -> FloatTensor<Self> {
                let (mut param, grad) = (Self::into_vec(param), Self::values(grad));
                let mut states = states.lock().unwrap_or_else(PoisonError::into_inner);
                kernel::update_compact(rule, &mut param, grad.as_ref(), &mut states, seed);
                flat::<Self>(param)
            }
            fn fused_sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
                let x = Self::values(x);
                Self::tensor(vec![squares(x.as_ref())], &[1])
            }
            fn fused_clip_rows(
                grad: FloatTensor<Self>,
                param: FloatTensor<Self>,
                rows: usize,
                share: f32,
                least: f32,
            ) -> FloatTensor<Self> {
                let (mut grad, param) = (Self::into_vec(grad), Self::values(param));
                assert_eq!(grad.len(), param.as_ref().len(), "clip_rows: lengths differ");
                kernel::clip_rows(&mut grad, param.as_ref(), rows, share, least);
                let n = [grad.len()];
                Self::tensor(grad, &n)
            }
            fn fused_release(x: FloatTensor<Self>) -> FloatTensor<Self> {
                drop(Self::values(x));
                Self::tensor(vec![], &[0])
            }
            fn fused_to_bf16(x: FloatTensor<Self>, seed: Option<u32>, first: u32) -> FloatTensor<Self> {
                let shape = dims::<Self>(&x);
                match Self::bits(x) {
                    Ok(bits) => Self::from_bits(&shape, |out| out.copy_from_slice(bits.as_ref())),
                    Err(x) => Self::from_bits(&shape, |out| to_bf16_bits(Self::values(x).as_ref(), seed, first, out)),
                }
            }
            fn fused_to_f32(x: FloatTensor<Self>) -> FloatTensor<Self> {
                let shape = dims::<Self>(&x);
                match Self::bits(x) {
                    Ok(bits) => Self::tensor(unpacked(Half::Bf16, bits.as_ref()), &shape),
                    Err(x) => x,
                }
            }
            fn fused_read(x: FloatTensor<Self>, out: Arc<Mutex<Vec<f32>>>) -> FloatTensor<Self> {
                *out.lock().unwrap_or_else(PoisonError::into_inner) = Self::into_vec(x);
                Self::tensor(vec![], &[0])
            }
            fn fused_zeros_like(x: FloatTensor<Self>) -> FloatTensor<Self> {
                let mut zeros = buffer(Self::values(x).as_ref().len());
                zeros.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
                flat::<Self>(zeros)
            }
            fn fused_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
                let (mut x, y) = (Self::into_vec(x), Self::values(y));
                assert_eq!(x.len(), y.as_ref().len(), "add: lengths differ");
                kernels::add(&mut x, y.as_ref());
                flat::<Self>(x)
            }
            fn fused_mean_squares(x: FloatTensor<Self>, shape: [usize; 3]) -> (FloatTensor<Self>, FloatTensor<Self>) {
                let (by_row, by_column) = factored::mean_squares(Self::values(x).as_ref(), shape);
                (flat::<Self>(by_row), flat::<Self>(by_column))
            }
            fn fused_divide_by_root(
                x: FloatTensor<Self>,
                by_row: FloatTensor<Self>,
                by_column: FloatTensor<Self>,
                shape: [usize; 3],
                least: f32,
            ) -> FloatTensor<Self> {
                let [x, by_row, by_column] = [x, by_row, by_column].map(Self::values);
                let mut y = buffer(x.as_ref().len());
                factored::divide_by_root(&mut y, x.as_ref(), shape, by_row.as_ref(), by_column.as_ref(), least);
                flat::<Self>(y)
            }
            fn fused_subtract_scaled(
                y: FloatTensor<Self>,
                x: FloatTensor<Self>,
                by_row: FloatTensor<Self>,
                by_column: FloatTensor<Self>,
                keep: f32,
            ) -> FloatTensor<Self> {
                let mut y = Self::into_vec(y);
                let [x, by_row, by_column] = [x, by_row, by_column].map(Self::values);
                factored::subtract_scaled(&mut y, keep, x.as_ref(), by_row.as_ref(), by_column.as_ref());
                flat::<Self>(y)
            }
        }
    };
}
host_backend!("ndarray", NdArray);
host_backend!("flex", Flex);

fn update_host<B: HostBackend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    states: [FloatTensor<B>; 3],
    rule: Update,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (mut param, grad) = (B::into_vec(param), B::values(grad));
    let mut states = states.map(B::into_vec);
    kernel::update(rule, &mut param, grad.as_ref(), states.each_mut().map(Vec::as_mut_slice));
    let [a, b, c] = states.map(flat::<B>);
    (flat::<B>(param), a, b, c)
}

fn flat<B: HostBackend>(values: Vec<f32>) -> FloatTensor<B> {
    let n = [values.len()];
    B::tensor(values, &n)
}

fn squares(x: &[f32]) -> f32 {
    simd::vectorized! {
        fn chunk(x: &[f32]) -> f32 { simd::dot(x, x) }
    }
    let parts: Vec<f32> = x.par_chunks(CHUNK).map(chunk).collect();
    parts.iter().map(|&p| f64::from(p)).sum::<f64>() as f32
}

/// One step of an element-wise optimizer for a flat parameter: returns the parameter, and replaces its states. On the CPU backends it works in place, on all
/// threads, in one pass, provided that nothing else holds the tensors, and that all states are in 32 bits or none is. `seed`, another one in
/// every step, decides how bfloat16 rounds.
///
/// # Shapes
/// - all `[n]`
///
/// # Panics
/// If the lengths differ, there are not as many states as [`Update::states`] says, or a tensor is on an autodiff device.
pub fn update(rule: Update, param: Tensor<1>, grad: Tensor<1>, states: &mut [State], seed: u32) -> Tensor<1> {
    assert_eq!(states.len(), rule.states(), "update: {} states for {rule:?}", states.len());
    let device = param.device();
    let compact = states.iter_mut().map(|state| match &mut state.0 {
        Held::Compact(store) => Some(store),
        Held::Full(_) => None,
    });
    if let Some(mut stores) = compact.collect::<Option<Vec<_>>>().filter(|s| is_fused(&device) && !s.is_empty()) {
        let taken = stores.iter_mut().map(|store| std::mem::replace(*store, Store::Bf16(vec![]))).collect();
        let shared = Arc::new(Mutex::new(taken));
        let (param, grad) = (param.into_dispatch(), grad.into_dispatch());
        let param = Dispatch::fused_update_compact(param, grad, shared.clone(), rule, seed);
        let mut updated = shared.lock().unwrap_or_else(PoisonError::into_inner);
        stores.into_iter().zip(updated.drain(..)).for_each(|(store, new)| *store = new);
        return Tensor::from_dispatch(param);
    }
    // Each is taken out of its place, so that its memory has one holder.
    let mut tensors: Vec<Tensor<1>> = states.iter_mut().map(|state| state.take(&device)).collect();
    let param = update_tensors(rule, param, grad, &mut tensors);
    for (i, (state, new)) in states.iter_mut().zip(tensors).enumerate() {
        state.set(new, hash(seed, i as u32));
    }
    param
}

fn update_tensors(rule: Update, param: Tensor<1>, grad: Tensor<1>, states: &mut Vec<Tensor<1>>) -> Tensor<1> {
    if !is_fused(&param.device()) {
        return rule.step(param, grad, states);
    }
    let count = states.len();
    states.resize_with(3, || Tensor::zeros([0], &param.device()));
    let mut dispatched = states.drain(..).map(Tensor::into_dispatch);
    // PANIC: resized to three above.
    let [a, b, c] = std::array::from_fn(|_| dispatched.next().expect("three states"));
    drop(dispatched);
    let (param, a, b, c) = Dispatch::fused_update(param.into_dispatch(), grad.into_dispatch(), a, b, c, rule);
    states.extend([a, b, c].into_iter().take(count).map(Tensor::from_dispatch));
    Tensor::from_dispatch(param)
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

/// Scales every row of a gradient whose norm is more than `share` of that of its row of the parameter down to just that (adaptive gradient clipping,
/// Brock et al., <https://arxiv.org/abs/2102.06171>, equation 3). A row of the parameter counts as having at least the norm `least`. On the CPU backends in
/// place of `grad`, on all threads, in one pass, provided that nothing else holds it.
///
/// # Shapes
/// - `grad`, `param`: `[rows * columns]`, flat and row-major
///
/// # Panics
/// If the lengths differ or are no multiple of `rows`, or a tensor is on an autodiff device.
pub fn clip_rows(grad: Tensor<1>, param: Tensor<1>, rows: usize, share: f32, least: f32) -> Tensor<1> {
    let n = grad.dims()[0];
    assert!(rows > 0 && n.is_multiple_of(rows), "clip_rows: {n} elements in {rows} rows");
    if n == 0 {
        return grad;
    }
    if is_fused(&grad.device()) {
        let (grad, param) = (grad.into_dispatch(), param.into_dispatch());
        return Tensor::from_dispatch(Dispatch::fused_clip_rows(grad, param, rows, share, least));
    }
    let norms = |x: Tensor<2>| (x.clone() * x).sum_dim(1).sqrt();
    let grad = grad.reshape([rows, n / rows]);
    let most = norms(param.reshape([rows, n / rows])).clamp_min(least) * share;
    let factor = (most / norms(grad.clone()).clamp_min(f32::MIN_POSITIVE)).clamp_max(1.0);
    (grad * factor).reshape([n])
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

/// As many zeros as a flat tensor has values; on the CPU backends in memory that earlier operations have left.
///
/// # Panics
/// If the tensor is on an autodiff device.
pub fn zeros_like(x: &Tensor<1>) -> Tensor<1> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_zeros_like(x.clone().into_dispatch()));
    }
    x.zeros_like()
}

/// Has the next operations use the memory of a tensor, if nothing else holds it. A tensor that is simply dropped gives its memory back to the system, and
/// taking it anew costs a page fault for every 4 KiB; what operations of this crate take in, they keep by themselves.
pub fn release<const D: usize>(x: Tensor<D>) {
    if is_fused(&x.device()) {
        drop(Dispatch::fused_release(x.into_dispatch()));
    }
}

/// A parameter in bfloat16, half the memory: rounded to nearest, or where there is a seed stochastically, so that updates below its precision are not lost
/// (Zamirai et al., arXiv:2010.06192). [`linear`](super::linear), [`linear_transposed`](super::linear_transposed), [`embedding`](super::embedding) and
/// [`linear_cross_entropy`](super::linear_cross_entropy) take it as a weight; for everything else there is [`to_f32`].
///
/// On devices without fused operations it is their own type.
///
/// # Panics
/// If the tensor is on an autodiff device.
pub fn to_bf16<const D: usize>(x: Tensor<D>, seed: Option<u32>) -> Tensor<D> {
    as_bf16(x, seed, 0)
}

/// [`to_bf16`] of a part of a flat parameter that begins at its element `first`: the bits that the whole would have there.
///
/// # Panics
/// If the tensor is on an autodiff device.
pub fn to_bf16_from(x: Tensor<1>, seed: u32, first: usize) -> Tensor<1> {
    // Elements are counted modulo 2^32.
    as_bf16(x, Some(seed), first as u32)
}

fn as_bf16<const D: usize>(x: Tensor<D>, seed: Option<u32>, first: u32) -> Tensor<D> {
    if is_fused(&x.device()) {
        return Tensor::from_dispatch(Dispatch::fused_to_bf16(x.into_dispatch(), seed, first));
    }
    x.cast(DType::BF16)
}

/// A parameter in f32; itself if it is so already.
///
/// # Panics
/// If the tensor is on an autodiff device.
pub fn to_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match is_bf16(&x) {
        false => x,
        true if is_fused(&x.device()) => Tensor::from_dispatch(Dispatch::fused_to_f32(x.into_dispatch())),
        true => x.cast(DType::F32),
    }
}

/// The values of a tensor in row-major order, on the host: without a copy where nothing else holds them, and with a plain one where something does (burn's own goes value
/// by value, twenty million a second).
///
/// # Panics
/// If the tensor has no floats.
pub fn to_host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    let x = if x.device().is_autodiff() { x.inner() } else { x };
    if is_fused(&x.device()) {
        let out = Arc::new(Mutex::new(vec![]));
        let _ = Tensor::<D>::from_dispatch(Dispatch::fused_read(x.into_dispatch(), out.clone()));
        return std::mem::take(&mut *out.lock().unwrap_or_else(PoisonError::into_inner));
    }
    // PANIC: as documented.
    to_f32(x).into_data().try_into_vec::<f32>().expect("a tensor of floats")
}

/// Whether a parameter is in bfloat16.
pub fn is_bf16<const D: usize>(x: &Tensor<D>) -> bool {
    // burn-ndarray has no such type: see the adapter.
    matches!(x.dtype(), DType::BF16 | DType::F64)
}
