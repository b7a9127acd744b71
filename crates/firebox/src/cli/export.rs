//! `firebox export`: a model for other programs.

use std::path::PathBuf;

use clap::Args;
use firebox::train::export::{Exported, Target, export};

use super::CliError;

#[derive(Args)]
pub struct ExportArgs {
    /// Run, checkpoint, folder with config.json and model.safetensors, or .gguf file.
    checkpoint: PathBuf,
    /// hf (a folder for transformers), gguf (a file for llama.cpp) or onnx (a folder for ONNX Runtime).
    #[arg(long)]
    format: String,
    /// How weights are stored. hf: f32 (default), f16, bf16, same (each tensor as it is stored). gguf: f16 (default), f32, bf16, q8_0, q6_k, q5_1, q5_0, q4_1, q4_0, q4_k. onnx: f32 (default), int8.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The file or folder to write; it must not exist.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

pub fn run(args: ExportArgs) -> Result<(), CliError> {
    let target = Target::named(&args.format, args.kind.as_deref())?;
    let Exported { path, bytes, fallbacks } = export(&args.checkpoint, target, &args.out)?;
    println!("{}: {:.1} MB", path.display(), bytes as f64 / 1e6);
    if let Some((name, format)) = fallbacks.first() {
        let n = fallbacks.len();
        println!(
            "{n} tensors have rows that are no whole blocks of this type, and are larger, as llama.cpp makes them: {name} is {}",
            format.name().to_ascii_lowercase()
        );
    }
    Ok(())
}
