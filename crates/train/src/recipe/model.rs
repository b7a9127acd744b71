//! The recipe's part on the model.

use firebox_models::transformer::{
    EncoderConfig, ExpertsConfig, FeedForward, Head, ImageConfig, LowRank, NormKind, Positions, Reduction, RopeScaling,
    TransformerConfig, presets,
};
use serde::{Deserialize, Serialize};

use super::RecipeError;

/// The model: a preset or a depth, and any value of its shape in place of theirs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelRecipe {
    /// Name of a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Number of blocks, from which everything else follows; instead of a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Rows of the embedding; by default the tokenizer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// Width of the residual stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_model: Option<usize>,
    /// Blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_layers: Option<usize>,
    /// Query heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_heads: Option<usize>,
    /// Key-value heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_kv_heads: Option<usize>,
    /// Width of a head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Feed-forward width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_ff: Option<usize>,
    /// Tokens per row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Tokens that a query sees at most, itself included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// RMSNorm of every head's queries and keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<bool>,
    /// Experts in place of each block's feed-forward layer; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_experts: Option<usize>,
    /// How many of them each token goes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_per_token: Option<usize>,
    /// Coefficient of the load-balancing loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_aux_loss: Option<f64>,
    /// By how much a step moves the experts' biases.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_bias_rate: Option<f64>,
    /// How many times its even share an expert takes in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_factor: Option<f64>,
    /// How many layers, one after the other, use the parameters of one block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_per_block: Option<usize>,
    /// Rank of what each layer adds to the matrices of a shared block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta_rank: Option<usize>,
    /// Width of the rows of embedding and head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embed_dim: Option<usize>,
    /// `{ qkv = 64, out = 64, input = 64, output = 64 }`: ranks of the blocks' matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_rank: Option<LowRank>,
    /// Soft-cap of attention scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_softcap: Option<f64>,
    /// Soft-cap of the logits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_softcap: Option<f64>,
    /// `layer_norm` or `rms_norm`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<NormKind>,
    /// Added to the variance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_eps: Option<f64>,
    /// `gelu`, `gelu_exact` or `swi_glu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward: Option<FeedForward>,
    /// `"learned"` or `{ rotary = { theta = 10000.0 } }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// Biases in linear layers and LayerNorm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<bool>,
    /// Biases of q, k and v alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qkv_bias: Option<bool>,
    /// `{ linear = { factor = 2.0 } }` or `{ llama3 = { .. } }`: how rotary angles are stretched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// `{ norm_after = true, embed_norm = true, token_types = 2 }`: an encoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder: Option<EncoderConfig>,
    /// `{ size = 32, patch = 4, channels = 3 }`: images in place of tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageConfig>,
    /// What follows the last block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<Head>,
    /// Names of the head's classes in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Head tied to the embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// Dropout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Standard deviation of initial weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_std: Option<f64>,
    /// The width for which learning rate and `init_std` are meant: both are scaled to `d_model` by the maximal update parametrization.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mup_base_width: Option<usize>,
}

