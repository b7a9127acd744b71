//! Checkpoints of quantized decoders: written tensor by tensor, and opened as packed weights that compute as they are.
//!
//! A folder like any other model's (`config.json`, `model.safetensors`, `tokenizer.json`), in whose `config.json` is
//!
//! ```json
//! "quantization_config": {
//!   "quant_method": "firebox",
//!   "version": 1,
//!   "tensors": { "blocks.0.attn.qkv.weight": "int4-g128", "embed.weight": "int8-channel" }
//! }
//! ```
//!
//! with a [format](firebox_compress::format) for every quantized parameter, by its path in the module, so that each can have another. Such a parameter is a matrix
//! `[out, in]` (`[V, D]` for tables) of these tensors:
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `NAME.codes` | I8 (int8), or U8 | `[out, ceil(in bits / 8)]`: the codes of a row one after the other, each from the lowest free bit of a byte on; integers of less than 8 bits plus `2^(bits - 1)` |
//! | `NAME.scales` | F16 for groups of 32, 64, 128, else F32 | `[out, groups of a row]`, or `[1, 1]` for one of the whole tensor |
//! | `NAME.zeros` | I8 | the same; not for symmetric formats |
//!
//! All other parameters are stored as always. In memory, `int8` (symmetric, per channel or tensor) takes its 8 bits a weight and `int4`, `nf4`, `int3` and `int2` take 4; see
//! [`PackedMatrix`] for how they compute. Where there is no kernel (fp8, int8 with zero points or in groups, experts, positions) a parameter is loaded in f32.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use firebox_compress::format::{Element, Format, Group, NF4_LEVELS, ScalarFormat};
use firebox_compress::quantize::{Ranges, nearest};
use firebox_compress::{CompressError, Matrix, Quantized};
use firebox_data::Tokenizer;
use firebox_models::transformer::hf::{Entry, Family, HfError};
use firebox_models::transformer::packed::{can_be_packed, from_matrix, matrix_shape, to_matrix};
use firebox_models::transformer::{Transformer, TransformerConfig};
use firebox_tensor::ops::{PackedError, PackedMatrix, Scales};
use half::f16;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{CheckpointError, Dtype, TensorFile, TensorSpec, header};
use crate::model_io::{Later, check_shapes, encoded, filled, set_later, specs};

/// The key of `config.json`.
const KEY: &str = "quantization_config";

/// Its `quant_method`.
const METHOD: &str = "firebox";

const VERSION: u64 = 1;

/// The values of a parameter.
#[derive(Debug, Clone)]
pub enum Weights {
    /// In f32, in the layout of the parameter.
    Full(Vec<f32>),
    /// As a matrix `[out, in]`, see [`matrix_shape`].
    Quantized(Quantized),
}

/// Which parameters of a checkpoint are quantized, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    quant_method: String,
    version: u64,
    tensors: BTreeMap<String, Format>,
}

/// A quantized parameter as its file has it.
struct Stored {
    name: String,
    format: ScalarFormat,
    /// That of the parameter.
    shape: Vec<usize>,
    matrix: [usize; 2],
    /// Codes, scales, and zero points where there are any.
    specs: Vec<TensorSpec>,
}

