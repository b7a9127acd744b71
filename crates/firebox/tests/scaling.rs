//! Batches that grow, learning rates scaled to the batch, cooldowns and the learning-rate finder.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Ended, Lab, Run};
use serde_json::Value;

fn set<'a>(values: &[&'a str]) -> Vec<&'a str> {
    values.iter().flat_map(|value| ["--set", value]).collect()
}

/// Every file of a folder with its bytes.
fn contents(dir: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = vec![];
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push((path.clone(), std::fs::read(path).unwrap())),
            }
        }
    }
    found.sort();
    found
}

fn remove(run: &Run, step: u64) {
    std::fs::remove_dir_all(run.dir.join(format!("checkpoints/step-{step}"))).unwrap();
}

#[test]
fn a_batch_that_grows_is_counted_and_resumed() {
    let lab = Lab::new(150);
    // 2 rows, a third of a row more each step, 6 from step 12 on; a part of a micro-batch more often than not.
    let args = set(&["train.batch_warmup={ start_rows = 2, steps = 12 }", "train.steps=16", "eval.every=0"]);
    let run = lab.trained("run", &args);
    let tokens: Vec<u64> = run.metrics().iter().filter_map(|line| line["tokens"].as_u64()).collect();
    let rows = [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6];
    let mut sum = 0;
    for (step, rows) in rows.into_iter().enumerate() {
        sum += rows * 24;
        assert_eq!(tokens[step], sum, "after step {}", step + 1);
    }
    let state = run.json("checkpoints/step-16/state.json");
    assert_eq!((state["tokens"].as_u64(), state["samples"].as_u64()), (Some(sum), Some(sum / 24)));
    assert_eq!(run.json("summary.json")["tokens"].as_u64(), Some(sum));
    assert_eq!(run.json("run.json")["tokens_per_step"].as_u64(), Some(6 * 24), "that of the whole batch");

    // From within the ramp.
    let want = run.fingerprint();
    let early = lab.trained("early", &[&args[..], &set(&["checkpoint.keep_last=4"])].concat());
    for step in [12, 16] {
        remove(&early, step);
    }
    assert_eq!(early.saved(), [4, 8]);
    let resumed = [&args[..], &["--resume"]].concat();
    Ended::new(lab.train("early", &resumed).output().unwrap(), "resume".into()).succeeded();
    want.assert_equals(&early.fingerprint(), "resumed within the ramp");
}

#[test]
fn the_learning_rate_follows_the_batch() {
    let lab = Lab::new(60);
    let rate = |rule: &str, out: &str| {
        let scaling = format!("optimizer.batch_scaling={{ rule = \"{rule}\", reference_rows = 24 }}");
        let args = ["train.steps=1", "schedule.warmup_steps=0", "eval.sample_tokens=0", scaling.as_str()];
        lab.trained(out, &set(&args)).series("lr")[0].1
    };
    // 6 rows are a quarter of the reference.
    assert!((rate("sqrt", "sqrt") - 1.5e-3).abs() < 1e-15);
    assert!((rate("linear", "linear") - 0.75e-3).abs() < 1e-15);
}

#[test]
fn a_cooldown_ends_as_a_run_that_was_to_be_so_short_and_leaves_the_other_alone() {
    let lab = Lab::new(150);
    let keep = ["checkpoint.keep_last=20", "eval.every=12"];
    let long = set(&[&keep[..], &["schedule={ kind = \"constant\", warmup_steps = 5 }"]].concat());
    let long = lab.trained("long", &long);
    let before = contents(&long.dir);
    let short =
        "schedule={ kind = \"wsd\", warmup_steps = 5, decay_fraction = 0.25, decay = \"linear\", min_lr_ratio = 0.1 }";
    let want = lab.trained("short", &set(&[&keep[..], &[short, "train.steps=32"]].concat()));

    let form = set(&["schedule.decay=linear", "schedule.min_lr_ratio=0.1"]);
    let call = |out: &str| {
        let from = ["train", "--cooldown-from", "long/checkpoints/step-24", "--steps", "8", "--data", "docs.jsonl"];
        lab.call(&[&from[..], &["--out", out], &form].concat())
    };
    let ended = call("cool").succeeded();
    assert!(ended.stdout.contains("cooling down from long/checkpoints/step-24"), "{}", ended.stdout);
    let cool = lab.run("cool");
    assert_eq!(cool.saved(), [24, 28, 32]);
    same_end(&want, &cool, 24);
    assert_eq!(contents(&long.dir), before, "the long run is as it was");
    let rates = cool.series("lr");
    for (i, (step, lr)) in (0..8).zip(&rates) {
        let expected = 3e-3 * (1.0 - 0.9 * f64::from(i) / 8.0);
        assert!(*step == 25 + i as u64 && (lr - expected).abs() < 1e-12, "{rates:?}");
    }
    let recipe = std::fs::read_to_string(cool.dir.join("recipe.toml")).unwrap();
    assert!(recipe.contains("small-cooldown-24"), "{recipe}");

    // Interrupted within the decay, or before the first step: it is a run like any other.
    for steps in [&[32][..], &[28, 32]] {
        steps.iter().for_each(|&step| remove(&cool, step));
        lab.call(&["train", "--resume", "--out", "cool", "--data", "docs.jsonl"]).succeeded();
        same_end(&want, &cool, 24);
    }

    call("cool").failed(2, &["cool", "already holds a run", "--out"]);
    for (line, words) in [
        ("--cooldown-from long --steps 0", &["--steps", "at least 1"][..]),
        ("--cooldown-from long", &["--steps"]),
        ("--steps 4", &["--cooldown-from"]),
        ("tiny --cooldown-from long --steps 4", &["--cooldown-from"]),
        ("--cooldown-from absent --steps 4", &["absent"]),
        ("--cooldown-from long/checkpoints/step-4 --steps 4", &["at the peak", "step 4", "0.833"]),
        ("--cooldown-from short/checkpoints/step-28 --steps 4", &["at the peak", "step 28", "0.550"]),
        ("--cooldown-from cosine --steps 4", &["constant or wsd", "another kind"]),
    ] {
        if line.contains("cosine") {
            lab.trained("cosine", &set(&["train.steps=6"]));
        }
        let args: Vec<&str> =
            ["train", "--data", "docs.jsonl", "--out", "none"].into_iter().chain(line.split(' ')).collect();
        lab.call(&args).failed(2, words);
        assert!(!lab.path("none").exists(), "{line}");
    }
}

