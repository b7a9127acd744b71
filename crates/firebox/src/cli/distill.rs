//! `firebox distill`.

use std::path::{Path, PathBuf};

use clap::Args;
use firebox::train::TrainError;
use firebox::train::checkpoint::resolve;

use super::CliError;
use super::train::{self, TrainArgs};

/// Examples:
///   firebox distill runs/teacher --depth 4 --data input.txt      a student of its own shape
///   firebox distill runs/teacher my.toml --set distill.alpha=0.1 your recipe, with its [distill]
///   firebox distill runs/teacher runs/teacher/recipe.toml --set model.n_layers=3 --set distill.init=teacher
///                                                                half the layers, from the teacher's own
///   firebox distill runs/teacher --resume --out runs/student     go on where it stopped
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct DistillArgs {
    /// The model that teaches: a run, a checkpoint, or a folder in Hugging Face's form. The text is cut into its tokens.
    teacher: PathBuf,
    /// Keep the K most probable tokens of each of the teacher's predictions in a file in the run's folder, made before the first step: distill.cache_top_k.
    #[arg(long, value_name = "K")]
    cache_logits: Option<u32>,
    #[command(flatten)]
    train: TrainArgs,
}

pub fn run(args: DistillArgs, threads: usize) -> Result<(), CliError> {
    // From wherever the run goes on.
    let teacher = std::path::absolute(&args.teacher).map_err(|source| TrainError::Io {
        operation: "find",
        path: args.teacher.clone(),
        source,
    })?;
    let (teacher, tokenizer) = fixed(&teacher)?;
    let mut set = vec![format!("distill.teacher={:?}", teacher.display().to_string())];
    set.extend(tokenizer.map(|path| format!("data.tokenizer={:?}", path.display().to_string())));
    set.extend(args.cache_logits.map(|k| format!("distill.cache_top_k={k}")));
    train::run(args.train.with_defaults(set), threads)
}

/// The teacher's checkpoint and tokenizer. Of a run it is the last checkpoint now, and the same one after a resume.
fn fixed(teacher: &Path) -> Result<(PathBuf, Option<PathBuf>), CliError> {
    let plain = teacher.join("config.json").is_file() && !teacher.join("manifest.json").is_file();
    if plain {
        let tokenizer = teacher.join("tokenizer.json");
        return Ok((teacher.to_path_buf(), tokenizer.is_file().then_some(tokenizer)));
    }
    let checkpoint = resolve(teacher)?.checkpoint;
    let tokenizer = checkpoint.contains("tokenizer.json").then(|| checkpoint.file("tokenizer.json")).transpose()?;
    Ok((checkpoint.path().to_path_buf(), tokenizer))
}
