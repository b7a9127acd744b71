//! Everything that touches the primitives of the CPU backends: how the kernels read and make their tensors.
//!
//! A later burn whose primitives look different costs this file.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

/// A CPU backend whose `f32` tensors the kernels read as slices.
pub trait HostBackend: Backend {
    /// Contiguous values of a tensor, shared with it where it was contiguous.
    type Values: AsRef<[f32]>;

    /// The values of a tensor in row-major order.
    ///
    /// # Panics
    /// If it does not hold `f32`.
    fn values(tensor: FloatTensor<Self>) -> Self::Values;

    /// The same, owned: without a copy if nothing else holds the tensor.
    fn into_vec(tensor: FloatTensor<Self>) -> Vec<f32>;

    /// A tensor of `shape` over `values`.
    fn tensor(values: Vec<f32>, shape: &[usize]) -> FloatTensor<Self>;
}

#[cfg(feature = "ndarray")]
mod ndarray_adapter {
    use burn::backend::NdArray;
    use burn_ndarray::NdArrayTensor;
    use ndarray::{ArcArray, ArrayD, IxDyn};

    use super::HostBackend;
    use crate::buffers::recycle;

    /// A reference-counted array in standard layout. The last holder keeps the buffer for the next operation.
    pub struct Values(ArcArray<f32, IxDyn>);

    impl Drop for Values {
        fn drop(&mut self) {
            if self.0.is_unique() {
                let array = std::mem::replace(&mut self.0, ArcArray::from_shape_simple_fn(IxDyn(&[0]), || 0.0));
                recycle(array.into_owned().into_raw_vec_and_offset().0);
            }
        }
    }

    impl AsRef<[f32]> for Values {
        fn as_ref(&self) -> &[f32] {
            // PANIC: `contiguous` gave the array its standard layout.
            self.0.as_slice().expect("array in standard layout")
        }
    }

    fn contiguous(tensor: NdArrayTensor) -> ArcArray<f32, IxDyn> {
        let NdArrayTensor::F32(storage) = tensor else {
            panic!("Firebox's kernels work on f32 tensors, got another dtype: convert it with `Tensor::cast`");
        };
        let array = storage.into_shared();
        if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned().into_shared() }
    }

    impl HostBackend for NdArray {
        type Values = Values;

        fn values(tensor: NdArrayTensor) -> Values {
            Values(contiguous(tensor))
        }

        fn into_vec(tensor: NdArrayTensor) -> Vec<f32> {
            let array = contiguous(tensor);
            let len = array.len();
            // `into_owned` copies only if the storage is shared; the vector may be longer than a sliced array.
            let (values, offset) = array.into_owned().into_raw_vec_and_offset();
            match offset.unwrap_or(0) {
                0 if values.len() == len => values,
                at => values[at..at + len].to_vec(),
            }
        }

        fn tensor(values: Vec<f32>, shape: &[usize]) -> NdArrayTensor {
            // PANIC: callers compute the length from the shape.
            NdArrayTensor::from(ArrayD::from_shape_vec(IxDyn(shape), values).expect("length fits shape").into_shared())
        }
    }
}

#[cfg(feature = "flex")]
mod flex_adapter {
    use burn::backend::{Flex, TensorMetadata};
    use burn::tensor::TensorData;
    use burn_flex::FlexTensor;

    use super::HostBackend;

    /// A contiguous tensor.
    pub struct Values(FlexTensor);

    impl AsRef<[f32]> for Values {
        fn as_ref(&self) -> &[f32] {
            // An empty tensor's storage has no alignment, which its conversion to f32 would insist on.
            if self.0.shape().num_elements() == 0 {
                return &[];
            }
            // PANIC: `values` made it contiguous.
            self.0.as_slice::<f32>().expect("contiguous f32 tensor")
        }
    }

    impl HostBackend for Flex {
        type Values = Values;

        fn values(tensor: FlexTensor) -> Values {
            Values(if tensor.shape().num_elements() == 0 { tensor } else { tensor.to_contiguous() })
        }

        fn into_vec(tensor: FlexTensor) -> Vec<f32> {
            match tensor.to_contiguous().into_data().into_vec::<f32>() {
                Ok(values) => values,
                Err(error) => panic!("Firebox's kernels work on f32 tensors: {error:?}"),
            }
        }

        fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
            FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
        }
    }
}
