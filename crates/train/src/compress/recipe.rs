//! What `firebox compress` does, in one TOML file.

use std::path::Path;

use firebox_compress::format::{Element, Group};
use firebox_compress::prune::{Sparsity, magnitude, magnitude_global};
use firebox_compress::{CompressError, Format, Matrix, ScalarFormat};
use firebox_data::DataConfig;
use firebox_models::transformer::{LowRank, Transformer};
use serde::{Deserialize, Serialize};

use crate::export::Target;
use crate::model_io::later;
use crate::recipe::{RecipeError, parse_toml, read_text};
use crate::reshape::structured::Removal;
use crate::{Recipe, TrainError};

/// Steps that make a model smaller, one after the other, and the text by which they go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompressRecipe {
    /// Tokenizing and split, as in a training recipe; the tokenizer is the model's.
    #[serde(default)]
    pub data: DataConfig,
    /// Calibration.
    #[serde(default)]
    pub calibration: Calibration,
    /// Evaluation after each step.
    #[serde(default)]
    pub eval: EvalPart,
    /// What to do, in this order.
    pub steps: Vec<Step>,
}

/// Text whose hidden states show what matters in a layer: rows of the training text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Calibration {
    /// Rows. Their hidden states are in memory.
    pub rows: usize,
    /// Tokens of a row; 0: the model's context.
    pub tokens: usize,
    /// Seed of their choice.
    pub seed: u64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self { rows: 128, tokens: 0, seed: 1337 }
    }
}

/// Evaluation after each step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalPart {
    /// Batches of held-out text at most; 0: all.
    pub max_batches: u64,
    /// Rows evaluated at once.
    pub rows: usize,
    /// Tokens that are generated to measure speed; 0: none.
    pub speed_tokens: usize,
}

impl Default for EvalPart {
    fn default() -> Self {
        Self { max_batches: 64, rows: 8, speed_tokens: 64 }
    }
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// Weights become zero.
    Prune(Prune),
    /// Weights become integers of few bits.
    Quantize(Quantize),
    /// Structures are taken out.
    Shrink(Shrink),
    /// Layers share blocks.
    Share(Share),
    /// Matrices become products of two.
    LowRank(LowRankStep),
    /// The model in the form of another program; the next step goes on from the same model.
    Export(Export),
    /// Training, to recover.
    Train(Train),
    /// Training against a teacher.
    Distill(Train),
}

/// In what weights are stored, and how that is found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// Of the blocks' matrices; with a budget, of those whose inputs nobody sees (experts).
    pub format: Format,
    /// Formats by what each matrix bears.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// How codes and scales are found.
    #[serde(default)]
    pub method: QuantizeMethod,
    /// Of embedding and head, by rounding to nearest: they are looked up, and decide between tokens.
    #[serde(default)]
    pub tables: Tables,
    /// GPTQ: begin with the inputs that matter most.
    #[serde(default, skip_serializing_if = "is_false")]
    pub act_order: bool,
    /// SmoothQuant: how much of the inputs' range moves into the weights, from 0 to 1.
    #[serde(default = "half")]
    pub alpha: f64,
}

fn half() -> f64 {
    0.5
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

/// Bits that are divided among matrices, so that what rounding does to all outputs together is least.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Bits for each weight of the blocks' matrices, scales included.
    pub bits_per_weight: f64,
    /// What a matrix may get.
    #[serde(default = "candidates")]
    pub formats: Vec<Format>,
}

fn candidates() -> Vec<Format> {
    ["int8-channel", "int4", "int3", "int2"].into_iter().filter_map(|name| name.parse().ok()).collect()
}

impl Budget {
    /// The formats.
    ///
    /// # Errors
    /// As [`Quantize::scalar`].
    pub(super) fn scalars(&self) -> Result<Vec<ScalarFormat>, RecipeError> {
        self.formats.iter().map(|&format| scalar(format)).collect()
    }
}

