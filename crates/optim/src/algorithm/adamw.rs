//! Adam and AdamW.

use burn::tensor::Tensor;
use firebox_tensor::ops::{AdamWHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{At, Geometry, Rule, Slot, check_beta, check_eps, correction};
use crate::OptimError;
use crate::params::ParamKind;

/// AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, <https://arxiv.org/abs/1711.05101>, algorithm 2).
///
/// For a parameter θ with gradient g, learning rate η, in step t = 1, 2, …:
///
/// ```text
/// m_t = β1 m + (1−β1) g        m̂ = m_t / (1−β1^t)
/// v_t = β2 v + (1−β2) g²       v̂ = v_t / (1−β2^t)
/// θ_t = θ − η m̂ / (√v̂ + ε) − η λ θ
/// ```
///
/// This is PyTorch's `torch.optim.AdamW`. The paper multiplies the decay by the schedule alone, PyTorch and this crate by the learning
/// rate as scheduled. burn's own AdamW has the same formula with the defaults ε = 1e-5 and λ = 1e-4.
///
/// The defaults are those of GPT-3 (Brown et al., <https://arxiv.org/abs/2005.14165>, appendix B), as most large language models are trained.
/// PyTorch's differ in `beta2` (0.999) and `weight_decay` (0.01).
///
/// State: 8 bytes per parameter, m and v in f32.
///
/// **Rounding.** β1 and β2 are used as the nearest f32, in the bias corrections too. So m̂ and v̂ are true weighted means. Were the corrections
/// taken from β2 = 0.999 in double precision, v̂ would be off by 1.3e-5: that is the distance of 1 − 0.999f32 from 0.001.
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

impl AdamWConfig {
    /// The numbers of a step, without decay.
    pub(crate) fn hyper(&self, at: &At<'_>) -> AdamWHyper {
        AdamWHyper {
            lr: at.lr as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            weight_decay: 0.0,
            bias_correction1: correction(self.beta1, at.t),
            bias_correction2: correction(self.beta2, at.t),
            grad_scale: at.grad_scale as f32,
        }
    }
}

impl Rule for AdamWConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check_eps(self.eps)
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        vec![Slot::signed("m", param.shape), Slot::unsigned("v", param.shape)]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let hyper = AdamWHyper { weight_decay: at.weight_decay as f32, ..self.hyper(at) };
        update(Update::AdamW(hyper), param, grad, state, at.seed)
    }
}

/// Adam (Kingma and Ba, <https://arxiv.org/abs/1412.6980>, algorithm 1). Weight decay is L2 regularization: λ θ is a part of the gradient, as in
/// `torch.optim.Adam`, and goes through the moments.
///
/// The defaults are the paper's and PyTorch's. State: 8 bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamConfig {
    /// β1, decay of the mean of gradients. Default 0.9.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients. Default 0.999.
    pub beta2: f64,
    /// ε, added to the root of v̂. Default 1e-8.
    pub eps: f64,
    /// λ. Default 0.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl AdamConfig {
    fn adamw(&self) -> AdamWConfig {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }
}

impl Rule for AdamConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        self.adamw().validate()
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        self.adamw().slots(param)
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let hyper = self.adamw().hyper(at);
        if at.weight_decay == 0.0 {
            return update(Update::AdamW(hyper), param, grad, state, at.seed);
        }
        let grad = grad * at.grad_scale + param.clone() * at.weight_decay;
        update(Update::AdamW(AdamWHyper { grad_scale: 1.0, ..hyper }), param, grad, state, at.seed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Algorithm, MAX_BETA, MAX_STEPS};
    use super::*;

    #[test]
    fn ranges() {
        let ok = AdamWConfig::default();
        Algorithm::from(ok).validate().unwrap();
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
            assert!(Algorithm::from(config).validate().is_err(), "{config:?}");
        }
        for lr in [-1e-3, f64::NAN, f64::INFINITY, 10.0] {
            assert!(Algorithm::from(ok).validate_lr(lr).is_err(), "{lr}");
        }
        assert_eq!(
            AdamWConfig { beta2: 1.5, ..ok }.validate().unwrap_err().to_string(),
            "beta2 = 1.5 is out of range: expected a decay from 0 to 0.99999"
        );
    }

    #[test]
    fn corrections_are_one_after_the_last_counted_step() {
        assert_eq!(correction(MAX_BETA, MAX_STEPS), 1.0);
    }

    #[test]
    fn unknown_keys_are_refused_and_defaults_fill_in() {
        assert_eq!(
            toml::from_str::<Algorithm>("kind = \"adamw\"\nbeta2 = 0.99").unwrap(),
            AdamWConfig { beta2: 0.99, ..Default::default() }.into()
        );
        assert!(toml::from_str::<Algorithm>("kind = \"adamw\"\nbetta2 = 0.99").is_err());
    }
}
