//! The recipe's `[precision]`: in what products are multiplied and parameters held, and by what the loss is scaled so that gradients in f16 do not vanish.

use std::fmt;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use firebox_optim::is_trainable;
use firebox_tensor::device::is_fused;
use firebox_tensor::ops::{Compute, is_bf16, to_bf16};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::TrainError;
use crate::recipe::RecipeError;

/// How exactly a run computes. Gradients, norms, softmax, the loss and all sums are f32 whatever it says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionRecipe {
    /// The type in which matrix products are multiplied, and in which what backward needs of a layer waits for it.
    pub compute: ComputeType,
    /// The type in which matrices, embeddings and the head are held between updates: in bf16 there are no master weights, and updates round stochastically.
    pub params: ParamType,
    /// The type in which those are held that are not trained; what a recipe says of its adapters.
    #[serde(skip)]
    pub(crate) frozen: ParamType,
    /// Factor of the loss, taken out of the gradients again; for `compute = "f16"` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScaling>,
}

/// A float type of parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParamType {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

/// A float type of products.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeType {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl From<ComputeType> for Compute {
    fn from(compute: ComputeType) -> Self {
        match compute {
            ComputeType::F32 => Self::F32,
            ComputeType::Bf16 => Self::Bf16,
            ComputeType::F16 => Self::F16,
        }
    }
}

/// By what the loss is scaled: `"dynamic"`, or a number.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum LossScaling {
    /// From 65536, halved where a gradient is not finite, and doubled after 2,000 steps in which all were (PyTorch's `GradScaler`).
    #[default]
    Dynamic,
    /// Always the same.
    Fixed(f64),
}

const DYNAMIC: &str = "dynamic";

impl Serialize for LossScaling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Dynamic => serializer.serialize_str(DYNAMIC),
            Self::Fixed(factor) => serializer.serialize_f64(*factor),
        }
    }
}

impl<'de> Deserialize<'de> for LossScaling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;

        impl Visitor<'_> for Value {
            type Value = LossScaling;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"dynamic\", or a factor")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<LossScaling, E> {
                if text == DYNAMIC { Ok(LossScaling::Dynamic) } else { Err(E::unknown_variant(text, &[DYNAMIC])) }
            }

            fn visit_f64<E: de::Error>(self, factor: f64) -> Result<LossScaling, E> {
                Ok(LossScaling::Fixed(factor))
            }

            fn visit_i64<E: de::Error>(self, factor: i64) -> Result<LossScaling, E> {
                self.visit_f64(factor as f64)
            }
        }

        deserializer.deserialize_any(Value)
    }
}

/// Which parameters go into bfloat16.
struct Halve {
    trained: bool,
    frozen: bool,
}

impl ModuleMapper for Halve {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let wanted = if is_trainable(&param) { self.trained } else { self.frozen };
        if D < 2 || !wanted {
            return param;
        }
        if !param.is_initialized() {
            return param.init_mapper(halve);
        }
        if is_bf16(&param.val()) {
            return param;
        }
        let trainable = param.is_require_grad();
        let (id, tensor, mapper) = param.consume();
        Param::from_mapped_value(id, halve(tensor).set_require_grad(trainable), mapper)
    }
}

