//! Step after step, each from the last one's model into a folder of its own, with what came of it.
//!
//! ```text
//! OUT/compress.toml     the recipe
//! OUT/results.json      the model at the start, and after each finished step: what the report shows
//! OUT/report.html
//! OUT/1-prune/          a checkpoint, or a run with its checkpoints
//! OUT/2-quantize/
//! ```
//!
//! A step whose row is in `results.json` is done. One that was interrupted is done again, training from its last checkpoint.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use firebox_data::{Dataset, Tokenizer};
use firebox_models::TokenBatch;
use firebox_models::transformer::{Transformer, TransformerConfig};
use serde::{Deserialize, Serialize};

use super::measure::{Measured, measure};
use super::recipe::{Calibration, CompressRecipe, Step};
use crate::TrainError;
use crate::evaluate::token_batch;
use crate::export::export;
use crate::model_io::load;
use crate::observe::files::{read_json, replace, write_json};
use crate::reshape;

/// A model after a step, or before the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What was done.
    pub name: String,
    /// Where the model is: in the pipeline's folder, or where it came from.
    pub folder: PathBuf,
    /// Seconds that the step took.
    pub seconds: f64,
    /// What it is worth.
    pub measured: Measured,
}

/// What a caller hears.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A step begins.
    Begun {
        /// Its number, from 1; 0 for the measuring of the model at the start.
        number: usize,
        /// What it does.
        name: &'a str,
    },
    /// A stage of the model is done.
    Stage {
        /// How many are.
        done: usize,
        /// Of how many.
        of: usize,
    },
    /// A step is done, in this call or, where `before`, in an earlier one.
    Done {
        /// What came of it.
        row: &'a Row,
        /// Whether it was done already.
        before: bool,
    },
}

/// A pipeline in a folder.
pub struct Pipeline<'a> {
    pub(super) recipe: CompressRecipe,
    pub(super) start: PathBuf,
    pub(super) out: PathBuf,
    pub(super) dataset: &'a Dataset,
    pub(super) device: Device,
}

/// A model that a step changes.
pub(super) struct Source {
    pub path: PathBuf,
    pub config: TransformerConfig,
    pub tokenizer: Option<Tokenizer>,
}

impl Source {
    pub fn open(path: &Path, device: &Device) -> Result<Self, TrainError> {
        let loaded = load(path, device)?;
        Ok(Self { path: path.into(), config: loaded.model.config().clone(), tokenizer: loaded.tokenizer })
    }

    /// Its model, none of whose parameters is in memory yet.
    pub fn model(&self, device: &Device) -> Result<Transformer, TrainError> {
        Ok(load(&self.path, device)?.model)
    }
}

impl<'a> Pipeline<'a> {
    /// The pipeline that makes the model in `start` smaller, in the folder `out`, where it may have been begun. `device` is one without gradients.
    ///
    /// # Errors
    /// [`TrainError::Resume`] where the folder holds another pipeline; as [`load`], and what the recipe's steps refuse.
    pub fn open(
        recipe: CompressRecipe,
        start: &Path,
        out: &Path,
        dataset: &'a Dataset,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let start = std::path::absolute(start).map_err(TrainError::io("find", start))?;
        let model = load(&start, device)?.model;
        recipe.check(&model)?;
        let config = model.config().clone();
        if recipe.steps.iter().any(Step::is_calibrated) {
            calibration(&recipe.calibration, dataset, &config)?;
        }
        std::fs::create_dir_all(out).map_err(TrainError::io("create", out))?;
        let kept = out.join("compress.toml");
        let text = format!("# of {}\n{}", start.display(), recipe.to_toml());
        match std::fs::read_to_string(&kept) {
            Ok(found) if found == text => {}
            Ok(_) => {
                let expected = "the pipeline that was begun there: the same model and recipe".into();
                let got = "others: choose another folder with --out".into();
                return Err(TrainError::Resume { path: out.into(), expected, got });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => replace(&kept, text.as_bytes())?,
            Err(error) => return Err(TrainError::io("read", kept)(error)),
        }
        Ok(Self { recipe, start, out: out.into(), dataset, device: device.clone() })
    }

    /// Does what is left to do; returns all rows, that of the start first. Ends early when `interrupt` is set.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn run(&self, on: &mut dyn FnMut(Progress<'_>), interrupt: &AtomicBool) -> Result<Vec<Row>, TrainError> {
        let results = self.out.join("results.json");
        let mut rows: Vec<Row> = read_json(&results, "the rows of a pipeline")?.unwrap_or_default();
        rows.truncate(self.recipe.steps.len() + 1);
        rows.iter().for_each(|row| on(Progress::Done { row, before: true }));
        while rows.len() <= self.recipe.steps.len() && !interrupt.load(Ordering::Relaxed) {
            let (number, started) = (rows.len(), Instant::now());
            let row = match rows.last() {
                None => {
                    on(Progress::Begun { number, name: "measure" });
                    let measured = self.measured(&self.start)?;
                    Row { name: "start".into(), folder: self.start.clone(), seconds: 0.0, measured }
                }
                Some(last) => {
                    let step = &self.recipe.steps[number - 1];
                    let name = step.name();
                    on(Progress::Begun { number, name: &name });
                    let folder = PathBuf::from(format!("{number}-{}", step.kind()));
                    let into = self.out.join(&folder);
                    if !self.step(step, &self.folder(last), &into, on, interrupt)? {
                        break;
                    }
                    let seconds = started.elapsed().as_secs_f64();
                    // What a step exports is another form of the same model.
                    let measured = if step.is_export() { last.measured.clone() } else { self.measured(&into)? };
                    let folder = if step.is_export() { last.folder.clone() } else { folder };
                    Row { name, folder, seconds, measured }
                }
            };
            on(Progress::Done { row: &row, before: false });
            rows.push(row);
            write_json(&results, &rows)?;
        }
        let title = self.out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        super::report::write(&self.out, &title, &rows)?;
        Ok(rows)
    }

