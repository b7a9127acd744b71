//! Runs that start from a model, prune it, or train it for few bits.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Ended, Lab, Run};
use firebox::tensor::device::Backend;

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

const GRADUAL: [&str; 4] = [
    "--set",
    "prune={sparsity=0.75,initial_sparsity=0.25,begin_step=5,end_step=30,every=5}",
    "--set",
    "checkpoint.keep_last=99",
];

/// A copy of a run, gone on from an earlier checkpoint.
fn resumed_from(lab: &Lab, run: &str, step: u64, args: &[&str]) -> Run {
    let (from, to) = (lab.path(run), lab.path("resumed"));
    let status = std::process::Command::new("cp").arg("-r").args([&from, &to]).status().unwrap();
    assert!(status.success());
    let copy = lab.run("resumed");
    for later in copy.saved().into_iter().filter(|saved| *saved > step) {
        std::fs::remove_dir_all(to.join(format!("checkpoints/step-{later}"))).unwrap();
    }
    assert_eq!(copy.saved().last(), Some(&step));
    lab.trained("resumed", &[args, &["--resume"]].concat());
    copy
}

#[test]
fn sparsity_grows_and_is_the_same_whoever_trains() {
    let lab = Lab::new(60);
    let whole = lab.trained("whole", &GRADUAL);
    let summary = whole.json("summary.json");
    assert!((summary["sparsity"].as_f64().unwrap() - 0.75).abs() < 1e-3, "{summary}");
    let on_the_way: Vec<f64> = whole.series("sparsity").into_iter().map(|(_, share)| share).collect();
    assert_eq!(on_the_way.len(), 4, "at every evaluation: {on_the_way:?}");
    assert!(on_the_way.is_sorted() && on_the_way[0] > 0.249 && on_the_way[3] > 0.749, "{on_the_way:?}");

    // From a checkpoint in the middle.
    let resumed = resumed_from(&lab, "whole", 12, &GRADUAL);
    whole.fingerprint().assert_equals(&resumed.fingerprint(), "resumed");

    // On ranks, which divide updates or not.
    for (name, flags) in [("dp", &["--ranks", "2"][..]), ("zero-1", &["--ranks", "2", "--zero", "1"])] {
        let run = lab.trained(name, &[&GRADUAL[..], flags].concat());
        assert_eq!(run.json("summary.json")["sparsity"], summary["sparsity"]);
        let loss = run.json("summary.json")["val_loss"].as_f64().unwrap();
        assert!((loss - summary["val_loss"].as_f64().unwrap()).abs() < 1e-4, "{name}: {loss}, {summary}");
    }
    for flags in ["--zero 3", "--tp 2", "--pp 2"] {
        let flags: Vec<&str> = ["--ranks", "2"].into_iter().chain(flags.split(' ')).collect();
        let ended =
            Ended::new(lab.train("refused", &[&GRADUAL[..], &flags].concat()).output().unwrap(), flags.join(" "));
        ended.failed(2, &["prune.sparsity", "whole matrices"]);
    }
}

#[test]
fn zeros_stay_zeros() {
    let lab = Lab::new(60);
    let pattern = "prune={pattern='2:4',begin_step=2,end_step=2}";
    lab.trained("pruned", &["--set", pattern, "--set", "train.steps=8"]);
    let tune = |out: &str, more: &[&str]| {
        let keep = ["--init", "pruned", "--set", "prune.keep_zeros=true", "--set", "optimizer.weight_decay=0.1"];
        Ended::new(lab.train(out, &[&keep[..], more].concat()).output().unwrap(), out.into())
    };
    let zeros = |out: &str| -> Vec<usize> {
        let bytes = std::fs::read(lab.path(&format!("{out}/model.safetensors"))).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let all = tensors.tensor("model.layers.1.mlp.down_proj.weight").unwrap();
        let values = all.data().chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
        values.enumerate().filter(|(_, x)| *x == 0.0).map(|(i, _)| i).collect()
    };
    let mask = zeros("pruned/checkpoints/step-8");
    assert_eq!(mask.len(), 32 * 48 / 2);
    // `[out, in]`: of every four inputs two.
    assert!(mask.chunks(2).enumerate().all(|(i, pair)| pair.iter().all(|at| at / 4 == i)));
    // With matrices divided, rows too, and with an optimizer that mixes the elements of a matrix.
    let zero_3 = &["--ranks", "2", "--zero", "3"][..];
    for (out, more) in [("one", &[][..]), ("zero-3", zero_3), ("muon", &["--set", "optimizer={kind='muon'}"])] {
        tune(out, more).succeeded();
        assert_eq!(zeros(&format!("{out}/checkpoints/step-40")), mask, "{out}");
    }
    assert_eq!(lab.run("one").json("summary.json")["sparsity"], 0.5);
    tune("tp", &["--ranks", "2", "--tp", "2"]).succeeded();
    assert_eq!(zeros("tp/checkpoints/step-40"), mask);

    lab.trained("dense", &["--set", "train.steps=8"]);
    let dense = lab.train("kept", &["--init", "dense", "--set", "prune.keep_zeros=true"]).output().unwrap();
    Ended::new(dense, "dense".into()).failed(2, &["prune.keep_zeros", "pruned model", "without a zero"]);
}

