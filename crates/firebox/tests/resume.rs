//! A run that was interrupted, killed or stopped by a full disk and then resumed ends as one that never was, bit for bit.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Ended, Lab, Random, Run, signal, wait_until};

/// Long enough to be stopped on the way: the small recipe is through in a tenth of a second.
const LONG: [&str; 6] = ["--set", "train.steps=400", "--set", "checkpoint.every=2", "--set", "eval.every=40"];
const STEPS: u64 = 400;

/// The undisturbed run: with dropout, micro-batches of unequal size, isolated documents, grouped heads.
fn undisturbed(lab: &Lab, args: &[&str]) -> Run {
    let run = lab.trained("undisturbed", args);
    let losses = run.series("loss");
    assert_eq!(losses.len() as u64, run.step(), "each step is logged");
    assert!(losses[losses.len() - 1].1 < 0.8 * losses[0].1, "nothing was learned: {losses:?}");
    run
}

/// Trains until a step is logged, then sends a signal; true if that came before the end.
fn stop(lab: &Lab, out: &str, args: &[&str], after: u64, name: &str) -> bool {
    let run = lab.run(out);
    let mut child = lab.train(out, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    if wait_until(&mut child, || run.step() >= after) {
        signal(&child, name);
    }
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0), "SIG{name} after step {after}");
    let summary = run.json("summary.json");
    let steps = summary["steps"].as_u64().unwrap();
    assert_eq!(run.saved().last(), Some(&steps), "the last act is a checkpoint");
    assert!(steps >= after);
    assert_eq!(summary["stopped"], if steps < STEPS { "interrupted" } else { "done" });
    steps < STEPS
}

/// Nothing but the checkpoints that the recipe keeps and the files of a run.
#[track_caller]
fn assert_tidy(run: &Run) {
    let known = ["baselines.json", "checkpoints", "metrics.jsonl", "recipe.toml", "report.html", "run.json"];
    let known = [&known[..], &["samples", "summary.json"]].concat();
    for name in common::names(&run.dir) {
        assert!(known.contains(&&*name) || name.starts_with("events.out.tfevents."), "left over: {name}");
    }
    for name in run.checkpoints() {
        assert!(name.strip_prefix("step-").is_some_and(|n| n.parse::<u64>().is_ok()), "left over: {name}");
    }
    for name in common::names(&run.dir.join("samples")) {
        assert!(name.ends_with(".txt"), "left over: {name}");
    }
}

#[test]
fn the_same_recipe_gives_the_same_bits_on_any_number_of_threads() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &[]).fingerprint();
    for threads in ["1", "3"] {
        let mut command = lab.train("again", &[]);
        Ended::new(command.env("RAYON_NUM_THREADS", threads).output().unwrap(), "train".into()).succeeded();
        want.assert_equals(&lab.run("again").fingerprint(), &format!("{threads} threads"));
        std::fs::remove_dir_all(lab.path("again")).unwrap();
    }
    let other = lab.trained("other-seed", &["--seed", "1338"]);
    assert!(want != other.fingerprint(), "the seed changes nothing");
}

#[test]
fn a_run_stopped_by_a_signal_goes_on_bit_for_bit() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &LONG).fingerprint();
    let mut random = Random(1);
    let mut interrupted = 0;
    for (i, name) in ["TERM", "INT", "TERM"].into_iter().enumerate() {
        let out = format!("stopped-{i}");
        let run = lab.run(&out);
        for resume in [&[][..], &["--resume"]] {
            let after = run.step() + 1 + random.below(STEPS / 4);
            interrupted += u32::from(stop(&lab, &out, &[&LONG, resume].concat(), after, name));
        }
        let ended = lab.train(&out, &[&LONG[..], &["--resume"]].concat()).output().unwrap();
        let ended = Ended::new(ended, "resume".into()).succeeded();
        assert!(ended.stdout.contains("resuming from"), "{}", ended.stdout);
        assert_eq!(run.json("summary.json")["stopped"], "done");
        want.assert_equals(&run.fingerprint(), &out);
        assert_tidy(&run);
    }
    assert!(interrupted >= 3, "only {interrupted} of 6 signals came before the end");
}

