//! What commands do for each task: read its data, and make its trainer on every rank.

use burn::tensor::Device;
use firebox::data::{Dataset, Tokenizer};
use firebox::models::transformer::Transformer;
use firebox::train::Trainer;
use firebox::train::observe::Summary;
use firebox::train::task::labelled::{ClassesRecipe, EmbeddingRecipe, Records, TokenClassesRecipe, ValuesRecipe};
use firebox::train::task::{Conversations, Hidden, Labelled, Preferences, Task, TaskRecipe};

use super::job::{Job, Start};
use super::prepare::DataArgs;
use super::ranks::{RankArgs, speaks};
use super::{CliError, draw, images};

/// Reads the data of the recipe's task, and trains.
pub fn run(mut job: Job, data: &DataArgs, ranks: RankArgs) -> Result<Summary, CliError> {
    match job.recipe.task.clone() {
        TaskRecipe::Language => {
            let (dataset, described) = data.dataset(&job.recipe.data, &job.recipe.sources)?;
            if speaks() {
                println!("{}", dataset.stats);
            }
            job.described = described;
            job.run(ranks, OfText(dataset))
        }
        TaskRecipe::Masked(_) | TaskRecipe::Spans(_) => {
            let (dataset, described) = data.dataset(&job.recipe.data, &job.recipe.sources)?;
            if speaks() {
                println!("{}", dataset.stats);
            }
            let task = Hidden::new(&job.recipe, dataset)?;
            job.recipe.model.head = Some(task.head());
            job.recipe.model.labels.clear();
            job.described = described;
            job.run(ranks, OnTransformer(task))
        }
        TaskRecipe::Classes(ClassesRecipe { val, .. })
        | TaskRecipe::TokenClasses(TokenClassesRecipe { val, .. })
        | TaskRecipe::Values(ValuesRecipe { val, .. })
        | TaskRecipe::Embedding(EmbeddingRecipe { val, .. }) => {
            let paths = data.paths(&job.recipe.sources)?;
            let records = Records::read(&paths, val.as_deref(), job.recipe.data.val_fraction)?;
            let tokenizer = tokenizer(&job, || records.texts())?;
            let task = Labelled::new(&job.recipe, &records, tokenizer)?;
            job.recipe.model.head = Some(task.head());
            job.recipe.model.labels = task.labels();
            job.described = format!("{}: {task}", paths.join(", "));
            job.run(ranks, OnTransformer(task))
        }
        TaskRecipe::Chat(task) => {
            let paths = data.paths(&job.recipe.sources)?;
            let (conversations, read) = Conversations::read(&job.recipe, &task, &paths)?;
            if speaks() {
                println!("{read}");
            }
            job.described = read.to_string();
            job.run(ranks, OnTransformer(conversations))
        }
        TaskRecipe::Preference(task) => {
            let paths = data.paths(&job.recipe.sources)?;
            let (preferences, read) = Preferences::read(&job.recipe, &task, &paths)?;
            if speaks() {
                println!("{read}");
            }
            job.described = read.to_string();
            let preferences = preferences.with_reference(&job.recipe, &job.dir, &job.backend.device()?)?;
            job.run(ranks, OnTransformer(preferences))
        }
        TaskRecipe::ImageClasses(task) => images::classes(job, &task, data, ranks),
        TaskRecipe::ImageText(task) => images::text(job, &task, data, ranks),
        TaskRecipe::ImageTokens(task) => draw::image_tokens(job, data, ranks, &task),
        TaskRecipe::MaskedImage(task) => draw::masked_image(job, data, ranks, &task),
        TaskRecipe::TextToImage(task) => draw::text_to_image(job, data, ranks, &task),
    }
}

/// The tokenizer of a task on rows: that of the checkpoint, or else what the recipe says, made from `texts` where it is to be trained.
pub fn tokenizer(job: &Job, texts: impl FnOnce() -> Vec<String>) -> Result<Tokenizer, CliError> {
    if let Some(checkpoint) = job.found.as_ref().filter(|found| found.contains("tokenizer.json")) {
        return Ok(Tokenizer::load(checkpoint.file("tokenizer.json")?)?);
    }
    let config = &job.recipe.data;
    Ok(match config.tokenizer.as_str() {
        // Its first token stands for the row.
        "bpe" if job.recipe.model.encoder.is_some() => {
            Tokenizer::train_bpe(&texts(), config.vocab_size)?.with_mask_tokens()?
        }
        "bpe" => Tokenizer::train_bpe(&texts(), config.vocab_size)?,
        "char" => Tokenizer::from_chars_of(texts().join("\n").as_bytes())?,
        path => Tokenizer::load(path)?,
    })
}

/// Language modelling.
pub struct OfText(pub Dataset);

impl Start for OfText {
    type Model = Transformer;

    fn trainer<'a>(&'a self, job: &Job, device: &Device) -> Result<Trainer<'a, Self::Model>, CliError> {
        let (recipe, dir) = (job.recipe.clone(), job.dir.as_path());
        Ok(match &job.found {
            Some(checkpoint) => Trainer::open(recipe, dir, &self.0, device, checkpoint)?,
            None => {
                let init = recipe.initial_model(device)?;
                Trainer::new(recipe, dir, &self.0, device, init)?
            }
        })
    }
}

/// A task on one transformer, which has the recipe's shape: that of its `init`, with the recipe's head, where it starts from a model.
pub struct OnTransformer<T>(pub T);

impl<T: Task<Transformer> + Clone + 'static> Start for OnTransformer<T> {
    type Model = Transformer;

    fn trainer<'a>(&'a self, job: &Job, device: &Device) -> Result<Trainer<'a, Transformer>, CliError> {
        let (recipe, dir, task) = (job.recipe.clone(), job.dir.as_path(), Box::new(self.0.clone()));
        let tokens = self.0.tokenizer().map_or(1, |tokenizer| tokenizer.vocab_size());
        let model = recipe.first_model(tokens, device)?;
        Ok(match &job.found {
            Some(checkpoint) => Trainer::open_task(recipe, dir, task, device, model, checkpoint)?,
            None => Trainer::of_task(recipe, dir, task, device, model)?,
        })
    }
}
