//! Ten AdamW steps of an encoder on ten batches, against transformers in float64 (`golden/tasks.py`): masked language modelling, and sentence embeddings with in-batch negatives.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use firebox::models::transformer::hf::Family;
use firebox::models::transformer::{Head, Pool, Transformer, TransformerConfig};
use firebox::models::{Extra, Staged, TokenBatch};
use firebox::optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox::tensor::device::Backend;
use firebox::tensor::ops::Sequence;
use firebox::train::Recipe;
use firebox::train::checkpoint::TensorFile;
use firebox::train::model_io::{parameters, to_host};
use firebox_tests::golden;
use safetensors::tensor::{Dtype, TensorView};

/// f32 through two layers and up to nine steps, each of which divides gradients by their own size.
const LOSSES: f64 = 1e-4;
/// The same of parameters, to the largest of a tensor.
const PARAMETERS: f64 = 1e-3;
/// Of `tasks.py`.
const TEMPERATURE: f64 = 0.05;

/// The folder that transformers has written.
fn folder(name: &str, file: &TensorFile, dir: &Path) {
    fs::copy(golden(&format!("steps-{name}.json")), dir.join("config.json")).unwrap();
    let weights: Vec<&str> = file.names().filter(|name| name.contains('.') && !name.starts_with("final:")).collect();
    let view = |name: &str| {
        let (shape, bytes) = (file.shape(name).unwrap().to_vec(), file.bytes(name).unwrap());
        (name.to_owned(), TensorView::new(Dtype::F32, shape, bytes).unwrap())
    };
    let views: HashMap<String, TensorView<'_>> = weights.into_iter().map(view).collect();
    safetensors::serialize_to_file(&views, None, &dir.join("model.safetensors")).unwrap();
}

fn ints(file: &TensorFile, name: &str) -> Vec<i32> {
    file.bytes(name).unwrap().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Largest difference relative to the largest expected value.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1e-12, |most: f64, v| most.max(f64::from(v.abs())));
    got.iter().zip(want).fold(0f64, |most, (g, w)| most.max(f64::from((g - w).abs()))) / size
}

fn check(name: &str, head: Head) {
    let file = TensorFile::open(golden(&format!("steps-{name}.safetensors"))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    folder(name, &file, dir.path());
    let recipe = Recipe::load("tiny", &[]).unwrap().starting_from(dir.path()).unwrap();
    let mut recipe = recipe.with(&["model.dropout=0.0".into()]).unwrap();
    recipe.model.head = Some(head);
    let device = Backend::NdArray.device().unwrap();
    let mut model: Transformer = recipe.initial_model(&device).unwrap().unwrap();

    let [steps, rows, tokens] = *file.shape("inputs").unwrap() else { panic!("[S, B, T]") };
    let (inputs, types, lengths) = (ints(&file, "inputs"), ints(&file, "types"), ints(&file, "lengths"));
    let targets = if name == "masked" { ints(&file, "targets") } else { vec![-1; inputs.len()] };
    let adamw = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut optimizer = Optimizer::new(adamw, DecayRule::Matrices).unwrap();
    let losses = file.f32("losses").unwrap();
    assert_eq!(losses.len(), steps);
    for (step, want) in losses.iter().enumerate() {
        let at = step * rows * tokens..(step + 1) * rows * tokens;
        let lengths: Vec<usize> = lengths[step * rows..(step + 1) * rows].iter().map(|&n| n as usize).collect();
        let sequence = Sequence::padded(tokens, &lengths);
        let mut batch = TokenBatch::new(inputs[at.clone()].to_vec(), targets[at.clone()].to_vec(), sequence);
        if name == "embedding" {
            batch.loss_scale = 2.0 / rows as f64;
        }
        batch.extra = Some(Arc::new(Extra { token_types: types[at].to_vec(), ..Extra::default() }));
        let loss = model.loss(&batch, Some(step as u64));
        let off = distance(&to_host(loss.clone().inner()), &[*want]);
        println!("{name}: the loss of step {step} is {off:.1e} off {want}");
        assert!(off < LOSSES, "{name}: the loss of step {step} is {off:.2e} off");
        let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
        model = optimizer.step(3e-3, model, &mut grads).unwrap();
    }
    // Names as in the file, whose class has no head.
    let head = if name == "embedding" { Head::Hidden } else { head };
    let config = TransformerConfig { head, ..model.config().clone() };
    let params: HashMap<String, _> = parameters(&model).into_iter().collect();
    let mut compared = 0;
    for entry in &Family::Bert.entries(&config) {
        let values = to_host(params[&entry.param].clone());
        for piece in &entry.pieces {
            // The bias of the keys has no influence: its gradient is rounding noise, which AdamW magnifies.
            if piece.name.ends_with("self.key.bias") {
                continue;
            }
            let off = distance(&entry.split(&values, piece), &file.f32(&format!("final:{}", piece.name)).unwrap());
            assert!(off < PARAMETERS, "{name}: {} after ten steps is {off:.2e} off", piece.name);
            compared += 1;
        }
    }
    assert!(compared > 30, "{compared} tensors");
}

#[test]
fn masked_steps_are_those_of_bert_for_masked_lm() {
    check("masked", Head::Masked);
}

#[test]
fn contrastive_steps_are_those_of_bert_with_in_batch_negatives() {
    check("embedding", Head::Embedding { pool: Pool::Mean, normalize: true, temperature: TEMPERATURE });
}
