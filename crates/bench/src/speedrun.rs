//! `bench speedrun`: from text to the same loss. nanoGPT's CPU recipe in PyTorch, and a recipe of Firebox, each as a user starts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use firebox_models::transformer::presets;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::contender::{Contender, Programs};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::stats::{Spread, number, times};
use crate::table::Table;
use crate::train::Settings;
use crate::worker::{keep_tail, lock, release, script, spawn};

/// The results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// Threads of each contender.
    pub threads: usize,
    /// Firebox's recipe.
    pub recipe: String,
    /// The contenders.
    pub results: Vec<Outcome>,
}

/// A contender's runs, one per round, each with another seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Who.
    pub contender: Contender,
    /// With what.
    pub software: String,
    /// Its runs.
    pub runs: Vec<Run>,
}

/// A run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Run {
    /// From the start of the process to its end.
    pub seconds: f64,
    /// Loss over the whole held-out text, nats per character.
    pub val_loss: f64,
}

/// What is run on which text.
pub struct Task<'a> {
    /// The text.
    pub data: &'a Path,
    /// Firebox's recipe.
    pub recipe: &'a str,
    /// The `firebox` program.
    pub firebox: Option<&'a Path>,
    /// Few steps.
    pub quick: bool,
}

/// Runs every contender in turns.
///
/// # Errors
/// A program that is missing or fails.
pub fn run(programs: &Programs, task: &Task<'_>, settings: &Settings) -> Result<Report> {
    let data = fs::canonicalize(task.data).map_err(Error::io("read", task.data))?;
    let folder = programs.cache.join("speedrun");
    let start = |&contender: &Contender| Outcome { contender, software: String::new(), runs: vec![] };
    let mut results: Vec<Outcome> = settings.contenders.iter().map(start).collect();
    for round in 0..settings.rounds {
        let seed = 1337 + round as u64;
        for outcome in &mut results {
            let contender = outcome.contender;
            let (run, software) = if contender.is_torch() {
                torch(programs, task, &data, contender, settings.threads, seed)?
            } else {
                firebox(task, &data, &folder, settings.threads, seed)?
            };
            let Run { seconds, val_loss } = run;
            eprintln!(
                "    round {}/{}  {contender:17} {seconds:7.1} s, loss {val_loss:.4}",
                round + 1,
                settings.rounds
            );
            outcome.runs.push(run);
            outcome.software = software;
        }
    }
    Ok(Report { machine: Machine::here(), threads: settings.threads, recipe: task.recipe.to_owned(), results })
}

/// Steps of a smoke run.
const QUICK_STEPS: usize = 20;

/// `torch/speedrun.py`.
fn torch(
    programs: &Programs,
    task: &Task<'_>,
    data: &Path,
    contender: Contender,
    threads: usize,
    seed: u64,
) -> Result<(Run, String)> {
    #[derive(Deserialize)]
    struct Last {
        val_loss: f64,
        uncounted_seconds: f64,
        software: String,
    }
    let missing = || Error::Program { contender, what: "a Python that has PyTorch", option: "--python PATH" };
    let job = json!({
        "data": data, "model": presets::nanogpt_cpu(65), "threads": threads, "seed": seed,
        "compiled": contender == Contender::TorchCompile, "steps": if task.quick { QUICK_STEPS } else { 2000 },
    });
    let mut command = Command::new(programs.python.as_ref().ok_or_else(missing)?);
    command.arg(script("speedrun.py")).arg(job.to_string());
    command.env("OMP_NUM_THREADS", threads.to_string()).env("PYTHONDONTWRITEBYTECODE", "1");
    let (seconds, output) = finish(&mut command, contender)?;
    let line = output.lines().last().unwrap_or_default();
    let last: Last = serde_json::from_str(line)
        .map_err(|_| Error::Protocol { expected: "the result of speedrun.py", got: line.to_owned() })?;
    Ok((Run { seconds: seconds - last.uncounted_seconds, val_loss: last.val_loss }, last.software))
}

