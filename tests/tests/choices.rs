//! Multiple choice beside lm-evaluation-harness (`golden/harness.py`): the same texts, the same tokens, the same log-likelihoods, the same scores.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use firebox::data::read_records;
use firebox::tensor::device::Backend;
use firebox::train::evaluate::Scorer;
use firebox::train::evaluate::choices::{Form, Question, log_likelihoods, score, with_shots};
use firebox_tests::golden;
use serde_json::Value;

/// The harness computes in f32, too, and adds up tokens of -5 to -20 nats each; its own sums are as far from f64's.
const NATS: f64 = 1e-4;

/// The model's folder, with a tokenizer that begins texts with `start`, or with nothing.
fn folder(dir: &Path, golden_file: &Value, start: &Value) {
    fs::create_dir_all(dir).unwrap();
    fs::copy(golden("harness.safetensors"), dir.join("model.safetensors")).unwrap();
    let write = |name: &str, value: &Value| fs::write(dir.join(name), value.to_string()).unwrap();
    write("config.json", &golden_file["config"]);
    let mut tokenizer = golden_file["tokenizer"].clone();
    if start.is_string() {
        tokenizer["post_processor"] = golden_file["post_processor"].clone();
        write("tokenizer_config.json", &serde_json::json!({ "bos_token": start, "eos_token": "<|endoftext|>" }));
    }
    write("tokenizer.json", &tokenizer);
}

fn questions(dir: &Path, golden_file: &Value, task: &str) -> Vec<Question> {
    let path = dir.join(format!("{task}.jsonl"));
    let rows = golden_file["rows"][task].as_array().unwrap();
    fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let records = read_records(&[path.display().to_string()]).unwrap();
    let form = Form::of(&records[0].fields).unwrap();
    assert_eq!(form.name(), task, "the form is found out");
    records.iter().map(|record| form.question(record).unwrap()).collect()
}

#[test]
fn choices_are_those_of_lm_evaluation_harness() {
    let text = fs::read_to_string(golden("harness.json")).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let runs = file["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 8);
    let mut farthest = 0f64;
    for run in runs {
        let (task, shots) = (run["task"].as_str().unwrap(), run["shots"].as_u64().unwrap() as usize);
        let what = format!("{task}, {shots} shots, start {}", run["start"]);
        let model = dir.path().join(if run["start"].is_string() { "begins" } else { "plain" });
        folder(&model, &file, &run["start"]);
        let scorer = Scorer::open(&model, &device).unwrap();
        let plain = questions(dir.path(), &file, task);
        let asked = with_shots(&plain, &plain, shots).unwrap();
        let got = log_likelihoods(&scorer, &asked).unwrap();
        let want = run["log_likelihoods"].as_array().unwrap();
        assert_eq!(got.len(), want.len(), "{what}");
        for (row, (got, want)) in got.iter().zip(want).enumerate() {
            let want: Vec<f64> = want.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            assert_eq!(got.len(), want.len(), "{what}, row {row}");
            for (got, want) in got.iter().zip(&want) {
                farthest = farthest.max((got - want).abs());
                assert!((got - want).abs() < NATS, "{what}, row {row}: {got}, the harness has {want}");
            }
        }
        let scores = serde_json::json!(score(&asked, &got));
        for (name, want) in run["results"].as_object().unwrap() {
            let (got, want) = (scores[name].as_f64().unwrap(), want.as_f64().unwrap());
            assert!((got - want).abs() < 1e-12, "{what}: {name} is {got}, the harness has {want}");
        }
    }
    println!("farthest from the harness: {farthest:.1e} nats");
}