/// No block of GGUF.
fn scalar(format: Format) -> Result<ScalarFormat, RecipeError> {
    match format {
        Format::Scalar(format) => Ok(format),
        Format::Blocks(block) => Err(RecipeError::Value {
            key: "steps.format",
            expected: "int8, int4, int3, int2, nf4 or fp8; GGUF's blocks are for kind = \"export\"".into(),
            got: block.name().to_lowercase(),
        }),
    }
}

impl Quantize {
    /// The format.
    ///
    /// # Errors
    /// [`RecipeError::Value`] for GGUF's blocks.
    pub fn scalar(&self) -> Result<ScalarFormat, RecipeError> {
        scalar(self.format)
    }

    /// Whether it looks at calibration text.
    pub fn is_calibrated(&self) -> bool {
        self.method.is_calibrated() || self.budget.is_some()
    }

    fn check(&self, matrices: &[(String, Vec<usize>)]) -> Result<(), TrainError> {
        let mut formats = vec![self.scalar()?];
        if let Some(budget) = &self.budget {
            formats.extend(budget.scalars()?);
            if budget.formats.is_empty() || budget.bits_per_weight.is_nan() || budget.bits_per_weight <= 0.0 {
                let (expected, got) = ("bits above 0, and formats".into(), budget.bits_per_weight.to_string());
                return Err(RecipeError::Value { key: "steps.budget", expected, got }.into());
            }
        }
        if !(0.0..=1.0).contains(&self.alpha) {
            let (expected, got) = ("a share from 0 to 1".into(), self.alpha.to_string());
            return Err(RecipeError::Value { key: "steps.alpha", expected, got }.into());
        }
        for (name, shape) in matrices {
            let inputs = shape[shape.len() - 2];
            for format in &formats {
                format.group_len(shape.iter().product::<usize>() / inputs, inputs).map_err(|error| {
                    TrainError::Input {
                        what: "quantize",
                        expected: "a format that every matrix can have".into(),
                        got: format!("{name}: {error}"),
                    }
                })?;
            }
        }
        Ok(())
    }
}

/// How codes and scales are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizeMethod {
    /// Round to nearest, in the range of the weights.
    Nearest,
    /// Round to nearest, in the range of least squared error.
    Mse,
    /// What rounding a weight does to the outputs, later weights make up for (Frantar et al., arXiv:2210.17323).
    #[default]
    Gptq,
    /// Inputs that are large get finer weights (Lin et al., arXiv:2306.00978).
    Awq,
    /// Some of the inputs' range moves into the weights, for products of 8-bit integers (Xiao et al., arXiv:2211.10438).
    Smoothquant,
}

impl QuantizeMethod {
    /// Whether it looks at calibration text.
    pub fn is_calibrated(self) -> bool {
        matches!(self, Self::Gptq | Self::Awq | Self::Smoothquant)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::Mse => "mse",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::Smoothquant => "smoothquant",
        }
    }
}

/// The format of embedding and head, or `"none"` to leave them in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tables(Option<ScalarFormat>);

impl Tables {
    /// The format, if they have one.
    pub fn format(self) -> Option<ScalarFormat> {
        self.0
    }
}

impl Default for Tables {
    /// 8 bits, a scale for each row.
    fn default() -> Self {
        Self(ScalarFormat::new(Element::Int8, Group::Channel, true).ok())
    }
}

impl TryFrom<String> for Tables {
    type Error = CompressError;

    fn try_from(name: String) -> Result<Self, CompressError> {
        if name == "none" { Ok(Self(None)) } else { name.parse().map(|format| Self(Some(format))) }
    }
}

impl From<Tables> for String {
    fn from(tables: Tables) -> Self {
        tables.0.map_or_else(|| "none".into(), |format| format.to_string())
    }
}

/// How many structures are taken out, the least important ones by calibration text; of each layer as many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub struct Shrink {
    /// Key-value heads of each layer, with the query heads that use them.
    pub kv_heads: usize,
    /// Units of each feed-forward layer.
    pub units: usize,
    /// Layers.
    pub layers: usize,
    /// Channels of the residual stream.
    pub width: usize,
}

