//! The training loop.

mod distill;
mod experts;
#[cfg(test)]
mod faults;
mod held;
mod held_out;
mod layout;
mod persist;
mod pruning;
mod save;
mod seen;
mod update;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use firebox_data::Dataset;
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_optim::{Average, Optimizer};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::adapter::Kept;
use crate::distill::{StudentInit, Teacher, from_teacher};
use crate::engine::Engine;
use crate::fault;
use crate::lr_find::{LrFound, LrPoint, LrSweep};
use crate::mup::Mup;
use crate::noise::NoiseScale;
use crate::observe::{Event, Observer, Observers, RunInfo, StepRecord, Summary, memory};
use crate::precision::LossScale;
use crate::ranks::{Ranks, Shards};
use crate::recipe::Recipe;
use crate::task::{Language, Model, Task};
use crate::timeline::Recorder;
use crate::watch::Watch;

use distill::project;
pub use held::Held;
pub use held_out::prompt_ids;
pub(crate) use layout::cannot_divide;
pub(crate) use persist::load_trained;
pub(crate) use save::TRAINED;

/// Everything that changes during a run besides parameters and the optimizer's state: what a checkpoint must hold so that the next step is the same.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Samples (rows) read: with the seed, the loader's position.
    pub samples: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Steps skipped for a loss or gradient that was not finite.
    pub skipped: u64,
    /// How many of them in a row until now.
    pub bad_in_a_row: u64,
    /// The last step that changed the parameters.
    pub last_good: u64,
    /// Lowest validation loss.
    pub best_loss: Option<f64>,
    /// Its step.
    pub best_step: Option<u64>,
    /// Evaluations since then.
    pub evals_without_gain: u64,
    /// The last evaluation.
    pub last_eval: Option<LastEval>,
    /// What it said besides the loss, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// What the loss is scaled by.
    #[serde(default)]
    pub loss_scale: LossScale,
    /// SHA-256 of the recipe.
    pub recipe_hash: String,
    /// What the watch over loss and gradients has seen.
    #[serde(default)]
    pub watch: Watch,
    /// The gradient noise scale, where it is measured.
    #[serde(default)]
    pub noise_scale: NoiseScale,
}

/// What the last evaluation found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LastEval {
    /// After which step.
    pub step: u64,
    /// Validation loss, nats per token.
    pub loss: f64,
    /// Bits per byte.
    pub bpb: f64,
    /// Whether it saw all of the held-out text.
    pub whole: bool,
}

/// A run: model, optimizer, data and state.
pub struct Trainer<'a, M: Model = Transformer> {
    recipe: Recipe,
    dir: PathBuf,
    // Taken out while the optimizer updates it.
    model: Option<M>,
    optimizer: Optimizer,
    average: Option<Average>,
    /// What checkpoints have of a model with adapters.
    kept: Option<Kept>,
    teacher: Option<Teacher>,
    engine: Engine,
    task: Box<dyn Task<M> + 'a>,
    state: State,
    /// Those that train together, if it is more than one.
    ranks: Option<Ranks>,
    /// The checkpoint that is being written.
    saving: Option<save::Saving>,
    /// This rank's parts of the parameters, where `model` has none of their values.
    shards: Option<Shards<M>>,
    /// Bytes of the gradients of the last step, all micro-batches added up.
    gradient_bytes: usize,
    recorder: Recorder,
    /// The step whose timeline is shown.
    shown: Option<u64>,
    #[cfg(test)]
    fault: Option<faults::Fault>,
}

