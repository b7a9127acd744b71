//! `firebox finetune`.

use std::path::PathBuf;

use clap::Args;
use firebox::train::TrainError;

use super::CliError;
use super::train::{self, TrainArgs};

/// Examples:
///   firebox finetune --from smollm2 --data book.txt              the next token of other text
///   firebox finetune --from minilm --task classes --data mail.jsonl
///                                                                a class per row: accuracy, F1
///   firebox finetune --from minilm --task embedding --data pairs.jsonl
///                                                                vectors of texts that belong together
///   firebox finetune --from smollm2 --task chat --data tasks.jsonl --set data.val_fraction=0.1
///                                                                answers in conversations
///   firebox finetune --from tuned --task preference --data pairs.jsonl --set optimizer.lr=1e-6
///                                                                better answers over worse ones
///   firebox finetune --from smollm2 --data book.txt --lora 8     the same with adapters alone
///   firebox finetune --from smollm2 --data book.txt --qlora 16 --targets all
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct FinetuneArgs {
    /// The model to start from: a run, a checkpoint, a folder in Hugging Face's form, or, for answers and preferences, a .gguf file.
    #[arg(long, value_name = "MODEL")]
    from: PathBuf,
    /// What it is trained for, in place of the recipe's task: task.kind.
    #[arg(long, value_name = "KIND")]
    task: Option<String>,
    /// Train adapters of this rank (LoRA) in place of the model: adapter.rank.
    #[arg(long, value_name = "RANK", conflicts_with_all = ["dora", "qlora"])]
    lora: Option<usize>,
    /// The same with DoRA: adapter.kind = "dora".
    #[arg(long, value_name = "RANK", conflicts_with = "qlora")]
    dora: Option<usize>,
    /// LoRA on a model in 4 bits (QLoRA): adapter.base = "nf4".
    #[arg(long, value_name = "RANK")]
    qlora: Option<usize>,
    /// Layers that have adapters, such as q_proj,v_proj; or all: adapter.targets.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    targets: Vec<String>,
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
    for (rank, kind, base) in [(args.lora, "lora", "f32"), (args.dora, "dora", "f32"), (args.qlora, "lora", "nf4")] {
        let Some(rank) = rank else { continue };
        set.extend([
            format!("adapter.kind={kind:?}"),
            format!("adapter.rank={rank}"),
            format!("adapter.base={base:?}"),
        ]);
    }
    if !args.targets.is_empty() {
        set.push(format!("adapter.targets={:?}", args.targets));
    }
    set.extend(args.task.map(|kind| format!("task.kind={kind:?}")));
    train::run(args.train.with_defaults(set).with_default_recipe("finetune"), threads)
}
