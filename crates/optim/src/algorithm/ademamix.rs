//! AdEMAMix.

use burn::tensor::Tensor;
use firebox_tensor::ops::{AdEmaMixHyper, AdamWHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, At, Geometry, Rule, Slot, check_beta};
use crate::OptimError;
use crate::error::check;
use crate::params::ParamKind;

/// AdEMAMix (Pagliardini et al., <https://arxiv.org/abs/2409.03137>, algorithm 1): AdamW with a second, slow mean of gradients beside the fast one.
///
/// ```text
/// m1 = β1 m1 + (1−β1) g        m2 = β3(t) m2 + (1−β3(t)) g        v = β2 v + (1−β2) g²
/// θ_t = θ − η ((m̂1 + α(t) m2) / (√v̂ + ε) + λ θ)
/// ```
///
/// α(t) grows linearly to α, and β3(t) from β1 to β3 so that the half-life grows linearly, over the first `warmup_steps` (equations 1 and 2 of the
/// paper; 0: both are there at once). The defaults are the paper's. State: 12 bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdEmaMixConfig {
    /// β1, decay of the fast mean. Default 0.9.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients. Default 0.999.
    pub beta2: f64,
    /// β3, decay of the slow mean. Default 0.9999.
    pub beta3: f64,
    /// α, weight of the slow mean. Default 5; the paper has 4 to 10.
    pub alpha: f64,
    /// ε, added to the root of v̂. Default 1e-8.
    pub eps: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 0.1.
    pub weight_decay: f64,
    /// Steps until α and β3 have their values: the length of the run, in the paper. Default 0.
    pub warmup_steps: u64,
}

impl Default for AdEmaMixConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, beta3: 0.9999, alpha: 5.0, eps: 1e-8, weight_decay: 0.1, warmup_steps: 0 }
    }
}

impl AdEmaMixConfig {
    fn adamw(&self) -> AdamWConfig {
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }

    /// α and β3 in step `t`.
    fn scheduled(&self, t: u64) -> (f64, f64) {
        if t >= self.warmup_steps {
            return (self.alpha, self.beta3);
        }
        let done = t as f64 / self.warmup_steps as f64;
        // The half-life of a decay β is ln ½ / ln β; the paper has it less one.
        let (fast, slow) = (self.beta1.max(f64::MIN_POSITIVE).ln(), self.beta3.ln());
        let beta3 = (fast * slow / ((1.0 - done) * slow + done * fast)).exp();
        (self.alpha * done, beta3.min(self.beta3))
    }
}

impl Rule for AdEmaMixConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        self.adamw().validate()?;
        check_beta("beta3", self.beta3)?;
        check("beta3", self.beta3, self.beta3 > 0.0 && self.beta3 >= self.beta1, "a decay of at least beta1, above 0")?;
        check("alpha", self.alpha, (0.0..=1e3).contains(&self.alpha), "0 <= alpha <= 1000")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        vec![Slot::signed("m1", param.shape), Slot::signed("m2", param.shape), Slot::unsigned("v", param.shape)]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let (alpha, beta3) = self.scheduled(at.t);
        let adamw = AdamWHyper { weight_decay: at.weight_decay as f32, ..self.adamw().hyper(at) };
        let hyper = AdEmaMixHyper { adamw, beta3: beta3 as f32, alpha: alpha as f32 };
        update(Update::AdEmaMix(hyper), param, grad, state, at.seed)
    }
}
