//! Clipping of gradients: by a norm over many parameters, or row by row against the parameter itself.

use burn::tensor::Tensor;
use firebox_tensor::ops::clip_rows;
use serde::{Deserialize, Serialize};

use crate::OptimError;
use crate::error::check;

/// How gradients are clipped. In a recipe a number or a table: `clip = 1.0`, `clip = { adaptive = 0.01 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a norm such as 1.0, 0 for none, or { adaptive = 0.01 }")]
pub enum Clip {
    /// The largest Euclidean norm of the gradients together: beyond it all are scaled by `norm / (their norm + 1e-6)`, as PyTorch's `clip_grad_norm_`
    /// does. 0: no clipping.
    Norm(f64),
    /// Adaptive gradient clipping.
    Adaptive(Adaptive),
}

/// Adaptive gradient clipping (Brock et al., <https://arxiv.org/abs/2102.06171>, equation 3): no row of a gradient may have a norm of more than `adaptive` times
/// that of the same row of the parameter. A row is what makes one output of a matrix `[outputs, inputs]`, or one token of an embedding; a vector is one row. Rows of the
/// parameter count as having at least the norm 1e-3, so that what starts at zero can move.
///
/// As the optimizer's clipping it leaves out the head, as the paper leaves out the last layer, and embeddings, which the paper's networks do not have: their
/// gradients are not clipped. A group that says so itself is clipped whatever is in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adaptive {
    /// Largest norm of a row's gradient as a share of the row's own; the paper's λ.
    pub adaptive: f64,
}

/// The least norm of a row of a parameter; the paper's ε.
const LEAST_NORM: f32 = 1e-3;

/// Added to the norm in a factor of clipping, as in PyTorch's `clip_grad_norm_`.
const EPS: f64 = 1e-6;

impl Default for Clip {
    /// None.
    fn default() -> Self {
        Self::Norm(0.0)
    }
}

impl Clip {
    /// Checks the range.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`].
    pub fn validate(&self) -> Result<(), OptimError> {
        match *self {
            Self::Norm(norm) => check("clip", norm, norm >= 0.0 && norm.is_finite(), "a norm, or 0 for none"),
            Self::Adaptive(Adaptive { adaptive }) => {
                check("clip.adaptive", adaptive, adaptive > 0.0 && adaptive <= 1e6, "0 < adaptive <= 1e6")
            }
        }
    }

    /// Whether it needs the norm of more than one parameter: all their gradients must be there before the first is used.
    pub fn needs_norm(&self) -> bool {
        matches!(self, Self::Norm(norm) if *norm > 0.0)
    }
}

impl Adaptive {
    /// Clips `scale` times the flat gradient of a parameter of `rows` rows.
    pub(crate) fn clip(self, grad: Tensor<1>, scale: f64, param: &Tensor<1>, rows: usize) -> Tensor<1> {
        clip_rows(grad, param.clone(), rows, (self.adaptive * scale) as f32, LEAST_NORM)
    }
}

/// The norms of gradients, and by what they are to be scaled: see [`Optimizer::clipping`](crate::Optimizer::clipping).
#[derive(Debug, Clone, PartialEq)]
pub struct Clipping {
    /// The Euclidean norm of all gradients as one vector, before clipping; not finite if any element is not.
    pub norm: f64,
    /// What the gradients are multiplied by already.
    pub(crate) scale: f64,
    /// Factor of those that the optimizer's norm clips, then of each group.
    factors: Vec<f64>,
}

impl Clipping {
    /// No clipping by norms, whatever the groups.
    pub(crate) fn none() -> Self {
        Self { norm: f64::NAN, scale: 1.0, factors: vec![] }
    }

    /// From the squared norms of what each of `clips` is over and of all, of gradients that are multiplied by `scale`.
    pub(crate) fn new(clips: &[Clip], squares: &[f64], all: f64, scale: f64) -> Self {
        let factors = clips.iter().zip(squares).map(|(clip, squares)| match clip {
            Clip::Norm(most) if *most > 0.0 => factor(*most * scale, squares.sqrt()) / scale,
            _ => 1.0 / scale,
        });
        Self { norm: all.sqrt() / scale, scale, factors: factors.collect() }
    }

    /// The factor of the gradients that clipping `i` is over.
    pub(crate) fn factor(&self, i: usize) -> f64 {
        self.factors.get(i).copied().unwrap_or(1.0)
    }
}

/// By what gradients of norm `norm` are scaled so that they have at most the norm `most`; 1 if theirs is not finite, for the caller to skip the step.
pub(crate) fn factor(most: f64, norm: f64) -> f64 {
    if norm.is_finite() { (most / (norm + EPS)).min(1.0) } else { 1.0 }
}
