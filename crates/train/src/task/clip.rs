//! CLIP as the trainer sees it.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::Tokenizer;
use firebox_models::clip::{Clip, ClipConfig, hf};
use firebox_models::transformer::TensorParallel;
use firebox_models::transformer::hf::Entry;
use firebox_parallel::Communicator;
use serde_json::Value;

use super::{Model, device_of};
use crate::TrainError;
use crate::checkpoint::{TensorFile, resolve};
use crate::model_io::from_entries;
use crate::recipe::Recipe;

impl Model for Clip {
    fn describe(&self) -> String {
        let (image, text) = (&self.config().image, &self.config().text);
        format!(
            "two towers: images {} layers, width {}, {} patches; texts {} layers, width {}, context {}",
            image.n_layers,
            image.d_model,
            image.context - 1,
            text.n_layers,
            text.d_model,
            text.context
        )
    }

    fn total_params(&self) -> usize {
        self.config().num_params()
    }

    /// Per token of the longest text.
    fn flops_per_token(&self) -> f64 {
        let ClipConfig { image, text, .. } = self.config();
        text.flops_per_token() + image.flops_per_token() * image.context as f64 / text.context as f64
    }

    fn entries(&self) -> Vec<Entry> {
        hf::entries(self.config())
    }

    fn config_json(&self) -> Value {
        hf::config_json(self.config())
    }

    fn empty(&self, seed: u64) -> Result<Self, TrainError> {
        Ok(Clip::new(self.config(), seed, &device_of(self))?)
    }

    fn for_recipe(self, recipe: &Recipe) -> Self {
        self.with_loss(recipe.train.loss())
    }

    /// Both towers are divided alike.
    fn parallel(&self) -> Option<&TensorParallel> {
        self.image.parallel()
    }

    fn sharded(&self, seed: u64, group: &Communicator, sequence_parallel: bool) -> Result<Self, TrainError> {
        let part = Clip::sharded(self.config(), seed, &device_of(self), group, sequence_parallel);
        part.map_err(|error| crate::trainer::cannot_divide("tp", error))
    }

    fn couples_rows(&self) -> bool {
        true
    }

    fn with_data_ranks(self, group: &Communicator) -> Self {
        self.with_ranks(group)
    }
}

/// Whether a folder is that of a model of others, and not of a checkpoint.
fn is_plain(path: &Path) -> bool {
    path.join("config.json").is_file() && !path.join("manifest.json").is_file()
}

/// The `config.json` of a model.
fn config_of(path: &Path) -> Result<Value, TrainError> {
    if !is_plain(path) {
        return Ok(resolve(path)?.checkpoint.read_json("config.json")?);
    }
    let config = path.join("config.json");
    let text = std::fs::read(&config).map_err(TrainError::io("read", &config))?;
    serde_json::from_slice(&text).map_err(|error| crate::model_io::not_json(&error.to_string()).into())
}

/// Whether this run, checkpoint or folder holds two towers. Of what cannot be read, others say so.
pub fn is_clip(path: &Path) -> bool {
    config_of(path).is_ok_and(|config| hf::is_clip(&config))
}

/// Two towers and the tokenizer of their texts.
#[derive(Debug)]
pub struct LoadedClip {
    /// The model.
    pub model: Clip,
    /// Its tokenizer, where the folder has one.
    pub tokenizer: Option<Tokenizer>,
}

/// Loads two towers onto `device` from a run, a checkpoint, or a folder in Hugging Face's form (`CLIPModel`).
///
/// # Errors
/// [`TrainError`]: nothing there, a torn file, another architecture, or tensors that do not fit (all at once).
pub fn load_clip(path: impl AsRef<Path>, device: &Device) -> Result<LoadedClip, TrainError> {
    let path = path.as_ref();
    let config = hf::parse(&config_of(path)?)?;
    let (file, tokenizer) = if is_plain(path) {
        let tokenizer = path.join("tokenizer.json");
        (TensorFile::open(path)?, tokenizer.is_file().then_some(tokenizer))
    } else {
        let checkpoint = resolve(path)?.checkpoint;
        let has_tokenizer = checkpoint.contains("tokenizer.json");
        let tokenizer = if has_tokenizer { Some(checkpoint.file("tokenizer.json")?) } else { None };
        (checkpoint.tensors("model.safetensors")?, tokenizer)
    };
    let file = file.renamed(|name| (!hf::is_buffer(name)).then(|| name.to_owned()));
    let model = from_entries(Clip::new(&config, 0, device)?, hf::entries(&config), file)?;
    Ok(LoadedClip { model, tokenizer: tokenizer.map(Tokenizer::load).transpose()? })
}
