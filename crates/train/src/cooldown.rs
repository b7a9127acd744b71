//! A run that branches off another and lets its learning rate decay.

use std::path::Path;

use firebox_optim::{DecayShape, Schedule};

use crate::checkpoint::{Checkpoint, Writer};
use crate::trainer::State;
use crate::{Recipe, TrainError};

/// The end of a run whose learning rate stayed at its peak: from one of its checkpoints, the rate decays to the minimum over some steps.
///
/// One long run at a constant rate so gives models of several lengths (Hu et al., <https://arxiv.org/abs/2404.06395>, section 4; Hägele et al.,
/// <https://arxiv.org/abs/2405.18392>), each the same, bit for bit, as a warmup-stable-decay run of that length from the beginning.
#[derive(Debug)]
pub struct Cooldown<'a> {
    checkpoint: &'a Checkpoint,
    recipe: Recipe,
}

impl<'a> Cooldown<'a> {
    /// The decay over `steps` steps after `checkpoint`, which lies in the folder of its run.
    ///
    /// The recipe is that of the run with a [warmup-stable-decay](Schedule::Wsd) schedule that ends `steps` after the checkpoint, `NAME-cooldown-STEP` for a
    /// name, and `overrides` (`key=value`). Where the run had that kind of schedule, its minimum and form are kept.
    ///
    /// # Errors
    /// [`TrainError::Input`] if `steps` is 0 or the checkpoint is none of a constant rate, and [`TrainError::Recipe`] for the recipe beside it.
    pub fn new(checkpoint: &'a Checkpoint, steps: u64, overrides: &[String]) -> Result<Self, TrainError> {
        if steps == 0 {
            return Err(TrainError::Input { what: "--steps", expected: "at least 1".into(), got: "0".into() });
        }
        let path = checkpoint.path();
        let fail = |got: String| {
            let expected = format!("a checkpoint at the peak of a constant or wsd schedule in {}", path.display());
            Err(TrainError::Input { what: "--cooldown-from", expected, got })
        };
        let Some(run) = path.parent().and_then(Path::parent).filter(|run| run.join("recipe.toml").is_file()) else {
            return fail("no recipe.toml two folders above it".into());
        };
        let mut recipe = Recipe::load(&run.join("recipe.toml").display().to_string(), &[])?;
        let (min_lr_ratio, decay) = match recipe.schedule {
            Schedule::Constant { .. } => (0.0, DecayShape::default()),
            Schedule::Wsd { min_lr_ratio, decay, .. } => (min_lr_ratio, decay),
            _ => return fail("a schedule of another kind".into()),
        };
        // The next step's rate would be below the peak: still warming up, or in a decay already.
        let done = checkpoint.step();
        let factor = recipe.schedule.factor_at(done, recipe.train.steps);
        if factor < 1.0 {
            return fail(format!("step {done} at {factor:.3} of the peak"));
        }
        let total = done.saturating_add(steps);
        let decay_fraction = steps as f64 / total as f64;
        let warmup_steps = recipe.schedule.warmup_steps();
        recipe.schedule = Schedule::Wsd { warmup_steps, min_lr_ratio, decay_fraction, decay };
        recipe.train.steps = total;
        recipe.name = format!("{}-cooldown-{done}", recipe.name);
        Ok(Self { checkpoint, recipe: recipe.with(overrides)? })
    }

    /// The recipe of the new run.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Copies the checkpoint into the run folder `dir`, from where the new run is [resumed](crate::Trainer::resume). All is as it was, but that an early stop waits
    /// anew. The other run is only read.
    ///
    /// # Errors
    /// [`TrainError::RunExists`], or [`TrainError::Checkpoint`] for a file that cannot be read or written.
    pub fn start(&self, dir: &Path) -> Result<Checkpoint, TrainError> {
        let checkpoints = dir.join("checkpoints");
        if checkpoints.exists() {
            return Err(TrainError::RunExists(dir.into()));
        }
        let from = self.checkpoint;
        let mut writer = Writer::create(&checkpoints, from.step())?;
        for (name, _) in from.files().filter(|(name, _)| *name != STATE) {
            writer.copy(name, from.file(name)?)?;
        }
        let state: State = from.read_json(STATE)?;
        writer.json(STATE, &State { evals_without_gain: 0, ..state })?;
        let path = writer.finish_with_metric(from.metric())?;
        Ok(Checkpoint::open(path)?)
    }
}

const STATE: &str = "state.json";
