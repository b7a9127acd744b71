//! Tasks on images: a class of each, or a text that belongs to it.

mod classes;
mod evaluate;
mod text;

use std::path::Path;

use firebox_data::DataError;
use firebox_data::images::{ImageRow, Preprocess, read_images};
use firebox_models::transformer::ImageConfig;
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{Checkpoint, resolve};
use crate::recipe::Recipe;
pub use classes::{ImageClasses, ImageClassesRecipe};
pub use evaluate::{on_images, takes_images};
pub use text::{ImageText, ImageTextRecipe};

/// How images become what a model takes: a file that goes where the model goes.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";

/// Images to train on, and images that are held out.
#[derive(Debug, Clone)]
pub struct Images {
    /// How they became what they are.
    pub preprocess: Preprocess,
    /// Those to train on.
    pub train: Vec<ImageRow>,
    /// Those that are held out.
    pub held_out: Vec<ImageRow>,
}

impl Images {
    /// Of files, folders and globs ([`read_images`]). Held out are the images of `val`, or else a `fraction` of the others.
    ///
    /// # Errors
    /// As [`read_images`].
    pub fn read<S: AsRef<str>>(
        paths: &[S],
        val: Option<&str>,
        fraction: f64,
        preprocess: Preprocess,
    ) -> Result<Self, DataError> {
        let all = read_images(paths, &preprocess)?;
        let (train, held_out) = match val {
            Some(val) => (all, read_images(&[val], &preprocess)?),
            None => firebox_data::hold_out(all, fraction),
        };
        Ok(Self { preprocess, train, held_out })
    }

    /// How images become what the model of a recipe takes: as in the checkpoint that the run goes on from, or as with the model that it starts from, or else as `usual`.
    ///
    /// # Errors
    /// A file that is not what it should be.
    pub fn preprocess(
        recipe: &Recipe,
        found: Option<&Checkpoint>,
        image: &ImageConfig,
        usual: fn(usize, usize) -> Preprocess,
    ) -> Result<Preprocess, TrainError> {
        let stored = match (found, &recipe.init) {
            (Some(checkpoint), _) => of_checkpoint(checkpoint)?,
            (None, Some(init)) => stored(init)?,
            (None, None) => None,
        };
        let Some(json) = stored else { return Ok(usual(image.size, image.channels)) };
        parsed(&json, image.size, image.channels)
    }
}

fn parsed(json: &Value, size: usize, channels: usize) -> Result<Preprocess, TrainError> {
    Preprocess::from_json(json, size, channels).map_err(|reason| {
        let expected = "one for the model's images".to_owned();
        TrainError::Input { what: PREPROCESSOR, expected, got: reason }
    })
}

fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Option<Value>, TrainError> {
    Ok(if checkpoint.contains(PREPROCESSOR) { Some(checkpoint.read_json(PREPROCESSOR)?) } else { None })
}

/// The file beside a model, if there is one.
fn stored(model: &Path) -> Result<Option<Value>, TrainError> {
    if model.join("config.json").is_file() && !model.join("manifest.json").is_file() {
        let path = model.join(PREPROCESSOR);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(TrainError::io("read", &path))?;
        let json = serde_json::from_slice(&bytes);
        let not_json = |error: serde_json::Error| TrainError::Input {
            what: PREPROCESSOR,
            expected: "JSON".into(),
            got: error.to_string(),
        };
        return Ok(Some(json.map_err(not_json)?));
    }
    of_checkpoint(&resolve(model)?.checkpoint)
}

/// The file that goes into checkpoints.
fn preprocessor_file(preprocess: &Preprocess) -> (String, Vec<u8>) {
    // PANIC: a map of texts and numbers has a JSON form.
    let text = serde_json::to_vec_pretty(&preprocess.to_json()).expect("numbers have a JSON form");
    (PREPROCESSOR.into(), text)
}

/// That there is something to train on.
fn check_rows(images: &Images) -> Result<(), TrainError> {
    if images.train.is_empty() {
        let expected = "at least one image to train on".to_owned();
        return Err(TrainError::Input { what: "data", expected, got: "none".into() });
    }
    Ok(())
}
