//! Checkpoint folders under everything that happens to files: kills, full disks, damage and malice.
#![allow(clippy::unwrap_used)]

mod full;
mod hostile;
mod kill;
mod retain;
mod round_trip;
mod torn;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use firebox_train::checkpoint::{Checkpoint, CheckpointError, TensorSpec, Writer};
use serde_json::{Value, json};

/// Tensors of the small checkpoints that most tests write.
const SHAPES: [(&str, &[usize]); 4] = [("wte", &[5, 3]), ("ln.weight", &[3]), ("scale", &[]), ("none", &[0, 7])];

/// Writes a checkpoint of `step` whose every number is `value`; `scale` makes the model larger.
fn write(dir: &Path, step: u64, value: f32, scale: usize, metric: Option<f64>) -> Result<PathBuf, CheckpointError> {
    let mut specs: Vec<_> = SHAPES.iter().map(|(name, shape)| TensorSpec::f32(*name, *shape)).collect();
    specs.push(TensorSpec::f32("big", [scale]));
    let data = || specs.iter().map(|spec| value.to_le_bytes().repeat(spec.shape.iter().product()));
    let mut writer = Writer::create(dir, step)?;
    writer.tensors("model.safetensors", &BTreeMap::from([("format".into(), "pt".into())]), &specs, data())?;
    writer.json("config.json", &json!({ "n_layers": 2 }))?;
    writer.tensors("optimizer/adamw.safetensors", &BTreeMap::new(), &specs, data())?;
    writer.json("state.json", &json!({ "step": step, "value": value }))?;
    writer.finish_with_metric(metric)
}

/// Asserts that all the content of a checkpoint is of one writing, and returns the value it was written with.
#[track_caller]
fn consistent_value(checkpoint: &Checkpoint) -> f32 {
    let state: Value = checkpoint.read_json("state.json").unwrap();
    assert_eq!(state["step"], checkpoint.step());
    let value = state["value"].as_f64().unwrap() as f32;
    for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
        let tensors = checkpoint.tensors(file).unwrap();
        assert_eq!(tensors.len(), SHAPES.len() + 1);
        for name in tensors.names() {
            let numbers = tensors.f32(name).unwrap();
            assert_eq!(numbers.len(), tensors.shape(name).unwrap().iter().product::<usize>());
            assert!(numbers.iter().all(|&x| x == value), "{name} of {file} is of another writing than {value}");
        }
    }
    value
}

/// The names in `dir`, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The names that begin with a dot: folders that are no finished checkpoints.
fn hidden(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|name| name.starts_with('.')).collect()
}

/// This test binary as a helper process that runs the ignored test `name` with `dir` in the environment.
fn helper(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).env(HELPER_DIR, dir);
    command
}

/// Set for helper processes only: where they work.
const HELPER_DIR: &str = "FIREBOX_TEST_CHECKPOINT_DIR";

/// The folder of a helper process; `None` if somebody runs the ignored tests by hand.
fn helper_dir() -> Option<PathBuf> {
    std::env::var_os(HELPER_DIR).map(PathBuf::from)
}
