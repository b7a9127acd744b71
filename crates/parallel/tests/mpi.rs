//! Ranks as MPI processes: the conformance suite on 2, 3 and 4 ranks, and faults. Started by itself, it is a test program that starts
//! each test with `mpirun`; `cargo xtask test mpi` runs it.

#![allow(clippy::unwrap_used, missing_docs)]

mod conformance;

use std::env;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use firebox_parallel::{CommError, Communicator, Mpi, ReduceOp};

/// Says to a rank what it is started for.
const SCENARIO: &str = "FIREBOX_MPI_SCENARIO";

const SHORT: Duration = Duration::from_secs(2);

/// Far above any wait in these tests but what [`SHORT`] bounds, also on a busy machine.
const IN_TIME: Duration = Duration::from_secs(60);

/// The name of a test, its ranks, and what a rank must have said, if ranks are to fail.
const TESTS: [(&str, usize, &[&str]); 10] = [
    ("conformance", 2, &[]),
    ("conformance", 3, &[]),
    ("conformance", 4, &[]),
    ("panic", 3, &["rank 1 failed: it panicked: boom"]),
    ("error", 3, &["rank 2 failed: barrier: no such file"]),
    ("hang", 3, &["s for rank 1; hung"]),
    ("hang in a message", 2, &["rank 0 in recv from 1 (tag 7): waited", "s for rank 1; hung"]),
    ("leave", 3, &["rank 1 is gone (it has ended)"]),
    // Told by rank 0 or 1, whichever is first.
    ("mismatch", 3, &[" called all_reduce (sum) of 8 f32, but rank 2 called barrier"]),
    ("kill", 3, &["rank 1"]),
];

fn main() -> ExitCode {
    if let Ok(scenario) = env::var(SCENARIO) {
        return rank(&scenario);
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, ranks, expected) in TESTS {
        let outcome = launch(name, ranks, expected);
        let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} on {ranks} ranks ... {verdict}");
        match outcome {
            Ok(()) => passed += 1,
            Err(why) => {
                println!("{why}");
                failed += 1;
            }
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs this program on some ranks.
fn launch(scenario: &str, ranks: usize, expected: &[&str]) -> Result<(), String> {
    let version = Command::new("mpirun").arg("--version").output().map_err(|error| format!("mpirun: {error}"))?;
    let mut command = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        // Ranks may be more than cores, and containers have no other user than root.
        command.args(["--oversubscribe", "--allow-run-as-root"]);
    }
    command.args(["-n", &ranks.to_string()]).arg(env::current_exe().unwrap()).env(SCENARIO, scenario);
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("mpirun: {error}"))?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    if start.elapsed() > IN_TIME {
        return Err(format!("took {:?}\n{said}", start.elapsed()));
    }
    if output.status.success() != expected.is_empty() {
        return Err(format!("ended with {}\n{said}", output.status));
    }
    match expected.iter().find(|words| !said.contains(**words)) {
        Some(words) => Err(format!("nobody said {words:?}\n{said}")),
        None => Ok(()),
    }
}

/// What a rank does.
fn rank(scenario: &str) -> ExitCode {
    let timeout = if scenario == "conformance" { IN_TIME } else { SHORT };
    let result = Mpi::default().timeout(timeout).run(|comm| act(scenario, &comm));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one piece: the ranks share what mpirun collects.
            std::io::stderr().write_all(format!("{error}\n").as_bytes()).unwrap();
            ExitCode::FAILURE
        }
    }
}

fn act(scenario: &str, comm: &Communicator) -> Result<(), CommError> {
    let rank = comm.rank();
    let mut data = vec![1.0f32; 8];
    if scenario == "conformance" {
        return conformance::all(comm);
    }
    comm.all_reduce(&mut data, ReduceOp::Sum)?;
    match (scenario, rank) {
        ("panic", 1) => panic!("boom"),
        ("error", 2) => return Err(CommError::Engine { operation: "barrier", why: "no such file".to_owned() }),
        ("hang" | "hang in a message", 1) => thread::sleep(Duration::from_secs(3600)),
        ("kill", 1) => {
            let id = std::process::id().to_string();
            Command::new("kill").args(["-9", &id]).status().unwrap();
        }
        ("hang in a message", _) => return comm.recv::<u8>(1, 7).map(|_| ()),
        ("leave", 1) => return Ok(()),
        ("mismatch", 2) => return comm.barrier(),
        _ => {}
    }
    let result = comm.all_reduce(&mut data, ReduceOp::Sum);
    // mpirun ends all ranks when the first does; what this one saw must be out by then.
    if let (Err(error), "panic" | "error") = (&result, scenario) {
        let culprit = if scenario == "panic" { 1 } else { 2 };
        assert!(matches!(error, CommError::RankLost { rank, .. } if *rank == culprit), "{error}");
    }
    result
}
