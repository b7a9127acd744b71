//! A folder that Hugging Face's `transformers` loads with `AutoModelForCausalLM`, or the class of an encoder's head, and `AutoTokenizer`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use firebox_models::transformer::hf::{Entry, Piece};
use serde_json::{Value, json};

use super::source::{Source, Vocabulary};
use super::write_json;
use crate::checkpoint::{Dtype, PieceWriter, TensorPlan, TensorSpec, encode_f32};
use crate::{TrainError, sentences};

/// A file of weights has no more bytes than this, unless a single tensor has: what `save_pretrained` takes.
const SHARD: usize = 5_000_000_000;

/// What encoders' tokenizers call their special tokens.
const ENCODERS: [(&str, [&str; 2]); 5] = [
    ("pad_token", ["[PAD]", "<pad>"]),
    ("unk_token", ["[UNK]", "<unk>"]),
    ("cls_token", ["[CLS]", "<s>"]),
    ("sep_token", ["[SEP]", "</s>"]),
    ("mask_token", ["[MASK]", "<mask>"]),
];

/// Writes the folder's files.
pub fn write(source: &Source, dtype: Option<Dtype>, dir: &Path) -> Result<(), TrainError> {
    source.in_a_class("Hugging Face's format")?;
    weights(source, dtype, dir, SHARD)?;
    // What came from elsewhere goes on with all that its config says.
    let mut config = source.json.clone().unwrap_or_else(|| source.family.config_json(&source.config));
    // transformers 5 has the first.
    let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match dtype {
        Some(Dtype::F16) => config[key] = "float16".into(),
        Some(Dtype::BF16) => config[key] = "bfloat16".into(),
        Some(_) => config[key] = "float32".into(),
        None => {}
    }
    side_files(source, config, dir)
}

/// Everything but the weights.
pub fn side_files(source: &Source, mut config: Value, dir: &Path) -> Result<(), TrainError> {
    // Without a tokenizer, and with one without a separator, no token ends a text. The classes' own defaults would be tokens of other vocabularies.
    let separator = source.tokenizer.as_ref().and_then(|vocabulary| vocabulary.separator);
    let tokens = json!({ "bos_token_id": separator, "eos_token_id": separator });
    if source.config.encoder.is_none() && config.get("eos_token_id").is_none() {
        for key in ["bos_token_id", "eos_token_id"] {
            config[key] = tokens[key].clone();
        }
    }
    write_json(dir.join("config.json"), &config)?;
    let sentences = if source.sides.contains_key("modules.json") { vec![] } else { sentences::files(&source.config) };
    let sentences = sentences.into_iter().map(|(name, value)| (name, format!("{value:#}\n")));
    for (name, text) in source.sides.clone().into_iter().chain(sentences) {
        let path = dir.join(name);
        let folder = path.parent().unwrap_or(dir);
        fs::create_dir_all(folder).map_err(TrainError::io("create", folder))?;
        fs::write(&path, text).map_err(TrainError::io("write", &path))?;
    }
    if source.config.encoder.is_none() && !source.sides.contains_key("generation_config.json") {
        let tokens = json!({ "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"] });
        write_json(dir.join("generation_config.json"), &tokens)?;
    }
    let Some(vocabulary) = &source.tokenizer else { return Ok(()) };
    let path = dir.join("tokenizer.json");
    fs::write(&path, &vocabulary.text).map_err(TrainError::io("write", &path))?;
    if source.sides.contains_key("tokenizer_config.json") {
        return Ok(());
    }
    let mut json = tokenizer_config(vocabulary, source.config.context);
    if source.config.encoder.is_some() {
        let known =
            |name: &str| vocabulary.json["added_tokens"].as_array()?.iter().find(|token| token["content"] == name);
        for (key, names) in ENCODERS {
            if let Some(name) = names.into_iter().find(|name| known(name).is_some()) {
                json[key] = name.into();
            }
        }
    }
    write_json(dir.join("tokenizer_config.json"), &json)
}

fn tokenizer_config(vocabulary: &Vocabulary, context: usize) -> Value {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": context,
    });
    if let Some(text) = &vocabulary.separator_text {
        for key in ["bos_token", "eos_token"] {
            config[key] = text.as_str().into();
        }
    }
    config
}

/// A tensor of a file, and the parameter that it belongs to.
type Part<'a> = (&'a Entry, &'a Piece);

