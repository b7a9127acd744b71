//! `firebox merge`: adapters into the weights of their model.

use std::path::PathBuf;

use clap::Args;
use firebox::train::export::Exported;
use firebox::train::merge_adapters;

use super::CliError;

/// Examples:
///   firebox merge runs/lora --out merged                    what a run with adapters has trained, as a plain model
///   firebox merge peft-folder --base smollm2 --out merged   adapters that PEFT made
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct MergeArgs {
    /// A run or checkpoint with adapters, or a folder of PEFT (adapter_config.json and adapter_model.safetensors).
    adapters: PathBuf,
    /// The model of a folder of PEFT, in place of the one that its adapter_config.json names.
    #[arg(long, value_name = "MODEL")]
    base: Option<PathBuf>,
    /// The folder to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: MergeArgs) -> Result<(), CliError> {
    let Exported { path, bytes, .. } = merge_adapters(&args.adapters, args.base.as_deref(), &args.out)?;
    println!("{}: {:.1} MB", path.display(), bytes as f64 / 1e6);
    Ok(())
}
