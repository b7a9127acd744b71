//! The run's part on disk: checkpoints, and how a run goes on from one.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::Dataset;
use firebox_models::decoder::Decoder;
use firebox_optim::StateTensor;

use super::{State, Trainer};
use crate::TrainError;
use crate::checkpoint::{Checkpoint, CheckpointError, TensorFile, TensorSpec, Writer, encode_f32, prune, resolve};
use crate::model_io;
use crate::observe::{Event, Observer};
use crate::ranks::{Ranks, Shapes};
use crate::recipe::Recipe;
use crate::watch::OnSpike;

impl<'a> Trainer<'a> {
    /// Continues from a checkpoint of the run in `dir`.
    ///
    /// # Errors
    /// [`TrainError`]: as [`new`](Self::new), or a checkpoint that does not fit.
    pub fn resume(
        recipe: Recipe,
        dir: &Path,
        dataset: &'a Dataset,
        device: &Device,
        checkpoint: &Checkpoint,
    ) -> Result<Self, TrainError> {
        let loaded = load_trained(checkpoint, &device.clone().autodiff())?;
        let tokens = dataset.tokenizer.json();
        if loaded.tokenizer.as_ref().is_some_and(|t| t.json() != tokens) {
            return Err(TrainError::Resume {
                path: checkpoint.path().into(),
                expected: "the corpus that the run was started with (its tokenizer is another)".into(),
                got: format!("{} tokens", dataset.tokenizer.vocab_size()),
            });
        }
        let wanted = recipe.model.resolve(dataset.tokenizer.vocab_size())?;
        let model = loaded.model.for_training(recipe.seed, wanted.dropout)?;
        if *model.config() != wanted {
            let (expected, got) = (format!("{wanted:?}"), format!("{:?}", model.config()));
            return Err(TrainError::Resume { path: checkpoint.path().into(), expected, got });
        }
        let mut trainer = Self::new(recipe, dir, dataset, device, Some(model))?;
        trainer.restore(checkpoint)?;
        Ok(trainer)
    }

