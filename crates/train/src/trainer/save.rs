//! Checkpoints: what a run was like after a step, written by all ranks, beside the steps that follow.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::Tensor;
use firebox_models::Placement;
use firebox_models::transformer::hf::Entry;
use firebox_optim::{Average, Optimizer, StateTensor};
use firebox_parallel::ReduceOp;
use firebox_tensor::ops::to_f32;
use firebox_tensor::threads;

use super::distill::{PROJECTIONS, projections_of};
use super::{State, Trainer};
use crate::TrainError;
use crate::adapter::{Base, CONFIG, Kept, WEIGHTS, config_json};
use crate::checkpoint::{Hash, PieceWriter, TensorPlan, TensorSpec, Writer, prune};
use crate::distill::Teacher;
use crate::model_io::{encoded, some_parameters, specs, to_host};
use crate::observe::{Event, Observer};
use crate::qat::{QAT, QatRecipe};
use crate::ranks::{Collect, Parted, Shapes};
use crate::recipe::CheckpointRecipe;
use crate::task::Model;

/// The parameters that are trained, where they are others than those of `model.safetensors`.
pub(crate) const TRAINED: &str = "trained.safetensors";

/// The averaged parameters under Hugging Face's names, and what the average remembers.
const AVERAGE: &str = "average/model.safetensors";
pub(super) const AVERAGE_STATE: &str = "average/state.safetensors";

impl<M: Model> Trainer<'_, M> {
    /// Writes a checkpoint and removes those that the recipe does not keep. Unless it is the last act of the run, it is written while the steps go on, if the recipe
    /// says so; until the next one, its errors come with any step.
    pub(super) fn save(&mut self, last: bool, observer: &mut dyn Observer) -> Result<(), TrainError> {
        self.saved(true, observer)?;
        let snapshot = self.snapshot()?;
        if last || !self.recipe.checkpoint.background {
            if let Some(path) = snapshot.write()? {
                observer.on_event(&Event::CheckpointSaved { step: self.state.step, path: &path })?;
            }
            return Ok(());
        }
        let write = move || {
            // The cores are the steps'.
            let _threads = threads::for_rank(1);
            snapshot.write()
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        let thread = thread.map_err(TrainError::io("start a thread to write", &self.dir))?;
        self.saving = Some(Saving { step: self.state.step, thread: Some(thread) });
        Ok(())
    }

    /// Hears of the checkpoint that is being written, if it is done or `wait` is set.
    pub(super) fn saved(&mut self, wait: bool, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if !wait && self.saving.as_ref().is_none_or(|saving| !saving.is_finished()) {
            return Ok(());
        }
        let Some(mut saving) = self.saving.take() else { return Ok(()) };
        if let Some(path) = saving.wait()? {
            observer.on_event(&Event::CheckpointSaved { step: saving.step, path: &path })?;
        }
        Ok(())
    }

    /// The tokenizer, and what else the task keeps.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let tokenizer = self.task.tokenizer().map(|tokenizer| ("tokenizer.json".into(), tokenizer.json().into()));
        tokenizer.into_iter().chain(self.task.files()).collect()
    }

    /// The run as it is. It shares the memory of parameters and states until a step changes them.
    fn snapshot(&self) -> Result<Snapshot<M>, TrainError> {
        let ranks = self.ranks.as_ref();
        // There is no state before the first step.
        let divided = ranks.and_then(|ranks| ranks.divided_state()).filter(|_| self.state.last_good > 0);
        Ok(Snapshot {
            dir: self.dir.join("checkpoints"),
            keep: self.recipe.checkpoint.clone(),
            model: self.averaged()?,
            shards: self.shards.as_ref().map(|shards| shards.held().clone()),
            trained: (self.optimizer.averages() || self.recipe.qat.is_some()).then(|| self.model().clone()),
            kept: self.kept.clone(),
            qat: self.recipe.qat,
            average: self.average.as_ref().map(|average| Averaged {
                average: average.clone(),
                model: match &self.shards {
                    Some(_) => self.model().clone(),
                    None => average.apply(self.model().clone()),
                },
                shards: self.shards.as_ref().map(|shards| shards.averaged(average).held().clone()),
            }),
            optimizer: self.optimizer.clone(),
            projections: (self.teacher.as_ref().and_then(Teacher::projected))
                .map(|width| projections_of(self.model(), width))
                .unwrap_or_default(),
            state_file: self.state_file(),
            state_shapes: divided.cloned().unwrap_or_else(|| self.optimizer.state_shapes().collect()),
            states_by_data: ranks.is_some_and(|ranks| ranks.state_parts().is_some()),
            state: self.state.clone(),
            files: self.files(),
            collect: ranks.map(|ranks| ranks.collect()),
        })
    }
}

