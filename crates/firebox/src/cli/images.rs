//! Tasks on images: what is read, and the model that is trained.

use burn::tensor::Device;
use firebox::data::images::Preprocess;
use firebox::models::clip::{Clip, ClipConfig};
use firebox::models::transformer::ImageConfig;
use firebox::train::observe::Summary;
use firebox::train::task::images::{ImageClasses, ImageClassesRecipe, ImageText, ImageTextRecipe, Images};
use firebox::train::task::load_clip;
use firebox::train::{Recipe, TrainError, Trainer};

use super::CliError;
use super::job::{Job, Start};
use super::prepare::DataArgs;
use super::ranks::RankArgs;
use super::tasks::{OnTransformer, tokenizer};

/// The images that the recipe's model takes.
fn image_of(recipe: &Recipe) -> Result<ImageConfig, CliError> {
    recipe.model.image.ok_or_else(|| {
        let expected = "{ size, patch, channels } with a task on images, or a model that takes images (init)";
        TrainError::Input { what: "model.image", expected: expected.into(), got: "none".into() }.into()
    })
}

/// A class per image.
pub fn classes(mut job: Job, task: &ImageClassesRecipe, data: &DataArgs, ranks: RankArgs) -> Result<Summary, CliError> {
    let (paths, image) = (data.paths(&job.recipe.sources)?, image_of(&job.recipe)?);
    let preprocess = Images::preprocess(&job.recipe, job.found.as_ref(), &image, Preprocess::vit)?;
    let images = Images::read(&paths, task.val.as_deref(), job.recipe.data.val_fraction, preprocess)?;
    let task = ImageClasses::new(&job.recipe, task, &image, images)?;
    job.recipe.model.head = Some(task.head());
    job.recipe.model.labels = task.classes().to_vec();
    job.described = format!("{}: {task}", paths.join(", "));
    job.run(ranks, OnTransformer(task))
}

/// Images and texts that belong together.
pub fn text(mut job: Job, task: &ImageTextRecipe, data: &DataArgs, ranks: RankArgs) -> Result<Summary, CliError> {
    let paths = data.paths(&job.recipe.sources)?;
    let init = job.recipe.init.as_deref().map(|init| load_clip(init, &Device::default())).transpose()?;
    let image = match &init {
        Some(loaded) => loaded.model.config().image.image,
        None => Some(image_of(&job.recipe)?),
    };
    // PANIC: the image's tower of a model takes images.
    let image = image.expect("a tower of images");
    let preprocess = Images::preprocess(&job.recipe, job.found.as_ref(), &image, Preprocess::clip)?;
    let images = Images::read(&paths, task.val.as_deref(), job.recipe.data.val_fraction, preprocess)?;
    let captions = ImageText::captions(task, &images)?;
    let (config, tokenizer) = match init {
        Some(loaded) => {
            let missing = || TrainError::Input {
                what: "init",
                expected: "a model with a tokenizer.json".into(),
                got: "one without".into(),
            };
            (loaded.model.config().clone(), loaded.tokenizer.ok_or_else(missing)?)
        }
        None => {
            let tokenizer = tokenizer(&job, || captions)?;
            (task.towers(&job.recipe, &tokenizer)?, tokenizer)
        }
    };
    let task = ImageText::new(&job.recipe, task, config.text.context, tokenizer, images)?;
    job.described = format!("{}: {task}", paths.join(", "));
    job.run(ranks, OnTowers { task, config })
}

/// A task on two towers.
struct OnTowers {
    task: ImageText,
    config: ClipConfig,
}

impl Start for OnTowers {
    type Model = Clip;

    fn trainer<'a>(&'a self, job: &Job, device: &Device) -> Result<Trainer<'a, Clip>, CliError> {
        let (recipe, dir, task) = (job.recipe.clone(), job.dir.as_path(), Box::new(self.task.clone()));
        let device_of_model = device.clone().autodiff();
        let model = match &recipe.init {
            Some(init) => load_clip(init, &device_of_model)?.model.for_training(recipe.seed),
            None => Clip::new(&self.config, recipe.seed, &device_of_model),
        };
        let model = model.map_err(TrainError::from)?;
        Ok(match &job.found {
            Some(checkpoint) => Trainer::open_task(recipe, dir, task, device, model, checkpoint)?,
            None => Trainer::of_task(recipe, dir, task, device, model)?,
        })
    }
}
