//! `firebox import`: a model that others trained.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use firebox::train::checkpoint::Dtype;
use firebox::train::export::Exported;
use firebox::train::import::import;

use super::CliError;

#[derive(Args)]
pub struct ImportArgs {
    /// A folder with Hugging Face's config.json and model.safetensors (or shards and their index), a .gguf file, or hf:OWNER/NAME on the Hugging Face hub.
    source: String,
    /// The folder to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How tensors are stored; as they are, if not given. (GGUF's blocks of integers become f32.)
    #[arg(long)]
    dtype: Option<Stored>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    F16,
    Bf16,
}

pub fn run(args: ImportArgs) -> Result<(), CliError> {
    let dtype = args.dtype.map(|dtype| match dtype {
        Stored::F32 => Dtype::F32,
        Stored::F16 => Dtype::F16,
        Stored::Bf16 => Dtype::BF16,
    });
    let Exported { path, bytes, .. } = import(&args.source, dtype, &args.out)?;
    println!("{}: {:.1} MB", path.display(), bytes as f64 / 1e6);
    Ok(())
}
