//! Decoders whose matrices are packed integers: for inference.
//!
//! A parameter whose matrix is packed is made from it if something asks for its values, and takes no memory before.

use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use firebox_tensor::device::is_fused;
use firebox_tensor::ops::{PackedMatrix, to_host};

use super::model::{Linear, Transformer};
use super::tables::Embedding;

/// A packed matrix that has no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackedWeightError {
    /// No parameter of this name can be packed.
    #[error("`{0}` is no matrix of this decoder that can be packed: linear layers, embedding and head can")]
    Name(String),
    /// The matrix is not of the parameter's shape.
    #[error("`{name}`: expected a packed matrix of {expected:?} outputs and inputs, got {got:?}")]
    Shape {
        /// The parameter.
        name: String,
        /// `[outputs, inputs]`.
        expected: [usize; 2],
        /// That of the matrix.
        got: [usize; 2],
    },
    /// The device has no integer products, or gradients.
    #[error(
        "quantized weights compute on the CPU backends (ndarray, flex) alone, and without gradients; the device is {0}: choose another backend, or \
         use the model that was quantized"
    )]
    Device(String),
}

enum Place<'a> {
    Linear(&'a mut Linear),
    Table(&'a mut Embedding),
}

/// `[outputs, inputs]` of a parameter as a matrix: linear weights are `[in, out]`, tables have their rows as outputs. Experts' matrices are one under the other.
///
/// `None` for what is no matrix.
pub fn matrix_shape(param: &str, shape: &[usize]) -> Option<[usize; 2]> {
    match *shape {
        [rows, width] if is_table(param) => Some([rows, width]),
        [inputs, outputs] => Some([outputs, inputs]),
        [n, inputs, outputs] => Some([n * outputs, inputs]),
        _ => None,
    }
}

/// The values of a parameter of this shape from those of its matrix, [`matrix_shape`].
///
/// # Panics
/// If their number does not fit.
pub fn from_matrix(param: &str, shape: &[usize], matrix: Vec<f32>) -> Vec<f32> {
    assert_eq!(matrix.len(), shape.iter().product::<usize>(), "{param}: values of another shape");
    match *shape {
        [_, inputs, outputs] => {
            matrix.chunks_exact((inputs * outputs).max(1)).flat_map(|m| turned(m, inputs)).collect()
        }
        [inputs, _] if !is_table(param) => turned(&matrix, inputs),
        _ => matrix,
    }
}

/// The inverse of [`from_matrix`].
///
/// # Panics
/// If the number of values does not fit.
pub fn to_matrix(param: &str, shape: &[usize], values: Vec<f32>) -> Vec<f32> {
    assert_eq!(values.len(), shape.iter().product::<usize>(), "{param}: values of another shape");
    match *shape {
        [_, inputs, outputs] => {
            values.chunks_exact((inputs * outputs).max(1)).flat_map(|m| turned(m, outputs)).collect()
        }
        [_, outputs] if !is_table(param) => turned(&values, outputs),
        _ => values,
    }
}

/// Whether [`Transformer::with_packed`] has a place for a parameter of this name in some decoder: for the weights of attention and of dense feed-forward layers, the
/// embedding and the head.
pub fn can_be_packed(param: &str) -> bool {
    const LINEAR: [&str; 4] = ["attn.qkv.weight", "attn.out.weight", "mlp.input.weight", "mlp.output.weight"];
    let part = param.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).map(|(_, part)| part);
    matches!(param, "embed.weight" | "head.weight") || part.is_some_and(|part| LINEAR.contains(&part))
}

fn is_table(param: &str) -> bool {
    !param.starts_with("blocks.")
}

/// The columns of rows of `width` values, one after the other.
fn turned(rows: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| rows.iter().skip(column).step_by(width).copied()).collect()
}

impl Transformer {
    /// The same decoder with these matrices, by the names of the parameters that they stand for (`blocks.0.attn.qkv.weight`, `embed.weight`): `[out, in]`, and
    /// `[V, D]` for embedding and head. A tied head uses the embedding's.
    ///
    /// # Errors
    /// [`PackedWeightError`]: a name that cannot be packed, another shape, or a device that has no integer products.
    pub fn with_packed(
        mut self,
        matrices: impl IntoIterator<Item = (String, Arc<PackedMatrix>)>,
    ) -> Result<Self, PackedWeightError> {
        let device = self.embed.weight.lazy_device();
        if !is_fused(&device) || device.is_autodiff() {
            return Err(PackedWeightError::Device(format!("{device:?}")));
        }
        for (name, matrix) in matrices {
            let Some(place) = self.place(&name) else { return Err(PackedWeightError::Name(name)) };
            let (weight, packed) = match place {
                Place::Linear(linear) => (&mut linear.weight, &mut linear.packed),
                Place::Table(table) => (&mut table.weight, &mut table.packed),
            };
            let shape = weight.lazy_shape();
            let dims = [shape[0], shape[1]];
            // Two dimensions are a matrix.
            let expected = matrix_shape(&name, &dims).unwrap_or(dims);
            if matrix.shape() != expected {
                return Err(PackedWeightError::Shape { name, expected, got: matrix.shape() });
            }
            *packed = Some(matrix.clone());
            let values = move |device: &burn::tensor::Device, require_grad: bool| {
                let values = from_matrix(&name, &dims, matrix.dequantized());
                Tensor::from_data(TensorData::new(values, dims), device).set_require_grad(require_grad)
            };
            *weight = Param::uninitialized(ParamId::new(), values, device.clone(), false, shape);
        }
        Ok(self)
    }

