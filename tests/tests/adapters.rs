//! Adapters as PEFT saves them (`golden/peft_adapters.py`): imported onto their model they give its logits, and in training the gradients that PyTorch gives them.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use firebox::models::transformer::hf::Family;
use firebox::models::{Staged, TokenBatch};
use firebox::optim::NamedGrads;
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::model_io::{load, to_host};
use firebox::train::{AdapterRecipe, merge_adapters};
use firebox_tests::golden;
use safetensors::tensor::TensorView;

/// PyTorch's own error in f32 is a tenth of this.
const CLOSE: f32 = 1e-5;

fn write(file: &TensorFile, to: &Path, wanted: &dyn Fn(&str) -> bool) {
    let views: HashMap<String, TensorView<'_>> = file
        .names()
        .filter(|name| wanted(name))
        .map(|name| {
            let (dtype, shape) = (file.dtype(name).unwrap(), file.shape(name).unwrap().to_vec());
            (name.to_owned(), TensorView::new(dtype, shape, file.bytes(name).unwrap()).unwrap())
        })
        .collect();
    safetensors::serialize_to_file(&views, None, to).unwrap();
}

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    let largest = want.iter().fold(0f32, |most, v| most.max(v.abs()));
    let apart = got.iter().zip(want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert_eq!(got.len(), want.len(), "{what}");
    assert!(apart <= CLOSE * largest.max(1e-3), "{what}: {apart} off, of {largest}");
}

#[test]
fn adapters_of_peft_compute_and_learn_as_there() {
    for name in ["llama3", "gpt2"] {
        for kind in ["lora", "dora"] {
            let dir = tempfile::tempdir().unwrap();
            let [base, adapters, out] = ["base", "adapters", "out"].map(|name| dir.path().join(name));
            fs::create_dir(&base).unwrap();
            fs::create_dir(&adapters).unwrap();
            fs::copy(golden(&format!("import-{name}.json")), base.join("config.json")).unwrap();
            let of_base = TensorFile::open(golden(&format!("import-{name}.safetensors"))).unwrap();
            write(&of_base, &base.join("model.safetensors"), &|name| name.contains('.'));
            let file = TensorFile::open(golden(&format!("peft-{name}-{kind}.safetensors"))).unwrap();
            fs::copy(golden(&format!("peft-{name}-{kind}.json")), adapters.join("adapter_config.json")).unwrap();
            write(&file, &adapters.join("adapter_model.safetensors"), &|name| name.starts_with("base_model"));
            let ids = file.bytes("input_ids").unwrap();
            let ids: Vec<i32> = ids.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
            let n = ids.len();
            // transformers shifts labels: the last token has none.
            let targets: Vec<i32> = ids[1..].iter().copied().chain([-1]).collect();
            let mut batch = TokenBatch::plain(1, n, ids, targets);
            batch.loss_scale = 1.0 / (n - 1) as f64;
            let want = file.f32("logits").unwrap();

            merge_adapters(&adapters, Some(&base), &out).unwrap();
            let device = Backend::NdArray.device().unwrap();
            let merged = load(&out, &device).unwrap().model;
            assert_close(&format!("{name} {kind}, merged"), &to_host(merged.logits(&batch)), &want);

            let plain = load(&base, &device.autodiff()).unwrap().model.for_training(0, 0.0).unwrap();
            let recipe = AdapterRecipe { init: Some(adapters.clone()), ..AdapterRecipe::default() };
            let model = recipe.imported(plain).unwrap();
            assert_close(&format!("{name} {kind}"), &to_host(model.logits(&batch).inner()), &want);
            let loss = model.loss(&batch, Some(0));
            assert_close(&format!("{name} {kind}: loss"), &to_host(loss.clone().inner()), &file.f32("loss").unwrap());
            let (grads, _) = NamedGrads::backward_onto(&model, loss, NamedGrads::new());
            let entries = Family::of(model.config()).entries(model.config());
            let mut compared = 0;
            for entry in entries.iter().filter(|entry| entry.param.contains(".adapter.")) {
                let values = to_host(grads.get(&entry.param).unwrap().clone());
                for piece in &entry.pieces {
                    let want = file.f32(&format!("grad.{}", piece.name)).unwrap();
                    assert_close(&format!("{name} {kind}: {}", piece.name), &entry.split(&values, piece), &want);
                    compared += 1;
                }
            }
            assert_eq!(compared, file.names().filter(|name| name.starts_with("grad.")).count(), "{name} {kind}");
            assert_eq!(grads.len(), entries.iter().filter(|e| e.param.contains(".adapter.")).count());
        }
    }
}
