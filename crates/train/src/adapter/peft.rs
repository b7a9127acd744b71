//! Folders of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use firebox_models::transformer::hf::adapter::PREFIX;
use firebox_models::transformer::hf::{Entry, Family, parse_config};
use firebox_models::transformer::{AdapterConfig, AdapterKind, Target, Targets, TransformerConfig};
use serde::Deserialize;
use serde_json::{Value, json};

use super::files::{CONFIG, WEIGHTS, merged_of};
use crate::TrainError;
use crate::checkpoint::TensorFile;
use crate::model_io::Folder;

/// What of `adapter_config.json` says how adapters compute. Kinds of PEFT that compute otherwise are refused, not ignored.
#[derive(Debug, Deserialize)]
struct PeftConfig {
    peft_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: usize,
    #[serde(default = "eight")]
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: Value,
    #[serde(default)]
    alpha_pattern: Value,
    #[serde(default)]
    layers_to_transform: Value,
    #[serde(default)]
    lora_bias: Value,
}

fn eight() -> f64 {
    8.0
}

fn fail(path: &Path, expected: impl Into<String>, got: impl Into<String>) -> TrainError {
    TrainError::Input {
        what: "adapter_config.json",
        expected: expected.into(),
        got: format!("{} in {}", got.into(), path.display()),
    }
}

impl PeftConfig {
    fn read(folder: &Path) -> Result<Self, TrainError> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).map_err(TrainError::io("read", &path))?;
        let config: Self = serde_json::from_slice(&text)
            .map_err(|error| fail(&path, "PEFT's configuration of LoRA", error.to_string()))?;
        let kind = config.peft_type.as_deref().unwrap_or("nothing");
        if kind != "LORA" {
            return Err(fail(&path, "peft_type LORA", kind));
        }
        if let Some(bias) = config.bias.as_deref().filter(|bias| *bias != "none") {
            return Err(fail(&path, "bias none: biases stay as they are", bias));
        }
        let empty = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        for (key, value) in [
            ("rank_pattern", &config.rank_pattern),
            ("alpha_pattern", &config.alpha_pattern),
            ("layers_to_transform", &config.layers_to_transform),
            ("lora_bias", &config.lora_bias),
        ] {
            if !empty(value) {
                return Err(fail(&path, format!("no {key}: all layers have adapters of one kind"), value.to_string()));
            }
        }
        Ok(config)
    }
}

/// Adapters of a folder for a model of this shape, and its tensors under the names that the model's entries have.
pub(super) fn adapters(
    folder: &Path,
    family: Family,
    plain: &TransformerConfig,
) -> Result<(AdapterConfig, TensorFile), TrainError> {
    let config = PeftConfig::read(folder)?;
    let file = TensorFile::open(folder.join(WEIGHTS))?;
    let prefix = family.prefix(plain);
    let weights: BTreeSet<String> = (family.entries(plain).into_iter())
        .flat_map(|entry| entry.pieces)
        .filter_map(|piece| Some(piece.name.strip_suffix(".weight")?.to_owned()))
        .collect();
    // The base may be a class without a head, whose names lack a prefix; older files have `.weight` after magnitudes.
    let file = file.renamed(|name| {
        let name = name
            .strip_suffix("lora_magnitude_vector.weight")
            .map_or_else(|| name.to_owned(), |n| format!("{n}lora_magnitude_vector"));
        let Some(rest) = name.strip_prefix(PREFIX) else { return Some(name) };
        let module = rest.split(".lora_").next().unwrap_or(rest);
        match weights.contains(module) || !weights.contains(&format!("{prefix}{module}")) {
            true => Some(name),
            false => Some(format!("{PREFIX}{prefix}{rest}")),
        }
    });
    let modules: BTreeSet<&str> =
        file.names().filter_map(|name| name.strip_prefix(PREFIX)?.strip_suffix(".lora_A.weight")).collect();
    let adapter = |targets| AdapterConfig {
        kind: if config.use_dora { AdapterKind::Dora } else { AdapterKind::Lora },
        rank: config.r,
        alpha: config.lora_alpha,
        rslora: config.use_rslora,
        targets,
    };
    // A layer is a target if its modules are there.
    let has = |target: &Target| {
        let one = TransformerConfig { adapter: Some(adapter(Targets::new([*target]))), ..plain.clone() };
        one.validate().is_ok() && family.entries(&one).iter().any(|entry| is_in(entry, &modules))
    };
    let targets = Targets::new(Target::ALL.into_iter().filter(has));
    let found = adapter(targets);
    TransformerConfig { adapter: Some(found), ..plain.clone() }.validate()?;
    Ok((found, file))
}

