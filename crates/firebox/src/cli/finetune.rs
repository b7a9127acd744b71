//! `firebox finetune`.

use std::path::PathBuf;

use clap::Args;
use firebox::train::TrainError;

use super::CliError;
use super::train::{self, TrainArgs};

/// Examples:
///   firebox finetune --from smollm2 --data book.txt              the next token of other text
///   firebox finetune --from smollm2 --task chat --data tasks.jsonl --set data.val_fraction=0.1
///                                                                answers in conversations
///   firebox finetune --from tuned --task preference --data pairs.jsonl --set optimizer.lr=1e-6
///                                                                better answers over worse ones
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct FinetuneArgs {
    /// The model to start from: a run, a checkpoint, a folder in Hugging Face's form, or a .gguf file.
    #[arg(long, value_name = "MODEL")]
    from: PathBuf,
    /// What it is trained for, in place of the recipe's task: task.kind.
    #[arg(long, value_name = "KIND")]
    task: Option<String>,
    #[command(flatten)]
    train: TrainArgs,
}

pub fn run(args: FinetuneArgs, threads: usize) -> Result<(), CliError> {
    // From wherever the run goes on.
    let from = std::path::absolute(&args.from).map_err(|source| TrainError::Io {
        operation: "find",
        path: args.from.clone(),
        source,
    })?;
    let mut set = vec![format!("init={:?}", from.display().to_string())];
    set.extend(args.task.map(|kind| format!("task.kind={kind:?}")));
    train::run(args.train.with_defaults(set).with_default_recipe("finetune"), threads)
}
