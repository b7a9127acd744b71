//! Decoders in checkpoints, and in the folders and files of others: parameters under Hugging Face's names, their shape, their tokenizer.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_data::Tokenizer;
use firebox_models::transformer::hf::{Entry, Family, HfError, is_passenger, parse_config};
use firebox_models::transformer::{Transformer, TransformerConfig};
use firebox_optim::{ParamInfo, is_trainable};
use firebox_tensor::ops::to_f32;
pub use firebox_tensor::ops::to_host;

use crate::TrainError;
use crate::adapter;
use crate::checkpoint::{Checkpoint, CheckpointError, LoadReport, TensorFile, TensorSpec, resolve};
use crate::quantized::Quantization;
use crate::sentences;
use crate::words::Words;

/// A model and the tokenizer it was trained with.
#[derive(Debug)]
pub struct Loaded {
    /// The decoder.
    pub model: Transformer,
    /// Its tokenizer, where the folder has one.
    pub tokenizer: Option<Tokenizer>,
}

/// Loads a decoder onto `device` from a run, a `checkpoints` folder, a checkpoint, a folder in Hugging Face's form (with one file of tensors or several, whose names may lack
/// `transformer.` or `model.`), or a GGUF file.
///
/// # Errors
/// [`TrainError`]: nothing there, a torn file, another architecture, or tensors that do not fit (all at once).
pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Loaded, TrainError> {
    let Folder { config, file, tokenizer, .. } = Folder::open(path.as_ref())?;
    Ok(Loaded { model: from_file(&config, file, device)?, tokenizer })
}

/// What a model is read from.
pub(crate) struct Folder {
    /// The `config.json`.
    pub config: serde_json::Value,
    /// The tensors.
    pub file: TensorFile,
    /// The tokenizer, where there is one.
    pub tokenizer: Option<Tokenizer>,
    /// What else there is for programs that write text with it, by file name: see [`SIDES`].
    pub sides: BTreeMap<&'static str, String>,
}

/// Files beside a model of Hugging Face that go where it goes: its chat template, special tokens, how text is generated, and what sentence-transformers makes of its hidden states.
pub(crate) const SIDES: [&str; 9] = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

impl Folder {
    /// Opens what [`load`] opens.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let folder = Self::as_it_is(path)?;
        let (family, config) = parse_config(&folder.config)?;
        Ok(folder.canonical(family, &config))
    }

    /// With the tensors under the names of the family's class with the head of `config`.
    fn canonical(self, family: Family, config: &TransformerConfig) -> Self {
        let names = family.canonical(config, self.file.names());
        Self { file: self.file.renamed(|name| names.get(name).cloned()), ..self }
    }

    /// With the tensors under the names of the file.
    fn as_it_is(path: &Path) -> Result<Self, TrainError> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file() {
            return crate::import::gguf::open(path);
        }
        let plain = path.join("config.json").is_file() && !path.join("manifest.json").is_file();
        if !plain && path.join(adapter::CONFIG).is_file() && !path.join("manifest.json").is_file() {
            return adapter::open_peft(path, None);
        }
        if !plain {
            return Self::of_checkpoint(&resolve(path)?.checkpoint);
        }
        let config_path = path.join("config.json");
        let text = fs::read(&config_path).map_err(TrainError::io("read", &config_path))?;
        let mut config = serde_json::from_slice(&text).map_err(|e| not_json(&e.to_string()))?;
        sentences::read_head(path, &mut config)?;
        let file = TensorFile::open(path)?;
        let tokenizer = tokenizer_of(path)?;
        let side = |name: &'static str| Some((name, fs::read_to_string(path.join(name)).ok()?));
        Ok(Self { config, file, tokenizer, sides: SIDES.into_iter().filter_map(side).collect() })
    }

    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self, TrainError> {
        let tokenizer = Self::tokenizer_of(checkpoint)?;
        let mut sides = BTreeMap::new();
        for name in SIDES.into_iter().filter(|name| checkpoint.contains(name)) {
            sides.insert(name, String::from_utf8_lossy(&checkpoint.bytes(name)?).into_owned());
        }
        let config = checkpoint.read_json("config.json")?;
        let (config, file) = match adapter::is_adapted(&config)? {
            // Whoever trains them asks for them: see `adapter::load`.
            true => adapter::merged(checkpoint)?,
            false => (config, checkpoint.tensors("model.safetensors")?),
        };
        Ok(Self { config, file, tokenizer, sides })
    }

    /// The tokenizer of a checkpoint, where it has one.
    pub fn tokenizer_of(checkpoint: &Checkpoint) -> Result<Option<Tokenizer>, TrainError> {
        Ok(match checkpoint.contains("tokenizer.json") {
            true => Some(Tokenizer::load(checkpoint.file("tokenizer.json")?)?),
            false => None,
        })
    }
}