impl ModelRecipe {
    /// The shape for a tokenizer of `tokens` tokens.
    ///
    /// # Errors
    /// For an unknown preset.
    pub fn resolve(&self, tokens: usize) -> Result<TransformerConfig, RecipeError> {
        let base = match &self.preset {
            Some(name) => presets::named(name).ok_or_else(|| {
                let known: Vec<&str> = presets::all().into_iter().map(|(n, _)| n).collect();
                let expected = format!("one of {}", known.join(", "));
                RecipeError::Value { key: "model.preset", expected, got: name.clone() }
            })?,
            None => presets::depth(self.depth.or(self.n_layers).unwrap_or(4), tokens),
        };
        let d_model = self.d_model.unwrap_or(base.d_model);
        let n_heads = self.n_heads.unwrap_or(base.n_heads);
        let image = self.image.or(base.image);
        // What is not given follows from what is: heads split the width, every query head has its keys, the inner width keeps its ratio.
        let reshaped = self.d_model.is_some() || self.n_heads.is_some();
        let same_groups = base.n_kv_heads == base.n_heads;
        Ok(TransformerConfig {
            vocab_size: self.vocab_size.unwrap_or(image.map_or(tokens, |image| image.patch_values())),
            d_model,
            n_layers: self.n_layers.unwrap_or(base.n_layers),
            n_heads,
            n_kv_heads: self.n_kv_heads.unwrap_or(if same_groups { n_heads } else { base.n_kv_heads }),
            head_dim: match self.head_dim {
                Some(head_dim) => head_dim,
                None if reshaped && n_heads > 0 && d_model.is_multiple_of(n_heads) => d_model / n_heads,
                None if reshaped => {
                    let expected = format!("a divisor of d_model = {d_model} (or a head_dim beside it)");
                    return Err(RecipeError::Value { key: "model.n_heads", expected, got: n_heads.to_string() });
                }
                None => base.head_dim,
            },
            d_ff: self.d_ff.unwrap_or(if self.d_model.is_some() {
                base.d_ff * d_model / base.d_model.max(1)
            } else {
                base.d_ff
            }),
            context: self.context.unwrap_or(image.map_or(base.context, |image| image.tokens())),
            window: self.window.or(base.window),
            qk_norm: self.qk_norm.unwrap_or(base.qk_norm),
            attention_softcap: self.attention_softcap.unwrap_or(base.attention_softcap),
            logit_softcap: self.logit_softcap.unwrap_or(base.logit_softcap),
            experts: self.experts(base.experts)?,
            reduction: Reduction {
                layers_per_block: self.layers_per_block.unwrap_or(base.reduction.layers_per_block),
                delta_rank: self.delta_rank.unwrap_or(base.reduction.delta_rank),
                embed_dim: self.embed_dim.unwrap_or(base.reduction.embed_dim),
                low_rank: self.low_rank.unwrap_or(base.reduction.low_rank),
            },
            norm: self.norm.unwrap_or(base.norm),
            norm_eps: self.norm_eps.unwrap_or(base.norm_eps),
            feed_forward: self.feed_forward.unwrap_or(base.feed_forward),
            positions: self.positions.unwrap_or(base.positions),
            bias: self.bias.unwrap_or(base.bias),
            qkv_bias: self.qkv_bias.unwrap_or(base.qkv_bias),
            rope_scaling: self.rope_scaling.or(base.rope_scaling),
            encoder: self.encoder.or(base.encoder),
            image,
            head: self.head.unwrap_or(base.head),
            labels: self.labels.clone(),
            adapter: None,
            tied: self.tied.unwrap_or(base.tied),
            dropout: self.dropout.unwrap_or(base.dropout),
            init_std: match (&self.preset, self.mup_base_width) {
                (preset, Some(width)) => {
                    let of_preset = preset.as_ref().map(|_| base.init_std);
                    let of_width = self.init_std.or(of_preset).unwrap_or(presets::depth_init_std(width));
                    of_width * (width as f64 / d_model as f64).sqrt()
                }
                (None, None) => self.init_std.unwrap_or(presets::depth_init_std(d_model)),
                (Some(_), None) => self.init_std.unwrap_or(base.init_std),
            },
        })
    }

    /// The same with the values of another where nothing is given. What follows from width and heads is not taken where these are given.
    pub(crate) fn or(&self, other: &Self) -> Self {
        let table = |recipe: &Self| toml::Table::try_from(recipe).unwrap_or_default();
        let (mut all, own) = (table(other), table(self));
        if own.contains_key("d_model") || own.contains_key("n_heads") {
            all.remove("n_kv_heads");
            all.remove("head_dim");
        }
        if own.contains_key("d_model") {
            let ratio = |width: usize| other.d_ff.zip(other.d_model).map(|(f, d)| f * width / d.max(1));
            all.remove("d_ff");
            all.extend(self.d_model.and_then(ratio).map(|d_ff| ("d_ff".to_owned(), (d_ff as i64).into())));
        }
        all.extend(own);
        // PANIC: each value is one of a recipe.
        all.try_into().expect("values of recipes make a recipe")
    }

