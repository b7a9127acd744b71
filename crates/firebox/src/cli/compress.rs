//! `firebox compress`: a smaller model, step by step.

use std::path::PathBuf;

use clap::Args;
use firebox::train::TrainError;
use firebox::train::compress::pipeline::{Pipeline, Progress, Row};
use firebox::train::compress::recipe::CompressRecipe;
use firebox::train::model_io::load;
use indicatif::{ProgressBar, ProgressStyle};

use super::prepare::DataArgs;
use super::train::interrupt;
use super::{CliError, DeviceArgs};

/// Examples:
///   firebox compress runs/default --recipe compress.toml --data 'books/*.txt' --out runs/small
///   firebox compress runs/default --recipe int4 --data input.txt          a built-in recipe
///
/// A recipe is a list of steps:
///   [[steps]]
///   kind = "prune"
///   method = "wanda"
///   sparsity = "2:4"
///   [[steps]]
///   kind = "quantize"
///   format = "int4"
///   method = "gptq"
///
/// The same command again goes on where it was stopped.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct CompressArgs {
    /// Run, checkpoint, or folder with Hugging Face's config.json and model.safetensors.
    checkpoint: PathBuf,
    /// Built-in name or TOML file.
    #[arg(long, value_name = "RECIPE")]
    recipe: String,
    #[command(flatten)]
    data: DataArgs,
    /// Folder of the pipeline: a folder for each step, results.json and report.html. Default: runs/NAME-compressed.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Value of the recipe, such as calibration.rows=64; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: CompressArgs) -> Result<(), CliError> {
    let mut recipe = CompressRecipe::load(&args.recipe, &args.set)?;
    let device = args.device.backend.device()?;
    let Some(tokenizer) = load(&args.checkpoint, &device)?.tokenizer else {
        let expected = "a tokenizer.json beside the model".into();
        let got = format!("none in {}", args.checkpoint.display());
        return Err(TrainError::Input { what: "checkpoint", expected, got }.into());
    };
    let out = args.out.unwrap_or_else(|| {
        let name =
            args.checkpoint.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
        PathBuf::from("runs").join(format!("{name}-compressed"))
    });
    std::fs::create_dir_all(&out).map_err(|source| TrainError::Io {
        operation: "create",
        path: out.clone(),
        source,
    })?;
    let path = out.join("tokenizer.json");
    tokenizer.save(&path)?;
    recipe.data.tokenizer = path.display().to_string();
    let (dataset, described) = args.data.dataset(&recipe.data, &[])?;
    println!("{described}\n{}", dataset.stats);
    if dataset.val.is_empty() {
        let expected = "held-out text, by which the models are compared".into();
        return Err(TrainError::Input { what: "data", expected, got: "none: set data.val_fraction".into() }.into());
    }
    let pipeline = Pipeline::open(recipe, &args.checkpoint, &out, &dataset, &device)?;
    let interrupt = interrupt();
    let bar = ProgressBar::no_length();
    bar.set_style(
        ProgressStyle::with_template("{spinner} {msg} {bar:30} {pos}/{len} stages, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    println!("\n{}", header());
    let rows = pipeline.run(
        &mut |progress| match progress {
            Progress::Begun { name, .. } => {
                bar.reset();
                bar.set_message(name.to_owned());
                bar.tick();
            }
            Progress::Stage { done, of } => {
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            }
            Progress::Done { row, .. } => bar.suspend(|| println!("{}", line(row))),
        },
        &interrupt,
    )?;
    bar.finish_and_clear();
    println!("\nreport:  {}", out.join("report.html").display());
    if let Some(last) = rows.last() {
        println!("model:   {}", pipeline.folder(last).display());
    }
    Ok(())
}

fn header() -> String {
    format!(
        "{:<28} {:>9} {:>8} {:>7} {:>11} {:>9} {:>9}",
        "step", "MB", "bits/w", "zeros", "perplexity", "bits/byte", "tokens/s"
    )
}

fn line(row: &Row) -> String {
    let m = &row.measured;
    format!(
        "{:<28} {:>9.2} {:>8.2} {:>6.1}% {:>11.4} {:>9.4} {:>9.0}",
        row.name,
        m.bytes as f64 / 1e6,
        m.bits_per_weight,
        100.0 * m.sparsity,
        m.perplexity,
        m.bpb,
        m.tokens_per_s
    )
}