impl Stored {
    fn new(entry: &Entry, format: Format) -> Result<Self, TrainError> {
        let key = |expected, got: &str| HfError::Key {
            key: format!("{KEY}.tensors.{}", entry.param),
            expected,
            got: got.to_owned(),
        };
        let Format::Scalar(format) = format else {
            return Err(
                key("a format of single weights: GGUF's blocks are for GGUF's files", &format.to_string()).into()
            );
        };
        let Some(matrix) = matrix_shape(&entry.param, &entry.shape) else {
            return Err(key("the name of a matrix", "a vector").into());
        };
        let ([rows, cols], bits) = (matrix, format.element().bits() as usize);
        let group = format.group_len(rows, cols)?;
        let scales = match format.group() {
            Group::Tensor => [1, 1],
            Group::Channel | Group::Of(_) => [rows, cols / group.max(1)],
        };
        let of =
            |part: &str, shape: [usize; 2], dtype| TensorSpec::new(format!("{}.{part}", entry.param), shape, dtype);
        let codes = if format.element() == Element::Int8 { Dtype::I8 } else { Dtype::U8 };
        let of_scales = if matches!(format.group(), Group::Of(_)) { Dtype::F16 } else { Dtype::F32 };
        let mut specs = vec![of("codes", [rows, (cols * bits).div_ceil(8)], codes), of("scales", scales, of_scales)];
        if !format.symmetric() {
            specs.push(of("zeros", scales, Dtype::I8));
        }
        Ok(Self { name: entry.param.clone(), format, shape: entry.shape.clone(), matrix, specs })
    }

    fn bits(&self) -> usize {
        self.format.element().bits() as usize
    }

    /// What is added to codes so that they are not negative.
    fn offset(&self) -> i16 {
        match self.format.element() {
            Element::Int4 | Element::Int3 | Element::Int2 => 1 << (self.bits() - 1),
            Element::Int8 | Element::Nf4 | Element::Fp8 => 0,
        }
    }

    /// Inputs that share a scale.
    fn group(&self) -> usize {
        match self.format.group() {
            Group::Tensor | Group::Channel => self.matrix[1],
            Group::Of(n) => n,
        }
    }

    /// Whether there is a kernel for it, and a place in the decoder.
    fn has_kernel(&self) -> bool {
        let inputs = self.matrix[1];
        can_be_packed(&self.name)
            && match self.format.element() {
                Element::Int8 => {
                    self.format.symmetric() && self.group() == inputs && inputs <= PackedMatrix::MAX_INT8_INPUTS
                }
                Element::Int4 | Element::Int3 | Element::Int2 | Element::Nf4 => {
                    PackedMatrix::has_group(inputs, self.group())
                }
                Element::Fp8 => false,
            }
    }

    /// The bytes of its tensors.
    fn encode(&self, weights: &Quantized) -> Vec<Vec<u8>> {
        let (cols, bits, offset) = (self.matrix[1], self.bits(), self.offset());
        let codes = match bits {
            8 => bytemuck::cast_slice(weights.codes()).to_vec(),
            _ => weights.codes().chunks_exact(cols.max(1)).flat_map(|row| packed_bits(row, bits, offset)).collect(),
        };
        let scales = match self.specs[1].dtype {
            Dtype::F16 => weights.scales().iter().flat_map(|&s| f16::from_f32(s).to_le_bytes()).collect(),
            _ => bytemuck::cast_slice(weights.scales()).to_vec(),
        };
        let zeros = bytemuck::cast_slice(weights.zeros()).to_vec();
        [codes, scales, zeros].into_iter().take(self.specs.len()).collect()
    }

    /// A scale for each group of each row.
    fn scales(&self, file: &TensorFile) -> Result<Vec<f32>, TrainError> {
        let name = &self.specs[1].name;
        let scales = file.f32(name)?;
        if let Some(bad) = scales.iter().find(|scale| !scale.is_finite()) {
            return Err(
                CheckpointError::torn(file.path(), format!("finite numbers in `{name}`"), bad.to_string()).into()
            );
        }
        Ok(scales)
    }

    fn zeros(&self, file: &TensorFile) -> Result<Vec<i8>, TrainError> {
        let Some(spec) = self.specs.get(2) else { return Ok(vec![]) };
        let zeros: Vec<i8> = bytemuck::cast_slice(file.bytes(&spec.name)?).to_vec();
        let (first, last) = self.format.codes();
        match zeros.iter().find(|&&zero| zero < first || zero > last) {
            Some(&code) => Err(CompressError::Code { format: self.format.to_string(), code }.into()),
            None => Ok(zeros),
        }
    }

