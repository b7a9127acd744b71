//! A model that is read tensor by tensor.

use std::cell::RefCell;
use std::collections::BTreeMap;

use firebox_models::transformer::hf::{Entry, Family, Piece, is_passenger, parse_config};
use firebox_models::transformer::{FeedForward, Head, NormKind, Positions, TransformerConfig};
use serde_json::Value;

use super::ExportError;
use crate::TrainError;
use crate::checkpoint::{CheckpointError, Dtype, TensorFile};
use crate::model_io;
use crate::quantized::{Numbers, Quantization};

/// A checkpoint whose tensors are read when they are asked for, quantized ones as the numbers that they stand for.
pub struct Source {
    pub family: Family,
    pub config: TransformerConfig,
    pub tokenizer: Option<Vocabulary>,
    /// The `config.json` as it is, unless it is of a quantized model.
    pub json: Option<Value>,
    /// What lies beside the model: see [`SIDES`](model_io::SIDES).
    pub sides: BTreeMap<&'static str, String>,
    entries: Vec<Entry>,
    /// Parts of the class that no parameter is: see [`is_passenger`].
    passengers: Vec<Entry>,
    file: TensorFile,
    quantized: Option<Numbers>,
    /// The last quantized parameter that a part of was asked for.
    last: RefCell<Option<(String, Vec<f32>)>>,
}

/// A `tokenizer.json`.
pub struct Vocabulary {
    /// As it is.
    pub text: String,
    /// Parsed.
    pub json: Value,
    /// The token that precedes every document.
    pub separator: Option<u32>,
    /// Its text.
    pub separator_text: Option<String>,
}

impl Source {
    /// Of what [`load`](model_io::load) opens.
    pub fn of(folder: model_io::Folder) -> Result<Self, TrainError> {
        let model_io::Folder { config: json, file, tokenizer, sides } = folder;
        let quantization = Quantization::of(&json)?;
        let (family, config) = parse_config(&json)?;
        let json = quantization.is_none().then_some(json);
        let entries = family.entries(&config);
        let quantized = match quantization {
            Some(quantization) => Some(quantization.numbers(entries.clone(), &file)?),
            None => {
                model_io::check_tensors(&entries, &file)?;
                None
            }
        };
        let unknown = |name: &&str| !entries.iter().any(|entry| entry.pieces.iter().any(|piece| piece.name == *name));
        let passengers = file.names().filter(|name| is_passenger(name)).filter(unknown);
        let whole = |name| Ok(Entry::whole(name, file.shape(name)?, name));
        let passengers = passengers.map(whole).collect::<Result<Vec<_>, CheckpointError>>()?;
        passengers.iter().try_for_each(|entry| file.check_floats(&entry.param))?;
        let tokenizer = tokenizer.map(|tokenizer| {
            let text = tokenizer.json().to_owned();
            // It has been parsed before.
            let json: Value = serde_json::from_str(&text).unwrap_or_default();
            let separator = tokenizer.eot();
            let added = json["added_tokens"].as_array();
            let separator_text = separator.and_then(|id| {
                let token = added?.iter().find(|token| token["id"] == id)?;
                Some(token["content"].as_str()?.to_owned())
            });
            Vocabulary { text, json, separator, separator_text }
        });
        Ok(Self {
            family,
            config,
            tokenizer,
            json,
            sides,
            entries,
            passengers,
            file,
            quantized,
            last: RefCell::new(None),
        })
    }

    /// Every tensor of Hugging Face, with the parameter that it is or that it is a part of.
    pub fn pieces(&self) -> impl Iterator<Item = (&Entry, &Piece)> {
        self.entries.iter().flat_map(|entry| entry.pieces.iter().map(move |piece| (entry, piece)))
    }

    /// Tensors of the class that are no parameters of ours.
    pub fn passengers(&self) -> impl Iterator<Item = (&Entry, &Piece)> {
        self.passengers.iter().flat_map(|entry| entry.pieces.iter().map(move |piece| (entry, piece)))
    }

    /// How a tensor of Hugging Face is stored: quantized ones and those of GGUF's blocks are f32.
    pub fn dtype(&self, piece: &Piece) -> Dtype {
        match self.file.dtype(&piece.name) {
            Ok(dtype @ (Dtype::F16 | Dtype::BF16)) => dtype,
            _ => Dtype::F32,
        }
    }

