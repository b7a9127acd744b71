//! `bench shootout`: every optimizer on one recipe, each with the best of several learning rates.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use firebox_optim::Algorithm;
use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::optim::state_bytes;
use crate::plot::{self, Panel, Series};
use crate::speedrun::finish;
use crate::stats::number;
use crate::table::Table;

/// What is run on which text.
pub struct Task<'a> {
    /// The text.
    pub data: &'a Path,
    /// The recipe.
    pub recipe: &'a str,
    /// The `firebox` program.
    pub firebox: Option<&'a Path>,
    /// Where runs are kept.
    pub folder: PathBuf,
    /// Threads of a run.
    pub threads: usize,
    /// Few steps.
    pub quick: bool,
    /// Names of the only optimizers to run, if not all.
    pub only: &'a [String],
    /// What the others did before.
    pub before: Vec<Outcome>,
}

/// The results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// Threads of a run.
    pub threads: usize,
    /// The recipe.
    pub recipe: String,
    /// Every optimizer, the lowest loss first.
    pub results: Vec<Outcome>,
}

/// An optimizer's runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Its name.
    pub algorithm: String,
    /// Bytes of state per parameter of a matrix.
    pub state_bytes: f64,
    /// A run for each learning rate.
    pub runs: Vec<Run>,
}

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The peak learning rate.
    pub lr: f64,
    /// Seconds of training, evaluations included.
    pub seconds: f64,
    /// Loss over the whole held-out text at the end; none where the run diverged.
    pub val_loss: Option<f64>,
    /// Tokens read and held-out loss, on the way.
    pub curve: Vec<(f64, f64)>,
}

