//! Training between other steps: to recover what they lost, or against a teacher.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::pipeline::{Pipeline, Source};
use super::recipe::Train;
use crate::checkpoint::{CheckpointError, find_latest};
use crate::observe::{Event, Observer, Observers};
use crate::{TrainError, Trainer};

impl Pipeline<'_> {
    /// Trains the model of `source` in the run folder `into`, from its last checkpoint where there is one. False if it was interrupted.
    pub(super) fn train(
        &self,
        train: &Train,
        distill: bool,
        source: &Source,
        into: &Path,
        interrupt: &AtomicBool,
    ) -> Result<bool, TrainError> {
        let recipe = train.recipe(distill.then_some(&self.start))?.starting_from(&source.path)?;
        let found = match find_latest(into.join("checkpoints")) {
            Ok(found) => Some(found.checkpoint),
            Err(CheckpointError::Missing { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let (dataset, device) = (self.dataset, &self.device);
        let mut trainer = match &found {
            Some(checkpoint) => Trainer::open(recipe, into, dataset, device, checkpoint)?,
            None => {
                let init = recipe.initial_model(device)?;
                Trainer::new(recipe, into, dataset, device, init)?
            }
        };
        if let Some(checkpoint) = &found {
            trainer.restore(checkpoint)?;
        }
        let info = trainer.info("", rayon::current_num_threads(), source.path.display().to_string());
        let mut observers = Observers::standard();
        observers.on_event(&Event::RunStarted(&info))?;
        Ok(trainer.run(&info, &mut observers, interrupt)?.stopped != "interrupted")
    }
}
