//! The shape of a decoder.

use serde::{Deserialize, Serialize};

use super::adapter::AdapterConfig;
use super::experts::ExpertsConfig;
use super::head::Head;
use super::reduction::Reduction;

/// A decoder's shape; every value is resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerConfig {
    /// V: number of tokens; of images, values of a patch.
    pub vocab_size: usize,
    /// D: width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// H: query heads; divides D unless `head_dim` is given.
    pub n_heads: usize,
    /// K: key-value heads; divides H.
    pub n_kv_heads: usize,
    /// E: width of a head.
    pub head_dim: usize,
    /// F: width of the feed-forward layer, or of each expert.
    pub d_ff: usize,
    /// Tokens per row: the longest sequence.
    pub context: usize,
    /// How many tokens a query sees at most, itself included; the whole row if `None` (Mistral's sliding window, arXiv:2310.06825).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Whether every head's queries and keys go through an RMSNorm before they are rotated (see [`qk_norm`](firebox_tensor::ops::qk_norm)).
    #[serde(default, skip_serializing_if = "is_false")]
    pub qk_norm: bool,
    /// Soft-cap of attention scores (see [`soft_cap`](firebox_tensor::ops::soft_cap)); 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attention_softcap: f64,
    /// Soft-cap of the logits; 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub logit_softcap: f64,
    /// Experts in place of each block's feed-forward layer; none for a dense model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsConfig>,
    /// Parameters that layers share, and matrices that are products of smaller ones; by default none.
    #[serde(default, skip_serializing_if = "Reduction::is_none")]
    pub reduction: Reduction,
    /// Normalization before each part and at the end.
    pub norm: NormKind,
    /// Added to the variance.
    pub norm_eps: f64,
    /// Feed-forward layer.
    pub feed_forward: FeedForward,
    /// How positions enter.
    pub positions: Positions,
    /// Whether linear layers and LayerNorm have biases.
    pub bias: bool,
    /// Whether q, k and v have biases where other linear layers have none (Qwen 2).
    #[serde(default, skip_serializing_if = "is_false")]
    pub qkv_bias: bool,
    /// How rotary angles are stretched to longer contexts than a model was first trained for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// What makes it an encoder; none of a causal decoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder: Option<EncoderConfig>,
    /// Patches of images in place of tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageConfig>,
    /// What follows the last block.
    #[serde(default, skip_serializing_if = "Head::is_language")]
    pub head: Head,
    /// Adapters, which are trained in place of everything else; by default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// Whether the head's weight is the embedding's.
    pub tied: bool,
    /// Probability of dropping an element after the embedding and before each residual addition.
    pub dropout: f64,
    /// Standard deviation of initial weights; those that write to the residual stream get `init_std / sqrt(2 n_layers)` (GPT-2, section 2.3).
    pub init_std: f64,
}

// What is off is not written, so that files stay as they were before there was a choice.
fn is_false(flag: &bool) -> bool {
    !*flag
}
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// How rotary angles are stretched.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Positions are divided by a factor (Chen et al., arXiv:2306.15595).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Slow turns are divided by a factor, fast ones are not, and those between in part (Llama 3.1; Grattafiori et al., arXiv:2407.21783).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Turns that fit fewer times than this into `original_context` are slow.
        low_freq_factor: f64,
        /// Turns that fit more often than this are fast.
        high_freq_factor: f64,
        /// The context that the model was first trained for.
        original_context: usize,
    },
}

/// What an encoder has that a decoder has not: its tokens see each other in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncoderConfig {
    /// Norms follow each residual addition (Vaswani et al., arXiv:1706.03762), as in BERT, and none follows the last block; otherwise they stand before each part, as in GPT-2 and ViT.
    pub norm_after: bool,
    /// A norm after the embedding (BERT, CLIP's image tower).
    pub embed_norm: bool,
    /// Number of token types, each with a learned vector that is added to the embedding (BERT's two sentences); 0: none.
    pub token_types: usize,
    /// Rows of the table of learned positions before that of the first token, which nothing uses (RoBERTa: 2).
    #[serde(skip_serializing_if = "is_none")]
    pub position_offset: usize,
}

