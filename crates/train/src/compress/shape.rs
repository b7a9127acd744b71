//! Models of another shape.

use std::path::Path;

use super::pipeline::{Pipeline, Source};
use super::recipe::{LowRankStep, Shrink};
use crate::TrainError;
use crate::reshape::low_rank;
use crate::reshape::structured::{Importance, Kept, remove};

impl Pipeline<'_> {
    pub(super) fn shrink(&self, step: &Shrink, source: &Source, into: &Path) -> Result<(), TrainError> {
        let importance = Importance::measure(&source.path, self.calibration(&source.config)?)?;
        let kept = Kept::of(&source.config, step.removal(), &importance)?;
        remove(&source.path, into, &kept)?;
        Ok(())
    }

    pub(super) fn low_rank(&self, step: &LowRankStep, source: &Source, into: &Path) -> Result<(), TrainError> {
        let batches = if step.calibrated { self.calibration(&source.config)? } else { vec![] };
        low_rank(&source.path, into, step.ranks, batches)?;
        Ok(())
    }
}
