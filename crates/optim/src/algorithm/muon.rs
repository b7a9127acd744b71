//! Muon.

use burn::tensor::Tensor;
use firebox_tensor::ops::{self, State, sum_of_squares};
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, At, Geometry, Rule, Slot, check_beta, lerp};
use crate::OptimError;
use crate::error::check;
use crate::params::ParamKind;

/// Muon (Jordan et al., <https://kellerjordan.github.io/posts/muon/>; at scale Liu et al., <https://arxiv.org/abs/2502.16982>): the momentum of a matrix,
/// made orthogonal by a Newton–Schulz iteration. Embeddings, the head and vectors are trained by AdamW.
///
/// ```text
/// b = μ b + (1−μ) g        u = g + μ (b − g) with Nesterov, or b        θ_t = θ − η λ θ − η s orthogonal(u)
/// ```
///
/// As `torch.optim.Muon`, with two differences: products are in f32, not bfloat16, and the default scale s is the one of Liu et al.,
/// 0.2 √max(rows, columns), with which the learning rate and decay of AdamW can be kept, for both kinds of parameters. A packed projection (queries, keys, values)
/// is one matrix; a parameter of three dimensions is as many matrices as the first says, as those of experts. State: 4 bytes per element of a matrix, AdamW's 8 of the rest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// μ. Default 0.95.
    pub momentum: f64,
    /// Nesterov's form. Default true.
    pub nesterov: bool,
    /// Iterations of Newton–Schulz. Default 5.
    pub ns_steps: usize,
    /// How long a step is. Default `match_adamw`.
    pub scale: MuonScale,
    /// λ, decoupled weight decay, multiplied by the learning rate, for AdamW too. Default 0.1.
    pub weight_decay: f64,
    /// AdamW's β1. Default 0.9.
    pub beta1: f64,
    /// AdamW's β2. Default 0.95.
    pub beta2: f64,
    /// AdamW's ε. Default 1e-8.
    pub eps: f64,
}

/// What Muon multiplies its orthogonal matrices by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MuonScale {
    /// 0.2 √max(rows, columns): as long as AdamW's steps (Liu et al., equation 4).
    #[default]
    MatchAdamw,
    /// √max(1, out / in), Jordan's; learning rates are about 0.02 then, AdamW's need a group with an `lr_scale`.
    Original,
}

impl Default for MuonConfig {
    fn default() -> Self {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = AdamWConfig::default();
        Self {
            momentum: 0.95,
            nesterov: true,
            ns_steps: 5,
            scale: MuonScale::MatchAdamw,
            weight_decay,
            beta1,
            beta2,
            eps,
        }
    }
}

impl MuonConfig {
    fn adamw(&self) -> AdamWConfig {
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        AdamWConfig { beta1, beta2, eps, weight_decay }
    }
}

/// Number, input and output width of the matrices that Muon trains; none of what AdamW does.
fn matrices(param: Geometry<'_>) -> Option<[usize; 3]> {
    match (param.kind, param.shape) {
        (ParamKind::Matrix, &[input, output]) => Some([1, input, output]),
        (ParamKind::Matrix, &[n, input, output]) => Some([n, input, output]),
        _ => None,
    }
}

impl Rule for MuonConfig {
    fn is_element_wise(&self, kind: ParamKind) -> bool {
        kind != ParamKind::Matrix
    }

