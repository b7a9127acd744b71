//! ViT (Dosovitskiy et al., arXiv:2010.11929).

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::Names;
use super::{Classes, Entry, HfError, has_blocks_of_vaswani};
use crate::transformer::config::{EncoderConfig, FeedForward, ImageConfig, NormKind, Positions, TransformerConfig};
use crate::transformer::head::{Head, Pooler};
use crate::transformer::presets;

const NAMES: Names = Names {
    base: "vit.",
    transposed: true,
    body: &[
        ("embed", &["embeddings.patch_embeddings.projection"]),
        ("patches.bias", &["embeddings.patch_embeddings.projection.bias"]),
        ("patches.class", &["embeddings.cls_token"]),
        ("positions.weight", &["embeddings.position_embeddings"]),
        ("blocks.#.attn_norm", &["encoder.layer.#.layernorm_before"]),
        (
            "blocks.#.attn.qkv",
            &[
                "encoder.layer.#.attention.attention.query",
                "encoder.layer.#.attention.attention.key",
                "encoder.layer.#.attention.attention.value",
            ],
        ),
        ("blocks.#.attn.out", &["encoder.layer.#.attention.output.dense"]),
        ("blocks.#.mlp_norm", &["encoder.layer.#.layernorm_after"]),
        ("blocks.#.mlp.input", &["encoder.layer.#.intermediate.dense"]),
        ("blocks.#.mlp.output", &["encoder.layer.#.output.dense"]),
        ("norm", &["layernorm"]),
    ],
    head: &[("task_head.output", &["classifier"])],
    heads: &["classifier."],
    copies: &[],
    buffers: &[],
};

pub(super) struct Vit;

impl Classes for Vit {
    fn model_types(&self) -> &'static [&'static str] {
        &["vit"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        has_blocks_of_vaswani(config)
            && config.reduction.is_none()
            && config.positions == Positions::Learned
            && config.image.is_some_and(|image| image.bias)
            && config.encoder == Some(EncoderConfig::default())
            && config.head.is_of_an_encoder(Pooler::First)
    }

    fn names(&self, _: &TransformerConfig) -> Names {
        NAMES
    }

    fn pooler(&self) -> Pooler {
        Pooler::First
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        keys.vit()
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let mut json = json!({
            "model_type": "vit",
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "intermediate_size": config.d_ff,
            "hidden_act": if config.feed_forward == FeedForward::GeluExact { "gelu" } else { "gelu_new" },
            "layer_norm_eps": config.norm_eps,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": config.init_std,
            "qkv_bias": true,
            "torch_dtype": "float32",
        });
        if let Some(ImageConfig { size, patch, channels, .. }) = config.image {
            for (key, value) in [("image_size", size), ("patch_size", patch), ("num_channels", channels)] {
                json[key] = value.into();
            }
        }
        ("ViT", json)
    }
}

/// A parameter of a model of images, whose matrix of patches is a convolution's `[D, C, p, p]`, and whose positions and class token stand for a batch of one.
pub(super) fn of_images(mut entry: Entry, image: &ImageConfig) -> Entry {
    let (param, shape) = (entry.param.as_str(), &entry.shape);
    if let [piece] = &mut entry.pieces[..] {
        match (param, &shape[..]) {
            ("embed.weight", &[_, d]) => {
                piece.shape = vec![d, image.channels, image.patch, image.patch];
                piece.transposed = true;
            }
            ("positions.weight", &[rows, d]) => piece.shape = vec![1, rows, d],
            ("patches.class", &[d]) => piece.shape = vec![1, 1, d],
            _ => {}
        }
    }
    entry
}

impl Keys<'_> {
    fn vit(&self) -> Result<TransformerConfig, HfError> {
        if !self.flag_or("qkv_bias", true)? {
            return Err(HfError::Unsupported { key: "qkv_bias", got: "false".into() });
        }
        let count = |key: &str, default| Ok::<_, HfError>(self.count_or(key)?.unwrap_or(default));
        let image = ImageConfig {
            size: count("image_size", 224)?,
            patch: count("patch_size", 16)?,
            channels: count("num_channels", 3)?,
            bias: true,
        };
        for (key, side) in [("image_size", image.size), ("patch_size", image.patch), ("num_channels", image.channels)] {
            // Small enough to multiply.
            if !(1..=1 << 14).contains(&side) {
                return Err(HfError::Key { key: key.into(), expected: "from 1 to 16384", got: side.to_string() });
            }
        }
        let (d_model, n_heads) = (self.count("hidden_size")?, self.count("num_attention_heads")?);
        if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
            let (key, got) = ("num_attention_heads".into(), format!("{n_heads} for hidden_size = {d_model}"));
            return Err(HfError::Key { key, expected: "a divisor of the width", got });
        }
        Ok(TransformerConfig {
            vocab_size: image.patch_values(),
            d_model,
            n_layers: self.count("num_hidden_layers")?,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            d_ff: self.count("intermediate_size")?,
            context: image.tokens(),
            norm: NormKind::LayerNorm,
            norm_eps: self.number_or("layer_norm_eps", 1e-12)?,
            feed_forward: self.gelu("hidden_act", FeedForward::GeluExact)?,
            positions: Positions::Learned,
            bias: true,
            encoder: Some(EncoderConfig::default()),
            image: Some(image),
            head: Head::Hidden,
            tied: true,
            dropout: self.number_or("hidden_dropout_prob", 0.0)?,
            init_std: self.number_or("initializer_range", 0.02)?,
            ..presets::depth(1, 1)
        })
    }
}
