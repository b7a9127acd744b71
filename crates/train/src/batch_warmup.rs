//! Smaller batches in the first steps.

use serde::{Deserialize, Serialize};

use crate::recipe::RecipeError;

/// A batch that grows in a straight line to `train.batch_rows` (Brown et al., GPT-3, <https://arxiv.org/abs/2005.14165>, appendix B): early gradients point the
/// same way, so that small batches get as far.
///
/// `train.batch_warmup = { start_rows = 8, steps = 500 }`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchWarmup {
    /// Rows of the first step.
    pub start_rows: usize,
    /// Steps until the whole batch.
    pub steps: u64,
}

impl BatchWarmup {
    /// Rows of step `step` (from 0), rounded down, in a run with `batch_rows` rows after the warmup.
    pub fn rows_at(&self, step: u64, batch_rows: usize) -> usize {
        if step >= self.steps {
            return batch_rows;
        }
        // u128: no product of two counts is too large for it.
        let grown = (batch_rows - self.start_rows) as u128 * u128::from(step) / u128::from(self.steps);
        self.start_rows + grown as usize
    }

    /// Checks the ranges.
    pub(crate) fn validate(&self, batch_rows: usize) -> Result<(), RecipeError> {
        if (1..=batch_rows).contains(&self.start_rows) {
            return Ok(());
        }
        let expected = format!("1 to train.batch_rows = {batch_rows}");
        Err(RecipeError::Value { key: "train.batch_warmup.start_rows", expected, got: self.start_rows.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_grow_evenly_to_the_whole_batch() {
        let rows = |start_rows, steps, batch| {
            let warmup = BatchWarmup { start_rows, steps };
            (0..6).map(|step| warmup.rows_at(step, batch)).collect::<Vec<_>>()
        };
        assert_eq!(rows(2, 4, 6), [2, 3, 4, 5, 6, 6]);
        assert_eq!(rows(1, 4, 4), [1, 1, 2, 3, 4, 4]);
        assert_eq!(rows(3, 0, 5), [5; 6]);
        assert_eq!(rows(5, 3, 5), [5; 6]);
        assert_eq!(BatchWarmup { start_rows: 1, steps: u64::MAX }.rows_at(u64::MAX / 2, 1 << 40), 1 << 39);
        for (start_rows, good) in [(0, false), (1, true), (6, true), (7, false)] {
            assert_eq!(BatchWarmup { start_rows, steps: 1 }.validate(6).is_ok(), good, "{start_rows}");
        }
    }
}
