//! A matrix in a scalar format.

use rayon::prelude::*;

use crate::format::{Element, Params, ScalarFormat};
use crate::{CompressError, Matrix};

/// Codes, scales and zero points of a matrix `[out, in]`.
///
/// Group `g` (counted row by row) has the weights `g * group_len ..`, the scale `scales[g]` and, unless the format is symmetric, the zero point `zeros[g]`:
/// a weight is `scale (code − zero)`, or `scale` times the level or float that the code stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    format: ScalarFormat,
    rows: usize,
    cols: usize,
    group_len: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<i8>,
}

impl Quantized {
    /// From what a file holds.
    ///
    /// # Errors
    /// [`CompressError`]: rows that are not whole groups, another number of codes, scales or zero points (none in symmetric formats), codes that the format
    /// does not have, scales that are not finite.
    pub fn new(
        format: ScalarFormat,
        [rows, cols]: [usize; 2],
        codes: Vec<i8>,
        scales: Vec<f32>,
        zeros: Vec<i8>,
    ) -> Result<Self, CompressError> {
        let group_len = format.group_len(rows, cols)?;
        let groups = (rows * cols).checked_div(group_len).unwrap_or(0);
        let expected = [rows * cols, groups, if format.symmetric() { 0 } else { groups }];
        let got = [codes.len(), scales.len(), zeros.len()];
        if got != expected {
            let [expected, got] =
                [expected, got].map(|[codes, scales, zeros]| format!("{codes} codes, {scales} scales, {zeros} zeros"));
            return Err(CompressError::Shape { operation: "quantized matrix", expected, got });
        }
        let (first, last) = format.codes();
        let nan = |code: i8| format.element() == Element::Fp8 && code & 0x7f == 0x7f;
        if let Some(&code) = codes.iter().chain(&zeros).find(|&&code| code < first || code > last || nan(code)) {
            return Err(CompressError::Code { format: format.to_string(), code });
        }
        crate::matrix::finite("scales", &scales)?;
        Ok(Self { format, rows, cols, group_len, codes, scales, zeros })
    }

    /// The nearest codes of `matrix`, with these parameters of its groups.
    pub(crate) fn nearest(matrix: &Matrix, format: ScalarFormat, group_len: usize, params: &[Params]) -> Self {
        let mut codes = vec![0; matrix.values().len()];
        let chunk = group_len.clamp(1, 1 << 14);
        codes.par_chunks_mut(chunk).zip(matrix.values().par_chunks(chunk)).enumerate().for_each(
            |(i, (codes, values))| {
                // A chunk is a group, or one of the parts of a large one.
                let part = |at: usize| params[at / group_len];
                for (j, (code, &x)) in codes.iter_mut().zip(values).enumerate() {
                    *code = format.encode(f64::from(x), part(i * chunk + j));
                }
            },
        );
        Self::with_codes(matrix, format, group_len, codes, params)
    }

    /// Codes that a method has found.
    pub(crate) fn with_codes(
        matrix: &Matrix,
        format: ScalarFormat,
        group_len: usize,
        codes: Vec<i8>,
        params: &[Params],
    ) -> Self {
        let zeros = if format.symmetric() { vec![] } else { params.iter().map(|p| p.zero).collect() };
        let scales = params.iter().map(|p| p.scale).collect();
        Self { format, rows: matrix.rows(), cols: matrix.cols(), group_len, codes, scales, zeros }
    }

    /// The format.
    pub fn format(&self) -> ScalarFormat {
        self.format
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Weights of a group: of the whole matrix, of a row, or 32, 64, 128.
    pub fn group_len(&self) -> usize {
        self.group_len
    }

    /// A code for each weight, row by row.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// A scale for each group.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The code of 0 in each group; empty in symmetric formats, where it is 0.
    pub fn zeros(&self) -> &[i8] {
        &self.zeros
    }

    /// Scale and zero point of a group.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn params(&self, group: usize) -> Params {
        Params { scale: self.scales[group], zero: self.zeros.get(group).copied().unwrap_or(0) }
    }

    /// The weights.
    pub fn dequantize(&self) -> Matrix {
        let mut values = vec![0.0; self.codes.len()];
        let cols = self.cols.max(1);
        values.par_chunks_mut(cols).zip(self.codes.par_chunks(cols)).enumerate().for_each(|(row, (values, codes))| {
            for (j, (value, &code)) in values.iter_mut().zip(codes).enumerate() {
                *value = self.format.decode(code, self.params((row * cols + j) / self.group_len));
            }
        });
        Matrix::of(self.rows, self.cols, values)
    }

    /// Bits that it takes, by [`ScalarFormat::bits`], for each weight.
    pub fn bits_per_weight(&self) -> f64 {
        let weights = self.codes.len().max(1);
        self.format.bits(self.rows, self.cols).map_or(0.0, |bits| bits as f64 / weights as f64)
    }
}
