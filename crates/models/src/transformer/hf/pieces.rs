//! How a parameter of the decoder is cut into the tensors of a file.

/// One tensor of a file and the part of the decoder's parameter that it holds: rows and columns (of an `[in, out]` weight, of several such one after the
/// other, or entries of a vector).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name in the file.
    pub name: String,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// First row and number of rows in the parameter, whose dimensions but the last are one.
    pub rows: (usize, usize),
    /// First column and number of columns.
    pub columns: (usize, usize),
    /// Whether the file's matrix is `[out, in]`.
    pub transposed: bool,
}

/// A parameter of the decoder and the tensors that make it up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path in the module, joined by dots.
    pub param: String,
    /// Shape in the module.
    pub shape: Vec<usize>,
    /// Tensors of the file.
    pub pieces: Vec<Piece>,
}

impl Entry {
    /// A parameter that is one tensor of the same shape.
    pub fn whole(param: &str, shape: &[usize], name: &str) -> Self {
        let width = shape[shape.len() - 1];
        let rows = (0, shape.iter().product::<usize>() / width.max(1));
        let piece = Piece { name: name.into(), shape: shape.into(), rows, columns: (0, width), transposed: false };
        Self { param: param.into(), shape: shape.into(), pieces: vec![piece] }
    }

    /// The file's tensor `piece` from the parameter's values.
    ///
    /// # Panics
    /// If `values` is not of the entry's shape.
    pub fn split(&self, values: &[f32], piece: &Piece) -> Vec<f32> {
        let width = self.shape[self.shape.len() - 1];
        assert_eq!(values.len(), self.shape.iter().product::<usize>(), "{}: values of another shape", self.param);
        let ((top, height), (first, n)) = (piece.rows, piece.columns);
        let rows = values[top * width..][..height * width].chunks_exact(width).map(|row| &row[first..first + n]);
        if !piece.transposed {
            return rows.flatten().copied().collect();
        }
        let mut out = vec![0.0; n * height];
        for (r, row) in rows.enumerate() {
            for (c, v) in row.iter().enumerate() {
                out[c * height + r] = *v;
            }
        }
        out
    }

    /// Writes the file's tensor `piece` into the parameter's values; the inverse of [`split`](Self::split).
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn join(&self, values: &mut [f32], piece: &Piece, tensor: &[f32]) {
        let width = self.shape[self.shape.len() - 1];
        let ((top, height), (first, n)) = (piece.rows, piece.columns);
        assert_eq!(tensor.len(), n * height, "{}: tensor of another shape", piece.name);
        for (r, row) in values[top * width..][..height * width].chunks_exact_mut(width).enumerate() {
            for c in 0..n {
                row[first + c] = if piece.transposed { tensor[c * height + r] } else { tensor[r * n + c] };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::transformer::hf::Family;
    use crate::transformer::presets;

    #[test]
    fn split_and_join_are_inverse() {
        let config = presets::named("llama-30m").unwrap();
        let entry = Family::Llama.entries(&config).into_iter().find(|e| e.param == "blocks.1.attn.qkv.weight").unwrap();
        assert_eq!(entry.pieces.len(), 3);
        let values: Vec<f32> = (0..entry.shape.iter().product::<usize>()).map(|i| i as f32).collect();
        let mut back = vec![0.0; values.len()];
        for piece in &entry.pieces {
            entry.join(&mut back, piece, &entry.split(&values, piece));
        }
        assert_eq!(back, values);
        let q = entry.split(&values, &entry.pieces[0]);
        assert_eq!(q[1] as usize, entry.shape[1], "transposed: the second value is one row further down");
    }

    #[test]
    fn experts_are_rows_of_one_parameter() {
        let config = presets::named("firebox-moe-3m").unwrap();
        let entries = Family::Llama.entries(&config);
        let entry = entries.iter().find(|e| e.param == "blocks.1.experts.input.weight").unwrap();
        assert_eq!((entry.pieces.len(), &entry.shape[..]), (16, &[8, 128, 384][..]));
        let values: Vec<f32> = (0..entry.shape.iter().product::<usize>()).map(|i| i as f32).collect();
        let mut back = vec![0.0; values.len()];
        for piece in &entry.pieces {
            entry.join(&mut back, piece, &entry.split(&values, piece));
        }
        assert!(back == values);
        // The second expert's up projection, [F, D].
        let up = &entry.pieces[3];
        assert_eq!((&up.name[..], &up.shape[..]), ("model.layers.1.mlp.experts.1.up_proj.weight", &[192, 128][..]));
        assert_eq!(entry.split(&values, up)[0] as usize, 128 * 384 + 192);
    }
}
