//! A student's run.

use firebox_models::TokenBatch;
use firebox_tensor::ops::LossParts;

use super::Trainer;
use crate::TrainError;
use crate::distill::Teacher;
use crate::observe::DistillRecord;

impl Trainer<'_> {
    /// The batch with its lesson, where there is a teacher.
    pub(super) fn taught(&self, batch: TokenBatch) -> TokenBatch {
        match &self.teacher {
            Some(teacher) => teacher.teach(batch),
            None => batch,
        }
    }

    /// The parts of the losses of this rank's batches in the step that was done.
    pub(super) fn loss_parts(&self, scale: f64) -> [f64; 4] {
        self.teacher.as_ref().map(Teacher::take_parts).unwrap_or_default().map(|part| part / scale)
    }

    /// The parts of a step's loss, of all ranks, where there is a teacher. All must ask.
    pub(super) fn distilled(&self, mine: [f64; 4]) -> Result<Option<DistillRecord>, TrainError> {
        if self.teacher.is_none() {
            return Ok(None);
        }
        let mut sum = mine;
        if let Some(ranks) = &self.ranks {
            let all = ranks.numbers(mine.map(f64::to_bits))?;
            let of_all = |i: usize| all.iter().map(|parts| f64::from_bits(parts[i])).sum::<f64>();
            sum = std::array::from_fn(|i| of_all(i) / ranks.with_the_same_loss() as f64);
        }
        Ok(Some(DistillRecord { hard_loss: sum[LossParts::HARD], soft_loss: sum[LossParts::SOFT] }))
    }
}
