//! Adam-mini.

use burn::tensor::Tensor;
use firebox_tensor::ops::{State, mean_squares, subtract_scaled};
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, At, Geometry, Rule, Slot, correction, lerp};
use crate::OptimError;
use crate::params::ParamKind;

/// Adam-mini (Zhang et al., <https://arxiv.org/abs/2406.16793>, algorithm 1): AdamW with one v for a block of parameters, the mean over the block of
/// their squared gradients.
///
/// Blocks are the rows of embeddings and heads (tokens), the columns of other matrices (`[in, out]`: output neurons), and whole vectors, after the
/// paper's principle for transformers. One thing differs: the paper takes whole heads of queries and keys as blocks; here, where they are columns
/// of a packed projection, each column is one. The defaults are AdamW's. State: 4 bytes per parameter, and 4 per block.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamMiniConfig {
    /// β1, decay of the mean of gradients. Default 0.9.
    pub beta1: f64,
    /// β2, decay of the mean of squared gradients. Default 0.95.
    pub beta2: f64,
    /// ε, added to the root of v̂. Default 1e-8.
    pub eps: f64,
    /// λ, decoupled weight decay, multiplied by the learning rate. Default 0.1.
    pub weight_decay: f64,
}

impl Default for AdamMiniConfig {
    fn default() -> Self {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = AdamWConfig::default();
        Self { beta1, beta2, eps, weight_decay }
    }
}

/// A parameter as a matrix, and the dimension over which v is a mean.
fn blocks(param: Geometry<'_>) -> ([usize; 2], usize) {
    match (param.shape, param.kind) {
        ([] | [_], _) => ([1, param.elements()], 1),
        ([rows, rest @ ..], ParamKind::Embedding | ParamKind::Head) => ([*rows, rest.iter().product()], 1),
        ([rest @ .., columns], _) => ([rest.iter().product(), *columns], 0),
    }
}

impl Rule for AdamMiniConfig {
    fn validate(&self) -> Result<(), OptimError> {
        let Self { beta1, beta2, eps, weight_decay } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }.validate()
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        let (matrix, over) = blocks(param);
        vec![Slot::signed("m", param.shape), Slot::unsigned("v", &[matrix[1 - over]])]
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let [m, v] = state else { return param };
        let (matrix, over) = blocks(at.param);
        let device = param.device();
        let mean = lerp(m.take(&device), grad.clone(), at.grad_scale, 1.0 - f64::from(self.beta1 as f32));
        m.set(mean.clone(), at.seed);
        let (over_columns, over_rows) = mean_squares(grad, [1, matrix[0], matrix[1]]);
        let squares = if over == 1 { over_columns } else { over_rows };
        let block = lerp(v.take(&device), squares, at.grad_scale.powi(2), 1.0 - f64::from(self.beta2 as f32));
        v.set(block.clone(), !at.seed);
        let [c1, c2] = [self.beta1, self.beta2].map(|beta| correction(beta, at.t));
        let scale = ((block / c2).sqrt() + self.eps).recip() * (at.lr / f64::from(c1));
        let ones = Tensor::ones([matrix[over]], &device);
        let [by_row, by_column] = if over == 1 { [scale, ones] } else { [ones, scale] };
        subtract_scaled(param, (1.0 - at.lr * at.weight_decay) as f32, mean, by_row, by_column)
    }
}
