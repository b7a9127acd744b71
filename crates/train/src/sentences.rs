//! What sentence-transformers (Reimers and Gurevych, arXiv:1908.10084) has beside a model: how its hidden states become one vector per row.

use std::fs;
use std::path::{Component, Path};

use firebox_models::transformer::hf::HEAD;
use firebox_models::transformer::{Head, Pool, TransformerConfig};
use serde_json::{Value, json};

use crate::TrainError;

const MODULES: &str = "modules.json";
/// What its losses of pairs divide by, where nothing else is said: a scale of 20.
const TEMPERATURE: f64 = 0.05;

/// Adds to the `config.json` of the model in `folder`, if it is of a class without a head, the head that the files beside it describe.
///
/// # Errors
/// Modules and ways of pooling that Firebox has not, or files that are not what they should be.
pub fn read_head(folder: &Path, config: &mut Value) -> Result<(), TrainError> {
    let path = folder.join(MODULES);
    let class = config["architectures"][0].as_str().unwrap_or("Model");
    if !path.is_file() || !class.ends_with("Model") || class.ends_with("LMHeadModel") || !config[HEAD].is_null() {
        return Ok(());
    }
    let wrong = |path: &Path, expected: &str, got: String| TrainError::Input {
        what: "sentence-transformers' folder",
        expected: format!("{expected} in {}", path.display()),
        got,
    };
    let list = read(&path)?;
    let Some(list) = list.as_array() else {
        return Err(wrong(&path, "a list of modules", "something else".into()));
    };
    let (mut pool, mut normalize) = (None, false);
    for module in list {
        let kind = module["type"].as_str().unwrap_or_default();
        let place = module["path"].as_str().unwrap_or_default();
        if !Path::new(place).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(wrong(&path, "folders inside this one", place.into()));
        }
        match kind.rsplit('.').next() {
            Some("Transformer") if place.is_empty() => {}
            Some("Pooling") => pool = Some(pooling(&folder.join(place).join("config.json"))?),
            Some("Normalize") => normalize = true,
            _ => return Err(wrong(&path, "a Transformer in the folder itself, Pooling and Normalize", kind.into())),
        }
    }
    if let Some(pool) = pool {
        config[HEAD] = json!(Head::Embedding { pool, normalize, temperature: TEMPERATURE });
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value, TrainError> {
    let text = fs::read(path).map_err(TrainError::io("read", path))?;
    serde_json::from_slice(&text).map_err(|e| TrainError::Input {
        what: "sentence-transformers' folder",
        expected: format!("JSON in {}", path.display()),
        got: e.to_string(),
    })
}

/// The one way of pooling that is switched on: `pooling_mode_mean_tokens` and the like, or, in newer files, `pooling_mode`.
fn pooling(path: &Path) -> Result<Pool, TrainError> {
    let file = read(path)?;
    let keys = file.as_object().into_iter().flatten();
    let mut modes: Vec<&str> = keys
        .filter(|(key, value)| key.starts_with("pooling_mode_") && **value == true)
        .map(|(key, _)| key.as_str())
        .collect();
    modes.extend(file["pooling_mode"].as_str());
    match modes[..] {
        ["pooling_mode_mean_tokens" | "mean"] => Ok(Pool::Mean),
        ["pooling_mode_cls_token" | "cls"] => Ok(Pool::First),
        _ => Err(TrainError::Input {
            what: "sentence-transformers' folder",
            expected: format!("one of pooling_mode_mean_tokens and pooling_mode_cls_token in {}", path.display()),
            got: if modes.is_empty() { "none".into() } else { modes.join(", ") },
        }),
    }
}

/// The files for a model with this head, where it makes embeddings, by name.
pub fn files(config: &TransformerConfig) -> Vec<(&'static str, Value)> {
    let Head::Embedding { pool, normalize, .. } = config.head else { return vec![] };
    let module = |i: usize, kind: &str, path: &str| json!({ "idx": i, "name": i.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}") });
    let mut modules = vec![module(0, "Transformer", ""), module(1, "Pooling", "1_Pooling")];
    modules.extend(normalize.then(|| module(2, "Normalize", "2_Normalize")));
    let pooling = json!({
        "word_embedding_dimension": config.d_model,
        "pooling_mode_cls_token": pool == Pool::First,
        "pooling_mode_mean_tokens": pool == Pool::Mean,
        "pooling_mode_max_tokens": false,
        "pooling_mode_mean_sqrt_len_tokens": false,
    });
    vec![
        (MODULES, Value::Array(modules)),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", json!({ "max_seq_length": config.context, "do_lower_case": false })),
    ]
}
