//! Generation with a KV cache: each new token attends to stored keys and values.

use burn::tensor::{Device, Tensor, activation};
use firebox_tensor::ops::{self, Pre};

use super::model::Decoder;

/// Keys (rotated) and values of the tokens so far, `[1, K, T, E]` per block.
#[derive(Clone, Debug)]
pub struct KvCache {
    blocks: Vec<Option<[Tensor<4>; 2]>>,
    tokens: usize,
}

impl KvCache {
    /// An empty cache for `model`.
    pub fn new(model: &Decoder) -> Self {
        Self { blocks: vec![None; model.blocks.len()], tokens: 0 }
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }
}

impl Decoder {
    /// Appends `ids` to the cached sequence and returns the logits `[V]` of what follows the last of them.
    ///
    /// # Panics
    /// If the sequence outgrows the context, `ids` is empty, or an id is not in the vocabulary.
    pub fn forward_cached(&self, ids: &[i32], cache: &mut KvCache) -> Tensor<1> {
        let config = self.config();
        let (n, past) = (ids.len(), cache.tokens);
        assert!(n > 0, "nothing to append to the cached sequence");
        assert!(past + n <= config.context, "{} tokens exceed the context of {}", past + n, config.context);
        let (k, e) = (config.n_kv_heads, config.head_dim);
        let g = config.n_heads / k;
        let positions: Vec<i32> = (past as i32..(past + n) as i32).collect();
        let mut x = self.embed_tokens(ids.into(), &positions, 1, n);
        let device = x.device();
        let rotation = self.attention_config().rope.as_ref().map(|rope| rope.at(&positions, 1, &device));
        let mask = (n > 1).then(|| causal_mask(n, past, &device));
        for (block, stored) in self.blocks.iter().zip(&mut cache.blocks) {
            let qkv = block.attn.qkv.forward(x.clone(), block.attn_norm.before(), None);
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
            *stored = Some([key.clone(), value.clone()]);
            // The H / K query heads of a group are rows of one product.
            let scores = q.reshape([1, k, g * n, e]).matmul(key.swap_dims(2, 3)) * (1.0 / (e as f64).sqrt());
            let mut scores = scores.reshape([1, g * k, n, past + n]);
            if let Some(mask) = &mask {
                scores = scores + mask.clone();
            }
            let p = activation::softmax(scores, 3).reshape([1, k, g * n, past + n]);
            let y = p.matmul(value).reshape([1, g * k, n, e]).swap_dims(1, 2).reshape([1, n, g * k * e]);
            x = block.attn.out.forward(y, Pre::Nothing, Some(x));
            x = block.mlp.forward(x.clone(), block.mlp_norm.before(), Some(x));
        }
        cache.tokens += n;
        let last = self.norm.forward(x.narrow(1, n - 1, 1));
        ops::linear_transposed(last, self.head_weight()).reshape([config.vocab_size])
    }
}

/// `[1, 1, n, past + n]`: 0 where a new token may look, a large negative number where it may not.
fn causal_mask(n: usize, past: usize, device: &Device) -> Tensor<4> {
    let values: Vec<f32> =
        (0..n).flat_map(|i| (0..past + n).map(move |j| if j > past + i { -1e30 } else { 0.0 })).collect();
    Tensor::from_data(burn::tensor::TensorData::new(values, [1, 1, n, past + n]), device)
}
