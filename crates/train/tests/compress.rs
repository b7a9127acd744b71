//! A pipeline from a trained model to a smaller one, on real text.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use firebox_data::{Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::compress::pipeline::{Pipeline, Progress, Row};
use firebox_train::compress::recipe::CompressRecipe;
use firebox_train::observe::Observers;
use firebox_train::{Recipe, TrainError, Trainer};

/// Text with something to learn.
fn text() -> String {
    let words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"];
    let mut state = 7u32;
    let mut out = String::new();
    for i in 0..6000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.push_str(words[(i + (state >> 29) as usize) % words.len()]);
        out.push(if i % 11 == 10 { '\n' } else { ' ' });
    }
    out
}

struct Trained {
    dir: tempfile::TempDir,
    dataset: Dataset,
}

/// A small model that has learned some of the text.
fn trained() -> Trained {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    std::fs::write(&path, text()).unwrap();
    let set = [
        "data.tokenizer=char",
        "data.val_split=tail",
        "train.steps=60",
        "train.batch_rows=8",
        "model.context=32",
        "model.d_model=64",
        "model.n_heads=2",
        "model.d_ff=128",
        "eval.sample_tokens=0",
        "schedule={ kind = \"constant\" }",
    ];
    let recipe = Recipe::load("tiny", &set.map(String::from)).unwrap();
    let source = Source::new([path.display().to_string()]);
    let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
    let device = Backend::NdArray.device().unwrap();
    let mut trainer = Trainer::new(recipe, &dir.path().join("run"), &dataset, &device, None).unwrap();
    let info = trainer.info("ndarray", 1, "sentences".into());
    trainer.run(&info, &mut Observers::new(), &AtomicBool::new(false)).unwrap();
    drop(trainer);
    Trained { dir, dataset }
}

impl Trained {
    fn start(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn pipeline(&self, recipe: &str, out: &str) -> Result<Pipeline<'_>, TrainError> {
        let settings = "[calibration]\nrows = 16\n[eval]\nspeed_tokens = 0\n";
        let recipe = CompressRecipe::parse("test", &format!("{recipe}\n{settings}"), &[])?;
        let device = Backend::NdArray.device().unwrap();
        Pipeline::open(recipe, &self.start(), &self.dir.path().join(out), &self.dataset, &device)
    }

    fn rows(&self, recipe: &str, out: &str) -> Vec<Row> {
        self.pipeline(recipe, out).unwrap().run(&mut |_| {}, &AtomicBool::new(false)).unwrap()
    }
}

fn perplexities(rows: &[Row]) -> Vec<f64> {
    rows.iter().map(|row| row.measured.perplexity).collect()
}

#[test]
fn each_method_keeps_what_it_promises() {
    let trained = trained();
    let one = |step: &str, out: &str| trained.rows(&format!("[[steps]]\n{step}"), out)[1].clone();
    let start = trained.rows("[[steps]]\nkind = \"quantize\"\nformat = \"int8-channel\"\nmethod = \"nearest\"", "int8");
    let [f32, int8]: [f64; 2] = perplexities(&start).try_into().unwrap();
    assert!((int8 / f32 - 1.0).abs() < 0.005, "int8: {int8}, f32: {f32}");
    assert!(start[1].measured.bytes * 10 < start[0].measured.bytes * 4);

    let three = |method: &str| {
        let step = format!("kind = \"quantize\"\nformat = \"int3\"\nmethod = \"{method}\"\ntables = \"none\"");
        one(&step, method).measured
    };
    let [nearest, gptq, awq] = ["nearest", "gptq", "awq"].map(three);
    assert!(
        gptq.perplexity < nearest.perplexity && awq.perplexity < nearest.perplexity,
        "{nearest:?} {gptq:?} {awq:?}"
    );
    assert_eq!(nearest.bytes, gptq.bytes);

    let sparse = |method: &str| {
        let found =
            one(&format!("kind = \"prune\"\nmethod = \"{method}\"\nsparsity = \"2:4\""), &format!("{method}-24"));
        assert!((found.measured.sparsity - 0.5).abs() < 1e-6, "{method}: {}", found.measured.sparsity);
        found.measured.perplexity
    };
    let [magnitude, wanda, sparse_gpt] = ["magnitude", "wanda", "sparse_gpt"].map(sparse);
    assert!(wanda < magnitude && sparse_gpt < magnitude, "{magnitude} {wanda} {sparse_gpt}");
}