    /// Takes everything but the model from a checkpoint.
    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let recipe_hash = std::mem::take(&mut self.state.recipe_hash);
        self.state = State { recipe_hash, ..checkpoint.read_json("state.json")? };
        let optimizer = checkpoint.tensors(&self.state_file())?;
        let Self { model: Some(model), optimizer: of_model, average, .. } = self else { return Ok(()) };
        of_model.load_state::<_, TrainError>(model, state_tensors(&optimizer))?;
        // A run may be given an average later on.
        if let (Some(average), true) = (average, checkpoint.contains(AVERAGE_STATE)) {
            average.load_state::<_, TrainError>(model, state_tensors(&checkpoint.tensors(AVERAGE_STATE)?))?;
        }
        Ok(())
    }

    /// The model to evaluate and to keep: mostly the one that is trained.
    pub(super) fn averaged(&self) -> Result<Decoder, TrainError> {
        Ok(self.optimizer.averaged(self.model().clone())?)
    }

    /// The optimizer's state in a checkpoint.
    fn state_file(&self) -> String {
        format!("optimizer/{}.safetensors", self.optimizer.algorithm().name())
    }

    /// Goes back to the last checkpoint, and on with the data after the batch, if the recipe says so and there is one; returns whether it did. The batch has been
    /// counted as read, and as left out.
    pub(super) fn roll_back(&mut self, reason: &str, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let step = self.state.step;
        let back = self.recipe.watch.on_spike == OnSpike::Rollback
            && self.state.watch.rollbacks < self.recipe.watch.max_rollbacks;
        let found = if back { resolve(self.dir.join("checkpoints")).ok() } else { None };
        let Some(found) = found else { return Ok(false) };
        let device = self.model().embed.weight.val().device();
        let model = load_trained(&found.checkpoint, &device)?.model;
        let model = model.for_training(self.recipe.seed, self.model().config().dropout)?;
        let model = model.with_context(self.model().context_parallel().cloned());
        self.model = Some(self.recipe.precision.hold(model.with_loss(self.recipe.train.loss())));
        let here = self.state.clone();
        self.restore(&found.checkpoint)?;
        let skipped = (self.recipe.watch.skip_batches - 1) * self.recipe.train.batch_rows as u64;
        self.state.samples = here.samples + skipped;
        (self.state.tokens, self.state.skipped) = (here.tokens, here.skipped);
        self.state.bad_in_a_row = here.bad_in_a_row;
        self.state.watch.spikes = here.watch.spikes;
        self.state.watch.rollbacks = here.watch.rollbacks + 1;
        let reason = format!("{reason}; back to step {}", self.state.step);
        observer.on_event(&Event::Skipped { step, reason: &reason })?;
        Ok(true)
    }

    /// Writes a checkpoint and removes those that the recipe does not keep.
    pub(super) fn save(&self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some(model) = self.whole(self.averaged()?)? else { return self.help_to_save() };
        let dir = self.dir.join("checkpoints");
        let mut writer = Writer::create(&dir, self.state.step)?;
        model_io::save(&mut writer, &model, &self.dataset.tokenizer)?;
        drop(model);
        if self.optimizer.averages() {
            model_io::save_parameters(&mut writer, TRAINED, self.model())?;
        }
        self.save_state(&mut writer)?;
        if let Some(average) = &self.average {
            write_state(&mut writer, AVERAGE_STATE, average.state_shapes(), average.state())?;
            model_io::save_parameters(&mut writer, AVERAGE, &average.apply(self.model().clone()))?;
        }
        writer.json("state.json", &self.state)?;
        let metric = self.state.last_eval.filter(|e| e.step == self.state.step).map(|e| e.loss);
        let path = writer.finish_with_metric(metric.filter(|m| m.is_finite()))?;
        prune(&dir, self.recipe.checkpoint.keep_last, self.recipe.checkpoint.keep_best)?;
        observer.on_event(&Event::CheckpointSaved { step: self.state.step, path: &path })?;
        if let Some(ranks) = &self.ranks {
            ranks.barrier()?;
        }
        Ok(())
    }

    /// The optimizer's state, from all ranks where they have divided it.
    fn save_state(&self, writer: &mut Writer) -> Result<(), TrainError> {
        let (name, optimizer) = (self.state_file(), &self.optimizer);
        let Some((ranks, shapes)) = self.divided_state() else {
            return Ok(write_state(writer, &name, optimizer.state_shapes(), optimizer.state())?);
        };
        let mut failed = None;
        let tensors = shapes.iter().map(|(name, shape)| {
            let elements = shape.iter().product();
            let values = match &failed {
                None => ranks.state_tensor(self.model(), optimizer, name, elements),
                Some(_) => Ok(vec![0.0; elements]),
            };
            let values = values.unwrap_or_else(|error| {
                failed = Some(error);
                vec![0.0; elements]
            });
            StateTensor { name: name.clone(), shape: shape.clone(), values }
        });
        write_state(writer, &name, shapes.iter().cloned(), tensors)?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// What the other ranks do while the first one writes.
    fn help_to_save(&self) -> Result<(), TrainError> {
        if let Some((ranks, shapes)) = self.divided_state() {
            for (name, shape) in shapes {
                ranks.state_tensor(self.model(), &self.optimizer, name, shape.iter().product())?;
            }
        }
        self.ranks.as_ref().map_or(Ok(()), Ranks::barrier)?;
        Ok(())
    }

    /// The ranks, and the names and shapes of the optimizer's state, where it is divided; there is none before the first step.
    fn divided_state(&self) -> Option<(&Ranks, &Shapes)> {
        let ranks = self.ranks.as_ref().filter(|_| self.state.last_good > 0)?;
        Some((ranks, ranks.divided_state()?))
    }
}

/// The parameters that are trained, where they are others than those of `model.safetensors`.
const TRAINED: &str = "trained.safetensors";

/// The averaged parameters under Hugging Face's names, and what the average remembers.
const AVERAGE: &str = "average/model.safetensors";
const AVERAGE_STATE: &str = "average/state.safetensors";

/// The model with the parameters that are trained.
fn load_trained(checkpoint: &Checkpoint, device: &Device) -> Result<model_io::Loaded, TrainError> {
    let mut loaded = model_io::load_checkpoint(checkpoint, device)?;
    if checkpoint.contains(TRAINED) {
        loaded.model = model_io::load_parameters(loaded.model, &checkpoint.tensors(TRAINED)?)?;
    }
    Ok(loaded)
}

fn state_tensors(file: &TensorFile) -> impl Iterator<Item = Result<StateTensor, TrainError>> + '_ {
    file.names().map(|name| {
        let (shape, values) = (file.shape(name)?.to_vec(), file.f32(name)?);
        Ok(StateTensor { name: name.to_owned(), shape, values })
    })
}

/// Writes tensors one at a time.
fn write_state(
    writer: &mut Writer,
    name: &str,
    shapes: impl Iterator<Item = (String, Vec<usize>)>,
    tensors: impl Iterator<Item = StateTensor>,
) -> Result<(), CheckpointError> {
    let specs: Vec<TensorSpec> = shapes.map(|(name, shape)| TensorSpec::f32(name, shape)).collect();
    let encode = |tensor: StateTensor| {
        encode_f32(&tensor.values, safetensors::Dtype::F32).map(|bytes| bytes.into_owned()).unwrap_or_default()
    };
    writer.tensors(name, &Default::default(), &specs, tensors.map(encode))
}
