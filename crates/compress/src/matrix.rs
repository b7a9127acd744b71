//! The weights of a layer on the host.

use crate::CompressError;

/// A row-major matrix `[out, in]`: a row holds the weights of one output.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// The matrix of these values, row by row.
    ///
    /// # Errors
    /// [`CompressError::Shape`] if their number is not `rows * cols`.
    pub fn new(rows: usize, cols: usize, values: Vec<f32>) -> Result<Self, CompressError> {
        if values.len() != rows * cols {
            return Err(CompressError::Shape {
                operation: "matrix",
                expected: format!("{} values for [{rows}, {cols}]", rows * cols),
                got: values.len().to_string(),
            });
        }
        Ok(Self { rows, cols, values })
    }

    /// For values that were counted by whoever made them.
    pub(crate) fn of(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        debug_assert_eq!(values.len(), rows * cols);
        Self { rows, cols, values }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, to change them.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// All values, row by row.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// The weights of an output.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// `[in, out]`, as Firebox's linear layers store it, from `[out, in]`, or the other way round.
    pub fn transposed(&self) -> Self {
        // In tiles, of which both sides stay in the cache.
        const TILE: usize = 32;
        let mut values = vec![0.0; self.values.len()];
        for (row, col) in tiles(self.rows, self.cols, TILE) {
            for i in row..self.rows.min(row + TILE) {
                for j in col..self.cols.min(col + TILE) {
                    values[j * self.rows + i] = self.values[i * self.cols + j];
                }
            }
        }
        Self { rows: self.cols, cols: self.rows, values }
    }

    /// The same matrix with column `j` times `scales[j]`.
    ///
    /// # Errors
    /// [`CompressError::Shape`] if there is not one scale for each column.
    pub fn scaled_columns(&self, scales: &[f32]) -> Result<Self, CompressError> {
        self.fits("scales of columns", scales.len())?;
        let scaled = |row: &[f32]| -> Vec<f32> { row.iter().zip(scales).map(|(x, s)| x * s).collect() };
        let values = self.values.chunks_exact(self.cols.max(1)).flat_map(scaled).collect();
        Ok(Self::of(self.rows, self.cols, values))
    }

    /// Refuses values that are not finite.
    pub(crate) fn finite(&self, operation: &'static str) -> Result<(), CompressError> {
        finite(operation, &self.values)
    }

    /// Refuses statistics of another number of inputs.
    pub(crate) fn fits(&self, operation: &'static str, width: usize) -> Result<(), CompressError> {
        if width == self.cols {
            return Ok(());
        }
        Err(CompressError::Shape {
            operation,
            expected: format!("{} inputs for a weight [{}, {}]", self.cols, self.rows, self.cols),
            got: width.to_string(),
        })
    }
}

/// Refuses values that are not finite.
pub(crate) fn finite(operation: &'static str, values: &[f32]) -> Result<(), CompressError> {
    match values.iter().enumerate().find(|(_, x)| !x.is_finite()) {
        Some((index, &value)) => Err(CompressError::NotFinite { operation, index, value }),
        None => Ok(()),
    }
}

fn tiles(rows: usize, cols: usize, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(tile).flat_map(move |row| (0..cols).step_by(tile).map(move |col| (row, col)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn transposing_twice_is_nothing() {
        let matrix = Matrix::new(37, 70, (0..37 * 70).map(|i| i as f32).collect()).unwrap();
        let turned = matrix.transposed();
        assert_eq!((turned.rows(), turned.cols()), (70, 37));
        assert_eq!(turned.row(69)[36], matrix.row(36)[69]);
        assert_eq!(turned.transposed(), matrix);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        assert!(Matrix::new(2, 3, vec![0.0; 5]).unwrap_err().to_string().contains("6 values for [2, 3], got 5"));
        let matrix = Matrix::new(2, 3, vec![1.0; 6]).unwrap();
        assert!(matrix.scaled_columns(&[1.0; 2]).is_err());
        assert_eq!(matrix.scaled_columns(&[1.0, 2.0, 3.0]).unwrap().row(1), [1.0, 2.0, 3.0]);
    }
}