impl<'a> Trainer<'a> {
    /// A new run in `dir`, on `device.autodiff()`. Parameters are those of `init` if given, or else initial ones.
    ///
    /// # Errors
    /// [`TrainError`]: an impossible shape, schedule or optimizer, or a corpus shorter than the context.
    pub fn new(
        recipe: Recipe,
        dir: &Path,
        dataset: &'a Dataset,
        device: &Device,
        init: Option<Transformer>,
    ) -> Result<Self, TrainError> {
        let tokens = dataset.tokenizer.vocab_size();
        let config = match &init {
            Some(model) => model.config().clone(),
            None => recipe.model.resolve(tokens)?,
        };
        if config.vocab_size < tokens {
            let expected = format!("at least the tokenizer's {tokens} tokens");
            return Err(TrainError::Input { what: "model.vocab_size", expected, got: config.vocab_size.to_string() });
        }
        recipe.precision.check_device(device)?;
        recipe.schedule.validate(recipe.train.steps)?;
        config.validate()?;
        let mup = recipe.mup(&config)?;
        let task = Language::new(dataset, recipe.train.row_tokens(config.context), recipe.seed, &recipe.eval)?;
        let teach = |recipe| Teacher::new(recipe, &config, &dataset.tokenizer, device);
        let teacher = recipe.distill.as_ref().map(teach).transpose()?;
        let started = recipe.distill.as_ref().filter(|distill| distill.init == StudentInit::Teacher);
        let model = match init {
            Some(model) => model,
            None => {
                let model = Transformer::new(&config, recipe.seed, &device.clone().autodiff())?;
                if let Some(distill) = started {
                    from_teacher(model, Path::new(&distill.teacher), device)?
                } else if let Some(mup) = mup {
                    mup.initial(model)
                } else {
                    model
                }
            }
        };
        Self::make(recipe, dir, Box::new(task), device, model, (mup, teacher))
    }
}

impl<'a, M: Model> Trainer<'a, M> {
    /// A new run of `model`, which is on `device.autodiff()`, on a task, in `dir`.
    ///
    /// # Errors
    /// [`TrainError`]: an impossible schedule or optimizer, or what is for language models alone.
    pub fn of_task(
        recipe: Recipe,
        dir: &Path,
        task: Box<dyn Task<M> + 'a>,
        device: &Device,
        model: M,
    ) -> Result<Self, TrainError> {
        let alone = |what, got: &str| {
            let expected = "none with this task: it is for language models".to_owned();
            Err(TrainError::Input { what, expected, got: got.into() })
        };
        if recipe.distill.is_some() {
            return alone("distill", "one");
        }
        if recipe.model.mup_base_width.is_some() {
            return alone("model.mup_base_width", "one");
        }
        Self::make(recipe, dir, task, device, model, (None, None))
    }

    fn make(
        mut recipe: Recipe,
        dir: &Path,
        task: Box<dyn Task<M> + 'a>,
        device: &Device,
        mut model: M,
        (mup, teacher): (Option<Mup>, Option<Teacher>),
    ) -> Result<Self, TrainError> {
        recipe.precision.check_device(device)?;
        if let Some(adapter) = &recipe.adapter {
            adapter.check_device(device)?;
            recipe.precision.frozen = adapter.frozen_type();
            let Some(transformer) = model.transformer() else {
                let expected = "none with this model, which is not one transformer".into();
                return Err(TrainError::Input { what: "adapter", expected, got: model.describe() });
            };
            let adapted = adapter.apply(transformer.clone(), recipe.seed)?;
            model = model.map_transformer(|_| adapted);
        }
        recipe.schedule.validate(recipe.train.steps)?;
        let groups = recipe.qat.map_or_else(Vec::new, |qat| qat.groups(&recipe.optimizer.algorithm));
        let mut optimizer = recipe.optimizer.build(recipe.train.batch_rows, mup, groups)?;
        optimizer = optimizer.with_lr_scales(recipe.optimizer.lr_scales(&model)?)?;
        let of_layers = |what| TrainError::Input {
            what,
            expected: "none with this model, which is not one transformer".into(),
            got: model.describe(),
        };
        if let Some(qat) = &recipe.qat {
            qat.check(model.transformer().ok_or_else(|| of_layers("qat"))?.config())?;
        }
        if let Some(prune) = &recipe.prune {
            let transformer = model.transformer().ok_or_else(|| of_layers("prune"))?;
            prune.check(transformer.config())?;
            optimizer = optimizer.with_kept_zeros();
            pruning::check_zeros(&recipe, transformer)?;
        }
        if let Some(transformer) = model.transformer() {
            experts::check_device(transformer.config(), device)?;
        }
        if task.language().is_none() && optimizer.curvature_is_due(0) {
            let expected = "another with this task: its estimate draws tokens from a language model".into();
            return Err(TrainError::Input { what: "optimizer.kind", expected, got: "sophia".into() });
        }
        let (seed, projected) = (recipe.seed, teacher.as_ref().and_then(Teacher::projected));
        let model = model.map_transformer(|model| {
            let model = match &recipe.qat {
                Some(qat) => qat.apply(model),
                None => model,
            };
            project(model, projected, seed, &device.clone().autodiff())
        });
        let model = recipe.prepared(model)?;
        let init = recipe.adapter.as_ref().and(recipe.init.as_deref());
        let kept = init.map(|base| Kept::new(base, &model)).transpose()?;
        Ok(Self {
            dir: dir.to_path_buf(),
            model: Some(model),
            kept,
            optimizer,
            average: recipe.average.map(Average::new).transpose()?,
            teacher,
            engine: Engine { compute: recipe.precision.compute.into(), ..recipe.memory.engine(dir) },
            state: State { recipe_hash: recipe.hash(), loss_scale: recipe.precision.initial(), ..State::default() },
            ranks: None,
            saving: None,
            shards: None,
            gradient_bytes: 0,
            recorder: Recorder::default(),
            shown: None,
            task,
            recipe,
            #[cfg(test)]
            fault: None,
        })
    }

