//! DistilBERT (Sanh et al., arXiv:1910.01108): BERT without token types and pooler.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Names, Pair};
use super::{Classes, HfError, bert};
use crate::transformer::config::{EncoderConfig, FeedForward, TransformerConfig};
use crate::transformer::head::{Head, Pooler};

const NAMES: Names = Names {
    base: "distilbert.",
    transposed: true,
    body: &[
        ("embed", &["embeddings.word_embeddings"]),
        ("positions", &["embeddings.position_embeddings"]),
        ("embed_norm", &["embeddings.LayerNorm"]),
        (
            "blocks.#.attn.qkv",
            &[
                "transformer.layer.#.attention.q_lin",
                "transformer.layer.#.attention.k_lin",
                "transformer.layer.#.attention.v_lin",
            ],
        ),
        ("blocks.#.attn.out", &["transformer.layer.#.attention.out_lin"]),
        ("blocks.#.attn_norm", &["transformer.layer.#.sa_layer_norm"]),
        ("blocks.#.mlp.input", &["transformer.layer.#.ffn.lin1"]),
        ("blocks.#.mlp.output", &["transformer.layer.#.ffn.lin2"]),
        ("blocks.#.mlp_norm", &["transformer.layer.#.output_layer_norm"]),
    ],
    head: &[],
    heads: &["vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", "classifier."],
    copies: &[],
    buffers: &["position_ids"],
};

/// Its classes have no key for it.
const NORM_EPS: f64 = 1e-12;

pub(super) struct DistilBert;

impl Classes for DistilBert {
    fn model_types(&self) -> &'static [&'static str] {
        &["distilbert"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        bert::is_like_bert(config, Pooler::Relu)
            && config.reduction.is_none()
            && config.encoder.is_some_and(|encoder| encoder.token_types == 0 && encoder.position_offset == 0)
            && config.norm_eps == NORM_EPS
    }

    fn names(&self, config: &TransformerConfig) -> Names {
        let head: &[Pair] = match config.head {
            Head::Masked => &[
                ("head", &["vocab_projector"]),
                ("task_head.dense", &["vocab_transform"]),
                ("task_head.norm", &["vocab_layer_norm"]),
                ("task_head.bias", &["vocab_projector.bias"]),
            ],
            _ => &[("task_head.dense", &["pre_classifier"]), ("task_head.output", &["classifier"])],
        };
        Names { head, ..NAMES }
    }

    fn pooler(&self) -> Pooler {
        Pooler::Relu
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        let encoder = EncoderConfig { norm_after: true, embed_norm: true, token_types: 0, position_offset: 0 };
        Ok(TransformerConfig {
            d_ff: keys.count("hidden_dim")?,
            n_layers: keys.count("n_layers")?,
            norm_eps: NORM_EPS,
            feed_forward: keys.gelu("activation", FeedForward::GeluExact)?,
            dropout: keys.number_or("dropout", 0.1)?,
            ..keys.encoder(encoder, "dim", "n_heads")?
        })
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let json = json!({
            "model_type": "distilbert",
            "vocab_size": config.vocab_size,
            "dim": config.d_model,
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "hidden_dim": config.d_ff,
            "activation": if config.feed_forward == FeedForward::GeluExact { "gelu" } else { "gelu_new" },
            "max_position_embeddings": config.context,
            "sinusoidal_pos_embds": false,
            "dropout": config.dropout,
            "attention_dropout": 0.0,
            "seq_classif_dropout": config.dropout,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied,
            "torch_dtype": "float32",
        });
        ("DistilBert", json)
    }
}
