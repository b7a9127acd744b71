//! Names, layouts and configs of Hugging Face: of GPT-2, Llama and its relatives, and of the encoders BERT, RoBERTa, DistilBERT, ALBERT and ViT.
//!
//! A family of classes is a file with a table of names (`names`), and the `config.json` in both directions. A parameter of ours is one tensor of their files or several that stand side by
//! side (q, k, v); linear weights are transposed, but for GPT-2's. This module only maps values in memory: files belong to whoever reads and writes them.

pub mod adapter;
mod albert;
mod bert;
mod distilbert;
mod experts;
mod gpt2;
mod heads;
mod keys;
mod llama;
mod names;
mod pieces;
mod roberta;
mod vit;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::keys::{Keys, kind};
use self::names::Names;
use super::config::{FeedForward, NormKind, TransformerConfig};
use super::head::Pooler;
pub use pieces::{Entry, Piece};

/// The key of a `config.json` for heads that no class has.
pub const HEAD: &str = "firebox_head";

/// Which family of classes a model is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// `GPT2LMHeadModel`, and its relatives with other heads (as for all families).
    Gpt2,
    /// `LlamaForCausalLM`, `MistralForCausalLM` where attention has a window, `Qwen2ForCausalLM` where q, k and v alone have biases, or `Qwen3ForCausalLM` where queries and keys are normalized; with experts
    /// `MixtralForCausalLM` or `Qwen3MoeForCausalLM`.
    Llama,
    /// `BertForMaskedLM`; MiniLM is one.
    Bert,
    /// `RobertaForMaskedLM`
    Roberta,
    /// `DistilBertForMaskedLM`
    DistilBert,
    /// `AlbertForMaskedLM`
    Albert,
    /// `ViTForImageClassification`
    Vit,
    /// None of them: Firebox's own names and config, for combinations that Hugging Face has no class for.
    Firebox,
}

/// What is to be known of the classes of a family.
trait Classes: Sync {
    /// The `model_type`s that are read.
    fn model_types(&self) -> &'static [&'static str];

    /// Whether one of these classes computes exactly what `config` says.
    fn cover(&self, config: &TransformerConfig) -> bool;

    /// The names of the class with the config's head.
    fn names(&self, config: &TransformerConfig) -> Names;

    /// How a class with labels makes one vector of a row.
    fn pooler(&self) -> Pooler;

    /// The shape that a `config.json` describes, without its head.
    fn read(&self, model_type: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError>;

    /// How the class's name begins, and its `config.json` without its head.
    fn write(&self, config: &TransformerConfig) -> (&'static str, Value);
}

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// It is of an architecture that no family covers.
    #[error("config.json: architecture `{got}` is not one of {}: this checkpoint cannot be loaded", known())]
    Architecture {
        /// Its `model_type`.
        got: String,
    },
    /// It is of a class with a head that there is none for.
    #[error("config.json: architectures: expected a class {known}, got `{got}`")]
    Class {
        /// The class.
        got: String,
        /// How those end that are read.
        known: String,
    },
    /// A key is missing or of the wrong type.
    #[error("config.json: `{key}`: expected {expected}, got {got}")]
    Key {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        got: String,
    },
    /// A feature that the model lacks.
    #[error("config.json: `{key}` = {got} is not supported")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        got: String,
    },
    /// A shape that is impossible.
    #[error("config.json: {0}")]
    Shape(#[from] super::config::ConfigError),
}

/// The `model_type`s that are read.
fn known() -> String {
    let types = Family::ALL.iter().filter_map(|family| family.classes()).flat_map(Classes::model_types);
    types.copied().chain(["firebox"]).collect::<Vec<_>>().join(", ")
}

impl Family {
    /// All that have classes.
    const ALL: [Self; 7] =
        [Self::Gpt2, Self::Llama, Self::Bert, Self::Roberta, Self::DistilBert, Self::Albert, Self::Vit];

