//! Ranks that are lost, wherever they are: it is said in time who, nothing is lost, and `--elastic` goes on by itself. Ranks are threads here; `mpi.rs` has
//! the same for processes.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::process::Stdio;
use std::time::{Duration, Instant};

use common::processes::kill_at_random;
use common::{Ended, Lab, Random, Run, signal, wait_until};

/// Far above what any of these runs takes.
const IN_TIME: Duration = Duration::from_secs(60);

const FAULT: &str = "FIREBOX_FAULT";

/// Six micro-batches a step, and no clipping: of what divides the state or the model, it could differ in the last bit.
const MICRO: [&str; 4] = ["--set", "train.micro_batch_rows=1", "--set", "optimizer.clip=0"];

fn undisturbed(lab: &Lab, args: &[&str]) -> Run {
    lab.trained("undisturbed", args)
}

#[test]
fn a_lost_rank_is_named_in_time_and_the_run_goes_on_without_it() {
    let lab = Lab::new(150);
    let want = undisturbed(&lab, &MICRO).fingerprint();
    for (fault, args, says) in [
        ("1:forward:7:panic", &["--ranks", "3"][..], "rank 1 failed: it panicked"),
        ("2:backward:7:panic", &["--ranks", "3", "--zero", "2"], "rank 2 failed: it panicked"),
        ("0:collective:7:panic", &["--ranks", "3"], "rank 0 failed: it panicked"),
        ("1:backward:7:panic", &["--ranks", "4", "--pp", "2"], "rank 1 failed: it panicked"),
        ("1:collective:7:hang", &["--ranks", "2", "--rank-timeout", "4"], "for rank 1; hung"),
    ] {
        let begun = Instant::now();
        let mut command = lab.train("lost", &[&MICRO, args].concat());
        let ended = Ended::new(command.env(FAULT, fault).output().unwrap(), fault.into());
        assert_eq!(ended.code, Some(1), "{fault}: {}", ended.stderr);
        let error = ended.stderr.lines().find(|line| line.starts_with("error:")).unwrap();
        assert!(error.contains(says) && error.contains("--resume"), "{fault}: {error}");
        assert!(begun.elapsed() < IN_TIME, "{fault}");
        // With those that remain.
        let resume = lab.train("lost", &[&MICRO[..], &["--resume", "--ranks", "2"]].concat()).output().unwrap();
        Ended::new(resume, fault.into()).succeeded();
        want.assert_same_steps(&lab.run("lost").fingerprint(), fault);
        std::fs::remove_dir_all(lab.path("lost")).unwrap();
    }
}

#[test]
fn elastic_runs_go_on_by_themselves() {
    let lab = Lab::new(150);
    // Between the steps, so that it is known from where the run goes on but for a kill amid writing; other tests have them beside.
    let args = [&MICRO[..], &["--set", "checkpoint.background=false"]].concat();
    let want = undisturbed(&lab, &args).fingerprint();
    for (fault, says, from) in [
        ("1:forward:7:kill", "signal 9", "step 4"),
        ("1:backward:9:kill", "signal 9", "step 8"),
        ("2:collective:5:kill", "signal 9", "step 4"),
        ("1:checkpoint:8:kill", "signal 9", "step "),
        ("1:checkpoint:4:kill", "signal 9", ""),
        ("0:backward:2:panic", "exit code 1", "the beginning"),
        ("1:forward:11:hang", "exit code 1", "step 8"),
    ] {
        // On a busy machine ranks come late, too.
        let patience = if fault.ends_with("hang") { "4" } else { "60" };
        let elastic = ["--ranks", "3", "--rank-timeout", patience, "--elastic"];
        let mut command = lab.train("elastic", &[&args[..], &elastic].concat());
        let ended = Ended::new(command.env(FAULT, fault).output().unwrap(), fault.into()).succeeded();
        let told: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("elastic:")).collect();
        assert_eq!(told.len(), 1, "{fault}: {}", ended.stderr);
        assert!(told[0].contains(says) && told[0].contains(&format!("from {from}")), "{fault}: {}", told[0]);
        want.assert_equals(&lab.run("elastic").fingerprint(), fault);
        std::fs::remove_dir_all(lab.path("elastic")).unwrap();
    }
}

