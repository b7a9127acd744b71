//! How a run goes on from a checkpoint.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::Dataset;
use firebox_models::transformer::Transformer;
use firebox_optim::StateTensor;

use super::save::{AVERAGE_STATE, TRAINED};
use super::{State, Trainer};
use crate::TrainError;
use crate::adapter;
use crate::checkpoint::{Checkpoint, TensorFile, resolve};
use crate::model_io;
use crate::observe::{Event, Observer};
use crate::qat::QatRecipe;
use crate::recipe::Recipe;
use crate::task::{Model, Task};
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
        let mut trainer = Self::open(recipe, dir, dataset, device, checkpoint)?;
        trainer.restore(checkpoint)?;
        Ok(trainer)
    }

    /// The first half of [`resume`](Self::resume): a run with the parameters of a checkpoint. [`restore`](Self::restore) is the other half; between the two, a rank of
    /// [several](Self::with_ranks) can take its part, so that it never has more.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn open(
        recipe: Recipe,
        dir: &Path,
        dataset: &'a Dataset,
        device: &Device,
        checkpoint: &Checkpoint,
    ) -> Result<Self, TrainError> {
        let loaded = load_trained(checkpoint, &device.clone().autodiff(), recipe.qat.as_ref())?;
        let tokens = dataset.tokenizer.json();
        if loaded.tokenizer.as_ref().is_some_and(|t| t.json() != tokens) {
            return Err(TrainError::Resume {
                path: checkpoint.path().into(),
                expected: "the corpus that the run was started with (its tokenizer is another)".into(),
                got: format!("{} tokens", dataset.tokenizer.vocab_size()),
            });
        }
        let mut wanted = recipe.model.resolve(dataset.tokenizer.vocab_size())?;
        wanted.adapter = recipe.adapter.as_ref().map(|adapter| adapter.resolve(&wanted)).transpose()?;
        let model = loaded.model.for_training(recipe.seed, wanted.dropout)?;
        if *model.config() != wanted {
            let (expected, got) = (format!("{wanted:?}"), format!("{:?}", model.config()));
            return Err(TrainError::Resume { path: checkpoint.path().into(), expected, got });
        }
        let mut trainer = Self::new(recipe, dir, dataset, device, Some(model))?;
        if let Some(model) = trainer.model.take() {
            let model = trainer.with_projections_of(model, checkpoint)?;
            trainer.model = Some(trainer.recipe.prepared(model)?);
        }
        Ok(trainer)
    }
}

impl<'a, M: Model> Trainer<'a, M> {
    /// A run of [`of_task`](Self::of_task) with the parameters of a checkpoint, those of `model` being of no account. [`restore`](Self::restore) is the other half.
    ///
    /// # Errors
    /// As [`of_task`](Self::of_task), or a checkpoint that does not fit.
    pub fn open_task(
        recipe: Recipe,
        dir: &Path,
        task: Box<dyn Task<M> + 'a>,
        device: &Device,
        model: M,
        checkpoint: &Checkpoint,
    ) -> Result<Self, TrainError> {
        let model = model.reload(checkpoint, &recipe)?;
        Self::of_task(recipe, dir, task, device, model)
    }

    /// Takes everything but the parameters from a checkpoint; of the optimizer's state, this rank's part.
    ///
    /// # Errors
    /// [`TrainError`]: a checkpoint that does not fit.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let recipe_hash = std::mem::take(&mut self.state.recipe_hash);
        self.state = State { recipe_hash, ..checkpoint.read_json("state.json")? };
        let (optimizer, of_this_rank) = (checkpoint.tensors(&self.state_file())?, self.of_this_rank()?);
        let Self { model: Some(model), optimizer: of_model, average, .. } = self else { return Ok(()) };
        let tensors = state_tensors(&optimizer).filter_map(|tensor| tensor.map(&of_this_rank).transpose());
        of_model.load_state::<_, TrainError>(model, tensors)?;
        // A run may be given an average later on.
        if let (Some(average), true) = (average, checkpoint.contains(AVERAGE_STATE)) {
            average.load_state::<_, TrainError>(model, state_tensors(&checkpoint.tensors(AVERAGE_STATE)?))?;
        }
        Ok(())
    }

    /// The model to evaluate and to keep: mostly the one that is trained.
    pub(super) fn averaged(&self) -> Result<M, TrainError> {
        let model = self.optimizer.averaged(self.model().clone())?;
        Ok(if self.recipe.qat.is_some() { model.map_transformer(Transformer::quantized) } else { model })
    }

    /// The optimizer's state in a checkpoint.
    pub(super) fn state_file(&self) -> String {
        format!("optimizer/{}.safetensors", self.optimizer.algorithm().name())
    }

    /// Goes back to the last checkpoint, and on with the data after the batch, if the recipe says so and there is one; returns whether it did. The batch has been
    /// counted as read, and as left out.
    pub(super) fn roll_back(&mut self, reason: &str, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        let step = self.state.step;
        let back = self.recipe.watch.on_spike == OnSpike::Rollback
            && self.state.watch.rollbacks < self.recipe.watch.max_rollbacks;
        if back {
            self.saved(true, observer)?;
        }
        let found = if back { resolve(self.dir.join("checkpoints")).ok() } else { None };
        let Some(found) = found else { return Ok(false) };
        let model = self.model().reload(&found.checkpoint, &self.recipe)?;
        let mut model = self.with_projections_of(model, &found.checkpoint)?;
        if let Some(ranks) = &self.ranks {
            model = model.with_data_ranks(ranks.data());
        }
        self.model = Some(self.recipe.prepared(model)?);
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
}

/// The model with the parameters that are trained.
pub(crate) fn load_trained(
    checkpoint: &Checkpoint,
    device: &Device,
    qat: Option<&QatRecipe>,
) -> Result<model_io::Loaded, TrainError> {
    let adapted = adapter::is_adapted(&checkpoint.read_json("config.json")?)?;
    let mut loaded = match adapted {
        true => adapter::load(checkpoint, device)?,
        false => model_io::load_checkpoint(checkpoint, device)?,
    };
    if let Some(qat) = qat {
        loaded.model = qat.apply(loaded.model);
    }
    if checkpoint.contains(TRAINED) {
        loaded.model = model_io::load_parameters(loaded.model, checkpoint.tensors(TRAINED)?)?;
    }
    Ok(loaded)
}

fn state_tensors(file: &TensorFile) -> impl Iterator<Item = Result<StateTensor, TrainError>> + '_ {
    file.names().map(|name| {
        let (shape, values) = (file.shape(name)?.to_vec(), file.f32(name)?);
        Ok(StateTensor { name: name.to_owned(), shape, values })
    })
}