    fn classes(self) -> Option<&'static dyn Classes> {
        Some(match self {
            Self::Gpt2 => &gpt2::Gpt2,
            Self::Llama => &llama::Llama,
            Self::Bert => &bert::Bert,
            Self::Roberta => &roberta::Roberta,
            Self::DistilBert => &distilbert::DistilBert,
            Self::Albert => &albert::Albert,
            Self::Vit => &vit::Vit,
            Self::Firebox => return None,
        })
    }

    /// The family that describes `config` exactly.
    pub fn of(config: &TransformerConfig) -> Self {
        let covers = |family: &Self| family.classes().is_some_and(|classes| classes.cover(config));
        Self::ALL.into_iter().find(covers).unwrap_or(Self::Firebox)
    }

    fn names(self, config: &TransformerConfig) -> Option<Names> {
        self.classes().map(|classes| classes.names(config))
    }

    /// What stands before names that are no head's in the files of the class with this config's head.
    pub fn prefix(self, config: &TransformerConfig) -> &'static str {
        self.names(config).map_or("", |names| names.prefix(config))
    }

    /// How classes with labels make one vector of a row, of the family that describes `config` whatever its head; `None` where there is no such family.
    pub fn pooler(config: &TransformerConfig) -> Option<Pooler> {
        let base = TransformerConfig { head: super::head::Head::Hidden, ..config.clone() };
        Self::of(&base).classes().map(Classes::pooler)
    }

    /// Every parameter of the model in order, with the tensors that it is stored as.
    pub fn entries(self, config: &TransformerConfig) -> Vec<Entry> {
        let mut entries = names::entries(self, config);
        let adapters: Vec<Entry> = entries.iter().flat_map(|weight| adapter::entries(config, weight)).collect();
        entries.extend(adapters);
        entries
    }

    /// The `config.json` of `config`.
    pub fn config_json(self, config: &TransformerConfig) -> Value {
        let mut json = self.plain_json(config);
        if let (Some(adapter), true) = (&config.adapter, self != Family::Firebox) {
            json[adapter::KEY] = json!(adapter);
        }
        json
    }

    fn plain_json(self, config: &TransformerConfig) -> Value {
        match self.classes() {
            Some(classes) => {
                let (stem, mut json) = classes.write(config);
                heads::write(&mut json, stem, config);
                json
            }
            None => json!({
                "architectures": ["FireboxDecoder"],
                "model_type": "firebox",
                "decoder": config,
            }),
        }
    }
}

/// Reads a `config.json`.
///
/// # Errors
/// [`HfError`] names the key at fault.
pub fn parse_config(json: &Value) -> Result<(Family, TransformerConfig), HfError> {
    let keys = Keys(json.as_object().ok_or_else(|| HfError::Key {
        key: "(file)".into(),
        expected: "an object",
        got: kind(json),
    })?);
    let model_type = keys.0.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
    let reads = |family: &Family| family.classes().is_some_and(|classes| classes.model_types().contains(&model_type));
    let family = Family::ALL.into_iter().find(reads).unwrap_or(Family::Firebox);
    let config = match family.classes() {
        Some(classes) => {
            let config = classes.read(model_type, &keys)?;
            let (head, labels) = keys.head(config.encoder.is_some(), classes.pooler())?;
            TransformerConfig { head, labels, ..config }
        }
        None if model_type == "firebox" => {
            let decoder = keys.0.get("decoder").cloned().unwrap_or(Value::Null);
            serde_json::from_value(decoder).map_err(|e| HfError::Key {
                key: "decoder".into(),
                expected: "a decoder's shape",
                got: e.to_string(),
            })?
        }
        None => return Err(HfError::Architecture { got: model_type.to_string() }),
    };
    let config = adapter::read(&keys, config)?;
    config.validate()?;
    Ok((family, config))
}

/// Parts of classes that no part of ours is, where a head does not use them: BERT's pooler, its predictor of the next sentence, and ALBERT's of the sentences' order.
const PASSENGERS: [&str; 3] = ["pooler.", "cls.seq_relationship.", "sop_classifier."];

/// Whether a tensor of this name, which no parameter has, is of such a part. It goes through an import as it is.
pub fn is_passenger(name: &str) -> bool {
    let bare = name.split_once('.').map_or(name, |(_, bare)| bare);
    PASSENGERS.iter().any(|root| name.starts_with(root) || bare.starts_with(root))
}

/// Whether blocks are those of the first transformers (Vaswani et al., arXiv:1706.03762) but for their activation: LayerNorm, whole heads, GELU, biases everywhere, and nothing more.
fn is_vaswani(config: &TransformerConfig) -> bool {
    has_blocks_of_vaswani(config) && config.image.is_none()
}