#[test]
fn what_starting_again_cannot_help_is_not_started_again() {
    let lab = Lab::new(60);
    let elastic = |args: &[&str]| {
        let command = lab.train("run", &[args, &["--elastic", "--ranks", "2"]].concat()).output();
        Ended::new(command.unwrap(), format!("{args:?}"))
    };
    let wrong = elastic(&["--set", "optimizer.beta1=2"]);
    wrong.failed(2, &["beta1"]);
    assert!(!wrong.stderr.contains("elastic:"), "{}", wrong.stderr);
    // It diverges, each time anew.
    let hopeless = elastic(&["--set", "optimizer.kind=sgd", "--set", "optimizer.lr=1e6", "--set", "optimizer.clip=0"]);
    assert_eq!(hopeless.code, Some(1), "{}", hopeless.stderr);
    let last = hopeless.stderr.lines().last().unwrap();
    assert!(last.contains("given up after 3 restarts") && last.contains("exit code 1"), "{last}");
    assert!(hopeless.stderr.contains("training diverged"), "{}", hopeless.stderr);
    lab.call(&["train", "--data", "docs.jsonl", "--elastic", "--cooldown-from", "run", "--steps", "3"])
        .failed(2, &["--elastic", "--cooldown-from"]);
    if !cfg!(feature = "mpi") {
        lab.call(&["train", "tiny", "--data", "docs.jsonl", "--mpi", "2"])
            .failed(2, &["--mpi", "feature mpi", "--ranks"]);
    }
    lab.call(&["train", "tiny", "--data", "docs.jsonl", "--ranks", "2", "--log-rank", "1,2"])
        .failed(2, &["--log-rank", "0 to 1", "2"]);
    lab.call(&["train", "tiny", "--data", "docs.jsonl", "--log-rank", "first"]).failed(2, &["--log-rank", "first"]);
    let mut asked = lab.train("fault", &["--ranks", "2"]);
    Ended::new(asked.env(FAULT, "1:soon").output().unwrap(), "fault".into()).failed(2, &[FAULT, "1:backward:7:kill"]);
}

#[test]
fn an_elastic_run_stops_upon_a_signal_like_any_other() {
    let lab = Lab::new(150);
    let args = [&MICRO[..], &["--set", "train.steps=400", "--ranks", "2", "--elastic"]].concat();
    let run = lab.run("stopped");
    let mut child = lab.train("stopped", &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_until(&mut child, || run.step() >= 5));
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let summary = run.json("summary.json");
    assert_eq!(summary["stopped"], "interrupted");
    assert_eq!(run.saved().last().copied(), summary["steps"].as_u64());
}

#[test]
fn ranks_that_are_asked_for_show_their_progress() {
    let lab = Lab::new(60);
    let args = ["--ranks", "3", "--set", "train.steps=8", "--set", "train.micro_batch_rows=1"];
    let run = |more: &[&str]| Ended::new(lab.train("run", &[&args, more].concat()).output().unwrap(), "".into());
    let shown = |ended: &Ended| -> Vec<bool> {
        (0..3).map(|rank| ended.stderr.contains(&format!("[rank {rank}] step 8/8  loss"))).collect()
    };
    for (asked, want) in
        [(&[][..], [false; 3]), (&["--log-rank", "2"], [true, false, true]), (&["--log-rank", "all"], [true; 3])]
    {
        let ended = run(asked).succeeded();
        assert_eq!(shown(&ended), want, "{asked:?}: {}", ended.stderr);
        std::fs::remove_dir_all(lab.path("run")).unwrap();
    }
    // Each line is whole.
    let ended = run(&["--log-rank", "all", "--timeline"]).succeeded();
    let mut of_ranks = ended.stderr.lines().skip_while(|line| !line.starts_with("[rank "));
    assert!(of_ranks.all(|line| line.starts_with("[rank ")), "{}", ended.stderr);
    assert!(lab.path("run/timeline.json").is_file());
}

/// Kills of a run, at random moments; the environment may ask for more.
const KILLS: u64 = 8;

#[test]
fn an_elastic_run_that_is_killed_again_and_again_ends_as_if_it_never_was() {
    let lab = Lab::new(150);
    let kills = std::env::var("FIREBOX_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS);
    let steps = format!("train.steps={}", 40 * kills);
    let args = [&MICRO[..], &["--set", &steps, "--set", "checkpoint.every=4", "--set", "eval.every=40"]].concat();
    let want = undisturbed(&lab, &args).fingerprint();
    let command = lab.train("killed", &[&args[..], &["--ranks", "3", "--elastic"]].concat());
    let ended = kill_at_random(command, &lab.run("killed"), kills, false, &mut Random(5)).succeeded();
    let restarts = ended.stderr.lines().filter(|line| line.starts_with("elastic:")).count() as u64;
    assert_eq!(restarts, kills, "{}", ended.stderr);
    want.assert_equals(&lab.run("killed").fingerprint(), "killed");
}
