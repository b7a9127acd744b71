//! Llama (Touvron et al., arXiv:2302.13971) and its relatives Mistral, Qwen 2 and Qwen 3.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::names::Names;
use super::{Classes, HfError, experts};
use crate::transformer::config::{FeedForward, NormKind, Positions, RopeScaling, TransformerConfig};
use crate::transformer::head::{Head, Pooler};
use crate::transformer::reduction::Reduction;

const NAMES: Names = Names {
    base: "model.",
    transposed: true,
    body: &[
        ("embed", &["embed_tokens"]),
        ("blocks.#.attn_norm", &["layers.#.input_layernorm"]),
        ("blocks.#.attn.qkv", &["layers.#.self_attn.q_proj", "layers.#.self_attn.k_proj", "layers.#.self_attn.v_proj"]),
        ("blocks.#.attn.q_norm", &["layers.#.self_attn.q_norm"]),
        ("blocks.#.attn.k_norm", &["layers.#.self_attn.k_norm"]),
        ("blocks.#.attn.out", &["layers.#.self_attn.o_proj"]),
        ("blocks.#.mlp_norm", &["layers.#.post_attention_layernorm"]),
        ("blocks.#.mlp.input", &["layers.#.mlp.gate_proj", "layers.#.mlp.up_proj"]),
        ("blocks.#.mlp.output", &["layers.#.mlp.down_proj"]),
        ("norm", &["norm"]),
        ("head", &["lm_head"]),
    ],
    head: &[("task_head.output", &["score"])],
    heads: &["lm_head.", "score."],
    copies: &[],
    buffers: &[".rotary_emb.inv_freq"],
};

pub(super) struct Llama;

impl Classes for Llama {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
    }

    fn cover(&self, config: &TransformerConfig) -> bool {
        let plain = !config.qk_norm && config.window.is_none() && config.experts.is_none();
        config.norm == NormKind::RmsNorm
            && config.feed_forward == FeedForward::SwiGlu
            && matches!(config.positions, Positions::Rotary { .. })
            && (plain || !config.has_qkv_bias())
            && experts::have_a_class(config)
            && !(config.qk_norm && config.window.is_some())
            // Gemma 2 has soft-caps, but also norms after each part.
            && config.attention_softcap == 0.0
            && config.logit_softcap == 0.0
            && config.reduction.is_none()
            && config.encoder.is_none()
            && config.image.is_none()
            && config.head.is_of_a_decoder()
    }

    fn names(&self, _: &TransformerConfig) -> Names {
        NAMES
    }

    fn pooler(&self) -> Pooler {
        Pooler::Last
    }

    fn read(&self, model_type: &str, keys: &Keys<'_>) -> Result<TransformerConfig, HfError> {
        match model_type {
            "mistral" => {
                // Where the file says nothing, transformers takes 4096.
                let said = keys.0.contains_key("sliding_window");
                let window = if said { keys.count_or("sliding_window")? } else { Some(4096) };
                Ok(TransformerConfig { window, ..keys.llama()? })
            }
            "qwen2" => keys.qwen2(),
            "qwen3" => keys.qwen3(),
            "mixtral" => keys.mixtral(),
            "qwen3_moe" => keys.qwen3_moe(),
            _ => keys.llama(),
        }
    }

    fn write(&self, config: &TransformerConfig) -> (&'static str, Value) {
        let Positions::Rotary { theta } = config.positions else { unreachable!("Llama has rotary positions") };
        let (mut stem, model_type) = match (config.qk_norm, config.window, config.qkv_bias) {
            (true, ..) => ("Qwen3", "qwen3"),
            (false, Some(_), _) => ("Mistral", "mistral"),
            (false, None, true) => ("Qwen2", "qwen2"),
            (false, None, false) => ("Llama", "llama"),
        };
        let mut json = json!({
            "model_type": model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.context,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": theta,
            "hidden_act": "silu",
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "tie_word_embeddings": config.tied,
            "initializer_range": config.init_std,
            "torch_dtype": "float32",
        });
        if let Some(scaling) = config.rope_scaling {
            json["rope_scaling"] = match scaling {
                RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_context,
                }),
            };
        }
        if let Some(window) = config.window {
            json["sliding_window"] = window.into();
        }
        if let Some(experts) = &config.experts {
            stem = experts::write(config, experts, &mut json);
        }
        (stem, json)
    }
}