/// The same of tokens or images.
fn has_blocks_of_vaswani(config: &TransformerConfig) -> bool {
    config.norm == NormKind::LayerNorm
        && matches!(config.feed_forward, FeedForward::Gelu | FeedForward::GeluExact)
        && config.bias
        && config.n_heads == config.n_kv_heads
        && config.n_heads * config.head_dim == config.d_model
        && config.window.is_none()
        && config.experts.is_none()
        && !config.qk_norm
        && config.attention_softcap == 0.0
        && config.logit_softcap == 0.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transformer::presets;

    #[test]
    fn configs_round_trip() {
        for (name, config) in presets::all() {
            let family = Family::of(&config);
            let (parsed_family, mut parsed) = parse_config(&family.config_json(&config)).unwrap();
            assert_eq!(family, parsed_family, "{name}");
            parsed.dropout = config.dropout;
            assert_eq!(parsed, config, "{name}");
        }
    }

    #[test]
    fn a_window_makes_llama_a_mistral() {
        let llama = presets::named("llama-30m").unwrap();
        let config = TransformerConfig { window: Some(100), dropout: 0.0, ..llama.clone() };
        let mut json = Family::of(&config).config_json(&config);
        assert_eq!(json["model_type"], "mistral");
        assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config));
        json["sliding_window"] = Value::Null;
        assert_eq!(parse_config(&json).unwrap().1.window, None);
        json.as_object_mut().unwrap().remove("sliding_window");
        assert_eq!(parse_config(&json).unwrap().1.window, Some(4096));
        let gpt2 = TransformerConfig { window: Some(100), ..presets::named("gpt2").unwrap() };
        assert_eq!(Family::of(&gpt2), Family::Firebox);
    }

    #[test]
    fn qk_norm_makes_llama_a_qwen3() {
        let llama = presets::named("llama-30m").unwrap();
        let config = TransformerConfig { qk_norm: true, dropout: 0.0, ..llama.clone() };
        let mut json = Family::of(&config).config_json(&config);
        assert_eq!(json["model_type"], "qwen3");
        assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config.clone()));
        let entries = Family::Llama.entries(&config);
        let gain = entries.iter().find(|e| e.param == "blocks.1.attn.q_norm.weight").unwrap();
        assert_eq!(gain.pieces[0].name, "model.layers.1.self_attn.q_norm.weight");
        assert_eq!(gain.shape, [config.head_dim]);
        json.as_object_mut().unwrap().remove("head_dim");
        assert_eq!(parse_config(&json).unwrap().1.head_dim, 128);
        json["use_sliding_window"] = true.into();
        assert!(parse_config(&json).unwrap_err().to_string().contains("use_sliding_window"));
        // What no class of Hugging Face has.
        for config in [
            TransformerConfig { window: Some(100), ..config },
            TransformerConfig { attention_softcap: 50.0, ..llama.clone() },
            TransformerConfig { logit_softcap: 30.0, ..presets::named("gpt2").unwrap() },
            TransformerConfig { qk_norm: true, ..presets::named("gpt2").unwrap() },
        ] {
            let family = Family::of(&config);
            assert_eq!(family, Family::Firebox);
            assert_eq!(parse_config(&family.config_json(&config)).unwrap(), (family, config));
        }
    }

    #[test]
    fn entries_cover_every_parameter_once() {
        let normed = TransformerConfig { qk_norm: true, ..presets::depth(2, 31) };
        for (name, config) in presets::all().into_iter().chain([("QK-norm", normed)]) {
            for family in [Family::of(&config), Family::Firebox] {
                let entries = family.entries(&config);
                let elements: usize = entries.iter().map(|e| e.shape.iter().product::<usize>()).sum();
                assert_eq!(elements, config.num_params(), "{name}");
                for e in &entries {
                    let pieces: usize = e.pieces.iter().map(|p| p.shape.iter().product::<usize>()).sum();
                    assert_eq!(pieces, e.shape.iter().product::<usize>(), "{name} {}", e.param);
                    let parts: usize = e.pieces.iter().map(|p| p.rows.1 * p.columns.1).sum();
                    assert_eq!(parts, e.shape.iter().product::<usize>());
                }
                let mut names: Vec<_> = entries.iter().flat_map(|e| e.pieces.iter().map(|p| &p.name)).collect();
                names.sort();
                names.dedup();
                assert_eq!(names.len(), entries.iter().map(|e| e.pieces.len()).sum::<usize>(), "{name}: names repeat");
            }
        }
    }

    #[test]
    fn errors_name_the_key() {
        let error = |json: Value| parse_config(&json).unwrap_err().to_string();
        let unknown = error(json!({"model_type": "mamba"}));
        let known = ["`mamba`", "gpt2", "qwen3_moe", "xlm-roberta", "albert", "firebox"];
        assert!(known.iter().all(|name| unknown.contains(name)), "{unknown}");
        assert!(error(json!({"model_type": "bert"})).contains("intermediate_size"));
        assert!(error(json!({"model_type": "gpt2", "n_embd": 8, "n_head": 3})).contains("n_head"));
        assert!(error(json!({"model_type": "gpt2", "n_embd": "wide"})).contains("n_embd"));
        assert!(error(json!([])).contains("object"));
    }
}
