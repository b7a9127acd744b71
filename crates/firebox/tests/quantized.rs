//! The commands on a quantized model.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Ended, Lab};
use firebox::compress::quantize::{Ranges, nearest};
use firebox::compress::{Matrix, ScalarFormat};
use firebox::models::transformer::hf::Family;
use firebox::models::transformer::packed::{matrix_shape, to_matrix};
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::model_io::{Loaded, load, parameters, to_host};
use firebox::train::quantized::{Weights, save};

#[test]
fn a_quantized_model_is_used_and_not_trained() {
    let lab = Lab::new(40);
    lab.trained("run", &["--set", "train.steps=40"]);
    let Loaded { model, tokenizer } = load(lab.path("run"), &Backend::NdArray.device().unwrap()).unwrap();
    let config = model.config().clone();
    let values: BTreeMap<_, _> = parameters(&model).into_iter().map(|(name, v)| (name, to_host(v))).collect();
    let shapes: BTreeMap<_, _> =
        Family::of(&config).entries(&config).into_iter().map(|entry| (entry.param, entry.shape)).collect();
    let format = |name: &str| match name {
        "embed.weight" | "head.weight" => Some("int8-channel"),
        _ if name.contains("mlp.output") => Some("int4-channel"),
        _ if name.starts_with("blocks.") && shapes[name].len() == 2 => Some("int4-g32"),
        _ => None,
    };
    let formats: BTreeMap<String, ScalarFormat> =
        shapes.keys().filter_map(|name| Some((name.clone(), format(name)?.parse().unwrap()))).collect();
    save(&lab.path("small"), &config, &formats, tokenizer.as_ref(), |name| {
        let values = values[name].clone();
        let Some(&format) = formats.get(name) else { return Ok(Weights::Full(values)) };
        let [rows, cols] = matrix_shape(name, &shapes[name]).unwrap();
        let matrix = Matrix::new(rows, cols, to_matrix(name, &shapes[name], values))?;
        Ok(Weights::Quantized(nearest(&matrix, format, Ranges::Mse)?))
    })
    .unwrap();

    let generated = lab.call(&["generate", "small", "--prompt", "The ", "--max-tokens", "12", "--temperature", "0"]);
    assert_eq!(generated.code, Some(0), "{generated:?}");
    assert!(generated.stdout.starts_with("The ") && generated.stdout.len() > 8, "{generated:?}");

    let loss = |model: &str| {
        let ended = lab.call(&["eval", model, "--data", "docs.jsonl", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{ended:?}"));
        json["loss"].as_f64().unwrap()
    };
    let (full, small) = (loss("run"), loss("small"));
    assert!((full - small).abs() < 0.1 * full && full != small, "{full} {small}");

    let logits = |model: &str| {
        let ended = lab.call(&["logits", model, "--ids", "1,2,3", "--out", "logits.safetensors"]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        TensorFile::open(lab.path("logits.safetensors")).unwrap().f32("logits").unwrap()
    };
    let (full, small) = (logits("run"), logits("small"));
    let size = full.iter().fold(0f32, |size, x| size.max(x.abs()));
    assert!(full.iter().zip(&small).all(|(a, b)| (a - b).abs() < 0.3 * size), "{full:?} {small:?}");

    let ended = Ended::new(lab.train("again", &["--init", "small"]).output().unwrap(), "train --init".into());
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("quantized") && ended.stderr.trim().lines().count() == 1, "{ended:?}");
}
