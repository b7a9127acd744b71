//! Stochastic gradient descent.

use burn::tensor::Tensor;
use firebox_tensor::ops::{MomentumHyper, SgdHyper, State, Update, update};
use serde::{Deserialize, Serialize};

use super::{At, Geometry, Rule, Slot, check_beta};
use crate::OptimError;
use crate::error::check;
use crate::params::ParamKind;

/// Stochastic gradient descent as `torch.optim.SGD` has it, with momentum (Sutskever et al., ICML 2013) and L2 regularization.
///
/// ```text
/// g ← g + λ θ        b_t = μ b + (1−τ) g, in the first step b_1 = g        θ_t = θ − η b_t, with Nesterov θ − η (g + μ b_t)
/// ```
///
/// State: 4 bytes per parameter with momentum, none without. The defaults are PyTorch's, but for a momentum of 0.9.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// μ. Default 0.9; 0 for none.
    pub momentum: f64,
    /// τ, the share of a gradient that does not go into the sum. Default 0.
    pub dampening: f64,
    /// Nesterov's form; needs momentum, and no dampening.
    pub nesterov: bool,
    /// λ. Default 0.
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { momentum: 0.9, dampening: 0.0, nesterov: false, weight_decay: 0.0 }
    }
}

impl Rule for SgdConfig {
    fn is_element_wise(&self, _: ParamKind) -> bool {
        true
    }

    fn validate(&self) -> Result<(), OptimError> {
        let Self { momentum, dampening, nesterov, .. } = *self;
        check_beta("momentum", momentum)?;
        check("dampening", dampening, (0.0..1.0).contains(&dampening), "0 <= dampening < 1")?;
        let possible = !nesterov || (momentum > 0.0 && dampening == 0.0);
        check("dampening", dampening, possible, "0, and a momentum above 0, with nesterov = true")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        if self.momentum > 0.0 { vec![Slot::signed("momentum", param.shape)] } else { vec![] }
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let sgd = SgdHyper { lr: at.lr as f32, l2: at.weight_decay as f32, grad_scale: at.grad_scale as f32 };
        let rule = match self.momentum {
            0.0 => Update::Sgd(sgd),
            momentum => Update::Momentum(MomentumHyper {
                sgd,
                momentum: momentum as f32,
                share: if at.t == 1 { 1.0 } else { 1.0 - self.dampening as f32 },
                nesterov: self.nesterov,
            }),
        };
        update(rule, param, grad, state, at.seed)
    }
}
