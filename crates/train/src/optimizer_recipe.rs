//! The recipe's part on the optimizer.

use std::collections::BTreeMap;

use firebox_models::Staged;
use firebox_optim::{Algorithm, BatchScaling, Clip, DecayRule, GroupConfig, OptimError, Optimizer, parameters};
use firebox_tensor::ops::Precision;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use crate::mup::Mup;

/// The optimizer: an algorithm with its hyperparameters beside what all have.
///
/// `optimizer = { kind = "lion", lr = 1e-4, beta1 = 0.95 }`; the kind is `adamw` where none is given.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerRecipe {
    /// Peak learning rate, of the batch of `batch_scaling` where there is one.
    pub lr: f64,
    /// Scales the learning rate to the batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_scaling: Option<BatchScaling>,
    /// What decays: `matrices`, `all` or `none`.
    pub decay: DecayRule,
    /// How gradients are clipped: by their largest norm, 0 for none, or adaptively.
    pub clip: Clip,
    /// In how many bits the state is held: `f32`, `bf16` or `int8`.
    pub state: StateFormat,
    /// What the learning rate is multiplied by for each stage (a block, the embedding) that is before another: the last blocks of a model that was trained before learn faster than the
    /// first. 1: all alike.
    #[serde(skip_serializing_if = "is_one")]
    pub layer_decay: f64,
    /// Kind and hyperparameters.
    #[serde(flatten)]
    pub algorithm: Algorithm,
    /// Parameters that are trained in their own way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupConfig>,
}

fn is_one(factor: &f64) -> bool {
    *factor == 1.0
}

/// In how many bits an optimizer's state is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateFormat {
    /// 32.
    #[default]
    F32,
    /// 16, rounded stochastically.
    Bf16,
    /// 8, by blocks.
    Int8,
}

impl From<StateFormat> for Precision {
    fn from(format: StateFormat) -> Self {
        match format {
            StateFormat::F32 => Self::Full,
            StateFormat::Bf16 => Self::Bf16,
            StateFormat::Int8 => Self::Int8,
        }
    }
}

impl Default for OptimizerRecipe {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            batch_scaling: None,
            decay: DecayRule::Matrices,
            clip: Clip::Norm(1.0),
            state: StateFormat::F32,
            layer_decay: 1.0,
            algorithm: Algorithm::default(),
            groups: vec![],
        }
    }
}

impl OptimizerRecipe {
    /// The optimizer before its first step, for batches of `rows`; the groups are those of μP where there is one, after `first`.
    ///
    /// # Errors
    /// [`OptimError`]: a value out of its range, a pattern that is none.
    pub(crate) fn build(
        &self,
        rows: usize,
        mup: Option<Mup>,
        mut first: Vec<GroupConfig>,
    ) -> Result<Optimizer, OptimError> {
        if let Some(scaling) = &self.batch_scaling {
            scaling.validate()?;
        }
        first.extend(mup.map_or_else(|| self.groups.clone(), Mup::groups));
        let optimizer = Optimizer::with_groups(self.algorithm, self.decay, first)?.with_clip(self.clip)?;
        optimizer.validate_lr(self.lr * self.batch_factor(rows))?;
        Ok(optimizer.with_precision(self.state.into()))
    }

    /// What the learning rates of parameters are multiplied by for their stages: BEiT's (Bao et al., arXiv:2106.08254) `decay^(last - stage)`, where a tied head counts as the embedding.
    pub(crate) fn lr_scales<M: Staged>(&self, model: &M) -> Result<BTreeMap<String, f64>, OptimError> {
        if self.layer_decay == 1.0 {
            return Ok(BTreeMap::new());
        }
        let last = model.n_stages() - 1;
        let scale = |name: &str| self.layer_decay.powi((last - model.first_stage(name)) as i32);
        Ok(parameters(model)?.into_iter().map(|info| (info.name.clone(), scale(&info.name))).collect())
    }

    /// What the learning rate is multiplied by for a batch of `rows`.
    pub(crate) fn batch_factor(&self, rows: usize) -> f64 {
        self.batch_scaling.map_or(1.0, |scaling| scaling.factor(rows))
    }
}