impl PrecisionRecipe {
    /// Checks it against the rest of the recipe.
    pub(crate) fn validate(&self, optimizer_in_backward: bool) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.params == ParamType::Bf16 && self.compute != ComputeType::Bf16 {
            return fail("precision.params", "f32, or precision.compute = \"bf16\" beside it", "bf16".into());
        }
        match (self.compute, self.loss_scale) {
            (ComputeType::F32 | ComputeType::Bf16, Some(_)) => {
                let expected = "none without precision.compute = \"f16\": the range of bf16 is that of f32";
                fail("precision.loss_scale", expected, "one".into())
            }
            (_, Some(LossScaling::Fixed(factor))) if !(factor >= 1.0 && factor.is_finite()) => {
                fail("precision.loss_scale", "\"dynamic\", or a factor of at least 1", factor.to_string())
            }
            (ComputeType::F16, _) if optimizer_in_backward => fail(
                "precision.compute",
                "f32 or bf16 with memory.optimizer_in_backward: a gradient that overflows is found after half of the update",
                "f16".into(),
            ),
            _ => Ok(()),
        }
    }

    /// Checks it against the device, which multiplies in its own types where operations are not fused.
    pub(crate) fn check_device(&self, device: &Device) -> Result<(), TrainError> {
        if self.params == ParamType::Bf16 && !is_fused(device) {
            let expected = "f32, or a CPU backend".into();
            return Err(TrainError::Input { what: "precision.params", expected, got: "bf16".into() });
        }
        let dtype = Compute::from(self.compute).dtype();
        if is_fused(device) || device.supports_dtype(dtype) {
            return Ok(());
        }
        let expected = "a type that the device multiplies: f32, or another backend".into();
        Err(TrainError::Input { what: "precision.compute", expected, got: format!("{dtype:?}") })
    }

    /// The module with its parameters in the type in which they are held: those of two dimensions or more. Those that have not been made yet are not made.
    pub(crate) fn hold<M: Module>(&self, module: M) -> M {
        let trained = self.params == ParamType::Bf16;
        self.halve(module, Halve { trained, frozen: trained || self.frozen == ParamType::Bf16 })
    }

    /// The same of a module in which others than those that are trained are held already.
    pub(crate) fn hold_trained<M: Module>(&self, module: M) -> M {
        self.halve(module, Halve { trained: self.params == ParamType::Bf16, frozen: false })
    }

    fn halve<M: Module>(&self, module: M, mut which: Halve) -> M {
        if which.trained || which.frozen { module.map(&mut which) } else { module }
    }

    /// Before the first step.
    pub(crate) fn initial(&self) -> LossScale {
        match (self.compute, self.loss_scale.unwrap_or_default()) {
            (ComputeType::F16, LossScaling::Dynamic) => LossScale { factor: INITIAL, good_steps: 0 },
            (ComputeType::F16, LossScaling::Fixed(factor)) => LossScale { factor, good_steps: 0 },
            _ => LossScale::default(),
        }
    }

    /// After a step whose gradients were finite.
    pub(crate) fn grow(&self, scale: &mut LossScale) {
        if !self.is_dynamic() {
            return;
        }
        scale.good_steps += 1;
        if scale.good_steps == GROWTH_INTERVAL {
            *scale = LossScale { factor: scale.factor * 2.0, good_steps: 0 };
        }
    }

    /// After a step with a gradient that was not finite. Whether a smaller factor may help.
    pub(crate) fn back_off(&self, scale: &mut LossScale) -> bool {
        let helps = self.is_dynamic() && scale.factor > 1.0;
        if helps {
            *scale = LossScale { factor: scale.factor / 2.0, good_steps: 0 };
        }
        helps
    }

    fn is_dynamic(&self) -> bool {
        self.compute == ComputeType::F16 && self.loss_scale.unwrap_or_default() == LossScaling::Dynamic
    }
}

const INITIAL: f64 = 65536.0;
const GROWTH_INTERVAL: u64 = 2000;

/// The factor of the loss now.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// A power of two where it is dynamic: scaling changes no bit.
    pub factor: f64,
    /// Steps since it changed.
    pub good_steps: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { factor: 1.0, good_steps: 0 }
    }
}

/// In bfloat16, without gradients.
fn halve<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.device().is_autodiff() {
        true => Tensor::from_inner(to_bf16(tensor.inner(), None)),
        false => to_bf16(tensor, None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Recipe;

    fn recipe(set: &[&str]) -> Result<Recipe, RecipeError> {
        Recipe::load("tiny", &set.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn the_scale_falls_at_once_and_grows_slowly() {
        let precision = recipe(&["precision.compute=f16"]).unwrap().precision;
        let mut scale = precision.initial();
        assert_eq!(scale.factor, 65536.0);
        assert!(precision.back_off(&mut scale));
        (0..GROWTH_INTERVAL - 1).for_each(|_| precision.grow(&mut scale));
        assert_eq!(scale, LossScale { factor: 32768.0, good_steps: GROWTH_INTERVAL - 1 });
        precision.grow(&mut scale);
        assert_eq!(scale, LossScale { factor: 65536.0, good_steps: 0 });
        let halvings = (0..).take_while(|_| precision.back_off(&mut scale)).count();
        assert_eq!((halvings, scale.factor), (16, 1.0));

        let fixed = recipe(&["precision={ compute = \"f16\", loss_scale = 128 }"]).unwrap().precision;
        let mut scale = fixed.initial();
        assert!(!fixed.back_off(&mut scale));
        (0..=GROWTH_INTERVAL).for_each(|_| fixed.grow(&mut scale));
        assert_eq!(scale.factor, 128.0);
        assert_eq!(recipe(&["precision.compute=bf16"]).unwrap().precision.initial().factor, 1.0);
    }

    #[test]
    fn values_round_trip_and_errors_say_what_to_do() {
        for set in [&["precision.compute=bf16"][..], &["precision.compute=f16", "precision.loss_scale=dynamic"]] {
            let recipe = recipe(set).unwrap();
            assert_eq!(recipe.clone().with(&[]).unwrap(), recipe);
        }
        for (set, says) in [
            (&["precision.compute=fp16"][..], "did you mean `f16`?"),
            (&["precision.params=bf16"], "precision.compute = \"bf16\" beside it"),
            (&["precision.compute=bf16", "precision.loss_scale=dynamic"], "none without"),
            (&["precision.compute=f16", "precision.loss_scale=0.5"], "at least 1"),
            (&["precision.compute=f16", "precision.loss_scale=dynamc"], "did you mean `dynamic`?"),
            (
                &[
                    "precision.compute=f16",
                    "memory.optimizer_in_backward=true",
                    "optimizer.clip=0",
                    "train.micro_batch_rows=0",
                ],
                "f32 or bf16 with",
            ),
        ] {
            let error = recipe(set).unwrap_err().to_string();
            assert!(error.contains(says), "{set:?}: {error}");
        }
    }
}
