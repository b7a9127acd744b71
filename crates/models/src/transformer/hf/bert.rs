//! BERT (Devlin et al., arXiv:1810.04805), and MiniLM (Wang et al., arXiv:2002.10957), which is a small BERT; and what its relatives RoBERTa and ALBERT have in common with it.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Names, Pair};
use super::{Classes, HfError, is_vaswani};
use crate::transformer::config::{EncoderConfig, FeedForward, NormKind, Positions, TransformerConfig};
use crate::transformer::head::{Head, Pooler};
use crate::transformer::reduction::Reduction;

pub(super) const NAMES: Names = Names {
    base: "bert.",
    transposed: true,
    body: &[
        ("embed", &["embeddings.word_embeddings"]),
        ("positions", &["embeddings.position_embeddings"]),
        ("token_types", &["embeddings.token_type_embeddings"]),
        ("embed_norm", &["embeddings.LayerNorm"]),
        (
            "blocks.#.attn.qkv",
            &[
                "encoder.layer.#.attention.self.query",
                "encoder.layer.#.attention.self.key",
                "encoder.layer.#.attention.self.value",
            ],
        ),
        ("blocks.#.attn.out", &["encoder.layer.#.attention.output.dense"]),
        ("blocks.#.attn_norm", &["encoder.layer.#.attention.output.LayerNorm"]),
        ("blocks.#.mlp.input", &["encoder.layer.#.intermediate.dense"]),
        ("blocks.#.mlp.output", &["encoder.layer.#.output.dense"]),
        ("blocks.#.mlp_norm", &["encoder.layer.#.output.LayerNorm"]),
    ],
    head: &[],
    heads: &["cls.", "classifier."],
    copies: &[("cls.predictions.decoder.bias", "cls.predictions.bias")],
    buffers: &["position_ids"],
};

pub(super) struct Bert;

impl Classes for Bert {
    fn model_types(&self) -> &'static [&'static str] {
        &["bert"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        is_like_bert(config, Pooler::Tanh)
            && config.reduction.is_none()
            && config.encoder.is_some_and(|encoder| encoder.token_types > 0 && encoder.position_offset == 0)
    }

    fn names(&self, config: &TransformerConfig) -> Names {
        let head: &[Pair] = match config.head {
            Head::Masked => &[
                ("head", &["cls.predictions.decoder"]),
                ("task_head.dense", &["cls.predictions.transform.dense"]),
                ("task_head.norm", &["cls.predictions.transform.LayerNorm"]),
                ("task_head.bias", &["cls.predictions.bias"]),
            ],
            _ => &[("task_head.dense", &["pooler.dense"]), ("task_head.output", &["classifier"])],
        };
        Names { head, ..NAMES }
    }

    fn pooler(&self) -> Pooler {
        Pooler::Tanh
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        keys.like_bert(FeedForward::GeluExact, 2)
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        ("Bert", write("bert", config))
    }
}

/// Whether it is an encoder as these are, whose classifiers make one vector of a row like this.
pub(super) fn is_like_bert(config: &TransformerConfig, pooler: Pooler) -> bool {
    is_vaswani(config)
        && config.positions == Positions::Learned
        && config.encoder.is_some_and(|encoder| encoder.norm_after && encoder.embed_norm)
        && config.head.is_of_an_encoder(pooler)
}

/// The keys that all three have.
pub(super) fn write(model_type: &str, config: &TransformerConfig) -> Value {
    let encoder = config.encoder.unwrap_or_default();
    json!({
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": if config.feed_forward == FeedForward::GeluExact { "gelu" } else { "gelu_new" },
        "max_position_embeddings": config.context + encoder.position_offset,
        "type_vocab_size": encoder.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    })
}

impl Keys<'_> {
    /// What all three have; `activation` and `types` stand where the file says nothing.
    pub(super) fn like_bert(&self, activation: FeedForward, types: usize) -> Result<TransformerConfig, HfError> {
        self.only("position_embedding_type", &["absolute"])?;
        for key in ["is_decoder", "add_cross_attention"] {
            if self.flag_or(key, false)? {
                return Err(HfError::Unsupported { key, got: "true".into() });
            }
        }
        let encoder = EncoderConfig {
            norm_after: true,
            embed_norm: true,
            token_types: self.count_or("type_vocab_size")?.unwrap_or(types),
            position_offset: 0,
        };
        Ok(TransformerConfig {
            d_ff: self.count("intermediate_size")?,
            n_layers: self.count("num_hidden_layers")?,
            norm_eps: self.number_or("layer_norm_eps", 1e-12)?,
            feed_forward: self.gelu("hidden_act", activation)?,
            dropout: self.number_or("hidden_dropout_prob", 0.1)?,
            ..self.encoder(encoder, "hidden_size", "num_attention_heads")?
        })
    }

    /// An encoder with the keys that all families have, and values for the others.
    pub(super) fn encoder(
        &self,
        encoder: EncoderConfig,
        width: &str,
        heads: &'static str,
    ) -> Result<TransformerConfig, HfError> {
        if self.0.get("pruned_heads").and_then(Value::as_object).is_some_and(|heads| !heads.is_empty()) {
            let got = self.0["pruned_heads"].to_string();
            return Err(HfError::Unsupported { key: "pruned_heads", got });
        }
        let (d_model, n_heads) = (self.count(width)?, self.count(heads)?);
        if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
            let (key, got) = (heads.into(), format!("{n_heads} for {width} = {d_model}"));
            return Err(HfError::Key { key, expected: "a divisor of the width", got });
        }
        Ok(TransformerConfig {
            vocab_size: self.count("vocab_size")?,
            d_model,
            n_layers: 0,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            d_ff: 0,
            context: self.count("max_position_embeddings")?,
            window: None,
            qk_norm: false,
            attention_softcap: 0.0,
            logit_softcap: 0.0,
            qkv_bias: false,
            rope_scaling: None,
            encoder: Some(encoder),
            image: None,
            head: Head::Hidden,
            labels: vec![],
            experts: None,
            reduction: Reduction::default(),
            norm: NormKind::LayerNorm,
            norm_eps: 1e-12,
            feed_forward: FeedForward::GeluExact,
            positions: Positions::Learned,
            bias: true,
            adapter: None,
            tied: self.flag_or("tie_word_embeddings", true)?,
            dropout: 0.0,
            init_std: self.number_or("initializer_range", 0.02)?,
        })
    }

    /// The activation: one of the two forms of GELU.
    pub(super) fn gelu(&self, key: &'static str, default: FeedForward) -> Result<FeedForward, HfError> {
        self.only(key, &["gelu", "gelu_new", "gelu_pytorch_tanh"])?;
        Ok(match self.0.get(key).and_then(Value::as_str) {
            None => default,
            Some("gelu") => FeedForward::GeluExact,
            Some(_) => FeedForward::Gelu,
        })
    }
}
