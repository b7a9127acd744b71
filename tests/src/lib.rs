//! What the end-to-end tests share: golden values, a small corpus, and a run that records its losses.
//!
//! ```
//! // One sentence of a corpus that compresses well and is made of nothing but arithmetic.
//! assert!(firebox_tests::text(100).len() >= 100);
//! ```
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use firebox::data::{Source, prepare};
use firebox::tensor::Device;
use firebox::train::observe::{Event, ObserveError, Observer};
use firebox::train::{Recipe, Trainer};

/// A file of `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// At least `bytes` bytes of text with structure to learn: counted sentences.
pub fn text(bytes: usize) -> String {
    let nouns = ["boiler", "fire", "valve", "piston", "driver", "tender", "whistle"];
    let verbs = ["feeds", "warms", "opens", "turns", "watches"];
    let mut out = String::new();
    let mut i = 0usize;
    while out.len() < bytes {
        out +=
            &format!("The {} {} the {}, {} times.\n", nouns[i % 7], verbs[i * 3 % 5], nouns[(i * 5 + 2) % 7], i % 10);
        i += 1;
    }
    out
}

/// Losses of the steps of a run.
#[derive(Default)]
pub struct Losses(pub Vec<f64>);

impl Observer for Losses {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        if let Event::Step(step) = event {
            self.0.push(step.loss);
        }
        Ok(())
    }
}

/// Trains by `recipe` and `overrides` on [`text`] and returns the loss of every step.
pub fn losses(recipe: &str, overrides: &[&str], device: &Device) -> Vec<f64> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    std::fs::write(&path, text(20_000)).unwrap();
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    let recipe = Recipe::load(recipe, &overrides).unwrap();
    let source = Source::new([path.display().to_string()]);
    let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
    let mut trainer = Trainer::new(recipe, &dir.path().join("run"), &dataset, device, None).unwrap();
    let mut seen = Losses::default();
    let info = trainer.info("", 1, "counted sentences".into());
    trainer.run(&info, &mut seen, &AtomicBool::new(false)).unwrap();
    seen.0
}

/// Losses of 20 steps of three small models (Llama-style with grouped heads, the same with QK-norm and soft-caps, GPT-2-style with dropout) on `device` are those on ndarray to 1e-3 relative.
#[track_caller]
pub fn same_losses_as_ndarray(device: &Device) {
    let common = [
        "data.tokenizer=char",
        "data.val_split=tail",
        "data.isolate_documents=false",
        "train.steps=20",
        "train.log_every=1",
        "train.batch_rows=4",
        "train.micro_batch_rows=2",
        "eval.sample_tokens=8",
        "eval.max_batches=1",
        "model.context=24",
        "model.d_model=32",
        "model.n_layers=2",
    ];
    let llama = ["model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=48"];
    let bounds = ["model.qk_norm=true", "model.attention_softcap=3", "model.logit_softcap=6"];
    let bounded = [&llama[..], &bounds].concat();
    let gpt2 = ["model.preset=gpt2", "model.n_heads=2", "model.dropout=0.1", "model.d_ff=64"];
    let ndarray = firebox::tensor::device::Backend::NdArray.device().unwrap();
    for (name, shape) in [("llama", &llama[..]), ("bounded", &bounded[..]), ("gpt2", &gpt2[..])] {
        let mut set: Vec<&str> = common.to_vec();
        set.extend(shape);
        // `depth` of the base recipe and a preset exclude each other.
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.toml");
        std::fs::write(
            &base,
            "name = \"base\"\n[optimizer]\nlr = 3e-3\n[schedule]\nkind = \"constant\"\nwarmup_steps = 3\n",
        )
        .unwrap();
        let base = base.display().to_string();
        let want = losses(&base, &set, &ndarray);
        let got = losses(&base, &set, device);
        assert_eq!((want.len(), got.len()), (20, 20), "{name}");
        assert!(want[19] < 0.9 * want[0], "{name}: nothing was learned: {want:?}");
        for (step, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= 1e-3 * w, "{name} step {step}: got {g}, expected {w}");
        }
        println!("{name}: ndarray {want:.5?}\n{name}: device  {got:.5?}");
    }
}
