//! Learning-rate schedules: pure functions of the step.
//!
//! Steps count from 0: the first update of a run uses step 0, the last step `total - 1`. Every schedule but one-cycle warms up linearly, as nanoGPT does:
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
    /// Up from `peak / div_factor` in the first part of the run, down to `peak / (div_factor final_div_factor)` in the rest (Smith and Topin,
    /// <https://arxiv.org/abs/1708.07120>). The rates are those of PyTorch's `OneCycleLR` with its two phases; momentum is not cycled.
    OneCycle {
        /// The part of all steps in which the rate rises. Default 0.3.
        #[serde(default = "three_tenths")]
        rise_fraction: f64,
        /// The peak as a multiple of the first rate. Default 25.
        #[serde(default = "twenty_five")]
        div_factor: f64,
        /// The first rate as a multiple of the last. Default 10,000.
        #[serde(default = "ten_thousand")]
        final_div_factor: f64,
        /// The form of both phases. Default `cosine`.
        #[serde(default)]
        anneal: Anneal,
    },
}

/// How a one-cycle schedule goes up and down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Anneal {
    /// Half a period of a cosine in each phase.
    #[default]
    Cosine,
    /// A straight line in each phase.
    Linear,
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
    /// min_lr_ratioˣ, a line on a logarithmic scale, as MiniCPM's 0.5^(steps / T) (Hu et al., <https://arxiv.org/abs/2404.06395>, section 4.2). The minimum
    /// must be above zero.
    Exponential,
}

fn tenth() -> f64 {
    0.1
}

fn fifth() -> f64 {
    0.2
}

// Those of PyTorch's `OneCycleLR`.
fn three_tenths() -> f64 {
    0.3
}

fn twenty_five() -> f64 {
    25.0
}