/// The shape of what [`load`] loads.
pub(crate) fn shape_of(path: &Path) -> Result<TransformerConfig, TrainError> {
    Ok(parse_config(&Folder::as_it_is(path)?.config)?.1)
}

/// Loads a decoder from an open checkpoint.
///
/// # Errors
/// As [`load`].
pub fn load_checkpoint(checkpoint: &Checkpoint, device: &Device) -> Result<Loaded, TrainError> {
    let folder = Folder::of_checkpoint(checkpoint)?;
    let (family, shape) = parse_config(&folder.config)?;
    let Folder { config, file, tokenizer, .. } = folder.canonical(family, &shape);
    Ok(Loaded { model: from_file(&config, file, device)?, tokenizer })
}

/// Loads what [`load`] loads as a model of this shape, which differs in its head: what the file has not of the new head is initial, of `seed`, and what it has of another head is left. Where
/// the family's class with the new head would find a tensor in the file, as a classifier finds BERT's pooler, it is taken.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_with_head(
    path: &Path,
    config: &TransformerConfig,
    seed: u64,
    device: &Device,
) -> Result<Transformer, TrainError> {
    let folder = Folder::as_it_is(path)?;
    let (family, of_file) = parse_config(&folder.config)?;
    let folder = folder.canonical(family, config);
    let model = Transformer::new(config, seed, device)?;
    let there = |spec: &TensorSpec| folder.file.shape(&spec.name).is_ok_and(|shape| shape == spec.shape);
    let entries = family.entries(config);
    // A body that is not whole is an error; a head may be new. Our own names of heads' parts say not of which head.
    let same_head = std::mem::discriminant(&config.head) == std::mem::discriminant(&of_file.head);
    let kept = |entry: &Entry| match entry.param.split('.').next() {
        Some("task_head") if family == Family::Firebox && !same_head => false,
        Some("task_head" | "head" | "head_proj") => specs(entry).iter().all(there),
        _ => true,
    };
    let kept: Vec<Entry> = entries.into_iter().filter(kept).collect();
    let known = |name: &str| kept.iter().any(|entry| entry.pieces.iter().any(|piece| piece.name == name));
    let before: Vec<String> = family.entries(&of_file).iter().flat_map(specs).map(|spec| spec.name).collect();
    let before = family.canonical(config, before.iter().map(String::as_str));
    let left: Vec<TensorSpec> = before
        .into_values()
        .filter(|name| !known(name))
        .filter_map(|name| Some(TensorSpec::f32(&name, folder.file.shape(&name).ok()?)))
        .collect();
    check_shapes(&kept, &left, &folder.file)?;
    filled(model, kept, Arc::new(folder.file))
}

/// The tokenizer in a folder of Hugging Face. Old ones of BERT have a list of its tokens alone.
fn tokenizer_of(path: &Path) -> Result<Option<Tokenizer>, TrainError> {
    let [whole, list, config] = ["tokenizer.json", "vocab.txt", "tokenizer_config.json"].map(|name| path.join(name));
    if whole.is_file() {
        return Ok(Some(Tokenizer::load(whole)?));
    }
    if !list.is_file() {
        return Ok(None);
    }
    let read = |path: &Path| fs::read_to_string(path).map_err(TrainError::io("read", path));
    let config: serde_json::Value = match config.is_file() {
        true => serde_json::from_str(&read(&config)?).unwrap_or_default(),
        false => serde_json::Value::Null,
    };
    let flag = |key: &str| config[key].as_bool();
    let lowercase = flag("do_lower_case").unwrap_or(true);
    Ok(Some(Tokenizer::from_word_pieces(&read(&list)?, lowercase, flag("strip_accents"))?))
}

pub(crate) fn not_json(reason: &str) -> HfError {
    HfError::Key { key: "(file)".into(), expected: "JSON", got: reason.into() }
}

/// The model with the parameters of a file of a checkpoint.
///
/// # Errors
/// [`CheckpointError`]: tensors that do not fit, all at once.
pub(crate) fn load_parameters(model: Transformer, file: TensorFile) -> Result<Transformer, TrainError> {
    let entries = entries(&model);
    from_entries(model, entries, file)
}

/// Loads what [`load`] loads, with what it needs to read and write text.
///
/// # Errors
/// As [`load`]; [`TrainError::Input`] for a model without a tokenizer.
pub fn load_with_words(path: &Path, device: &Device) -> Result<(Transformer, Words), TrainError> {
    let Folder { config, file, tokenizer, sides } = Folder::open(path)?;
    let tokenizer = tokenizer.ok_or_else(|| Words::missing(path))?;
    let words = Words::new(tokenizer, sides, &config, path.display().to_string());
    Ok((from_file(&config, file, device)?, words))
}

