//! Adapters in checkpoints: beside them stands where the model is that they belong to, and what it is.
//!
//! A checkpoint of a run with adapters that started from a model has `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, with the parameters that are trained and no others, and
//! `base.json` in place of `model.safetensors`: the path of the model and the SHA-256 of its files. Whoever opens it opens the model, and refuses one that has changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use burn::module::Module;
use burn::tensor::Device;
use firebox_models::transformer::hf::adapter::PREFIX;
use firebox_models::transformer::hf::{Entry, Family, parse_config};
use firebox_models::transformer::{Adapted, AdapterConfig, Transformer, TransformerConfig, merge_adapter};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::TrainError;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, TensorFile, TensorSpec, resolve};
use crate::export::{self, Exported, Target};
use crate::model_io::{Folder, Loaded, check_shapes, filled, specs};

/// The parameters that are trained, under PEFT's names.
pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
/// What they are, as PEFT says it.
pub(crate) const CONFIG: &str = "adapter_config.json";

/// `base.json`: the model that adapters belong to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Base {
    /// A run, a checkpoint, a folder in Hugging Face's form or a GGUF file.
    pub path: PathBuf,
    /// Of its files with tensors, one after the other.
    pub sha256: String,
}

impl Base {
    pub const FILE: &'static str = "base.json";

    /// The model in a place.
    pub fn of(path: &Path) -> Result<Self, TrainError> {
        let path = std::path::absolute(path).map_err(TrainError::io("find", path))?;
        let sha256 = Folder::open(&path)?.file.sha256()?;
        Ok(Self { path, sha256 })
    }

    /// Opens it for what is in `of`.
    fn open(&self, of: &Path) -> Result<Folder, TrainError> {
        let fail =
            |expected: String, got: String| TrainError::Input { what: "the model of these adapters", expected, got };
        if !self.path.exists() {
            let expected = format!("{} where it was, as {}/{} says", self.path.display(), of.display(), Self::FILE);
            return Err(fail(expected, "nothing there".into()));
        }
        let folder = Folder::open(&self.path)?;
        let found = folder.file.sha256()?;
        if found != self.sha256 {
            let expected = format!("{} as it was (SHA-256 {})", self.path.display(), self.sha256);
            return Err(fail(expected, format!("another ({found})")));
        }
        Ok(folder)
    }
}

/// Whether a `config.json` is that of a model with adapters.
pub(crate) fn is_adapted(config: &Value) -> Result<bool, TrainError> {
    Ok(parse_config(config)?.1.adapter.is_some())
}

/// What a run with adapters keeps: the parameters that are trained, beside where the model is.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub base: Base,
    /// Names of the trained parameters of the whole model, of which a rank may have some.
    trained: BTreeSet<String>,
}

impl Kept {
    /// Of a model that ranks have not yet divided, which started from the one at `base`.
    pub fn new<M: Module>(base: &Path, model: &M) -> Result<Self, TrainError> {
        Ok(Self { base: Base::of(base)?, trained: trained(model)? })
    }

    /// The tensors of its file: adapters under PEFT's names, others under theirs after PEFT's prefix.
    pub fn entries(&self, entries: Vec<Entry>) -> Vec<Entry> {
        trained_entries(&self.trained, entries)
    }
}

fn trained<M: Module>(model: &M) -> Result<BTreeSet<String>, TrainError> {
    let infos = firebox_optim::parameters(model)?.into_iter();
    Ok(infos.filter(|info| info.trainable).map(|info| info.name).collect())
}

fn trained_entries(trained: &BTreeSet<String>, entries: Vec<Entry>) -> Vec<Entry> {
    entries.into_iter().filter(|entry| trained.contains(&entry.param)).map(named).collect()
}

fn named(mut entry: Entry) -> Entry {
    for piece in entry.pieces.iter_mut().filter(|piece| !piece.name.starts_with(PREFIX)) {
        piece.name = format!("{PREFIX}{}", piece.name);
    }
    entry
}

/// Where the parameters of a checkpoint with adapters are.
struct Files {
    base: TensorFile,
    /// The same file, where a checkpoint has all of it.
    adapters: Option<TensorFile>,
}

impl Files {
    fn of(checkpoint: &Checkpoint) -> Result<Self, TrainError> {
        if !checkpoint.contains(Base::FILE) {
            return Ok(Self { base: checkpoint.tensors("model.safetensors")?, adapters: None });
        }
        let base: Base = checkpoint.read_json(Base::FILE)?;
        Ok(Self { base: base.open(checkpoint.path())?.file, adapters: Some(checkpoint.tensors(WEIGHTS)?) })
    }
}