/// One file, or several of at most `most` bytes and an index.
fn weights(source: &Source, dtype: Option<Dtype>, dir: &Path, most: usize) -> Result<(), TrainError> {
    let spec = |piece: &Piece| spec(source, dtype, piece);
    let mut files: Vec<(usize, Vec<Part<'_>>)> = vec![];
    // Wide types before narrow ones, as they must lie in a file.
    let mut parts: Vec<Part<'_>> = source.pieces().chain(source.passengers()).collect();
    parts.sort_by_key(|(_, piece)| spec(piece).dtype != Dtype::F32);
    for part in parts {
        let bytes = spec(part.1).n_bytes().unwrap_or(usize::MAX);
        match files.last_mut() {
            Some((size, pieces)) if size.saturating_add(bytes) <= most => {
                *size += bytes;
                pieces.push(part);
            }
            _ => files.push((bytes, vec![part])),
        }
    }
    let name = |i: usize| match files.len() {
        1 => "model.safetensors".to_owned(),
        n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    let mut map = BTreeMap::new();
    for (i, (_, pieces)) in files.iter().enumerate() {
        write_file(source, dtype, &dir.join(name(i)), pieces)?;
        map.extend(pieces.iter().map(|(_, piece)| (piece.name.clone(), name(i))));
    }
    if files.len() > 1 {
        let total: usize = files.iter().map(|(bytes, _)| bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json(dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

/// A tensor of `dtype`, or of the type that it has.
fn spec(source: &Source, dtype: Option<Dtype>, piece: &Piece) -> TensorSpec {
    TensorSpec::new(piece.name.clone(), piece.shape.clone(), dtype.unwrap_or_else(|| source.dtype(piece)))
}

fn write_file(source: &Source, dtype: Option<Dtype>, path: &Path, pieces: &[Part<'_>]) -> Result<(), TrainError> {
    let specs = pieces.iter().map(|(_, piece)| spec(source, dtype, piece)).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let plan = TensorPlan::new(path, &metadata, specs, pieces.iter().map(|_| 1))?;
    File::create(path).map_err(TrainError::io("create", path))?;
    let mut failed = None;
    // One tensor at a time; after one that cannot be read, the end.
    let mut data = pieces.iter().map_while(|(entry, piece)| match source.piece(entry, piece) {
        Ok(values) => Some(Bytes::new(values, spec(source, dtype, piece).dtype)),
        Err(error) => {
            failed = Some(error);
            None
        }
    });
    let mut writer = PieceWriter::open(&plan)?;
    let written = (0..plan.pieces().len()).try_for_each(|i| writer.write(i, &mut data).map(drop));
    drop(data);
    match failed {
        Some(error) => Err(error),
        None => Ok(written.and_then(|()| writer.finish())?),
    }
}

/// The bytes of a tensor: of the values themselves, or what they became.
enum Bytes {
    Values(Vec<f32>),
    Others(Vec<u8>),
}

impl Bytes {
    fn new(values: Vec<f32>, dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Values(values),
            // There is no other type than these that `Target::named` makes.
            dtype => Self::Others(encode_f32(&values, dtype).unwrap_or_default().into_owned()),
        }
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Values(values) => bytemuck::cast_slice(values),
            Self::Others(bytes) => bytes,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use firebox_models::transformer::hf::Family;
    use firebox_models::transformer::presets;

    use super::*;
    use crate::checkpoint::TensorFile;

    #[test]
    fn several_files_are_read_as_one() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = presets::depth(2, 31);
        let entries = Family::of(&config).entries(&config);
        let pieces: Vec<&Piece> = entries.iter().flat_map(|entry| &entry.pieces).collect();
        let specs: Vec<TensorSpec> =
            pieces.iter().map(|piece| TensorSpec::f32(&piece.name, piece.shape.clone())).collect();
        let plan =
            TensorPlan::new(from.path().join("model.safetensors"), &BTreeMap::new(), specs, pieces.iter().map(|_| 1))
                .unwrap();
        File::create(from.path().join("model.safetensors")).unwrap();
        let mut writer = PieceWriter::open(&plan).unwrap();
        let values = |piece: &&Piece| {
            let n: usize = piece.shape.iter().product();
            Bytes::Values((0..n).map(|i| i as f32 + piece.name.len() as f32).collect())
        };
        let mut data = pieces.iter().map(values);
        for i in 0..plan.pieces().len() {
            writer.write(i, &mut data).unwrap();
        }
        write_json(from.path().join("config.json"), &Family::of(&config).config_json(&config)).unwrap();

        let source = Source::of(crate::model_io::Folder::open(from.path()).unwrap()).unwrap();
        weights(&source, None, to.path(), 100_000).unwrap();
        let (want, got) = (TensorFile::open(from.path()).unwrap(), TensorFile::open(to.path()).unwrap());
        assert!(got.path().ends_with("model.safetensors.index.json"));
        assert_eq!(want.names().collect::<Vec<_>>(), got.names().collect::<Vec<_>>());
        assert!(want.names().all(|name| want.bytes(name).unwrap() == got.bytes(name).unwrap()));
        let sizes = fs::read_dir(to.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        let sizes: Vec<u64> = sizes.collect();
        // The largest tensors, of 180 kB, have a file each.
        assert!(sizes.len() > 3 && sizes.iter().all(|size| *size < 181_000), "{sizes:?}");
    }
}