    /// As kernels take it.
    fn packed(&self, file: &TensorFile) -> Result<PackedMatrix, TrainError> {
        let [rows, cols] = self.matrix;
        let bytes = file.bytes(&self.specs[0].name)?;
        let (mut scales, zeros) = (self.scales(file)?, self.zeros(file)?);
        if self.format.group() == Group::Tensor {
            scales = vec![scales[0]; rows];
        }
        let damaged = |e: PackedError| CheckpointError::torn(file.path(), self.name.clone(), e.to_string());
        if self.format.element() == Element::Int8 {
            return Ok(PackedMatrix::int8(self.matrix, bytemuck::cast_slice(bytes), scales).map_err(damaged)?);
        }
        let offset = self.offset();
        let levels = match self.format.element() {
            Element::Nf4 => NF4_LEVELS,
            // Zero points are moved with the codes.
            _ if !self.format.symmetric() => std::array::from_fn(|code| code as f32),
            _ => std::array::from_fn(|code| code as f32 - f32::from(offset)),
        };
        let zeros: Vec<u8> = zeros.iter().map(|&zero| (i16::from(zero) + offset) as u8).collect();
        let zeros = match self.format.group() {
            _ if self.format.symmetric() => None,
            Group::Tensor => Some(vec![zeros[0]; rows]),
            Group::Channel | Group::Of(_) => Some(zeros),
        };
        let scales = match self.format.group() {
            Group::Of(_) => Scales::F16(scales.iter().map(|&s| f16::from_f32(s).to_bits()).collect()),
            Group::Tensor | Group::Channel => Scales::F32(scales),
        };
        let widened: Vec<u8>;
        let codes = match self.bits() {
            4 => bytes,
            bits => {
                // The kernel's codes have 4 bits.
                let wide = |row: &[u8]| packed_bits(&unpacked_bits(row, cols, bits, 0), 4, 0);
                widened = bytes.chunks_exact((cols * bits).div_ceil(8)).flat_map(wide).collect();
                &widened
            }
        };
        Ok(PackedMatrix::int4(self.matrix, self.group(), codes, scales, zeros, levels).map_err(damaged)?)
    }

    /// As numbers, in the parameter's layout.
    fn values(&self, file: &TensorFile) -> Result<Vec<f32>, TrainError> {
        let (bytes, bits, cols) = (file.bytes(&self.specs[0].name)?, self.bits(), self.matrix[1]);
        let codes = match bits {
            8 => bytemuck::cast_slice(bytes).to_vec(),
            _ => {
                let rows = bytes.chunks_exact((cols * bits).div_ceil(8));
                rows.flat_map(|row| unpacked_bits(row, cols, bits, self.offset())).collect()
            }
        };
        let quantized = Quantized::new(self.format, self.matrix, codes, self.scales(file)?, self.zeros(file)?)?;
        Ok(from_matrix(&self.name, &self.shape, quantized.dequantize().into_values()))
    }
}

/// A matrix of linear layers `[in, out]` in NF4, as kernels take it; none of one that is not finite. Where `group` does not divide the inputs, an output has one scale.
pub(crate) fn nf4(name: &str, shape: [usize; 2], values: Vec<f32>, group: usize) -> Option<PackedMatrix> {
    let [inputs, outputs] = shape;
    let group = if inputs.is_multiple_of(group) { Group::Of(group) } else { Group::Channel };
    let format = ScalarFormat::new(Element::Nf4, group, true).ok()?;
    let matrix = Matrix::new(outputs, inputs, to_matrix(name, &shape, values)).ok()?;
    let quantized = nearest(&matrix, format, Ranges::Absmax).ok()?;
    let codes: Vec<u8> = quantized.codes().chunks_exact(inputs).flat_map(|row| packed_bits(row, 4, 0)).collect();
    let scales = match group {
        Group::Of(_) => Scales::F16(quantized.scales().iter().map(|&s| f16::from_f32(s).to_bits()).collect()),
        Group::Channel | Group::Tensor => Scales::F32(quantized.scales().to_vec()),
    };
    let group = quantized.group_len();
    PackedMatrix::int4([outputs, inputs], group, &codes, scales, None, NF4_LEVELS).ok()
}

