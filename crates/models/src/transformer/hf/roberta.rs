//! RoBERTa (Liu et al., arXiv:1907.11692), and XLM-R and CamemBERT, which are RoBERTas of other vocabularies.

use serde_json::{Value, json};

use super::bert;
use super::keys::Keys;
use super::names::{Names, Pair};
use super::{Classes, HfError};
use crate::transformer::config::{EncoderConfig, FeedForward, TransformerConfig};
use crate::transformer::head::{Head, Pooler};

const NAMES: Names = Names {
    base: "roberta.",
    heads: &["lm_head.", "classifier."],
    copies: &[("lm_head.decoder.bias", "lm_head.bias")],
    ..bert::NAMES
};

pub(super) struct Roberta;

impl Classes for Roberta {
    fn model_types(&self) -> &'static [&'static str] {
        &["roberta", "xlm-roberta", "camembert"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        bert::is_like_bert(config, Pooler::Tanh)
            && config.reduction.is_none()
            && config.encoder.is_some_and(|encoder| encoder.token_types > 0 && encoder.position_offset > 0)
            // The head of its masked language model always has the exact form.
            && config.feed_forward == FeedForward::GeluExact
    }

    fn names(&self, config: &TransformerConfig) -> Names {
        let head: &[Pair] = match config.head {
            Head::Masked => &[
                ("head", &["lm_head.decoder"]),
                ("task_head.dense", &["lm_head.dense"]),
                ("task_head.norm", &["lm_head.layer_norm"]),
                ("task_head.bias", &["lm_head.bias"]),
            ],
            Head::TokenClasses { .. } => &[("task_head.output", &["classifier"])],
            _ => &[("task_head.dense", &["classifier.dense"]), ("task_head.output", &["classifier.out_proj"])],
        };
        Names { head, ..NAMES }
    }

    fn pooler(&self) -> Pooler {
        Pooler::Tanh
    }

    fn read(&self, _: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        keys.only("hidden_act", &["gelu"])?;
        let config = keys.like_bert(FeedForward::GeluExact, 2)?;
        // The first token's position is the one after padding's.
        let position_offset = keys.count_or("pad_token_id")?.unwrap_or(1).saturating_add(1);
        let Some(context) = config.context.checked_sub(position_offset) else {
            let (key, got) = ("max_position_embeddings".into(), config.context.to_string());
            return Err(HfError::Key { key, expected: "more than pad_token_id + 1", got });
        };
        let encoder = config.encoder.map(|encoder| EncoderConfig { position_offset, ..encoder });
        Ok(TransformerConfig { context, encoder, ..config })
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let mut json = bert::write("roberta", config);
        json["pad_token_id"] = json!(config.encoder.map_or(1, |encoder| encoder.position_offset - 1));
        ("Roberta", json)
    }
}
