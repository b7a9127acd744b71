//! Exported models, opened by the programs that they are for: transformers, ONNX Runtime, PyPI's gguf, llama.cpp.

mod files;
#[cfg(feature = "llama")]
mod llama;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use firebox::data::{Source, prepare};
use firebox::models::TokenBatch;
use firebox::tensor::device::Backend;
use firebox::train::export::{Exported, export};
use firebox::train::generate::{Sampling, generate};
use firebox::train::model_io::{Loaded, load, to_host};
use firebox::train::observe::Observers;
use firebox::train::{Recipe, Trainer};
use serde_json::{Value, json};

/// Tokens that are written after the ids.
const NEW: usize = 16;

/// Text that a tokenizer can get wrong.
const TEXTS: [&str; 3] =
    ["The boiler feeds the fire, 3 times.\n", "  It's 42°C —\tdéjà vu, 中文!\r\n\n🙂  ", "a<|endoftext|>b"];

/// A small model of each kind, trained for some steps.
struct Model {
    dir: tempfile::TempDir,
    loaded: Loaded,
    /// What follows is asked of.
    ids: Vec<i32>,
}

impl Model {
    /// Grouped heads, a tied head.
    fn llama() -> Self {
        Self::trained(&[
            "model.d_model=256",
            "model.n_heads=8",
            "model.n_kv_heads=2",
            "model.d_ff=256",
            "model.tied=true",
        ])
    }

    /// QK-norm, heads wider than the model, rows that are no blocks of 256.
    fn qwen3() -> Self {
        let heads = ["model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=32"];
        let shape = ["model.d_model=96", "model.qk_norm=true", "model.d_ff=160", "model.tied=false"];
        Self::trained(&[&heads[..], &shape].concat())
    }

    /// Two of four experts, as Mixtral's or, with QK-norm, as Qwen 3's.
    fn experts(qk_norm: bool) -> Self {
        let shape = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96", "model.n_experts=4"];
        let rest = ["model.experts_per_token=2", &format!("model.qk_norm={qk_norm}")];
        Self::trained(&[&shape[..], &rest].concat())
    }

    fn gpt2() -> Self {
        Self::trained(&["model.preset=gpt2", "model.d_model=96", "model.n_heads=3", "model.d_ff=200"])
    }

    fn trained(shape: &[&str]) -> Self {
        let common = [
            "data.vocab_size=320",
            "data.val_split=tail",
            "train.steps=25",
            "train.batch_rows=8",
            "eval.every=0",
            "eval.sample_tokens=8",
            "model.context=48",
            "model.n_layers=2",
        ];
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.toml");
        std::fs::write(
            &base,
            "name = \"base\"\n[optimizer]\nlr = 3e-3\n[schedule]\nkind = \"constant\"\nwarmup_steps = 3\n",
        )
        .unwrap();
        let set: Vec<String> = common.iter().chain(shape).map(ToString::to_string).collect();
        let recipe = Recipe::load(&base.display().to_string(), &set).unwrap();
        let text = dir.path().join("text.txt");
        std::fs::write(
            &text,
            format!("{}\n{}", TEXTS.concat().replace("<|endoftext|>", ""), firebox_tests::text(20_000)),
        )
        .unwrap();
        let source = Source::new([text.display().to_string()]);
        let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
        let device = Backend::NdArray.device().unwrap();
        let mut trainer = Trainer::new(recipe, &dir.path().join("run"), &dataset, &device, None).unwrap();
        let info = trainer.info("ndarray", 1, "counted sentences".into());
        trainer.run(&info, &mut Observers::new(), &AtomicBool::new(false)).unwrap();
        let loaded = load(dir.path().join("run"), &device).unwrap();
        let ids = Self::tokens(&loaded, "The valve warms the whistle, 4 times.\nThe driver ");
        let ids = ids[..ids.len().min(24)].to_vec();
        Self { dir, loaded, ids }
    }

    /// As they begin in training.
    fn tokens(loaded: &Loaded, text: &str) -> Vec<i32> {
        firebox::train::prompt_ids(loaded.tokenizer.as_ref().unwrap(), text.as_bytes()).unwrap()
    }

    fn export(&self, target: &str) -> Exported {
        let out = self.dir.path().join(target.replace(':', "-"));
        export(self.dir.path().join("run"), target.parse().unwrap(), out).unwrap()
    }

    /// What `run_model.py` says of an exported model.
    fn ask(&self, kind: &str, path: &Path) -> Value {
        let python = match kind {
            "hf" => "FIREBOX_TORCH_PYTHON",
            "llama" => "FIREBOX_LLAMA_PYTHON",
            _ => "FIREBOX_PYTHON",
        };
        let python =
            std::env::var(python).unwrap_or_else(|_| panic!("{python} must name a Python: see cargo xtask test"));
        let request = self.dir.path().join("request.json");
        let content =
            json!({ "ids": self.ids, "texts": TEXTS, "new": NEW, "context": self.loaded.model.config().context });
        std::fs::write(&request, content.to_string()).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/run_model.py");
        let output = Command::new(python).arg(script).arg(kind).arg(path).arg(&request).output().unwrap();
        assert!(output.status.success(), "{kind}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// What a model says after each of the ids.
fn logits(loaded: &Loaded, ids: &[i32]) -> Vec<f32> {
    let n = ids.len();
    to_host(loaded.model.logits(&TokenBatch::plain(1, n, ids.to_vec(), vec![-100; n])))
}

/// The most likely continuation of the ids.
fn greedy(loaded: &Loaded, ids: &[i32]) -> Vec<i32> {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    generate(&loaded.model, ids, NEW, &sampling, None, |_| true).unwrap()[ids.len()..].to_vec()
}

fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|x| x.as_f64().unwrap() as f32)
        .collect()
}

fn ints(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|x| x.as_i64().unwrap() as i32).collect()
}

/// The largest difference.
#[track_caller]
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Texts become the same tokens, and come back. A separator comes first only in a program that is told to put it there.
#[track_caller]
fn same_tokens(model: &Model, answer: &Value, separator: bool) {
    let eot = model.loaded.tokenizer.as_ref().unwrap().eot();
    assert_eq!(answer["eos"].as_u64(), eot.map(u64::from));
    for ((text, tokens), back) in
        TEXTS.iter().zip(answer["tokens"].as_array().unwrap()).zip(answer["texts"].as_array().unwrap())
    {
        let want = Model::tokens(&model.loaded, text);
        let want = if separator { &want[..] } else { &want[1..] };
        // transformers finds special tokens in text, and Firebox does not.
        if !text.contains("<|") || separator {
            assert_eq!(ints(tokens), want, "{text:?}");
            assert_eq!(back, text);
        }
    }
}
