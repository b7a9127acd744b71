//! Text from a model.

use std::collections::HashSet;

use firebox_models::transformer::{Head, KvCache, Transformer};
use firebox_tensor::random::{Counter, Purpose, uniform};

use crate::TrainError;
use crate::model_io::to_host;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the so many most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability (Holtzman et al., arXiv:1904.09751); 1: all.
    pub top_p: f64,
    /// Logits of tokens that occurred are divided by it where positive, multiplied where negative (Keskar et al., arXiv:1909.05858, section
    /// 4.1); 1: off.
    pub repetition_penalty: f64,
    /// Seed of the choices.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 0.95, repetition_penalty: 1.0, seed: 1337 }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`TrainError::Input`].
    pub fn validate(&self) -> Result<(), TrainError> {
        let fail = |what, expected: &str, got: f64| {
            Err(TrainError::Input { what, expected: expected.into(), got: got.to_string() })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return fail("temperature", "0 or more", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail("top-p", "above 0, at most 1", self.top_p);
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return fail("repetition-penalty", "above 0", self.repetition_penalty);
        }
        Ok(())
    }

    /// Chooses from `logits` after `past`; the choice is a pure function of both and the seed.
    pub fn choose(&self, logits: &[f32], past: &[i32]) -> i32 {
        let mut logits: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        if self.repetition_penalty != 1.0 {
            for id in past.iter().collect::<HashSet<_>>() {
                if let Some(l) = logits.get_mut(*id as usize) {
                    *l = if *l > 0.0 { *l / self.repetition_penalty } else { *l * self.repetition_penalty };
                }
            }
        }
        // Ties go to the smaller id, so that the order is total.
        if self.temperature == 0.0 {
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
            return best.unwrap_or(0) as i32;
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0]];
        let mut weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights.iter().take_while(|&&w| {
            let take = reached < self.top_p * total;
            reached += w;
            take
        });
        let kept = kept.count().max(1);
        weights.truncate(kept);
        let mut left = f64::from(uniform(Counter::new(self.seed, Purpose::Sampling, 0), past.len() as u64))
            * weights.iter().sum::<f64>();
        for (&id, w) in order.iter().zip(&weights) {
            left -= w;
            if left < 0.0 {
                return id as i32;
            }
        }
        order[kept - 1] as i32
    }
}

/// Continues `prompt` by up to `max_tokens` tokens, each handed to `on_token`, until `stop` or until `on_token` returns false. `model` is on a device
/// without gradients. When the context is full, its older half is dropped.
///
/// # Errors
/// [`TrainError::Input`] for an empty prompt, an id outside the vocabulary, or impossible sampling.
pub fn generate(
    model: &Transformer,
    prompt: &[i32],
    max_tokens: usize,
    sampling: &Sampling,
    stop: Option<i32>,
    mut on_token: impl FnMut(i32) -> bool,
) -> Result<Vec<i32>, TrainError> {
    sampling.validate()?;
    check_language(model)?;
    check_ids(model, prompt)?;
    let context = model.config().context;
    let mut ids = prompt.to_vec();
    let mut cache = KvCache::new(model);
    let mut fresh = prompt[prompt.len().saturating_sub(context)..].to_vec();
    for _ in 0..max_tokens {
        if cache.len() + fresh.len() > context {
            cache = KvCache::new(model);
            fresh = ids[ids.len() - (context / 2).max(1)..].to_vec();
        }
        let logits = to_host(model.forward_cached(&fresh, &mut cache));
        let id = sampling.choose(&logits, &ids);
        if Some(id) == stop {
            break;
        }
        ids.push(id);
        fresh = vec![id];
        if !on_token(id) {
            break;
        }
    }
    Ok(ids)
}

/// Checks that a model goes on with text.
///
/// # Errors
/// [`TrainError::Input`].
pub fn check_language(model: &Transformer) -> Result<(), TrainError> {
    let config = model.config();
    if config.head == Head::Language {
        return Ok(());
    }
    let expected = "a causal decoder with a head of the next token".into();
    let kind = if config.encoder.is_some() { "an encoder" } else { "a decoder" };
    Err(TrainError::Input { what: "model", expected, got: format!("{kind} with the head {:?}", config.head) })
}

/// Checks that ids are some, and of the model's vocabulary.
///
/// # Errors
/// [`TrainError::Input`].
pub fn check_ids(model: &Transformer, ids: &[i32]) -> Result<(), TrainError> {
    let v = model.config().vocab_size;
    if ids.is_empty() {
        return Err(TrainError::Input { what: "prompt", expected: "at least one token".into(), got: "none".into() });
    }
    match ids.iter().find(|&&id| id < 0 || id as usize >= v) {
        Some(bad) => {
            Err(TrainError::Input { what: "token id", expected: format!("0 to {}", v - 1), got: bad.to_string() })
        }
        None => Ok(()),
    }
}
