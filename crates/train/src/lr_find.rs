//! The range in which learning rates are worth a trial (Smith, <https://arxiv.org/abs/1506.01186>, section 3.3): a short run whose rate grows until the loss
//! does.

use serde::Serialize;

use crate::TrainError;

/// A learning rate that grows by the same factor in each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSweep {
    /// Of the first step.
    pub lr_min: f64,
    /// Of the last step.
    pub lr_max: f64,
    /// Number of steps, at least 10.
    pub steps: u64,
}

impl LrSweep {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`TrainError::Input`].
    pub fn validate(&self) -> Result<(), TrainError> {
        let fail = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
        if !(self.lr_min > 0.0 && self.lr_min.is_finite()) {
            return fail("--lr-min", "a rate above 0", format!("{:e}", self.lr_min));
        }
        if !(self.lr_max > self.lr_min && self.lr_max.is_finite()) {
            return fail("--lr-max", &format!("a rate above --lr-min {:e}", self.lr_min), format!("{:e}", self.lr_max));
        }
        if self.steps < LEAST_STEPS {
            return fail("--steps", &format!("at least {LEAST_STEPS}"), self.steps.to_string());
        }
        Ok(())
    }

    /// The rates of all steps.
    pub fn rates(&self) -> impl Iterator<Item = f64> + use<> {
        let Self { lr_min, lr_max, steps } = *self;
        (0..steps).map(move |step| lr_min * (lr_max / lr_min).powf(step as f64 / (steps - 1) as f64))
    }
}

/// Fewer say nothing about a slope.
const LEAST_STEPS: u64 = 10;

/// One step of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LrPoint {
    /// The learning rate, as `optimizer.lr` has it.
    pub lr: f64,
    /// The loss before the update, nats per token; infinite where a step was skipped.
    pub loss: f64,
    /// The exponential moving average of the losses so far.
    pub smoothed: f64,
}

/// What a sweep found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LrFound {
    /// Its steps.
    pub points: Vec<LrPoint>,
    /// Whether it ended early, as the loss had grown to four times its least.
    pub diverged: bool,
}

/// Weight of the past in the moving average.
const MEMORY: f64 = 0.9;

/// Times its least to which the smoothed loss may grow.
const DIVERGED: f64 = 4.0;

impl LrFound {
    /// Adds a step; whether the sweep goes on.
    pub(crate) fn push(&mut self, lr: f64, loss: f64) -> bool {
        let n = self.points.len() as i32;
        // Without a bias towards the zero that the average would begin with, as Adam's moments.
        let sum = self.points.last().map_or(0.0, |last| last.smoothed * (1.0 - MEMORY.powi(n)));
        let smoothed = (MEMORY * sum + (1.0 - MEMORY) * loss) / (1.0 - MEMORY.powi(n + 1));
        let best = self.best().map_or(f64::INFINITY, |best| self.points[best].smoothed);
        self.points.push(LrPoint { lr, loss, smoothed });
        self.diverged = !smoothed.is_finite() || smoothed > DIVERGED * best;
        !self.diverged
    }

    fn best(&self) -> Option<usize> {
        (0..self.points.len()).min_by(|&a, &b| self.points[a].smoothed.total_cmp(&self.points[b].smoothed))
    }

    /// A tenth of the rate at which the smoothed loss was least: of what a long run may bear, the upper end. None before the first step.
    pub fn minimum_tenth(&self) -> Option<f64> {
        self.best().map(|best| self.points[best].lr / 10.0)
    }

    /// The rate at which the smoothed loss falls most steeply over the logarithm of the rate: where learning is fastest, the lower end. None if the loss
    /// never falls.
    pub fn steepest(&self) -> Option<f64> {
        let slope = |at: usize| {
            let [before, after] = [self.points[at - 1], self.points[at + 1]];
            (after.smoothed - before.smoothed) / (after.lr / before.lr).ln()
        };
        // The average of a few losses at the beginning is noise, and what follows the least loss is divergence.
        let first = (self.points.len() / 10).max(1);
        let steep = (first..self.best()?).map(|at| (slope(at), at)).min_by(|a, b| a.0.total_cmp(&b.0));
        steep.filter(|(slope, _)| *slope < 0.0).map(|(_, at)| self.points[at].lr)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rates_grow_by_one_factor() {
        let rates: Vec<f64> = LrSweep { lr_min: 1e-6, lr_max: 1.0, steps: 13 }.rates().collect();
        assert_eq!((rates.len(), rates[0]), (13, 1e-6));
        assert!((rates[12] - 1.0).abs() < 1e-12);
        assert!(rates.windows(2).all(|pair| (pair[1] / pair[0] - 10f64.sqrt()).abs() < 1e-9), "{rates:?}");
        for (lr_min, lr_max, steps, word) in [
            (0.0, 1.0, 20, "--lr-min"),
            (f64::NAN, 1.0, 20, "--lr-min"),
            (1e-3, 1e-3, 20, "--lr-max"),
            (1e-3, f64::INFINITY, 20, "--lr-max"),
            (1e-3, 1.0, 9, "--steps"),
        ] {
            let error = LrSweep { lr_min, lr_max, steps }.validate().unwrap_err().to_string();
            assert!(error.starts_with(word), "{error}");
        }
    }

    /// Flat at 5, down around 1e-3, up from 1e-1 on.
    fn valley(lr: f64) -> f64 {
        5.0 - 3.0 / (1.0 + (-3.0 * (lr / 1e-3).log10()).exp()) + (lr / 0.1).powi(2)
    }

    #[test]
    fn a_valley_is_found_and_its_far_side_ends_the_sweep() {
        let mut found = LrFound::default();
        let sweep = LrSweep { lr_min: 1e-6, lr_max: 100.0, steps: 400 };
        let all = sweep.rates().map(|lr| found.push(lr, valley(lr))).take_while(|goes_on| *goes_on).count();
        assert!(found.diverged && all + 1 == found.points.len() && all < 400, "{all}");
        let last = found.points[all];
        let least = found.points.iter().map(|point| point.smoothed).fold(f64::INFINITY, f64::min);
        assert!(last.smoothed > 4.0 * least && found.points[all - 1].smoothed <= 4.0 * least);
        // The average lags ten steps behind: by a factor of 10^0.2.
        let (steepest, tenth) = (found.steepest().unwrap(), found.minimum_tenth().unwrap());
        assert!((1e-3..2e-3).contains(&steepest), "{steepest}");
        assert!((2e-3..8e-3).contains(&tenth), "{tenth}");
    }

    #[test]
    fn the_average_has_no_bias_and_a_loss_that_never_falls_no_slope() {
        let mut found = LrFound::default();
        assert_eq!((found.steepest(), found.minimum_tenth()), (None, None));
        for lr in (LrSweep { lr_min: 1e-3, lr_max: 1.0, steps: 20 }).rates() {
            assert!(found.push(lr, 2.0));
        }
        assert!(found.points.iter().all(|point| (point.smoothed - 2.0).abs() < 1e-12));
        assert!(found.push(2.0, 2.1) && !found.push(3.0, f64::INFINITY) && found.diverged);
        let mut rising = LrFound::default();
        assert!((0..20).all(|i| rising.push(1e-3 * f64::from(i + 1), 2.0 + f64::from(i) * 0.1)));
        assert_eq!(rising.steepest(), None);
    }
}
