//! Programs that read what Firebox writes, as their users run them. `cargo xtask test` sets `FIREBOX_PYTHON` to a Python
//! that has what `requirements.txt` lists.
#![allow(clippy::unwrap_used)]

mod adapters;
mod encoders;
mod export;
mod pretrained;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use firebox::data::{Source, prepare};
use firebox::tensor::device::Backend;
use firebox::train::observe::{Event, Observer, Observers};
use firebox::train::{Recipe, Trainer};
use serde_json::Value;

/// Trains the tiny recipe on characters in `dir/run`, with all the files that `firebox train` writes.
fn train(dir: &Path) {
    let text = dir.join("text.txt");
    std::fs::write(&text, firebox_tests::text(20_000)).unwrap();
    let set = [
        "data.tokenizer=char",
        "data.val_split=tail",
        "train.steps=12",
        "train.log_every=2",
        "eval.every=4",
        "eval.sample_tokens=8",
    ];
    let recipe = Recipe::load("tiny", &set.map(String::from)).unwrap();
    let source = Source::new([text.display().to_string()]);
    let dataset = prepare(&recipe.data, &[source], &dir.join("cache"), &mut |_| {}).unwrap();
    let device = Backend::NdArray.device().unwrap();
    let mut trainer = Trainer::new(recipe, &dir.join("run"), &dataset, &device, None).unwrap();
    let mut observers = Observers::files();
    let info = trainer.info("ndarray", 1, "counted sentences".into());
    observers.on_event(&Event::RunStarted(&info)).unwrap();
    trainer.run(&info, &mut observers, &AtomicBool::new(false)).unwrap();
}

#[test]
fn tensorboard_reads_the_numbers_of_metrics_jsonl() {
    let python = std::env::var("FIREBOX_PYTHON")
        .expect("FIREBOX_PYTHON must name a Python with TensorBoard: cargo xtask test --install clients");
    let dir = tempfile::tempdir().unwrap();
    train(dir.path());
    let run = dir.path().join("run");

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/read_events.py");
    let output = Command::new(python).arg(script).arg(&run).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();

    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let written: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (tag, key) in [
        ("train/loss", "loss"),
        ("train/learning_rate", "lr"),
        ("train/gradient_norm", "grad_norm"),
        ("validation/loss", "val_loss"),
        ("validation/bits_per_byte", "val_bpb"),
    ] {
        let want: Vec<(u64, f64)> =
            written.iter().filter_map(|line| Some((line["step"].as_u64()?, line.get(key)?.as_f64()?))).collect();
        let got: Vec<(u64, f64)> = read["scalars"][tag]
            .as_array()
            .unwrap_or_else(|| panic!("TensorBoard found no `{tag}` in {read:#}"))
            .iter()
            .map(|event| (event[0].as_u64().unwrap(), event[2].as_f64().unwrap()))
            .collect();
        assert!(!want.is_empty() && want.len() == got.len(), "{tag}: got {got:?}, expected {want:?}");
        for (got, want) in got.iter().zip(&want) {
            // Event files hold f32.
            let close = (got.1 - want.1).abs() <= f64::from(f32::EPSILON) * want.1.abs();
            assert!(got.0 == want.0 && close, "{tag}: got {got:?}, expected {want:?}");
        }
    }
    let samples = read["texts"]["sample"].as_array().unwrap();
    assert!(!samples.is_empty() && samples.iter().all(|sample| !sample[1].as_str().unwrap().is_empty()));
}