/// Codes one after the other from the lowest bit on, each `offset` larger; the row ends with its last byte.
fn packed_bits(codes: &[i8], bits: usize, offset: i16) -> Vec<u8> {
    let mut bytes = vec![0u8; (codes.len() * bits).div_ceil(8)];
    for (i, &code) in codes.iter().enumerate() {
        let (at, wide) = (i * bits, (((i16::from(code) + offset) as u16) & ((1 << bits) - 1)) << (i * bits % 8));
        bytes[at / 8] |= wide as u8;
        if wide > 0xff {
            bytes[at / 8 + 1] |= (wide >> 8) as u8;
        }
    }
    bytes
}

/// The inverse of [`packed_bits`], of `n` codes.
fn unpacked_bits(bytes: &[u8], n: usize, bits: usize, offset: i16) -> Vec<i8> {
    (0..n)
        .map(|i| {
            let at = i * bits;
            let wide = u16::from(bytes[at / 8]) | u16::from(bytes.get(at / 8 + 1).copied().unwrap_or(0)) << 8;
            ((wide >> (at % 8) & ((1 << bits) - 1)) as i16 - offset) as i8
        })
        .collect()
}

/// The quantized parameters of a checkpoint, which others than kernels read.
pub(crate) struct Numbers(BTreeMap<String, Stored>);

impl Numbers {
    /// The values of a parameter in f32, in its own layout; `None` if it is not quantized.
    pub fn values(&self, name: &str, file: &TensorFile) -> Result<Option<Vec<f32>>, TrainError> {
        let Some(stored) = self.0.get(name) else { return Ok(None) };
        let values = stored.values(file)?;
        stored.specs.iter().for_each(|spec| file.release(&spec.name));
        Ok(Some(values))
    }
}

impl Quantization {
    /// What `config.json` says; `None` if the model is not quantized.
    ///
    /// # Errors
    /// [`HfError`]: another method than Firebox's, a newer version, or something that is no format.
    pub fn of(json: &Value) -> Result<Option<Self>, HfError> {
        let Some(value) = json.get(KEY).filter(|value| !value.is_null()) else { return Ok(None) };
        let key = |key: &str, expected, got: String| HfError::Key { key: format!("{KEY}{key}"), expected, got };
        match value.get("quant_method").and_then(Value::as_str) {
            Some(METHOD) => {}
            other => {
                let got = other.unwrap_or("nothing").to_owned();
                return Err(key(".quant_method", "\"firebox\": load the model that was quantized instead", got));
            }
        }
        match value.get("version").and_then(Value::as_u64) {
            Some(VERSION) => {}
            other => return Err(key(".version", "1", other.map_or("nothing".into(), |v| v.to_string()))),
        }
        let expected = "the formats of tensors by their names";
        serde_json::from_value(value.clone()).map(Some).map_err(|e| key("", expected, e.to_string()))
    }

    /// The formats of the quantized parameters, by path.
    pub fn tensors(&self) -> &BTreeMap<String, Format> {
        &self.tensors
    }