    /// The same transformer, with the linear layers of attention and of dense feed-forward layers packed as `pack` says of their names, shapes `[in, out]` and values; those of which it
    /// gives nothing stay as they are. Their parameters have no values from then on: a model that is not trained, but whose adapters are.
    pub fn pack_linear(mut self, pack: impl Fn(&str, [usize; 2], Vec<f32>) -> Option<PackedMatrix>) -> Self {
        self.linear_layers().for_each(|(name, linear)| {
            // What is made of the weight is made before it is gone.
            if let Some(magnitude) = linear.adapter.as_ref().and_then(|adapter| adapter.magnitude.as_ref()) {
                magnitude.val();
            }
            let (id, device, shape) = (linear.weight.id, linear.weight.lazy_device(), linear.weight.lazy_shape());
            let nothing = Param::initialized(id, Tensor::zeros([0, 0], &device)).set_require_grad(false);
            let weight = std::mem::replace(&mut linear.weight, nothing);
            let values = to_host(weight.val());
            match pack(&format!("{name}.weight"), [shape[0], shape[1]], values) {
                Some(packed) => linear.packed = Some(Arc::new(packed)),
                None => linear.weight = weight,
            }
        });
        self
    }

    /// Whether a matrix is packed: such a decoder can be used, and only its adapters trained.
    pub fn is_packed(&self) -> bool {
        self.packed().next().is_some()
    }

    /// The packed matrices.
    pub fn packed(&self) -> impl Iterator<Item = &Arc<PackedMatrix>> {
        let tables = [Some(&self.embed), self.head.as_ref()].into_iter().flatten().filter_map(|t| t.packed.as_ref());
        let layers = self.blocks.iter().flat_map(|block| {
            let mlp = block.mlp.iter().flat_map(|mlp| [&mlp.input, &mlp.output]);
            [&block.attn.qkv, &block.attn.out].into_iter().chain(mlp)
        });
        tables.chain(layers.filter_map(|linear| linear.packed.as_ref()))
    }

