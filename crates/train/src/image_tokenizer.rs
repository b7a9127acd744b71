//! A trained quantizer of images, with the files that it is made of.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::images::Preprocess;
use firebox_models::transformer::hf::HfError;
use firebox_models::vq::{VqConfig, VqModel};
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{Checkpoint, TensorFile, resolve};
use crate::model_io::{from_entries, own_entries};
use crate::task::{IMAGE_TOKENS, MODEL_TYPE};

/// A quantizer, how images are made for it, and the files with which it can be made again.
#[derive(Debug, Clone)]
pub struct ImageTokenizer {
    /// The quantizer, on a device without gradients.
    pub model: VqModel,
    /// How images are made for it.
    pub preprocess: Preprocess,
    files: [(&'static str, Vec<u8>); 3],
}

const FILES: [&str; 3] = ["config.json", "preprocessor_config.json", "model.safetensors"];

impl ImageTokenizer {
    /// Loads a run of `task.kind = "image_tokens"`, or one of its checkpoints.
    ///
    /// # Errors
    /// [`TrainError`]: nothing there, another model, or tensors that do not fit.
    pub fn load(path: &Path, device: &Device) -> Result<Self, TrainError> {
        Self::of_checkpoint(&resolve(path)?.checkpoint, "", device)
    }

    /// The quantizer that a checkpoint of `task.kind = "text_to_image"` has with it.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn within(checkpoint: &Checkpoint, device: &Device) -> Result<Self, TrainError> {
        Self::of_checkpoint(checkpoint, IMAGE_TOKENS, device)
    }

    /// From the files of a checkpoint below `folder`.
    fn of_checkpoint(checkpoint: &Checkpoint, folder: &str, device: &Device) -> Result<Self, TrainError> {
        let name = |file: &str| if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") };
        let config = checkpoint.read_json(&name("config.json"))?;
        // Before files are missed that another model does not have.
        check_type(&config)?;
        let tensors = checkpoint.tensors(&name("model.safetensors"))?;
        let mut files = FILES.map(|file| (file, vec![]));
        for (file, bytes) in &mut files {
            *bytes = checkpoint.bytes(&name(file))?;
        }
        let (model, preprocess) = (model_of(config, tensors, device)?, preprocess_of(&files[1].1)?);
        let image = model.config().image;
        if preprocess.size != image.size || preprocess.channels != image.channels {
            return Err(key("image", "the size and channels of preprocessor_config.json", format!("{image:?}")).into());
        }
        Ok(Self { model, preprocess, files })
    }

    /// Its files, as they stand [within](Self::within) a checkpoint.
    pub(crate) fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.files.iter().map(|(name, bytes)| (format!("{IMAGE_TOKENS}/{name}"), bytes.clone())).collect()
    }
}

fn key(key: &str, expected: &'static str, got: String) -> HfError {
    HfError::Key { key: key.into(), expected, got }
}

fn check_type(config: &Value) -> Result<(), HfError> {
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if kind == MODEL_TYPE {
        return Ok(());
    }
    Err(key("model_type", "firebox_vq, a quantizer of images that task.kind = \"image_tokens\" trains", kind.into()))
}

/// The quantizer of a `config.json` with the parameters of a file.
pub(crate) fn model_of(mut config: Value, file: TensorFile, device: &Device) -> Result<VqModel, TrainError> {
    check_type(&config)?;
    if let Some(map) = config.as_object_mut() {
        map.remove("model_type");
    }
    let config: VqConfig =
        serde_json::from_value(config).map_err(|error| key("(file)", "the shape of a quantizer", error.to_string()))?;
    let empty = VqModel::new(&config, 0, device)?;
    let entries = own_entries(&empty);
    from_entries(empty, entries, file)
}

fn preprocess_of(bytes: &[u8]) -> Result<Preprocess, TrainError> {
    let wrong = |reason: String| TrainError::Input {
        what: "preprocessor_config.json",
        expected: "how images were made".into(),
        got: reason,
    };
    let json: Value = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
    let side = json["size"]["height"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or_default();
    let channels = json["image_mean"].as_array().map_or(0, Vec::len);
    Preprocess::from_json(&json, side, channels).map_err(wrong)
}
