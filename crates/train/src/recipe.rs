//! Recipes: everything that determines a run, in one TOML file.

mod error;
mod model;

use std::path::{Path, PathBuf};

use firebox_data::{DataConfig, Source};
use firebox_models::transformer::presets;
use firebox_optim::{Algorithm, AverageConfig, Schedule};
use firebox_tensor::ops::LossConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::adapter::{AdapterRecipe, FreezeRecipe};
use crate::batch_warmup::BatchWarmup;
use crate::distill::{DistillRecipe, StudentInit};
use crate::engine::MemoryRecipe;
use crate::optimizer_recipe::OptimizerRecipe;
use crate::precision::{ParamType, PrecisionRecipe};
use crate::prune::PruneRecipe;
use crate::qat::QatRecipe;
use crate::task::TaskRecipe;
use crate::watch::{OnSpike, WatchRecipe};

pub use error::RecipeError;
pub use model::ModelRecipe;

/// The recipes that come with Firebox: name and text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("default", include_str!("../recipes/default.toml")),
    ("tiny", include_str!("../recipes/tiny.toml")),
    ("shakespeare-char", include_str!("../recipes/shakespeare-char.toml")),
    ("shakespeare-speedrun", include_str!("../recipes/shakespeare-speedrun.toml")),
    ("gpt2-124m", include_str!("../recipes/gpt2-124m.toml")),
    ("finetune", include_str!("../recipes/finetune.toml")),
    ("image-classes", include_str!("../recipes/image-classes.toml")),
    ("image-text", include_str!("../recipes/image-text.toml")),
    ("masked-image", include_str!("../recipes/masked-image.toml")),
    ("image-tokens", include_str!("../recipes/image-tokens.toml")),
    ("text-to-image", include_str!("../recipes/text-to-image.toml")),
    ("bert-mini", include_str!("../recipes/bert-mini.toml")),
];

/// Everything that determines a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run.
    pub name: String,
    /// Seed of initial parameters, order of samples, dropout and sampling.
    #[serde(default = "seed")]
    pub seed: u64,
    /// The model from whose parameters the run starts, in place of initial ones: a run, a checkpoint or a folder in Hugging Face's form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Shape of the model.
    #[serde(default)]
    pub model: ModelRecipe,
    /// What it is trained for.
    #[serde(default, skip_serializing_if = "TaskRecipe::is_language")]
    pub task: TaskRecipe,
    /// Tokenizer, split and filters.
    #[serde(default)]
    pub data: DataConfig,
    /// Where the text comes from; `--data` replaces it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
    /// The optimizer.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// Learning rate over the steps.
    #[serde(default)]
    pub schedule: Schedule,
    /// Length and batches.
    #[serde(default)]
    pub train: TrainRecipe,
    /// Evaluation and samples.
    #[serde(default)]
    pub eval: EvalRecipe,
    /// What is kept.
    #[serde(default)]
    pub checkpoint: CheckpointRecipe,
    /// How to need less memory.
    #[serde(default)]
    pub memory: MemoryRecipe,
    /// In what is computed.
    #[serde(default)]
    pub precision: PrecisionRecipe,
    /// What to do when the loss jumps.
    #[serde(default)]
    pub watch: WatchRecipe,
    /// A running average of the parameters, evaluated beside them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<AverageConfig>,
    /// The teacher of a student.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillRecipe>,
    /// Zeros that stay, and a sparsity that grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prune: Option<PruneRecipe>,
    /// Training for few bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qat: Option<QatRecipe>,
    /// Adapters, which are trained in place of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterRecipe>,
    /// Parameters that are left as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeRecipe>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn seed() -> u64 {
    1337
}

/// Length and batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainRecipe {
    /// Optimizer steps.
    pub steps: u64,
    /// Rows per step.
    pub batch_rows: usize,
    /// Tokens of a row at most. 0: as many as the model's context.
    #[serde(skip_serializing_if = "is_zero")]
    pub row_tokens: usize,
    /// Fewer rows in the first steps; by default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_warmup: Option<BatchWarmup>,
    /// Rows that are in memory at once; gradients of the others are accumulated. 0: all.
    pub micro_batch_rows: usize,
    /// Share of each target that is spread over the vocabulary; in training alone.
    pub label_smoothing: f64,
    /// Factor of the squared logarithm of softmax's denominator, added to the loss; in training alone.
    pub z_loss: f64,
    /// A line of metrics every so many steps.
    pub log_every: u64,
    /// Steps in a row with a loss or gradient that is not finite (they are skipped) before the run stops.
    pub max_bad_steps: u64,
}

