//! ALBERT (Lan et al., arXiv:1909.11942): BERT whose layers share blocks, and whose embedding is narrower than the model.

use serde_json::{Value, json};

use super::keys::Keys;
use super::names::{Names, Pair};
use super::{Classes, HfError, bert};
use crate::transformer::config::{FeedForward, TransformerConfig};
use crate::transformer::head::{Head, Pooler};
use crate::transformer::reduction::Reduction;

const NAMES: Names = Names {
    base: "albert.",
    transposed: true,
    body: &[
        ("embed", &["embeddings.word_embeddings"]),
        ("positions", &["embeddings.position_embeddings"]),
        ("token_types", &["embeddings.token_type_embeddings"]),
        ("embed_norm", &["embeddings.LayerNorm"]),
        ("embed_proj", &["encoder.embedding_hidden_mapping_in"]),
        (
            "blocks.#.attn.qkv",
            &[
                "encoder.albert_layer_groups.#.albert_layers.0.attention.query",
                "encoder.albert_layer_groups.#.albert_layers.0.attention.key",
                "encoder.albert_layer_groups.#.albert_layers.0.attention.value",
            ],
        ),
        ("blocks.#.attn.out", &["encoder.albert_layer_groups.#.albert_layers.0.attention.dense"]),
        ("blocks.#.attn_norm", &["encoder.albert_layer_groups.#.albert_layers.0.attention.LayerNorm"]),
        ("blocks.#.mlp.input", &["encoder.albert_layer_groups.#.albert_layers.0.ffn"]),
        ("blocks.#.mlp.output", &["encoder.albert_layer_groups.#.albert_layers.0.ffn_output"]),
        ("blocks.#.mlp_norm", &["encoder.albert_layer_groups.#.albert_layers.0.full_layer_layer_norm"]),
    ],
    head: &[],
    heads: &["predictions.", "sop_classifier.", "classifier."],
    copies: &[("predictions.decoder.bias", "predictions.bias")],
    buffers: &["position_ids"],
};

pub(super) struct Albert;

impl Classes for Albert {
    fn model_types(&self) -> &'static [&'static str] {
        &["albert"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        let Reduction { layers_per_block, embed_dim, .. } = config.reduction;
        bert::is_like_bert(config, Pooler::Tanh)
            // It always has the projection.
            && embed_dim > 0
            && config.reduction == Reduction { layers_per_block, embed_dim, ..Reduction::default() }
            && config.encoder.is_some_and(|encoder| encoder.token_types > 0 && encoder.position_offset == 0)
    }

    fn names(&self, config: &TransformerConfig) -> Names {
        let head: &[Pair] = match config.head {
            Head::Masked => &[
                ("head", &["predictions.decoder"]),
                ("task_head.dense", &["predictions.dense"]),
                ("task_head.norm", &["predictions.LayerNorm"]),
                ("task_head.bias", &["predictions.bias"]),
            ],
            _ => &[("task_head.dense", &["pooler"]), ("task_head.output", &["classifier"])],
        };
        Names { head, ..NAMES }
    }

    fn pooler(&self) -> Pooler {
        Pooler::Tanh
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        let config = keys.like_bert(FeedForward::Gelu, 2)?;
        let unsupported = |key, got: usize| Err(HfError::Unsupported { key, got: got.to_string() });
        let inner = keys.count_or("inner_group_num")?.unwrap_or(1);
        if inner != 1 {
            return unsupported("inner_group_num", inner);
        }
        let groups = keys.count_or("num_hidden_groups")?.unwrap_or(1);
        if groups == 0 || !config.n_layers.is_multiple_of(groups) {
            return unsupported("num_hidden_groups", groups);
        }
        let embed_dim = keys.count_or("embedding_size")?.unwrap_or(128);
        if embed_dim >= config.d_model {
            return unsupported("embedding_size", embed_dim);
        }
        let reduction = Reduction { layers_per_block: config.n_layers / groups, embed_dim, ..Reduction::default() };
        Ok(TransformerConfig { reduction, dropout: keys.number_or("hidden_dropout_prob", 0.0)?, ..config })
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let mut json = bert::write("albert", config);
        json["embedding_size"] = config.embed_width().into();
        json["num_hidden_groups"] = config.n_blocks().into();
        json["inner_group_num"] = 1.into();
        json["classifier_dropout_prob"] = json!(config.dropout);
        ("Albert", json)
    }
}