impl Shrink {
    pub(super) fn removal(&self) -> Removal {
        Removal { kv_heads: self.kv_heads, units: self.units, layers: self.layers, width: self.width }
    }

    fn name(&self) -> String {
        let parts =
            [(self.kv_heads, "kv heads"), (self.units, "units"), (self.layers, "layers"), (self.width, "channels")];
        let parts = parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}"));
        format!("without {}", parts.collect::<Vec<_>>().join(", "))
    }
}

/// Layers that share a block: the mean of theirs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// How many, one after the other.
    pub layers_per_block: usize,
    /// Rank of what each adds of its own; 0: nothing.
    #[serde(default)]
    pub delta_rank: usize,
}

/// Ranks of the blocks' matrices; 0: whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRankStep {
    /// Of each kind.
    pub ranks: LowRank,
    /// Whether calibration text says which inputs count.
    #[serde(default = "yes")]
    pub calibrated: bool,
}

fn yes() -> bool {
    true
}

/// Another program's form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// `hf`, `gguf` or `onnx`.
    pub format: String,
    /// How weights are stored, as in `firebox export`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

impl Export {
    pub(super) fn target(&self) -> Result<Target, TrainError> {
        Target::named(&self.format, self.kind.as_deref())
    }
}

/// A training run that starts from the model of the step before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Its recipe: a built-in name or a file. Of the model and the data it says nothing.
    #[serde(default = "default_recipe")]
    pub recipe: String,
    /// Values in its place, `key=value`. The teacher is the model at the start, unless `distill.teacher` names another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
}

impl Train {
    /// The training recipe, with a teacher where there is one.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub(super) fn recipe(&self, teacher: Option<&Path>) -> Result<Recipe, RecipeError> {
        let mut set = self.set.clone();
        if let Some(teacher) = teacher.filter(|_| !set.iter().any(|value| value.starts_with("distill.teacher"))) {
            set.insert(0, format!("distill.teacher={:?}", teacher.display().to_string()));
        }
        Recipe::load(&self.recipe, &set)
    }
}

/// Whether a parameter is a matrix of a block that tokens go through.
pub(super) fn is_matrix(name: &str, dims: usize) -> bool {
    name.starts_with("blocks.") && dims > 1 && !name.contains("router")
}

fn default_recipe() -> String {
    "default".into()
}

/// Which weights become zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    /// How they are chosen.
    #[serde(default)]
    pub method: PruneMethod,
    /// Share of the weights, in [0, 1), or a pattern such as `"2:4"`: so many of each four inputs of an output stay.
    pub sparsity: Sparsity,
}

/// How weights are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PruneMethod {
    /// The smallest of each matrix.
    Magnitude,
    /// The smallest of all matrices together.
    GlobalMagnitude,
    /// The smallest of each output, times the size of their input (Sun et al., arXiv:2306.11695).
    #[default]
    Wanda,
    /// By what their loss does to the output, which the others make up for (Frantar and Alistarh, arXiv:2301.00774).
    SparseGpt,
}

/// The recipes that come with Firebox: name and text.
pub const BUILT_IN: [(&str, &str); 2] = [
    ("int8", include_str!("../../recipes/compress/int8.toml")),
    ("int4", include_str!("../../recipes/compress/int4.toml")),
];

impl CompressRecipe {
    /// The recipe of a built-in name or file, with `overrides` (`key=value`, TOML values) applied.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub fn load(name: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        Self::parse(name, &read_text(name, &BUILT_IN)?, overrides)
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

    /// The recipe as TOML.
    pub fn to_toml(&self) -> String {
        // PANIC: a recipe holds only tables, texts and numbers with TOML forms.
        toml::to_string_pretty(self).expect("a recipe has a TOML form")
    }

