//! Heads as the classes of a family, and what they add to a `config.json`.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{HEAD, HfError};
use crate::transformer::config::TransformerConfig;
use crate::transformer::head::{Head, Pooler};

/// What the names of classes end with: of the models that are read, and are written with heads like these.
const ENDINGS: [&str; 8] = [
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForTokenClassification",
    "Model",
];

impl Head {
    /// Whether a class of Hugging Face that has it has names for the model in it.
    pub(super) fn is_of_a_class_with_a_head(&self) -> bool {
        !matches!(self, Head::Hidden | Head::Embedding { .. })
    }

    /// Whether a causal decoder's classes have it.
    pub(super) fn is_of_a_decoder(&self) -> bool {
        !matches!(self, Head::Masked)
    }

    /// Whether a class of an encoder has it, in which a row becomes one vector like this.
    pub(super) fn is_of_an_encoder(&self, own: Pooler) -> bool {
        match self {
            Head::Classes { pooler, .. } | Head::Values { pooler, .. } => *pooler == own,
            _ => *self != Head::Language,
        }
    }
}

/// Writes the class, `stem` and an ending, and what its head has.
pub(super) fn write(json: &mut Value, stem: &str, config: &TransformerConfig) {
    let ending = match config.head {
        Head::Language if stem == "GPT2" => "LMHeadModel",
        Head::Language => "ForCausalLM",
        Head::Hidden | Head::Embedding { .. } => "Model",
        Head::Masked => "ForMaskedLM",
        Head::Classes { .. } | Head::Values { .. } if config.image.is_some() => "ForImageClassification",
        Head::Classes { .. } | Head::Values { .. } => "ForSequenceClassification",
        Head::TokenClasses { .. } => "ForTokenClassification",
    };
    json["architectures"] = json!([format!("{stem}{ending}")]);
    let (n, problem) = match config.head {
        Head::Classes { n, .. } => (n, Some("single_label_classification")),
        Head::Values { n, .. } => (n, Some("regression")),
        Head::TokenClasses { n } => (n, None),
        Head::Embedding { .. } => {
            // No class has it: how rows become vectors stands beside the model, if anywhere.
            json[HEAD] = json!(config.head);
            return;
        }
        _ => return,
    };
    let label = |i: usize| config.labels.get(i).cloned().unwrap_or_else(|| default_label(i));
    let of_id: Map<String, Value> = (0..n).map(|i| (i.to_string(), label(i).into())).collect();
    let of_label: Map<String, Value> = (0..n).map(|i| (label(i), i.into())).collect();
    json["id2label"] = Value::Object(of_id);
    json["label2id"] = Value::Object(of_label);
    if let Some(problem) = problem {
        json["problem_type"] = problem.into();
    }
}

fn default_label(i: usize) -> String {
    format!("LABEL_{i}")
}

impl Keys<'_> {
    /// The head of the file's class, and the names of its labels, unless they are numbers. `pooler` is how the family's classes make one vector of a row.
    pub fn head(&self, encoder: bool, pooler: Pooler) -> Result<(Head, Vec<String>), HfError> {
        let ours = |value: &Value| serde_json::from_value::<Head>(value.clone()).ok();
        if let Some(head) = self.get(HEAD, "a head of Firebox", ours)? {
            return Ok((head, vec![]));
        }
        let first = |value: &Value| match value.as_array()?.first() {
            None => Some(String::new()),
            Some(name) => Some(name.as_str()?.to_owned()),
        };
        let class = self.get("architectures", "a list of classes", first)?.unwrap_or_default();
        let ending = ENDINGS.into_iter().find(|ending| class.ends_with(ending));
        let head = match ending {
            None if class.is_empty() => {
                if encoder {
                    Head::Hidden
                } else {
                    Head::Language
                }
            }
            Some("Model") => Head::Hidden,
            Some("ForMaskedLM" | "ForPreTraining") if encoder => Head::Masked,
            Some("ForCausalLM" | "LMHeadModel") if !encoder => Head::Language,
            Some("ForSequenceClassification" | "ForImageClassification") => {
                let (n, labels) = self.labels()?;
                let regression = match self.get("problem_type", "a text", |v| v.as_str().map(String::from))? {
                    None => n == 1,
                    Some(kind) if kind == "regression" => true,
                    Some(kind) if kind == "single_label_classification" => false,
                    Some(got) => return Err(HfError::Unsupported { key: "problem_type", got }),
                };
                let head = if regression { Head::Values { n, pooler } } else { Head::Classes { n, pooler } };
                return Ok((head, labels));
            }
            Some("ForTokenClassification") => {
                let (n, labels) = self.labels()?;
                return Ok((Head::TokenClasses { n }, labels));
            }
            _ => {
                let fitting = |ending: &&str| match *ending {
                    "ForCausalLM" | "LMHeadModel" => !encoder,
                    "ForMaskedLM" | "ForPreTraining" => encoder,
                    _ => true,
                };
                let known = ENDINGS.into_iter().filter(fitting).map(|ending| format!("...{ending}"));
                return Err(HfError::Class { got: class, known: known.collect::<Vec<_>>().join(", ") });
            }
        };
        Ok((head, vec![]))
    }

    /// How many labels there are, and their names where they have some.
    fn labels(&self) -> Result<(usize, Vec<String>), HfError> {
        let wrong = |got: String| HfError::Key { key: "id2label".into(), expected: "a name for each of 0, 1, ..", got };
        let Some(map) = self.get("id2label", "an object", |value| value.as_object().cloned())? else {
            return Ok((self.count_or("num_labels")?.unwrap_or(2), vec![]));
        };
        let label = |i: usize| match map.get(&i.to_string()) {
            Some(Value::String(name)) => Ok(name.clone()),
            Some(other) => Err(wrong(format!("{other} for {i}"))),
            None => Err(wrong(format!("{} names, and none for {i}", map.len()))),
        };
        let labels = (0..map.len()).map(label).collect::<Result<Vec<String>, _>>()?;
        let numbers = labels.iter().enumerate().all(|(i, label)| *label == default_label(i));
        Ok((labels.len(), if numbers { vec![] } else { labels }))
    }
}