fn ten_thousand() -> f64 {
    1e4
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
    /// Steps of the linear warmup: 0 for one-cycle, which rises in its own way.
    pub fn warmup_steps(&self) -> u64 {
        match *self {
            Schedule::OneCycle { .. } => 0,
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
    /// overlap, or a one-cycle does not rise and fall.
    pub fn validate(&self, total_steps: u64) -> Result<(), OptimError> {
        let warmup = self.warmup_steps();
        check("warmup_steps", warmup as f64, warmup < total_steps.max(1), "fewer than the steps of the run")?;
        let ratio = |ratio: f64| check("min_lr_ratio", ratio, (0.0..=1.0).contains(&ratio), "0 <= min_lr_ratio <= 1");
        match *self {
            Schedule::Constant { .. } => Ok(()),
            Schedule::Linear { min_lr_ratio, .. }
            | Schedule::Cosine { min_lr_ratio, .. }
            | Schedule::InverseSqrt { min_lr_ratio, .. } => ratio(min_lr_ratio),
            Schedule::OneCycle { rise_fraction, div_factor, final_div_factor, .. } => {
                let part = (0.0..=1.0).contains(&rise_fraction);
                check("rise_fraction", rise_fraction, part, "0 <= rise_fraction <= 1")?;
                let factor = |factor: f64| (1.0..=1e12).contains(&factor);
                check("div_factor", div_factor, factor(div_factor), "1 <= div_factor <= 1e12")?;
                let expected = "1 <= final_div_factor <= 1e12";
                check("final_div_factor", final_div_factor, factor(final_div_factor), expected)
            }
            Schedule::Wsd { min_lr_ratio, decay_fraction, decay, .. } => {
                ratio(min_lr_ratio)?;
                if decay == DecayShape::Exponential {
                    let expected = "above 0 with decay = \"exponential\", which never gets to 0";
                    check("min_lr_ratio", min_lr_ratio, min_lr_ratio > 0.0, expected)?;
                }
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
        let run = total_steps.saturating_sub(warmup);
        match *self {
            Schedule::Constant { .. } => 1.0,
            Schedule::Linear { min_lr_ratio, .. } => DecayShape::Linear.factor(done(warmup, run), min_lr_ratio),
            Schedule::Cosine { min_lr_ratio, .. } => DecayShape::Cosine.factor(done(warmup, run), min_lr_ratio),
            Schedule::InverseSqrt { min_lr_ratio, .. } => {
                let timescale = if warmup == 0 { INVERSE_SQRT_TIMESCALE } else { warmup as f64 };
                (timescale / ((step - warmup) as f64 + timescale)).sqrt().max(min_lr_ratio)
            }
            Schedule::Wsd { min_lr_ratio, decay_fraction, decay, .. } => {
                let length = decay_steps(decay_fraction, total_steps).min(run);
                decay.factor(done(total_steps.saturating_sub(length), length), min_lr_ratio)
            }
            Schedule::OneCycle { rise_fraction, div_factor, final_div_factor, anneal } => {
                let first = 1.0 / div_factor;
                // As PyTorch has them: both ends are steps, of which the first need not be whole.
                let (top, end) = (rise_fraction * total_steps as f64 - 1.0, total_steps as f64 - 1.0);
                let at = (step as f64).min(end);
                if at <= top {
                    anneal.between(first, 1.0, if top > 0.0 { at / top } else { 1.0 })
                } else {
                    anneal.between(1.0, first / final_div_factor, (at - top) / (end - top))
                }
            }
        }
    }
}

impl DecayShape {
    /// From 1 at x = 0 to `min` at x = 1.
    fn factor(self, x: f64, min: f64) -> f64 {
        let between = |factor: f64| min + (1.0 - min) * factor;
        match self {
            DecayShape::Sqrt => between(1.0 - x.sqrt()),
            DecayShape::Linear => between(1.0 - x),
            DecayShape::Cosine => between(0.5 * (1.0 + (PI * x).cos())),
            DecayShape::Exponential => min.powf(x),
        }
    }
}

impl Anneal {
    /// From `start` at x = 0 to `end` at x = 1.
    fn between(self, start: f64, end: f64, x: f64) -> f64 {
        match self {
            Anneal::Cosine => end + (start - end) / 2.0 * (1.0 + (PI * x).cos()),
            Anneal::Linear => (end - start) * x + start,
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
                let decay = DecayShape::Exponential;
                all.push(Schedule::Wsd { warmup_steps, min_lr_ratio, decay_fraction: 0.5, decay });
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
    fn one_cycle_rises_once_and_falls_once() {
        for anneal in [Anneal::Cosine, Anneal::Linear] {
            for (rise_fraction, top) in [(0.0, 0), (0.025, 0), (0.3, 11), (0.51, 19), (1.0, 39)] {
                let cycle = Schedule::OneCycle { rise_fraction, div_factor: 4.0, final_div_factor: 10.0, anneal };
                cycle.validate(TOTAL).unwrap();
                let at = |step| cycle.factor_at(step, TOTAL);
                let rises = (0..TOTAL - 1).filter(|&step| at(step + 1) > at(step)).count();
                assert_eq!(rises, top, "{cycle:?}");
                assert!((0..100).all(|step| (0.025 - 1e-12..=1.0).contains(&at(step))), "{cycle:?}");
                assert_eq!(at(TOTAL), at(TOTAL - 1), "{cycle:?} stays at its end");
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
        let cycle =
            Schedule::OneCycle { rise_fraction: 0.3, div_factor: 25.0, final_div_factor: 1e4, anneal: Anneal::Linear };
        assert_eq!(parse("kind = 'one_cycle'\nanneal = 'linear'").unwrap(), cycle);
        assert_eq!(parse(&toml::to_string(&cycle).unwrap()).unwrap(), cycle);
        assert!(parse("kind = 'cosine'\nwarmup = 5").is_err());
        assert!(parse("kind = 'cosinus'").is_err());
        for schedule in every() {
            assert_eq!(parse(&toml::to_string(&schedule).unwrap()).unwrap(), schedule);
        }
    }

    #[test]
    fn bad_values_are_named() {
        let cycle = |rise_fraction, div_factor, final_div_factor| Schedule::OneCycle {
            rise_fraction,
            div_factor,
            final_div_factor,
            anneal: Anneal::Cosine,
        };
        let bad = [
            (cycle(1.5, 25.0, 1e4), "rise_fraction = 1.5 "),
            (cycle(0.3, 0.5, 1e4), "div_factor = 0.5 "),
            (cycle(0.3, 25.0, f64::NAN), "final_div_factor = NaN "),
            (
                Schedule::Wsd {
                    warmup_steps: 0,
                    min_lr_ratio: 0.0,
                    decay_fraction: 0.5,
                    decay: DecayShape::Exponential,
                },
                "min_lr_ratio = 0 ",
            ),
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
