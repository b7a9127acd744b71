//! The gradient noise scale: how large a batch is worth it.

use serde::{Deserialize, Serialize};

/// The gradient noise scale of a run (McCandlish et al., <https://arxiv.org/abs/1812.06162>, appendix A.1): a part of its state.
///
/// The gradient of a batch of b rows has the expected squared norm `|G|² + S / b`, with G the gradient over all data and S the sum of the variances of one
/// row's gradient. The norms of the micro-batches and of the whole batch therefore give unbiased estimates of both; their running means, and only those, are divided:
/// `S / |G|²` is the noise scale, in rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct NoiseScale {
    /// Measurements taken in.
    pub measured: u64,
    /// Running mean of |G|².
    gradient: f64,
    /// Running mean of S.
    noise: f64,
}

/// Weight of a new measurement: a memory of 20. One alone says little.
const SHARE: f64 = 0.05;

/// A micro-batch: its rows, its share of the targets of the whole batch, and the squared norm of what it adds to the batch's gradient. Where the loss is scaled, so are
/// both the share and what it adds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub rows: usize,
    pub share: f64,
    pub squares: f64,
}

impl NoiseScale {
    /// Takes in the micro-batches of a step and the squared norm of their sum; fewer than two say nothing.
    pub(crate) fn take(&mut self, parts: &[Part], squares: f64) {
        let n = parts.len() as f64;
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        if parts.len() < 2 || parts.iter().any(|part| part.share <= 0.0) {
            return;
        }
        // A part's mean gradient is what it adds, divided by its share. The mean of 1 / rows makes the estimates unbiased where parts differ in size.
        let small = parts.iter().map(|part| part.squares / part.share.powi(2)).sum::<f64>() / n;
        let (per_small, per_all) =
            (parts.iter().map(|part| 1.0 / part.rows as f64).sum::<f64>() / n, 1.0 / rows as f64);
        let noise = (small - squares) / (per_small - per_all);
        let gradient = squares - noise * per_all;
        self.measured += 1;
        // A plain mean at first.
        let share = SHARE.max(1.0 / self.measured as f64);
        self.gradient += share * (gradient - self.gradient);
        self.noise += share * (noise - self.noise);
    }

    /// The noise scale in rows; none before the first measurement, or where noise is all that is seen.
    pub fn rows(&self) -> Option<f64> {
        (self.measured > 0 && self.gradient > 0.0 && self.noise >= 0.0).then(|| self.noise / self.gradient)
    }
}

/// What a noise scale says about a batch, both in tokens, in words.
///
/// With B tokens per step and a noise scale of N, a run takes 1 + N/B times the fewest possible steps, and 1 + B/N times the fewest possible tokens (McCandlish et
/// al., equation 2.11).
pub(crate) fn advice(noise: f64, batch: f64) -> &'static str {
    match batch / noise.max(f64::MIN_POSITIVE) {
        x if x < 0.5 => "a batch up to that size would take fewer steps, nearly in proportion, for few tokens more",
        x if x <= 2.0 => "the batch is about that size: a fair balance between few steps and few tokens",
        _ => "the batch is beyond it: a smaller one would need fewer tokens, for few steps more",
    }
}

#[cfg(test)]
mod tests {
    use firebox_tensor::random::{Counter, Purpose, normal};

    use super::*;

    /// Gradients of rows are a fixed vector plus noise of a known variance; micro-batches of unequal size.
    #[test]
    fn finds_a_known_noise_scale() {
        const N: usize = 200;
        let counter = Counter::new(1, Purpose::Init, 0);
        let (sizes, deviation) = ([3usize, 5, 8], 0.5);
        let truth = |k: usize| 0.1 * (1.0 + (k % 5) as f64);
        let square: f64 = (0..N).map(|k| truth(k).powi(2)).sum();
        let expected = N as f64 * deviation * deviation / square;
        let rows: usize = sizes.iter().sum();
        let mut noise = NoiseScale::default();
        let mut drawn = 0;
        let mut found = vec![];
        for step in 0..600 {
            let (mut total, mut parts) = (vec![0.0; N], vec![]);
            for size in sizes {
                let share = size as f64 / rows as f64;
                let mut added = vec![0.0; N];
                for (k, x) in added.iter_mut().enumerate() {
                    for _ in 0..size {
                        *x += (truth(k) + deviation * f64::from(normal(counter, drawn))) / rows as f64;
                        drawn += 1;
                    }
                }
                parts.push(Part { rows: size, share, squares: added.iter().map(|x| x * x).sum() });
                total.iter_mut().zip(&added).for_each(|(sum, x)| *sum += x);
            }
            noise.take(&parts, total.iter().map(|x| x * x).sum());
            if step >= 100 {
                found.push(noise.rows().unwrap_or(f64::NAN));
            }
        }
        let mean = found.iter().sum::<f64>() / found.len() as f64;
        assert!((mean / expected - 1.0).abs() < 0.03, "{mean}, should be {expected}");
        assert!(found.iter().all(|x| (x / expected - 1.0).abs() < 0.3), "{found:?}");
    }

    #[test]
    fn one_part_or_no_signal_says_nothing() {
        let part = Part { rows: 4, share: 0.5, squares: 1.0 };
        let mut noise = NoiseScale::default();
        noise.take(&[Part { share: 1.0, ..part }], 1.0);
        assert_eq!((noise, noise.rows()), (NoiseScale::default(), None));
        // Two opposite gradients.
        noise.take(&[part; 2], 0.0);
        assert_eq!((noise.measured, noise.rows()), (1, None));
        // Two equal ones.
        let mut same = NoiseScale::default();
        same.take(&[part; 2], 4.0);
        assert_eq!(same.rows(), Some(0.0));
    }

    #[test]
    fn advice_goes_by_the_ratio() {
        assert!(advice(100.0, 10.0).contains("fewer steps"));
        assert!(advice(100.0, 120.0).contains("balance"));
        assert!(advice(10.0, 100.0).contains("fewer tokens"));
    }
}
