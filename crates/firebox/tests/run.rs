//! What a run leaves for people to look at, what it keeps, and what other commands make of it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use common::{Ended, Lab, Run, names};
use firebox::train::Recipe;
use serde_json::Value;

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_run_folder_holds_what_the_run_did() {
    let lab = Lab::new(150);
    let ended = lab.train("run", &["--set", "train.log_every=5"]).output().unwrap();
    let ended = Ended::new(ended, "train".into()).succeeded();
    let run = lab.run("run");

    let metrics = run.metrics();
    let text = std::fs::read_to_string(run.dir.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.len(), text.lines().count(), "each line is JSON");
    let steps: Vec<u64> = run.series("loss").iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [1, 5, 10, 15, 20, 25, 30, 35, 40], "the first, each fifth");
    let evals: Vec<u64> = run.series("val_loss").iter().map(|(step, _)| *step).collect();
    assert_eq!(evals, [10, 20, 30, 40]);
    let step_keys = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes"];
    let eval_keys = ["step", "tokens", "val_loss", "val_bpb"];
    for line in &metrics {
        let wanted = if line.get("loss").is_some() { &step_keys[..] } else { &eval_keys[..] };
        assert_eq!(keys(line), wanted.iter().copied().collect(), "{line}");
        assert_eq!(line["tokens"].as_u64().unwrap(), line["step"].as_u64().unwrap() * 6 * 24);
    }
    // Five steps of linear warmup that end before 3e-3, then a cosine to a tenth.
    let lr = run.series("lr");
    for ((_, got), want) in [(lr[0], 3e-3 / 6.0), (lr[1], 3e-3 * 5.0 / 6.0)] {
        assert!((got - want).abs() < 1e-12, "{lr:?}");
    }
    assert!(lr[2..].windows(2).all(|pair| pair[0].1 > pair[1].1), "{lr:?}");
    assert!(lr[2].1 < 3e-3 && lr[8].1 > 3e-4 && lr[8].1 < 3.1e-4, "{lr:?}");

    let summary = run.json("summary.json");
    for key in ["params", "steps", "tokens", "wall_s", "tokens_per_s", "val_loss", "val_bpb", "peak_memory_bytes"] {
        assert!(summary[key].as_f64().is_some_and(|x| x > 0.0), "{key}: {summary}");
    }
    assert_eq!((summary["steps"].as_u64(), summary["stopped"].as_str()), (Some(40), Some("done")));
    assert_eq!(summary["val_loss"].as_f64(), run.series("val_loss").last().map(|(_, loss)| *loss));
    assert_eq!(summary["skipped_steps"], 0);

    // The stored recipe is the resolved one, which was also printed.
    let stored = std::fs::read_to_string(run.dir.join("recipe.toml")).unwrap();
    let set = ["train.log_every=5".to_string()];
    assert_eq!(Recipe::parse("stored", &stored, &[]).unwrap(), Recipe::parse("small", common::SMALL, &set).unwrap());
    assert!(ended.stdout.contains(stored.trim_end()), "{}", ended.stdout);

    assert_eq!(names(&run.dir.join("samples")), ["step-10.txt", "step-20.txt", "step-30.txt", "step-40.txt"]);
    for name in names(&run.dir.join("samples")) {
        assert!(!std::fs::read_to_string(run.dir.join("samples").join(name)).unwrap().is_empty());
    }
    assert!(names(&run.dir).iter().any(|name| name.starts_with("events.out.tfevents.")));
    // No terminal: plain lines.
    assert!(!ended.stderr.contains('\u{1b}') && ended.stderr.contains("step 40/40"), "{}", ended.stderr);
    assert_report(&run);

    // Made again, it is the same but for the time.
    std::fs::remove_file(run.dir.join("report.html")).unwrap();
    lab.call(&["report", "run"]).succeeded();
    assert_report(&run);
}

