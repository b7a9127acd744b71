//! Lion.

use burn::tensor::Tensor;
use firebox_tensor::ops::{LionHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{At, Geometry, Rule, Slot, check_beta};
use crate::OptimError;
use crate::params::ParamKind;

/// Lion (Chen et al., <https://arxiv.org/abs/2302.06675>, algorithm 2): the sign of a mean of gradients.
///
/// ```text
/// θ_t = θ − η sign(β1 m + (1−β1) g) − η λ θ
/// m_t = β2 m + (1−β2) g
/// ```
///
/// Every element moves by η, so that η is 3 to 10 times smaller than AdamW's and λ as much larger (section 5 of the paper). The defaults are
/// the paper's for language models (β 0.95 and 0.98, λ 1); for vision it has 0.9 and 0.99. State: 4 bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionConfig {
    /// β1, weight of the mean in the direction. Default 0.95.
    pub beta1: f64,
    /// β2, decay of the mean. Default 0.98.
    pub beta2: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 1.
    pub weight_decay: f64,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self { beta1: 0.95, beta2: 0.98, weight_decay: 1.0 }
    }
}

impl Rule for LionConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        check_beta("beta1", self.beta1)?;
        check_beta("beta2", self.beta2)
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        vec![Slot::signed("m", param.shape)]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let hyper = LionHyper {
            lr: at.lr as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            weight_decay: at.weight_decay as f32,
            grad_scale: at.grad_scale as f32,
        };
        update(Update::Lion(hyper), param, grad, state, at.seed)
    }
}
