//! The command line.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::contender::{Contender, Programs, Runtime};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::protocol::{Job, Task, Training};
use crate::scaling::Axis;
use crate::train::Settings;
use crate::{
    compress, docs, kernel_calls, kernels, models, mup, optim, peak, quality, scaling, shootout, speedrun, step, train,
    worker,
};

/// Measures Firebox beside PyTorch and plain burn.
#[derive(Parser)]
#[command(
    name = "cargo xtask bench",
    bin_name = "cargo xtask bench",
    version,
    after_help = "Examples:
  cargo xtask bench train                         four models, three contenders
  cargo xtask bench train gpt-14m --rounds 9      one model, more rounds
  cargo xtask bench train --quick                 a smoke run: its numbers mean nothing
  cargo xtask bench speedrun --data tinyshakespeare.txt

Let nothing else run meanwhile. Contenders take turns, so a disturbance meets all alike, but it widens the spread.
Results are printed as Markdown and kept as JSON in the target folder."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(Train),
    Finetune(Finetune),
    Kernels(Kernels),
    Scaling(Scaling),
    Speedrun(Speedrun),
    Optim(Optim),
    Shootout(Shootout),
    Mup(Mup),
    Compress(Compress),
    /// A process that generates; started by the driver.
    #[command(hide = true)]
    SpeedOf {
        /// The model's folder.
        model: PathBuf,
        /// Compute threads.
        threads: usize,
        /// Tokens that are timed.
        tokens: usize,
    },
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
    /// Who takes part, separated by commas; by default all but burn's own modules, which take minutes to build.
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    contenders: Vec<Contender>,
    /// Threads of each contender [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Rounds; results are medians over them [default: 5, scaling 3, speedrun 1].
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// One short round, to see that all runs.
    #[arg(long)]
    quick: bool,
    /// Write the results into docs/benchmarks.md as well.
    #[arg(long, conflicts_with = "quick")]
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
    fn programs(&self) -> Result<Programs> {
        Ok(Programs {
            own: std::env::current_exe().map_err(Error::io("find", "this program"))?,
            python: self.python.clone(),
            baseline: self.baseline.clone(),
            cache: self.results.clone(),
        })
    }

    fn settings(&self, contenders: &[Contender], rounds: usize) -> Settings {
        Settings {
            contenders: if self.contenders.is_empty() { contenders.to_vec() } else { self.contenders.clone() },
            threads: self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1),
            rounds: if self.quick { 1 } else { self.rounds.unwrap_or(rounds).max(1) },
            quick: self.quick,
        }
    }

    /// Keeps a result as JSON.
    fn save(&self, name: &str, result: &impl serde::Serialize) -> Result<()> {
        let path = self.path(&format!("{name}.json"));
        let text = serde_json::to_string_pretty(result).map_err(|source| Error::Json { what: "a result", source })?;
        write(&path, &(text + "\n"))?;
        eprintln!("    {}", path.display());
        Ok(())
    }

    /// What [`save`](Self::save) kept of an earlier run.
    fn last<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.path(&format!("{name}.json"));
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| Error::Json { what: "the last result", source })
    }

    /// The file of a result; a smoke run does not replace a real one.
    fn path(&self, file: &str) -> PathBuf {
        if self.quick { self.results.join("quick").join(file) } else { self.results.join(file) }
    }
}

/// Writes a file, and its folder if there is none.
fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    fs::write(path, text).map_err(Error::io("write", path))
}

/// Fails where a contender trains no models.
fn all_train(settings: &Settings) -> Result<()> {
    match settings.contenders.iter().find(|contender| !contender.trains()) {
        Some(&contender) => {
            Err(Error::NoPart { contender, task: "part in this benchmark", advice: "leave it out of --contenders" })
        }
        None => Ok(()),
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
        let contenders = [
            Contender::Firebox,
            Contender::FireboxRecompute,
            Contender::FireboxLean,
            Contender::FireboxBf16,
            Contender::TorchEager,
            Contender::TorchCompile,
            Contender::TorchBf16,
        ];
        train_all("train", models::all(), &self.models, &self.common, &contenders)
    }
}

