//! LAMB.

use burn::tensor::Tensor;
use firebox_tensor::ops::{AdamWHyper, SgdHyper, State, Update, sum_of_squares, update, zeros_like};
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, At, Geometry, Rule, Slot};
use crate::OptimError;

/// LAMB (You et al., <https://arxiv.org/abs/1904.00962>, algorithm 2): Adam's direction, as long as the parameter itself, for very large batches.
///
/// ```text
/// r = m̂ / (√v̂ + ε)        u = r + λ θ        θ_t = θ − η ‖θ‖ / ‖u‖ u
/// ```
///
/// The norms are those of a parameter tensor; where one is 0 their ratio is 1. The paper's φ is the identity. The defaults are the paper's for
/// BERT. State: 8 bytes per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LambConfig {
    /// β1, decay of the mean of gradients. Default 0.9.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients. Default 0.999.
    pub beta2: f64,
    /// ε, added to the root of v̂. Default 1e-6.
    pub eps: f64,
    /// λ, weight decay. Default 0.01.
    pub weight_decay: f64,
}

impl Default for LambConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-6, weight_decay: 0.01 }
    }
}

impl LambConfig {
    fn adamw(&self) -> AdamWConfig {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }
}

impl Rule for LambConfig {
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
        // Adam's step from zero with a learning rate of -1 is r.
        let hyper = AdamWHyper { lr: -1.0, ..self.adamw().hyper(at) };
        let r = update(Update::AdamW(hyper), zeros_like(&param), grad, state, at.seed);
        // And one of gradient descent along the parameter adds the decay.
        let sgd = |lr: f64| Update::Sgd(SgdHyper { lr: lr as f32, l2: 0.0, grad_scale: 1.0 });
        let u = match at.weight_decay {
            0.0 => r,
            decay => update(sgd(-decay), r, param.clone(), &mut [], 0),
        };
        let norms: Vec<f32> =
            Tensor::cat(vec![sum_of_squares(param.clone()), sum_of_squares(u.clone())], 0).into_data().iter().collect();
        let [theta, length] = [norms[0], norms[1]].map(|square| f64::from(square).sqrt());
        let ratio = if theta > 0.0 && length > 0.0 { theta / length } else { 1.0 };
        update(sgd(at.lr * ratio), param, u, &mut [], 0)
    }
}