impl Default for TrainRecipe {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_rows: 16,
            row_tokens: 0,
            batch_warmup: None,
            micro_batch_rows: 0,
            label_smoothing: 0.0,
            z_loss: 0.0,
            log_every: 10,
            max_bad_steps: 5,
        }
    }
}

impl TrainRecipe {
    /// What the loss is besides the cross-entropy.
    pub fn loss(&self) -> LossConfig {
        LossConfig { label_smoothing: self.label_smoothing, z_loss: self.z_loss }
    }

    /// Tokens of a row at most, of a model with this context.
    pub fn row_tokens(&self, context: usize) -> usize {
        if self.row_tokens == 0 { context } else { self.row_tokens.min(context) }
    }

    /// Rows of step `step` (from 0).
    pub fn rows_at(&self, step: u64) -> usize {
        self.batch_warmup.map_or(self.batch_rows, |warmup| warmup.rows_at(step, self.batch_rows))
    }

    /// Rows of one forward and backward pass.
    pub fn micro_rows(&self) -> usize {
        if self.micro_batch_rows == 0 { self.batch_rows } else { self.micro_batch_rows.min(self.batch_rows) }
    }
}

/// Evaluation on the held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalRecipe {
    /// Every so many steps, and always at the end; 0: only at the end.
    pub every: u64,
    /// At most so many batches on the way; at the end always all. 0: all.
    pub max_batches: u64,
    /// Stop after so many evaluations without a better loss; 0: never.
    pub patience: u64,
    /// Start of the text that the model writes at each evaluation.
    pub prompt: String,
    /// Tokens that it writes; 0: none.
    pub sample_tokens: usize,
}

impl Default for EvalRecipe {
    fn default() -> Self {
        Self { every: 100, max_batches: 0, patience: 0, prompt: String::new(), sample_tokens: 120 }
    }
}

/// Checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointRecipe {
    /// Every so many steps, and always at the end; 0: only at the end.
    pub every: u64,
    /// The last so many are kept.
    pub keep_last: usize,
    /// And the one with the lowest validation loss.
    pub keep_best: bool,
    /// Written while the steps go on, from a copy in memory.
    pub background: bool,
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every: 100, keep_last: 2, keep_best: true, background: true }
    }
}

impl Recipe {
    /// The recipe of a built-in name or file, with `overrides` (`key=value`, TOML values) applied.
    ///
    /// # Errors
    /// [`RecipeError`], which offers the nearest known key for an unknown one.
    pub fn load(name: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        Self::parse(name, &read_text(name, BUILT_IN)?, overrides)
    }

    /// Parses TOML and applies overrides.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        let recipe: Self = parse_toml(origin, text, overrides)?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// The single dial: a model of `n` blocks with everything else in proportion. Tokens are 20 per parameter (Hoffmann et al., arXiv:2203.15556,
    /// section 3), the learning rate falls with the root of the width, the batch grows with it.
    pub fn depth(n: usize) -> Self {
        let model = presets::depth(n, DataConfig::default().vocab_size);
        let batch_rows = (4 * n).next_power_of_two();
        let tokens = 20 * model.num_params();
        let steps = (tokens / (batch_rows * model.context)).max(100) as u64;
        let warmup_steps = (steps / 50).max(1);
        Self {
            name: format!("depth-{n}"),
            seed: seed(),
            init: None,
            model: ModelRecipe { depth: Some(n), ..ModelRecipe::default() },
            task: TaskRecipe::default(),
            data: DataConfig::default(),
            sources: vec![],
            optimizer: OptimizerRecipe {
                lr: 4e-3 * (256.0 / model.d_model as f64).sqrt(),
                ..OptimizerRecipe::default()
            },
            schedule: Schedule::Wsd { warmup_steps, min_lr_ratio: 0.0, decay_fraction: 0.4, decay: Default::default() },
            train: TrainRecipe { steps, batch_rows, micro_batch_rows: 16.min(batch_rows), ..TrainRecipe::default() },
            eval: EvalRecipe { every: (steps / 10).max(1), max_batches: 16, ..EvalRecipe::default() },
            checkpoint: CheckpointRecipe { every: (steps / 10).max(1), ..CheckpointRecipe::default() },
            memory: MemoryRecipe::default(),
            precision: PrecisionRecipe::default(),
            watch: WatchRecipe::default(),
            average: None,
            distill: None,
            prune: None,
            qat: None,
            adapter: None,
            freeze: None,
        }
    }

