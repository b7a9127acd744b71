//! Fine-tuning of few parameters: adapters beside a model that stays as it is, and parameters that are left as they are.

mod files;
mod peft;

use std::path::PathBuf;

use burn::tensor::Device;
use firebox_models::transformer::hf::Family;
use firebox_models::transformer::{
    AdapterConfig, AdapterKind, Target, Targets, Transformer, TransformerConfig, freeze,
};
use firebox_optim::Patterns;
use firebox_tensor::device::is_fused;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::precision::ParamType;
use crate::quantized::nf4;
use crate::ranks::Layout;
use crate::recipe::{Recipe, RecipeError};
use crate::task::Model;

pub use files::merge_adapters;
pub(crate) use files::{Base, CONFIG, Kept, WEIGHTS, is_adapted, load, merged, start};
pub(crate) use peft::{config_json, open as open_peft};

/// The recipe's part on adapters: the model of `init` stays as it is, and what is trained are products of low rank beside its linear layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterRecipe {
    /// `lora` or `dora`.
    pub kind: AdapterKind,
    /// Inner width of the products.
    pub rank: usize,
    /// What the products are scaled by, times the rank. Default: twice the rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Whether the scale is alpha over the root of the rank, not over the rank.
    #[serde(skip_serializing_if = "is_false")]
    pub rslora: bool,
    /// The layers that have one: `q_proj`, `k_proj`, `v_proj` (or `c_attn`, all three as one), `o_proj`, `gate_proj`, `up_proj`, `down_proj`, or `all`. Default: queries and values, as
    /// PEFT's; of GPT-2, `c_attn`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// In what the model that stays as it is is held.
    pub base: BaseFormat,
    /// Adapters to go on from, in place of new ones: a folder of PEFT, or a run or checkpoint with adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Default for AdapterRecipe {
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            rank: 8,
            alpha: None,
            rslora: false,
            targets: vec![],
            base: BaseFormat::F32,
            init: None,
        }
    }
}

/// In what parameters are held that are not trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseFormat {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16: matrices, embeddings and the head.
    Bf16,
    /// The matrices of the blocks in 4 bits (NF4, QLoRA, Dettmers et al., arXiv:2305.14314) with an f16 scale for each 64 inputs, embeddings and the head in bfloat16.
    Nf4,
}

/// Inputs of an output that share a scale of NF4, as in QLoRA.
const NF4_GROUP: usize = 64;

impl AdapterRecipe {
    /// The type in which parameters that are not trained are held, unless they are packed.
    pub(crate) fn frozen_type(&self) -> ParamType {
        match self.base {
            BaseFormat::F32 => ParamType::F32,
            BaseFormat::Bf16 | BaseFormat::Nf4 => ParamType::Bf16,
        }
    }