#[test]
fn models_of_other_shapes_are_steps_like_any_other() {
    let trained = trained();
    let recipe = "[[steps]]\nkind = \"shrink\"\nunits = 32\nkv_heads = 1\n\
        [[steps]]\nkind = \"low_rank\"\nranks = { input = 24, output = 24 }\n\
        [[steps]]\nkind = \"distill\"\nrecipe = \"tiny\"\n\
        set = [\"train.steps=10\", \"eval.sample_tokens=0\", \"schedule={ kind = 'constant' }\"]\n\
        [[steps]]\nkind = \"export\"\nformat = \"hf\"\n\
        [[steps]]\nkind = \"quantize\"\nformat = \"int4-channel\"\nmethod = \"nearest\"\n";
    let rows = trained.rows(recipe, "shapes");
    let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["start", "without 1 kv heads, 32 units", "low rank", "distill", "hf", "nearest int4-channel"]);
    let parameters: Vec<_> = rows.iter().map(|row| row.measured.parameters).collect();
    assert!(parameters[1] < parameters[0] && parameters[2] < parameters[1], "{parameters:?}");
    assert_eq!(parameters[2..], [parameters[2]; 4]);
    let bytes: Vec<_> = rows.iter().map(|row| row.measured.bytes).collect();
    assert!(bytes[1] < bytes[0] && bytes[2] < bytes[1] && 2 * bytes[5] < bytes[4], "{bytes:?}");
    let perplexities = perplexities(&rows);
    assert!(perplexities[3] < perplexities[2], "{perplexities:?}");
    assert!(trained.dir.path().join("shapes/4-export/config.json").is_file());
}

const THREE_STEPS: &str = "[[steps]]\nkind = \"prune\"\nsparsity = 0.5\n[[steps]]\nkind = \"train\"\nrecipe = \"tiny\"\n\
    set = [\"train.steps=20\", \"prune.keep_zeros=true\", \"eval.sample_tokens=0\", \"schedule={ kind = 'constant' }\"]\n\
    [[steps]]\nkind = \"quantize\"\nformat = \"int4-g32\"\nmethod = \"gptq\"\n";

#[test]
fn a_pipeline_goes_on_where_it_was_stopped_and_ends_in_the_same_model() {
    let trained = trained();
    let whole = trained.rows(THREE_STEPS, "whole");
    let names: Vec<_> = whole.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["start", "wanda 0.5", "train", "gptq int4-g32"]);
    let perplexities = perplexities(&whole);
    assert!(perplexities[2] < perplexities[1], "training recovers: {perplexities:?}");
    assert!((whole[2].measured.sparsity - 0.5).abs() < 0.01, "and keeps zeros: {}", whole[2].measured.sparsity);

    // Interrupted as each step begins.
    let mut rows = vec![];
    for stop_at in 0..5 {
        let interrupt = AtomicBool::new(false);
        let pipeline = trained.pipeline(THREE_STEPS, "parts").unwrap();
        let mut on = |progress: Progress<'_>| {
            if matches!(progress, Progress::Begun { number, .. } if number == stop_at) {
                interrupt.store(true, Ordering::Relaxed);
            }
        };
        rows = pipeline.run(&mut on, &interrupt).unwrap();
    }
    let strip = |rows: &[Row]| rows.iter().map(|row| (row.name.clone(), row.measured.clone())).collect::<Vec<_>>();
    assert_eq!(strip(&rows), strip(&whole));
    let model = |out: &str| std::fs::read(trained.dir.path().join(out).join("3-quantize/model.safetensors")).unwrap();
    assert!(model("parts") == model("whole"));
    let report = std::fs::read_to_string(trained.dir.path().join("parts/report.html")).unwrap();
    assert!(report.contains("gptq int4-g32") && report.matches("<circle").count() == 4);
}

#[test]
fn what_cannot_be_done_is_said_before_it_begins() {
    let trained = trained();
    let error = |recipe: &str, out: &str| match trained.pipeline(recipe, out) {
        Err(error) => error.to_string(),
        Ok(pipeline) => pipeline.run(&mut |_| {}, &AtomicBool::new(false)).unwrap_err().to_string(),
    };
    for (recipe, says) in [
        ("steps = []", "at least one"),
        ("[[steps]]\nkind = \"prune\"\nsparsity = 1.0", "sparsity"),
        ("[[steps]]\nkind = \"prune\"\nsparsity = \"4:2\"", "4:2"),
        ("[[steps]]\nkind = \"quantize\"\nformat = \"int5\"", "int5"),
        ("[[steps]]\nkind = \"quantize\"\nformat = \"int4-g48\"", "int4-g48"),
        ("[[steps]]\nkind = \"quantize\"\nformat = \"int4-g128\"", "128"),
        ("[[steps]]\nkind = \"train\"\nrecipe = \"nothing\"", "nothing"),
    ] {
        let error = error(recipe, "refused");
        assert!(error.contains(says), "{recipe}: {error}");
        assert!(!trained.dir.path().join("refused").exists(), "{recipe}: nothing was begun");
    }
    let too_many = "[[steps]]\nkind = \"prune\"\nsparsity = 0.5\n";
    let recipe = CompressRecipe::parse("test", too_many, &["calibration.rows=100000".into()]).unwrap();
    let device = Backend::NdArray.device().unwrap();
    let out = trained.dir.path().join("short");
    let pipeline = Pipeline::open(recipe, &trained.start(), &out, &trained.dataset, &device);
    let error = pipeline.err().expect("calibration text that is too short").to_string();
    assert!(error.contains("calibration"), "{error}");

    trained.rows("[[steps]]\nkind = \"prune\"\nsparsity = 0.5\n", "one");
    let Err(other) = trained.pipeline("[[steps]]\nkind = \"prune\"\nsparsity = 0.6\n", "one") else { panic!() };
    assert!(other.to_string().contains("--out"), "{other}");
}