/// The model of a checkpoint with its adapters beside it, to be trained on.
pub(crate) fn load(checkpoint: &Checkpoint, device: &Device) -> Result<Loaded, TrainError> {
    let (family, config) = parse_config(&checkpoint.read_json("config.json")?)?;
    let tokenizer = Folder::tokenizer_of(checkpoint)?;
    let (model, entries) = (Transformer::new(&config, 0, device)?, family.entries(&config));
    let Files { base, adapters } = Files::of(checkpoint)?;
    let Some(adapters) = adapters else {
        check_shapes(&entries, &[], &base)?;
        return Ok(Loaded { model: filled(model, entries, Arc::new(base))?, tokenizer });
    };
    let trained = trained_entries(&trained(&model)?, entries.clone());
    let names: BTreeSet<&String> = trained.iter().map(|entry| &entry.param).collect();
    let frozen: Vec<Entry> = entries.into_iter().filter(|entry| !names.contains(&entry.param)).collect();
    check_shapes(&trained, &[], &adapters)?;
    check_shapes(&frozen, &others(&frozen, &base)?, &base)?;
    let model = filled(model, frozen, Arc::new(base))?;
    Ok(Loaded { model: filled(model, trained, Arc::new(adapters))?, tokenizer })
}

/// The tensors of a file that are not of these entries, such as those of a head that another has replaced.
fn others(entries: &[Entry], file: &TensorFile) -> Result<Vec<TensorSpec>, TrainError> {
    let names: BTreeSet<&str> = entries.iter().flat_map(|e| &e.pieces).map(|piece| piece.name.as_str()).collect();
    let left = file.names().filter(|name| !names.contains(name));
    left.map(|name| Ok(TensorSpec::new(name, file.shape(name)?, file.dtype(name)?))).collect()
}

/// What the adapters of a folder of PEFT are, for a model of this shape.
pub(super) fn described(config: &TransformerConfig, path: &Path) -> Result<AdapterConfig, TrainError> {
    let plain = TransformerConfig { adapter: None, ..config.clone() };
    Ok(super::peft::adapters(path, Family::of(&plain), &plain)?.0)
}

/// The model with the adapters of another place: a folder of PEFT, a run or a checkpoint.
pub(crate) fn start(model: Transformer, path: &Path) -> Result<Transformer, TrainError> {
    let (config, family) = (model.config().clone(), Family::of(model.config()));
    let entries: Vec<Entry> =
        family.entries(&config).into_iter().filter(|entry| entry.param.contains(".adapter.")).collect();
    let file = if path.join(CONFIG).is_file() {
        let plain = TransformerConfig { adapter: None, ..config.clone() };
        let (found, file) = super::peft::adapters(path, family, &plain)?;
        if Some(found) != config.adapter {
            let (expected, got) =
                (format!("adapters like those of the recipe, {:?}", config.adapter), format!("{found:?}"));
            return Err(TrainError::Input { what: "adapter.init", expected, got });
        }
        file
    } else {
        resolve(path)?.checkpoint.tensors(WEIGHTS)?
    };
    check_shapes(&entries, &others(&entries, &file)?, &file)?;
    filled(model, entries, Arc::new(file))
}

/// Writes the model that has adapters in its weights as a plain folder in Hugging Face's form: of a run or checkpoint with adapters, or a folder of PEFT, whose model is `base` or else the one
/// that the folder names. `out` must not exist.
///
/// # Errors
/// [`TrainError`]: no adapters there, another model than they were made for, tensors that do not fit, or a file that cannot be written.
pub fn merge_adapters(path: &Path, base: Option<&Path>, out: &Path) -> Result<Exported, TrainError> {
    let target = Target::Hf(Some(Dtype::F32));
    if path.join(CONFIG).is_file() && !path.join("manifest.json").is_file() {
        return export::write(super::peft::open(path, base)?, path, target, out);
    }
    if let Some(base) = base {
        let expected = "none with a run or a checkpoint, which says where its model is".into();
        return Err(TrainError::Input { what: "--base", expected, got: base.display().to_string() });
    }
    let checkpoint = resolve(path)?.checkpoint;
    if !is_adapted(&checkpoint.read_json("config.json")?)? {
        let (expected, got) = ("a model with adapters".into(), format!("{}, which has none", path.display()));
        return Err(TrainError::Input { what: "merge", expected, got });
    }
    export::write(Folder::of_checkpoint(&checkpoint)?, path, target, out)
}