// By hand: `flatten` would let unknown keys pass.
impl<'de> Deserialize<'de> for OptimizerRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut table = Table::deserialize(deserializer)?;
        let mut recipe = Self::default();
        take(&mut table, "lr", &mut recipe.lr)?;
        take(&mut table, "batch_scaling", &mut recipe.batch_scaling)?;
        take(&mut table, "decay", &mut recipe.decay)?;
        take(&mut table, "clip", &mut recipe.clip)?;
        take(&mut table, "state", &mut recipe.state)?;
        take(&mut table, "layer_decay", &mut recipe.layer_decay)?;
        if !(recipe.layer_decay > 0.0 && recipe.layer_decay <= 1.0) {
            return Err(D::Error::custom(format!(
                "layer_decay: expected a factor in (0, 1], got {}",
                recipe.layer_decay
            )));
        }
        take(&mut table, "groups", &mut recipe.groups)?;
        table.entry("kind").or_insert_with(|| recipe.algorithm.name().into());
        recipe.algorithm = Value::Table(table).try_into().map_err(with_common_keys)?;
        Ok(recipe)
    }
}

fn take<T: DeserializeOwned, E: Error>(table: &mut Table, key: &str, into: &mut T) -> Result<(), E> {
    if let Some(value) = table.remove(key) {
        *into = value.try_into().map_err(|error: toml::de::Error| E::custom(format!("{key}: {}", error.message())))?;
    }
    Ok(())
}

/// The algorithm knows its own fields alone; what is offered in place of an unknown one are all.
fn with_common_keys<E: Error>(error: toml::de::Error) -> E {
    let all = "unknown field `{}`, expected one of `lr`, `batch_scaling`, `decay`, `clip`, `state`, `layer_decay`, `groups`, ";
    match error.message().strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, expected one of ")) {
        Some((field, fields)) => E::custom(all.replace("{}", field) + fields),
        None => E::custom(error.message()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_optim::{AdamWConfig, LionConfig};

    use super::*;

    #[test]
    fn the_kind_is_adamw_unless_told_otherwise_and_nothing_unknown_passes() {
        let read = |text: &str| toml::from_str::<OptimizerRecipe>(text);
        assert_eq!(read("").unwrap(), OptimizerRecipe::default());
        let adamw = read("lr = 1\nbeta2 = 0.9").unwrap();
        assert_eq!((adamw.lr, adamw.algorithm), (1.0, AdamWConfig { beta2: 0.9, ..Default::default() }.into()));
        let lion = read("kind = \"lion\"\nclip = 0.0\n[[groups]]\nkinds = [\"head\"]\nlr_scale = 0.5").unwrap();
        assert_eq!((lion.algorithm, lion.groups.len()), (LionConfig::default().into(), 1));
        assert_eq!(read(&toml::to_string(&lion).unwrap()).unwrap(), lion);
        let clips = read("clip = { adaptive = 0.01 }\n[[groups]]\nkinds = [\"head\"]\nclip = 2").unwrap();
        assert_eq!(clips.groups[0].clip, Some(Clip::Norm(2.0)));
        assert_eq!(read(&toml::to_string(&clips).unwrap()).unwrap(), clips);
        let scaled = read("batch_scaling = { rule = \"sqrt\", reference_rows = 4 }").unwrap();
        assert_eq!([scaled.batch_factor(16), adamw.batch_factor(16)], [2.0, 1.0]);
        assert_eq!(read(&toml::to_string(&scaled).unwrap()).unwrap(), scaled);
        for (bad, word) in [
            ("batch_scaling = { rule = \"cubic\", reference_rows = 4 }", "batch_scaling: unknown variant"),
            ("kind = \"lion\"\neps = 1e-8", "eps"),
            ("beta3 = 1.0", "beta3"),
            ("kind = \"x\"", "adamw"),
            ("lr = \"a\"", "lr"),
            ("[[groups]]\nparam = 1", "params"),
            ("clip = \"hard\"", "clip: expected a norm such as 1.0"),
            ("clip = { adaptive = 0.1, eps = 1 }", "clip: expected a norm such as 1.0"),
        ] {
            let error = read(bad).unwrap_err().message().to_owned();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
