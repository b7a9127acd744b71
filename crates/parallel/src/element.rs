//! What can be sent: element types, owned buffers of them, and how they are reduced.

use std::fmt;

use half::bf16;
use half::slice::HalfFloatSliceExt;

/// The type of the elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats, whose sums are made in `f32` and rounded once.
    BF16,
    /// Signed 32-bit integers.
    I32,
    /// Signed 64-bit integers.
    I64,
    /// Unsigned 32-bit integers.
    U32,
    /// Bytes.
    U8,
}

impl DType {
    /// All of them; the place of each is its number on the wire.
    pub const ALL: [Self; 6] = [Self::F32, Self::BF16, Self::I32, Self::I64, Self::U32, Self::U8];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::BF16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::I64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U32 => "u32",
            Self::U8 => "u8",
        })
    }
}

/// How the values of all ranks become one. Always in the order of the ranks, so that the result has the same bits every time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum; of integers modulo their size.
    Sum,
    /// The largest; NaN if there is one.
    Max,
    /// The smallest; NaN if there is one.
    Min,
}

impl ReduceOp {
    /// All of them; the place of each is its number on the wire.
    pub const ALL: [Self; 3] = [Self::Sum, Self::Max, Self::Min];
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
        })
    }
}

/// An owned buffer of one element type: what a message is and what a non-blocking operation works on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant is named after its DType")]
pub enum Buffer {
    F32(Vec<f32>),
    BF16(Vec<bf16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
    U8(Vec<u8>),
}

impl Buffer {
    /// `len` zeros.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::BF16 => Self::BF16(vec![bf16::ZERO; len]),
            DType::I32 => Self::I32(vec![0; len]),
            DType::I64 => Self::I64(vec![0; len]),
            DType::U32 => Self::U32(vec![0; len]),
            DType::U8 => Self::U8(vec![0; len]),
        }
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::BF16(_) => DType::BF16,
            Self::I32(_) => DType::I32,
            Self::I64(_) => DType::I64,
            Self::U32(_) => DType::U32,
            Self::U8(_) => DType::U8,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes().len() / self.dtype().size()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in the machine's own byte order.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(data) => f32::bytes(data),
            Self::BF16(data) => bf16::bytes(data),
            Self::I32(data) => i32::bytes(data),
            Self::I64(data) => i64::bytes(data),
            Self::U32(data) => u32::bytes(data),
            Self::U8(data) => data,
        }
    }

    /// The elements, to be written, in the machine's own byte order.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(data) => f32::bytes_mut(data),
            Self::BF16(data) => bf16::bytes_mut(data),
            Self::I32(data) => i32::bytes_mut(data),
            Self::I64(data) => i64::bytes_mut(data),
            Self::U32(data) => u32::bytes_mut(data),
            Self::U8(data) => data,
        }
    }
}

mod sealed {
    /// Keeps [`super::Element`] to the types that every engine knows.
    pub trait Sealed {}
}

/// A type that can be sent and reduced. Implemented for `f32`, [`bf16`], `i32`, `i64`, `u32` and `u8`, and sealed.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// Its name at run time.
    const DTYPE: DType;

    /// The memory of a slice.
    fn bytes(slice: &[Self]) -> &[u8];

    /// The memory of a slice, to be written.
    fn bytes_mut(slice: &mut [Self]) -> &mut [u8];

    /// The vector as a buffer, without a copy.
    fn into_buffer(data: Vec<Self>) -> Buffer;

    /// The buffer as a vector, without a copy, or `None` if it holds another type.
    fn from_buffer(buffer: Buffer) -> Option<Vec<Self>>;
}

