//! Sophia-G.

use burn::tensor::Tensor;
use firebox_tensor::ops::{SophiaHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{At, Geometry, Rule, Slot, check_beta, lerp};
use crate::OptimError;
use crate::error::check;
use crate::params::ParamKind;

/// Sophia-G (Liu et al., <https://arxiv.org/abs/2305.14342>, algorithm 3): a mean of gradients over an estimate of the Hessian's diagonal, element by
/// element at most 1.
///
/// ```text
/// m_t = β1 m + (1−β1) g        θ_t = θ − η λ θ − η clip(m_t / (γ h + ε), 1)        every k steps: h = β2 h + (1−β2) B ĝ²
/// ```
///
/// ĝ is the gradient of the mean loss of a batch of B tokens whose targets are drawn from the model's own predictions (algorithm 2,
/// Gauss–Newton–Bartlett): the training loop makes it, and hands it to [`crate::Optimizer::curvature`] every [`every`](Self::every) steps. Without
/// it every element moves by η. The defaults are the paper's. State: 8 bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SophiaConfig {
    /// β1, decay of the mean of gradients. Default 0.96.
    pub beta1: f64,
    /// β2, decay of h. Default 0.99.
    pub beta2: f64,
    /// γ: the larger, the fewer elements are clipped; 10 to 50 % should not be. Default 0.05.
    pub gamma: f64,
    /// k, steps from one estimate to the next. Default 10.
    pub every: u64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 0.1.
    pub weight_decay: f64,
}

impl Default for SophiaConfig {
    fn default() -> Self {
        Self { beta1: 0.96, beta2: 0.99, gamma: 0.05, every: 10, weight_decay: 0.1 }
    }
}

impl SophiaConfig {
    /// Takes an estimate of the Hessian's diagonal, `batch` times the square of `grad`, into the state.
    pub(crate) fn curvature(&self, grad: Tensor<1>, batch: f64, state: &mut [State], seed: u32) {
        if let [_, h] = state {
            let old = h.take(&grad.device());
            h.set(lerp(old, grad.clone() * grad, batch, 1.0 - f64::from(self.beta2 as f32)), seed);
        }
    }
}

impl Rule for SophiaConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)?;
        check("every", self.every as f64, self.every > 0, "at least 1")?;
        check("gamma", self.gamma, self.gamma > 0.0 && self.gamma.is_finite(), "above 0")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        vec![Slot::signed("m", param.shape), Slot::unsigned("h", param.shape)]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let hyper = SophiaHyper {
            lr: at.lr as f32,
            beta1: self.beta1 as f32,
            gamma: self.gamma as f32,
            weight_decay: at.weight_decay as f32,
            // The authors' code.
            eps: 1e-15,
            grad_scale: at.grad_scale as f32,
        };
        update(Update::Sophia(hyper), param, grad, state, at.seed)
    }
}
