//! Frequencies of rotary positions.

use super::config::{ConfigError, Positions, RopeScaling, TransformerConfig};

impl TransformerConfig {
    /// Angle by which a step of one position turns each pair of a head's values, `[E / 2]`; none without rotary positions.
    pub fn rope_frequencies(&self) -> Option<Vec<f64>> {
        let Positions::Rotary { theta } = self.positions else { return None };
        let plain = |j: usize| theta.powf(-2.0 * j as f64 / self.head_dim as f64);
        let scale = |frequency: f64| self.rope_scaling.map_or(frequency, |scaling| scaling.scale(frequency));
        Some((0..self.head_dim / 2).map(|j| scale(plain(j))).collect())
    }

    pub(super) fn validate_rope(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        let Some(scaling) = self.rope_scaling else { return Ok(()) };
        if self.positions == Positions::Learned {
            return fail("rope_scaling", format!("{scaling:?}"), "must not be there with learned positions");
        }
        let (RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. }) = scaling;
        if !(factor.is_finite() && factor >= 1.0) {
            return fail("rope_scaling.factor", factor.to_string(), "must be at least 1");
        }
        if let RopeScaling::Llama3 { low_freq_factor: low, high_freq_factor: high, original_context, .. } = scaling {
            if !(low.is_finite() && high.is_finite() && 0.0 < low && low < high) {
                let got = format!("{low}, with high_freq_factor = {high}");
                return fail("rope_scaling.low_freq_factor", got, "must be positive and less than high_freq_factor");
            }
            if original_context == 0 {
                return fail("rope_scaling.original_context", "0".into(), "must be at least 1");
            }
        }
        Ok(())
    }
}

impl RopeScaling {
    /// The frequency in place of `frequency`.
    fn scale(self, frequency: f64) -> f64 {
        match self {
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                let turns = original_context as f64 * frequency / std::f64::consts::TAU;
                // 0 for slow ones, 1 for fast ones.
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * ((1.0 - kept) / factor + kept)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transformer::presets;

    #[test]
    fn slow_turns_are_divided_and_fast_ones_stay() {
        let plain = TransformerConfig { head_dim: 128, ..presets::named("llama-30m").unwrap() };
        let with = |scaling| TransformerConfig { rope_scaling: Some(scaling), ..plain.clone() };
        let llama3 = |factor, low_freq_factor, high_freq_factor, original_context| RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        };
        let before = plain.rope_frequencies().unwrap();
        let linear = with(RopeScaling::Linear { factor: 4.0 }).rope_frequencies().unwrap();
        assert!(before.iter().zip(&linear).all(|(a, b)| a / 4.0 == *b));
        let after = with(llama3(8.0, 1.0, 4.0, 8192)).rope_frequencies().unwrap();
        assert_eq!((before.len(), before[0], after[0]), (64, 1.0, 1.0));
        assert_eq!(after[63], before[63] / 8.0);
        assert!(before.iter().zip(&after).any(|(a, b)| *b < 0.99 * a && *b > 0.2 * a), "some lie between");
        for wrong in [
            RopeScaling::Linear { factor: 0.5 },
            llama3(8.0, 4.0, 1.0, 8192),
            llama3(8.0, 1.0, 4.0, 0),
            llama3(f64::NAN, 1.0, 4.0, 8),
        ] {
            assert!(with(wrong).validate().unwrap_err().field.starts_with("rope_scaling."), "{wrong:?}");
        }
        let learned = TransformerConfig { positions: Positions::Learned, ..with(RopeScaling::Linear { factor: 2.0 }) };
        assert_eq!(learned.validate().unwrap_err().field, "rope_scaling");
    }
}
