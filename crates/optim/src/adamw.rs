//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>, algorithm 2).
//!
//! For a parameter θ with gradient g, learning rate η, in step t = 1, 2, …:
//!
//! ```text
//! m_t = β1 m + (1−β1) g        m̂ = m_t / (1−β1^t)
//! v_t = β2 v + (1−β2) g²       v̂ = v_t / (1−β2^t)
//! θ_t = θ − η m̂ / (√v̂ + ε) − η λ θ
//! ```
//!
//! This is PyTorch's `torch.optim.AdamW`. The paper multiplies the decay by the schedule alone, PyTorch and this crate by the learning
//! rate as scheduled. burn's own AdamW has the same formula with the defaults ε = 1e-5 and λ = 1e-4.
//!
//! State: 8 bytes per parameter, m and v in f32.
//!
//! **Rounding.** β1 and β2 are used as the nearest f32, in the bias corrections too. So m̂ and v̂ are true weighted means. Were the corrections
//! taken from β2 = 0.999 in double precision, v̂ would be off by 1.3e-5: that is the distance of 1 − 0.999f32 from 0.001.

use burn::tensor::{Device, Tensor};
use firebox_tensor::ops::{AdamWHyper, adamw};
use serde::{Deserialize, Serialize};

use crate::OptimError;
use crate::error::check;

/// Hyperparameters of AdamW, but for the learning rate, which belongs to the step.
///
/// The defaults are those of GPT-3 (Brown et al., <https://arxiv.org/abs/2005.14165>, appendix B), as most large language models are trained.
/// PyTorch's differ in `beta2` (0.999) and `weight_decay` (0.01).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// β1, decay of the mean of gradients: 0 ≤ β1 < 1. Default 0.9.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients: 0 ≤ β2 < 1. Default 0.95.
    pub beta2: f64,
    /// ε, added to the root of v̂: 1e-30 ≤ ε ≤ 1. Default 1e-8. Zero is refused: an embedding row that no batch has used would become 0/0.
    pub eps: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate: λ ≥ 0. Default 0.1.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

/// The largest β, a memory of 100,000 steps: closer to one, 1 − β has few digits left in f32.
const MAX_BETA: f64 = 0.99999;

impl AdamWConfig {
    /// Checks every range.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] names the first that is out of its range.
    pub fn validate(&self) -> Result<(), OptimError> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        check("beta1", beta1, (0.0..=MAX_BETA).contains(&beta1), "0 <= beta1 <= 0.99999")?;
        check("beta2", beta2, (0.0..=MAX_BETA).contains(&beta2), "0 <= beta2 <= 0.99999")?;
        check("eps", eps, (1e-30..=1.0).contains(&eps), "1e-30 <= eps <= 1")?;
        check("weight_decay", weight_decay, (0.0..=1e6).contains(&weight_decay), "0 <= weight_decay <= 1e6")
    }

    /// Checks a learning rate for a step with this configuration.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] or [`OptimError::DecayTooStrong`].
    pub fn validate_lr(&self, lr: f64) -> Result<(), OptimError> {
        check("lr", lr, (0.0..=1e6).contains(&lr), "0 <= lr <= 1e6")?;
        if lr * self.weight_decay >= 1.0 {
            return Err(OptimError::DecayTooStrong { lr, weight_decay: self.weight_decay });
        }
        Ok(())
    }

    fn hyper(&self, lr: f64, weight_decay: f64, t: u64) -> AdamWHyper {
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(t as f64)) as f32;
        AdamWHyper {
            lr: lr as f32,
            beta1,
            beta2,
            eps: self.eps as f32,
            weight_decay: weight_decay as f32,
            bias_correction1: correction(beta1),
            bias_correction2: correction(beta2),
            grad_scale: 1.0,
        }
    }
}