    pub(crate) fn validate(&self, recipe: &Recipe) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.base == BaseFormat::Nf4 && recipe.init.is_none() {
            let expected = "f32 or bf16 without init: checkpoints have adapters alone, and need the model beside them";
            return fail("adapter.base", expected, "nf4".into());
        }
        let averages = matches!(recipe.optimizer.algorithm, firebox_optim::Algorithm::ScheduleFree(_));
        let others = [
            ("qat", recipe.qat.is_some()),
            ("prune", recipe.prune.is_some()),
            ("distill", recipe.distill.is_some()),
            ("average", recipe.average.is_some()),
            ("optimizer.kind = \"schedule_free\"", averages),
            ("model.mup_base_width", recipe.model.mup_base_width.is_some()),
        ];
        match others.into_iter().find(|(_, there)| *there) {
            Some((other, _)) => fail("adapter", "none beside what changes or averages the model itself", other.into()),
            None => Ok(()),
        }
    }

    /// The adapters of a model of this shape.
    ///
    /// # Errors
    /// [`TrainError::Input`] for a name that is no layer's; [`TrainError::Model`] for a rank or layers that it cannot have.
    pub(crate) fn resolve(&self, config: &TransformerConfig) -> Result<AdapterConfig, TrainError> {
        let plain = TransformerConfig { adapter: None, ..config.clone() };
        let packed = Family::of(&plain) == Family::Gpt2;
        let targets = match &self.targets[..] {
            [] if packed => Targets::new([Target::Packed]),
            [] => Targets::new([Target::Query, Target::Value]),
            [all] if all == "all" => Targets::all(&plain, packed),
            names => Targets::try_from(names.to_vec()).map_err(|error| TrainError::Input {
                what: "adapter.targets",
                expected: "names of layers, or \"all\" alone".into(),
                got: error.to_string(),
            })?,
        };
        let alpha = self.alpha.unwrap_or(2.0 * self.rank as f64);
        let adapter = AdapterConfig { kind: self.kind, rank: self.rank, alpha, rslora: self.rslora, targets };
        TransformerConfig { adapter: Some(adapter), ..plain }.validate()?;
        Ok(adapter)
    }

    /// The model with its adapters; one that has these stays as it is.
    pub(crate) fn apply(&self, model: Transformer, seed: u64) -> Result<Transformer, TrainError> {
        let adapter = self.resolve(model.config())?;
        match model.config().adapter {
            Some(there) if there == adapter => Ok(model),
            Some(there) => Err(TrainError::Input {
                what: "adapter",
                expected: format!("those of the model, {there:?}"),
                got: format!("{adapter:?}"),
            }),
            None => {
                let model = model.with_adapters(adapter, seed)?;
                match &self.init {
                    Some(path) => start(model, path),
                    None => Ok(model),
                }
            }
        }
    }

    /// The model with the adapters of [`init`](Self::init), a folder of PEFT, of whatever kind and rank these are.
    ///
    /// # Errors
    /// [`TrainError`]: no such folder, adapters that the model cannot have, tensors that do not fit.
    pub fn imported(&self, model: Transformer) -> Result<Transformer, TrainError> {
        let Some(path) = &self.init else {
            return Err(TrainError::Input {
                what: "adapter.init",
                expected: "a folder of PEFT".into(),
                got: "none".into(),
            });
        };
        let adapter = files::described(model.config(), path)?;
        start(model.with_adapters(adapter, 0)?, path)
    }

    /// Checks it against the device.
    pub(crate) fn check_device(&self, device: &Device) -> Result<(), TrainError> {
        if self.base == BaseFormat::F32 || is_fused(device) {
            return Ok(());
        }
        let expected = "f32, or a CPU backend (ndarray, flex)".into();
        Err(TrainError::Input { what: "adapter.base", expected, got: format!("{:?}", self.base).to_lowercase() })
    }

    /// Checks it against the ranks.
    pub(crate) fn check_layout(&self, layout: &Layout) -> Result<(), TrainError> {
        if self.base != BaseFormat::Nf4 || layout.tp * layout.ep == 1 {
            return Ok(());
        }
        let expected = "f32 or bf16 with tp or ep: packed matrices are not divided; ranks with data of their own can have them (dp, any zero)";
        Err(TrainError::Input { what: "adapter.base", expected: expected.into(), got: "nf4".into() })
    }

    /// The model with its matrices packed, if that is how they are held.
    pub(crate) fn pack(&self, model: Transformer) -> Transformer {
        if self.base != BaseFormat::Nf4 || model.is_packed() || model.parallel().is_some() {
            return model;
        }
        model.pack_linear(|name, shape, values| nf4(name, shape, values, NF4_GROUP))
    }
}

/// Parameters that are left as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FreezeRecipe {
    /// Patterns of their names, with `*` for anything, `?` for one character, `{a,b}` for either.
    pub params: Vec<String>,
}

impl FreezeRecipe {
    pub(crate) fn apply<M: Model>(&self, model: M) -> Result<M, TrainError> {
        let patterns = Patterns::new(&self.params)?;
        let infos = firebox_optim::parameters(&model)?;
        for pattern in &self.params {
            let one = Patterns::new(std::slice::from_ref(pattern))?;
            if !infos.iter().any(|info| one.matches(&info.name)) {
                let expected = "patterns that some parameter's name fits, such as \"blocks.0.*\" or \"embed.*\"".into();
                return Err(TrainError::Input { what: "freeze.params", expected, got: format!("{pattern:?}") });
            }
        }
        if infos.iter().all(|info| !info.trainable || patterns.matches(&info.name)) {
            let (expected, got) = ("patterns that leave something to train".into(), format!("{:?}", self.params));
            return Err(TrainError::Input { what: "freeze.params", expected, got });
        }
        Ok(freeze(model, &|name| patterns.matches(name)))
    }
}

impl Recipe {
    /// A model as it is trained: with its losses, and with what stays as it is held and left so.
    pub(crate) fn prepared<M: Model>(&self, model: M) -> Result<M, TrainError> {
        let model = model.for_recipe(self);
        let model = match &self.freeze {
            Some(freeze) => freeze.apply(model)?,
            None => model,
        };
        Ok(self.precision.hold(model))
    }
}