    /// The quantized parameters, and the entries of the others.
    fn divide(&self, entries: Vec<Entry>) -> Result<(Vec<Stored>, Vec<Entry>), TrainError> {
        let unknown = |name: &&String| !entries.iter().any(|entry| entry.param == **name);
        if let Some(name) = self.tensors.keys().find(unknown) {
            let (key, expected) = (format!("{KEY}.tensors"), "names of this decoder's matrices");
            return Err(HfError::Key { key, expected, got: format!("`{name}`") }.into());
        }
        let (quantized, others): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| self.tensors.contains_key(&entry.param));
        let stored = quantized.iter().map(|entry| Stored::new(entry, self.tensors[&entry.param]));
        Ok((stored.collect::<Result<_, _>>()?, others))
    }

    /// The same, of a file that has all of it.
    fn checked(&self, entries: Vec<Entry>, file: &TensorFile) -> Result<(Vec<Stored>, Vec<Entry>), TrainError> {
        let (stored, others) = self.divide(entries)?;
        let expected: Vec<_> = stored.iter().flat_map(|stored| stored.specs.iter().cloned()).collect();
        check_shapes(&others, &expected, file)?;
        for spec in &expected {
            let got = file.dtype(&spec.name)?;
            if got != spec.dtype {
                return Err(CheckpointError::WrongKind {
                    path: file.path().to_owned(),
                    expected: format!("`{}` in {}", spec.name, spec.dtype),
                    got: got.to_string(),
                }
                .into());
            }
        }
        Ok((stored, others))
    }

    /// The quantized parameters of a file, to be read as numbers.
    pub(crate) fn numbers(&self, entries: Vec<Entry>, file: &TensorFile) -> Result<Numbers, TrainError> {
        let (stored, others) = self.checked(entries, file)?;
        others.iter().flat_map(|entry| &entry.pieces).try_for_each(|piece| file.check_floats(&piece.name))?;
        Ok(Numbers(stored.into_iter().map(|stored| (stored.name.clone(), stored)).collect()))
    }

    /// The model with the parameters of `file`.
    pub(crate) fn load(
        &self,
        model: Transformer,
        entries: Vec<Entry>,
        file: TensorFile,
    ) -> Result<Transformer, TrainError> {
        let (stored, others) = self.checked(entries, &file)?;
        let file = Arc::new(file);
        // First of all the question whether the device can use any.
        let mut model = filled(model.with_packed([])?, others, file.clone())?;
        let mut values = vec![];
        for stored in stored {
            if stored.has_kernel() {
                model = model.with_packed([(stored.name.clone(), Arc::new(stored.packed(&file)?))])?;
            } else {
                let made = stored.values(&file)?;
                values.push((stored.name.clone(), Box::new(move || made) as Later));
            }
            stored.specs.iter().for_each(|spec| file.release(&spec.name));
        }
        Ok(set_later(model, values.into_iter().collect()))
    }
}

