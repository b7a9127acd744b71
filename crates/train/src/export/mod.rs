//! Models for other programs: Hugging Face's `transformers`, llama.cpp, ONNX Runtime.
//!
//! A model goes out tensor by tensor: each is read, converted, written and forgotten, so that one larger than memory can be exported. What the other program has no
//! word for is refused before anything is written.

pub(crate) mod gguf;
mod hf;
mod onnx;
mod source;
pub(crate) mod vocabulary;

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use firebox_compress::blocks::BlockType;
use firebox_compress::gguf::GgufError;
use firebox_compress::onnx::OnnxError;

use firebox_models::transformer::hf::Family;

use crate::checkpoint::Dtype;
use crate::{TrainError, model_io, reshape};
use source::Source;

/// A file format, and how it stores the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A folder that `transformers` loads: F32, F16 or BF16, or each tensor as it is stored.
    Hf(Option<Dtype>),
    /// A file that llama.cpp loads.
    Gguf(BlockType),
    /// A folder that ONNX Runtime and Optimum load.
    Onnx(OnnxType),
}

/// How an ONNX model stores its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnnxType {
    /// 32-bit floats.
    F32,
    /// 8-bit integers with a scale per output, dequantized by the model itself (QDQ).
    Int8,
}

/// The formats.
const FORMATS: &str = "hf, gguf or onnx";

impl Target {
    /// The target of a format and a type by their names; without a type, f32 for HF and ONNX, f16 for GGUF.
    ///
    /// # Errors
    /// [`TrainError::Input`] lists the names there are.
    pub fn named(format: &str, kind: Option<&str>) -> Result<Self, TrainError> {
        let unknown = |what, expected: String, got: &str| Err(TrainError::Input { what, expected, got: got.into() });
        let find = |names: &[(&str, Self)], default: &str| {
            let kind = kind.unwrap_or(default).to_ascii_lowercase();
            match names.iter().find(|(name, _)| *name == kind) {
                Some((_, target)) => Ok(*target),
                None => {
                    let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
                    unknown("--type", format!("{} for {format}", names.join(", ")), &kind)
                }
            }
        };
        match format {
            "hf" => find(
                &[
                    ("f32", Self::Hf(Some(Dtype::F32))),
                    ("f16", Self::Hf(Some(Dtype::F16))),
                    ("bf16", Self::Hf(Some(Dtype::BF16))),
                    ("same", Self::Hf(None)),
                ],
                "f32",
            ),
            "gguf" => {
                let kind = kind.unwrap_or("f16");
                match BlockType::ALL.into_iter().find(|block| block.name().eq_ignore_ascii_case(kind)) {
                    Some(block) => Ok(Self::Gguf(block)),
                    None => {
                        let names = BlockType::ALL.map(|block| block.name().to_ascii_lowercase()).join(", ");
                        unknown("--type", format!("{names} for gguf"), kind)
                    }
                }
            }
            "onnx" => find(&[("f32", Self::Onnx(OnnxType::F32)), ("int8", Self::Onnx(OnnxType::Int8))], "f32"),
            other => unknown("--format", FORMATS.into(), other),
        }
    }
}

/// `hf`, `gguf:q8_0`, `onnx:int8`: a format, and a type after a colon.
impl FromStr for Target {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Self, TrainError> {
        match text.split_once(':') {
            Some((format, kind)) => Self::named(format, Some(kind)),
            None => Self::named(text, None),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The file or folder.
    pub path: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Tensors with rows that the asked-for type cannot hold, and the type they got instead.
    pub fallbacks: Vec<(String, BlockType)>,
}

/// Why a model cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The model has something that the format has no word for.
    #[error("cannot export to {format}: it has no {feature}{}", advice(format))]
    NoWord {
        /// The format.
        format: &'static str,
        /// What the model has.
        feature: String,
    },
    /// The format is for models that go on with text.
    #[error(
        "cannot export to {format}: it is for causal decoders here, and this is {model}; export it with --format hf"
    )]
    NoDecoder {
        /// The format.
        format: &'static str,
        /// What the model is.
        model: String,
    },
    /// The tokenizer is of a kind that the format has no word for.
    #[error("cannot export the tokenizer to {format}: expected {expected}, got {got}")]
    Tokenizer {
        /// The format.
        format: &'static str,
        /// What it has words for.
        expected: String,
        /// What the tokenizer is.
        got: String,
    },
    /// Something is there already.
    #[error("{} exists already: choose another --out, or remove it", .0.display())]
    Exists(PathBuf),
    /// Writing a GGUF file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Writing an ONNX model.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
}

fn advice(format: &str) -> &'static str {
    if format == "ONNX" { "" } else { "; ONNX has words for more: --format onnx" }
}