/// The model of a `config.json` with the tensors of a file.
///
/// # Errors
/// As [`load`].
pub(crate) fn from_file(
    json: &serde_json::Value,
    file: TensorFile,
    device: &Device,
) -> Result<Transformer, TrainError> {
    let (family, config) = parse_config(json)?;
    let entries = family.entries(&config);
    // The initial values are replaced before they are made.
    let model = Transformer::new(&config, 0, device)?;
    match Quantization::of(json)? {
        Some(quantization) => quantization.load(model, entries, file),
        None => from_entries(model, entries, file),
    }
}

/// The model with the parameters that these entries are, from a file. Parameters are read when they are first used: a rank that needs a part of the model reads no more.
pub(crate) fn from_entries<M: Module>(model: M, entries: Vec<Entry>, file: TensorFile) -> Result<M, TrainError> {
    check_shapes(&entries, &[], &file)?;
    filled(model, entries, Arc::new(file))
}

/// The shapes have been checked.
pub(crate) fn filled<M: Module>(model: M, entries: Vec<Entry>, file: Arc<TensorFile>) -> Result<M, TrainError> {
    for piece in entries.iter().flat_map(|entry| &entry.pieces) {
        file.check_floats(&piece.name)?;
    }
    let read = |entry: Entry| {
        let (name, file) = (entry.param.clone(), file.clone());
        let values = move || {
            if let [whole] = &entry.pieces[..]
                && !whole.transposed
            {
                return file.f32(&whole.name).unwrap_or_default();
            }
            let mut param = vec![0f32; entry.shape.iter().product()];
            for piece in &entry.pieces {
                // It is there and has floats: that was checked, and the file is mapped.
                entry.join(&mut param, piece, &file.f32(&piece.name).unwrap_or_default());
            }
            param
        };
        (name, Box::new(values) as Later)
    };
    Ok(set_later(model, entries.into_iter().map(read).collect()))
}

/// Checks that a file has the tensors of these parameters, as floats.
pub(crate) fn check_tensors(entries: &[Entry], file: &TensorFile) -> Result<(), CheckpointError> {
    check_shapes(entries, &[], file)?;
    entries.iter().flat_map(|entry| &entry.pieces).try_for_each(|piece| file.check_floats(&piece.name))
}

/// What the decoder's tensors begin with in checkpoints of masked autoencoders, which load as their encoder.
pub(crate) const MAE: &str = "mae.";

/// Everything missing, unused and misshapen at once, of parameters and other tensors. Parts of classes that no part of ours is are no surprise.
pub(crate) fn check_shapes(entries: &[Entry], others: &[TensorSpec], file: &TensorFile) -> Result<(), CheckpointError> {
    let expected = entries.iter().flat_map(|e| e.pieces.iter().map(|p| (p.name.as_str(), p.shape.as_slice())));
    let others = others.iter().map(|spec| (spec.name.as_str(), spec.shape.as_slice()));
    let mut report = LoadReport::compare(expected.chain(others), file);
    // A class with a head has its body's name before all others.
    let is_decoder =
        |name: &str| name.starts_with(MAE) || name.split_once('.').is_some_and(|(_, bare)| bare.starts_with(MAE));
    report.unused.retain(|name| !(is_passenger(name) || is_decoder(name)));
    report.into_result(file.path())
}

/// The parameters of a model, and the tensors of a file that they become: under Hugging Face's names where the architecture has them. Learned steps of weights
/// keep our names.
pub(crate) fn entries(model: &Transformer) -> Vec<Entry> {
    let config = model.config();
    let mut entries = Family::of(config).entries(config);
    for (i, block) in model.blocks.iter().enumerate() {
        let mlp = block.mlp.iter().flat_map(|mlp| [("mlp.input", &mlp.input), ("mlp.output", &mlp.output)]);
        let layers = [("attn.qkv", &block.attn.qkv), ("attn.out", &block.attn.out)].into_iter().chain(mlp);
        for (layer, linear) in layers {
            let Some(steps) = linear.quantizer.as_ref().and_then(|quantizer| quantizer.steps.as_ref()) else {
                continue;
            };
            let (name, shape) = (format!("blocks.{i}.{layer}.quantizer.steps"), steps.lazy_shape().to_vec());
            entries.push(Entry::whole(&name, &shape, &name));
        }
    }
    entries
}