    /// The experts, from those of the preset.
    fn experts(&self, base: Option<ExpertsConfig>) -> Result<Option<ExpertsConfig>, RecipeError> {
        let Some(n_experts) = self.n_experts.or(base.map(|base| base.n_experts)).filter(|n| *n > 0) else {
            for (key, value) in [
                ("model.experts_per_token", self.experts_per_token.map(|n| n as f64)),
                ("model.router_aux_loss", self.router_aux_loss),
                ("model.router_bias_rate", self.router_bias_rate),
                ("model.capacity_factor", self.capacity_factor),
            ] {
                if let Some(value) = value {
                    let expected = "none without model.n_experts".to_owned();
                    return Err(RecipeError::Value { key, expected, got: value.to_string() });
                }
            }
            return Ok(None);
        };
        let base = base.unwrap_or_default();
        let router_bias_rate = self.router_bias_rate.unwrap_or(base.router_bias_rate);
        // Biases take the loss's place.
        let balanced = self.router_bias_rate.is_some_and(|rate| rate > 0.0);
        Ok(Some(ExpertsConfig {
            n_experts,
            experts_per_token: self.experts_per_token.unwrap_or(base.experts_per_token),
            router_aux_loss: self.router_aux_loss.unwrap_or(if balanced { 0.0 } else { base.router_aux_loss }),
            router_bias_rate,
            capacity_factor: self.capacity_factor.unwrap_or(base.capacity_factor),
        }))
    }

    /// The recipe that gives exactly `config`.
    pub fn exactly(config: &TransformerConfig) -> Self {
        let TransformerConfig { vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, context, .. } =
            *config;
        Self {
            preset: None,
            depth: None,
            vocab_size: Some(vocab_size),
            d_model: Some(d_model),
            n_layers: Some(n_layers),
            n_heads: Some(n_heads),
            n_kv_heads: Some(n_kv_heads),
            head_dim: Some(head_dim),
            d_ff: Some(d_ff),
            context: Some(context),
            window: config.window,
            qk_norm: Some(config.qk_norm),
            n_experts: config.experts.map(|experts| experts.n_experts),
            experts_per_token: config.experts.map(|experts| experts.experts_per_token),
            router_aux_loss: config.experts.map(|experts| experts.router_aux_loss),
            router_bias_rate: config.experts.map(|experts| experts.router_bias_rate),
            capacity_factor: config.experts.map(|experts| experts.capacity_factor),
            layers_per_block: Some(config.reduction.layers_per_block),
            delta_rank: Some(config.reduction.delta_rank),
            embed_dim: Some(config.reduction.embed_dim),
            low_rank: Some(config.reduction.low_rank),
            attention_softcap: Some(config.attention_softcap),
            logit_softcap: Some(config.logit_softcap),
            norm: Some(config.norm),
            norm_eps: Some(config.norm_eps),
            feed_forward: Some(config.feed_forward),
            positions: Some(config.positions),
            bias: Some(config.bias),
            qkv_bias: config.qkv_bias.then_some(true),
            rope_scaling: config.rope_scaling,
            encoder: config.encoder,
            image: config.image,
            head: (config.head != Head::Language).then_some(config.head),
            labels: config.labels.clone(),
            tied: Some(config.tied),
            dropout: Some(config.dropout),
            init_std: Some(config.init_std),
            mup_base_width: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn resolved_shapes_round_trip() {
        for (_, config) in presets::all() {
            assert_eq!(ModelRecipe::exactly(&config).resolve(7).unwrap(), config);
        }
    }

    #[test]
    fn experts_are_the_presets_or_those_that_are_given() {
        let resolve =
            |keys: &str| toml::from_str::<ModelRecipe>(keys).unwrap().resolve(64).map(|config| config.experts);
        let eight = ExpertsConfig::default();
        assert_eq!(resolve("").unwrap(), None);
        assert_eq!(resolve("preset = 'firebox-moe-3m'").unwrap(), Some(eight));
        assert_eq!(resolve("preset = 'firebox-moe-3m'\nn_experts = 0").unwrap(), None);
        let four = ExpertsConfig { n_experts: 4, ..eight };
        assert_eq!(resolve("n_experts = 4").unwrap(), Some(four));
        let biased = ExpertsConfig { router_aux_loss: 0.0, router_bias_rate: 1e-3, ..four };
        assert_eq!(resolve("n_experts = 4\nrouter_bias_rate = 1e-3").unwrap(), Some(biased));
        let error = resolve("capacity_factor = 1.25").unwrap_err().to_string();
        assert!(error.contains("model.capacity_factor = 1.25") && error.contains("n_experts"), "{error}");
    }
}
