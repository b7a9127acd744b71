//! In what matrix products are multiplied: a setting of the thread that records them.

use std::cell::Cell;

use burn::tensor::{DType, Tensor};

pub use crate::kernels::matmul::Compute;

thread_local! {
    static COMPUTE: Cell<Compute> = const { Cell::new(Compute::F32) };
}

/// What products of this thread are computed in.
pub(crate) fn compute() -> Compute {
    COMPUTE.get()
}

/// Runs `work`, whose linear layers and losses multiply in `compute` and keep what backward needs of them in its type; their backward passes do so
/// too, whenever they run. Everything else (parameters, gradients, norms, softmax, losses, sums) stays in f32: mixed precision as in Micikevicius et
/// al., arXiv:1710.03740, with the parameters as the master weights.
///
/// On a CPU without bf16 or f16 products the operands are rounded and multiplied in f32, which saves the memory alone.
///
/// ```
/// use firebox_tensor::ops::{Compute, linear, with_compute};
/// use burn::tensor::{Device, Tensor};
///
/// let device = Device::default();
/// // 1 + 2^-9 is no bfloat16.
/// let (x, w) = (Tensor::<2>::full([1, 1], 1.001953125, &device), Tensor::<2>::ones([1, 1], &device));
/// let y = with_compute(Compute::Bf16, || linear(x, w, None));
/// assert_eq!(y.into_scalar::<f32>(), 1.0);
/// ```
pub fn with_compute<R>(compute: Compute, work: impl FnOnce() -> R) -> R {
    struct Restore(Compute);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPUTE.set(self.0);
        }
    }
    let _restore = Restore(COMPUTE.replace(compute));
    work()
}

impl Compute {
    /// burn's name for the type.
    pub fn dtype(self) -> DType {
        match self {
            Compute::F32 => DType::F32,
            Compute::Bf16 => DType::BF16,
            Compute::F16 => DType::F16,
        }
    }
}

/// `a b` on a device without fused operations, in its own type of 16 bits.
pub(crate) fn multiply<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    match compute() {
        Compute::F32 => a.matmul(b),
        half => a.cast(half.dtype()).matmul(b.cast(half.dtype())).cast(DType::F32),
    }
}
