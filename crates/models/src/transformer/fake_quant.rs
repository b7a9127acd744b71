//! Linear layers that compute with the weights that they will have once these are quantized.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::ops::{FakeQuant, fake_quantize, fake_quantized, to_host};

use super::model::{Linear, Transformer};

/// How a linear layer sees its weight in training for few bits.
#[derive(Module, Debug)]
pub struct Quantizer {
    /// Learned steps, `[groups × out]`; without them, those of the largest weights.
    pub steps: Option<Param<Tensor<1>>>,
    #[module(skip)]
    format: FakeQuant,
}

impl Quantizer {
    /// For a weight. Learned steps start where the values that it has then say.
    fn of(weight: &Param<Tensor<2>>, format: FakeQuant, learned: bool) -> Self {
        let shape = weight.lazy_shape();
        let shape = [shape[0], shape[1]];
        let steps = learned.then(|| {
            let (values, n, device) = (weight.clone(), format.steps(shape), weight.lazy_device());
            let init = move |device: &Device, require_grad: bool| {
                let steps = format.initial_steps(&to_host(values.into_value()), shape);
                Tensor::from_data(TensorData::new(steps, [n]), device).set_require_grad(require_grad)
            };
            Param::uninitialized(ParamId::new(), init, device, true, [n].into())
        });
        Self { steps, format }
    }

    /// The weight on its grid, `[in, out]`.
    pub(super) fn apply(&self, weight: Tensor<2>) -> Tensor<2> {
        fake_quantize(weight, self.steps.as_ref().map(Param::val), self.format)
    }

    /// Its values on the grid, and the steps.
    fn values(&self, weight: &Param<Tensor<2>>) -> (Vec<f32>, Vec<f32>) {
        let steps = self.steps.as_ref().map(|steps| to_host(steps.val()));
        fake_quantized(&to_host(weight.val()), weight.dims(), steps.as_deref(), self.format)
    }
}

impl Transformer {
    /// The same decoder, whose dense layers compute with weights that are rounded to a grid (see [`fake_quantize`]) and are trained so; with `learned`, by steps that are
    /// parameters, `blocks.N.LAYER.quantizer.steps`. Embedding, head and experts stay as they are.
    ///
    /// # Panics
    /// Groups that do not divide the inputs of a layer panic when it runs.
    pub fn with_fake_quant(mut self, format: FakeQuant, learned: bool) -> Self {
        self.linear_layers().for_each(|(_, linear)| {
            linear.quantizer = Some(Quantizer::of(&linear.weight, format, learned));
        });
        self
    }

    /// Whether its layers [round their weights](Self::with_fake_quant).
    pub fn has_fake_quant(&self) -> bool {
        self.blocks.iter().any(|block| block.attn.qkv.quantizer.is_some())
    }

    /// The plain decoder whose weights are those that this one [computes with](Self::with_fake_quant).
    pub fn quantized(mut self) -> Self {
        self.linear_layers().for_each(|(_, linear)| {
            let Some(quantizer) = linear.quantizer.take() else { return };
            let (values, _) = quantizer.values(&linear.weight);
            let (shape, device) = (linear.weight.dims(), linear.weight.device());
            let values = Tensor::from_data(TensorData::new(values, shape), &device);
            let id = linear.weight.id;
            linear.weight = Param::initialized(id, values.set_require_grad(device.is_autodiff()));
        });
        self
    }

    /// Steps `[groups × out]` of the layers that round their weights, as they are used, by the name of the weight.
    pub fn quantizer_steps(&self) -> Vec<(String, Vec<f32>)> {
        // Layers are gone through as those that change.
        let mut shared = self.clone();
        let steps = shared.linear_layers().filter_map(|(name, linear)| {
            let quantizer = linear.quantizer.as_ref()?;
            Some((format!("{name}.weight"), quantizer.values(&linear.weight).1))
        });
        steps.collect()
    }

    /// The linear layers of attention and of dense feed-forward layers, by name.
    pub(super) fn linear_layers(&mut self) -> impl Iterator<Item = (String, &mut Linear)> {
        self.blocks.iter_mut().enumerate().flat_map(|(i, block)| {
            let attn = [("attn.qkv", &mut block.attn.qkv), ("attn.out", &mut block.attn.out)];
            let mlp =
                block.mlp.iter_mut().flat_map(|mlp| [("mlp.input", &mut mlp.input), ("mlp.output", &mut mlp.output)]);
            attn.into_iter().chain(mlp).map(move |(name, linear)| (format!("blocks.{i}.{name}"), linear))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::transformer::{TransformerConfig, presets};
    use crate::{Staged, TokenBatch};

    #[test]
    fn the_plain_decoder_computes_the_same() {
        let device = Backend::NdArray.device().unwrap().autodiff();
        let config = TransformerConfig {
            context: 8,
            d_model: 64,
            d_ff: 96,
            n_heads: 2,
            n_kv_heads: 2,
            head_dim: 32,
            ..presets::depth(2, 31)
        };
        let batch = TokenBatch::plain(1, 5, vec![1, 2, 3, 4, 5], vec![2, 3, 4, 5, 6]);
        for learned in [false, true] {
            let format = FakeQuant { bits: 3, group: 32 };
            let model = Transformer::new(&config, 3, &device).unwrap();
            let full: f32 = model.loss(&batch, None).into_scalar();
            let model = model.with_fake_quant(format, learned);
            assert!(model.has_fake_quant());
            let loss: f32 = model.loss(&batch, None).into_scalar();
            assert!((loss - full).abs() > 1e-4, "{loss}, without {full}");
            // Every weight gets a gradient, and every step.
            let grads = model.loss(&batch, Some(0)).backward();
            for block in &model.blocks {
                let linear = &block.attn.out;
                assert!(linear.weight.val().grad(&grads).is_some());
                let steps = linear.quantizer.as_ref().unwrap().steps.as_ref();
                assert_eq!(steps.map(|steps| steps.val().grad(&grads).unwrap().dims()), learned.then_some([2 * 64]));
            }
            let steps = model.quantizer_steps();
            assert_eq!(steps.len(), 8);
            assert_eq!((steps[3].0.as_str(), steps[3].1.len()), ("blocks.0.mlp.output.weight", 3 * 64));
            let plain = model.quantized();
            assert!(!plain.has_fake_quant() && plain.blocks[0].attn.qkv.weight.is_require_grad());
            assert_eq!(plain.loss(&batch, None).into_scalar::<f32>(), loss);
        }
    }
}
