//! Generation with a KV cache: each new token attends to stored keys and values.

use burn::tensor::{Device, Tensor, activation};
use firebox_tensor::ops;

use super::head::Head;
use super::model::Transformer;

/// Keys (rotated) and values of the tokens so far that the next one may see, `[1, K, T, E]` per layer: of those that share a block, each has its own.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<Option<[Tensor<4>; 2]>>,
    tokens: usize,
}

impl KvCache {
    /// An empty cache for `model`.
    pub fn new(model: &Transformer) -> Self {
        Self { layers: vec![None; model.config().n_layers], tokens: 0 }
    }

    /// How many tokens the sequence has.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Goes back to the first `tokens` tokens of the sequence, so that others can follow them; false, and nothing changes, where a window has let go of what the next one would see of them.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn truncate(&mut self, tokens: usize) -> bool {
        assert!(tokens <= self.tokens, "a cache of {} tokens has no first {tokens}", self.tokens);
        let later = self.tokens - tokens;
        let stored = self.layers.iter().flatten().map(|[key, _]| key.dims()[2]).min().unwrap_or(0);
        if later == 0 {
            return true;
        }
        if stored < self.tokens {
            return false;
        }
        for layer in &mut self.layers {
            *layer = layer.take().filter(|_| tokens > 0).map(|kept| kept.map(|x| x.narrow(2, 0, tokens)));
        }
        self.tokens = tokens;
        true
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }
}

impl Transformer {
    /// Appends `ids` to the cached sequence and returns the logits `[V]` of what follows the last of them.
    ///
    /// # Panics
    /// If the sequence outgrows the context, `ids` is empty, an id is not in the vocabulary, the model is no causal language model, or the model is [divided](Transformer::sharded) among ranks.
    pub fn forward_cached(&self, ids: &[i32], cache: &mut KvCache) -> Tensor<1> {
        let config = self.config();
        let (n, past) = (ids.len(), cache.tokens);
        assert!(n > 0, "nothing to append to the cached sequence");
        self.assert_whole();
        let decoder = config.encoder.is_none() && config.head == Head::Language;
        assert!(decoder, "an encoder, or a model without a language model's head, has no next token");
        assert!(past + n <= config.context, "{} tokens exceed the context of {}", past + n, config.context);
        let (k, e) = (config.n_kv_heads, config.head_dim);
        let g = config.n_heads / k;
        let positions: Vec<i32> = (past as i32..(past + n) as i32).collect();
        let mut x = self.embed_tokens(ids.into(), &positions, 1, n);
        let device = x.device();
        let rotation = self.attention_config().rope.as_ref().map(|rope| rope.at(&positions, 1, &device));
        // Of the past, a window leaves what the first new token sees besides itself.
        let window = config.window.unwrap_or(usize::MAX);
        let past = past.min(window - 1);
        let mask = (n > 1).then(|| causal_mask(n, past, window, &device));
        let keep = (past + n).min(window - 1);
        for (layer, stored) in (0..).map_while(|i| self.layer(i)).zip(&mut cache.layers) {
            let qkv = layer.project(x.clone(), self.attention_config());
            let heads = |first: usize, count: usize| {
                qkv.clone().narrow(2, first * e, count * e).reshape([1, n, count, e]).swap_dims(1, 2)
            };
            let (mut q, mut key, mut value) = (heads(0, g * k), heads(g * k, k), heads((g + 1) * k, k));
            if let Some(rotation) = &rotation {
                q = ops::rotate_half(q, rotation.clone());
                key = ops::rotate_half(key, rotation.clone());
            }
            if let Some([old_key, old_value]) = stored.take() {
                key = Tensor::cat(vec![old_key, key], 2);
                value = Tensor::cat(vec![old_value, value], 2);
            }
            let kept = |x: &Tensor<4>| x.clone().narrow(2, past + n - keep, keep);
            *stored = (keep > 0).then(|| [kept(&key), kept(&value)]);
            // The H / K query heads of a group are rows of one product.
            let scores = q.reshape([1, k, g * n, e]).matmul(key.swap_dims(2, 3)) * (1.0 / (e as f64).sqrt());
            let mut scores = ops::soft_cap(scores, config.attention_softcap).reshape([1, g * k, n, past + n]);
            if let Some(mask) = &mask {
                scores = scores + mask.clone();
            }
            let p = activation::softmax(scores, 3).reshape([1, k, g * n, past + n]);
            let y = p.matmul(value).reshape([1, g * k, n, e]).swap_dims(1, 2).reshape([1, n, g * k * e]);
            x = layer.attention_output(y, Some(x));
            x = layer.feed_forward(x.clone(), Some(x), None);
        }
        cache.tokens += n;
        let last = self.final_norm(x.narrow(1, n - 1, 1));
        self.head_logits(last).reshape([config.vocab_size])
    }
}

/// `[1, 1, n, past + n]`: 0 where a new token may look, a large negative number where it may not.
fn causal_mask(n: usize, past: usize, window: usize, device: &Device) -> Tensor<4> {
    let hidden = |i: usize, j: usize| j > past + i || past + i - j >= window;
    let values: Vec<f32> =
        (0..n).flat_map(|i| (0..past + n).map(move |j| if hidden(i, j) { -1e30 } else { 0.0 })).collect();
    Tensor::from_data(burn::tensor::TensorData::new(values, [1, 1, n, past + n]), device)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::stage::TokenBatch;
    use crate::transformer::{TransformerConfig, presets};

    #[test]
    fn other_tokens_follow_a_beginning() {
        let device = Backend::NdArray.device().unwrap();
        let of = |window| {
            let config = TransformerConfig { context: 16, window, ..presets::depth(2, 31) };
            Transformer::new(&config, 3, &device).unwrap()
        };
        let model = of(None);
        let mut cache = KvCache::new(&model);
        model.forward_cached(&[1, 2, 3, 4, 5], &mut cache);
        assert!(cache.truncate(2) && cache.len() == 2);
        let again = model.forward_cached(&[7, 8], &mut cache);
        let whole = model.forward_cached(&[1, 2, 7, 8], &mut KvCache::new(&model));
        let difference: f32 = (again - whole).abs().max().into_scalar();
        assert!(difference < 1e-5, "{difference}");
        assert!(cache.truncate(0) && cache.is_empty());
        let model = of(Some(3));
        let mut cache = KvCache::new(&model);
        model.forward_cached(&[1, 2, 3, 4, 5], &mut cache);
        assert!(!cache.truncate(2) && cache.len() == 5, "a window has let go of the first tokens");
    }

    #[test]
    fn a_window_is_the_same_with_and_without_the_cache() {
        let device = Backend::NdArray.device().unwrap();
        let ids: Vec<i32> = (0..12).map(|i| i * 7 % 31).collect();
        for window in [None, Some(1), Some(3), Some(50)] {
            let config = TransformerConfig { n_kv_heads: 1, context: 16, window, ..presets::depth(2, 31) };
            let model = Transformer::new(&config, 3, &device).unwrap();
            let mut cache = KvCache::new(&model);
            let mut done = 0;
            for n in [1, 5, 1, 1, 4] {
                let got = model.forward_cached(&ids[done..done + n], &mut cache);
                done += n;
                let batch = TokenBatch::plain(1, done, ids[..done].to_vec(), vec![-1; done]);
                let want = model.logits(&batch).narrow(1, done - 1, 1).reshape([31]);
                let difference: f32 = (got - want).abs().max().into_scalar();
                assert!(difference < 1e-4, "window {window:?}, {done} tokens: {difference}");
            }
        }
    }
}