/// The report shows the run and loads nothing from elsewhere.
#[track_caller]
fn assert_report(run: &Run) {
    let html = std::fs::read_to_string(run.dir.join("report.html")).unwrap();
    for loads in ["src=\"http", "src='http", "@import", "url(http", "<script src", "<link"] {
        assert!(!html.contains(loads), "{loads}");
    }
    assert!(html.matches("<svg").count() >= 5, "loss, rate, norm, speed and memory are plotted");
    let bpb = run.json("summary.json")["val_bpb"].as_f64().unwrap();
    for shown in ["gzip", "xz", "d_model = 32", &format!("{bpb:.2}")] {
        assert!(html.contains(shown), "{shown}");
    }
}

#[test]
fn accumulated_gradients_are_those_of_the_large_batch() {
    let lab = Lab::new(150);
    let losses = |micro: u32| {
        let micro = format!("train.micro_batch_rows={micro}");
        let run = lab.trained(&micro, &["--set", &micro, "--set", "model.dropout=0"]);
        [run.series("loss"), run.series("grad_norm"), run.series("val_loss")]
    };
    let want = losses(0);
    assert_eq!((want[0].len(), want[2].len()), (40, 4));
    // 4 leaves a part of 2 rows; documents end in rows, so the parts have different numbers of targets.
    for micro in [1, 2, 4] {
        for (got, want) in losses(micro).iter().zip(&want) {
            assert_eq!(got.len(), want.len());
            for ((step, got), (_, want)) in got.iter().zip(want) {
                // f32 sums in another order, through 40 steps.
                assert!((got - want).abs() <= 1e-5 * want.abs(), "{micro} rows, step {step}: {got}, expected {want}");
            }
        }
    }
}

#[test]
fn a_run_that_gains_nothing_stops_early() {
    let lab = Lab::new(60);
    // Nothing can be learned at this rate: it is too low to change an f32.
    let set = ["optimizer.lr=1e-20", "eval.every=2", "eval.patience=3", "eval.sample_tokens=0"];
    let set: Vec<&str> = set.iter().flat_map(|value| ["--set", value]).collect();
    let run = lab.trained("run", &set);
    let summary = run.json("summary.json");
    assert_eq!(summary["stopped"], "early stop");
    assert_eq!(summary["best_step"], 2);
    let evals: Vec<u64> = run.series("val_loss").iter().map(|(step, _)| *step).collect();
    assert_eq!(evals, [2, 4, 6, 8], "the best and three without gain, each once");
    assert_eq!((summary["steps"].as_u64(), run.step()), (Some(8), 8));
    assert_eq!(run.saved().last(), Some(&8));
    assert!(names(&run.dir.join("samples")).is_empty());
}

#[test]
fn the_last_and_the_best_checkpoints_are_kept() {
    let lab = Lab::new(60);
    let saved = |out: &str, set: &[&str]| {
        let set: Vec<&str> = set.iter().flat_map(|value| ["--set", value]).collect();
        lab.trained(out, &set).saved()
    };
    assert_eq!(saved("last", &["checkpoint.keep_last=3", "checkpoint.keep_best=false"]), [32, 36, 40]);
    assert_eq!(saved("end", &["checkpoint.every=0", "checkpoint.keep_last=1"]), [40]);
    // A warmup to a rate that destroys what was learned on the way.
    let worse = ["schedule.warmup_steps=39", "optimizer.lr=1", "eval.every=4", "optimizer.weight_decay=0"];
    let kept = saved("best", &[&worse[..], &["checkpoint.keep_last=1"]].concat());
    let best = lab.run("best").json("summary.json")["best_step"].as_u64().unwrap();
    assert!(best < 40, "the last is the best: this tests nothing");
    assert_eq!(kept, [best, 40]);
}