    /// Checks the steps, those on matrices against the model at the start unless an earlier step changes its shape.
    pub(super) fn check(&self, model: &Transformer) -> Result<(), TrainError> {
        let matrices: Vec<_> = later(model).into_iter().map(|(info, _)| (info.name, info.shape)).collect();
        let mut matrices: Vec<_> = matrices.into_iter().filter(|(name, shape)| is_matrix(name, shape.len())).collect();
        let mut quantized = false;
        for step in &self.steps {
            if quantized && !step.is_export() {
                let expected = "nothing but exports after quantize: a quantized model is not changed".into();
                return Err(RecipeError::Value { key: "steps", expected, got: step.kind().into() }.into());
            }
            quantized |= matches!(step, Step::Quantize(_));
            match step {
                Step::Prune(prune) => prune.check(&matrices)?,
                Step::Quantize(quantize) => quantize.check(&matrices)?,
                // What follows sees other shapes, and is checked when it begins.
                Step::Shrink(_) | Step::Share(_) | Step::LowRank(_) => matrices.clear(),
                Step::Export(export) => drop(export.target()?),
                Step::Train(train) | Step::Distill(train) => {
                    train.recipe(matches!(step, Step::Distill(_)).then_some(Path::new("teacher")))?;
                }
            }
        }
        Ok(())
    }

    fn validate(&self) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.steps.is_empty() {
            return fail("steps", "at least one: [[steps]] with kind = \"quantize\", say", "none".into());
        }
        for (key, value) in [("calibration.rows", self.calibration.rows), ("eval.rows", self.eval.rows)] {
            if value == 0 {
                return fail(key, "at least 1", "0".into());
            }
        }
        Ok(())
    }
}

impl Step {
    /// Its kind, as in a recipe.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Prune(_) => "prune",
            Self::Quantize(_) => "quantize",
            Self::Shrink(_) => "shrink",
            Self::Share(_) => "share",
            Self::LowRank(_) => "low-rank",
            Self::Export(_) => "export",
            Self::Train(_) => "train",
            Self::Distill(_) => "distill",
        }
    }

    /// Whether it looks at calibration text.
    pub fn is_calibrated(&self) -> bool {
        match self {
            Self::Prune(prune) => prune.method.is_calibrated(),
            Self::Quantize(quantize) => quantize.is_calibrated(),
            Self::Shrink(_) => true,
            Self::LowRank(step) => step.calibrated,
            Self::Share(_) | Self::Export(_) | Self::Train(_) | Self::Distill(_) => false,
        }
    }

    /// Whether the model stays what it is.
    pub fn is_export(&self) -> bool {
        matches!(self, Self::Export(_))
    }

    /// What it does, in a few words.
    pub fn name(&self) -> String {
        match self {
            Self::Prune(prune) => prune.name(),
            Self::Quantize(step) => match &step.budget {
                None => format!("{} {}", step.method.name(), step.format),
                Some(budget) => format!("{} {} bits", step.method.name(), budget.bits_per_weight),
            },
            Self::Shrink(step) => step.name(),
            Self::Share(step) => format!("{} layers a block, rank {}", step.layers_per_block, step.delta_rank),
            Self::LowRank(_) => "low rank".into(),
            Self::Export(step) => format!("{} {}", step.format, step.kind.as_deref().unwrap_or_default()).trim().into(),
            Self::Train(_) | Self::Distill(_) => self.kind().into(),
        }
    }
}

impl Prune {
    fn check(&self, matrices: &[(String, Vec<usize>)]) -> Result<(), TrainError> {
        let global = self.method == PruneMethod::GlobalMagnitude;
        for (_, shape) in matrices {
            let inputs = shape[shape.len() - 2];
            // One output tells whether a pattern goes into the inputs.
            let one = Matrix::new(1, inputs, vec![1.0; inputs])?;
            if global {
                magnitude_global(&[&one], self.sparsity).map(drop)
            } else {
                magnitude(&one, self.sparsity).map(drop)
            }?;
        }
        Ok(())
    }

    fn name(&self) -> String {
        format!("{} {}", self.method.name(), self.sparsity)
    }
}

impl PruneMethod {
    /// Whether it looks at calibration text.
    pub fn is_calibrated(self) -> bool {
        matches!(self, Self::Wanda | Self::SparseGpt)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::GlobalMagnitude => "global magnitude",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
        }
    }
}