#[test]
fn a_run_for_few_bits_keeps_weights_on_their_grid() {
    let lab = Lab::new(60);
    let sizes = ["--set", "model.d_ff=64", "--set", "checkpoint.keep_last=99", "--set", "qat.group=32", "--set"];
    for (name, set, bits) in [("ste", "qat.bits=4", 4), ("lsq", "qat={bits=3,group=32,method='lsq'}", 3)] {
        let args = [&sizes[..], &[set]].concat();
        let run = lab.trained(name, &args);
        let losses = run.series("loss");
        assert!(losses[39].1 < 0.9 * losses[0].1, "nothing was learned: {losses:?}");
        let step = run.dir.join("checkpoints/step-40");
        // Whoever loads it gets the weights that were evaluated.
        let device = Backend::NdArray.device().unwrap();
        let model = firebox::train::model_io::load(&run.dir, &device).unwrap().model;
        let grids = firebox::train::qat_steps(&run.dir).unwrap().unwrap();
        assert_eq!((grids.recipe.bits, grids.recipe.group, grids.steps.len()), (bits, 32, 8));
        let largest = grids.recipe.format().largest() as f32;
        let mut codes = std::collections::BTreeSet::new();
        for (name, values) in firebox::train::model_io::parameters(&model) {
            let Some(steps) = grids.steps.get(&name) else { continue };
            let values: Vec<f32> = values.into_data().iter::<f32>().collect();
            assert_eq!(values.len(), 32 * steps.len(), "{name}");
            let width = width_of(&name);
            for (i, value) in values.iter().enumerate() {
                let step = steps[i / width / 32 * width + i % width];
                let code = (value / step).round();
                assert!(*value == code * step && code.abs() <= largest, "{name} {i}: {value}, step {step}");
                codes.insert(code as i32);
            }
        }
        assert_eq!(codes.len() as f32, 2.0 * largest + 1.0, "all codes are used");
        // Resumed, and on ranks.
        let resumed = resumed_from(&lab, name, 20, &args);
        run.fingerprint().assert_equals(&resumed.fingerprint(), "resumed");
        let trained =
            |dir: &std::path::Path| std::fs::read(dir.join("checkpoints/step-40/trained.safetensors")).unwrap();
        assert!(trained(&run.dir) == trained(&resumed.dir), "trained.safetensors");
        std::fs::remove_dir_all(&resumed.dir).unwrap();
        let dp = lab.trained("dp", &[&args[..], &["--ranks", "2"]].concat());
        run.fingerprint().assert_same_steps(&dp.fingerprint(), "--ranks 2");
        // The norm of divided gradients may differ in its last bit, and then a weight in the middle of two codes.
        let zero = lab.trained("zero", &[&args[..], &["--ranks", "2", "--zero", "2"]].concat());
        let [whole, divided] = [&run, &zero].map(|run| run.json("summary.json")["val_loss"].as_f64().unwrap());
        assert!((whole - divided).abs() < 0.02, "--zero 2: {divided}, one rank {whole}");
        [dp, zero].iter().for_each(|run| std::fs::remove_dir_all(&run.dir).unwrap());
        assert!(step.join("qat.json").is_file());
        lab.call(&["generate", name, "--max-tokens", "4"]).succeeded();
        for flags in ["--zero 3", "--tp 2", "--pp 2"] {
            let flags: Vec<&str> = ["--ranks", "2"].into_iter().chain(flags.split(' ')).collect();
            let ended = lab.train("refused", &[&args[..], &flags].concat()).output().unwrap();
            Ended::new(ended, flags.join(" ")).failed(2, &["qat", "whole matrices"]);
        }
    }
    // Of a model that is there already: for 8 bits it hardly changes.
    let plain = lab.trained("plain", &["--set", "model.d_ff=64"]);
    let tune = ["train", "small.toml", "--data", "docs.jsonl", "--init", "plain", "--set", "train.steps=1"];
    let eight = ["--out", "eight", "--set", "qat={bits=8,method='lsq'}", "--set", "optimizer.lr=1e-9"];
    lab.call(&[&tune[..], &eight[..], &["--set", "schedule={kind='constant'}"]].concat()).succeeded();
    let loss = |run: &Run| run.json("summary.json")["val_loss"].as_f64().unwrap();
    let (before, after) = (loss(&plain), loss(&lab.run("eight")));
    assert!((before - after).abs() < 0.02 && before != after, "{before} {after}");
    assert_eq!(firebox::train::qat_steps(&plain.dir).unwrap(), None);
}

/// Outputs of a weight of the small recipe with `d_ff = 64`.
fn width_of(name: &str) -> usize {
    match name.rsplit('.').nth(1).unwrap() {
        "qkv" => 64,
        "input" => 128,
        _ => 32,
    }
}
