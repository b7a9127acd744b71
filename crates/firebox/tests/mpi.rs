//! Ranks as processes of MPI: every layout trains as one rank does, a lost process is named, and `--elastic` goes on with those that remain.
//! `cargo xtask test mpi` runs it.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::processes::{below, kill, kill_at_random};
use common::{Ended, Lab, Random, Run, signal, wait_until};
use safetensors::SafeTensors;

/// Far above what any of these runs takes, on a busy machine too.
const IN_TIME: Duration = Duration::from_secs(120);

/// Four blocks, eight micro-batches a step, ten steps.
const RUN: [&str; 14] = [
    "--threads",
    "1",
    "--set",
    "model.n_layers=4",
    "--set",
    "model.tied=false",
    "--set",
    "model.dropout=0",
    "--set",
    "train.batch_rows=8",
    "--set",
    "train.micro_batch_rows=1",
    "--set",
    "train.steps=10",
];

/// A layout of each kind: processes, and options.
const LAYOUTS: [(usize, &str); 16] = [
    (2, ""),
    (4, ""),
    (2, "--zero 2"),
    (2, "--tp 2"),
    (2, "--tp 2 --sequence-parallel"),
    (2, "--pp 2"),
    (4, "--pp 4 --schedule zb-h1"),
    (4, "--pp 2 --schedule interleaved"),
    (4, "--tp 2 --pp 2 --sequence-parallel"),
    (4, "--tp 2 --zero 2"),
    (2, "--zero 3"),
    (4, "--zero 3 --dp-replicate 2"),
    (2, "--cp 2"),
    (4, "--cp 2 --cp-kind ulysses --tp 2"),
    (2, "--ep 2"),
    (4, "--ep 2 --pp 2 --zero 1"),
];

