//! The learning rate of another batch size.

use serde::{Deserialize, Serialize};

use crate::OptimError;
use crate::error::check;

/// A learning rate that was found with one batch, for another.
///
/// In a recipe: `optimizer.batch_scaling = { rule = "sqrt", reference_rows = 64 }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchScaling {
    /// How the rate grows with the batch.
    pub rule: ScalingRule,
    /// Rows per step for which the learning rate is meant.
    pub reference_rows: usize,
}

/// How a learning rate grows with the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalingRule {
    /// With its root: for Adam and its kin (Malladi et al., <https://arxiv.org/abs/2205.10287>).
    Sqrt,
    /// In proportion: for SGD (Goyal et al., <https://arxiv.org/abs/1706.02677>).
    Linear,
}

impl BatchScaling {
    /// Checks that there is a reference.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] if `reference_rows` is 0.
    pub fn validate(&self) -> Result<(), OptimError> {
        let rows = self.reference_rows;
        check("batch_scaling.reference_rows", rows as f64, rows > 0, "at least 1")
    }

    /// What the learning rate is multiplied by for a batch of `rows`.
    pub fn factor(&self, rows: usize) -> f64 {
        let times = rows as f64 / self.reference_rows as f64;
        match self.rule {
            ScalingRule::Sqrt => times.sqrt(),
            ScalingRule::Linear => times,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_times_the_batch_is_twice_or_four_times_the_rate() {
        let sqrt = BatchScaling { rule: ScalingRule::Sqrt, reference_rows: 64 };
        let linear = BatchScaling { rule: ScalingRule::Linear, ..sqrt };
        assert_eq!([sqrt.factor(256), sqrt.factor(64), sqrt.factor(16)], [2.0, 1.0, 0.5]);
        assert_eq!([linear.factor(256), linear.factor(64), linear.factor(16)], [4.0, 1.0, 0.25]);
        assert!(linear.validate().is_ok() && BatchScaling { reference_rows: 0, ..linear }.validate().is_err());
    }
}