    /// The model, as it is. Where ranks divide its parameters, it has their names and shapes alone, and panics where one is read.
    pub fn model(&self) -> &M {
        // PANIC: `model` is empty only while the optimizer has it; where that fails, the run is over.
        self.model.as_ref().expect("a model between steps")
    }

    /// Where the run is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The task.
    pub fn task(&self) -> &dyn Task<M> {
        self.task.as_ref()
    }

    /// How the parameters are trained, to print at the start.
    ///
    /// # Errors
    /// [`firebox_optim::OptimError`].
    pub fn groups(&self) -> Result<firebox_optim::Groups, TrainError> {
        Ok(self.optimizer.groups(self.model())?)
    }

    /// What observers are told at the start; the machine's peak is for the caller to add.
    pub fn info(&self, backend: &str, threads: usize, data: String) -> RunInfo {
        let model = self.model();
        RunInfo {
            dir: self.dir.clone(),
            name: self.recipe.name.clone(),
            recipe_toml: self.recipe.to_toml(),
            model: model.describe(),
            data,
            params: model.total_params() as u64,
            total_steps: self.recipe.train.steps,
            start_step: self.state.step,
            tokens_per_step: self.tokens_of(self.recipe.train.batch_rows),
            backend: backend.into(),
            threads: threads as u32,
            flops_per_token: model.flops_per_token(),
            ..RunInfo::default()
        }
    }