/// What those with `--ep` have in place of a dense model.
const EXPERTS: [&str; 4] = ["--set", "model.n_experts=4", "--set", "model.router_aux_loss=0.02"];

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn parameters(run: &Run) -> BTreeMap<String, Vec<f32>> {
    let last = run.saved().last().copied().unwrap();
    let bytes = std::fs::read(run.dir.join(format!("checkpoints/step-{last}/model.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    file.iter().map(|(name, tensor)| (name.to_owned(), values(tensor.data()))).collect()
}

/// Losses to 1e-5, parameters to 1e-4 of the largest.
#[track_caller]
fn assert_close(run: &Run, one: &Run, what: &str) {
    for key in ["loss", "val_loss"] {
        let (got, want) = (run.series(key), one.series(key));
        assert_eq!(got.len(), want.len(), "{what}: {key}");
        for ((step, got), (_, want)) in got.into_iter().zip(want) {
            assert!((got / want - 1.0).abs() < 1e-5, "{what}: {key} at step {step}: {got}, one rank {want}");
        }
    }
    let (got, want) = (parameters(run), parameters(one));
    assert!(got.keys().eq(want.keys()), "{what}: other parameters");
    for (name, want) in want {
        let largest = want.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let apart = want.iter().zip(&got[&name]).fold(0f32, |worst, (x, y)| worst.max((x - y).abs()));
        assert!(apart < 1e-4 * largest, "{what}: {name} is {apart} apart");
    }
}

#[test]
fn every_layout_over_mpi_trains_as_one_rank_does() {
    let lab = Lab::new(150);
    let (dense, experts) = (lab.trained("one", &RUN), lab.trained("experts", &[&RUN[..], &EXPERTS].concat()));
    for (ranks, layout) in LAYOUTS {
        let ranks = ranks.to_string();
        let (one, more) = if layout.contains("--ep") { (&experts, &EXPERTS[..]) } else { (&dense, &[][..]) };
        let args = [&RUN[..], more, &["--mpi", &ranks], &words(layout)].concat();
        let ended = Ended::new(lab.train("many", &args).output().unwrap(), layout.into()).succeeded();
        assert!(ended.stdout.contains(&format!("{ranks} ranks of ")), "{layout}: {}", ended.stdout);
        assert_close(&lab.run("many"), one, &format!("{ranks} ranks {layout}"));
        std::fs::remove_dir_all(lab.path("many")).unwrap();
    }
}

#[test]
fn plain_mpirun_does_as_well_and_data_parallel_ranks_give_the_same_bits() {
    let lab = Lab::new(150);
    let want = lab.trained("one", &RUN).fingerprint();
    let firebox = lab.train("many", &RUN);
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--allow-run-as-root", "-n", "3"]).arg(firebox.get_program());
    command
        .args(firebox.get_args())
        .arg("--timeline")
        .current_dir(lab.path("."))
        .env("FIREBOX_CACHE", lab.path("cache"));
    Ended::new(command.stdin(Stdio::null()).output().unwrap(), "mpirun".into()).succeeded();
    want.assert_equals(&lab.run("many").fingerprint(), "mpirun -n 3");

    let timeline = lab.run("many").json("timeline.json");
    let spans = timeline["traceEvents"].as_array().unwrap();
    for rank in 0..3 {
        let of = |kind: &str| spans.iter().filter(|span| span["pid"] == rank && span["cat"] == kind).count();
        assert!(of("forward") >= 2 && of("forward") == of("backward") && of("communication") > 0, "rank {rank}");
    }
    let last = lab.run("many").metrics().into_iter().rfind(|line| line["loss"].is_f64()).unwrap();
    assert!(last["bytes_sent"].as_u64() > Some(0) && last["overlap"].is_f64(), "{last}");
}

#[test]
fn a_lost_process_is_named_and_elastic_goes_on_with_the_others() {
    let lab = Lab::new(150);
    let args = [&RUN[..], &["--set", "train.steps=12"]].concat();
    let one = lab.trained("one", &args);
    // Where and how, what mpirun or another rank says, the layout and the processes that go on, and whether it is looked at without --elastic as well.
    for (fault, says, ranks, layout, left, alone) in [
        ("1:forward:7:kill", "rank 1", 3, "", Some(2), true),
        ("2:backward:7:kill", "rank 2", 3, "--zero 2", Some(2), false),
        ("1:collective:7:kill", "rank 1", 4, "--tp 2", Some(2), false),
        ("1:checkpoint:8:kill", "rank 1", 2, "", Some(1), false),
        ("0:checkpoint:8:kill", "rank 0", 2, "--pp 2", None, false),
        ("1:backward:7:panic", "it panicked", 2, "", None, true),
        ("1:collective:7:hang", "for rank 1; hung", 2, "", None, false),
    ] {
        let n = ranks.to_string();
        // On a busy machine ranks come late, too.
        let patience = if fault.ends_with("hang") { "8" } else { "60" };
        let all = [&args[..], &["--mpi", &n, "--rank-timeout", patience], &words(layout)].concat();
        if alone {
            let begun = Instant::now();
            let ended = Ended::new(lab.train("lost", &all).env("FIREBOX_FAULT", fault).output().unwrap(), fault.into());
            assert!(begun.elapsed() < IN_TIME, "{fault}: {:?}", begun.elapsed());
            assert_eq!(ended.code, Some(1), "{fault}: {}", ended.stderr);
            let error = ended.stderr.lines().any(|line| line.starts_with("error:") && line.contains("--resume"));
            assert!(error, "{fault}: {}", ended.stderr);
            std::fs::remove_dir_all(lab.path("lost")).unwrap();
        }

        let mut elastic = lab.train("lost", &[&all[..], &["--elastic"]].concat());
        let ended = Ended::new(elastic.env("FIREBOX_FAULT", fault).output().unwrap(), fault.into()).succeeded();
        assert!(ended.stderr.contains(says), "{fault}: {}", ended.stderr);
        let told: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("elastic:")).collect();
        assert_eq!(told.len(), 1, "{fault}: {}", ended.stderr);
        let fewer = told[0].contains(&format!("on {} of {ranks} ranks", left.unwrap_or_default()));
        assert_eq!(fewer, left.is_some(), "{fault}: {}", ended.stderr);
        // A checkpoint that was being written in the background may be whole, or not.
        let from = ["the beginning", "step 4", "step 8"].iter().any(|from| told[0].contains(&format!("from {from} ")));
        assert!(from, "{fault}: {}", told[0]);
        assert_close(&lab.run("lost"), &one, fault);
        std::fs::remove_dir_all(lab.path("lost")).unwrap();
    }
}

#[test]
fn ranks_that_are_all_lost_are_all_started_again() {
    let lab = Lab::new(150);
    let args = [&RUN[..], &["--set", "train.steps=200", "--set", "eval.every=0"]].concat();
    let want = lab.trained("one", &args).fingerprint();
    let run = lab.run("lost");
    let mut command = lab.train("lost", &[&args[..], &["--mpi", "2", "--elastic"]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_until(&mut child, || !run.saved().is_empty()));
    let mpirun = below(child.id(), "mpirun");
    assert_eq!(mpirun.len(), 1);
    kill(mpirun[0]);
    let ended = Ended::new(child.wait_with_output().unwrap(), "mpirun killed".into()).succeeded();
    assert!(ended.stderr.contains("elastic: ranks were lost (signal 9)"), "{}", ended.stderr);
    want.assert_equals(&run.fingerprint(), "mpirun killed");
}

#[test]
fn a_run_of_processes_stops_upon_a_signal_with_a_checkpoint() {
    let lab = Lab::new(150);
    let args = [&RUN[..], &["--set", "train.steps=4000", "--mpi", "2"]].concat();
    let run = lab.run("stopped");
    let mut child = lab.train("stopped", &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_until(&mut child, || run.step() >= 5));
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let summary = run.json("summary.json");
    assert_eq!(summary["stopped"], "interrupted");
    assert_eq!(run.saved().last().copied(), summary["steps"].as_u64());
}

/// Kills of a run, at random moments; the environment may ask for more.
const KILLS: u64 = 8;

#[test]
fn threads_and_processes_in_turns_are_killed_again_and_again_and_the_run_ends_as_if_they_never_were() {
    let lab = Lab::new(150);
    let kills = std::env::var("FIREBOX_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS);
    let steps = format!("train.steps={}", 60 * kills);
    let args = [&RUN[..], &["--set", &steps, "--set", "checkpoint.every=4", "--set", "eval.every=40"]].concat();
    let want = lab.trained("one", &args).fingerprint();
    let run = lab.run("killed");
    let mut random = Random(7);
    let mut left = kills;
    for round in 0.. {
        let now = left.min(4);
        left -= now;
        // Processes of which ever fewer remain, then threads.
        let ranks = if round % 2 == 0 { ["--mpi", "4"] } else { ["--ranks", "3"] };
        let resume: &[&str] = if Path::new(&run.dir).is_dir() { &["--resume"] } else { &[] };
        let command = lab.train("killed", &[&args[..], &ranks, &["--elastic"], resume].concat());
        let ended = kill_at_random(command, &run, now, left > 0, &mut random).succeeded();
        let restarts = ended.stderr.lines().filter(|line| line.starts_with("elastic:")).count() as u64;
        assert_eq!(restarts, now, "{}", ended.stderr);
        if left == 0 {
            break;
        }
    }
    want.assert_equals(&run.fingerprint(), "killed");
}
