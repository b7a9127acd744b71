//! Adafactor.

use burn::tensor::Tensor;
use firebox_tensor::ops::{SgdHyper, State, Update, divide_by_root, mean_squares, sum_of_squares, update};
use serde::{Deserialize, Serialize};

use super::{At, Geometry, Rule, Slot, lerp};
use crate::OptimError;
use crate::error::check;

/// Adafactor (Shazeer and Stern, <https://arxiv.org/abs/1804.04235>, algorithms 4 and 5): of a matrix of squared gradients it keeps the means of rows and
/// columns alone.
///
/// ```text
/// β2(t) = 1 − t^c        R = β2(t) R + (1−β2(t)) mean over columns of g²        C likewise over rows        V = R C / mean R
/// U = g / √V             θ_t = θ − α U / max(1, rms(U) / d)        α = max(ε2, rms(θ)) min(η, 1/√t)
/// ```
///
/// As `torch.optim.Adafactor`, with its defaults: no first moment, steps relative to the parameter's size, ε1 against vanishing V, decoupled
/// weight decay. Of vectors V is kept whole. State: 4 bytes per row and column of a matrix, 4 per element of a vector.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdafactorConfig {
    /// c, how fast β2 grows: -1 ≤ c < 0. Default -0.8.
    pub beta2_decay: f64,
    /// ε1, smallest mean of V's roots. Default f32's epsilon.
    pub eps1: f64,
    /// ε2, smallest scale of a parameter. Default 1e-3.
    pub eps2: f64,
    /// d, largest root mean square of an update. Default 1.
    pub clip_threshold: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 0.
    pub weight_decay: f64,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        Self { beta2_decay: -0.8, eps1: f64::from(f32::EPSILON), eps2: 1e-3, clip_threshold: 1.0, weight_decay: 0.0 }
    }
}

/// Leading dimensions as one, rows, columns.
fn matrices(shape: &[usize]) -> Option<[usize; 3]> {
    match shape {
        [] | [_] => None,
        [leading @ .., rows, columns] => Some([leading.iter().product(), *rows, *columns]),
    }
}

impl Rule for AdafactorConfig {
    fn validate(&self) -> Result<(), OptimError> {
        let Self { beta2_decay, eps1, eps2, clip_threshold, .. } = *self;
        check("beta2_decay", beta2_decay, (-1.0..0.0).contains(&beta2_decay), "-1 <= beta2_decay < 0")?;
        check("eps1", eps1, (1e-15..=1.0).contains(&eps1), "1e-15 <= eps1 <= 1")?;
        check("eps2", eps2, (0.0..=1.0).contains(&eps2), "0 <= eps2 <= 1")?;
        check("clip_threshold", clip_threshold, clip_threshold > 0.0 && clip_threshold.is_finite(), "above 0")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        match matrices(param.shape) {
            None => vec![Slot::unsigned("v", param.shape)],
            Some([n, rows, columns]) => {
                vec![Slot::unsigned("row", &[n, rows]), Slot::unsigned("column", &[n, columns])]
            }
        }
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let elements = at.param.elements();
        let share = (at.t as f64).powf(self.beta2_decay);
        let grad = if at.grad_scale == 1.0 { grad } else { grad * at.grad_scale };
        let device = param.device();
        let mean = |old: &mut State, new: Tensor<1>| {
            let mean = lerp(old.take(&device), new, 1.0, share);
            old.set(mean.clone(), at.seed);
            mean
        };
        let least = (self.eps1 * self.eps1) as f32;
        let direction = match (matrices(at.param.shape), &mut *state) {
            (Some([n, rows, columns]), [row, column]) => {
                let (over_columns, over_rows) = mean_squares(grad.clone(), [n, rows, columns]);
                let row = mean(row, over_columns).reshape([n, rows]);
                let column = mean(column, over_rows);
                let whole = row.clone().mean_dim(1).clamp_min(self.eps1);
                // The quotient first: the product of two small means would leave f32's range.
                divide_by_root(grad, [n, rows, columns], (row / whole).reshape([n * rows]), column, least)
            }
            (_, [v, ..]) => grad.clone() / mean(v, grad.clone() * grad).clamp_min(least).sqrt(),
            _ => return param,
        };
        let both = Tensor::cat(vec![sum_of_squares(param.clone()), sum_of_squares(direction.clone())], 0);
        let rms: Vec<f64> = both.into_data().iter::<f32>().map(|x| (f64::from(x) / elements as f64).sqrt()).collect();
        let alpha = rms[0].max(self.eps2) * at.lr.min(1.0 / (at.t as f64).sqrt());
        let scale = alpha / (rms[1] / self.clip_threshold).max(1.0);
        let sgd = SgdHyper { lr: 1.0, l2: (at.lr * at.weight_decay) as f32, grad_scale: scale as f32 };
        update(Update::Sgd(sgd), param, direction, &mut [], 0)
    }
}
