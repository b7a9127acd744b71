//! Targets drawn from a model's own predictions: what Sophia estimates the curvature from.

use burn::module::Module;
use burn::tensor::activation::softmax;
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_tensor::random::{Counter, Purpose, uniform};

use crate::model_io::to_host;

/// The batch with every target replaced by one that the model gives its own probability (Liu et al., arXiv:2305.14342, algorithm 2). What is not to be
/// predicted stays so. The draws are a pure function of (seed, step).
pub(crate) fn drawn(model: &Transformer, batch: &TokenBatch, seed: u64, step: u64) -> TokenBatch {
    let counter = Counter::new(seed, Purpose::Sampling, step).fork("curvature");
    let probabilities = to_host(softmax(model.valid().logits(batch), 2));
    let v = model.config().vocab_size;
    let draw = |(i, row): (usize, &[f32])| {
        let mut left = f64::from(uniform(counter, i as u64)) * row.iter().map(|&p| f64::from(p)).sum::<f64>();
        let found = row.iter().position(|&p| {
            left -= f64::from(p);
            left < 0.0
        });
        found.unwrap_or(v - 1) as i32
    };
    let drawn = probabilities.chunks_exact(v).enumerate().map(draw);
    let targets = drawn.zip(batch.targets.iter()).map(|(drawn, &target)| if target < 0 { target } else { drawn });
    TokenBatch { targets: targets.collect(), lesson: None, ..batch.clone() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_models::transformer::{TransformerConfig, presets};
    use firebox_tensor::device::Backend;

    use super::*;

    #[test]
    fn targets_are_drawn_with_the_models_probabilities() {
        let device = Backend::NdArray.device().unwrap().autodiff();
        let config = TransformerConfig { context: 64, init_std: 0.3, ..presets::depth(1, 5) };
        let model = Transformer::new(&config, 3, &device).unwrap();
        // One position, seen many times.
        let batch = TokenBatch::plain(1, 3, vec![1, 4, 2], vec![-1, 0, 3]);
        let expected = to_host(softmax(model.valid().logits(&batch), 2));
        let mut counts = [0usize; 5];
        const DRAWS: u64 = 4000;
        for step in 0..DRAWS {
            let targets = drawn(&model, &batch, 7, step).targets;
            assert_eq!(targets[0], -1);
            counts[targets[2] as usize] += 1;
        }
        for (count, &p) in counts.iter().zip(&expected[10..]) {
            let (share, p) = (*count as f64 / DRAWS as f64, f64::from(p));
            assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / DRAWS as f64).sqrt() + 1e-9, "{share} {p}");
        }
        let [one, two] = [0, 1].map(|_| drawn(&model, &batch, 7, 9).targets);
        assert_eq!(one, two);
    }
}
