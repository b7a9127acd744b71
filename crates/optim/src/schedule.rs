//! Learning-rate schedules: pure functions of the step.
//!
//! Steps count from 0: the first update of a run uses step 0, the last step `total - 1`. Every schedule warms up linearly, as nanoGPT does:
//! (step + 1) / (warmup + 1) of the peak while step < warmup, and the peak itself at step = warmup. transformers' warmup, step / warmup, wastes the first
//! update on a learning rate of zero; after the warmup the formulas are the same, and tested against transformers' and PyTorch's own values.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::OptimError;
use crate::error::check;

/// How the learning rate goes from its peak to its end, with a linear warmup before.
///
/// In a recipe: `schedule = { kind = "cosine", warmup_steps = 100, min_lr_ratio = 0.1 }`. All fields but `kind` have defaults.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// The peak, to the end.
    Constant {
        /// Steps of warmup. Default 0.
        #[serde(default)]
        warmup_steps: u64,
    },
    /// A straight line from the peak to the minimum.
    Linear {
        /// Steps of warmup. Default 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The minimum as a part of the peak. Default 0.
        #[serde(default)]
        min_lr_ratio: f64,
    },
    /// Half a period of a cosine from the peak to the minimum (Loshchilov and Hutter, <https://arxiv.org/abs/1608.03983>, without restarts).
    Cosine {
        /// Steps of warmup. Default 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The minimum as a part of the peak. Default 0.1, as in GPT-3.
        #[serde(default = "tenth")]
        min_lr_ratio: f64,
    },
    /// √(warmup / step), not below the minimum (Vaswani et al., <https://arxiv.org/abs/1706.03762>, section 5.3). Without a warmup it is
    /// √(10,000 / (step + 10,000)), as in transformers. It does not depend on the length of the run.
    InverseSqrt {
        /// Steps of warmup. Default 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The minimum as a part of the peak. Default 0.
        #[serde(default)]
        min_lr_ratio: f64,
    },
    /// Warmup, stable, decay: the peak until the last part of the run, then down to the minimum (Hu et al., MiniCPM,
    /// <https://arxiv.org/abs/2404.06395>).
    Wsd {
        /// Steps of warmup. Default 0.
        #[serde(default)]
        warmup_steps: u64,
        /// The minimum as a part of the peak. Default 0.
        #[serde(default)]
        min_lr_ratio: f64,
        /// The part of all steps in which the rate decays. Default 0.2: where Hägele et al. (<https://arxiv.org/abs/2405.18392>) find a
        /// long cosine matched.
        #[serde(default = "fifth")]
        decay_fraction: f64,
        /// The form of the decay. Default `sqrt`.
        #[serde(default)]
        decay: DecayShape,
    },
}

/// How a warmup-stable-decay schedule goes down, x being the part of the decay that is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// 1 − √x: the best of those that Hägele et al. (<https://arxiv.org/abs/2405.18392>) compare.
    #[default]
    Sqrt,
    /// 1 − x
    Linear,
    /// (1 + cos πx) / 2
    Cosine,
}

fn tenth() -> f64 {
    0.1
}

fn fifth() -> f64 {
    0.2
}

/// The time scale of an inverse square root without a warmup, as in transformers' `get_inverse_sqrt_schedule`.
const INVERSE_SQRT_TIMESCALE: f64 = 10_000.0;

impl Default for Schedule {
    /// A cosine to a tenth, without a warmup.
    fn default() -> Self {
        Schedule::Cosine { warmup_steps: 0, min_lr_ratio: tenth() }
    }
}

impl Schedule {
    /// Steps of warmup.
    pub fn warmup_steps(&self) -> u64 {
        match *self {
            Schedule::Constant { warmup_steps }
            | Schedule::Linear { warmup_steps, .. }
            | Schedule::Cosine { warmup_steps, .. }
            | Schedule::InverseSqrt { warmup_steps, .. }
            | Schedule::Wsd { warmup_steps, .. } => warmup_steps,
        }
    }

    /// Checks the ranges, for a run of `total_steps`.
    ///
    /// # Errors
    /// [`OptimError::Hyperparameter`] if a ratio or fraction is outside 0 to 1, the warmup is not shorter than the run, or warmup and decay
    /// overlap.
    pub fn validate(&self, total_steps: u64) -> Result<(), OptimError> {
        let warmup = self.warmup_steps();
        check("warmup_steps", warmup as f64, warmup < total_steps.max(1), "fewer than the steps of the run")?;
        let ratio = |ratio: f64| check("min_lr_ratio", ratio, (0.0..=1.0).contains(&ratio), "0 <= min_lr_ratio <= 1");
        match *self {
            Schedule::Constant { .. } => Ok(()),
            Schedule::Linear { min_lr_ratio, .. }
            | Schedule::Cosine { min_lr_ratio, .. }
            | Schedule::InverseSqrt { min_lr_ratio, .. } => ratio(min_lr_ratio),
            Schedule::Wsd { min_lr_ratio, decay_fraction, .. } => {
                ratio(min_lr_ratio)?;
                let fraction = "0 <= decay_fraction <= 1, and no overlap with the warmup";
                let ok = (0.0..=1.0).contains(&decay_fraction)
                    && decay_steps(decay_fraction, total_steps) <= total_steps - warmup;
                check("decay_fraction", decay_fraction, ok, fraction)
            }
        }
    }

    /// The learning rate of `step` (from 0) in a run of `total_steps` with the given peak. Steps past the end get the rate of the end.
    pub fn lr_at(&self, peak: f64, step: u64, total_steps: u64) -> f64 {
        peak * self.factor_at(step, total_steps)
    }