/// Asserts that both runs end with the same parameters, optimizer and counts, by the same losses after step `from`.
#[track_caller]
fn same_end(want: &Run, got: &Run, from: u64) {
    let last = want.saved().pop().unwrap();
    assert_eq!(got.saved().pop(), Some(last));
    for name in ["model.safetensors", "optimizer/adamw.safetensors"] {
        let read = |run: &Run| std::fs::read(run.dir.join(format!("checkpoints/step-{last}/{name}"))).unwrap();
        assert!(read(want) == read(got), "{name} differs");
    }
    for key in ["loss", "lr", "grad_norm"] {
        let after = |run: &Run| run.series(key).into_iter().filter(|(step, _)| *step > from).collect::<Vec<_>>();
        assert_eq!(after(want), after(got), "{key}");
    }
    let state = |run: &Run| {
        let mut state = run.json(&format!("checkpoints/step-{last}/state.json"));
        // A clock, a recipe of another name, and what the long run's evaluations had counted.
        for key in ["elapsed_s", "recipe_hash", "evals_without_gain"] {
            state.as_object_mut().unwrap().remove(key).unwrap();
        }
        state
    };
    assert_eq!(state(want), state(got));
}

#[test]
fn the_learning_rate_finder_finds_the_fall_and_the_rise() {
    let lab = Lab::new(150);
    let find = |args: &[&str]| lab.call(&[&["lr-find", "tiny", "--data", "docs.jsonl"], args].concat());
    let json: Value = serde_json::from_str(&find(&["--json", "--lr-max", "9.9"]).succeeded().stdout).unwrap();
    let points = json["points"].as_array().unwrap();
    let number = |value: &Value| value.as_f64().unwrap();
    let smoothed: Vec<f64> = points.iter().map(|point| number(&point["smoothed"])).collect();
    assert!((number(&points[0]["lr"]) / 1e-6 - 1.0).abs() < 1e-9 && points.len() <= 100);
    let best = (0..smoothed.len()).min_by(|&a, &b| smoothed[a].total_cmp(&smoothed[b])).unwrap();
    assert!(smoothed[best] < 0.9 * smoothed[0], "nothing was learned: {smoothed:?}");
    assert!(best + 5 < points.len(), "the loss rises again: {smoothed:?}");
    let (steepest, tenth) = (number(&json["steepest"]), number(&json["minimum_tenth"]));
    assert!((tenth / (number(&points[best]["lr"]) / 10.0) - 1.0).abs() < 1e-9);
    assert!(steepest > 1e-4 && steepest < number(&points[best]["lr"]), "{steepest}");
    let said = find(&["--lr-max", "9.9"]).succeeded().stdout;
    assert!(said.contains(&format!("steepest descent:        {steepest:.2e}")), "{said}");
    assert!(said.contains(&format!("a tenth of the minimum:  {tenth:.2e}")), "{said}");
    assert!(!lab.path("runs").exists() && !lab.path("checkpoints").exists(), "nothing is written");

    find(&["--lr-min", "0"]).failed(2, &["--lr-min", "above 0"]);
    find(&["--lr-max", "1e-7"]).failed(2, &["--lr-max", "1e-6"]);
    find(&["--steps", "3"]).failed(2, &["--steps", "at least 10"]);
    find(&["--lr-max", "100"]).failed(2, &["weight_decay", "100"]);
}

#[test]
fn a_wide_model_trains_by_mup_and_resumes() {
    let lab = Lab::new(150);
    let wide = ["model.d_model=64", "model.n_heads=8", "model.tied=false", "model.mup_base_width=32", "train.steps=12"];
    let run = lab.trained("run", &set(&wide));
    let want = run.fingerprint();
    remove(&run, 12);
    let ended =
        Ended::new(lab.train("run", &[&set(&wide)[..], &["--resume"]].concat()).output().unwrap(), "resume".into());
    let said = ended.succeeded().stdout;
    assert!(said.contains("matrix head: 9 tensors") && said.contains("lr x 0.5"), "{said}");
    want.assert_equals(&run.fingerprint(), "resumed");
    for (key, words) in [("model.tied=true", "model.tied = true"), ("optimizer.kind=sgd", "optimizer.kind = sgd")] {
        let args = [&set(&wide)[..], &set(&[key, "optimizer={ lr = 1e-3 }", key])].concat();
        Ended::new(lab.train("bad", &args).output().unwrap(), key.into()).failed(2, &[words, "mup_base_width"]);
    }
}