/// Writes the model at `path`, whatever [`load`](crate::model_io::load) opens, to `out`, which must not exist: a file for GGUF, a folder for the others. It gets
/// its name when it is whole.
///
/// # Errors
/// [`TrainError`]: no model there, one that the format has no word for, or the disk.
pub fn export(path: impl AsRef<Path>, target: Target, out: impl AsRef<Path>) -> Result<Exported, TrainError> {
    let path = path.as_ref();
    write(model_io::Folder::open(path)?, path, target, out.as_ref())
}

/// The same of an open folder.
pub(crate) fn write(folder: model_io::Folder, path: &Path, target: Target, out: &Path) -> Result<Exported, TrainError> {
    let mut source = Source::of(folder)?;
    if out.symlink_metadata().is_ok() {
        return Err(ExportError::Exists(out.to_path_buf()).into());
    }
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(TrainError::io("create", parent))?;
    }
    match target {
        Target::Gguf(_) => source.is_a_decoder("GGUF")?,
        Target::Onnx(_) => source.is_a_decoder("ONNX")?,
        Target::Hf(_) => {}
    }
    // No other program has words for layers that share parameters, or for products of them; but ALBERT is such a model.
    let folder_in = |parent: &Path| tempfile::Builder::new().prefix(".firebox-expand-").tempdir_in(parent);
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let expanding = source.family == Family::Firebox && !source.config.reduction.is_none();
    if expanding && source.config.encoder.is_some() && source.config.reduction.embed_dim > 0 {
        // Its positions are as narrow as its tokens.
        source.in_a_class("Hugging Face's format")?;
    }
    let aside = expanding.then(|| folder_in(parent)).transpose();
    let aside = aside.map_err(TrainError::io("create a folder in", parent))?;
    if let Some(aside) = &aside {
        let expanded = aside.path().join("model");
        reshape::expand(path, &expanded)?;
        source = Source::of(model_io::Folder::open(&expanded)?)?;
    }
    let fallbacks = match target {
        Target::Gguf(block) => gguf::write(&source, block, out)?,
        Target::Hf(dtype) => in_folder(out, |dir| hf::write(&source, dtype, dir)).map(|()| vec![])?,
        Target::Onnx(kind) => in_folder(out, |dir| onnx::write(&source, kind, dir)).map(|()| vec![])?,
    };
    Ok(Exported { path: out.to_path_buf(), bytes: size(out)?, fallbacks })
}

/// A folder that `fill` fills aside, and that gets its name when everything is on the disk.
fn in_folder(out: &Path, fill: impl FnOnce(&Path) -> Result<(), TrainError>) -> Result<(), TrainError> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let aside = tempfile::Builder::new().prefix(".firebox-export-").tempdir_in(parent);
    let aside = aside.map_err(TrainError::io("create a folder in", parent))?;
    // What is dropped before it has its name is removed; what has it is for others to read, too.
    let inner = aside.path().join("out");
    fs::create_dir(&inner).map_err(TrainError::io("create", &inner))?;
    fill(&inner)?;
    for entry in fs::read_dir(&inner).map_err(TrainError::io("read", &inner))? {
        let path = entry.map_err(TrainError::io("read", &inner))?.path();
        fs::File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::io("flush", &path))?;
    }
    fs::rename(&inner, out).map_err(TrainError::io("rename the finished folder to", out))
}

fn size(path: &Path) -> Result<u64, TrainError> {
    let found = fs::metadata(path).map_err(TrainError::io("read", path))?;
    if !found.is_dir() {
        return Ok(found.len());
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path).map_err(TrainError::io("read", path))? {
        let found = entry.and_then(|entry| entry.metadata()).map_err(TrainError::io("read", path))?;
        bytes += found.len();
    }
    Ok(bytes)
}

/// Writes JSON that people can read.
fn write_json(path: PathBuf, value: &serde_json::Value) -> Result<(), TrainError> {
    fs::write(&path, format!("{value:#}\n")).map_err(TrainError::io("write", &path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn targets_by_name() {
        assert_eq!(Target::named("gguf", None).unwrap(), Target::Gguf(BlockType::F16));
        assert_eq!("gguf:q4_k".parse::<Target>().unwrap(), Target::Gguf(BlockType::Q4_K));
        assert_eq!("onnx:int8".parse::<Target>().unwrap(), Target::Onnx(OnnxType::Int8));
        assert_eq!("hf:BF16".parse::<Target>().unwrap(), Target::Hf(Some(Dtype::BF16)));
        let error = |text: &str| text.parse::<Target>().unwrap_err().to_string();
        assert!(error("hf:q8_0").contains("f32, f16, bf16, same for hf"), "{}", error("hf:q8_0"));
        assert!(error("gguf:int8").contains("q6_k"), "{}", error("gguf:int8"));
        assert!(error("pickle").contains("hf, gguf or onnx"));
    }
}