    /// [`lr_at`](Self::lr_at) as a part of the peak, 0 to 1.
    pub fn factor_at(&self, step: u64, total_steps: u64) -> f64 {
        let warmup = self.warmup_steps();
        if step < warmup {
            return (step + 1) as f64 / (warmup + 1) as f64;
        }
        // The part done of a phase of `length` steps that begins at `start`.
        let done = |start: u64, length: u64| (step.saturating_sub(start) as f64 / length.max(1) as f64).min(1.0);
        let between = |min: f64, factor: f64| min + (1.0 - min) * factor;
        let run = total_steps.saturating_sub(warmup);
        match *self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Linear { min_lr_ratio, .. } => {
                between(min_lr_ratio, DecayShape::Linear.factor(done(warmup, run)))
            }
            Schedule::Cosine { min_lr_ratio, .. } => {
                between(min_lr_ratio, DecayShape::Cosine.factor(done(warmup, run)))
            }
            Schedule::InverseSqrt { min_lr_ratio, .. } => {
                let timescale = if warmup == 0 { INVERSE_SQRT_TIMESCALE } else { warmup as f64 };
                (timescale / ((step - warmup) as f64 + timescale)).sqrt().max(min_lr_ratio)
            }
            Schedule::Wsd { min_lr_ratio, decay_fraction, decay, .. } => {
                let length = decay_steps(decay_fraction, total_steps).min(run);
                between(min_lr_ratio, decay.factor(done(total_steps.saturating_sub(length), length)))
            }
        }
    }
}

impl DecayShape {
    fn factor(self, x: f64) -> f64 {
        match self {
            DecayShape::Sqrt => 1.0 - x.sqrt(),
            DecayShape::Linear => 1.0 - x,
            DecayShape::Cosine => 0.5 * (1.0 + (PI * x).cos()),
        }
    }
}

fn decay_steps(fraction: f64, total_steps: u64) -> u64 {
    (fraction * total_steps as f64).round() as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TOTAL: u64 = 40;

    fn every() -> Vec<Schedule> {
        let mut all = vec![];
        for warmup_steps in [0, 1, 9, 39] {
            all.push(Schedule::Constant { warmup_steps });
            for min_lr_ratio in [0.0, 0.1, 1.0] {
                all.push(Schedule::Linear { warmup_steps, min_lr_ratio });
                all.push(Schedule::Cosine { warmup_steps, min_lr_ratio });
                all.push(Schedule::InverseSqrt { warmup_steps, min_lr_ratio });
                for decay in [DecayShape::Linear, DecayShape::Sqrt, DecayShape::Cosine] {
                    for decay_fraction in [0.0, 0.025, 1.0] {
                        all.push(Schedule::Wsd { warmup_steps, min_lr_ratio, decay_fraction, decay });
                    }
                }
            }
        }
        all
    }

    #[test]
    fn up_to_the_peak_then_never_up_again() {
        for schedule in every() {
            let at = |step| schedule.factor_at(step, TOTAL);
            for step in 0..100 {
                assert!((0.0..=1.0).contains(&at(step)), "{schedule:?} at {step}: {}", at(step));
                let rises = step + 1 >= schedule.warmup_steps() || at(step + 1) > at(step);
                let falls = step < schedule.warmup_steps() || at(step + 1) <= at(step);
                assert!(rises && falls, "{schedule:?} at {step}: {} {}", at(step), at(step + 1));
            }
            if schedule.warmup_steps() < 39 {
                assert!(at(schedule.warmup_steps()) >= 1.0 - 1e-12, "{schedule:?} reaches its peak");
            }
        }
    }

    #[test]
    fn recipe_form() {
        let parse = |text: &str| toml::from_str::<Schedule>(text);
        let expected =
            Schedule::Wsd { warmup_steps: 5, min_lr_ratio: 0.0, decay_fraction: 0.2, decay: DecayShape::Sqrt };
        assert_eq!(parse("kind = 'wsd'\nwarmup_steps = 5").unwrap(), expected);
        assert_eq!(
            parse("kind = 'inverse_sqrt'").unwrap(),
            Schedule::InverseSqrt { warmup_steps: 0, min_lr_ratio: 0.0 }
        );
        assert!(parse("kind = 'cosine'\nwarmup = 5").is_err());
        assert!(parse("kind = 'cosinus'").is_err());
        for schedule in every() {
            assert_eq!(parse(&toml::to_string(&schedule).unwrap()).unwrap(), schedule);
        }
    }

    #[test]
    fn bad_values_are_named() {
        let bad = [
            (Schedule::Constant { warmup_steps: 40 }, "warmup_steps = 40 "),
            (Schedule::Linear { warmup_steps: 0, min_lr_ratio: -0.1 }, "min_lr_ratio = -0.1 "),
            (Schedule::Cosine { warmup_steps: 0, min_lr_ratio: f64::NAN }, "min_lr_ratio = NaN "),
            (
                Schedule::Wsd { warmup_steps: 30, min_lr_ratio: 0.0, decay_fraction: 0.5, decay: DecayShape::Sqrt },
                "decay_fraction = 0.5 ",
            ),
            (
                Schedule::Wsd { warmup_steps: 0, min_lr_ratio: 0.0, decay_fraction: 1.5, decay: DecayShape::Sqrt },
                "decay_fraction = 1.5 ",
            ),
        ];
        for (schedule, start) in bad {
            let text = schedule.validate(TOTAL).unwrap_err().to_string();
            assert!(text.starts_with(start), "{text}");
        }
    }
}
