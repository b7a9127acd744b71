//! States of optimizers, in 32, 16 or 8 bits.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use super::optim::to_host;
use crate::kernels::compact::{BLOCK, decode, decode_bf16, encode, encode_bf16, hash};

/// In how many bits an optimizer's state is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    #[default]
    Full,
    /// bfloat16, rounded stochastically, so that changes smaller than its last bit are not lost in the mean.
    Bf16,
    /// 8 bits, by blocks of 256 values with a scale each (Dettmers et al., arXiv:2110.02861).
    Int8,
}

/// One state of a flat parameter. In fewer than 32 bits it lies on the host.
#[derive(Clone, Debug)]
pub struct State(pub(crate) Held);

#[derive(Clone, Debug)]
pub(crate) enum Held {
    Full(Tensor<1>),
    Compact(Store),
}

/// A state in fewer than 32 bits.
#[derive(Clone, Debug)]
pub(crate) enum Store {
    Bf16(Vec<u16>),
    Int8 {
        codes: Vec<u8>,
        /// One for each block of [`BLOCK`] codes.
        scales: Vec<f32>,
        /// Whether values can be negative.
        signed: bool,
    },
}

impl State {
    /// `n` zeros; `signed` says whether values can be negative.
    pub fn zeros(n: usize, precision: Precision, signed: bool, device: &Device) -> Self {
        match precision {
            Precision::Full => Self(Held::Full(Tensor::zeros([n], device))),
            Precision::Bf16 => Self(Held::Compact(Store::Bf16(vec![0; n]))),
            Precision::Int8 => {
                let mut store = Store::Int8 { codes: vec![0; n], scales: vec![0.0; n.div_ceil(BLOCK)], signed };
                store.set(&vec![0.0; n], 0);
                Self(Held::Compact(store))
            }
        }
    }

    /// The values, on `device`.
    pub fn get(&self, device: &Device) -> Tensor<1> {
        match &self.0 {
            Held::Full(tensor) => tensor.clone(),
            Held::Compact(store) => Tensor::from_data(TensorData::new(self.read(), [store.len()]), device),
        }
    }

    /// The values, taken out where that saves a copy; what is left is for [`set`](Self::set) to replace.
    pub fn take(&mut self, device: &Device) -> Tensor<1> {
        match &mut self.0 {
            Held::Full(tensor) => std::mem::replace(tensor, Tensor::zeros([0], device)),
            Held::Compact(_) => self.get(device),
        }
    }

    /// Replaces the values. `seed`, another one in every step, decides how bfloat16 rounds.
    ///
    /// # Panics
    /// If their number changes in fewer than 32 bits.
    pub fn set(&mut self, values: Tensor<1>, seed: u32) {
        match &mut self.0 {
            Held::Full(tensor) => *tensor = values,
            Held::Compact(store) => store.set(&to_host(values), seed),
        }
    }

    /// Replaces the values by what [`get`](Self::get) gave: the state is the same again, bit for bit.
    pub fn restore(&mut self, values: &[f32], device: &Device) {
        match &mut self.0 {
            Held::Full(tensor) => {
                *tensor = Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device);
            }
            Held::Compact(store) => store.set(values, 0),
        }
    }

    /// The state of a part of the values, in the same precision.
    pub fn part(&self, part: &Range<usize>, device: &Device) -> Self {
        let n = part.len();
        let mut state = match &self.0 {
            Held::Full(_) => Self::zeros(n, Precision::Full, true, device),
            Held::Compact(Store::Bf16(_)) => Self::zeros(n, Precision::Bf16, true, device),
            Held::Compact(Store::Int8 { signed, .. }) => Self::zeros(n, Precision::Int8, *signed, device),
        };
        state.restore(&self.read()[part.clone()], device);
        state
    }

    /// The values, on the host.
    pub fn read(&self) -> Vec<f32> {
        match &self.0 {
            Held::Full(tensor) => to_host(tensor.clone()),
            Held::Compact(store) => {
                let mut values = vec![0.0; store.len()];
                store.read(&mut values);
                values
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Held::Full(tensor) => 4 * tensor.dims()[0],
            Held::Compact(Store::Bf16(values)) => 2 * values.len(),
            Held::Compact(Store::Int8 { codes, scales, .. }) => codes.len() + 4 * scales.len(),
        }
    }
}

impl Store {
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::Int8 { codes, .. } => codes.len(),
        }
    }

    fn read(&self, out: &mut [f32]) {
        out.par_chunks_mut(PART).zip(self.parts()).for_each(|(out, part)| part.read(out));
    }

    fn set(&mut self, values: &[f32], seed: u32) {
        assert_eq!(values.len(), self.len(), "an optimizer's state changes its length");
        let chunks = values.par_chunks(PART).zip(self.parts_mut()).enumerate();
        chunks.for_each(|(i, (values, mut part))| part.write(values, hash(seed, i as u32)));
    }

    fn parts(&self) -> Vec<PartRef<'_>> {
        match self {
            Self::Bf16(values) => values.chunks(PART).map(Part::Bf16).collect(),
            Self::Int8 { codes, scales, signed } => {
                let parts = codes.chunks(PART).zip(scales.chunks(PART / BLOCK));
                parts.map(|(codes, scales)| Part::Int8 { codes, scales, signed: *signed }).collect()
            }
        }
    }

    /// Parts of [`PART`] values, for a thread each.
    pub fn parts_mut(&mut self) -> Vec<PartMut<'_>> {
        match self {
            Self::Bf16(values) => values.chunks_mut(PART).map(Part::Bf16).collect(),
            Self::Int8 { codes, scales, signed } => {
                let parts = codes.chunks_mut(PART).zip(scales.chunks_mut(PART / BLOCK));
                parts.map(|(codes, scales)| Part::Int8 { codes, scales, signed: *signed }).collect()
            }
        }
    }
}

/// Values of a part, a multiple of a block's.
pub(crate) const PART: usize = crate::kernels::CHUNK;

/// A part of a state in fewer bits.
pub(crate) enum Part<H, C, S> {
    Bf16(H),
    Int8 { codes: C, scales: S, signed: bool },
}

/// One to read.
pub(crate) type PartRef<'a> = Part<&'a [u16], &'a [u8], &'a [f32]>;

/// One to read and write.
pub(crate) type PartMut<'a> = Part<&'a mut [u16], &'a mut [u8], &'a mut [f32]>;

impl<H: AsRef<[u16]>, C: AsRef<[u8]>, S: AsRef<[f32]>> Part<H, C, S> {
    pub fn read(&self, out: &mut [f32]) {
        match self {
            Self::Bf16(bits) => decode_bf16(bits.as_ref(), out),
            Self::Int8 { codes, scales, signed } => {
                let blocks = out.chunks_mut(BLOCK).zip(codes.as_ref().chunks(BLOCK)).zip(scales.as_ref());
                blocks.for_each(|((out, codes), &scale)| decode(codes, scale, *signed, out));
            }
        }
    }
}

impl PartMut<'_> {
    pub fn write(&mut self, values: &[f32], seed: u32) {
        match self {
            Self::Bf16(bits) => encode_bf16(values, bits, seed),
            Self::Int8 { codes, scales, signed } => {
                let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(scales.iter_mut());
                blocks.for_each(|((values, codes), scale)| *scale = encode(values, codes, *signed));
            }
        }
    }
}