    /// The peak learning rate: that of the optimizer, scaled to the batch where it says so.
    pub fn peak_lr(&self) -> f64 {
        self.optimizer.lr * self.optimizer.batch_factor(self.train.batch_rows)
    }

    /// Applies `key=value` overrides.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub fn with(self, overrides: &[String]) -> Result<Self, RecipeError> {
        Self::parse(&self.name, &self.to_toml(), overrides)
    }

    /// The recipe as TOML.
    pub fn to_toml(&self) -> String {
        // PANIC: a recipe holds only tables, texts and numbers with TOML forms.
        toml::to_string_pretty(self).expect("a recipe has a TOML form")
    }

    /// SHA-256 of the recipe, in hexadecimal.
    pub fn hash(&self) -> String {
        Sha256::digest(self.to_toml()).iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Checks what can be checked without data.
    fn validate(&self) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.model.preset.is_some() && self.model.depth.is_some() {
            return fail("model.depth", "a preset or a depth, not both", "both".into());
        }
        for (key, value) in [
            ("train.steps", self.train.steps),
            ("train.batch_rows", self.train.batch_rows as u64),
            ("train.log_every", self.train.log_every),
            ("train.max_bad_steps", self.train.max_bad_steps),
            ("checkpoint.keep_last", self.checkpoint.keep_last as u64),
        ] {
            if value == 0 {
                return fail(key, "at least 1", "0".into());
            }
        }
        if let Some(warmup) = &self.train.batch_warmup {
            warmup.validate(self.train.batch_rows)?;
        }
        if !(0.0..1.0).contains(&self.train.label_smoothing) {
            return fail("train.label_smoothing", "a share in [0, 1)", self.train.label_smoothing.to_string());
        }
        if !(self.train.z_loss >= 0.0 && self.train.z_loss.is_finite()) {
            return fail("train.z_loss", "a factor, or 0 for none", self.train.z_loss.to_string());
        }
        if let Some(distill) = &self.distill {
            distill.validate()?;
            if distill.init == StudentInit::Teacher && self.init.is_some() {
                return fail("distill.init", "random with init, which says where the student starts", "teacher".into());
            }
        }
        let micro_batches = self.train.batch_rows.div_ceil(self.train.micro_rows());
        self.watch.validate(micro_batches)?;
        if self.average.is_some() && matches!(self.optimizer.algorithm, Algorithm::ScheduleFree(_)) {
            return fail("average", "none with schedule_free, which is an average already", "one".into());
        }
        if let Some(prune) = &self.prune {
            prune.validate(self.train.steps)?;
            let averages = matches!(self.optimizer.algorithm, Algorithm::ScheduleFree(_))
                || self.average.is_some() && prune.target().is_some();
            if averages {
                let expected = "none with averages of the parameters (schedule_free, [average]): in them a weight that is pruned now is not 0";
                return fail("prune", expected, "one".into());
            }
        }
        if let Some(adapter) = &self.adapter {
            adapter.validate(self)?;
        }
        if let Some(qat) = &self.qat {
            qat.validate()?;
            if self.average.is_some() || matches!(self.optimizer.algorithm, Algorithm::ScheduleFree(_)) {
                let expected = "none with averages of the parameters (schedule_free, [average])";
                return fail("qat", expected, "one".into());
            }
            if self.precision.params == ParamType::Bf16 {
                return fail("precision.params", "f32 with [qat], which rounds by itself", "bf16".into());
            }
        }
        if self.memory.optimizer_in_backward && self.watch.on_spike != OnSpike::Ignore {
            let expected =
                "ignore with memory.optimizer_in_backward, which updates before the gradients' norm is known";
            return fail("watch.on_spike", expected, format!("{:?}", self.watch.on_spike).to_lowercase());
        }
        self.precision.validate(self.memory.optimizer_in_backward)?;
        self.memory.validate(&self.optimizer, micro_batches)
    }
}

/// The text of a built-in recipe or of a file.
pub(crate) fn read_text(name: &str, built_in: &[(&str, &str)]) -> Result<String, RecipeError> {
    if let Some((_, text)) = built_in.iter().find(|(n, _)| *n == name) {
        return Ok((*text).to_string());
    }
    if Path::new(name).is_file() {
        return std::fs::read_to_string(name).map_err(|source| RecipeError::Read { path: name.into(), source });
    }
    let known = built_in.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ");
    Err(RecipeError::Unknown { name: name.into(), known })
}

