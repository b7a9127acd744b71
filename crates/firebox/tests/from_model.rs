//! Runs that start from a model, prune it, or train it for few bits.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Ended, Lab};

#[test]
fn a_run_starts_from_the_parameters_of_another() {
    let lab = Lab::new(60);
    let first = lab.trained("first", &[]);
    let reached = first.json("summary.json")["val_loss"].as_f64().unwrap();
    // The recipe's shape and tokenizer are others: the model's hold. At a rate of almost nothing it stays what it was.
    lab.write("other.toml", "name = \"other\"\n[model]\nd_model = 48\n[data]\nval_fraction = 0.1\nvocab_size = 300\n");
    let start = |out: &str, more: &[&str]| {
        let mut args = vec!["train", "other.toml", "--data", "docs.jsonl", "--out", out, "--init", "first"];
        args.extend(["--set", "train.steps=2", "--set", "train.batch_rows=4", "--set", "schedule={kind=\"constant\"}"]);
        args.extend(more);
        lab.call(&args)
    };
    start("tuned", &["--set", "optimizer.lr=1e-9"]).succeeded();
    let tuned = lab.run("tuned");
    let loss = tuned.json("summary.json")["val_loss"].as_f64().unwrap();
    assert!((loss - reached).abs() < 1e-4, "{loss}, the model had {reached}");
    assert_eq!(tuned.saved(), [2], "steps are counted anew");
    let recipe = std::fs::read_to_string(tuned.dir.join("recipe.toml")).unwrap();
    assert!(recipe.contains("d_model = 32") && recipe.contains("n_layers = 2"), "{recipe}");
    // It goes on without the flag.
    lab.call(&["train", "--resume", "--data", "docs.jsonl", "--out", "tuned", "--set", "train.steps=4"]).succeeded();
    assert_eq!(tuned.saved(), [2, 4]);

    let refused = |out: &str, more: &[&str], words: &[&str]| start(out, more).failed(2, words);
    refused("a", &["--set", "model.d_model=64"], &["init", "model.d_model=64", "model.dropout"]);
    start("b", &["--set", "model.dropout=0"]).succeeded();
    let absent = lab.train("c", &["--init", "absent"]).output().unwrap();
    Ended::new(absent, "absent".into()).failed(2, &["absent"]);
    let both = lab.call(&["train", "--depth", "2", "--init", "first", "--data", "docs.jsonl"]);
    both.failed(2, &["--init", "--depth"]);
    assert!(!lab.path("a").exists() && !lab.path("c").exists(), "nothing was started");
}