    /// Where the model of a row is.
    pub fn folder(&self, row: &Row) -> PathBuf {
        self.out.join(&row.folder)
    }

    fn measured(&self, path: &Path) -> Result<Measured, TrainError> {
        measure(path, self.dataset, &self.device, &self.recipe.eval)
    }

    /// Whether the step was done, and not interrupted.
    fn step(
        &self,
        step: &Step,
        from: &Path,
        into: &Path,
        on: &mut dyn FnMut(Progress<'_>),
        interrupt: &AtomicBool,
    ) -> Result<bool, TrainError> {
        // But for training, what a step writes has its name only when it is whole: this one was done, and killed before it was noted.
        if !matches!(step, Step::Train(_) | Step::Distill(_)) && into.exists() {
            return Ok(true);
        }
        let source = Source::open(from, &self.device)?;
        match step {
            Step::Prune(prune) => self.prune(prune, &source, into, on)?,
            Step::Quantize(quantize) => self.quantize(quantize, &source, into, on)?,
            Step::Shrink(shrink) => self.shrink(shrink, &source, into)?,
            Step::Share(share) => {
                reshape::share(from, into, share.layers_per_block, share.delta_rank)?;
            }
            Step::LowRank(low) => self.low_rank(low, &source, into)?,
            Step::Export(step) => {
                export(from, step.target()?, into)?;
            }
            Step::Train(train) => return self.train(train, false, &source, into, interrupt),
            Step::Distill(train) => return self.train(train, true, &source, into, interrupt),
        }
        Ok(true)
    }

    /// Calibration text for a model of this shape.
    ///
    /// # Errors
    /// [`TrainError::Input`] where the text is too short for it.
    pub(super) fn calibration(&self, config: &TransformerConfig) -> Result<Vec<TokenBatch>, TrainError> {
        calibration(&self.recipe.calibration, self.dataset, config)
    }
}

fn calibration(
    part: &Calibration,
    dataset: &Dataset,
    config: &TransformerConfig,
) -> Result<Vec<TokenBatch>, TrainError> {
    /// Rows that run through a stage at once.
    const AT_ONCE: usize = 8;
    let tokens = if part.tokens == 0 { config.context } else { part.tokens };
    if tokens > config.context {
        let (expected, got) = (format!("at most the model's context, {}", config.context), tokens.to_string());
        return Err(TrainError::Input { what: "calibration.tokens", expected, got });
    }
    let loader = dataset.train_loader(tokens, part.seed)?;
    let rows = part.rows as u64;
    if loader.samples_per_epoch() < rows {
        let expected = format!("text for {rows} rows of {tokens} tokens (calibration.rows, calibration.tokens)");
        let got = format!("enough for {}: give more --data, or ask for fewer rows", loader.samples_per_epoch());
        return Err(TrainError::Input { what: "calibration text", expected, got });
    }
    let batches = (0..rows).step_by(AT_ONCE).map(|first| {
        let batch = loader.batch(first, AT_ONCE.min((rows - first) as usize));
        let targets = batch.target_count();
        token_batch(batch, targets)
    });
    Ok(batches.collect())
}