/// A checkpoint that is being written. Dropped, it waits: what has been begun is finished.
#[derive(Debug)]
pub(super) struct Saving {
    step: u64,
    thread: Option<JoinHandle<Result<Option<PathBuf>, TrainError>>>,
}

impl Saving {
    fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn wait(&mut self) -> Result<Option<PathBuf>, TrainError> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(None),
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        // The run has failed for another reason, and says that one.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// All that a checkpoint holds.
struct Snapshot<M> {
    dir: PathBuf,
    keep: CheckpointRecipe,
    /// Of this and the other modules and states, this rank's part.
    model: M,
    /// This rank's parts of the parameters, where the model has none of their values.
    shards: Option<BTreeMap<String, Tensor<1>>>,
    trained: Option<M>,
    /// Of a model with adapters, what there is.
    kept: Option<Kept>,
    qat: Option<QatRecipe>,
    average: Option<Averaged<M>>,
    optimizer: Optimizer,
    state_file: String,
    /// Of a student.
    projections: Vec<Entry>,
    /// Of the whole state.
    state_shapes: Shapes,
    /// Whether those that have data of their own have parts of the state.
    states_by_data: bool,
    state: State,
    /// Small files besides: name and contents.
    files: Vec<(String, Vec<u8>)>,
    collect: Option<Arc<Collect>>,
}

/// An average, and the parameters that it gives.
struct Averaged<M> {
    average: Average,
    model: M,
    shards: Option<BTreeMap<String, Tensor<1>>>,
}

/// A tensor of a run, and those of a file that it becomes.
struct Item<'a> {
    tensor: Parted<'a>,
    specs: Vec<TensorSpec>,
    /// What this rank has of it.
    mine: Box<dyn Fn() -> Vec<f32> + 'a>,
    /// The bytes of the file's tensors.
    encode: Box<dyn Fn(Vec<f32>) -> Vec<Vec<u8>> + 'a>,
}

impl<M: Model> Snapshot<M> {
    /// Writes it, each rank a part. The first one gets the folder.
    fn write(self) -> Result<Option<PathBuf>, TrainError> {
        let first = self.collect.as_ref().is_none_or(|collect| collect.world.rank() == 0);
        let mut writer = if first { Some(Writer::create(&self.dir, self.state.step)?) } else { None };
        let folder = self.folder(writer.as_ref())?;
        let to = &mut (writer.as_mut(), folder.as_path());
        let mut of_model = self.model.entries();
        if let Some(kept) = &self.kept {
            of_model = kept.entries(of_model);
        }
        let name = if self.kept.is_some() { WEIGHTS } else { "model.safetensors" };
        self.put_model(to, name, &of_model, &self.model, self.shards.as_ref())?;
        if let Some(trained) = &self.trained {
            self.put_model(to, TRAINED, &trained.entries(), trained, None)?;
        }
        if !self.projections.is_empty() {
            let trained = self.trained.as_ref().unwrap_or(&self.model);
            self.put_model(to, PROJECTIONS, &self.projections, trained, self.shards.as_ref())?;
        }
        let state = &self.state_shapes;
        let optimizer = |name: &str| self.optimizer.state_part(name);
        self.put_state(to, &self.state_file, state, self.states_by_data, &optimizer)?;
        if let Some(Averaged { average, model, shards }) = &self.average {
            // Each rank has all of it, or of parameters that are divided its part.
            let shapes: Shapes = average.state_shapes().collect();
            let tensors: HashMap<String, Vec<f32>> =
                average.state().map(|StateTensor { name, values, .. }| (name, values)).collect();
            let tensor = |name: &str| tensors.get(name).cloned().unwrap_or_default();
            self.put_state(to, AVERAGE_STATE, &shapes, shards.is_some(), &tensor)?;
            self.put_model(to, AVERAGE, &of_model, model, shards.as_ref())?;
        }
        let finished = match writer {
            Some(writer) => Some(self.finish(writer)?),
            None => None,
        };
        if let Some(collect) = &self.collect {
            // Nobody goes on from it before it is there.
            collect.world.barrier()?;
        }
        Ok(finished)
    }