/// What of the checkpoint is read by those who need no adapters: the model that has them in its weights.
pub(crate) fn merged(checkpoint: &Checkpoint) -> Result<(Value, TensorFile), TrainError> {
    let (family, config) = parse_config(&checkpoint.read_json("config.json")?)?;
    let Files { base, adapters } = Files::of(checkpoint)?;
    let path = checkpoint.file(if adapters.is_some() { WEIGHTS } else { "model.safetensors" })?;
    merged_of(&path, family, config, base, adapters)
}

/// The same of a model's tensors and those of adapters.
pub(super) fn merged_of(
    path: &Path,
    family: Family,
    config: TransformerConfig,
    base: TensorFile,
    adapters: Option<TensorFile>,
) -> Result<(Value, TensorFile), TrainError> {
    let plain = TransformerConfig { adapter: None, ..config.clone() };
    let of_adapters: Vec<Entry> =
        family.entries(&config).into_iter().filter(|entry| entry.param.contains(".adapter.")).collect();
    let entries = family.entries(&plain);
    let is_trained = |entry: &Entry| match &adapters {
        Some(file) => entry.pieces.iter().all(|piece| file.contains(&format!("{PREFIX}{}", piece.name))),
        None => false,
    };
    let (trained, own): (Vec<Entry>, Vec<Entry>) = entries.iter().cloned().partition(is_trained);
    check_shapes(&own, &others(&own, &base)?, &base)?;
    let file = adapters.as_ref().unwrap_or(&base);
    let mut expected = of_adapters.clone();
    expected.extend(trained.iter().cloned().map(named));
    let left = if adapters.is_some() { vec![] } else { others(&of_adapters, file)? };
    check_shapes(&expected, &left, file)?;
    for (file, entries) in [(&base, &own), (file, &expected)] {
        entries.iter().flat_map(|e| &e.pieces).try_for_each(|piece| file.check_floats(&piece.name))?;
    }
    let shapes: BTreeMap<String, Vec<usize>> =
        entries.iter().flat_map(specs).map(|spec| (spec.name, spec.shape)).collect();
    let by_piece: HashMap<String, usize> = entries
        .iter()
        .enumerate()
        .flat_map(|(i, entry)| entry.pieces.iter().map(move |piece| (piece.name.clone(), i)))
        .collect();
    let scale = config.adapter.map_or(0.0, |adapter| adapter.scale());
    let json = family.config_json(&plain);
    let last: Mutex<Option<(usize, Vec<f32>)>> = Mutex::new(None);
    let values = move |name: &str| -> Result<Vec<f32>, String> {
        let said = |error: CheckpointError| error.to_string();
        let file = adapters.as_ref().unwrap_or(&base);
        let i = *by_piece.get(name).ok_or("no tensor of this name")?;
        let entry = &entries[i];
        let trained = format!("{PREFIX}{name}");
        if adapters.is_some() && file.contains(&trained) {
            return file.f32(&trained).map_err(said);
        }
        let Some(adapted) = entry.param.strip_suffix(".weight").and_then(|layer| config.adapter_of(layer)) else {
            return base.f32(name).map_err(said);
        };
        let piece = entry.pieces.iter().find(|piece| piece.name == name).ok_or("no tensor of this name")?;
        let mut last = last.lock().map_err(|_| "another reader failed")?;
        if let Some((kept, values)) = &*last
            && *kept == i
        {
            return Ok(entry.split(values, piece));
        }
        let whole = weight(entry, &base, file, &adapted, &of_adapters, scale).map_err(said)?;
        let found = entry.split(&whole, piece);
        *last = Some((i, whole));
        Ok(found)
    };
    Ok((json, TensorFile::of_values(path, shapes, Box::new(values))))
}

/// A weight with its adapter in it.
fn weight(
    entry: &Entry,
    base: &TensorFile,
    file: &TensorFile,
    adapted: &Adapted,
    of_adapters: &[Entry],
    scale: f64,
) -> Result<Vec<f32>, CheckpointError> {
    let read = |entry: &Entry, file: &TensorFile| {
        let mut values = vec![0f32; entry.shape.iter().product()];
        for piece in &entry.pieces {
            entry.join(&mut values, piece, &file.f32(&piece.name)?);
        }
        Ok(values)
    };
    let mut whole = read(entry, base)?;
    let parts = adapted.shapes.iter().filter_map(|(name, _)| of_adapters.iter().find(|entry| entry.param == *name));
    let parts = parts.map(|entry| read(entry, file)).collect::<Result<Vec<_>, _>>()?;
    merge_adapter(&mut whole, adapted, &parts, scale);
    Ok(whole)
}