fn is_none(n: &usize) -> bool {
    *n == 0
}

/// Images as rows of patches (Dosovitskiy et al., arXiv:2010.11929), before which a class token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Pixels on a side.
    pub size: usize,
    /// Pixels on a side of a patch; divides `size`.
    pub patch: usize,
    /// Values of a pixel: 3, or 1 for grey.
    pub channels: usize,
    /// Whether patches have a bias on their way into the model: ViT's have, CLIP's have not.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub bias: bool,
}

fn yes() -> bool {
    true
}
fn is_true(flag: &bool) -> bool {
    *flag
}

impl ImageConfig {
    /// How many patches an image has.
    pub fn patches(&self) -> usize {
        (self.size / self.patch.max(1)).pow(2)
    }

    /// How many values a patch has: rows of the embedding.
    pub fn patch_values(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Tokens of a row: the class token, and the patches.
    pub fn tokens(&self) -> usize {
        1 + self.patches()
    }

    /// How many values an image has.
    pub fn values(&self) -> usize {
        self.channels * self.size * self.size
    }

    fn validate(&self, config: &TransformerConfig) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: String| Err(ConfigError { field, got, expected });
        let ImageConfig { size, patch, channels, .. } = *self;
        if !(1..=1 << 14).contains(&size) {
            return fail("image.size", size.to_string(), "must be from 1 to 16384".into());
        }
        if patch == 0 || !size.is_multiple_of(patch) {
            return fail("image.patch", patch.to_string(), format!("must divide image.size = {size}"));
        }
        if !matches!(channels, 1 | 3) {
            return fail("image.channels", channels.to_string(), "must be 3, or 1 for grey".into());
        }
        if config.encoder.is_none_or(|encoder| encoder.token_types + encoder.position_offset > 0) {
            let expected = "must be there with image, without token_types and position_offset";
            return fail("encoder", format!("{:?}", config.encoder), expected.into());
        }
        let head = config.head;
        if head.has_table() || matches!(head, Head::TokenClasses { .. } | Head::Embedding { .. }) {
            return fail("head", format!("{head:?}"), "must be classes, values or hidden with image".into());
        }
        if config.positions != Positions::Learned {
            return fail("positions", format!("{:?}", config.positions), "must be learned with image".into());
        }
        if config.reduction.embed_dim > 0 {
            let expected = "must be 0 with image, whose patches are as wide as the model";
            return fail("embed_dim", config.reduction.embed_dim.to_string(), expected.into());
        }
        for (field, got, expected) in
            [("context", config.context, self.tokens()), ("vocab_size", config.vocab_size, self.patch_values())]
        {
            if got != expected {
                let expected = format!("must be {expected} with image: its tokens, and the values of a patch");
                return fail(field, got.to_string(), expected);
            }
        }
        Ok(())
    }
}

/// A normalization.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// LayerNorm.
    LayerNorm,
    /// RMSNorm.
    RmsNorm,
}

/// A feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// Linear, GELU (tanh form), linear.
    Gelu,
    /// Linear, GELU (exact form), linear.
    GeluExact,
    /// Linear, `x sigmoid(1.702 x)`, linear (CLIP).
    QuickGelu,
    /// `silu(x gate) * (x up)`, linear.
    SwiGlu,
}

/// How positions enter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// A learned vector per position, added to the embedding.
    Learned,
    /// Rotary (rotate-half, as Hugging Face's Llama).
    Rotary {
        /// Base of the angles.
        theta: f64,
    },
}

/// A shape that no decoder can have.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("decoder config: {field} = {got}: {expected}")]
pub struct ConfigError {
    /// The value at fault.
    pub field: &'static str,
    /// What it is.
    pub got: String,
    /// What it should be.
    pub expected: String,
}