/// `firebox train RECIPE --data …`, with no token cached before.
fn firebox(task: &Task<'_>, data: &Path, folder: &Path, threads: usize, seed: u64) -> Result<(Run, String)> {
    #[derive(Deserialize)]
    struct Summary {
        val_loss: f64,
    }
    let missing =
        || Error::Program { contender: Contender::Firebox, what: "the program `firebox`", option: "--firebox PATH" };
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(Error::io("remove", folder))?;
    }
    let out: PathBuf = folder.join("run");
    let mut command = Command::new(task.firebox.ok_or_else(missing)?);
    command.args(["train", task.recipe, "--seed", &seed.to_string(), "--data"]).arg(data).arg("--out").arg(&out);
    if task.quick {
        command.args(["--set", &format!("train.steps={QUICK_STEPS}"), "--set", "schedule.warmup_steps=10"]);
    }
    command.env("FIREBOX_CACHE", folder.join("cache")).env("RAYON_NUM_THREADS", threads.to_string());
    let (seconds, _) = finish(&mut command, Contender::Firebox)?;
    let path = out.join("summary.json");
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let summary: Summary =
        serde_json::from_str(&text).map_err(|source| Error::Json { what: "the run's summary", source })?;
    Ok((Run { seconds, val_loss: summary.val_loss }, format!("Firebox {}", env!("CARGO_PKG_VERSION"))))
}

/// Runs a program to its end: how long it took, and the end of its standard output.
pub(crate) fn finish(command: &mut Command, contender: Contender) -> Result<(f64, String)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let child = spawn(command, contender.name(), "start it by `cargo xtask bench`")?;
    let tails: Vec<Arc<Mutex<Vec<u8>>>> = vec![Arc::default(), Arc::default()];
    let (stdout, stderr) = {
        let mut child = lock(&child);
        (child.stdout.take(), child.stderr.take())
    };
    let readers = [
        stdout.map(|stream| {
            let tail = tails[0].clone();
            thread::spawn(move || keep_tail(stream, &tail))
        }),
        stderr.map(|stream| {
            let tail = tails[1].clone();
            thread::spawn(move || keep_tail(stream, &tail))
        }),
    ];
    let status = loop {
        if let Some(status) = lock(&child).try_wait().map_err(Error::io("wait for", contender.name()))? {
            break status;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let seconds = start.elapsed().as_secs_f64();
    release(&child);
    for reader in readers.into_iter().flatten() {
        // A reader does not panic; what it has read is there in any case.
        let _ = reader.join();
    }
    let text = |i: usize| String::from_utf8_lossy(&lock(&tails[i])).into_owned();
    if status.success() {
        return Ok((seconds, text(0)));
    }
    let (status, doing, stderr) = (status.to_string(), "train".to_owned(), text(1).trim_end().to_owned());
    Err(Error::Died { contender, status, doing, stderr })
}

impl Report {
    /// The table, in Markdown.
    pub fn markdown(&self) -> String {
        let mut table =
            Table::new(["", "wall-clock, s", "min – max", "held-out loss", "min – max", "faster than PyTorch"]);
        let seconds = |outcome: &Outcome| Spread::of(outcome.runs.iter().map(|run| run.seconds));
        let torch = self.results.iter().filter(|outcome| outcome.contender.is_torch());
        let best = torch.map(|outcome| seconds(outcome).median).min_by(f64::total_cmp);
        for outcome in &self.results {
            let (time, loss) = (seconds(outcome), Spread::of(outcome.runs.iter().map(|run| run.val_loss)));
            table.row([
                outcome.contender.to_string(),
                number(time.median),
                format!("{} – {}", number(time.min), number(time.max)),
                format!("{:.4}", loss.median),
                format!("{:.4} – {:.4}", loss.min, loss.max),
                best.map_or_else(String::new, |best| times(best / time.median)),
            ]);
        }
        format!("Firebox's recipe is `{}`.\n\n{table}", self.recipe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_to_the_fastest_of_pytorch() {
        let outcome = |contender, runs: &[(f64, f64)]| Outcome {
            contender,
            software: String::new(),
            runs: runs.iter().map(|&(seconds, val_loss)| Run { seconds, val_loss }).collect(),
        };
        let results = vec![
            outcome(Contender::Firebox, &[(20.0, 1.75), (30.0, 1.73), (22.0, 1.74)]),
            outcome(Contender::TorchEager, &[(110.0, 1.9)]),
            outcome(Contender::TorchCompile, &[(140.0, 1.88)]),
        ];
        let report = Report { machine: Machine::here(), threads: 2, recipe: "x".to_owned(), results };
        let text = report.markdown();
        assert!(text.contains("5.00x") && text.contains("1.7400") && text.contains("1.7300 – 1.7500"), "{text}");
    }

    #[test]
    fn a_program_that_fails_shows_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo trouble >&2; exit 3"]);
        let text = finish(&mut command, Contender::Firebox).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(text.contains("trouble") && text.contains('3'), "{text}");
    }
}