/// Steps of fine-tuning beside transformers and PEFT: tokens/s, MFU, peak memory.
#[derive(Args)]
struct Finetune {
    /// What is trained [default: smollm2-full smollm2-lora].
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    common: Common,
}

impl Finetune {
    fn run(&self) -> Result<()> {
        let contenders =
            [Contender::Firebox, Contender::FireboxRecompute, Contender::FireboxLean, Contender::TorchEager];
        train_all("finetune", models::finetune(), &self.models, &self.common, &contenders)
    }
}

/// Races these contenders with those of `specs` that are `named`, or all of them.
fn train_all(
    section: &str,
    mut specs: Vec<models::Spec>,
    named: &[String],
    common: &Common,
    contenders: &[Contender],
) -> Result<()> {
    let all: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
    if let Some(name) = named.iter().find(|name| !all.contains(name)) {
        return Err(Error::Unknown { kind: "model", name: name.clone(), known: all.join(", ") });
    }
    specs.retain(|spec| named.is_empty() || named.contains(&spec.name));
    let settings = common.settings(contenders, 5);
    all_train(&settings)?;
    for spec in &specs {
        let report = train::run(&common.programs()?, spec, &settings)?;
        println!("## {}\n\n{}", spec.name, report.markdown());
        common.save(&format!("train-{}", spec.name), &report)?;
    }
    if common.write_docs { write_trained(section, &all, common) } else { Ok(()) }
}

/// Every model that was ever measured into this folder, so that they can be measured one at a time.
fn write_trained(section: &str, names: &[String], common: &Common) -> Result<()> {
    let mut reports: Vec<train::Report> = vec![];
    for name in names {
        let path = common.path(&format!("train-{name}.json"));
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            reports.push(serde_json::from_str(&text).map_err(|source| Error::Json { what: "a result", source })?);
        }
    }
    let parts = reports.iter().map(|report| {
        let machine = report.machine.describe(report.threads, &report.software());
        format!("### {}\n\n{}\n{machine}\n", report.name, report.markdown())
    });
    let text = format!("{}\n{}", train::overview(&reports), parts.collect::<Vec<_>>().join("\n"));
    docs::write_section(section, &text)
}

/// Single operations at the models' shapes, forward and backward: GFLOP/s or GB/s.
#[derive(Args)]
struct Kernels {
    /// Only kernels whose name contains this, as `attention` or `sgemm 2048`.
    #[arg(value_name = "FILTER", conflicts_with = "write_docs")]
    filter: Option<String>,
    #[command(flatten)]
    common: Common,
}

impl Kernels {
    fn run(&self) -> Result<()> {
        let mut kernels = kernels::all();
        let filter = self.filter.as_deref().unwrap_or_default();
        kernels.retain(|kernel| kernel.to_string().contains(filter));
        if kernels.is_empty() {
            let known = kernels::all().iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            return Err(Error::Unknown { kind: "kernel", name: filter.to_owned(), known });
        }
        let plain = [Contender::Naive, Contender::Matrixmultiply];
        let default: Vec<Contender> = plain.into_iter().chain([Contender::Firebox, Contender::TorchEager]).collect();
        let settings = self.common.settings(&default, 5);
        if let Some(&contender) = settings.contenders.iter().find(|contender| !contender.computes_kernels()) {
            return Err(Error::NoPart {
                contender,
                task: "single operations here",
                advice: "leave it out of --contenders",
            });
        }
        let report = kernels::run(&self.common.programs()?, kernels, &settings)?;
        println!("{}", report.markdown());
        self.common.save("kernels", &report)?;
        if self.common.write_docs {
            let software: Vec<&str> = report.software.iter().map(String::as_str).collect();
            let machine = report.machine.describe(report.threads, &software);
            docs::write_section("kernels", &format!("{}\n{machine}", report.markdown()))?;
        }
        Ok(())
    }
}

