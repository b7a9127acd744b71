//! What recipes say of labelled rows: which fields hold what.

use firebox_models::transformer::{Pool, Pooler};
use serde::{Deserialize, Serialize};

/// A class per row of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClassesRecipe {
    /// Field of the text.
    pub text: String,
    /// Field of a second text, of tasks on pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<String>,
    /// Field of the label: a name, or a number from 0.
    pub label: String,
    /// Names of the classes, in order. By default the names that are there, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Files of held-out rows, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
    /// How a row becomes one vector: `tanh`, `relu` or `first` of an encoder, `last` of a decoder. By default that of the model, or else `tanh` or `last`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooler: Option<Pooler>,
}

impl Default for ClassesRecipe {
    fn default() -> Self {
        Self { text: "text".into(), second: None, label: "label".into(), labels: vec![], val: None, pooler: None }
    }
}

/// A class per word of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenClassesRecipe {
    /// Field of the list of words.
    pub tokens: String,
    /// Field of the list of their labels, names or numbers from 0.
    pub label: String,
    /// Field of a list of `{ start, end, label }` (in characters, the end not included) in the text of `text`, in place of words with labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spans: Option<String>,
    /// Field of the text that has spans.
    pub text: String,
    /// Names of the classes, in order. By default the names that are there, sorted; of spans `O`, and `B-NAME` and `I-NAME` for each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Files of held-out rows, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
}

impl Default for TokenClassesRecipe {
    fn default() -> Self {
        let [tokens, label, text] = ["tokens", "labels", "text"].map(String::from);
        Self { tokens, label, spans: None, text, labels: vec![], val: None }
    }
}

/// Numbers per row of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValuesRecipe {
    /// Field of the text.
    pub text: String,
    /// Field of a second text, of tasks on pairs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<String>,
    /// Field of the number, or of a list of them, in which `null` is unknown.
    pub label: String,
    /// Files of held-out rows, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
    /// How a row becomes one vector: as of classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooler: Option<Pooler>,
}

impl Default for ValuesRecipe {
    fn default() -> Self {
        Self { text: "text".into(), second: None, label: "label".into(), val: None, pooler: None }
    }
}

/// Texts that belong together: a vector of each, near to that of its own, far from those of all others in the batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbeddingRecipe {
    /// Field of the text that looks for its own.
    pub anchor: String,
    /// Field of the one that belongs to it.
    pub positive: String,
    /// Field of one that does not, but seems to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// Files of held-out rows, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
    /// What products of vectors are divided by in the loss.
    pub temperature: f64,
    /// How a row becomes one vector: `mean` or `first`. By default as the model has it, or else `mean`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// Whether vectors have length 1. By default as the model has it, or else they have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
}

impl Default for EmbeddingRecipe {
    fn default() -> Self {
        Self {
            anchor: "anchor".into(),
            positive: "positive".into(),
            negative: None,
            val: None,
            // sentence-transformers' scale of 20.
            temperature: 0.05,
            pool: None,
            normalize: None,
        }
    }
}
