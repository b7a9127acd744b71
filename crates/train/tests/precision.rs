//! Mixed precision: bf16 and f16 train as f32 does, f16 needs its loss scaled, and all of it goes on after a checkpoint as if nothing had been.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::checkpoint::Checkpoint;
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo, Summary};
use firebox_train::{Recipe, State, Trainer};

const BF16: &str = "precision.compute=bf16";
const F16: &str = "precision.compute=f16";
const PURE: &str = "precision={ compute = \"bf16\", params = \"bf16\" }";

/// Lines of two letters in turn: what follows is what stood two places before.
fn dataset(dir: &Path) -> Dataset {
    let letter = |x: u64| b'a' + (x % 26) as u8;
    let mut text = Vec::new();
    for i in 0..6000u64 {
        let x = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let pair = [letter(x), letter(x / 26 + u64::from(x % 26 == x / 26 % 26))];
        text.extend((0..15).map(|j| pair[j % 2]).chain([b'\n']));
    }
    let path = dir.join("pairs.txt");
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    prepare(&recipe(&[]).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap()
}

fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.05 }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 60, batch_rows = 16 }",
        "model={ d_model = 32, n_layers = 2, n_heads = 2, context = 16 }",
        "eval={ every = 0, sample_tokens = 0 }",
        "optimizer.lr=1e-2",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

#[derive(Default)]
struct Skips(Vec<String>);

impl Observer for Skips {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        if let Event::Skipped { reason, .. } = event {
            self.0.push((*reason).to_owned());
        }
        Ok(())
    }
}

fn run(trainer: &mut Trainer<'_>) -> (Summary, Skips, State) {
    let mut skips = Skips::default();
    let summary = trainer.run(&RunInfo::default(), &mut skips, &AtomicBool::new(false)).unwrap();
    (summary, skips, trainer.state().clone())
}

fn train(dir: &Path, dataset: &Dataset, extra: &[&str]) -> (Summary, Skips, State) {
    let device = Backend::NdArray.device().unwrap();
    run(&mut Trainer::new(recipe(extra), dir, dataset, &device, None).unwrap())
}

#[test]
fn halves_train_as_f32_does() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let loss = |name: &str, extra: &[&str]| {
        let loss = train(&dir.path().join(name), &dataset, extra).0.val_loss.unwrap();
        println!("{name}: {loss:.4}");
        loss
    };
    let full = loss("f32", &[]);
    for compute in [BF16, F16, PURE] {
        let half = loss(compute, &[compute]);
        assert!((half - full).abs() < 0.02 && half.to_bits() != full.to_bits(), "{compute}: {half}, f32 {full}");
        // What is computed again in backward is what was computed in forward.
        let again = loss("again", &[compute, "memory.recompute=blocks"]);
        assert_eq!(again.to_bits(), half.to_bits(), "{compute}");
    }
}

/// The mean over a million tokens has gradients below the least number of f16.
#[test]
fn f16_needs_its_loss_scaled() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let large = [
        "train={ steps = 12, batch_rows = 131072, micro_batch_rows = 8192 }",
        "model={ d_model = 16, n_layers = 1, n_heads = 1, context = 8, tied = false, init_std = 0.01 }",
        "eval.max_batches=4",
    ];
    let loss = |name: &str, precision: &str| {
        let (summary, _, state) = train(&dir.path().join(name), &dataset, &[&large[..], &[precision]].concat());
        println!("{name}: {:.4}, {} skipped, {:?}", summary.val_loss.unwrap(), summary.skipped_steps, state.loss_scale);
        summary.val_loss.unwrap()
    };
    let scaled = loss("scaled", "precision.compute=f16");
    let unscaled = loss("unscaled", "precision={ compute = \"f16\", loss_scale = 1 }");
    let unigram = 26f64.ln();
    assert!(scaled < 0.8 * unigram, "{scaled}");
    assert!(unscaled > 0.95 * unigram, "{unscaled} without scaling");
}

#[test]
fn overflow_halves_the_scale_and_skips_the_step() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let wide = ["precision.compute=f16", "model.init_std=2.0", "train.max_bad_steps=1", "optimizer.lr=1e-3"];
    let (summary, skips, state) = train(&dir.path().join("wide"), &dataset, &wide);
    println!("{:?} {:?}", skips.0, state.loss_scale);
    assert!(summary.skipped_steps > 0 && skips.0.iter().all(|reason| reason.contains("overflows at loss scale")));
    assert_eq!(state.loss_scale.factor, 65536.0 / 2f64.powi(summary.skipped_steps as i32));
    assert!(summary.train_loss.unwrap().is_finite());
}

#[test]
fn a_resumed_run_takes_the_same_steps() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let device = Backend::NdArray.device().unwrap();
    for precision in [BF16, F16, PURE] {
        let extra = [precision, "model.init_std=0.5", "checkpoint={ every = 20, keep_last = 5 }"];
        let whole = dir.path().join(precision);
        let (summary, _, state) = train(&whole, &dataset, &extra);
        let at = Checkpoint::open(whole.join("checkpoints/step-20")).unwrap();
        let resumed = dir.path().join("resumed").join(precision);
        let (again, _, state_again) =
            run(&mut Trainer::resume(recipe(&extra), &resumed, &dataset, &device, &at).unwrap());
        assert_eq!(again.val_loss.map(f64::to_bits), summary.val_loss.map(f64::to_bits), "{precision}");
        assert_eq!(state_again.loss_scale, state.loss_scale);
        let read = |run: &Path| std::fs::read(run.join("checkpoints/step-60/model.safetensors")).unwrap();
        assert!(read(&whole) == read(&resumed), "{precision}: parameters differ");
    }
}
