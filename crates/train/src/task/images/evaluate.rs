//! What a model of images is worth on images with classes or captions.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::images::Preprocess;
use firebox_models::transformer::Head;

use super::{ImageClasses, ImageText, Images, check_rows, stored};
use crate::TrainError;
use crate::evaluate::{OfRows, Tally, tallies};
use crate::model_io;
use crate::recipe::Recipe;
use crate::task::{Task, TaskRecipe, is_clip, load_clip};

/// Evaluates a model of images on all images of `data`: one with a head for classes on their classes, two towers on their captions. `set` are overrides of a recipe, such as
/// `task.label=breed`. `rows` images go through the model at once.
///
/// # Errors
/// [`TrainError`]: another model, images that cannot be read, or a row that does not fit, which is named.
pub fn on_images(
    path: &Path,
    data: &[String],
    set: &[String],
    rows: usize,
    device: &Device,
) -> Result<OfRows, TrainError> {
    let recipe = |kind: &str| {
        let mut recipe = Recipe::parse("eval", &format!("name = \"eval\"\n[task]\nkind = \"{kind}\"\n"), set)?;
        (recipe.train.batch_rows, recipe.train.micro_batch_rows) = (rows, rows);
        Ok::<_, TrainError>(recipe)
    };
    let other = |got: String| {
        let expected = "a model that takes images, with a head for classes or a tower of texts".into();
        TrainError::Input { what: "checkpoint", expected, got }
    };
    let read = |size, channels, usual: fn(usize, usize) -> Preprocess| {
        let preprocess = match stored(path)? {
            Some(json) => super::parsed(&json, size, channels)?,
            None => usual(size, channels),
        };
        let mut images = Images::read(data, None, 0.0, preprocess)?;
        check_rows(&images)?;
        // Nothing is trained.
        let held_out = std::mem::take(&mut images.train);
        images.train.push(held_out[0].clone());
        Ok::<_, TrainError>((held_out.len(), Images { held_out, ..images }))
    };
    if is_clip(path) {
        let recipe = recipe("image_text")?;
        let loaded = load_clip(path, device)?;
        let config = loaded.model.config().clone();
        let (Some(image), Some(tokenizer)) = (config.image.image, loaded.tokenizer) else {
            return Err(other("one without a tokenizer.json".into()));
        };
        let TaskRecipe::ImageText(task) = &recipe.task else { return Err(other(format!("task {:?}", recipe.task))) };
        let (count, images) = read(image.size, image.channels, Preprocess::clip)?;
        let task = ImageText::new(&recipe, task, config.text.context, tokenizer, images)?;
        let evaluation = Tally::evaluation(&tallies(&loaded.model, task.held_out(rows), |batch| batch));
        let metrics = task.evaluate(&loaded.model, usize::MAX);
        return Ok(OfRows { task: "image_text", rows: count, evaluation, metrics });
    }
    let model = model_io::load(path, device)?.model;
    let config = model.config();
    let (Some(image), Head::Classes { n, .. }) = (config.image, config.head) else {
        return Err(other(format!("one with {:?}", config.head)));
    };
    let recipe = recipe("image_classes")?;
    let TaskRecipe::ImageClasses(task) = &recipe.task else { return Err(other(format!("task {:?}", recipe.task))) };
    let mut task = task.clone();
    task.labels = match config.labels.is_empty() {
        true => (0..n).map(|i| i.to_string()).collect(),
        false => config.labels.clone(),
    };
    let (count, images) = read(image.size, image.channels, Preprocess::vit)?;
    let task = ImageClasses::new(&recipe, &task, &image, images)?;
    let evaluation = Tally::evaluation(&tallies(&model, task.held_out(rows), |batch| batch));
    let metrics = task.evaluate(&model, usize::MAX);
    Ok(OfRows { task: "image_classes", rows: count, evaluation, metrics })
}

/// Whether what [`load`](model_io::load) or [`load_clip`] opens takes images. Of what cannot be read, others say so.
pub fn takes_images(path: &Path) -> bool {
    is_clip(path) || model_io::shape_of(path).is_ok_and(|config| config.image.is_some())
}