    fn validate(&self) -> Result<(), OptimError> {
        self.adamw().validate()?;
        check_beta("momentum", self.momentum)?;
        check("ns_steps", self.ns_steps as f64, (1..100).contains(&self.ns_steps), "1 to 99")
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn slots(&self, param: Geometry<'_>) -> Vec<Slot> {
        match matrices(param) {
            Some(_) => vec![Slot::signed("momentum", param.shape)],
            None => self.adamw().slots(param),
        }
    }

    fn step(&self, at: &At<'_>, param: Tensor<1>, grad: Tensor<1>, state: &mut [State]) -> Tensor<1> {
        let Some([n, input, output]) = matrices(at.param) else { return self.adamw().step(at, param, grad, state) };
        let [momentum] = state else { return param };
        let mu = self.momentum as f32;
        let sum = lerp(momentum.take(&param.device()), grad.clone(), at.grad_scale, 1.0 - self.momentum);
        let u = match self.nesterov {
            true => grad * (at.grad_scale as f32 * (1.0 - mu)) + sum.clone() * mu,
            false => sum.clone(),
        };
        momentum.set(sum, at.seed);
        let size = input * output;
        let one = |i: usize| {
            let matrix = u.clone().narrow(0, i * size, size).reshape([input, output]);
            orthogonal(matrix, self.ns_steps).reshape([size])
        };
        let update = if n == 1 { one(0) } else { Tensor::cat((0..n).map(one).collect(), 0) };
        let (input, output) = (input as f64, output as f64);
        let scale = match self.scale {
            MuonScale::MatchAdamw => 0.2 * input.max(output).sqrt(),
            MuonScale::Original => (output / input).max(1.0).sqrt(),
        };
        param * (1.0 - at.lr * at.weight_decay) - update * (at.lr * scale)
    }
}

/// Jordan's coefficients: the steepest start, and singular values that end near 1.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.775, 2.0315];

/// Nearly U Vᵀ of the singular value decomposition of `x`: singular values from about 0.7 to 1.2. Zeros stay zeros.
pub(crate) fn orthogonal(x: Tensor<2>, steps: usize) -> Tensor<2> {
    let [rows, columns] = x.dims();
    // The smaller side is squared.
    let wide = rows <= columns;
    let x = if wide { x } else { x.transpose() };
    let norm = sum_of_squares(x.clone().reshape([rows * columns])).sqrt().clamp_min(1e-7);
    let mut x = x / norm.reshape([1, 1]);
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..steps {
        let gram = ops::linear_transposed(x.clone(), x.clone());
        // The square of a symmetric matrix.
        let square = ops::linear_transposed(gram.clone(), gram.clone());
        x = x.clone() * a + ops::linear(gram * b + square * c, x, None);
    }
    if wide { x } else { x.transpose() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::{Module, Param};
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::{DecayRule, NamedGrads, Optimizer, values};

    #[derive(Module, Debug)]
    struct Apart {
        first: Param<Tensor<2>>,
        second: Param<Tensor<2>>,
    }

    #[derive(Module, Debug)]
    struct Together {
        both: Param<Tensor<3>>,
    }

    #[test]
    fn matrices_of_one_parameter_are_trained_as_if_apart() {
        let device = Device::default().autodiff();
        let numbers = |salt: f32| -> Vec<f32> { (0..15).map(|i| (i as f32 * 0.7 + salt).sin()).collect() };
        let matrix = |salt| Param::from_tensor(Tensor::from_data(TensorData::new(numbers(salt), [5, 3]), &device));
        let mut apart = Apart { first: matrix(0.1), second: matrix(0.4) };
        let both = [numbers(0.1), numbers(0.4)].concat();
        let both = Tensor::from_data(TensorData::new(both, [2, 5, 3]), &device);
        let mut together = Together { both: Param::from_tensor(both) };
        let make = || Optimizer::new(MuonConfig::default(), DecayRule::Matrices).unwrap();
        let (mut of_apart, mut of_together) = (make(), make());
        let grad =
            |values: Vec<f32>| Tensor::from_data(TensorData::new(values.clone(), [values.len()]), &Device::default());
        for step in 0..3 {
            let [a, b] = [numbers(1.0 + step as f32), numbers(7.0 - step as f32)];
            let mut grads = NamedGrads::from_iter([("both".to_owned(), grad([a.clone(), b.clone()].concat()))]);
            together = of_together.step(1e-2, together, &mut grads).unwrap();
            let mut grads = NamedGrads::from_iter([("first".to_owned(), grad(a)), ("second".to_owned(), grad(b))]);
            apart = of_apart.step(1e-2, apart, &mut grads).unwrap();
        }
        let flat = |values: Vec<(crate::ParamInfo, Tensor<1>)>| -> Vec<f32> {
            values.into_iter().flat_map(|(_, x)| x.to_data().iter::<f32>().collect::<Vec<_>>()).collect()
        };
        assert_eq!(flat(values(&together)), flat(values(&apart)));
    }
}
