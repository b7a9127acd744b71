//! Runs that start from a model instead of initial parameters.

use std::path::Path;

use burn::tensor::Device;
use firebox_models::transformer::{Transformer, TransformerConfig};

use crate::TrainError;
use crate::checkpoint::resolve;
use crate::model_io;
use crate::recipe::{ModelRecipe, Recipe};
use crate::task::{TaskRecipe, is_clip};

impl Recipe {
    /// The same recipe for a run that starts from the parameters of the model in `path`: a run, a checkpoint, or a folder in Hugging Face's form. The model's
    /// shape takes the place of [`model`](Self::model), of which only `dropout` and `head` stay, and its tokenizer, where it has one, that of `data.tokenizer`.
    ///
    /// # Errors
    /// As [`model_io::load`]; [`TrainError::Input`] for a quantized model.
    pub fn starting_from(self, path: &Path) -> Result<Self, TrainError> {
        if is_clip(path) {
            // Its shape is the model's own, and no recipe's.
            let init = Some(std::path::absolute(path).map_err(TrainError::io("find", path))?);
            return Ok(Self { init, ..self });
        }
        let loaded = model_io::load(path, &Device::default())?;
        if loaded.model.is_packed() {
            let got = format!("the quantized one in {}", path.display());
            return Err(TrainError::Input {
                what: "init",
                expected: "a model in floats, which has gradients".into(),
                got,
            });
        }
        // From wherever the run goes on.
        let path = std::path::absolute(path).map_err(TrainError::io("find", path))?;
        let exactly = ModelRecipe::exactly(loaded.model.config());
        let mut recipe = Self {
            model: ModelRecipe {
                dropout: self.model.dropout.or(exactly.dropout),
                head: self.model.head.or(exactly.head),
                ..exactly
            },
            init: Some(path.clone()),
            ..self
        };
        let is_file = path.is_file();
        if is_file && !matches!(recipe.task, TaskRecipe::Chat(_) | TaskRecipe::Preference(_)) {
            let (expected, got) =
                ("a folder with this task: `firebox import FILE --out DIR` makes one", path.display());
            return Err(TrainError::Input { what: "init", expected: expected.into(), got: got.to_string() });
        }
        if loaded.tokenizer.is_some() && !is_file {
            let plain = path.join("config.json").is_file();
            let folder = if plain { path } else { resolve(&path)?.checkpoint.path().to_path_buf() };
            recipe.data.tokenizer = folder.join("tokenizer.json").display().to_string();
        }
        Ok(recipe)
    }

    /// The model that the run starts from, on `device.autodiff()`; none where it starts from initial parameters. Where the recipe's head is another than the model's, it is new, and the
    /// model's own is left. What [`Trainer::new`](crate::Trainer::new) takes.
    ///
    /// # Errors
    /// As [`model_io::load`]; [`TrainError::Input`] for a model that is not of the recipe's shape.
    pub fn initial_model(&self, device: &Device) -> Result<Option<Transformer>, TrainError> {
        let Some(path) = &self.init else { return Ok(None) };
        let device = device.clone().autodiff();
        let mut model = model_io::load(path, &device)?.model;
        let mut wanted = self.model.resolve(model.config().vocab_size)?;
        if model.config().head != wanted.head || model.config().labels != wanted.labels {
            // Names of classes that the other head had.
            if model.config().head != wanted.head && wanted.labels == model.config().labels {
                wanted.labels.clear();
            }
            let (head, labels) = (wanted.head, wanted.labels.clone());
            let with_head = TransformerConfig { head, labels, ..model.config().clone() };
            model = model_io::load_with_head(path, &with_head, self.seed, &device)?;
        }
        let dropout = self.model.dropout.unwrap_or(model.config().dropout);
        let model = model.for_training(self.seed, dropout)?;
        if *model.config() != wanted {
            let (expected, got) =
                (format!("a model of the recipe's shape, {wanted:?}"), format!("{:?}", model.config()));
            return Err(TrainError::Input { what: "init", expected, got });
        }
        Ok(Some(model))
    }

    /// The same, or else one with initial parameters for a tokenizer of `tokens` tokens.
    ///
    /// # Errors
    /// As [`initial_model`](Self::initial_model), or an impossible shape.
    pub fn first_model(&self, tokens: usize, device: &Device) -> Result<Transformer, TrainError> {
        if let Some(model) = self.initial_model(device)? {
            return Ok(model);
        }
        Ok(Transformer::new(&self.model.resolve(tokens)?, self.seed, &device.clone().autodiff())?)
    }
}