impl Keys<'_> {
    pub(super) fn llama(&self) -> Result<TransformerConfig, HfError> {
        self.only("hidden_act", &["silu", "swish"])?;
        let (attention_bias, bias) = (self.flag_or("attention_bias", false)?, self.flag_or("mlp_bias", false)?);
        if attention_bias != bias {
            let got = format!("{attention_bias} with mlp_bias = {bias} (both or neither works)");
            return Err(HfError::Unsupported { key: "attention_bias", got });
        }
        let (d_model, n_heads) = (self.count("hidden_size")?, self.count("num_attention_heads")?);
        let context = self.count_or("max_position_embeddings")?.unwrap_or(2048);
        let (theta, rope_scaling) = self.rope()?;
        Ok(TransformerConfig {
            vocab_size: self.count("vocab_size")?,
            d_model,
            n_layers: self.count("num_hidden_layers")?,
            n_heads,
            n_kv_heads: self.count_or("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim: self.count_or("head_dim")?.unwrap_or(d_model / n_heads.max(1)),
            d_ff: self.count("intermediate_size")?,
            context,
            window: None,
            qk_norm: false,
            attention_softcap: 0.0,
            logit_softcap: 0.0,
            qkv_bias: false,
            rope_scaling,
            encoder: None,
            image: None,
            head: Head::default(),
            labels: vec![],
            experts: None,
            reduction: Reduction::default(),
            norm: NormKind::RmsNorm,
            norm_eps: self.number_or("rms_norm_eps", 1e-6)?,
            feed_forward: FeedForward::SwiGlu,
            positions: Positions::Rotary { theta },
            bias,
            adapter: None,
            tied: self.flag_or("tie_word_embeddings", false)?,
            dropout: 0.0,
            init_std: self.number_or("initializer_range", 0.02)?,
        })
    }

    pub(super) fn qwen2(&self) -> Result<TransformerConfig, HfError> {
        self.without_sliding_window()?;
        Ok(TransformerConfig { qkv_bias: true, ..self.llama()? })
    }

    pub(super) fn qwen3(&self) -> Result<TransformerConfig, HfError> {
        self.without_sliding_window()?;
        if self.flag_or("attention_bias", false)? {
            return Err(HfError::Unsupported { key: "attention_bias", got: "true".into() });
        }
        // Where the file says nothing, transformers takes heads of 128.
        let head_dim = self.count_or("head_dim")?.unwrap_or(128);
        Ok(TransformerConfig { qk_norm: true, head_dim, ..self.llama()? })
    }

    /// Qwen's windows are those of some layers.
    fn without_sliding_window(&self) -> Result<(), HfError> {
        match self.flag_or("use_sliding_window", false)? {
            true => Err(HfError::Unsupported { key: "use_sliding_window", got: "true".into() }),
            false => Ok(()),
        }
    }

    /// The base of rotary angles and how they are stretched. transformers 4 writes `rope_theta` and `rope_scaling` on top, transformers 5 both inside `rope_parameters`.
    fn rope(&self) -> Result<(f64, Option<RopeScaling>), HfError> {
        let object = |key| self.get(key, "an object", |value| value.as_object().cloned());
        let parameters = object("rope_parameters")?;
        let theta = match parameters.as_ref().filter(|rope| rope.contains_key("rope_theta")) {
            Some(rope) => Keys(rope).number_or("rope_theta", 10_000.0)?,
            None => self.number_or("rope_theta", 10_000.0)?,
        };
        let scaling = object("rope_scaling")?.or(parameters).unwrap_or_default();
        for keys in [self, &Keys(&scaling)] {
            let part = keys.number_or("partial_rotary_factor", 1.0)?;
            if part != 1.0 {
                return Err(HfError::Unsupported { key: "partial_rotary_factor", got: part.to_string() });
            }
        }
        Ok((theta, self.scaling(&scaling)?))
    }

    fn scaling(&self, scaling: &Map<String, Value>) -> Result<Option<RopeScaling>, HfError> {
        let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
        let missing =
            |key: &str, expected| HfError::Key { key: format!("rope_scaling.{key}"), expected, got: "nothing".into() };
        let keys = Keys(scaling);
        let number = |key| keys.get(key, "a number", Value::as_f64)?.ok_or_else(|| missing(key, "a number"));
        match kind {
            "default" => Ok(None),
            "linear" => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
            "llama3" => {
                let key = "original_max_position_embeddings";
                let original = keys.count_or(key)?.or(self.count_or(key)?);
                Ok(Some(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_context: original.ok_or_else(|| missing(key, "a count"))?,
                }))
            }
            other => {
                let (key, expected) = ("rope_scaling".into(), "a rope_type of default, linear or llama3");
                Err(HfError::Key { key, expected, got: other.into() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Family, parse_config};
    use super::*;
    use crate::transformer::presets;

    fn plain() -> TransformerConfig {
        TransformerConfig { dropout: 0.0, ..presets::named("llama-30m").unwrap() }
    }

    #[test]
    fn biases_make_llama_a_qwen2_or_are_everywhere() {
        let qwen = TransformerConfig { qkv_bias: true, ..plain() };
        let everywhere = TransformerConfig { bias: true, ..plain() };
        for (config, model_type, biases) in [(&qwen, "qwen2", 3), (&everywhere, "llama", 7)] {
            let json = Family::of(config).config_json(config);
            assert_eq!(json["model_type"], model_type);
            assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config.clone()));
            let entries = Family::Llama.entries(config);
            let elements: usize = entries.iter().map(|entry| entry.shape.iter().product::<usize>()).sum();
            assert_eq!(elements, config.num_params());
            let pieces: Vec<_> = entries.iter().flat_map(|entry| &entry.pieces).collect();
            let found = pieces.iter().filter(|piece| piece.name.ends_with(".bias")).count();
            assert_eq!(found, biases * config.n_layers);
            let k = pieces.iter().find(|piece| piece.name == "model.layers.1.self_attn.k_proj.bias").unwrap();
            let (h, e) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
            assert_eq!((k.columns, k.rows, &k.shape[..]), ((h, e), (0, 1), &[e][..]));
        }
        for config in [
            TransformerConfig { window: Some(9), ..qwen.clone() },
            TransformerConfig { qk_norm: true, ..qwen.clone() },
            TransformerConfig { window: Some(9), ..everywhere.clone() },
        ] {
            let family = Family::of(&config);
            assert_eq!(family, Family::Firebox);
            assert_eq!(parse_config(&family.config_json(&config)).unwrap(), (family, config));
        }
        let mut json = Family::Llama.config_json(&plain());
        json["attention_bias"] = true.into();
        assert!(parse_config(&json).unwrap_err().to_string().contains("mlp_bias"));
        assert!(TransformerConfig { qkv_bias: true, ..everywhere }.validate().is_err());
    }

    #[test]
    fn scaling_is_read_as_both_versions_write_it() {
        let llama3 =
            RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        for scaling in [RopeScaling::Linear { factor: 2.5 }, llama3] {
            let config = TransformerConfig { rope_scaling: Some(scaling), ..plain() };
            let mut json = Family::of(&config).config_json(&config);
            assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config.clone()));
            // As transformers 5 has it.
            let top = json.as_object_mut().unwrap();
            let (mut inside, theta) = (top.remove("rope_scaling").unwrap(), top.remove("rope_theta").unwrap());
            inside["rope_theta"] = theta;
            json["rope_parameters"] = inside.clone();
            assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config));
            // As old files have it.
            let kind = inside.as_object_mut().unwrap().remove("rope_type").unwrap();
            inside["type"] = kind;
            json["rope_parameters"] = inside;
            assert!(parse_config(&json).unwrap().1.rope_scaling.is_some());
        }
        let error = |scaling: Value| {
            let mut json = Family::Llama.config_json(&plain());
            json["rope_scaling"] = scaling;
            parse_config(&json).unwrap_err().to_string()
        };
        for kind in ["yarn", "dynamic", "longrope"] {
            let error = error(json!({ "rope_type": kind, "factor": 2.0 }));
            assert!(error.contains(kind) && error.contains("default, linear or llama3"), "{error}");
        }
        assert!(error(json!({ "rope_type": "linear" })).contains("rope_scaling.factor"));
        assert!(error(json!({ "rope_type": "linear", "factor": 0.1 })).contains("at least 1"));
        assert!(error(json!({ "partial_rotary_factor": 0.5 })).contains("partial_rotary_factor"));
        assert!(error(json!(3)).contains("rope_scaling"));
    }
}