    /// The small files, which one rank writes, and the end.
    fn finish(&self, mut writer: Writer) -> Result<PathBuf, TrainError> {
        writer.json("config.json", &self.model.config_json())?;
        for (name, contents) in &self.files {
            writer.bytes(name, contents)?;
        }
        writer.json("state.json", &self.state)?;
        if let Some(qat) = &self.qat {
            writer.json(QAT, qat)?;
        }
        if let (Some(kept), Some(transformer)) = (&self.kept, self.model.transformer()) {
            writer.json(Base::FILE, &kept.base)?;
            let entries = kept.entries(self.model.entries());
            writer.json(CONFIG, &config_json(transformer.config(), &entries, &kept.base.path))?;
        }
        let metric = self.state.last_eval.filter(|e| e.step == self.state.step).map(|e| e.loss);
        let path = writer.finish_with_metric(metric.filter(|m| m.is_finite()))?;
        prune(&self.dir, self.keep.keep_last, self.keep.keep_best)?;
        Ok(path)
    }

    /// Where the files go, as the first rank says.
    fn folder(&self, writer: Option<&Writer>) -> Result<PathBuf, TrainError> {
        let own = writer.map(|writer| writer.folder().to_path_buf()).unwrap_or_default();
        let Some(collect) = &self.collect else { return Ok(own) };
        // The folders above it are each rank's own business: on another machine they may be mounted elsewhere.
        let name = own.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut len = [name.len() as u32];
        collect.world.broadcast(&mut len, 0)?;
        let mut bytes = name.into_bytes();
        bytes.resize(len[0] as usize, 0);
        collect.world.broadcast(&mut bytes, 0)?;
        Ok(self.dir.join(String::from_utf8_lossy(&bytes).as_ref()))
    }

    fn put_model(
        &self,
        to: &mut To<'_>,
        name: &str,
        entries: &[Entry],
        model: &M,
        shards: Option<&BTreeMap<String, Tensor<1>>>,
    ) -> Result<(), TrainError> {
        let names: HashSet<&str> = entries.iter().map(|entry| entry.param.as_str()).collect();
        // What is not trained is not divided.
        let divided: HashSet<String> = match shards {
            None => HashSet::new(),
            Some(_) => {
                let infos = firebox_optim::parameters(model)?.into_iter();
                infos.filter(|info| info.trainable).map(|info| info.name).collect()
            }
        };
        let whole = |name: &str| names.contains(name) && !divided.contains(name);
        let mut params: HashMap<String, Tensor<1>> = some_parameters(model, &whole).into_iter().collect();
        params.extend(shards.into_iter().flatten().map(|(name, part)| (name.clone(), part.clone())));
        let items = entries.iter().map(|entry| {
            let values = params.get(&entry.param).cloned().map(to_f32);
            Item {
                tensor: Parted {
                    param: &entry.param,
                    shape: &entry.shape,
                    placement: self.placement(&entry.param),
                    by_data: divided.contains(&entry.param),
                    by_experts: model.is_divided_expert(&entry.param),
                },
                specs: specs(entry),
                mine: Box::new(move || values.clone().map(to_host).unwrap_or_default()),
                encode: Box::new(|values| encoded(entry, &values)),
            }
        });
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        self.put(to, name, &metadata, &items.collect::<Vec<_>>())
    }

