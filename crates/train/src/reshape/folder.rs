//! The folder of a model, read and written one parameter at a time.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use firebox_data::Tokenizer;
use firebox_models::transformer::TransformerConfig;
use firebox_models::transformer::hf::{Entry, parse_config};

use crate::TrainError;
use crate::checkpoint::TensorFile;
use crate::model_io::{Folder, check_tensors};
use crate::quantized::{self, Quantization, Weights};

/// A model on the disk.
#[derive(Debug)]
pub struct ModelFolder {
    config: TransformerConfig,
    entries: HashMap<String, Entry>,
    file: TensorFile,
    tokenizer: Option<Tokenizer>,
}

impl ModelFolder {
    /// Opens what [`model_io::load`](crate::model_io::load) loads, unless its weights are quantized.
    ///
    /// # Errors
    /// As there; [`TrainError::Input`] for a quantized model.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let Folder { config: json, file, tokenizer, .. } = Folder::open(path)?;
        if Quantization::of(&json)?.is_some() {
            let expected = "weights that are not quantized: take the model from before, and quantize at the end".into();
            return Err(TrainError::Input { what: "the model", expected, got: path.display().to_string() });
        }
        let (family, config) = parse_config(&json)?;
        let entries = family.entries(&config);
        check_tensors(&entries, &file)?;
        let entries = entries.into_iter().map(|entry| (entry.param.clone(), entry)).collect();
        Ok(Self { config, entries, file, tokenizer })
    }

    /// The shape of the model.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    fn entry(&self, param: &str) -> Result<&Entry, TrainError> {
        self.entries.get(param).ok_or_else(|| TrainError::Input {
            what: "a parameter",
            expected: "one of the model".into(),
            got: param.into(),
        })
    }

    /// The shape of a parameter, by its path in the module.
    ///
    /// # Errors
    /// None of this name.
    pub fn shape(&self, param: &str) -> Result<&[usize], TrainError> {
        Ok(&self.entry(param)?.shape)
    }

    /// The values of a parameter.
    ///
    /// # Errors
    /// None of this name, or a file that cannot be read.
    pub fn read(&self, param: &str) -> Result<Vec<f32>, TrainError> {
        let entry = self.entry(param)?;
        let mut values = vec![0f32; entry.shape.iter().product()];
        for piece in &entry.pieces {
            entry.join(&mut values, piece, &self.file.f32(&piece.name)?);
        }
        Ok(values)
    }

    /// Writes a model of shape `config` and this one's tokenizer to the new folder `output`, with the values that `value` gives of each parameter, asked for one after the
    /// other.
    ///
    /// # Errors
    /// An impossible shape, an `output` that is there, an error of `value`, or the disk.
    pub fn write(
        &self,
        output: &Path,
        config: &TransformerConfig,
        mut value: impl FnMut(&str) -> Result<Vec<f32>, TrainError>,
    ) -> Result<(), TrainError> {
        config.validate()?;
        let formats = BTreeMap::new();
        quantized::save(output, config, &formats, self.tokenizer.as_ref(), |param| Ok(Weights::Full(value(param)?)))
    }
}