/// The parameters of a model whose files have its own names.
pub(crate) fn own_entries<M: Module>(model: &M) -> Vec<Entry> {
    struct Visitor {
        path: Vec<String>,
        entries: Vec<Entry>,
    }
    impl ModuleVisitor for Visitor {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let name = self.path.join(".");
            self.entries.push(Entry::whole(&name, &param.lazy_shape(), &name));
        }
    }
    let mut visitor = Visitor { path: vec![], entries: vec![] };
    model.visit(&mut visitor);
    visitor.entries
}

/// Names and shapes of the tensors that a parameter becomes.
pub(crate) fn specs(entry: &Entry) -> Vec<TensorSpec> {
    entry.pieces.iter().map(|piece| TensorSpec::f32(piece.name.clone(), piece.shape.clone())).collect()
}

/// The bytes of these tensors, from the parameter's values.
pub(crate) fn encoded(entry: &Entry, values: &[f32]) -> Vec<Vec<u8>> {
    let piece = |piece| bytemuck::cast_slice(&entry.split(values, piece)).to_vec();
    entry.pieces.iter().map(piece).collect()
}

/// Those of the float parameters whose path is `wanted`, flat and without gradients; the others are not made.
pub(crate) fn some_parameters<M: Module>(module: &M, wanted: &dyn Fn(&str) -> bool) -> Vec<(String, Tensor<1>)> {
    struct Visitor<'a> {
        path: Vec<String>,
        wanted: &'a dyn Fn(&str) -> bool,
        found: Vec<(String, Tensor<1>)>,
    }
    impl ModuleVisitor for Visitor<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let name = self.path.join(".");
            if !(self.wanted)(&name) {
                return;
            }
            let value = param.val();
            let value = to_f32(if value.device().is_autodiff() { value.inner() } else { value });
            let n = value.dims().iter().product::<usize>();
            self.found.push((name, value.reshape([n])));
        }
    }
    let mut visitor = Visitor { path: vec![], wanted, found: vec![] };
    module.visit(&mut visitor);
    visitor.found
}

/// The float parameters by path, flat and without gradients.
pub fn parameters<M: Module>(module: &M) -> Vec<(String, Tensor<1>)> {
    firebox_optim::values(module).into_iter().map(|(info, value)| (info.name, value)).collect()
}

/// Replaces parameters by values of the same number of elements, by path.
pub(crate) fn set_parameters<M: Module>(module: M, values: HashMap<String, Vec<f32>>) -> M {
    struct Mapper {
        path: Vec<String>,
        values: HashMap<String, Vec<f32>>,
    }
    impl ModuleMapper for Mapper {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(values) = self.values.remove(&self.path.join(".")) else { return param };
            let data = TensorData::new(values, param.lazy_shape().to_vec());
            let (id, device) = (param.id, param.lazy_device());
            param.transform_for_load(Tensor::from_data(data, &device), id)
        }
    }
    module.map(&mut Mapper { path: vec![], values })
}

/// Values that are made or read when they are needed, by whom has them alone.
pub(crate) type Later = Box<dyn FnOnce() -> Vec<f32> + Send + Sync>;

/// The float parameters of a module by path, none of which is made before its values are asked for. With the module gone, each is alone.
pub(crate) fn later<M: Module>(module: &M) -> Vec<(ParamInfo, Later)> {
    struct Visitor {
        path: Vec<String>,
        found: Vec<(ParamInfo, Later)>,
    }
    impl ModuleVisitor for Visitor {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let (name, shape) = (self.path.join("."), param.lazy_shape().to_vec());
            let (info, param) = (ParamInfo { name, shape, trainable: is_trainable(param) }, param.clone());
            let values = move || {
                let value = param.into_value();
                to_host(value)
            };
            self.found.push((info, Box::new(values)));
        }
    }
    let mut visitor = Visitor { path: vec![], found: vec![] };
    module.visit(&mut visitor);
    visitor.found
}

/// [`set_parameters`] with values that are asked for when a parameter is used.
pub(crate) fn set_later<M: Module>(module: M, values: HashMap<String, Later>) -> M {
    struct Mapper {
        path: Vec<String>,
        values: HashMap<String, Later>,
    }
    impl ModuleMapper for Mapper {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(values) = self.values.remove(&self.path.join(".")) else { return param };
            let (shape, trainable) = (param.lazy_shape(), is_trainable(&param));
            let dims = shape.to_vec();
            let init = move |device: &Device, require_grad: bool| {
                Tensor::from_data(TensorData::new(values(), dims), device).set_require_grad(require_grad)
            };
            Param::uninitialized(param.id, init, param.lazy_device(), trainable, shape)
        }
    }
    module.map(&mut Mapper { path: vec![], values })
}