    fn put_state(
        &self,
        to: &mut To<'_>,
        name: &str,
        shapes: &Shapes,
        by_data: bool,
        part: &dyn Fn(&str) -> Vec<f32>,
    ) -> Result<(), TrainError> {
        let items = shapes.iter().map(|(name, shape)| {
            let (param, kind) = name.rsplit_once('.').unwrap_or((name, ""));
            // Of divided matrices each state has the shape of the part; counts are the same everywhere.
            let placement = if kind == "steps" { Placement::replicated() } else { self.placement(param) };
            Item {
                tensor: Parted { param, shape, placement, by_data, by_experts: self.model.is_divided_expert(param) },
                specs: vec![TensorSpec::f32(name.clone(), shape.clone())],
                mine: Box::new(|| part(name)),
                encode: Box::new(|values| vec![bytemuck::cast_slice(&values).to_vec()]),
            }
        });
        self.put(to, name, &BTreeMap::new(), &items.collect::<Vec<_>>())
    }

    /// How the ranks that divide matrices divide a parameter.
    fn placement(&self, param: &str) -> Placement {
        match self.model.parallel() {
            Some(_) => self.model.placement(param),
            None => Placement::replicated(),
        }
    }

    /// Writes a file of tensors: its pieces go to the ranks in turns, and are put together, encoded and written there.
    fn put(
        &self,
        (writer, folder): &mut To<'_>,
        name: &str,
        metadata: &BTreeMap<String, String>,
        items: &[Item<'_>],
    ) -> Result<(), TrainError> {
        let specs = items.iter().flat_map(|item| item.specs.iter().cloned()).collect();
        let plan = TensorPlan::new(folder.join(name), metadata, specs, items.iter().map(|item| item.specs.len()))?;
        if let Some(writer) = writer {
            writer.create_tensors(name, &plan)?;
        }
        let world = self.collect.as_ref().map(|collect| &collect.world);
        let (rank, n) = world.map_or((0, 1), |world| (world.rank(), world.size()));
        if let Some(world) = world {
            world.barrier()?;
        }
        let pieces: Vec<_> = plan.pieces().collect();
        let mut hashes = vec![Hash::default(); pieces.len()];
        let mut failed = |error| match writer.as_mut() {
            Some(writer) => writer.failed(error),
            None => error,
        };
        let mut file = None;
        for (round, pieces) in pieces.chunks(n).enumerate() {
            let mut bytes = vec![];
            for (to, items) in pieces.iter().map(|units| &items[units.clone()]).enumerate() {
                for item in items {
                    let whole = match &self.collect {
                        Some(collect) => collect.to(to, &item.tensor, &item.mine)?,
                        None => Some((item.mine)()),
                    };
                    bytes.extend(whole.into_iter().flat_map(&item.encode));
                }
            }
            if rank < pieces.len() {
                let file = match &mut file {
                    Some(file) => file,
                    None => file.insert(PieceWriter::open(&plan).map_err(&mut failed)?),
                };
                let piece = round * n + rank;
                hashes[piece] = file.write(piece, &mut bytes.into_iter()).map_err(&mut failed)?;
            }
        }
        if let Some(file) = file {
            file.finish().map_err(failed)?;
        }
        if let Some(world) = world {
            // Of each, all ranks but one have zeros.
            world.all_reduce(hashes.as_flattened_mut(), ReduceOp::Max)?;
        }
        if let Some(writer) = writer {
            writer.tensors_written(name, &plan, hashes)?;
        }
        Ok(())
    }
}

/// The rank that creates and finishes files has a writer; all know the folder.
type To<'a> = (Option<&'a mut Writer>, &'a Path);
