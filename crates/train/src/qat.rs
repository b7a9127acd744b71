//! Training for few bits: every pass sees the weights rounded (quantization-aware training).

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use firebox_models::transformer::{LowRank, Reduction, Transformer, TransformerConfig};
use firebox_optim::{Algorithm, GroupConfig};
use firebox_tensor::ops::FakeQuant;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::checkpoint::resolve;
use crate::ranks::{Layout, Zero};
use crate::recipe::RecipeError;
use crate::trainer::load_trained;

/// The recipe's part on few bits, of the matrices of the blocks; also `qat.json` of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QatRecipe {
    /// 8, 4, 3 or 2.
    pub bits: u32,
    /// Inputs of an output that share a step: 32, 64 or 128; 0: all.
    pub group: usize,
    /// Where steps come from.
    pub method: QatMethod,
}

/// Where the steps of the grid come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QatMethod {
    /// From the largest weight of each group, in every step anew; gradients pass rounding straight through (arXiv:1308.3432).
    Ste,
    /// They are learned (LSQ, arXiv:1902.08153).
    Lsq,
}

impl Default for QatRecipe {
    fn default() -> Self {
        Self { bits: 4, group: 0, method: QatMethod::Ste }
    }
}

/// How fast steps learn beside weights, where an update does not depend on the size of gradients: a step moves all weights of its group, each by as much as its code.
const STEP_LR_SCALE: f64 = 0.01;

impl QatRecipe {
    /// Checks what can be checked without a model.
    pub(crate) fn validate(&self) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if ![2, 3, 4, 8].contains(&self.bits) {
            return fail("qat.bits", "8, 4, 3 or 2", self.bits.to_string());
        }
        if ![0, 32, 64, 128].contains(&self.group) {
            return fail("qat.group", "32, 64 or 128, or 0 for all inputs of an output", self.group.to_string());
        }
        Ok(())
    }

    /// Checks it against the shape of the model.
    pub(crate) fn check(&self, config: &TransformerConfig) -> Result<(), TrainError> {
        let fail = |what, expected: String, got: String| Err(TrainError::Input { what, expected, got });
        if let Some(experts) = &config.experts {
            let expected = "none with experts, whose matrices it does not round".into();
            return fail("qat", expected, format!("{} experts", experts.n_experts));
        }
        let Reduction { low_rank, delta_rank, .. } = config.reduction;
        if low_rank != LowRank::default() || delta_rank > 0 {
            let expected = "none with matrices of low rank or layers' own deltas, which it does not round".into();
            return fail("qat", expected, format!("{low_rank:?}, delta_rank {delta_rank}"));
        }
        let widths = [config.d_model, config.n_heads * config.head_dim, config.d_ff];
        match widths.iter().find(|width| self.group > 0 && !width.is_multiple_of(self.group)) {
            None => Ok(()),
            Some(width) => {
                let expected = format!("a group that divides the inputs of every matrix ({widths:?}), or 0");
                fail("qat.group", expected, format!("{}, which does not divide {width}", self.group))
            }
        }
    }

    /// Checks it against the ranks: what is written and evaluated is rounded, which takes whole matrices.
    pub(crate) fn check_layout(&self, layout: &Layout) -> Result<(), TrainError> {
        let Layout { zero, pp, tp, ep, .. } = layout;
        if pp * tp * ep == 1 && *zero != Zero::Parameters {
            return Ok(());
        }
        let expected = "pp 1, tp 1, ep 1 and zero 0, 1 or 2: it rounds whole matrices".into();
        let got = format!("pp {pp}, tp {tp}, ep {ep}, zero {}", u8::from(*zero));
        Err(TrainError::Input { what: "qat", expected, got })
    }

    /// What weights are rounded to.
    pub fn format(&self) -> FakeQuant {
        FakeQuant { bits: self.bits, group: self.group }
    }

    /// The model that is trained; one that is that already stays as it is.
    pub(crate) fn apply(&self, model: Transformer) -> Transformer {
        if model.has_fake_quant() {
            return model;
        }
        model.with_fake_quant(self.format(), self.method == QatMethod::Lsq)
    }

    /// How the optimizer trains steps: without decay, and, but for SGD (whose gradients have LSQ's factor), slowly.
    pub(crate) fn groups(&self, algorithm: &Algorithm) -> Vec<GroupConfig> {
        if self.method == QatMethod::Ste {
            return vec![];
        }
        let lr_scale = if matches!(algorithm, Algorithm::Sgd(_)) { 1.0 } else { STEP_LR_SCALE };
        let params = vec!["*.quantizer.steps".to_owned()];
        vec![GroupConfig { params, lr_scale, weight_decay: Some(0.0), ..GroupConfig::default() }]
    }
}

/// How the weights of a checkpoint's `model.safetensors` lie on their grids.
#[derive(Debug, Clone, PartialEq)]
pub struct QatSteps {
    /// Bits and groups.
    pub recipe: QatRecipe,
    /// By the name of a weight `[in, out]`, its steps `[groups × out]`: each weight is a whole number of at most [`FakeQuant::largest`] times its step.
    pub steps: BTreeMap<String, Vec<f32>>,
}

/// The file of a checkpoint with its [`QatRecipe`].
pub(crate) const QAT: &str = "qat.json";

/// The grids of a checkpoint (or the last of a run) that was trained for few bits; none for others.
///
/// # Errors
/// [`TrainError`]: nothing there, or a torn file.
pub fn qat_steps(path: &Path) -> Result<Option<QatSteps>, TrainError> {
    if path.join("config.json").is_file() && !path.join("manifest.json").is_file() {
        return Ok(None);
    }
    let checkpoint = resolve(path)?.checkpoint;
    if !checkpoint.contains(QAT) {
        return Ok(None);
    }
    let recipe: QatRecipe = checkpoint.read_json(QAT)?;
    let bad =
        |error: RecipeError| TrainError::Input { what: QAT, expected: "a qat table".into(), got: error.to_string() };
    recipe.validate().map_err(bad)?;
    let model = load_trained(&checkpoint, &Device::default(), Some(&recipe))?.model;
    recipe.check(model.config())?;
    Ok(Some(QatSteps { recipe, steps: model.quantizer_steps().into_iter().collect() }))
}
