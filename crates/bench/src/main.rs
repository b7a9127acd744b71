//! # firebox-bench
//!
//! The benchmark: Firebox beside PyTorch and plain burn. Started by `cargo xtask bench`, which builds it and installs PyTorch in
//! the target folder.
//!
//! Every contender is a child process (`protocol`). The driver starts them all and lets them work in turns (`race`), so that whatever
//! else the machine does meets all of them alike; results are medians over the rounds.

mod contender;
mod error;
mod kernels;
mod machine;
mod models;
mod peak;
mod protocol;
mod race;
mod stats;
mod step;
mod table;
mod train;
mod worker;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::contender::{Contender, Programs};
use crate::error::{Error, Result};
use crate::protocol::{Job, Task};
use crate::train::Settings;

/// Measures Firebox beside PyTorch and plain burn.
#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    version,
    after_help = "Examples:
  cargo xtask bench train                         four models, three contenders, about 20 minutes on 2 cores
  cargo xtask bench train gpt-14m --rounds 9      one model, more rounds
  cargo xtask bench train --quick                 a smoke run: its numbers mean nothing

Let nothing else run. Contenders take turns, so a disturbance meets all alike, but it widens the spread."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(Train),
    /// A contender's process; started by the driver.
    #[command(hide = true)]
    Worker {
        /// The job, as JSON.
        job: String,
    },
}

/// What every benchmark takes.
#[derive(Args)]
struct Common {
    /// Who takes part, separated by commas.
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    contenders: Vec<Contender>,
    /// Threads of each contender [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Rounds; results are medians over them.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// One short round, to see that all runs.
    #[arg(long)]
    quick: bool,
    /// Write the results into docs/benchmarks.md as well.
    #[arg(long)]
    write_docs: bool,
    /// A Python that has PyTorch.
    #[arg(long, value_name = "PATH", env = "FIREBOX_BENCH_PYTHON", hide_env_values = true)]
    python: Option<PathBuf>,
    /// This program built with the feature `baseline`, for burn's own modules.
    #[arg(long, value_name = "PATH", env = "FIREBOX_BENCH_BASELINE", hide_env_values = true)]
    baseline: Option<PathBuf>,
    /// Folder of the results.
    #[arg(
        long,
        value_name = "FOLDER",
        default_value = "target/bench",
        env = "FIREBOX_BENCH_RESULTS",
        hide_env_values = true
    )]
    results: PathBuf,
}

impl Common {
    fn programs(&self) -> Programs {
        Programs { python: self.python.clone(), baseline: self.baseline.clone(), cache: self.results.clone() }
    }

    fn settings(&self, default: &[Contender]) -> Settings {
        Settings {
            contenders: if self.contenders.is_empty() { default.to_vec() } else { self.contenders.clone() },
            threads: self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1),
            rounds: if self.quick { 1 } else { self.rounds.max(1) },
            quick: self.quick,
        }
    }

    /// Keeps a result as JSON.
    fn save(&self, name: &str, result: &impl serde::Serialize) -> Result<()> {
        let path = self.results.join(format!("{name}.json"));
        let text = serde_json::to_string_pretty(result).map_err(|source| Error::Json { what: "a result", source })?;
        fs::create_dir_all(&self.results).map_err(Error::io("create", &self.results))?;
        fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
        eprintln!("    {}", path.display());
        Ok(())
    }
}

/// Training steps of whole models: tokens/s, MFU, peak memory.
#[derive(Args)]
struct Train {
    /// The models [default: gpt-14m gpt2-124m nanogpt-cpu llama-30m].
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    common: Common,
}

impl Train {
    fn run(&self) -> Result<()> {
        let mut specs = models::all();
        let known = specs.iter().map(|spec| spec.name).collect::<Vec<_>>().join(", ");
        if let Some(name) = self.models.iter().find(|name| specs.iter().all(|spec| spec.name != **name)) {
            return Err(Error::Unknown { kind: "model", name: name.clone(), known });
        }
        if !self.models.is_empty() {
            specs.retain(|spec| self.models.iter().any(|name| name == spec.name));
        }
        let settings = self.common.settings(&[Contender::Firebox, Contender::TorchEager, Contender::TorchCompile]);
        if let Some(&contender) = settings.contenders.iter().find(|contender| !contender.trains()) {
            return Err(Error::NoPart { contender, task: "training step", advice: "leave it out of --contenders" });
        }
        for spec in &specs {
            let report = train::run(&self.common.programs(), spec, &settings)?;
            println!("## {}\n\n{}", spec.name, report.markdown());
            self.common.save(&format!("train-{}", spec.name), &report)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Worker { job } => work(&job),
        Command::Train(train) => drive(|| train.run()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn drive(run: impl FnOnce() -> Result<()>) -> Result<()> {
    worker::handle_interrupts();
    run()
}

/// The process of a contender.
fn work(job: &str) -> Result<()> {
    let Job { contender, task, .. } =
        serde_json::from_str(job).map_err(|source| Error::Json { what: "the job", source })?;
    match (contender, task) {
        (Contender::Firebox, Task::Train(training)) => step::work(&training),
        (Contender::Peak, Task::Peak) => peak::work(),
        (contender, Task::Train(_)) => Err(Error::NoPart {
            contender,
            task: "training step in this build",
            advice: "start it by `cargo xtask bench`",
        }),
        (contender, _) => {
            Err(Error::NoPart { contender, task: "such task", advice: "this is a fault of the benchmark" })
        }
    }
}