impl Outcome {
    /// The run with the lowest loss.
    fn best(&self) -> Option<(&Run, f64)> {
        let finished = self.runs.iter().filter_map(|run| Some((run, run.val_loss?)));
        finished.min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// Learning rates that are tried: around what the papers say of each beside AdamW's.
fn rates(algorithm: &Algorithm) -> [f64; 4] {
    match algorithm {
        Algorithm::Sgd(_) => [0.1, 0.3, 1.0, 3.0],
        Algorithm::Lion(_) | Algorithm::Sophia(_) => [3e-4, 1e-3, 3e-3, 1e-2],
        Algorithm::Adafactor(_) | Algorithm::Lamb(_) => [1e-2, 3e-2, 1e-1, 3e-1],
        Algorithm::ScheduleFree(_) => [3e-3, 1e-2, 3e-2, 1e-1],
        Algorithm::Muon(_) => [1e-2, 2e-2, 4e-2, 8e-2],
        _ => [3e-3, 1e-2, 2e-2, 4e-2],
    }
}

/// Steps of a smoke run.
const QUICK_STEPS: usize = 20;

/// Trains with every optimizer.
///
/// # Errors
/// A program that is missing or fails otherwise than by diverging.
pub fn run(task: Task<'_>) -> Result<Report> {
    let data = fs::canonicalize(task.data).map_err(Error::io("read", task.data))?;
    if let Some(name) = task.only.iter().find(|name| Algorithm::all().into_iter().all(|a| a.name() != **name)) {
        let known = Algorithm::all().into_iter().map(|a| a.name()).collect::<Vec<_>>().join(", ");
        return Err(Error::Unknown { kind: "optimizer", name: name.clone(), known });
    }
    let wanted = |name: &str| task.only.is_empty() || task.only.iter().any(|only| only == name);
    let mut results: Vec<Outcome> = task.before.iter().filter(|outcome| !wanted(&outcome.algorithm)).cloned().collect();
    for algorithm in Algorithm::all().into_iter().filter(|algorithm| wanted(algorithm.name())) {
        let mut runs = vec![];
        for lr in rates(&algorithm) {
            let run = train(&task, &data, &algorithm, lr)?;
            let loss = run.val_loss.map_or_else(|| "diverged".to_owned(), |loss| format!("loss {loss:.4}"));
            eprintln!("    {:<14} lr {lr:<6} {:6.1} s, {loss}", algorithm.name(), run.seconds);
            runs.push(run);
        }
        const D: usize = 1024;
        let state_bytes = state_bytes(&algorithm, 32, D)? as f64 / (D * D) as f64;
        results.push(Outcome { algorithm: algorithm.name().to_owned(), state_bytes, runs });
    }
    let loss = |outcome: &Outcome| outcome.best().map_or(f64::INFINITY, |(_, loss)| loss);
    results.sort_by(|a, b| loss(a).total_cmp(&loss(b)));
    Ok(Report { machine: Machine::here(), threads: task.threads, recipe: task.recipe.to_owned(), results })
}

fn train(task: &Task<'_>, data: &Path, algorithm: &Algorithm, lr: f64) -> Result<Run> {
    #[derive(Deserialize)]
    struct Summary {
        val_loss: Option<f64>,
        wall_s: f64,
        steps: u64,
    }
    #[derive(Deserialize)]
    struct Line {
        tokens: Option<f64>,
        val_loss: Option<f64>,
    }
    let contender = Contender::Firebox;
    let missing = || Error::Program { contender, what: "the program `firebox`", option: "--firebox PATH" };
    let out = task.folder.join(format!("{}-{lr}", algorithm.name()));
    if out.exists() {
        fs::remove_dir_all(&out).map_err(Error::io("remove", &out))?;
    }
    let mut command = Command::new(task.firebox.ok_or_else(missing)?);
    command.args(["train", task.recipe, "--data"]).arg(data).arg("--out").arg(&out);
    let mut set = |value: String| _ = command.args(["--set", &value]);
    set(format!("optimizer={{ kind = \"{}\", lr = {lr} }}", algorithm.name()));
    set("eval.every=50".to_owned());
    set("eval.max_batches=40".to_owned());
    set("eval.sample_tokens=0".to_owned());
    if let Algorithm::ScheduleFree(_) = algorithm {
        set("schedule={ kind = \"constant\", warmup_steps = 20 }".to_owned());
    }
    if task.quick {
        set(format!("train.steps={QUICK_STEPS}"));
        set("schedule.warmup_steps=10".to_owned());
    }
    command.env("FIREBOX_CACHE", task.folder.join("cache")).env("RAYON_NUM_THREADS", task.threads.to_string());
    let diverged = Run { lr, seconds: 0.0, val_loss: None, curve: vec![] };
    match finish(&mut command, contender) {
        Err(Error::Died { stderr, .. }) if stderr.contains("not finite") || stderr.contains("diverged") => {
            return Ok(diverged);
        }
        other => other?,
    };
    let read = |name: &str| {
        let path = out.join(name);
        fs::read_to_string(&path).map_err(Error::io("read", &path))
    };
    let json = |source| Error::Json { what: "a run's files", source };
    let summary: Summary = serde_json::from_str(&read("summary.json")?).map_err(json)?;
    let lines = read("metrics.jsonl")?;
    let lines: Vec<Line> =
        lines.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>().map_err(json)?;
    let curve = lines.iter().filter_map(|line| Some((line.tokens?, line.val_loss?))).collect();
    let finished = summary.steps > 0;
    Ok(Run {
        seconds: summary.wall_s,
        val_loss: summary.val_loss.filter(|loss| finished && loss.is_finite()),
        curve,
        ..diverged
    })
}

/// How many optimizers a plot shows.
const SHOWN: usize = 5;

impl Report {
    /// The table, in Markdown.
    pub fn markdown(&self) -> String {
        let mut table =
            Table::new(["", "held-out loss", "at lr", "other rates", "seconds", "state, bytes per parameter"]);
        for outcome in &self.results {
            let Some((best, loss)) = outcome.best() else {
                table.row([
                    outcome.algorithm.clone(),
                    "diverged".to_owned(),
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                ]);
                continue;
            };
            let others = outcome.runs.iter().filter(|run| run.lr != best.lr);
            let others = others.map(|run| {
                let loss = run.val_loss.map_or_else(|| "diverged".to_owned(), |loss| format!("{loss:.3}"));
                format!("{}: {loss}", run.lr)
            });
            table.row([
                outcome.algorithm.clone(),
                format!("{loss:.4}"),
                best.lr.to_string(),
                others.collect::<Vec<_>>().join(", "),
                number(best.seconds),
                number(outcome.state_bytes),
            ]);
        }
        format!(
            "Recipe `{}`, one seed; losses over the whole held-out text after the last step, seconds of training with its \
             evaluations. Hyperparameters but the learning rate are the defaults above.\n\n{table}",
            self.recipe
        )
    }

    /// Held-out loss over tokens and over time, of the best, as an SVG.
    ///
    /// # Errors
    /// [`Error::Draw`].
    pub fn plot(&self) -> Result<String> {
        let series = |x: fn(&Run, f64) -> f64| {
            let line = |outcome: &Outcome| {
                let (best, _) = outcome.best()?;
                let points = best.curve.iter().map(|&(tokens, loss)| (x(best, tokens), loss)).collect();
                Some(Series { label: outcome.algorithm.clone(), points })
            };
            self.results.iter().filter_map(line).take(SHOWN).collect()
        };
        let value = |loss: f64| format!("{loss:.2}");
        let seconds = |run: &Run, tokens: f64| {
            let all = run.curve.last().map_or(1.0, |&(tokens, _)| tokens);
            run.seconds * tokens / all
        };
        plot::panels(&[
            Panel { title: "Held-out loss over tokens".to_owned(), value, series: series(|_, tokens| tokens) },
            Panel { title: "Held-out loss over seconds".to_owned(), value, series: series(seconds) },
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_rate_counts_and_what_diverged_does_not() {
        let run = |lr, val_loss| Run { lr, seconds: 1.0, val_loss, curve: vec![(1.0, 2.0), (2.0, 1.5)] };
        let outcome = |name: &str, runs| Outcome { algorithm: name.to_owned(), state_bytes: 8.0, runs };
        let report = Report {
            machine: Machine::here(),
            threads: 1,
            recipe: "x".to_owned(),
            results: vec![
                outcome("one", vec![run(0.1, Some(2.0)), run(0.2, Some(1.5)), run(0.3, None)]),
                outcome("two", vec![run(0.1, None)]),
            ],
        };
        let text = report.markdown();
        assert!(text.contains("1.5000") && text.contains("0.1: 2.000, 0.3: diverged"), "{text}");
        assert!(report.plot().is_ok_and(|svg| svg.contains("one") && !svg.contains("two")));
    }

    #[test]
    fn every_optimizer_has_rates_that_it_accepts() {
        for algorithm in Algorithm::all() {
            for lr in rates(&algorithm) {
                assert_eq!(algorithm.validate_lr(lr), Ok(()), "{algorithm:?} {lr}");
            }
        }
    }
}