    /// Trains to the end of the recipe, to an early stop, or until `interrupt` is set; the last act is always a checkpoint. `info` is what the
    /// observers were told at the start; shares of its peak are reported as MFU.
    ///
    /// # Errors
    /// [`TrainError`]: divergence, or a file that cannot be written.
    pub fn run(
        &mut self,
        info: &RunInfo,
        observer: &mut dyn Observer,
        interrupt: &AtomicBool,
    ) -> Result<Summary, TrainError> {
        let started = Instant::now();
        let State { elapsed_s: before_s, step: first_step, tokens: first_tokens, .. } = self.state;
        self.prepare_lessons()?;
        let mut pace = Pace::start(self.state.tokens);
        let mut last_loss = None;
        let mut training_s = 0.0;
        let mut stopped = "done";
        while self.state.step < self.recipe.train.steps {
            let interrupted = interrupt.load(Ordering::Relaxed);
            // All ranks stop at the same step.
            if self.ranks.as_ref().map_or(Ok(interrupted), |ranks| ranks.any(interrupted))? {
                stopped = "interrupted";
                break;
            }
            self.saved(false, observer)?;
            let step_started = Instant::now();
            let lr = self.recipe.schedule.lr_at(self.recipe.peak_lr(), self.state.step, self.recipe.train.steps);
            let before = self.before_step();
            let done = self.step(lr, observer)?;
            let worked = self.after_step(&before);
            training_s += step_started.elapsed().as_secs_f64();
            self.state.elapsed_s = before_s + started.elapsed().as_secs_f64();
            let (step, last) = (self.state.step, self.state.step == self.recipe.train.steps);
            if let Some(Done { loss, grad_norm, expert_load, parts }) = done {
                last_loss = Some(loss);
                if step == first_step + 1 || last || step.is_multiple_of(self.recipe.train.log_every) {
                    let tokens_per_s = pace.tokens_per_s(self.state.tokens);
                    let record = StepRecord {
                        step,
                        tokens: self.state.tokens,
                        loss,
                        lr,
                        grad_norm,
                        tokens_per_s,
                        mfu: info.mfu(tokens_per_s),
                        memory_bytes: memory::current_bytes(),
                        noise_scale_rows: self.state.noise_scale.rows(),
                        noise_scale_tokens: self.noise_scale_tokens(),
                        expert_load,
                        distill: self.distilled(parts)?,
                        ranks: self.seen(&worked)?,
                    };
                    observer.on_event(&Event::Step(&record))?;
                }
            }
            self.show(worked, observer)?;
            if !last && is_due(step, self.recipe.eval.every) {
                let limit = self.recipe.eval.max_batches;
                self.evaluate(if limit == 0 { None } else { Some(limit) }, observer)?;
                pace = Pace::start(self.state.tokens);
                if self.recipe.eval.patience > 0 && self.state.evals_without_gain >= self.recipe.eval.patience {
                    stopped = "early stop";
                    break;
                }
            }
            if let Some(ranks) = &self.ranks {
                fault::at_checkpoint(ranks.world_rank(), step, &self.dir.join("checkpoints"));
            }
            if !last && is_due(step, self.recipe.checkpoint.every) {
                self.save(false, observer)?;
                pace = Pace::start(self.state.tokens);
            }
        }
        // Not again what is known: after an early stop, or when a finished run is resumed.
        let known = self.state.last_eval.is_some_and(|e| e.step == self.state.step && e.whole);
        if stopped != "interrupted" && !known {
            self.evaluate(None, observer)?;
        }
        self.state.elapsed_s = before_s + started.elapsed().as_secs_f64();
        self.save(true, observer)?;
        let tokens_here = self.state.tokens - first_tokens;
        let tokens_per_s = if training_s > 0.0 { tokens_here as f64 / training_s } else { 0.0 };
        let summary = Summary {
            params: self.model().total_params() as u64,
            steps: self.state.step,
            tokens: self.state.tokens,
            wall_s: self.state.elapsed_s,
            tokens_per_s,
            mfu: (info.peak_flops > 0.0).then(|| info.mfu(tokens_per_s)),
            train_loss: last_loss,
            val_loss: self.state.last_eval.map(|e| e.loss),
            val_bpb: self.state.last_eval.map(|e| e.bpb).filter(|bpb| *bpb > 0.0),
            metrics: self.state.metrics.clone(),
            best_val_loss: self.state.best_loss,
            best_step: self.state.best_step,
            peak_memory_bytes: memory::peak_bytes(),
            skipped_steps: self.state.skipped,
            sparsity: self.sparsity(),
            noise_scale_rows: self.state.noise_scale.rows(),
            noise_scale_tokens: self.noise_scale_tokens(),
            stopped: stopped.into(),
        };
        observer.on_event(&Event::Finished(&summary))?;
        Ok(summary)
    }

    /// Takes one step at each learning rate of `sweep`, until the loss has grown to four times its least; `on_point` hears of each. The rates stand for
    /// `optimizer.lr`. Batches are whole from the first step, the schedule has no say, and nothing is written.
    ///
    /// # Errors
    /// [`TrainError`]: a sweep that goes nowhere, or a rate that the optimizer does not take.
    pub fn find_lr(mut self, sweep: &LrSweep, on_point: &mut dyn FnMut(&LrPoint)) -> Result<LrFound, TrainError> {
        sweep.validate()?;
        self.recipe.train.batch_warmup = None;
        self.recipe.prune = None;
        self.recipe.train.max_bad_steps = u64::MAX;
        let factor = self.recipe.optimizer.batch_factor(self.recipe.train.batch_rows);
        self.optimizer.validate_lr(sweep.lr_max * factor)?;
        let mut found = LrFound::default();
        for lr in sweep.rates() {
            let loss = match self.step(lr * factor, &mut Observers::new()) {
                Ok(Some(done)) => done.loss,
                Ok(None) | Err(TrainError::HalfUpdated { .. }) => f64::INFINITY,
                Err(error) => return Err(error),
            };
            let goes_on = found.push(lr, loss);
            if let Some(point) = found.points.last() {
                on_point(point);
            }
            if !goes_on {
                break;
            }
        }
        Ok(found)
    }

    fn tokens_of(&self, rows: usize) -> u64 {
        (rows * self.task.tokens_per_row()) as u64
    }

    fn noise_scale_tokens(&self) -> Option<f64> {
        self.state.noise_scale.rows().map(|rows| rows * self.tokens_of(1) as f64)
    }