#[test]
fn eval_finds_the_loss_of_the_run() {
    let lab = Lab::new(1);
    let text = (0..3000).map(|i| format!("{} times {} is {}. ", i % 9, i % 7, (i % 9) * (i % 7))).collect::<String>();
    lab.write("text.txt", &text);
    let set = ["data.val_split=tail", "data.isolate_documents=false", "eval.sample_tokens=0"];
    let set: Vec<&str> = set.iter().flat_map(|value| ["--set", value]).collect();
    let args = ["train", "small.toml", "--data", "text.txt", "--out", "run"];
    lab.write("small.toml", common::SMALL);
    lab.call(&[&args[..], &set].concat()).succeeded();

    let held_out = text.len() - text.len() * 9 / 10;
    lab.write("tail.txt", &text[text.len() - held_out..]);
    let eval = |args: &[&str]| lab.call(&[&["eval", "run", "--data", "tail.txt"], args].concat()).succeeded().stdout;
    let found: Value = serde_json::from_str(&eval(&["--json", "--join-documents"])).unwrap();
    assert_eq!(keys(&found), ["task", "loss", "bpb", "perplexity", "tokens", "bytes"].into());
    let number = |key: &str| found[key].as_f64().unwrap();
    let summary = lab.run("run").json("summary.json");
    let close = |got: f64, want: f64| assert!((got - want).abs() <= 1e-6 * want, "got {got}, expected {want}");
    close(number("loss"), summary["val_loss"].as_f64().unwrap());
    close(number("bpb"), summary["val_bpb"].as_f64().unwrap());
    close(number("perplexity"), number("loss").exp());
    // A character is a token and a byte here.
    close(number("bpb"), number("loss") / std::f64::consts::LN_2);
    assert_eq!(found["tokens"], found["bytes"]);
    assert!(eval(&["--join-documents"]).contains(&format!("{:.4}  nats", number("loss"))));
    // However many rows at once.
    let other: Value = serde_json::from_str(&eval(&["--json", "--join-documents", "--rows", "3"])).unwrap();
    close(other["loss"].as_f64().unwrap(), number("loss"));
}

#[test]
fn recipes_are_listed_and_shown() {
    let lab = Lab::new(60);
    let list = lab.call(&["recipe", "list"]).succeeded().stdout;
    for name in ["default", "tiny", "shakespeare-char", "shakespeare-speedrun", "gpt2-124m"] {
        assert!(list.lines().any(|line| line.starts_with(name)), "{list}");
        let shown = lab.call(&["recipe", "show", name]).succeeded().stdout;
        assert_eq!(Recipe::parse(name, &shown, &[]).unwrap(), Recipe::load(name, &[]).unwrap());
        // What is shown is a recipe again.
        lab.write("mine.toml", &shown);
        assert_eq!(lab.call(&["recipe", "show", "mine.toml"]).succeeded().stdout, shown);
    }
}

#[test]
fn tokens_are_made_once() {
    let lab = Lab::new(60);
    let first = lab.call(&["tokenize", "tiny", "--data", "docs.jsonl"]).succeeded();
    assert!(first.stdout.contains("60 documents") && !first.stderr.contains("cache"), "{first:?}");
    let dir = first.stdout.lines().find_map(|line| line.strip_prefix("tokens: ")).unwrap().to_string();
    let shard = names(dir.as_ref()).into_iter().find(|name| !name.ends_with(".json")).unwrap();
    let shard = std::path::Path::new(&dir).join(shard);
    let bytes = std::fs::read(&shard).unwrap();
    let again = lab.call(&["tokenize", "tiny", "--data", "docs.jsonl"]).succeeded();
    assert!(again.stderr.contains("tokens are in the cache"), "{again:?}");
    assert_eq!(first.stdout, again.stdout);

    // A torn cache is made again, to the same bytes.
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let mended = lab.call(&["tokenize", "tiny", "--data", "docs.jsonl"]).succeeded();
    assert!(mended.stderr.contains("torn"), "{mended:?}");
    assert_eq!(std::fs::read(&shard).unwrap(), bytes);
}