/// What TOML says, with overrides (`key=value`).
pub(crate) fn parse_toml<T: DeserializeOwned>(
    origin: &str,
    text: &str,
    overrides: &[String],
) -> Result<T, RecipeError> {
    let fail = |reason: String| RecipeError::Parse { origin: origin.into(), hint: nearest(&reason), reason };
    let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| fail(e.message().to_string()))?;
    for given in overrides {
        set(&mut table, given)?;
    }
    table.try_into().map_err(|e: toml::de::Error| fail(one_line(&e)))
}

/// Puts the value of `key.path=value` into the table.
fn set(table: &mut toml::Table, given: &str) -> Result<(), RecipeError> {
    let fail = || RecipeError::Override { given: given.into() };
    let (key, value) = given.split_once('=').ok_or_else(fail)?;
    let (key, value) = (key.trim(), value.trim());
    // A TOML value, or else a text that needs no quotes on the command line.
    let value = match format!("v = {value}").parse::<toml::Table>() {
        Ok(mut parsed) => parsed.remove("v").ok_or_else(fail)?,
        Err(_) => toml::Value::String(value.into()),
    };
    let mut at = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if part.is_empty() {
            return Err(fail());
        }
        if parts.peek().is_none() {
            at.insert(part.into(), value);
            return Ok(());
        }
        at =
            at.entry(part).or_insert_with(|| toml::Value::Table(Default::default())).as_table_mut().ok_or_else(fail)?;
    }
    Err(fail())
}

fn one_line(error: &toml::de::Error) -> String {
    // The first line names the place where there is one; the message is what matters.
    error.to_string().trim().replace('\n', " ")
}

/// `; did you mean X?` for serde's "unknown field `x`, expected one of `a`, `b`".
fn nearest(reason: &str) -> String {
    let mut quoted = reason.split('`').skip(1).step_by(2);
    let Some(unknown) =
        quoted.next().filter(|_| reason.contains("unknown field") || reason.contains("unknown variant"))
    else {
        return String::new();
    };
    quoted
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(unknown.len()) / 2)
        .map(|(_, known)| format!("; did you mean `{known}`?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn built_in_recipes_parse_and_round_trip() {
        for &(name, _) in BUILT_IN {
            let recipe = Recipe::load(name, &[]).unwrap();
            assert_eq!(recipe.name, name);
            assert_eq!(Recipe::parse(name, &recipe.to_toml(), &[]).unwrap(), recipe);
            recipe.model.resolve(4096).unwrap().validate().unwrap();
            recipe.schedule.validate(recipe.train.steps).unwrap();
        }
        for n in 1..20 {
            let recipe = Recipe::depth(n);
            assert_eq!(recipe.clone().with(&[]).unwrap(), recipe);
            recipe.schedule.validate(recipe.train.steps).unwrap();
        }
    }

    #[test]
    fn overrides() {
        let set = |s: &[&str]| Recipe::load("tiny", &s.iter().map(ToString::to_string).collect::<Vec<_>>());
        let recipe = set(&[
            "optimizer.lr=5e-4",
            "eval.prompt=Once upon",
            "schedule={ kind = \"constant\" }",
            "model.d_model=96",
            "model.n_heads=3",
            "model.window=16",
            "train.z_loss=1e-4",
        ])
        .unwrap();
        assert_eq!(recipe.optimizer.lr, 5e-4);
        assert_eq!(recipe.eval.prompt, "Once upon");
        assert_eq!(recipe.schedule, Schedule::Constant { warmup_steps: 0 });
        assert_eq!(recipe.model.resolve(512).unwrap().head_dim, 32);
        assert_eq!(recipe.model.resolve(512).unwrap().window, Some(16));
        assert_eq!(recipe.train.loss(), LossConfig { label_smoothing: 0.0, z_loss: 1e-4 });
        for (bad, says) in [
            ("optimizer.lrr=1", "did you mean `lr`?"),
            ("trian.steps=1", "did you mean `train`?"),
            ("train.steps", "key=value"),
            ("train.steps=many", "steps"),
            ("train.steps=0", "at least 1"),
            ("train.label_smoothing=1.0", "[0, 1)"),
            ("train.z_loss=-1.0", "train.z_loss"),
            ("data.tokeniser=char", "did you mean `tokenizer`?"),
        ] {
            let error = set(&[bad]).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
        let error = set(&["model.d_model=96", "model.n_heads=5"]).unwrap().model.resolve(512).unwrap_err().to_string();
        assert!(error.contains("n_heads") && error.contains("96"), "{error}");
    }
}