/// Writes a quantized decoder into the folder `dir`, which must not exist: aside, flushed, and renamed. `weights` is asked for one parameter after the other, those of
/// `formats` quantized so, and nothing of them is kept. Without formats it is a checkpoint like any other.
///
/// # Errors
/// [`TrainError`]: a folder that exists, formats for what is no matrix, weights that are not what was asked for, and all that can go wrong with files.
pub fn save(
    dir: &Path,
    config: &TransformerConfig,
    formats: &BTreeMap<String, ScalarFormat>,
    tokenizer: Option<&Tokenizer>,
    mut weights: impl FnMut(&str) -> Result<Weights, TrainError>,
) -> Result<(), TrainError> {
    if dir.exists() {
        let expected = "a folder that does not exist yet".into();
        return Err(TrainError::Input { what: "output", expected, got: dir.display().to_string() });
    }
    let family = Family::of(config);
    let tensors = formats.iter().map(|(name, format)| (name.clone(), Format::Scalar(*format))).collect();
    let quantization = Quantization { quant_method: METHOD.into(), version: VERSION, tensors };
    let entries = family.entries(config);
    let (stored, others) = quantization.divide(entries.clone())?;
    let aside = Aside::new(dir)?;
    let mut json = family.config_json(config);
    if !formats.is_empty() {
        json[KEY] = serde_json::to_value(&quantization).map_err(not_written(dir))?;
    }
    let text = serde_json::to_vec_pretty(&json).map_err(not_written(dir))?;
    write(&aside.0.join("config.json"), |file| file.write_all(&text))?;
    if let Some(tokenizer) = tokenizer {
        let path = aside.0.join("tokenizer.json");
        tokenizer.save(&path)?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::io("flush", &path))?;
    }
    // Wide types first, so that each lies at a multiple of its size.
    let mut all: Vec<_> = others.iter().flat_map(specs).collect();
    all.extend(stored.iter().flat_map(|stored| stored.specs.iter().cloned()));
    all.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
    let path = aside.0.join("model.safetensors");
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let (head, size) = header(&path, &metadata, &all)?;
    let mut places = BTreeMap::new();
    let mut at = head.len() as u64;
    for spec in &all {
        // `header` has added them up already.
        let n = spec.n_bytes().unwrap_or(0);
        places.insert(spec.name.as_str(), (at, n));
        at += n as u64;
    }
    let mut file = BufWriter::new(File::create(&path).map_err(TrainError::io("create", &path))?);
    let io = |source| TrainError::Io { operation: "write", path: path.clone(), source };
    file.get_ref().set_len(size).and_then(|()| file.write_all(&head)).map_err(io)?;
    for entry in &entries {
        let quantized = stored.iter().find(|stored| stored.name == entry.param);
        let (specs, bytes) = match (quantized, weights(&entry.param)?) {
            (None, Weights::Full(values)) if values.len() == entry.shape.iter().product::<usize>() => {
                (specs(entry), encoded(entry, &values))
            }
            (Some(stored), Weights::Quantized(values))
                if values.format() == stored.format && [values.rows(), values.cols()] == stored.matrix =>
            {
                (stored.specs.clone(), stored.encode(&values))
            }
            (_, got) => {
                let expected = match quantized {
                    Some(Stored { format, matrix, .. }) => {
                        format!("{matrix:?} weights in {format} for {}", entry.param)
                    }
                    None => format!("{:?} weights in f32 for {}", entry.shape, entry.param),
                };
                let got = match got {
                    Weights::Full(values) => format!("{} in f32", values.len()),
                    Weights::Quantized(q) => format!("[{}, {}] in {}", q.rows(), q.cols(), q.format()),
                };
                return Err(TrainError::Input { what: "quantized model", expected, got });
            }
        };
        for (spec, bytes) in specs.iter().zip(bytes) {
            let (at, n) = places[spec.name.as_str()];
            debug_assert_eq!(n, bytes.len());
            file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&bytes)).map_err(io)?;
        }
    }
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(io)?;
    drop(file);
    aside.publish(dir)
}

fn not_written(path: &Path) -> impl FnOnce(serde_json::Error) -> TrainError {
    let path = path.to_owned();
    move |source| CheckpointError::Json { operation: "write", path, expected: "JSON", source }.into()
}

/// Writes a file and flushes it.
fn write(path: &Path, content: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), TrainError> {
    let written = File::create(path).and_then(|mut file| content(&mut file).and_then(|()| file.sync_all()));
    written.map_err(TrainError::io("write", path))
}

/// A folder that is removed unless it becomes the one that is wanted.
struct Aside(PathBuf);

impl Aside {
    /// Beside `dir`, so that it can be renamed.
    fn new(dir: &Path) -> Result<Self, TrainError> {
        let Some(name) = dir.file_name() else {
            let expected = "the name of a folder".into();
            return Err(TrainError::Input { what: "output", expected, got: dir.display().to_string() });
        };
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let path = parent.join(format!(".{}.tmp-{}", name.to_string_lossy(), std::process::id()));
        // Of a process of the same number that was killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(TrainError::io("create", &path))?;
        Ok(Self(path))
    }

    fn publish(self, dir: &Path) -> Result<(), TrainError> {
        fs::rename(&self.0, dir).map_err(TrainError::io("create", dir))?;
        // Folders cannot be flushed everywhere.
        if let Some(parent) = self.0.parent() {
            let _ = File::open(parent).and_then(|parent| parent.sync_all());
        }
        Ok(())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