impl TransformerConfig {
    /// Checks that the shape is possible.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: String| Err(ConfigError { field, got, expected });
        let positive = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("n_layers", self.n_layers),
            ("n_heads", self.n_heads),
            ("n_kv_heads", self.n_kv_heads),
            ("head_dim", self.head_dim),
            ("d_ff", self.d_ff),
            ("context", self.context),
        ];
        for (field, value) in positive {
            if value == 0 {
                return fail(field, value.to_string(), "must be at least 1".into());
            }
            if value > i32::MAX as usize {
                return fail(field, value.to_string(), format!("must be at most {}", i32::MAX));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return fail("n_kv_heads", self.n_kv_heads.to_string(), format!("must divide n_heads = {}", self.n_heads));
        }
        if self.window == Some(0) {
            return fail("window", "0".into(), "must be at least 1: a query sees itself".into());
        }
        for (field, cap) in [("attention_softcap", self.attention_softcap), ("logit_softcap", self.logit_softcap)] {
            if cap != 0.0 && !(1e-3..=1e6).contains(&cap) {
                return fail(field, cap.to_string(), "must be 0 (none) or from 0.001 to 1000000".into());
            }
        }
        if let Some(experts) = &self.experts {
            experts.validate(self)?;
        }
        self.reduction.validate(self)?;
        self.validate_encoder()?;
        if let Some(image) = &self.image {
            image.validate(self)?;
        }
        self.head.validate(self)?;
        self.validate_adapter()?;
        if let Positions::Rotary { theta } = self.positions {
            if !self.head_dim.is_multiple_of(2) {
                return fail("head_dim", self.head_dim.to_string(), "must be even for rotary positions".into());
            }
            if !(theta.is_finite() && theta > 0.0) {
                return fail("positions.rotary.theta", theta.to_string(), "must be positive".into());
            }
        }
        self.validate_rope()?;
        if self.qkv_bias && self.bias {
            return fail("qkv_bias", "true".into(), "must be false with bias, which all linear layers have".into());
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return fail("norm_eps", self.norm_eps.to_string(), "must be positive".into());
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail("dropout", self.dropout.to_string(), "must be in [0, 1)".into());
        }
        if !(self.init_std.is_finite() && self.init_std > 0.0) {
            return fail("init_std", self.init_std.to_string(), "must be positive".into());
        }
        Ok(())
    }

    fn validate_encoder(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        let Some(encoder) = self.encoder else { return Ok(()) };
        if let Some(window) = self.window {
            return fail(
                "window",
                window.to_string(),
                "must not be there in an encoder, whose tokens see their whole row",
            );
        }
        if encoder.norm_after && self.experts.is_some() {
            return fail("encoder.norm_after", "true".into(), "must be false with n_experts");
        }
        if encoder.position_offset > 0 && self.positions != Positions::Learned {
            let got = encoder.position_offset.to_string();
            return fail("encoder.position_offset", got, "must be 0 unless positions are learned");
        }
        let largest = encoder.token_types.max(encoder.position_offset);
        if largest > i32::MAX as usize / 2 {
            return fail("encoder.token_types", largest.to_string(), "must be fewer");
        }
        Ok(())
    }

    /// Whether norms follow each residual addition.
    pub fn norm_after(&self) -> bool {
        self.encoder.is_some_and(|encoder| encoder.norm_after)
    }

    /// Rows and width of the table of learned positions: an encoder's is as wide as its rows of tokens.
    pub(super) fn positions_shape(&self) -> [usize; 2] {
        match self.encoder {
            Some(encoder) => [self.context + encoder.position_offset, self.embed_width()],
            None => [self.context, self.d_model],
        }
    }

    /// Rows of the table of token types.
    pub(super) fn token_types(&self) -> usize {
        self.encoder.map_or(0, |encoder| encoder.token_types)
    }

    /// Width of the packed projection `[q | k | v]`.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Whether the packed projection has a bias.
    pub fn has_qkv_bias(&self) -> bool {
        self.bias || self.qkv_bias
    }

    /// Width of the first feed-forward projection: `[gate | up]` for SwiGLU.
    pub fn ff_in_width(&self) -> usize {
        match self.feed_forward {
            FeedForward::Gelu | FeedForward::GeluExact | FeedForward::QuickGelu => self.d_ff,
            FeedForward::SwiGlu => 2 * self.d_ff,
        }
    }

    /// Number of parameters, without making the model: what layers share counts once.
    pub fn num_params(&self) -> usize {
        let d = self.d_model;
        let bias = |n: usize| if self.bias { n } else { 0 };
        let norm_of = |d: usize| d + if self.norm == NormKind::LayerNorm { bias(d) } else { 0 };
        let norm = norm_of(d);
        let head_norms = if self.qk_norm { 2 * self.head_dim } else { 0 };
        let [qkv, out, input, output] = self.matrices().map(|matrix| matrix.num_params() + bias(matrix.outputs));
        let mlp = self.experts.map_or(input + output, |experts| experts.num_params(d, input + output));
        let qkv = qkv + if self.qkv_bias { self.qkv_width() } else { 0 };
        let block = qkv + out + head_norms + mlp + 2 * norm;
        let deltas: usize = self.matrices().iter().map(|matrix| matrix.factors(self.reduction.delta_rank)).sum();
        let [embed, embed_proj, head, head_proj] = self.tables();
        let [rows, width] = self.positions_shape();
        let positions = if self.positions == Positions::Learned { rows * width } else { 0 };
        let types = self.token_types() * self.embed_width();
        let embed_norm = if self.encoder.is_some_and(|e| e.embed_norm) { norm_of(self.embed_width()) } else { 0 };
        let patches = self.image.map_or(0, |image| d * (1 + usize::from(image.bias)));
        let tables = embed + patches + embed_proj + head_proj + if self.tied { 0 } else { head };
        let task: usize = self.head_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let last = if self.norm_after() { 0 } else { norm };
        let blocks = self.n_blocks() * block + self.n_layers * deltas + self.adapter_params();
        tables + positions + types + embed_norm + blocks + last + task
    }

    /// Floating-point operations of forward and backward per token at full context: 6 per weight that a product uses (of experts, those of one token's; of a shared block, once in every
    /// layer), and 12 H E per layer and key that a query sees (Chowdhery et al., arXiv:2204.02311, appendix B): half of the tokens where attention is causal, fewer with a window, and all in an encoder.
    pub fn flops_per_token(&self) -> f64 {
        let [embed, embed_proj, head, head_proj] = self.tables();
        // Of tokens, rows are copied; of patches, there is a product.
        let patches = if self.image.is_some() { embed } else { 0 };
        let tables = self.flops_per_weight() * (patches + embed_proj + head + head_proj);
        self.n_layers as f64 * self.block_flops_per_token() + tables as f64
    }

    /// Forward, the gradient of the input, and, unless adapters are trained in its place, that of the weight.
    fn flops_per_weight(&self) -> usize {
        if self.adapter.is_some() { 4 } else { 6 }
    }

    /// Those of one block.
    pub(crate) fn block_flops_per_token(&self) -> f64 {
        let [qkv, out, input, output] =
            self.matrices().map(|matrix| matrix.num_params() + matrix.factors(self.reduction.delta_rank));
        let mlp = input + output;
        let mlp =
            self.experts.map_or(mlp, |experts| self.d_model * experts.n_experts + experts.experts_per_token * mlp);
        let weights = qkv + out + mlp;
        let (context, window) = (self.context as f64, self.window.unwrap_or(usize::MAX).min(self.context) as f64);
        let keys = if self.encoder.is_some() { context } else { window * (1.0 - window / (2.0 * context)) };
        let adapters = self.adapter_params() / self.n_blocks().max(1);
        (self.flops_per_weight() * weights + 6 * adapters) as f64 + (12 * self.n_heads * self.head_dim) as f64 * keys
    }
}
