//! GGUF files of llama.cpp's architectures `llama`, `qwen2` and `qwen3`, as the folders of Hugging Face that they were made from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use firebox_compress::gguf::{Gguf, Value as Meta};
use firebox_data::Tokenizer;
use firebox_models::transformer::hf::{Entry, parse_config};
use firebox_models::transformer::{RopeScaling, TransformerConfig};
use serde_json::{Value, json};

use super::vocabulary;
use crate::TrainError;
use crate::checkpoint::TensorFile;
use crate::export::gguf::name as gguf_name;
use crate::model_io::Folder;

/// What stretches the angles of Llama 3.1 and later: a factor per pair.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Opens a file: its shape as a `config.json`, its tensors under Hugging Face's names, its tokenizer.
pub(crate) fn open(path: &Path) -> Result<Folder, TrainError> {
    let file = Gguf::open(path).map_err(crate::export::ExportError::from)?;
    let reader = Reader { path, file: &file };
    let architecture = reader.architecture()?;
    let json = reader.config(architecture)?;
    let (family, config) = parse_config(&json)?;
    let entries = family.entries(&config);
    let vocabulary = vocabulary::read(&reader)?;
    let tokenizer = vocabulary.as_ref().map(|found| Tokenizer::from_json(found.tokenizer.to_string())).transpose()?;
    let sides = vocabulary.map_or_else(BTreeMap::new, |found| found.sides);

    // Hugging Face's name of each of the file's.
    let mut theirs = BTreeMap::new();
    for piece in entries.iter().flat_map(|entry: &Entry| &entry.pieces) {
        theirs.insert(gguf_name(&piece.name)?, piece.name.clone());
    }
    let (mut shapes, mut names) = (BTreeMap::new(), BTreeMap::new());
    for info in file.tensors().filter(|info| info.name != ROPE_FACTORS) {
        let name = theirs.get(&info.name).unwrap_or(&info.name).clone();
        shapes.insert(name.clone(), info.shape.clone());
        names.insert(name, info.name.clone());
    }
    let permuted = architecture == "llama";
    let values = move |name: &str| {
        let own = names.get(name).ok_or("no tensor of that name")?;
        let values = file.values(own).map_err(|error| error.to_string());
        file.release(own);
        let rotated = ["attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"];
        match permuted && rotated.iter().any(|end| own.ends_with(end)) {
            true => Ok(halves(&values?, config.head_dim, columns(&config, own))),
            false => values,
        }
    };
    Ok(Folder { config: json, file: TensorFile::of_values(path, shapes, Box::new(values)), tokenizer, sides })
}

/// Values per row of a projection to heads.
fn columns(config: &TransformerConfig, name: &str) -> usize {
    if name.ends_with(".bias") { 1 } else { config.d_model }
}

/// The rows of heads of `e` rows in Hugging Face's order, whose rotation turns the two halves of a head against each other, from llama.cpp's, whose turns neighbours.
fn halves(values: &[f32], e: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in values.chunks_exact((e * columns).max(1)) {
        for first in [0, 1] {
            for row in (first..e).step_by(2) {
                out.extend_from_slice(&head[row * columns..][..columns]);
            }
        }
    }
    out
}

/// A file's metadata, with errors that name it.
pub(super) struct Reader<'a> {
    path: &'a Path,
    file: &'a Gguf,
}

/// Why a GGUF file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: `{key}`: expected {expected}, got {got}", path.display())]
pub struct GgufContent {
    /// The file.
    pub path: PathBuf,
    /// The key of its metadata, or the tensor.
    pub key: String,
    /// What it should be.
    pub expected: String,
    /// What it is.
    pub got: String,
}

impl<'a> Reader<'a> {
    pub fn wrong(&self, key: &str, expected: impl Into<String>, got: impl Into<String>) -> TrainError {
        let (path, key) = (self.path.to_path_buf(), key.to_owned());
        GgufContent { path, key, expected: expected.into(), got: got.into() }.into()
    }

