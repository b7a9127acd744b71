//! Flags, and one library call per command.

mod chat;
mod compress;
mod distill;
mod eval;
mod export;
mod finetune;
mod import;
mod job;
mod launch;
mod lr_find;
mod prepare;
mod ranks;
mod tasks;
mod text;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use firebox::corpus::CorpusError;
use firebox::tensor::device::{Backend, DeviceError};
use firebox::train::TrainError;
use firebox::train::checkpoint::CheckpointError;
use firebox::train::observe::ObserveError;

/// Trains transformer language models from raw text, on one machine, without Python.
///
/// Start with `firebox train`: it trains a small model on Rust source and says where the report is.
#[derive(Parser)]
#[command(name = "firebox", version, arg_required_else_help = true)]
struct Cli {
    /// Compute threads; one per core if not given, of a process of MPI its share of them.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model: raw text in, checkpoints, samples and a report out.
    Train(train::TrainArgs),
    /// Train a model on from what others trained: on other text, answers, labels, preferences, images.
    Finetune(finetune::FinetuneArgs),
    /// Train a student: a model that learns from another one's predictions besides the text.
    Distill(distill::DistillArgs),
    /// Make a trained model smaller: prune, quantize, distill, share, export, step by step, with a report.
    Compress(compress::CompressArgs),
    /// Find the range of useful learning rates: a short run whose rate grows until the loss does.
    LrFind(lr_find::LrFindArgs),
    /// List or show the built-in recipes.
    #[command(subcommand)]
    Recipe(RecipeCommand),
    /// Make token shards and a tokenizer from text, as `train` does before its first step.
    Tokenize(prepare::TokenizeArgs),
    /// How well a checkpoint does: loss and bits per byte of text, right answers among several.
    Eval(eval::EvalArgs),
    /// Continue a prompt.
    Generate(text::GenerateArgs),
    /// Talk with a model in the terminal.
    Chat(chat::ChatArgs),
    /// Write the logits of given tokens to a safetensors file (all positions, f32, tensor `logits`), to compare with other implementations.
    Logits(text::LogitsArgs),
    /// Make a folder of a model that others trained: of Hugging Face's folders, GGUF files, and the hub's repositories.
    Import(import::ImportArgs),
    /// Write a model for transformers, llama.cpp or ONNX Runtime.
    Export(export::ExportArgs),
    /// Make report.html of a run again.
    Report {
        /// The run's folder.
        run: PathBuf,
    },
}

#[derive(Subcommand)]
enum RecipeCommand {
    /// Names of the built-in recipes.
    List,
    /// A recipe with every value, as TOML: a start for your own.
    Show {
        /// Built-in name or TOML file.
        name: String,
    },
}

/// Where a model runs.
#[derive(Args)]
struct DeviceArgs {
    /// Backend: ndarray, flex, wgpu, vulkan, metal, webgpu, cuda or rocm, as far as this build has it.
    #[arg(long, default_value = "ndarray")]
    backend: Backend,
}

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    #[error("{0}")]
    Output(#[source] std::io::Error),
    #[error(transparent)]
    Threads(#[from] firebox::tensor::threads::ThreadsError),
    /// A program that should have the ranks.
    #[error("cannot start {0}: {1}; install it (Debian: openmpi-bin), or train with --ranks")]
    Launch(String, #[source] std::io::Error),
    /// A rank that failed, and how.
    #[error("{0}; go on with --resume")]
    Ranks(String),
}

impl From<CheckpointError> for CliError {
    fn from(error: CheckpointError) -> Self {
        Self::Train(error.into())
    }
}

impl From<ObserveError> for CliError {
    fn from(error: ObserveError) -> Self {
        Self::Train(error.into())
    }
}

impl From<firebox::data::DataError> for CliError {
    fn from(error: firebox::data::DataError) -> Self {
        Self::Train(error.into())
    }
}

impl From<firebox::train::recipe::RecipeError> for CliError {
    fn from(error: firebox::train::recipe::RecipeError) -> Self {
        Self::Train(error.into())
    }
}

impl CliError {
    /// 2 for what the user can mend by another input, 1 for the rest.
    fn exit_code(&self) -> u8 {
        match self {
            CliError::Train(error) if !error.is_input() => 1,
            CliError::Output(_) | CliError::Threads(_) | CliError::Ranks(_) => 1,
            _ => 2,
        }
    }
}

/// Parses, runs, and turns errors into one line and an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if is_mistake(&error) => {
            eprintln!("{}", one_line(&error));
            return ExitCode::from(2);
        }
        // Help and version.
        Err(help) => help.exit(),
    };
    let threads = cli.threads.map_or_else(ranks::default_threads, usize::from);
    if let Err(error) = firebox::tensor::threads::init(threads) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let result = match cli.command {
        Command::Train(args) => train::run(args, rayon::current_num_threads()),
        Command::Finetune(args) => finetune::run(args, rayon::current_num_threads()),
        Command::Distill(args) => distill::run(args, rayon::current_num_threads()),
        Command::Compress(args) => compress::run(args),
        Command::LrFind(args) => lr_find::run(args),
        Command::Recipe(RecipeCommand::List) => train::list(),
        Command::Recipe(RecipeCommand::Show { name }) => train::show(&name),
        Command::Tokenize(args) => prepare::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => text::generate(args),
        Command::Chat(args) => chat::run(args),
        Command::Logits(args) => text::logits(args),
        Command::Import(args) => import::run(args),
        Command::Export(args) => export::run(args),
        Command::Report { run } => firebox::train::observe::report::write(&run)
            .map(|path| println!("report: {}", path.display()))
            .map_err(CliError::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.to_string().replace('\n', " "));
            ExitCode::from(error.exit_code())
        }
    }
}

fn is_mistake(error: &clap::Error) -> bool {
    error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
}

/// What clap says in paragraphs, without the usage.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let said = text.split("\n\n").filter(|part| !part.starts_with("Usage:") && !part.starts_with("For more"));
    let said: Vec<String> = said.map(|part| part.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    format!("{}; see --help", said.join("; "))
}