/// A step of each optimizer: time, bytes, share of a copy's bandwidth.
#[derive(Args)]
struct Optim {
    #[command(flatten)]
    common: Common,
}

impl Optim {
    fn run(&self) -> Result<()> {
        let takes_part = [Contender::Firebox, Contender::TorchEager, Contender::TorchForeach];
        let settings = self.common.settings(&takes_part, 5);
        if let Some(&contender) = settings.contenders.iter().find(|contender| !takes_part.contains(contender)) {
            return Err(Error::NoPart { contender, task: "optimizers here", advice: "leave it out of --contenders" });
        }
        let report = kernels::run(&self.common.programs()?, optim::cases(), &settings)?;
        let table = optim::markdown(&report)?;
        println!("{table}");
        self.common.save("optim", &report)?;
        if self.common.write_docs {
            let software: Vec<&str> = report.software.iter().map(String::as_str).collect();
            let machine = report.machine.describe(report.threads, &software);
            docs::write_section_of("optimizers.md", "optim", &format!("{table}\n{machine}"))?;
        }
        Ok(())
    }
}

/// Every optimizer on one recipe, each at the best of four learning rates: loss over tokens and over time.
#[derive(Args)]
struct Shootout {
    /// tinyshakespeare.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// The recipe: a built-in name or a TOML file. Its optimizer is replaced.
    #[arg(long, value_name = "RECIPE", default_value = "shakespeare-speedrun")]
    recipe: String,
    /// Run these optimizers alone, separated by commas; the others are as in the results of the last run.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    only: Vec<String>,
    /// The program `firebox`.
    #[arg(long, value_name = "PATH", env = "FIREBOX_BENCH_FIREBOX", hide_env_values = true)]
    firebox: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Shootout {
    fn run(&self) -> Result<()> {
        let settings = self.common.settings(&[Contender::Firebox], 1);
        if let Some(&contender) = settings.contenders.iter().find(|&&contender| contender != Contender::Firebox) {
            return Err(Error::NoPart { contender, task: "optimizers here", advice: "leave it out of --contenders" });
        }
        let before =
            if self.only.is_empty() { vec![] } else { self.common.last::<shootout::Report>("shootout")?.results };
        let report = shootout::run(shootout::Task {
            data: &self.data,
            recipe: &self.recipe,
            firebox: self.firebox.as_deref(),
            folder: self.common.path("shootout"),
            threads: settings.threads,
            quick: settings.quick,
            only: &self.only,
            before,
        })?;
        println!("{}", report.markdown());
        self.common.save("shootout", &report)?;
        let svg = report.plot()?;
        write(&self.common.path("shootout.svg"), &svg)?;
        if self.common.write_docs {
            let image = docs::write_plot("shootout", "Held-out loss over tokens and over seconds", &svg)?;
            let machine = report.machine.describe(report.threads, &[&format!("Firebox {}", env!("CARGO_PKG_VERSION"))]);
            let text = format!("{}\n{image}\n\n{machine}", report.markdown());
            docs::write_section_of("optimizers.md", "shootout", &text)?;
        }
        Ok(())
    }
}

/// The coordinate check: what a few steps change over the width, in the standard parametrization and in μP.
#[derive(Args)]
struct Mup {
    #[command(flatten)]
    common: Common,
}

impl Mup {
    fn run(&self) -> Result<()> {
        let settings = self.common.settings(&[Contender::Firebox], 1);
        if let Some(&contender) = settings.contenders.iter().find(|&&contender| contender != Contender::Firebox) {
            return Err(Error::NoPart {
                contender,
                task: "parametrization here",
                advice: "leave it out of --contenders",
            });
        }
        firebox_tensor::threads::init(settings.threads)?;
        let report = mup::run(settings.quick)?;
        println!("{}", report.markdown());
        self.common.save("mup", &report)?;
        let svg = report.plot()?;
        write(&self.common.path("mup.svg"), &svg)?;
        if self.common.write_docs {
            let image = docs::write_plot("mup", "What a few steps change, over the width", &svg)?;
            docs::write_section_of("optimizers.md", "mup", &format!("{}\n{image}", report.markdown()))?;
        }
        Ok(())
    }
}

/// Time and peak memory of a step over context, width and depth.
#[derive(Args)]
struct Scaling {
    /// What grows [default: all three].
    #[arg(value_enum, value_name = "AXIS")]
    axes: Vec<Axis>,
    #[command(flatten)]
    common: Common,
}

impl Scaling {
    fn run(&self) -> Result<()> {
        let settings = self.common.settings(&[Contender::Firebox, Contender::TorchEager], 3);
        all_train(&settings)?;
        let axes = if self.axes.is_empty() { Axis::value_variants() } else { &self.axes };
        for &axis in axes {
            let report = scaling::run(&self.common.programs()?, axis, &settings)?;
            println!("## {}\n\n{}", axis.name(), report.markdown());
            let svg = report.plot()?;
            self.common.save(&format!("scaling-{}", axis.name()), &report)?;
            write(&self.common.path(&format!("scaling-{}.svg", axis.name())), &svg)?;
            if let (true, Some((_, first))) = (self.common.write_docs, report.points.first()) {
                let title = format!("Time and peak memory of a training step over {}", axis.name());
                let image = docs::write_plot(axis.name(), &title, &svg)?;
                let machine = first.machine.describe(first.threads, &first.software());
                docs::write_section(axis.name(), &format!("{}\n{image}\n\n{machine}", report.markdown()))?;
            }
        }
        Ok(())
    }
}

/// From text to the same loss: nanoGPT's CPU recipe in PyTorch, and a recipe of Firebox, by the clock on the wall.
#[derive(Args)]
#[command(after_help = "The text is Karpathy's tinyshakespeare:
  https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt

A time is that of the whole process: start, text to tokens, training and its evaluations. Each round has another seed.")]
struct Speedrun {
    /// tinyshakespeare.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Firebox's recipe: a built-in name or a TOML file.
    #[arg(long, value_name = "RECIPE", default_value = "shakespeare-speedrun")]
    recipe: String,
    /// The program `firebox`.
    #[arg(long, value_name = "PATH", env = "FIREBOX_BENCH_FIREBOX", hide_env_values = true)]
    firebox: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Speedrun {
    fn run(&self) -> Result<()> {
        let settings = self.common.settings(&[Contender::Firebox, Contender::TorchEager], 1);
        all_train(&settings)?;
        if let Some(&contender) =
            settings.contenders.iter().find(|contender| !contender.is_torch() && **contender != Contender::Firebox)
        {
            return Err(Error::NoPart { contender, task: "whole run here", advice: "leave it out of --contenders" });
        }
        let firebox: Option<&Path> = self.firebox.as_deref();
        let task = speedrun::Task { data: &self.data, recipe: &self.recipe, firebox, quick: settings.quick };
        let report = speedrun::run(&self.common.programs()?, &task, &settings)?;
        println!("{}", report.markdown());
        self.common.save("speedrun", &report)?;
        if self.common.write_docs {
            let software: Vec<&str> = report.results.iter().map(|outcome| outcome.software.as_str()).collect();
            let machine = report.machine.describe(report.threads, &software);
            docs::write_section("speedrun", &format!("{}\n{machine}", report.markdown()))?;
        }
        Ok(())
    }
}

/// Compressed models beside the same ones in f32: what each method costs in quality, or, with --speed, how fast they are.
#[derive(Args)]
struct Compress {
    /// Tokens per second and memory instead, of a random model that does not fit the caches.
    #[arg(long)]
    speed: bool,
    /// Text that the model was or is trained on, and judged by: file, folder or glob; may be given several times.
    #[arg(long, value_name = "PATH", required_unless_present = "speed")]
    data: Vec<String>,
    /// A trained model of 6 layers [default: one of 11M parameters is trained first, in half an hour].
    #[arg(long, value_name = "RUN", conflicts_with = "speed")]
    model: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl Compress {
    fn run(&self) -> Result<()> {
        let settings = self.common.settings(&[Contender::Firebox], 5);
        let software = [format!("Firebox {}", env!("CARGO_PKG_VERSION"))];
        let software: Vec<&str> = software.iter().map(String::as_str).collect();
        if self.speed {
            let own = self.common.programs()?.own;
            let folder = self.common.path("compress-models");
            let report = compress::speed(&own, &folder, settings.threads, settings.rounds, settings.quick)?;
            println!("{}", report.markdown());
            if self.common.write_docs {
                let machine = report.machine.describe(report.threads, &software);
                docs::write_section_of(
                    "compression.md",
                    "compress-speed",
                    &format!("{}\n{machine}", report.markdown()),
                )?;
            }
            return self.common.save("compress-speed", &report);
        }
        firebox_tensor::threads::init(settings.threads)?;
        let folder = self.common.path("compress-quality");
        let report = quality::run(self.model.as_deref(), &self.data, &folder, settings.quick)?;
        println!("{}", report.markdown());
        if self.common.write_docs {
            let picture = docs::write_plot("compress", "perplexity by size", &report.picture()?)?;
            let machine = Machine::here().describe(settings.threads, &software);
            docs::write_section_of(
                "compression.md",
                "compress",
                &format!("{}\n{picture}\n\n{machine}", report.markdown()),
            )?;
        }
        self.common.save("compress", &report)
    }
}

/// Does what the command line says.
///
/// # Errors
/// [`Error`]: what went wrong, and what to do.
pub fn run() -> Result<()> {
    let command = Cli::parse().command;
    if !matches!(command, Command::Worker { .. } | Command::SpeedOf { .. }) {
        worker::handle_interrupts();
    }
    match command {
        Command::Worker { job } => work(&job),
        Command::Train(train) => train.run(),
        Command::Finetune(finetune) => finetune.run(),
        Command::Kernels(kernels) => kernels.run(),
        Command::Scaling(scaling) => scaling.run(),
        Command::Speedrun(speedrun) => speedrun.run(),
        Command::Optim(optim) => optim.run(),
        Command::Shootout(shootout) => shootout.run(),
        Command::Mup(mup) => mup.run(),
        Command::Compress(compress) => compress.run(),
        Command::SpeedOf { model, threads, tokens } => compress::speed_of(&model, threads, tokens),
    }
}

/// The process of a contender.
fn work(job: &str) -> Result<()> {
    let Job { contender, threads, task } =
        serde_json::from_str(job).map_err(|source| Error::Json { what: "the job", source })?;
    // Like `firebox` itself. burn's own operations hand their work to a pool beside the calling thread.
    if matches!(task, Task::Peak) || contender.runtime() == Runtime::Own {
        firebox_tensor::threads::init(threads)?;
    }
    match (contender, task) {
        (
            contender @ (Contender::Firebox
            | Contender::FireboxRecompute
            | Contender::FireboxLean
            | Contender::FireboxBf16),
            Task::Train(training),
        ) => step::work(contender, &training),
        (contender, Task::Train(training)) => burn_training(contender, &training),
        (_, Task::Peak) => peak::work(),
        (contender, Task::Kernels(kernels)) => kernel_calls::work(contender, &kernels),
    }
}

#[cfg(feature = "baseline")]
fn burn_training(contender: Contender, training: &Training) -> Result<()> {
    crate::baseline::work(contender, training)
}

#[cfg(not(feature = "baseline"))]
fn burn_training(contender: Contender, _: &Training) -> Result<()> {
    let advice = "start the benchmark by `cargo xtask bench`, which builds what it needs";
    Err(Error::NoPart { contender, task: "models of burn's own modules in this build", advice })
}
