//! What a model with a head for classes, numbers or vectors is worth on rows with labels.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebox_data::read_records;
use firebox_models::transformer::Head;
use firebox_models::transformer::hf::parse_config;
use serde_json::Value;

use super::{Evaluation, Tally, tallies};
use crate::TrainError;
use crate::checkpoint::resolve;
use crate::model_io::{Folder, from_file};
use crate::recipe::{ModelRecipe, Recipe};
use crate::task::labelled::Records;
use crate::task::{Labelled, Task, TaskRecipe};

/// What an evaluation on rows found.
#[derive(Debug, Clone, PartialEq)]
pub struct OfRows {
    /// The task's kind, as in recipes.
    pub task: &'static str,
    /// How many rows there were.
    pub rows: usize,
    /// The loss, a mean over rows, or, of classes of words, over words.
    pub evaluation: Evaluation,
    /// What the task measures besides, by name.
    pub metrics: Vec<(String, f64)>,
}

/// What follows a model's last block, of anything that [`load`](crate::model_io::load) opens.
///
/// # Errors
/// As it gives.
pub fn head_of(path: &Path) -> Result<Head, TrainError> {
    Ok(parse_config(&Folder::open(path)?.config)?.1.head)
}

/// Evaluates a checkpoint on all rows of `data`. Which fields hold what says the recipe of the run of which it is a checkpoint, if it is one, and after that `set`: overrides such as
/// `task.text=sentence`. `rows` go through the model at once.
///
/// # Errors
/// [`TrainError`]: a model without such a head, rows that do not fit it, of which the first is named.
pub fn on_rows(
    path: &Path,
    data: &[String],
    set: &[String],
    rows: usize,
    device: &Device,
) -> Result<OfRows, TrainError> {
    let folder = Folder::open(path)?;
    let (_, config) = parse_config(&folder.config)?;
    let Some(kind) = kind_of(&config.head) else {
        let expected = "a model with a head for classes, token classes, values or embeddings".into();
        return Err(TrainError::Input { what: "checkpoint", expected, got: format!("one with {:?}", config.head) });
    };
    let Some(tokenizer) = folder.tokenizer else {
        let expected = "a tokenizer.json beside the model".into();
        return Err(TrainError::Input { what: "checkpoint", expected, got: format!("none in {}", path.display()) });
    };
    let text = match recipe_of(path) {
        Some(recipe) if named(&recipe.task) == kind => recipe.to_toml(),
        _ => format!("name = \"eval\"\n[task]\nkind = \"{kind}\"\n"),
    };
    let mut recipe = Recipe::parse("eval", &text, set)?;
    recipe.init = None;
    recipe.model = ModelRecipe::exactly(&config);
    recipe.train.micro_batch_rows = rows;
    let given = named(&recipe.task);
    match (&mut recipe.task, config.head) {
        (TaskRecipe::Classes(task), Head::Classes { n, pooler }) => {
            task.labels = names(&folder.config, n);
            task.pooler = Some(pooler);
        }
        (TaskRecipe::TokenClasses(task), Head::TokenClasses { n }) => task.labels = names(&folder.config, n),
        (TaskRecipe::Values(task), Head::Values { pooler, .. }) => task.pooler = Some(pooler),
        (TaskRecipe::Embedding(task), Head::Embedding { pool, normalize, temperature }) => {
            (task.pool, task.normalize, task.temperature) = (Some(pool), Some(normalize), temperature);
        }
        _ => {
            let expected = format!("{kind}, which the checkpoint's head is for");
            return Err(TrainError::Input { what: "task.kind", expected, got: given });
        }
    }
    let held_out = read_records(data)?;
    let count = held_out.len();
    // Nothing is trained, but how many numbers a row has is read from the rows to train on.
    let records = Records { train: held_out[..1].to_vec(), held_out };
    let task = Labelled::new(&recipe, &records, tokenizer)?;
    if task.head() != config.head {
        let (expected, got) = (format!("rows for {:?}", config.head), format!("rows for {:?}", task.head()));
        return Err(TrainError::Input { what: "rows", expected, got });
    }
    let model = from_file(&folder.config, folder.file, device)?;
    let evaluation = Tally::evaluation(&tallies(&model, task.held_out(rows), |batch| batch));
    Ok(OfRows { task: kind, rows: count, evaluation, metrics: task.metrics(&model, None)? })
}

/// The task that a head is for, as recipes call it.
fn kind_of(head: &Head) -> Option<&'static str> {
    match head {
        Head::Classes { .. } => Some("classes"),
        Head::TokenClasses { .. } => Some("token_classes"),
        Head::Values { .. } => Some("values"),
        Head::Embedding { .. } => Some("embedding"),
        _ => None,
    }
}

/// The `kind` of a recipe's task.
fn named(task: &TaskRecipe) -> String {
    serde_json::to_value(task).ok().and_then(|task| Some(task["kind"].as_str()?.to_owned())).unwrap_or_default()
}

/// The recipe of the run of which this is a checkpoint, if it is one.
fn recipe_of(path: &Path) -> Option<Recipe> {
    let checkpoint = resolve(path).ok()?.checkpoint.path().to_path_buf();
    let run: PathBuf = checkpoint.parent()?.parent()?.to_path_buf();
    Recipe::load(run.join("recipe.toml").to_str()?, &[]).ok()
}

/// The names of the classes in a `config.json`, as transformers writes them; numbers, where there are none.
fn names(config: &Value, n: usize) -> Vec<String> {
    let of = &config["id2label"];
    let name = |i: usize| Some(of.get(i.to_string())?.as_str()?.to_owned());
    (0..n).map(name).collect::<Option<Vec<String>>>().unwrap_or_else(|| (0..n).map(|i| format!("LABEL_{i}")).collect())
}
