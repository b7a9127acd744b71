//! A watch over loss and gradients: a batch that makes them jump is left out, or the run goes back to where it was well.

use serde::{Deserialize, Serialize};

use crate::recipe::RecipeError;

/// When a step is a spike, and what to do then.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchRecipe {
    /// What to do.
    pub on_spike: OnSpike,
    /// How many standard deviations above their running mean the loss, or the logarithm of the gradients' norm, must be.
    pub threshold: f64,
    /// Steps before the watch begins: at first both move by themselves.
    pub warmup_steps: u64,
    /// Spikes in a row after which they are taken for the new level.
    pub patience: u64,
    /// Batches that are left out after a rollback, the offending one among them.
    pub skip_batches: u64,
    /// Rollbacks of a run; further spikes are left out without.
    pub max_rollbacks: u64,
    /// Measure the gradient noise scale every so many steps; 0: never.
    pub noise_scale_every: u64,
}

/// What to do about a spike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSpike {
    /// Nothing.
    #[default]
    Ignore,
    /// No update from this batch.
    Skip,
    /// Back to the last checkpoint, and on with the data after the batch (PaLM, arXiv:2204.02311, section 5.1).
    Rollback,
}

impl Default for WatchRecipe {
    fn default() -> Self {
        Self {
            on_spike: OnSpike::Ignore,
            threshold: 6.0,
            warmup_steps: 50,
            patience: 3,
            skip_batches: 1,
            max_rollbacks: 10,
            noise_scale_every: 0,
        }
    }
}

impl WatchRecipe {
    /// Checks every range, for steps of so many micro-batches.
    pub(crate) fn validate(&self, micro_batches: usize) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if !(self.threshold >= 1.0 && self.threshold.is_finite()) {
            return fail("watch.threshold", "at least 1 deviation", self.threshold.to_string());
        }
        if self.patience == 0 {
            return fail("watch.patience", "at least 1", "0".into());
        }
        if self.skip_batches == 0 {
            return fail("watch.skip_batches", "at least 1: the offending one", "0".into());
        }
        if self.noise_scale_every > 0 && micro_batches < 2 {
            let expected =
                "0, or train.micro_batch_rows below train.batch_rows: it compares the gradients of micro-batches";
            return fail("watch.noise_scale_every", expected, self.noise_scale_every.to_string());
        }
        Ok(())
    }
}

/// The running mean and variance of a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Usual {
    mean: f64,
    variance: f64,
}

/// Weight of a new value: a memory of 10 steps, so that a loss that falls is not followed from afar.
const SHARE: f64 = 0.1;

/// The least deviation that is reckoned with: a loss that hardly moves must not make a jump of what is nothing.
const LEAST_DEVIATION: f64 = 0.02;

impl Usual {
    fn deviation(&self) -> f64 {
        self.variance.sqrt().max(LEAST_DEVIATION)
    }

    fn is_above(&self, x: f64, threshold: f64) -> bool {
        x > self.mean + threshold * self.deviation()
    }

    fn take(&mut self, x: f64, share: f64) {
        let distance = x - self.mean;
        self.mean += share * distance;
        self.variance = (1.0 - share) * (self.variance + share * distance * distance);
    }
}

/// What the watch has seen: a part of a run's state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// Steps taken in.
    seen: u64,
    /// Spikes in a row until now.
    in_a_row: u64,
    loss: Usual,
    /// Of the logarithm of the gradients' norm.
    norm: Usual,
    /// Spikes of the run.
    pub spikes: u64,
    /// Rollbacks of the run.
    pub rollbacks: u64,
}

impl Watch {
    /// Takes a step in, whose loss and norm are finite. Says why it is a spike if it is one that something is to be done about; such a step changes the running
    /// means only once the watch's patience is over.
    pub(crate) fn look(&mut self, recipe: &WatchRecipe, loss: f64, grad_norm: f64) -> Option<String> {
        if recipe.on_spike == OnSpike::Ignore {
            return None;
        }
        let log_norm = grad_norm.max(f64::MIN_POSITIVE).ln();
        if self.seen >= recipe.warmup_steps {
            let (high_loss, high_norm) =
                (self.loss.is_above(loss, recipe.threshold), self.norm.is_above(log_norm, recipe.threshold));
            if high_loss || high_norm {
                self.in_a_row += 1;
                self.spikes += 1;
                if self.in_a_row < recipe.patience {
                    return Some(match high_loss {
                        true => {
                            format!("loss spike: {loss:.4}, usual {:.4} ± {:.4}", self.loss.mean, self.loss.deviation())
                        }
                        false => format!("gradient spike: norm {grad_norm:.4}, usual {:.4}", self.norm.mean.exp()),
                    });
                }
                // This is no spike any more, but how things are.
                (self.loss, self.norm, self.seen) = (Usual::default(), Usual::default(), 0);
            }
        }
        self.in_a_row = 0;
        self.seen += 1;
        // A plain mean at first.
        let share = SHARE.max(1.0 / self.seen as f64);
        self.loss.take(loss, share);
        self.norm.take(log_norm, share);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> WatchRecipe {
        WatchRecipe { on_spike: OnSpike::Skip, warmup_steps: 20, ..WatchRecipe::default() }
    }

    /// A loss that falls and flickers.
    fn loss(step: u64) -> f64 {
        2.0 + 3.0 / (1.0 + step as f64 / 30.0) + 0.05 * ((step * 7919 % 13) as f64 / 13.0 - 0.5)
    }

    #[test]
    fn jumps_are_seen_and_nothing_else() {
        let mut watch = Watch::default();
        for step in 0..500 {
            assert_eq!(watch.look(&recipe(), loss(step), 1.0 + 0.3 * loss(step)), None, "{step}");
            if step > 50 && step % 97 == 0 {
                let said = watch.look(&recipe(), loss(step) + 1.5, 1.5).unwrap_or_default();
                assert!(said.starts_with("loss spike"), "{step}: {said}");
                let said = watch.look(&recipe(), loss(step), 80.0).unwrap_or_default();
                assert!(said.starts_with("gradient spike"), "{step}: {said}");
            }
        }
        assert_eq!(watch.spikes, 2 * 5);
    }

    #[test]
    fn what_stays_is_the_new_level() {
        let mut watch = Watch::default();
        for step in 0..100 {
            watch.look(&recipe(), loss(step), 1.0);
        }
        let said: Vec<bool> = (0..50).map(|_| watch.look(&recipe(), 9.0, 1.0).is_some()).collect();
        assert_eq!(said.iter().filter(|said| **said).count(), 2, "patience is 3");
        assert!(said[0] && said[1]);
    }

    #[test]
    fn off_by_default() {
        let mut watch = Watch::default();
        for loss in [1.0, 1.0, 1e9] {
            assert_eq!(watch.look(&WatchRecipe { warmup_steps: 0, ..WatchRecipe::default() }, loss, 1.0), None);
        }
        assert_eq!(watch, Watch::default());
    }
}