#[test]
fn resume_needs_no_more_than_the_run_and_its_text() {
    let lab = Lab::new(150);
    // Every key of the model that is off by default must come back from the run.
    let bounded = ["model.qk_norm=true", "model.attention_softcap=5", "model.logit_softcap=9"];
    let args: Vec<&str> = LONG.into_iter().chain(bounded.into_iter().flat_map(|value| ["--set", value])).collect();
    let want = undisturbed(&lab, &args).fingerprint();
    assert!(stop(&lab, "run", &args, 3, "TERM"));
    // The recipe comes from the run; the second time, nothing is left to do.
    for _ in 0..2 {
        lab.call(&["train", "--resume", "--data", "docs.jsonl", "--out", "run"]).succeeded();
        want.assert_equals(&lab.run("run").fingerprint(), "the run's own recipe");
    }
}

#[test]
fn resume_without_a_folder_goes_on_with_the_run_of_the_default_name() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &LONG).fingerprint();
    assert!(stop(&lab, "runs/default", &LONG, 3, "TERM"));
    lab.call(&["train", "--resume", "--data", "docs.jsonl"]).succeeded();
    want.assert_equals(&lab.run("runs/default").fingerprint(), "the recipe of the run, not the built-in one");
}

/// Kills of one run. Each comes a random number of steps after a start, and then at a random moment of a step.
const KILLS: u64 = 24;

#[test]
fn a_run_killed_at_many_random_moments_ends_as_if_it_never_was() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &LONG).fingerprint();
    let run = lab.run("killed");
    let mut random = Random(2);
    let mut lost = 0;
    for _ in 0..KILLS {
        // A run that was killed before its first checkpoint is resumed from its beginning.
        let started = run.dir.join("run.json").is_file();
        let resume: &[&str] = if started { &["--resume"] } else { &[] };
        let from = run.saved().last().copied().unwrap_or(0);
        // A few, so that the run outlives them all. 0 is at once: before, while or after the run reads its checkpoint.
        let wanted = from + random.below(7);
        let at_once = run.step() >= wanted;
        let mut child = lab.train("killed", &[&LONG, resume].concat());
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        if wait_until(&mut child, || run.step() >= wanted) {
            std::thread::sleep(Duration::from_micros(random.below(if at_once { 600_000 } else { 8_000 })));
        }
        child.kill().unwrap();
        let ended = child.wait_with_output().unwrap();
        let code = ended.status.code();
        assert_eq!(code, None, "it ended before the kill: {}", String::from_utf8_lossy(&ended.stderr));
        lost += run.step().saturating_sub(run.saved().last().copied().unwrap_or(0));
    }
    assert!(lost > 0, "each kill came just after a checkpoint: what is lost was not tested");
    assert!(run.step() < STEPS);
    Ended::new(lab.train("killed", &[&LONG[..], &["--resume"]].concat()).output().unwrap(), "resume".into())
        .succeeded();
    want.assert_equals(&run.fingerprint(), "killed");
    assert_tidy(&run);
    assert_eq!(run.saved(), lab.run("undisturbed").saved(), "the same checkpoints are kept");
}

/// Kills of a run on several ranks.
const KILLS_OF_RANKS: u64 = 12;

#[test]
fn a_run_on_ever_other_numbers_of_ranks_is_killed_and_ends_as_on_one() {
    let lab = Lab::new(150);
    // Six micro-batches: five ranks are not always busy.
    let args = [&LONG[..], &["--set", "train.micro_batch_rows=1"]].concat();
    let want = undisturbed(&lab, &args).fingerprint();
    let run = lab.run("ranks");
    let mut random = Random(3);
    for kill in 0..=KILLS_OF_RANKS {
        let ranks = (1 + (kill * 3) % 5).to_string();
        let started = run.dir.join("run.json").is_file();
        let resume: &[&str] = if started { &["--resume"] } else { &[] };
        let mut command = lab.train("ranks", &[&args, resume, &["--ranks", &ranks]].concat());
        if kill == KILLS_OF_RANKS {
            Ended::new(command.output().unwrap(), format!("the last {ranks} ranks")).succeeded();
            break;
        }
        let wanted = run.saved().last().copied().unwrap_or(0) + random.below(9);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if wait_until(&mut child, || run.step() >= wanted) {
            std::thread::sleep(Duration::from_micros(random.below(8_000)));
        }
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().code(), None, "{ranks} ranks ended before the kill");
    }
    want.assert_equals(&run.fingerprint(), "on ever other numbers of ranks");
    assert_tidy(&run);
    // An interrupt stops all ranks at one step.
    assert!(stop(&lab, "stopped", &[&args[..], &["--ranks", "3"]].concat(), 20, "INT"));
    let ended = lab.train("stopped", &[&args[..], &["--resume", "--ranks", "2"]].concat()).output().unwrap();
    let ended = Ended::new(ended, "resume on 2 ranks".into()).succeeded();
    assert!(ended.stdout.contains("2 ranks of "), "{}", ended.stdout);
    want.assert_equals(&lab.run("stopped").fingerprint(), "stopped on 3 ranks");
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_again() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &[]).fingerprint();
    for resume in [&["--resume"][..], &[]] {
        // What a kill in the middle of the first checkpoint leaves; no process has this number.
        lab.write("run/run.json", "{}");
        lab.write("run/report.html.tmp-4294967295", "torn");
        lab.write("run/samples/step-4.txt.tmp-4294967295", "torn");
        lab.write("run/checkpoints/.step-4.tmp-4294967295/model.safetensors", "torn");
        Ended::new(lab.train("run", resume).output().unwrap(), format!("{resume:?}")).succeeded();
        want.assert_equals(&lab.run("run").fingerprint(), "started again");
        assert_tidy(&lab.run("run"));
        std::fs::remove_dir_all(lab.path("run")).unwrap();
    }
}