fn is_in(entry: &Entry, modules: &BTreeSet<&str>) -> bool {
    entry.param.ends_with(".adapter.down")
        && entry.pieces.iter().any(|piece| {
            let module = piece.name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(".lora_A.weight"));
            module.is_some_and(|module| modules.contains(module))
        })
}

/// The model of a folder of PEFT with its adapters in it: on `base`, or else on the model that the folder names, which must be on this machine.
pub(crate) fn open(folder: &Path, base: Option<&Path>) -> Result<Folder, TrainError> {
    let config = PeftConfig::read(folder)?;
    let base = match (base, config.base_model_name_or_path) {
        (Some(base), _) => base.to_path_buf(),
        (None, Some(name)) if Path::new(&name).exists() => PathBuf::from(name),
        (None, Some(name)) if folder.join(&name).exists() => folder.join(name),
        (None, name) => {
            let got = name.unwrap_or_else(|| "none".into());
            let expected = "the path of a model on this machine as base_model_name_or_path, or --base beside it";
            return Err(fail(&folder.join(CONFIG), expected, got));
        }
    };
    let opened = Folder::open(&base)?;
    let (family, plain) = parse_config(&opened.config)?;
    let (adapter, file) = adapters(folder, family, &plain)?;
    let with = TransformerConfig { adapter: Some(adapter), ..plain };
    let (config, file) = merged_of(&folder.join(WEIGHTS), family, with, opened.file, Some(file))?;
    Ok(Folder { config, file, tokenizer: opened.tokenizer, sides: opened.sides })
}

/// The `adapter_config.json` of adapters, and of the other parameters that are trained beside them; `base` is the model that they belong to.
pub(crate) fn config_json(config: &TransformerConfig, trained: &[Entry], base: &Path) -> Option<Value> {
    let adapter = config.adapter?;
    let module = |name: &str| Some(name.strip_prefix(PREFIX)?.strip_suffix(".lora_A.weight")?.to_owned());
    let pieces = || trained.iter().flat_map(|entry| &entry.pieces);
    let modules: BTreeSet<String> = pieces().filter_map(|piece| module(&piece.name)).collect();
    // The shortest ends of names that no other layer has.
    let plain = TransformerConfig { adapter: None, ..config.clone() };
    let all: BTreeSet<String> = (Family::of(&plain).entries(&plain).into_iter())
        .flat_map(|entry| entry.pieces)
        .filter_map(|piece| Some(piece.name.strip_suffix(".weight")?.to_owned()))
        .collect();
    let end = |name: &str, parts: usize| {
        let at = name.rmatch_indices('.').nth(parts - 1).map_or(0, |(at, _)| at + 1);
        name[at..].to_owned()
    };
    let targets: BTreeSet<String> = modules
        .iter()
        .map(|name| {
            let clashes = |end: &str| all.iter().any(|other| !modules.contains(other) && has_end(other, end));
            (1..4).map(|parts| end(name, parts)).find(|end| !clashes(end)).unwrap_or_else(|| name.clone())
        })
        .collect();
    let saved: BTreeSet<String> = pieces()
        .filter_map(|piece| piece.name.strip_prefix(PREFIX))
        .filter(|name| !name.contains(".lora_"))
        .filter_map(|name| Some(name.split('.').next()?.to_owned()))
        .collect();
    Some(json!({
        "peft_type": "LORA",
        "task_type": if config.head.outputs().is_some() { Value::Null } else { json!("CAUSAL_LM") },
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == AdapterKind::Dora,
        "target_modules": targets,
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "fan_in_fan_out": Family::of(&plain) == Family::Gpt2,
        "bias": "none",
        "inference_mode": true,
    }))
}

fn has_end(name: &str, end: &str) -> bool {
    name == end || name.strip_suffix(end).is_some_and(|rest| rest.ends_with('.'))
}