    pub fn get(&self, key: &str) -> Option<&'a Meta> {
        self.file.metadata().get(key)
    }

    /// A value that `read` takes, if the key is there.
    pub fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Meta) -> Option<T>,
    ) -> Result<Option<T>, TrainError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, expected, short(value))),
        }
    }

    fn count_or(&self, key: &str) -> Result<Option<u64>, TrainError> {
        self.optional(key, "a count", Meta::as_u64)
    }

    fn count(&self, key: &str) -> Result<u64, TrainError> {
        self.count_or(key)?.ok_or_else(|| self.wrong(key, "a count", "nothing"))
    }

    /// A number. Those that are 32-bit floats were written as the decimals that are nearest to them.
    fn number(&self, key: &str) -> Result<Option<f64>, TrainError> {
        self.optional(key, "a number", |value| match value {
            Meta::F32(x) => x.to_string().parse().ok(),
            other => other.as_f64(),
        })
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, TrainError> {
        self.optional(key, "a text", Meta::as_text)
    }

    fn architecture(&self) -> Result<&'a str, TrainError> {
        const KEY: &str = "general.architecture";
        match self.text(KEY)?.unwrap_or("(none)") {
            known @ ("llama" | "qwen2" | "qwen3") => Ok(known),
            other => Err(self.wrong(KEY, "llama, qwen2 or qwen3", other)),
        }
    }

    /// The `config.json` that the file was made from, as far as it matters.
    fn config(&self, architecture: &str) -> Result<Value, TrainError> {
        let own = |key: &str| format!("{architecture}.{key}");
        let width = self.count(&own("embedding_length"))?;
        let heads = self.count(&own("attention.head_count"))?;
        let key = own("attention.key_length");
        let head_dim = self.count_or(&key)?.unwrap_or(width.checked_div(heads).unwrap_or(0));
        for key in [own("attention.value_length"), own("rope.dimension_count")] {
            if let Some(other) = self.count_or(&key)?.filter(|other| *other != head_dim) {
                return Err(self.wrong(&key, format!("the width of a head, {head_dim}"), other.to_string()));
            }
        }
        let key = own("expert_count");
        if let Some(experts) = self.count_or(&key)?.filter(|experts| *experts > 0) {
            return Err(self.wrong(&key, "0: a dense model", experts.to_string()));
        }
        let table = self.file.info("token_embd.weight").map_err(crate::export::ExportError::from)?;
        let biases = self.file.info("blk.0.attn_q.bias").is_ok();
        let (class, model_type) = match (architecture, biases) {
            ("qwen3", _) => ("Qwen3ForCausalLM", "qwen3"),
            ("qwen2", _) => ("Qwen2ForCausalLM", "qwen2"),
            // Biases of q, k and v alone, in the architecture that rotates neighbours: Qwen 2 all the same.
            (_, true) if self.file.info("blk.0.attn_output.bias").is_err() => ("Qwen2ForCausalLM", "qwen2"),
            _ => ("LlamaForCausalLM", "llama"),
        };
        let eps = own("attention.layer_norm_rms_epsilon");
        let all_biases = model_type == "llama" && biases;
        let mut json = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": table.shape.first(),
            "hidden_size": width,
            "intermediate_size": self.count(&own("feed_forward_length"))?,
            "num_hidden_layers": self.count(&own("block_count"))?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.count_or(&own("attention.head_count_kv"))?.unwrap_or(heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.count(&own("context_length"))?,
            "rms_norm_eps": self.number(&eps)?.ok_or_else(|| self.wrong(&eps, "a number", "nothing"))?,
            "rope_theta": self.number(&own("rope.freq_base"))?.unwrap_or(10_000.0),
            "hidden_act": "silu",
            "attention_bias": all_biases,
            "mlp_bias": all_biases,
            "tie_word_embeddings": self.file.info("output.weight").is_err(),
            "initializer_range": 0.02,
            "torch_dtype": "float32",
        });
        if let Some(window) = self.count_or(&own("attention.sliding_window"))?.filter(|_| model_type == "llama") {
            json["architectures"] = json!(["MistralForCausalLM"]);
            json["model_type"] = "mistral".into();
            json["sliding_window"] = window.into();
        }
        if let Some(scaling) = self.scaling(architecture, &json)? {
            json["rope_scaling"] = scaling;
        }
        for (key, name) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
            let id = self.count_or(&format!("tokenizer.ggml.{name}_token_id"))?;
            if id.is_some() || key != "pad" {
                json[format!("{key}_token_id")] = json!(id);
            }
        }
        Ok(json)
    }

    /// How angles are stretched: by metadata, or by a factor for each pair.
    fn scaling(&self, architecture: &str, json: &Value) -> Result<Option<Value>, TrainError> {
        let key = format!("{architecture}.rope.scaling.type");
        let factor = self.number(&format!("{architecture}.rope.scaling.factor"))?;
        match self.text(&key)? {
            None | Some("none") => {}
            Some("linear") => return Ok(Some(json!({ "rope_type": "linear", "factor": factor.unwrap_or(1.0) }))),
            Some(other) => return Err(self.wrong(&key, "none or linear", other)),
        }
        if self.file.info(ROPE_FACTORS).is_err() {
            return Ok(None);
        }
        // Only the factors are there. Llama 3.1, 3.2 and 3.3 differ in the largest one alone.
        let factors = self.file.values(ROPE_FACTORS).map_err(crate::export::ExportError::from)?;
        let largest = factors.iter().fold(1.0, |most: f32, factor| most.max(*factor));
        let scaling = json!({
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let mut with = json.clone();
        with["rope_scaling"] = scaling.clone();
        let (_, stretched) = parse_config(&with)?;
        let plain = TransformerConfig { rope_scaling: None::<RopeScaling>, ..stretched.clone() };
        let frequencies = plain.rope_frequencies().zip(stretched.rope_frequencies());
        let same = frequencies.is_some_and(|(plain, stretched)| {
            let expected = plain.iter().zip(&stretched).map(|(plain, stretched)| plain / stretched);
            plain.len() == factors.len()
                && expected.zip(&factors).all(|(expected, got)| (f64::from(*got) / expected - 1.0).abs() < 1e-3)
        });
        match same {
            true => Ok(Some(scaling)),
            false => Err(self.wrong(ROPE_FACTORS, "the factors of Llama 3", format!("others, up to {largest}"))),
        }
    }
}

/// A value in an error.
fn short(value: &Meta) -> String {
    match value {
        Meta::Text(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
        Meta::Array(kind, values) => format!("{} values of {kind:?}", values.len()),
        other => format!("{other:?}"),
    }
}
