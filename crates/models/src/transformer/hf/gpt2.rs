//! GPT-2 (Radford et al., 2019).

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Names, Pair};
use super::{Classes, HfError, is_vaswani};
use crate::transformer::config::{FeedForward, NormKind, Positions, TransformerConfig};
use crate::transformer::head::{Head, Pooler};
use crate::transformer::reduction::Reduction;

const NAMES: Names = Names {
    base: "transformer.",
    // `Conv1D` has `[in, out]`, as we have.
    transposed: false,
    body: &[
        ("embed", &["wte"]),
        ("positions", &["wpe"]),
        ("blocks.#.attn_norm", &["h.#.ln_1"]),
        ("blocks.#.attn.qkv", &["h.#.attn.c_attn"]),
        ("blocks.#.attn.out", &["h.#.attn.c_proj"]),
        ("blocks.#.mlp_norm", &["h.#.ln_2"]),
        ("blocks.#.mlp.input", &["h.#.mlp.c_fc"]),
        ("blocks.#.mlp.output", &["h.#.mlp.c_proj"]),
        ("norm", &["ln_f"]),
        ("head", &["lm_head"]),
    ],
    head: &[],
    heads: &["lm_head.", "score.", "classifier."],
    copies: &[],
    buffers: &[".attn.bias", ".attn.masked_bias"],
};

pub(super) struct Gpt2;

impl Classes for Gpt2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt2"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        is_vaswani(config)
            && config.encoder.is_none()
            && config.reduction.is_none()
            && config.positions == Positions::Learned
            && config.head.is_of_a_decoder()
    }

    fn names(&self, config: &TransformerConfig) -> Names {
        let head: &[Pair] = match config.head {
            Head::TokenClasses { .. } => &[("task_head.output", &["classifier"])],
            _ => &[("task_head.output", &["score"])],
        };
        Names { head, ..NAMES }
    }

    fn pooler(&self) -> Pooler {
        Pooler::Last
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        keys.gpt2()
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let json = json!({
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.context,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.d_ff,
            "activation_function": if config.feed_forward == FeedForward::GeluExact { "gelu" } else { "gelu_new" },
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
            "initializer_range": config.init_std,
            "torch_dtype": "float32",
        });
        ("GPT2", json)
    }
}

impl Keys<'_> {
    fn gpt2(&self) -> Result<TransformerConfig, HfError> {
        self.only("activation_function", &["gelu_new", "gelu_pytorch_tanh", "gelu"])?;
        if !self.flag_or("scale_attn_weights", true)? {
            return Err(HfError::Unsupported { key: "scale_attn_weights", got: "false".into() });
        }
        if self.flag_or("scale_attn_by_inverse_layer_idx", false)? {
            return Err(HfError::Unsupported { key: "scale_attn_by_inverse_layer_idx", got: "true".into() });
        }
        let (d_model, n_heads) = (self.count("n_embd")?, self.count("n_head")?);
        if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
            return Err(HfError::Key {
                key: "n_head".into(),
                expected: "a divisor of n_embd",
                got: n_heads.to_string(),
            });
        }
        Ok(TransformerConfig {
            vocab_size: self.count("vocab_size")?,
            d_model,
            n_layers: self.count("n_layer")?,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            d_ff: self.count_or("n_inner")?.unwrap_or(4 * d_model),
            context: self.count("n_positions")?,
            window: None,
            qk_norm: false,
            attention_softcap: 0.0,
            logit_softcap: 0.0,
            qkv_bias: false,
            rope_scaling: None,
            encoder: None,
            image: None,
            head: Head::default(),
            labels: vec![],
            experts: None,
            reduction: Reduction::default(),
            norm: NormKind::LayerNorm,
            norm_eps: self.number_or("layer_norm_epsilon", 1e-5)?,
            feed_forward: match self.0.get("activation_function") {
                Some(Value::String(s)) if s == "gelu" => FeedForward::GeluExact,
                _ => FeedForward::Gelu,
            },
            positions: Positions::Learned,
            bias: true,
            adapter: None,
            tied: self.flag_or("tie_word_embeddings", true)?,
            dropout: self.number_or("resid_pdrop", 0.1)?,
            init_std: self.number_or("initializer_range", 0.02)?,
        })
    }
}