    /// One step: load, forward and backward per micro-batch, clip, update. `None` where it was skipped.
    fn step(&mut self, lr: f64, observer: &mut dyn Observer) -> Result<Option<Done>, TrainError> {
        self.prune();
        let rows = self.recipe.train.rows_at(self.state.step);
        let batches = self.batches(rows)?;
        if self.optimizer.curvature_is_due(self.state.step) {
            self.estimate_curvature(&batches)?;
        }
        let scale = self.state.loss_scale.factor;
        let updated = match self.recipe.memory.optimizer_in_backward {
            true => self.update_in_backward(lr, &batches)?,
            false => self.update(lr, &batches)?,
        };
        drop(batches);
        let (load, parts) = (self.expert_load()?, self.loss_parts(scale));
        self.state.step += 1;
        self.state.samples += rows as u64;
        self.state.tokens += self.tokens_of(rows);
        let (loss, grad_norm) = match updated {
            Ok(numbers) => numbers,
            Err(skip) => {
                self.answer(&skip, observer)?;
                return Ok(None);
            }
        };
        let expert_load = self.balance_experts(&load);
        match (&mut self.average, &self.shards, &self.model) {
            (Some(average), Some(shards), _) => average.update_parts(shards.values()?),
            (Some(average), None, Some(model)) => average.update(model),
            _ => {}
        }
        self.state.bad_in_a_row = 0;
        self.state.last_good = self.state.step;
        Ok(Some(Done { loss, grad_norm, expert_load, parts }))
    }

    /// The micro-batches of the current step.
    fn batches(&self, rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let parts = self.task.batches(self.state.samples, rows, self.recipe.train.micro_rows())?;
        let scale = self.state.loss_scale.factor;
        let scaled = |batch: TokenBatch| TokenBatch { loss_scale: batch.loss_scale * scale, ..batch };
        Ok(parts.into_iter().map(scaled).collect())
    }

    /// Goes back, or leaves the batch out; ends the run where too many in a row were not finite.
    fn answer(&mut self, skip: &Skip, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let (reason, finite, goes_back) = match skip {
            Skip::NotFinite(reason) => (*reason, false, true),
            Skip::Spike(reason) => (reason.as_str(), true, true),
            // How the loss scale finds its level: nothing that has to stop a run.
            Skip::Overflow(reason) => (reason.as_str(), true, false),
        };
        self.state.skipped += 1;
        self.state.bad_in_a_row += u64::from(!finite);
        if !(goes_back && self.roll_back(reason, observer)?) {
            observer.on_event(&Event::Skipped { step: self.state.step, reason })?;
        }
        if !finite && self.state.bad_in_a_row >= self.recipe.train.max_bad_steps {
            let State { step, bad_in_a_row: in_a_row, last_good, .. } = self.state;
            return Err(TrainError::Diverged { step, in_a_row, last_good });
        }
        Ok(())
    }
}

/// The mean loss and the gradients' norm of an update, or why there was none.
type Updated = Result<(f64, f64), Skip>;

/// Why a batch was left out.
enum Skip {
    NotFinite(&'static str),
    Spike(String),
    Overflow(String),
}

const GRADIENT_NOT_FINITE: Skip = Skip::NotFinite("a gradient is not finite");
const LOSS_NOT_FINITE: Skip = Skip::NotFinite("the loss is not finite");

/// Numbers of a step that updated the parameters.
struct Done {
    loss: f64,
    grad_norm: f64,
    expert_load: Option<f64>,
    /// Of this rank's batches, where there is a teacher.
    parts: [f64; 4],
}

/// Speed since the last logged step, pauses for evaluation and checkpoints left out.
struct Pace {
    since: Instant,
    tokens: u64,
}

impl Pace {
    fn start(tokens: u64) -> Self {
        Self { since: Instant::now(), tokens }
    }

    fn tokens_per_s(&mut self, tokens: u64) -> f64 {
        let rate = (tokens - self.tokens) as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        *self = Self::start(tokens);
        rate
    }
}

/// What a batch's loss is a sum over: pairs of rows, tokens to be predicted, or where there are neither, rows.
fn targets(batch: &TokenBatch) -> usize {
    if batch.preference().is_some() {
        return batch.sequence.batch() / 2;
    }
    match batch.targets.iter().filter(|&&target| target >= 0).count() {
        0 => batch.sequence.batch(),
        tokens => tokens,
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