/// What AdamW remembers of one parameter.
#[derive(Debug, Clone)]
pub struct Moments {
    /// m, the mean of gradients, `[elements]`.
    pub m: Tensor<1>,
    /// v, the mean of squared gradients, `[elements]`.
    pub v: Tensor<1>,
    /// t, the steps taken, at most [`Moments::MAX_STEPS`].
    pub steps: u64,
}

impl Moments {
    /// Steps are counted to 2^24 = 16,777,216, the last integer before which f32, the type of saved states, has no gaps. Counting further
    /// would change nothing: β^t is below f32's resolution by then for every β that is accepted.
    pub const MAX_STEPS: u64 = 1 << 24;

    /// The state before the first step.
    pub fn zeros(elements: usize, device: &Device) -> Self {
        Self { m: Tensor::zeros([elements], device), v: Tensor::zeros([elements], device), steps: 0 }
    }
}

/// One step of a flat parameter, in place on the CPU backends if nothing else holds the tensors.
///
/// `weight_decay` takes the place of the configuration's, for parameters that do not decay. `config` and `lr` are taken as valid.
///
/// # Shapes
/// - `param`, `grad`, moments: `[n]`, on one device without autodiff
///
/// # Panics
/// If the lengths differ.
pub fn step(
    config: &AdamWConfig,
    lr: f64,
    weight_decay: f64,
    param: Tensor<1>,
    grad: Tensor<1>,
    state: Moments,
) -> (Tensor<1>, Moments) {
    step_scaled(config, lr, weight_decay, 1.0, param, grad, state)
}

/// The same with the gradient multiplied by `grad_scale` first, on the way.
pub(crate) fn step_scaled(
    config: &AdamWConfig,
    lr: f64,
    weight_decay: f64,
    grad_scale: f64,
    param: Tensor<1>,
    grad: Tensor<1>,
    state: Moments,
) -> (Tensor<1>, Moments) {
    let steps = (state.steps + 1).min(Moments::MAX_STEPS);
    let hyper = AdamWHyper { grad_scale: grad_scale as f32, ..config.hyper(lr, weight_decay, steps) };
    let (param, m, v) = adamw(param, grad, state.m, state.v, hyper);
    (param, Moments { m, v, steps })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranges() {
        let ok = AdamWConfig::default();
        ok.validate().unwrap();
        let bad = [
            AdamWConfig { beta1: 1.0, ..ok },
            AdamWConfig { beta1: -0.1, ..ok },
            AdamWConfig { beta2: f64::NAN, ..ok },
            AdamWConfig { eps: 0.0, ..ok },
            AdamWConfig { eps: -1e-8, ..ok },
            AdamWConfig { weight_decay: -0.1, ..ok },
            AdamWConfig { weight_decay: f64::INFINITY, ..ok },
        ];
        for config in bad {
            assert!(config.validate().is_err(), "{config:?}");
        }
        for lr in [-1e-3, f64::NAN, f64::INFINITY, 10.0] {
            assert!(ok.validate_lr(lr).is_err(), "{lr}");
        }
        assert_eq!(
            AdamWConfig { beta2: 1.5, ..ok }.validate().unwrap_err().to_string(),
            "beta2 = 1.5 is out of range: expected 0 <= beta2 <= 0.99999"
        );
    }

    #[test]
    fn corrections_are_one_after_the_last_counted_step() {
        let config = AdamWConfig { beta1: MAX_BETA, beta2: MAX_BETA, ..Default::default() };
        let hyper = config.hyper(1e-3, 0.0, Moments::MAX_STEPS);
        assert_eq!((hyper.bias_correction1, hyper.bias_correction2), (1.0, 1.0));
    }

    #[test]
    fn unknown_keys_are_refused_and_defaults_fill_in() {
        assert_eq!(
            toml::from_str::<AdamWConfig>("beta2 = 0.99").unwrap(),
            AdamWConfig { beta2: 0.99, ..Default::default() }
        );
        assert!(toml::from_str::<AdamWConfig>("betta2 = 0.99").is_err());
    }
}