    fn place(&mut self, name: &str) -> Option<Place<'_>> {
        match name {
            "embed.weight" => return Some(Place::Table(&mut self.embed)),
            "head.weight" => return self.head.as_mut().map(Place::Table),
            _ => {}
        }
        let (block, part) = name.strip_prefix("blocks.")?.split_once('.')?;
        let block = self.blocks.get_mut(block.parse::<usize>().ok()?)?;
        Some(Place::Linear(match part {
            "attn.qkv.weight" => &mut block.attn.qkv,
            "attn.out.weight" => &mut block.attn.out,
            "mlp.input.weight" => &mut block.mlp.as_mut()?.input,
            "mlp.output.weight" => &mut block.mlp.as_mut()?.output,
            _ => return None,
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::device::Backend;
    use firebox_tensor::ops::Scales;

    use super::*;
    use crate::stage::TokenBatch;
    use crate::transformer::{KvCache, TransformerConfig, presets};

    fn matrix([outputs, inputs]: [usize; 2], seed: usize) -> Arc<PackedMatrix> {
        let groups = inputs.div_ceil(32);
        let codes: Vec<u8> =
            (0..outputs * inputs.div_ceil(2)).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let levels = std::array::from_fn(|c| c as f32 - 7.5);
        let scales = Scales::F32(vec![0.01; outputs * groups]);
        Arc::new(PackedMatrix::int4([outputs, inputs], 32, &codes, scales, None, levels).unwrap())
    }

    /// Of weights whose products are not rounded, the packed decoder is the one with the values of the codes.
    #[test]
    fn a_packed_decoder_is_the_one_with_its_values() {
        let device = Backend::NdArray.device().unwrap();
        for name in ["gpt2", "llama-30m"] {
            let config = TransformerConfig {
                vocab_size: 45,
                d_model: 64,
                d_ff: 96,
                n_heads: 2,
                n_kv_heads: if name == "gpt2" { 2 } else { 1 },
                tied: name == "gpt2",
                head_dim: 32,
                n_layers: 2,
                context: 16,
                ..presets::named(name).unwrap()
            };
            let plain = Transformer::new(&config, 3, &device).unwrap();
            let shapes = |i: usize| {
                let block = |part: &str| format!("blocks.{i}.{part}.weight");
                [
                    (block("attn.qkv"), [config.qkv_width(), 64]),
                    (block("attn.out"), [64, 64]),
                    (block("mlp.input"), [config.ff_in_width(), 64]),
                    (block("mlp.output"), [64, 96]),
                ]
            };
            let mut all: Vec<_> = (0..2).flat_map(shapes).collect();
            all.push(("embed.weight".into(), [45, 64]));
            if !config.tied {
                all.push(("head.weight".into(), [45, 64]));
            }
            let count = all.len();
            let matrices = all.into_iter().enumerate().map(|(i, (name, shape))| (name, matrix(shape, i)));
            let packed = plain.with_packed(matrices).unwrap();
            assert_eq!((packed.packed().count(), packed.is_packed()), (count, true));
            // Whoever asks for a parameter gets the values of its codes.
            let mut full = packed.clone();
            full.embed.packed = None;
            if let Some(head) = &mut full.head {
                head.packed = None;
            }
            for block in &mut full.blocks {
                let mlp = block.mlp.as_mut().unwrap();
                for linear in [&mut block.attn.qkv, &mut block.attn.out, &mut mlp.input, &mut mlp.output] {
                    linear.packed = None;
                }
            }
            assert!(!full.is_packed());
            let ids: Vec<i32> = (0..12).map(|i| i * 7 % 45).collect();
            let targets: Vec<i32> = (1..13).map(|i| i * 7 % 45).collect();
            let batch = TokenBatch::plain(1, 12, ids.clone(), targets);
            let difference = |a: Tensor<1>, b: Tensor<1>| -> f32 { (a - b).abs().max().into_scalar() };
            let [a, b] = [&packed, &full].map(|model| model.logits(&batch).reshape([12 * 45]));
            assert!(difference(a.clone(), b) < 1e-4, "{name}");
            let [x, y] = [&packed, &full].map(|model| crate::Staged::loss(model, &batch, None));
            assert!(difference(x, y) < 1e-5, "{name}");
            let mut cache = KvCache::new(&packed);
            packed.forward_cached(&ids[..11], &mut cache);
            let last = packed.forward_cached(&ids[11..], &mut cache);
            assert!(difference(last, a.narrow(0, 11 * 45, 45)) < 1e-4, "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let device = Backend::NdArray.device().unwrap();
        let config = TransformerConfig { context: 8, ..presets::depth(1, 31) };
        let packed = |name: &str, shape: [usize; 2], device| {
            Transformer::new(&config, 3, device)
                .unwrap()
                .with_packed([(name.to_owned(), matrix(shape, 0))])
                .unwrap_err()
        };
        let d = config.d_model;
        assert!(matches!(packed("blocks.0.attn.out.weight", [d, d + 1], &device), PackedWeightError::Shape { .. }));
        assert!(matches!(packed("blocks.1.attn.out.weight", [d, d], &device), PackedWeightError::Name(_)));
        assert!(matches!(packed("norm.weight", [1, d], &device), PackedWeightError::Name(_)));
        let gradients = device.clone().autodiff();
        assert!(matches!(packed("blocks.0.attn.out.weight", [d, d], &gradients), PackedWeightError::Device(_)));
    }

    #[test]
    fn matrices_and_parameters_have_the_same_values() {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        assert_eq!(matrix_shape("blocks.0.mlp.input.weight", &[4, 6]), Some([6, 4]));
        assert_eq!(
            from_matrix("blocks.0.mlp.input.weight", &[4, 6], values.clone())[..7],
            [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 1.0]
        );
        assert_eq!(matrix_shape("head.weight", &[4, 6]), Some([4, 6]));
        assert_eq!(from_matrix("head.weight", &[4, 6], values.clone()), values);
        assert_eq!(matrix_shape("blocks.0.experts.input.weight", &[2, 3, 4]), Some([8, 3]));
        assert_eq!(from_matrix("blocks.0.experts.input.weight", &[2, 3, 4], values)[11..14], [11.0, 12.0, 15.0]);
        assert_eq!(matrix_shape("norm.weight", &[4]), None);
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        for (name, shape) in [("blocks.0.x", &[4, 6][..]), ("embed.weight", &[4, 6]), ("blocks.0.y", &[2, 3, 4])] {
            assert_eq!(from_matrix(name, shape, to_matrix(name, shape, values.clone())), values);
        }
    }
}
