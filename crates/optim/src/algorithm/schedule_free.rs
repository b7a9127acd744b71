//! Schedule-Free AdamW.

use burn::tensor::Tensor;
use firebox_tensor::ops::{ScheduleFreeHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, At, Geometry, Rule, Slot, correction};
use crate::OptimError;
use crate::error::check;

/// Schedule-Free AdamW (Defazio et al., <https://arxiv.org/abs/2405.15682>, algorithm 1, as their package `schedulefree` has it): no schedule that
/// must know the length of the run, but an average of the parameters.
///
/// ```text
/// g ← g / (√v̂ + ε) + λ y        z ← z − η g        x ← (1−c) x + c z        y = (1−β1) z + β1 x
/// ```
///
/// with c the share of η² (of the largest η until now) in the sum of them. Gradients are taken at y, which is what the parameters hold in
/// training. **Evaluate and keep x**: [`crate::Optimizer::averaged`]. Use a constant schedule with a warmup, and a learning rate 1 to 10 times AdamW's
/// (section 4.1). The defaults are the package's. State: 8 bytes per parameter, z and v.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleFreeConfig {
    /// β1, where y lies between z and x: 0 < β1 < 1. Default 0.9; for long runs 0.95 or 0.98.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients. Default 0.999.
    pub beta2: f64,
    /// ε, added to the root of v̂. Default 1e-8.
    pub eps: f64,
    /// λ, decay at y, multiplied by the learning rate. Default 0.
    pub weight_decay: f64,
}

impl Default for ScheduleFreeConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl ScheduleFreeConfig {
    /// x, from y and the state.
    pub(crate) fn averaged(&self, y: Tensor<1>, state: &[State]) -> Tensor<1> {
        match state.first() {
            // y = (1 - beta1) z + beta1 x
            Some(z) => y.clone() + (z.get(&y.device()) - y) * (1.0 - 1.0 / self.beta1),
            None => y,
        }
    }
}

impl Rule for ScheduleFreeConfig {
    fn validate(&self) -> Result<(), OptimError> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }.validate()?;
        check("beta1", beta1, beta1 > 0.0, "0 < beta1 <= 0.99999")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        // The last holds the sum of the squared learning rates and the largest one.
        vec![
            Slot::signed("z", param.shape).exact(),
            Slot::unsigned("v", param.shape),
            Slot::unsigned("weights", &[2]).exact(),
        ]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let [z, _, weights] = &mut *state else { return param };
        if at.t == 1 {
            z.set(param.clone(), 0);
        }
        let device = param.device();
        let known: Vec<f32> = weights.get(&device).to_data().iter().collect();
        let max = (at.lr as f32).max(known[1]);
        let sum = known[0] + max * max;
        weights.set(Tensor::from_floats([sum, max], &device), 0);
        let hyper = ScheduleFreeHyper {
            lr: at.lr as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            eps: self.eps as f32,
            weight_decay: at.weight_decay as f32,
            bias_correction2: correction(self.beta2, at.t),
            share: if sum > 0.0 { max * max / sum } else { 0.0 },
            grad_scale: at.grad_scale as f32,
        };
        update(Update::ScheduleFree(hyper), param, grad, &mut state[..2], at.seed)
    }
}
