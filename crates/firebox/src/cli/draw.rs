//! Tasks on images: their data, and their trainers; and `firebox draw`.

use std::path::PathBuf;

use burn::tensor::Device;
use clap::Args;
use firebox::data::images::{ImageRow, Preprocess, read_images};
use firebox::models::mae::Mae;
use firebox::models::vq::VqModel;
use firebox::train::draw::{Painter, Studio};
use firebox::train::generate::Sampling;
use firebox::train::observe::Summary;
use firebox::train::task::{
    ImageTokens, ImageTokensRecipe, MaskedImage, MaskedImageRecipe, Model, PictureRows, Task, TextToImage,
    TextToImageRecipe,
};
use firebox::train::{ImageTokenizer, TrainError, Trainer};

use super::job::{Job, Start};
use super::prepare::DataArgs;
use super::ranks::RankArgs;
use super::tasks::{OnTransformer, tokenizer};
use super::{CliError, DeviceArgs};

/// A quantizer of images.
pub fn image_tokens(
    mut job: Job,
    data: &DataArgs,
    ranks: RankArgs,
    task: &ImageTokensRecipe,
) -> Result<Summary, CliError> {
    let shape = task.shape(&job.recipe.model)?;
    let image = shape.image;
    let preprocess = Preprocess::vit(image.size, image.channels);
    let rows = job.images(data, &preprocess)?;
    let rows = PictureRows::new(rows, &preprocess, job.recipe.data.val_fraction, job.recipe.seed)?;
    let (task, seed) = (ImageTokens::new(rows, image.patches()), job.recipe.seed);
    job.run(
        ranks,
        OfOwnModel {
            task,
            model: move |device: &Device| -> Result<VqModel, TrainError> { Ok(VqModel::new(&shape, seed, device)?) },
        },
    )
}

/// Masked autoencoding of images.
pub fn masked_image(
    mut job: Job,
    data: &DataArgs,
    ranks: RankArgs,
    task: &MaskedImageRecipe,
) -> Result<Summary, CliError> {
    let config = task.shape(&job.recipe.model)?;
    let image = config.image();
    let preprocess = Preprocess::vit(image.size, image.channels);
    let rows = job.images(data, &preprocess)?;
    let rows = PictureRows::new(rows, &preprocess, job.recipe.data.val_fraction, job.recipe.seed)?;
    let (task, seed) = (MaskedImage::new(rows, config.clone(), job.recipe.seed), job.recipe.seed);
    job.run(
        ranks,
        OfOwnModel {
            task,
            model: move |device: &Device| -> Result<Mae, TrainError> { Ok(Mae::new(&config, seed, device)?) },
        },
    )
}

/// A task with a model of its own, which `model` makes on a device.
struct OfOwnModel<T, F> {
    task: T,
    model: F,
}

impl<M, T, F> Start for OfOwnModel<T, F>
where
    M: Model,
    T: Task<M> + Clone + 'static,
    F: Fn(&Device) -> Result<M, TrainError> + Send + Sync + 'static,
{
    type Model = M;

    fn trainer<'a>(&'a self, job: &Job, device: &Device) -> Result<Trainer<'a, M>, CliError> {
        let (recipe, dir, task) = (job.recipe.clone(), job.dir.as_path(), Box::new(self.task.clone()));
        let model = (self.model)(&device.clone().autodiff())?;
        Ok(match &job.found {
            Some(checkpoint) => Trainer::open_task(recipe, dir, task, device, model, checkpoint)?,
            None => Trainer::of_task(recipe, dir, task, device, model)?,
        })
    }
}

/// Images from text.
pub fn text_to_image(
    mut job: Job,
    data: &DataArgs,
    ranks: RankArgs,
    task: &TextToImageRecipe,
) -> Result<Summary, CliError> {
    let device = job.backend.device()?;
    let images = match &job.found {
        Some(checkpoint) => ImageTokenizer::within(checkpoint, &device)?,
        None if task.image_tokens.as_os_str().is_empty() => {
            let expected = "a run of task.kind = \"image_tokens\", which makes codes of images".into();
            return Err(TrainError::Input { what: "task.image_tokens", expected, got: "nothing".into() }.into());
        }
        None => ImageTokenizer::load(&task.image_tokens, &device)?,
    };
    let rows = job.images(data, &images.preprocess)?;
    let captions = rows.iter().map(|row| row.captions(&task.caption)).collect::<Result<Vec<_>, _>>()?;
    let text = tokenizer(&job, || captions.concat())?;
    let split = (job.recipe.data.val_fraction, job.recipe.seed);
    let mut task = TextToImage::new(&rows, text, images, task, split)?;
    let eval = &job.recipe.eval;
    if eval.sample_tokens > 0 {
        task = task.with_samples(&eval.prompt, job.recipe.seed)?;
    }
    let (layout, model) = (task.layout(), &mut job.recipe.model);
    if job.recipe.init.is_none() {
        (model.vocab_size, model.context) = (Some(layout.vocab_size()), Some(layout.context()));
    } else if model.vocab_size != Some(layout.vocab_size()) || model.context < Some(layout.context()) {
        let expected = format!(
            "a model of {} tokens and a context of at least {}: one that was trained for text_to_image with the same tokenizers",
            layout.vocab_size(),
            layout.context()
        );
        let got = format!("{:?} and {:?}", model.vocab_size.unwrap_or_default(), model.context.unwrap_or_default());
        return Err(TrainError::Input { what: "init", expected, got }.into());
    }
    job.run(ranks, OnTransformer(task))
}

impl Job {
    /// The images of the run, which say what its data are.
    pub fn images(&mut self, data: &DataArgs, preprocess: &Preprocess) -> Result<Vec<ImageRow>, CliError> {
        let paths = data.paths(&self.recipe.sources)?;
        let rows = read_images(&paths, preprocess)?;
        self.described = format!("{}: {} images", paths.join(", "), rows.len());
        Ok(rows)
    }
}

/// Examples:
///   firebox draw runs/shapes --prompt "a red circle in the top left" --out circle.png
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct DrawArgs {
    /// Run of `task.kind = "text_to_image"`, or one of its checkpoints.
    checkpoint: PathBuf,
    /// What the picture shows.
    #[arg(long)]
    prompt: String,
    /// The PNG file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// 0 takes the most likely code each time.
    #[arg(long, default_value_t = Painter::sampling().temperature)]
    temperature: f64,
    /// Choose among the so many most likely codes; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Choose among the most likely codes that together have this probability.
    #[arg(long, default_value_t = Painter::sampling().top_p)]
    top_p: f64,
    /// The same seed gives the same picture.
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn draw(args: &DrawArgs) -> Result<(), CliError> {
    let DrawArgs { temperature, top_k, top_p, seed, .. } = *args;
    let sampling = Sampling { temperature, top_k, top_p, seed, ..Painter::sampling() };
    let studio = Studio::load(&args.checkpoint, &args.device.backend.device()?)?;
    let picture = studio.painter().draw(&args.prompt, &sampling)?;
    let path = &args.out;
    std::fs::write(path, picture.png()).map_err(|source| TrainError::Io {
        operation: "write",
        path: path.clone(),
        source,
    })?;
    println!("{}: {1} x {1} pixels", path.display(), picture.size);
    Ok(())
}
