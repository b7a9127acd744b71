//! Everything that touches the primitives of the CPU backends: how the kernels read and make their tensors.
//!
//! A later burn whose primitives look different costs this file.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

/// A CPU backend whose `f32` tensors the kernels read as slices. Parameters may be in bfloat16.
pub trait HostBackend: Backend {
    /// Contiguous values of a tensor, shared with it where it was contiguous and in f32.
    type Values: AsRef<[f32]> + 'static;

    /// Contiguous bits of a tensor in bfloat16.
    type Bits: AsRef<[u16]>;

    /// The values of a tensor in row-major order.
    ///
    /// # Panics
    /// If it holds neither `f32` nor bfloat16.
    fn values(tensor: FloatTensor<Self>) -> Self::Values;

    /// The bits of a tensor in bfloat16, or else the tensor.
    fn bits(tensor: FloatTensor<Self>) -> Result<Self::Bits, FloatTensor<Self>>;

    /// A tensor of `shape` over the bits of bfloat16 that `write` puts into zeros.
    fn from_bits(shape: &[usize], write: impl FnOnce(&mut [u16])) -> FloatTensor<Self>;

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
    use crate::buffers::{recycle, untouched};
    use crate::kernels::half::{Half, unpacked};

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

    /// burn-ndarray has no floats of 16 bits, and a parameter must be a float of its shape. So the bits are in the first quarter of a tensor of `f64`, a type that
    /// nothing else in Firebox uses and that burn refuses to mix with `f32`; the other three quarters are never touched, and so no memory.
    pub struct Bits(ArcArray<f64, IxDyn>);

    impl AsRef<[u16]> for Bits {
        fn as_ref(&self) -> &[u16] {
            // PANIC: parameters are not transposed or sliced, `fused_linear` reads them either way.
            let values = self.0.as_slice().expect("a whole parameter in bfloat16");
            &bytemuck::cast_slice(values)[..values.len()]
        }
    }

    fn contiguous(tensor: NdArrayTensor) -> ArcArray<f32, IxDyn> {
        match tensor {
            NdArrayTensor::F32(storage) => {
                let array = storage.into_shared();
                if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned().into_shared() }
            }
            NdArrayTensor::F64(storage) => {
                let bits = Bits(storage.into_shared());
                // PANIC: as many values as bits.
                ArcArray::from_shape_vec(bits.0.raw_dim(), unpacked(Half::Bf16, bits.as_ref()))
                    .expect("length fits shape")
            }
            _ => panic!("Firebox's kernels work on f32 tensors, got another dtype: convert it with `Tensor::cast`"),
        }
    }

    impl HostBackend for NdArray {
        type Values = Values;
        type Bits = Bits;

        fn values(tensor: NdArrayTensor) -> Values {
            Values(contiguous(tensor))
        }

        fn bits(tensor: NdArrayTensor) -> Result<Bits, NdArrayTensor> {
            match tensor {
                NdArrayTensor::F64(storage) => Ok(Bits(storage.into_shared())),
                other => Err(other),
            }
        }

        fn from_bits(shape: &[usize], write: impl FnOnce(&mut [u16])) -> NdArrayTensor {
            let n = shape.iter().product();
            let mut values = untouched(n);
            write(&mut bytemuck::cast_slice_mut::<f64, u16>(&mut values)[..n]);
            // PANIC: callers compute the length from the shape.
            NdArrayTensor::from(ArrayD::from_shape_vec(IxDyn(shape), values).expect("length fits shape").into_shared())
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
    use burn::tensor::{DType, TensorData};
    use burn_flex::FlexTensor;
    use half::bf16;
    use half::slice::HalfFloatSliceExt;

    use super::HostBackend;
    use crate::kernels::half::{Half, unpacked};

    /// A contiguous tensor in bfloat16.
    pub struct Bits(FlexTensor);

    impl AsRef<[u16]> for Bits {
        fn as_ref(&self) -> &[u16] {
            if self.0.shape().num_elements() == 0 {
                return &[];
            }
            // PANIC: `bits` looked at its type, and made it contiguous.
            bytemuck::cast_slice(self.0.as_slice::<bf16>().expect("contiguous bfloat16 tensor"))
        }
    }

    /// In f32.
    fn full(tensor: FlexTensor) -> FlexTensor {
        match Flex::bits(tensor) {
            Ok(bits) => Flex::tensor(unpacked(Half::Bf16, bits.as_ref()), &bits.0.shape().to_vec()),
            Err(tensor) => tensor,
        }
    }

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
        type Bits = Bits;

        fn bits(tensor: FlexTensor) -> Result<Bits, FlexTensor> {
            if tensor.dtype() == DType::BF16 { Ok(Bits(tensor.to_contiguous())) } else { Err(tensor) }
        }

        fn from_bits(shape: &[usize], write: impl FnOnce(&mut [u16])) -> FlexTensor {
            let mut values = vec![bf16::ZERO; shape.iter().product()];
            write(values.reinterpret_cast_mut());
            FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
        }

        fn values(tensor: FlexTensor) -> Values {
            let tensor = full(tensor);
            Values(if tensor.shape().num_elements() == 0 { tensor } else { tensor.to_contiguous() })
        }

        fn into_vec(tensor: FlexTensor) -> Vec<f32> {
            match full(tensor).to_contiguous().into_data().into_vec::<f32>() {
                Ok(values) => values,
                Err(error) => panic!("Firebox's kernels work on f32 tensors: {error:?}"),
            }
        }

        fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
            FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
        }
    }
}
