//! Blocks alone: parts of models whose rows are no tokens of a table.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::ops::{self, AttentionConfig, Sequence};
use firebox_tensor::random::{Counter, normal};

use super::config::{ConfigError, EncoderConfig, FeedForward, NormKind, Positions, TransformerConfig};
use super::head::Head;
use super::model::{Block, Init, Linear, Norm, Transformer};
use super::presets;
use super::reduction::Layer;

/// What a [`Trunk`] is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrunkShape {
    /// D
    pub d_model: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Heads, which split D.
    pub n_heads: usize,
    /// Feed-forward width.
    pub d_ff: usize,
    /// Added to the variance in norms.
    pub norm_eps: f64,
    /// Standard deviation of initial weights.
    pub init_std: f64,
}

impl TrunkShape {
    fn config(&self) -> TransformerConfig {
        let Self { d_model, n_layers, n_heads, d_ff, norm_eps, init_std } = *self;
        TransformerConfig {
            d_model,
            n_layers,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads.max(1),
            d_ff,
            norm: NormKind::LayerNorm,
            norm_eps,
            feed_forward: FeedForward::GeluExact,
            positions: Positions::Learned,
            bias: true,
            encoder: Some(EncoderConfig::default()),
            head: Head::Hidden,
            init_std,
            ..presets::depth(1, 1)
        }
    }

    /// Checks that the shape is possible.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.config().validate()?;
        if !self.d_model.is_multiple_of(self.n_heads) {
            let expected = format!("must divide d_model = {}", self.d_model);
            return Err(ConfigError { field: "n_heads", got: self.n_heads.to_string(), expected });
        }
        Ok(())
    }

    /// Floating-point operations of forward and backward per row of `D`, among `tokens` of them.
    pub fn flops_per_token(&self, tokens: usize) -> f64 {
        let config = TransformerConfig { context: tokens, ..self.config() };
        self.n_layers as f64 * config.block_flops_per_token()
    }
}

/// The blocks of an encoder and its final norm, without embedding and head. Whole on each rank, and without dropout.
#[derive(Module, Debug)]
pub struct Trunk {
    /// The blocks.
    pub blocks: Vec<Block>,
    /// After the last of them.
    pub norm: Norm,
    #[module(skip)]
    attention: AttentionConfig,
}

impl Trunk {
    /// Blocks in ViT's way (Dosovitskiy et al., arXiv:2010.11929, section 3.1: LayerNorm before each part, exact GELU, biases). `counter` makes the initial values.
    ///
    /// # Errors
    /// [`ConfigError`] for an impossible shape.
    pub fn new(shape: &TrunkShape, counter: Counter, device: &Device) -> Result<Self, ConfigError> {
        shape.validate()?;
        let config = shape.config();
        let init = Init::new(&config, counter, device, (0, 1), None);
        Ok(Self {
            blocks: (0..config.n_layers).map(|i| init.block(i, &config)).collect(),
            norm: init.norm(config.d_model),
            attention: AttentionConfig {
                n_heads: config.n_heads,
                n_kv_heads: config.n_heads,
                head_dim: config.head_dim,
                window: None,
                softcap: 0.0,
                rope: None,
            },
        })
    }

    /// Block `i`, `[B, T, D] -> [B, T, D]`.
    ///
    /// # Panics
    /// If there are fewer blocks.
    pub fn block(&self, i: usize, x: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        let layer = Layer { block: &self.blocks[i], deltas: None, norm_after: false };
        let y = ops::attention(layer.project(x.clone(), &self.attention), &self.attention, sequence);
        let x = layer.attention_output(y, Some(x));
        layer.feed_forward(x.clone(), Some(x), None)
    }

    /// All blocks and the norm.
    pub fn forward(&self, x: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        let x = (0..self.blocks.len()).fold(x, |x, i| self.block(i, x, sequence));
        self.norm.forward(x)
    }
}

fn fixed<const D: usize>(shape: [usize; D], values: Vec<f32>, device: Device) -> Param<Tensor<D>> {
    let init = move |device: &Device, require_grad| {
        Tensor::from_data(TensorData::new(values.clone(), shape), device).set_require_grad(require_grad)
    };
    Param::uninitialized(ParamId::new(), init, device, false, shape.into())
}

impl Transformer {
    /// The same model with these learned positions, `[context, D]`, which are then not trained.
    ///
    /// # Panics
    /// If positions are not learned, or not as many.
    pub fn with_fixed_positions(mut self, values: Vec<f32>) -> Self {
        let shape = self.config().positions_shape();
        assert_eq!(values.len(), shape[0] * shape[1], "positions of {shape:?}");
        let positions = self.positions.as_mut();
        // PANIC: as documented.
        let table = positions.expect("a model with learned positions");
        table.weight = fixed(shape, values, table.weight.lazy_device());
        self
    }
}

/// Makes initial values of what models have beside trunks.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub counter: Counter,
    pub device: &'a Device,
    /// Standard deviation.
    pub std: f64,
}

impl Parts<'_> {
    /// Normal numbers, which depend on seed, name and place alone.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Param<Tensor<2>> {
        let (counter, std) = (self.counter.fork(name), self.std);
        self.param(shape, move |i| (f64::from(normal(counter, i as u64)) * std) as f32)
    }

    /// A layer with a bias of zeros.
    pub fn linear(&self, name: &str, shape: [usize; 2]) -> Linear {
        Linear::new(self.matrix(name, shape), Some(self.param([shape[1]], |_| 0.0)))
    }

    /// Values by place, which are made when they are first used.
    fn param<const D: usize>(
        &self,
        shape: [usize; D],
        value: impl Fn(usize) -> f32 + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        let init = move |device: &Device, require_grad| {
            let values: Vec<f32> = (0..shape.iter().product()).map(&value).collect();
            Tensor::from_data(TensorData::new(values, shape), device).set_require_grad(require_grad)
        };
        Param::uninitialized(ParamId::new(), init, self.device.clone(), true, shape.into())
    }

    /// Values that are not trained.
    pub fn fixed<const D: usize>(&self, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        fixed(shape, values, self.device.clone())
    }
}