/// Runs a shell script in the lab with `disk`, a small disk, under it; `$1` is `firebox` and `$2` the small recipe. `None` where none can be mounted.
fn on_a_small_disk(lab: &Lab, size: &str, script: &str) -> Option<Ended> {
    std::fs::create_dir(lab.path("disk")).unwrap();
    // All in a mount namespace of its own, with which the small disk vanishes.
    let recipe = lab.write("small.toml", common::SMALL);
    let script = format!("mount -t tmpfs -o size={size} tmpfs disk || exit 77\n{script}");
    let mut command = Command::new("unshare");
    // With a user namespace too, root of one's own machine is root enough.
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    command.args(if root { &["-m"][..] } else { &["-r", "-m"] });
    command.args(["sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_firebox")]).arg(&recipe);
    command.current_dir(lab.path(".")).env("FIREBOX_CACHE", lab.path("cache"));
    let ended = match command.output() {
        Ok(output) => Ended::new(output, "a full disk".into()),
        Err(error) => {
            common::skipped(&format!("no `unshare`, so no small disk: {error}"));
            return None;
        }
    };
    if ended.code == Some(77) || ended.stderr.starts_with("unshare:") {
        common::skipped(&format!("no small disk can be mounted here: {}", ended.stderr.trim()));
        assert!(!(root && std::env::var("CI").is_ok_and(|ci| ci == "true")), "CI runs as root, which may mount");
        return None;
    }
    Some(ended)
}

#[test]
fn a_full_disk_costs_only_the_unfinished_checkpoint() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &[]).fingerprint();
    // Saving each step and dropping none fills the disk; with what the recipe itself keeps, it is large enough.
    let script = r#"
        "$1" train "$2" --data docs.jsonl --out disk/run --set checkpoint.every=1 --set checkpoint.keep_last=100
        code=$?
        ls -A disk/run/checkpoints > listed
        "$1" logits disk/run --ids 1,2,3 --out logits.safetensors >&2 || exit 78
        rm -r $(ls -d disk/run/checkpoints/step-* | sort -V | head -n -1)
        "$1" train "$2" --data docs.jsonl --out disk/run --resume > resumed 2>&1 || { cat resumed >&2; exit 79; }
        cp -r disk/run disk-run
        exit $code"#;
    let Some(ended) = on_a_small_disk(&lab, "1500k", script) else { return };
    ended.failed(2, &["No space left on device"]);
    let listed = std::fs::read_to_string(lab.path("listed")).unwrap();
    assert!(listed.lines().count() > 1 && listed.lines().all(|name| name.starts_with("step-")), "{listed}");
    assert!(lab.path("logits.safetensors").is_file());
    want.assert_equals(&lab.run("disk-run").fingerprint(), "after the disk was full");
}

#[test]
fn activations_that_a_full_disk_cannot_take_end_the_run_and_leave_nothing() {
    let lab = Lab::new(150);
    let script = r#"
        "$1" train "$2" --data docs.jsonl --out disk/run --set train.batch_rows=300 --set train.micro_batch_rows=0 \
            --set memory.recompute=blocks --set memory.offload=disk --set checkpoint.every=0
        code=$?
        ls -A disk/run > listed
        exit $code"#;
    let Some(ended) = on_a_small_disk(&lab, "1500k", script) else { return };
    ended.failed(2, &["activations in disk/run: No space left on device", "memory.offload"]);
    let listed = std::fs::read_to_string(lab.path("listed")).unwrap();
    assert!(!listed.contains("tmp") && !listed.contains("checkpoints"), "{listed}");
}