/// The numbers in which values of a type are reduced.
trait Reduce: Element {
    type Wide: Copy + Default;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn combine(op: ReduceOp, a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

fn combine_floats(op: ReduceOp, a: f32, b: f32) -> f32 {
    match op {
        ReduceOp::Sum => a + b,
        // Comparisons with NaN are false: an `a` that is NaN stays, and one in `b` is taken over.
        ReduceOp::Max => {
            if b > a || b.is_nan() {
                b
            } else {
                a
            }
        }
        ReduceOp::Min => {
            if b < a || b.is_nan() {
                b
            } else {
                a
            }
        }
    }
}

macro_rules! element {
    ($type:ty, $variant:ident, $bytes:expr, $bytes_mut:expr) => {
        impl sealed::Sealed for $type {}

        impl Element for $type {
            const DTYPE: DType = DType::$variant;

            fn bytes(slice: &[Self]) -> &[u8] {
                $bytes(slice)
            }

            fn bytes_mut(slice: &mut [Self]) -> &mut [u8] {
                $bytes_mut(slice)
            }

            fn into_buffer(data: Vec<Self>) -> Buffer {
                Buffer::$variant(data)
            }

            fn from_buffer(buffer: Buffer) -> Option<Vec<Self>> {
                match buffer {
                    Buffer::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}

element!(f32, F32, bytemuck::cast_slice, bytemuck::cast_slice_mut);
element!(i32, I32, bytemuck::cast_slice, bytemuck::cast_slice_mut);
element!(i64, I64, bytemuck::cast_slice, bytemuck::cast_slice_mut);
element!(u32, U32, bytemuck::cast_slice, bytemuck::cast_slice_mut);
element!(u8, U8, std::convert::identity, std::convert::identity);
element!(bf16, BF16, bf16_bytes, bf16_bytes_mut);

fn bf16_bytes(slice: &[bf16]) -> &[u8] {
    bytemuck::cast_slice(slice.reinterpret_cast())
}

fn bf16_bytes_mut(slice: &mut [bf16]) -> &mut [u8] {
    bytemuck::cast_slice_mut(slice.reinterpret_cast_mut())
}

macro_rules! reduce_floats {
    ($type:ty, $widen:expr, $narrow:expr) => {
        impl Reduce for $type {
            type Wide = f32;

            fn widen(self) -> f32 {
                $widen(self)
            }

            fn narrow(wide: f32) -> Self {
                $narrow(wide)
            }

            fn combine(op: ReduceOp, a: f32, b: f32) -> f32 {
                combine_floats(op, a, b)
            }
        }
    };
}

reduce_floats!(f32, std::convert::identity, std::convert::identity);
reduce_floats!(bf16, bf16::to_f32, bf16::from_f32);

macro_rules! reduce_integers {
    ($($type:ty)*) => {$(
        impl Reduce for $type {
            type Wide = Self;

            fn widen(self) -> Self {
                self
            }

            fn narrow(wide: Self) -> Self {
                wide
            }

            fn combine(op: ReduceOp, a: Self, b: Self) -> Self {
                match op {
                    ReduceOp::Sum => a.wrapping_add(b),
                    ReduceOp::Max => a.max(b),
                    ReduceOp::Min => a.min(b),
                }
            }
        }
    )*};
}

reduce_integers!(i32 i64 u32 u8);

/// Elements that are reduced at a time: they stay in the first cache.
const BLOCK: usize = 1024;

/// Reduces `len` elements of each of `parts`, in their order, into `out`, which may be one of the parts.
///
/// # Safety
///
/// Every part must be valid for reads of `len` elements of `dtype` and `out` for writes, aligned for the type; nobody may
/// write to a part meanwhile, nor touch `out`; `out` may be equal to a part but not overlap one otherwise.
pub(crate) unsafe fn reduce_parts(dtype: DType, op: ReduceOp, parts: &[*const u8], out: *mut u8, len: usize) {
    // SAFETY: the caller's promises are those of the function called, for the type that `dtype` names.
    unsafe {
        match dtype {
            DType::F32 => reduce_typed::<f32>(op, parts, out, len),
            DType::BF16 => reduce_typed::<bf16>(op, parts, out, len),
            DType::I32 => reduce_typed::<i32>(op, parts, out, len),
            DType::I64 => reduce_typed::<i64>(op, parts, out, len),
            DType::U32 => reduce_typed::<u32>(op, parts, out, len),
            DType::U8 => reduce_typed::<u8>(op, parts, out, len),
        }
    }
}

/// See [`reduce_parts`].
unsafe fn reduce_typed<T: Reduce>(op: ReduceOp, parts: &[*const u8], out: *mut u8, len: usize) {
    let Some((first, others)) = parts.split_first() else { return };
    let mut sums = [T::Wide::default(); BLOCK];
    for start in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - start);
        // SAFETY: `start + n <= len`, for which the caller vouches; shared slices to parts end before `out` is written.
        unsafe {
            let part = std::slice::from_raw_parts(first.cast::<T>().add(start), n);
            for (sum, value) in sums.iter_mut().zip(part) {
                *sum = value.widen();
            }
            for other in others {
                let part = std::slice::from_raw_parts(other.cast::<T>().add(start), n);
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum = T::combine(op, *sum, value.widen());
                }
            }
            let out = std::slice::from_raw_parts_mut(out.cast::<T>().add(start), n);
            for (value, sum) in out.iter_mut().zip(&sums) {
                *value = T::narrow(*sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reduce<T: Element>(op: ReduceOp, parts: &[Vec<T>]) -> Vec<T> {
        let mut out = parts[0].clone();
        let pointers: Vec<_> = parts.iter().map(|part| part.as_ptr().cast()).collect();
        // SAFETY: the parts are vectors of one length, and `out` is another.
        unsafe { reduce_parts(T::DTYPE, op, &pointers, out.as_mut_ptr().cast(), out.len()) };
        out
    }

    #[test]
    fn sums_of_bf16_round_once() {
        // One at a time, 256 + 1 is 256 in bf16: the sum would stay 256.
        let mut parts = vec![vec![bf16::from_f32(256.0)]];
        parts.extend(vec![vec![bf16::from_f32(1.0)]; 4]);
        assert_eq!(reduce(ReduceOp::Sum, &parts)[0].to_f32(), 260.0);
    }

    #[test]
    fn nan_survives_and_integers_wrap() {
        for parts in [[vec![f32::NAN], vec![1.0]], [vec![1.0], vec![f32::NAN]]] {
            for op in ReduceOp::ALL {
                assert!(reduce(op, &parts)[0].is_nan());
            }
        }
        assert_eq!(reduce(ReduceOp::Sum, &[vec![200u8, 1], vec![100, 1]]), [44, 2]);
        assert_eq!(reduce(ReduceOp::Min, &[vec![3i64, -1], vec![-3, 1]]), [-3, -1]);
        assert_eq!(reduce(ReduceOp::Max, &[vec![2.0f32; 3000], vec![3.0; 3000]]), vec![3.0; 3000]);
    }

    #[test]
    fn buffers_keep_their_type_and_bytes() {
        for dtype in DType::ALL {
            let mut buffer = Buffer::zeros(dtype, 3);
            assert_eq!((buffer.dtype(), buffer.len(), buffer.bytes_mut().len()), (dtype, 3, 3 * dtype.size()));
        }
        let buffer = f32::into_buffer(vec![1.0, 2.0]);
        assert_eq!(i32::from_buffer(buffer.clone()), None);
        assert_eq!(f32::from_buffer(buffer), Some(vec![1.0, 2.0]));
        assert!(Buffer::zeros(DType::U8, 0).is_empty());
    }
}