    /// A tensor of Hugging Face.
    pub fn piece(&self, entry: &Entry, piece: &Piece) -> Result<Vec<f32>, TrainError> {
        if let Some(quantized) = &self.quantized {
            let mut last = self.last.borrow_mut();
            if let Some((_, values)) = last.as_ref().filter(|(name, _)| *name == entry.param) {
                return Ok(entry.split(values, piece));
            }
            // Not both at once.
            *last = None;
            if let Some(values) = quantized.values(&entry.param, &self.file)? {
                let part = entry.split(&values, piece);
                if entry.pieces.len() > 1 {
                    *last = Some((entry.param.clone(), values));
                }
                return Ok(part);
            }
        }
        let values = self.file.f32(&piece.name)?;
        match values.iter().find(|value| !value.is_finite()) {
            None => Ok(values),
            Some(value) => {
                let expected =
                    format!("finite values in {}: this model is damaged, or training has diverged", piece.name);
                Err(TrainError::Input { what: "checkpoint", expected, got: value.to_string() })
            }
        }
    }

    /// A parameter of the decoder in the layout that it has there.
    pub fn param(&self, name: &str) -> Result<Vec<f32>, TrainError> {
        let Some(entry) = self.entries.iter().find(|entry| entry.param == name) else {
            let expected = format!("a parameter {name}");
            return Err(TrainError::Input { what: "checkpoint", expected, got: "none of that name".into() });
        };
        if let Some(quantized) = &self.quantized
            && let Some(values) = quantized.values(name, &self.file)?
        {
            return Ok(values);
        }
        match &entry.pieces[..] {
            [whole] if !whole.transposed => self.piece(entry, whole),
            pieces => {
                let mut values = vec![0.0; entry.shape.iter().product()];
                for piece in pieces {
                    entry.join(&mut values, piece, &self.piece(entry, piece)?);
                }
                Ok(values)
            }
        }
    }

    /// Refuses a model that does not go on with text.
    pub fn is_a_decoder(&self, format: &'static str) -> Result<(), ExportError> {
        let model = match (self.config.encoder, self.config.head) {
            (None, Head::Language) => return Ok(()),
            (None, head) => format!("a decoder with another head, {head:?}"),
            (Some(_), _) => "an encoder".into(),
        };
        Err(ExportError::NoDecoder { format, model })
    }

    /// Refuses a model whose shape Hugging Face has no class for, naming what is in the way.
    pub fn in_a_class(&self, format: &'static str) -> Result<(), ExportError> {
        match self.family {
            Family::Firebox => Err(ExportError::NoWord { format, feature: oddities(&self.config) }),
            _ => Ok(()),
        }
    }
}

/// What a decoder has that its closest class of Hugging Face has not.
fn oddities(config: &TransformerConfig) -> String {
    if config.encoder.is_some() {
        return "encoder of this shape: none of BERT, RoBERTa, DistilBERT, ALBERT is like it".into();
    }
    let learned = config.positions == Positions::Learned;
    let (class, norm, mlp) = match learned {
        true => ("GPT-2", NormKind::LayerNorm, config.feed_forward != FeedForward::SwiGlu),
        false => ("Llama", NormKind::RmsNorm, config.feed_forward == FeedForward::SwiGlu),
    };
    let full_heads = config.n_heads == config.n_kv_heads && config.n_heads * config.head_dim == config.d_model;
    let found = [
        (config.attention_softcap != 0.0, "attention_softcap"),
        (config.logit_softcap != 0.0, "logit_softcap"),
        (config.norm != norm, if learned { "RMSNorm" } else { "LayerNorm" }),
        (!mlp, if learned { "SwiGLU" } else { "GELU" }),
        (config.bias != learned, if learned { "layers without bias" } else { "biases" }),
        (learned && config.qk_norm, "qk_norm"),
        (learned && config.window.is_some(), "window"),
        (!learned && config.qk_norm && config.window.is_some(), "qk_norm with a window"),
        (learned && !full_heads, "grouped heads or heads of another width"),
        (config.experts.is_some(), "these experts"),
    ];
    let found: Vec<&str> = found.iter().filter(|(odd, _)| *odd).map(|(_, what)| *what).collect();
    let found = if found.is_empty() { "Firebox's own architecture".into() } else { found.join(", ") };
    format!("{found} in {class}'s architecture")
}
