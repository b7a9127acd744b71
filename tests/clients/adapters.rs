//! Adapters that Firebox trained, opened by PEFT beside the model in transformers.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox::data::{Source, prepare};
use firebox::models::TokenBatch;
use firebox::tensor::device::Backend;
use firebox::train::export::export;
use firebox::train::model_io::{load, to_host};
use firebox::train::observe::{Observers, RunInfo};
use firebox::train::{Recipe, Trainer};
use serde_json::json;

use super::encoders::{ask, distance};

const SMALL: [&str; 7] = [
    "data={ tokenizer = \"char\", val_split = \"tail\" }",
    "model={ d_model = 32, n_layers = 2, n_heads = 4, context = 32, init_std = 0.2, dropout = 0.0 }",
    "train={ steps = 6, batch_rows = 4, row_tokens = 32, log_every = 2 }",
    "schedule={ kind = \"constant\" }",
    "eval={ every = 0, sample_tokens = 0 }",
    "checkpoint={ every = 6 }",
    "optimizer.lr=2e-2",
];

/// A style of model, and the adapters it gets.
const CASES: [(&str, &str, &str); 3] = [
    ("lora", "model={}", "adapter={ kind = \"lora\", rank = 4, targets = [\"all\"] }"),
    (
        "dora",
        "model={ n_kv_heads = 2 }",
        "adapter={ kind = \"dora\", rank = 3, alpha = 5.0, targets = [\"q_proj\", \"v_proj\", \"down_proj\"] }",
    ),
    (
        "gpt2-rslora",
        "model={ norm = \"layer_norm\", feed_forward = \"gelu\", positions = \"learned\", bias = true, tied = true }",
        "adapter={ kind = \"lora\", rank = 4, rslora = true }",
    ),
];

#[test]
fn peft_opens_what_was_trained() {
    let python = std::env::var("FIREBOX_TORCH_PYTHON").expect("FIREBOX_TORCH_PYTHON: see cargo xtask test");
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let text = dir.path().join("text.txt");
    std::fs::write(&text, firebox_tests::text(6000)).unwrap();
    let ids: Vec<i32> = (0..12).map(|i| i * 5 % 17).collect();
    let batch = TokenBatch::plain(1, 12, ids.clone(), ids.clone());
    let (mut request, mut want) = (json!({}), vec![]);
    for (name, model, adapter) in CASES {
        let [run, base, tuned] = ["run", "base", "tuned"].map(|part| dir.path().join(format!("{name}-{part}")));
        let set: Vec<String> = SMALL.iter().chain([&model]).map(ToString::to_string).collect();
        let recipe = Recipe::load("tiny", &set).unwrap();
        let source = Source::new([text.display().to_string()]);
        let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
        let train = |recipe: Recipe, out: &Path| {
            let init = recipe.initial_model(&device).unwrap();
            let mut trainer = Trainer::new(recipe, out, &dataset, &device, init).unwrap();
            trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false)).unwrap();
        };
        train(recipe.clone(), &run);
        export(&run, "hf:same".parse().unwrap(), &base).unwrap();
        let adapted = recipe.clone().starting_from(&base).unwrap().with(&[adapter.to_owned()]).unwrap();
        train(Recipe { data: recipe.data.clone(), ..adapted }, &tuned);
        let logits = |path: &Path| to_host(load(path, &device).unwrap().model.logits(&batch));
        let (before, after) = (logits(&base), logits(&tuned));
        assert!(distance(&after, &before) > 0.05, "{name}: the adapters change what the model says");
        request[name] = json!({ "base": base, "adapters": tuned.join("checkpoints/step-6") });
        want.push((name, after));
    }
    let (answer, got) = ask(&python, "adapters.py", &json!({ "models": request, "ids": [ids] }), dir.path());
    for (name, want) in want {
        // PEFT says this of adapters' tensors that it does not find, or does not know.
        assert_eq!(answer[name], json!({ "missing": [], "unexpected": [] }), "{name}");
        for key in ["", ".merged"] {
            let off = distance(&want, &got.f32(&format!("{name}{key}")).unwrap());
            println!("{name}{key}: {off:.1e} off");
            assert!(off < 1e-5, "{name}{key}: {off:.1e} off");
        }
    }
}
