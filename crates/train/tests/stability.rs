//! Corrupted data in the middle of a run, and averages of parameters.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::checkpoint::Checkpoint;
use firebox_train::observe::{EvalRecord, Event, ObserveError, Observer, RunInfo};
use firebox_train::{Recipe, State, Trainer};

const STEPS: u64 = 400;

fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1 }",
        "schedule={ kind = \"cosine\", min_lr_ratio = 0.0 }",
        "train={ steps = 400, batch_rows = 4 }",
        "model={ d_model = 64, n_layers = 1, n_heads = 2, context = 32 }",
        "eval={ every = 0, sample_tokens = 0 }",
        "optimizer.lr=5e-3",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

/// Numbered lines, of which a few in the middle are noise where `corrupt`.
fn dataset(dir: &Path, corrupt: bool) -> Dataset {
    const NOISE: &[u8] = b"ZQXJKVWBPYGUMLDRHSNIOATE";
    let mut text: Vec<u8> = NOISE.to_vec();
    text.extend((0..900u64).flat_map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991).into_bytes()));
    if corrupt {
        for (i, byte) in text[12_000..12_200].iter_mut().enumerate() {
            *byte = NOISE[(i * i * 7 + i / 3) % NOISE.len()];
        }
    }
    let path = dir.join(format!("text-{corrupt}.txt"));
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    prepare(&recipe(&[]).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap()
}

#[derive(Default)]
struct Seen {
    skipped: Vec<String>,
    evals: Vec<EvalRecord>,
}

impl Observer for Seen {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::Skipped { reason, .. } => self.skipped.push((*reason).to_owned()),
            Event::Evaluated(record) => self.evals.push((*record).clone()),
            _ => {}
        }
        Ok(())
    }
}

fn run(trainer: &mut Trainer<'_>) -> (f64, Seen, State) {
    let mut seen = Seen::default();
    let summary = trainer.run(&RunInfo::default(), &mut seen, &AtomicBool::new(false)).unwrap();
    (summary.val_loss.unwrap(), seen, trainer.state().clone())
}

#[test]
fn corrupted_batches_are_left_out_or_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let (clean, corrupt) = (dataset(dir.path(), false), dataset(dir.path(), true));
    let train = |name: &str, dataset: &Dataset, extra: &[&str]| {
        let mut trainer = Trainer::new(recipe(extra), &dir.path().join(name), dataset, &device, None).unwrap();
        run(&mut trainer)
    };
    let (undisturbed, ..) = train("clean", &clean, &[]);
    let skip = "watch={ on_spike = \"skip\", threshold = 5.0, warmup_steps = 20 }";
    let (skipped, seen, state) = train("skip", &corrupt, &[skip]);
    println!("undisturbed {undisturbed:.4}, skipped {skipped:.4}: {:?}", seen.skipped);
    assert!((skipped - undisturbed).abs() < 0.02, "{skipped} {undisturbed}");
    assert!(state.watch.spikes > 0 && state.skipped == state.watch.spikes && state.step == STEPS);
    assert!(seen.skipped.iter().all(|reason| reason.contains("spike")));

    let back =
        "watch={ on_spike = \"rollback\", threshold = 5.0, warmup_steps = 20, skip_batches = 2, max_rollbacks = 100 }";
    let (rolled, seen, state) = train("back", &corrupt, &[back, "checkpoint.every=10"]);
    println!("rolled back {rolled:.4}: {:?}", seen.skipped);
    // It has seen more good data in the end, and may be better.
    assert!(rolled < undisturbed + 0.02, "{rolled} {undisturbed}");
    assert!(state.watch.rollbacks > 0 && state.step == STEPS);
    // Steps were taken again, with other data: what was read does not go back.
    assert!(state.samples > 4 * STEPS && seen.skipped.iter().all(|reason| reason.contains("back to step")));
}

#[test]
fn the_noise_scale_is_measured_without_a_trace_in_the_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let dataset = dataset(dir.path(), false);
    let with = |every: u64| {
        let watch = format!("watch.noise_scale_every={every}");
        let train = "train={ steps = 60, batch_rows = 16, micro_batch_rows = 6, batch_warmup = { start_rows = 2, steps = 20 } }";
        recipe(&[train, &watch, "checkpoint={ every = 33, keep_last = 5 }", "model.dropout=0.1"])
    };
    let start = |name: &str, every| {
        let folder = dir.path().join(name);
        let (_, _, state) = run(&mut Trainer::new(with(every), &folder, &dataset, &device, None).unwrap());
        (folder, state)
    };
    let (off, state) = start("off", 0);
    assert_eq!((state.noise_scale.measured, state.noise_scale.rows()), (0, None));
    let (on, state) = start("on", 3);
    // Warmup: more than six rows, so that there are two micro-batches, from step 7 on.
    assert_eq!(state.noise_scale.measured, 18);
    let rows = state.noise_scale.rows().unwrap();
    println!("noise scale {rows:.2} rows");
    assert!(rows > 0.01 && rows < 1e3, "{rows}");
    let half = Checkpoint::open(on.join("checkpoints/step-33")).unwrap();
    let resumed = dir.path().join("resumed");
    let (_, _, again) = run(&mut Trainer::resume(with(3), &resumed, &dataset, &device, &half).unwrap());
    assert_eq!(again.noise_scale, state.noise_scale);
    for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
        let read = |run: &Path| std::fs::read(run.join("checkpoints/step-60").join(file)).unwrap();
        assert!(read(&on) == read(&off), "{file} differs");
        assert!(read(&on) == read(&resumed), "{file} differs after a resume");
    }
}

#[test]
fn averages_are_evaluated_kept_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let dataset = dataset(dir.path(), false);
    for (name, average) in [
        ("ema", "average={ kind = \"ema\", decay = 0.9 }"),
        ("lawa", "average={ kind = \"lawa\", every = 5, count = 4 }"),
    ] {
        // A constant rate: that is where averages help.
        let recipe =
            recipe(&[average, "schedule={ kind = \"constant\" }", "checkpoint={ every = 200, keep_last = 5 }"]);
        let whole = dir.path().join(name);
        let (loss, seen, _) = run(&mut Trainer::new(recipe.clone(), &whole, &dataset, &device, None).unwrap());
        let averaged = seen.evals.last().unwrap().val_loss_average.unwrap();
        println!("{name}: {loss:.4}, averaged {averaged:.4}");
        assert!(averaged < loss, "{name}: {averaged} of the average, {loss}");
        let half = Checkpoint::open(whole.join("checkpoints/step-200")).unwrap();
        let resumed = dir.path().join(format!("{name}-resumed"));
        let (_, again, _) = run(&mut Trainer::resume(recipe, &resumed, &dataset, &device, &half).unwrap());
        let again = again.evals.last().unwrap().val_loss_average.unwrap();
        assert_eq!(again.to_bits(), averaged.to_bits(), "{name}");
        for file in ["average/model.safetensors", "average/state.safetensors"] {
            let read = |run: &Path| std::fs::read(run.join("checkpoints/step-400").join(file)).unwrap();
            assert!(read(&whole) == read(&resumed), "{name}: {file} differs");
        }
    }
}
