//! GPT-2, Llama and Qwen 3 with experts against Hugging Face's transformers on PyTorch: logits, every gradient, ten AdamW steps. The golden values were computed in
//! float64 from f32 weights (`golden/generate.py`), so what is measured is Firebox's own error.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::Path;

use firebox::models::transformer::hf::{Entry, Family};
use firebox::models::transformer::{KvCache, Transformer};
use firebox::models::{Staged, TokenBatch};
use firebox::optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::model_io::{load, parameters, to_host};
use firebox_tests::golden;
use safetensors::tensor::{Dtype, TensorView};

#[path = "parity/preference.rs"]
mod preference;

/// f32 rounding through three layers, relative to the largest logit (transformers itself, in f32, is about 1e-6 off).
const LOGITS: f64 = 1e-5;
/// The same through backward.
const GRADIENTS: f64 = 1e-4;
/// Of a mean over 46 targets.
const LOSSES: f64 = 1e-5;

struct Golden {
    file: TensorFile,
    model: Transformer,
    batch: TokenBatch,
    entries: Vec<Entry>,
}

fn is_weight(name: &str) -> bool {
    name.contains('.') && !name.starts_with("grad.") && !name.starts_with("final.")
}

/// Writes the weights as the folder that Hugging Face would, so that the loader is tested with them.
fn folder(name: &str, file: &TensorFile, dir: &Path) {
    std::fs::copy(golden(&format!("{name}.json")), dir.join("config.json")).unwrap();
    let names: Vec<&str> = file.names().filter(|n| is_weight(n)).collect();
    let views: HashMap<String, TensorView<'_>> = names
        .into_iter()
        .map(|n| {
            (
                n.to_string(),
                TensorView::new(Dtype::F32, file.shape(n).unwrap().to_vec(), file.bytes(n).unwrap()).unwrap(),
            )
        })
        .collect();
    safetensors::serialize_to_file(&views, None, &dir.join("model.safetensors")).unwrap();
}

fn ints(file: &TensorFile, name: &str) -> Vec<i32> {
    file.bytes(name).unwrap().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn open(name: &str) -> Golden {
    let file = TensorFile::open(golden(&format!("{name}.safetensors"))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    folder(name, &file, dir.path());
    let model = load(dir.path(), &Backend::NdArray.device().unwrap().autodiff()).unwrap().model;
    let [b, t] = file.shape("input_ids").unwrap() else { panic!("input_ids must be [B, T]") };
    let batch = TokenBatch::plain(*b, *t, ints(&file, "input_ids"), ints(&file, "targets"));
    let entries = Family::of(model.config()).entries(model.config());
    Golden { file, model, batch, entries }
}

/// Largest difference relative to the largest expected value.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    let off = got.iter().zip(want).fold(0f64, |m, (g, w)| m.max(f64::from((g - w).abs())));
    if size == 0.0 { off } else { off / size }
}

fn check(name: &str) {
    let Golden { file, model, batch, entries } = open(name);
    let logits = distance(&to_host(model.logits(&batch)), &file.f32("logits").unwrap());
    assert!(logits < LOGITS, "{name}: logits are {logits:.2e} off");

    // As in training: with the balancing loss of experts in the gradients.
    let loss = model.loss(&batch, Some(0));
    let value = distance(&to_host(loss.clone().inner()), &file.f32("loss").unwrap());
    assert!(value < LOSSES, "{name}: the loss is {value:.2e} off");
    let grads = NamedGrads::from_backward(&model, &mut loss.backward());
    let mut worst = 0f64;
    for entry in &entries {
        let grad = to_host(grads.get(&entry.param).unwrap().clone());
        for piece in &entry.pieces {
            let want = file.f32(&format!("grad.{}", piece.name)).unwrap();
            let off = distance(&entry.split(&grad, piece), &want);
            assert!(off < GRADIENTS, "{name}: the gradient of {} is {off:.2e} off", piece.name);
            worst = worst.max(off);
        }
    }

    let config = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut optimizer = Optimizer::new(config, DecayRule::Matrices).unwrap();
    let mut model = model;
    let losses = file.f32("losses").unwrap();
    assert_eq!(losses.len(), 10);
    for (step, want) in losses.iter().enumerate() {
        let loss = model.loss(&batch, Some(step as u64));
        let off = distance(&to_host(loss.clone().inner()), &[*want]);
        assert!(off < LOSSES, "{name}: the loss before step {step} is {off:.2e} off");
        let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
        model = optimizer.step(3e-3, model, &mut grads).unwrap();
    }
    let params: HashMap<String, _> = parameters(&model).into_iter().collect();
    for entry in &entries {
        let values = to_host(params[&entry.param].clone());
        for piece in &entry.pieces {
            let (mut got, mut want) =
                (entry.split(&values, piece), file.f32(&format!("final.{}", piece.name)).unwrap());
            if piece.name.ends_with("attn.c_attn.bias") {
                // The bias of the keys has no influence: its gradient is rounding noise, which AdamW magnifies.
                let d = got.len() / 3;
                got.drain(d..2 * d);
                want.drain(d..2 * d);
            }
            let off = distance(&got, &want);
            assert!(off < GRADIENTS, "{name}: {} after ten steps is {off:.2e} off", piece.name);
        }
    }
    println!("{name}: logits {logits:.1e}, gradients {worst:.1e} off at most");
}

#[test]
fn gpt2_is_transformers_gpt2() {
    check("gpt2-tiny");
}

#[test]
fn llama_is_transformers_llama() {
    check("llama-tiny");
}

#[test]
fn tied_llama_is_transformers_llama() {
    check("llama-tiny-tied");
}

/// Two of five experts; gradients and steps with the balancing loss.
#[test]
fn a_mixture_of_experts_is_transformers_qwen3_moe() {
    check("qwen3-moe-tiny");
}

/// QK-norm, both soft-caps and a window, against plain PyTorch.
#[test]
fn a_decoder_with_bounded_logits_is_pytorchs() {
    check("bounded-tiny");
}

#[test]
fn the_cache_gives_the_same_logits() {
    for name in ["gpt2-tiny", "llama-tiny", "llama-tiny-tied", "bounded-tiny", "qwen3-moe-tiny"] {
        use firebox::train::model_io::load;
        let file = TensorFile::open(golden(&format!("{name}.safetensors"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        folder(name, &file, dir.path());
        let model = load(dir.path(), &Backend::NdArray.device().unwrap()).unwrap().model;
        let [_, t] = *file.shape("input_ids").unwrap() else { panic!("[B, T]") };
        let v = model.config().vocab_size;
        let want = file.f32("logits").unwrap();
        let ids = ints(&file, "input_ids");
        let mut cache = KvCache::new(&model);
        // A prompt of three tokens at once, then one at a time.
        let mut at = 0;
        for n in [3].into_iter().chain(std::iter::repeat_n(1, t - 3)) {
            let logits = to_host(model.forward_cached(&ids[at..at + n], &mut cache));
            at += n;
            let off = distance(&logits, &want[(at - 1) * v..at * v]);
            assert!(off < LOGITS, "{name}: after {at} tokens {off:.2e} off");
        }
    }
}
