//! Names, layouts and configs of Hugging Face's GPT-2, Llama, Mistral (which is Llama with a sliding window), Qwen 2 (with biases of q, k and v) and Qwen 3 (with QK-norm), and of
//! mixtures of experts of Mistral and Qwen 3.
//!
//! A parameter of the decoder is one tensor of their files or several that stand side by side (q, k, v); linear weights of Llama are transposed. This module
//! only maps values in memory: files belong to whoever reads and writes them.

pub mod adapter;
mod experts;
mod llama;
mod pieces;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::{FeedForward, NormKind, Positions, TransformerConfig};
use super::head::Head;
use super::reduction::Reduction;
pub use pieces::{Entry, Piece};

/// Which of the two families a decoder is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// `GPT2LMHeadModel`
    Gpt2,
    /// `LlamaForCausalLM`, `MistralForCausalLM` where attention has a window, `Qwen2ForCausalLM` where q, k and v alone have biases, or `Qwen3ForCausalLM` where queries and keys are normalized; with experts
    /// `MixtralForCausalLM` or `Qwen3MoeForCausalLM`.
    Llama,
    /// Neither: Firebox's own names and config, for combinations that Hugging Face has no class for.
    Firebox,
}

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// It is of an architecture that this decoder does not cover.
    #[error(
        "config.json: architecture `{got}` is not one of gpt2, llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, firebox: this checkpoint cannot be loaded as a decoder"
    )]
    Architecture {
        /// Its `model_type`.
        got: String,
    },
    /// A key is missing or of the wrong type.
    #[error("config.json: `{key}`: expected {expected}, got {got}")]
    Key {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        got: String,
    },
    /// A feature that the decoder lacks.
    #[error("config.json: `{key}` = {got} is not supported")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        got: String,
    },
    /// A shape that is impossible.
    #[error("config.json: {0}")]
    Shape(#[from] super::config::ConfigError),
}

impl Family {
    /// The family that describes `config` exactly.
    pub fn of(config: &TransformerConfig) -> Self {
        let full_heads = config.n_heads == config.n_kv_heads && config.n_heads * config.head_dim == config.d_model;
        let plain = !config.qk_norm && config.window.is_none() && config.experts.is_none();
        let gpt2 = config.norm == NormKind::LayerNorm
            && matches!(config.feed_forward, FeedForward::Gelu | FeedForward::GeluExact)
            && config.encoder.is_none()
            && config.positions == Positions::Learned
            && config.bias
            && config.window.is_none()
            && full_heads;
        let llama = config.norm == NormKind::RmsNorm
            && config.feed_forward == FeedForward::SwiGlu
            && matches!(config.positions, Positions::Rotary { .. })
            && (plain || !config.has_qkv_bias())
            && experts::have_a_class(config);
        if !config.reduction.is_none() {
            return Family::Firebox;
        }
        // Gemma 2 has soft-caps, but also norms after each part.
        let softcap = config.attention_softcap != 0.0 || config.logit_softcap != 0.0;
        match (gpt2 && !config.qk_norm && !softcap, llama && !(config.qk_norm && config.window.is_some()) && !softcap) {
            (true, _) => Family::Gpt2,
            (_, true) => Family::Llama,
            _ => Family::Firebox,
        }
    }

    /// What the names of the class with a head have before those of the class without one.
    pub fn prefix(self) -> Option<&'static str> {
        match self {
            Family::Gpt2 => Some("transformer."),
            Family::Llama => Some("model."),
            Family::Firebox => None,
        }
    }

    /// Every parameter of the decoder in order, with the tensors that it is stored as.
    pub fn entries(self, config: &TransformerConfig) -> Vec<Entry> {
        let mut table = Table { family: self, entries: vec![] };
        let (d, v) = (config.d_model, config.vocab_size);
        let norm_bias = config.bias && config.norm == NormKind::LayerNorm;
        let e = config.embed_width();
        table.whole("embed.weight", &[v, e], ["transformer.wte.weight", "model.embed_tokens.weight"]);
        if e < d {
            table.whole("embed_proj.weight", &[e, d], ["", ""]);
            if config.embed_proj_bias() {
                table.whole("embed_proj.bias", &[d], ["", ""]);
            }
        }
        if config.positions == Positions::Learned {
            table.whole(
                "positions.weight",
                &config.positions_shape(),
                ["transformer.wpe.weight", "model.embed_positions.weight"],
            );
        }
        if let Some(image) = &config.image {
            for part in ["class", "bias"].into_iter().take(1 + usize::from(image.bias)) {
                let name = format!("patches.{part}");
                table.whole(&name, &[d], [&name, &name]);
            }
        }
        if config.token_types() > 0 {
            table.whole("token_types.weight", &[config.token_types(), e], ["", ""]);
        }
        if config.encoder.is_some_and(|encoder| encoder.embed_norm) {
            table.norm(("embed_norm".into(), [String::new(), String::new()]), e, norm_bias);
        }
        let [rank_qkv, rank_out, rank_input, rank_output] = config.matrices().map(|matrix| matrix.rank);
        for i in 0..config.n_blocks() {
            let (ours, gpt2, llama) =
                (format!("blocks.{i}"), format!("transformer.h.{i}"), format!("model.layers.{i}"));
            let name = |ours_: &str, gpt2_: &str, llama_: &str| {
                (format!("{ours}.{ours_}"), [format!("{gpt2}.{gpt2_}"), format!("{llama}.{llama_}")])
            };
            table.norm(name("attn_norm", "ln_1", "input_layernorm"), d, norm_bias);
            let (h, k) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
            let qkv = [("self_attn.q_proj", h), ("self_attn.k_proj", k), ("self_attn.v_proj", k)];
            table.linear(name("attn.qkv", "attn.c_attn", ""), d, &llama, &qkv, config.has_qkv_bias(), rank_qkv);
            if config.qk_norm {
                for (ours, llama) in [("attn.q_norm", "self_attn.q_norm"), ("attn.k_norm", "self_attn.k_norm")] {
                    table.norm(name(ours, "", llama), config.head_dim, false);
                }
            }
            table.linear(
                name("attn.out", "attn.c_proj", ""),
                h,
                &llama,
                &[("self_attn.o_proj", d)],
                config.bias,
                rank_out,
            );
            table.norm(name("mlp_norm", "ln_2", "post_attention_layernorm"), d, norm_bias);
            if let Some(experts) = &config.experts {
                table.entries.extend(experts::entries(self, config, experts, i));
                continue;
            }
            let input: &[_] = match config.feed_forward {
                FeedForward::SwiGlu => &[("mlp.gate_proj", config.d_ff), ("mlp.up_proj", config.d_ff)],
                FeedForward::Gelu | FeedForward::GeluExact | FeedForward::QuickGelu => &[("mlp.up_proj", config.d_ff)],
            };
            table.linear(name("mlp.input", "mlp.c_fc", ""), d, &llama, input, config.bias, rank_input);
            table.linear(
                name("mlp.output", "mlp.c_proj", ""),
                config.d_ff,
                &llama,
                &[("mlp.down_proj", d)],
                config.bias,
                rank_output,
            );
        }
        for (name, shape) in config.delta_shapes() {
            table.whole(&name, &shape, ["", ""]);
        }
        if !config.norm_after() {
            table.norm(("norm".into(), ["transformer.ln_f".into(), "model.norm".into()]), d, norm_bias);
        }
        if config.head_projects() {
            table.whole("head_proj.weight", &[d, e], ["", ""]);
        }
        if config.head.has_table() && !config.tied {
            table.whole("head.weight", &[v, e], ["lm_head.weight", "lm_head.weight"]);
        }
        for (name, shape) in config.head_shapes() {
            table.whole(name, &shape, [name, name]);
        }
        let adapters: Vec<Entry> = table.entries.iter().flat_map(|weight| adapter::entries(config, weight)).collect();
        table.entries.extend(adapters);
        table.entries
    }

    /// The `config.json` of `config`.
    pub fn config_json(self, config: &TransformerConfig) -> Value {
        let mut json = self.plain_json(config);
        if let (Some(adapter), true) = (&config.adapter, self != Family::Firebox) {
            json[adapter::KEY] = json!(adapter);
        }
        json
    }

    fn plain_json(self, config: &TransformerConfig) -> Value {
        match self {
            Family::Gpt2 => json!({
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "vocab_size": config.vocab_size,
                "n_positions": config.context,
                "n_embd": config.d_model,
                "n_layer": config.n_layers,
                "n_head": config.n_heads,
                "n_inner": config.d_ff,
                "activation_function": if config.feed_forward == FeedForward::GeluExact { "gelu" } else { "gelu_new" },
                "layer_norm_epsilon": config.norm_eps,
                "tie_word_embeddings": config.tied,
                "resid_pdrop": config.dropout,
                "embd_pdrop": config.dropout,
                "attn_pdrop": 0.0,
                "initializer_range": config.init_std,
                "torch_dtype": "float32",
            }),
            Family::Llama => llama::write(config),
            Family::Firebox => json!({
                "architectures": ["FireboxDecoder"],
                "model_type": "firebox",
                "decoder": config,
            }),
        }
    }
}

/// Reads a `config.json`.
///
/// # Errors
/// [`HfError`] names the key at fault.
pub fn parse_config(json: &Value) -> Result<(Family, TransformerConfig), HfError> {
    let keys = Keys(json.as_object().ok_or_else(|| HfError::Key {
        key: "(file)".into(),
        expected: "an object",
        got: kind(json),
    })?);
    let model_type = keys.0.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
    let (family, config) = match model_type {
        "gpt2" => (Family::Gpt2, keys.gpt2()?),
        "llama" => (Family::Llama, keys.llama()?),
        // Where the file says nothing, transformers takes 4096.
        "mistral" => {
            let said = keys.0.contains_key("sliding_window");
            let window = if said { keys.count_or("sliding_window")? } else { Some(4096) };
            (Family::Llama, TransformerConfig { window, ..keys.llama()? })
        }
        "qwen2" => (Family::Llama, keys.qwen2()?),
        "qwen3" => (Family::Llama, keys.qwen3()?),
        "mixtral" => (Family::Llama, keys.mixtral()?),
        "qwen3_moe" => (Family::Llama, keys.qwen3_moe()?),
        "firebox" => {
            let decoder = keys.0.get("decoder").cloned().unwrap_or(Value::Null);
            let config = serde_json::from_value(decoder).map_err(|e| HfError::Key {
                key: "decoder".into(),
                expected: "a decoder's shape",
                got: e.to_string(),
            })?;
            (Family::Firebox, config)
        }
        other => return Err(HfError::Architecture { got: other.to_string() }),
    };
    let config = adapter::read(&keys, config)?;
    config.validate()?;
    Ok((family, config))
}

struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, HfError> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(v) => Ok(Some(v)),
                None => Err(HfError::Key { key: key.into(), expected, got: value.to_string() }),
            },
        }
    }

    fn count_or(&self, key: &str) -> Result<Option<usize>, HfError> {
        self.get(key, "a count", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    fn count(&self, key: &str) -> Result<usize, HfError> {
        self.count_or(key)?.ok_or_else(|| HfError::Key { key: key.into(), expected: "a count", got: "nothing".into() })
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, HfError> {
        Ok(self.get(key, "a number", Value::as_f64)?.unwrap_or(default))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, HfError> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    fn only(&self, key: &'static str, supported: &[&str]) -> Result<(), HfError> {
        match self.0.get(key) {
            Some(Value::String(s)) if !supported.contains(&s.as_str()) => {
                Err(HfError::Unsupported { key, got: s.clone() })
            }
            _ => Ok(()),
        }
    }

    fn gpt2(&self) -> Result<TransformerConfig, HfError> {
        self.only("activation_function", &["gelu_new", "gelu_pytorch_tanh", "gelu"])?;
        if !self.flag_or("scale_attn_weights", true)? {
            return Err(HfError::Unsupported { key: "scale_attn_weights", got: "false".into() });
        }
        if self.flag_or("scale_attn_by_inverse_layer_idx", false)? {
            return Err(HfError::Unsupported { key: "scale_attn_by_inverse_layer_idx", got: "true".into() });
        }
        let (d_model, n_heads) = (self.count("n_embd")?, self.count("n_head")?);
        if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
            return Err(HfError::Key {
                key: "n_head".into(),
                expected: "a divisor of n_embd",
                got: n_heads.to_string(),
            });
        }
        Ok(TransformerConfig {
            vocab_size: self.count("vocab_size")?,
            d_model,
            n_layers: self.count("n_layer")?,
            n_heads,
            n_kv_heads: n_heads,
            head_dim: d_model / n_heads,
            d_ff: self.count_or("n_inner")?.unwrap_or(4 * d_model),
            context: self.count("n_positions")?,
            window: None,
            qk_norm: false,
            attention_softcap: 0.0,
            logit_softcap: 0.0,
            qkv_bias: false,
            rope_scaling: None,
            encoder: None,
            image: None,
            head: Head::default(),
            experts: None,
            reduction: Reduction::default(),
            norm: NormKind::LayerNorm,
            norm_eps: self.number_or("layer_norm_epsilon", 1e-5)?,
            feed_forward: match self.0.get("activation_function") {
                Some(Value::String(s)) if s == "gelu" => FeedForward::GeluExact,
                _ => FeedForward::Gelu,
            },
            positions: Positions::Learned,
            bias: true,
            adapter: None,
            tied: self.flag_or("tie_word_embeddings", true)?,
            dropout: self.number_or("resid_pdrop", 0.1)?,
            init_std: self.number_or("initializer_range", 0.02)?,
        })
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a flag",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
    .into()
}

/// Collects entries: for every parameter its names in GPT-2's and in Llama's files.
struct Table {
    family: Family,
    entries: Vec<Entry>,
}

impl Table {
    fn whole(&mut self, param: &str, shape: &[usize], names: [&str; 2]) {
        let name = match self.family {
            Family::Gpt2 => names[0],
            Family::Llama => names[1],
            Family::Firebox => param,
        };
        self.entries.push(Entry::whole(param, shape, name));
    }

    fn norm(&mut self, (ours, [gpt2, llama]): (String, [String; 2]), d: usize, bias: bool) {
        for part in ["weight", "bias"].into_iter().take(if bias { 2 } else { 1 }) {
            let [gpt2, llama] = [&gpt2, &llama].map(|n| format!("{n}.{part}"));
            self.whole(&format!("{ours}.{part}"), &[d], [&gpt2, &llama]);
        }
    }

    /// A linear layer: one matrix `[in, out]` in GPT-2's files (Conv1D), `[out, in]` per part in Llama's; of a rank that is not 0, two matrices in ours.
    #[allow(clippy::too_many_arguments)]
    fn linear(
        &mut self,
        (ours, [gpt2, _]): (String, [String; 2]),
        inputs: usize,
        llama: &str,
        parts: &[(&str, usize)],
        bias: bool,
        rank: usize,
    ) {
        let outputs: usize = parts.iter().map(|(_, n)| n).sum();
        if rank > 0 {
            self.whole(&format!("{ours}.weight"), &[inputs, rank], ["", ""]);
            self.whole(&format!("{ours}.factor"), &[rank, outputs], ["", ""]);
            if bias {
                self.whole(&format!("{ours}.bias"), &[outputs], ["", ""]);
            }
            return;
        }
        if self.family != Family::Llama {
            self.whole(&format!("{ours}.weight"), &[inputs, outputs], [&format!("{gpt2}.weight"), ""]);
            if bias {
                self.whole(&format!("{ours}.bias"), &[outputs], [&format!("{gpt2}.bias"), ""]);
            }
            return;
        }
        let mut first = 0;
        let (mut weights, mut biases) = (vec![], vec![]);
        for &(part, n) in parts {
            let piece = |end: &str, shape: Vec<usize>, rows| Piece {
                name: format!("{llama}.{part}.{end}"),
                rows: (0, rows),
                columns: (first, n),
                transposed: shape.len() == 2,
                shape,
            };
            weights.push(piece("weight", vec![n, inputs], inputs));
            biases.push(piece("bias", vec![n], 1));
            first += n;
        }
        self.entries.push(Entry { param: format!("{ours}.weight"), shape: vec![inputs, outputs], pieces: weights });
        if bias {
            self.entries.push(Entry { param: format!("{ours}.bias"), shape: vec![outputs], pieces: biases });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transformer::presets;

    #[test]
    fn configs_round_trip() {
        for (name, config) in presets::all() {
            let family = Family::of(&config);
            let (parsed_family, mut parsed) = parse_config(&family.config_json(&config)).unwrap();
            assert_eq!(family, parsed_family, "{name}");
            parsed.dropout = config.dropout;
            assert_eq!(parsed, config, "{name}");
        }
    }

    #[test]
    fn a_window_makes_llama_a_mistral() {
        let llama = presets::named("llama-30m").unwrap();
        let config = TransformerConfig { window: Some(100), dropout: 0.0, ..llama.clone() };
        let mut json = Family::of(&config).config_json(&config);
        assert_eq!(json["model_type"], "mistral");
        assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config));
        json["sliding_window"] = Value::Null;
        assert_eq!(parse_config(&json).unwrap().1.window, None);
        json.as_object_mut().unwrap().remove("sliding_window");
        assert_eq!(parse_config(&json).unwrap().1.window, Some(4096));
        let gpt2 = TransformerConfig { window: Some(100), ..presets::named("gpt2").unwrap() };
        assert_eq!(Family::of(&gpt2), Family::Firebox);
    }

    #[test]
    fn qk_norm_makes_llama_a_qwen3() {
        let llama = presets::named("llama-30m").unwrap();
        let config = TransformerConfig { qk_norm: true, dropout: 0.0, ..llama.clone() };
        let mut json = Family::of(&config).config_json(&config);
        assert_eq!(json["model_type"], "qwen3");
        assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config.clone()));
        let entries = Family::Llama.entries(&config);
        let gain = entries.iter().find(|e| e.param == "blocks.1.attn.q_norm.weight").unwrap();
        assert_eq!(gain.pieces[0].name, "model.layers.1.self_attn.q_norm.weight");
        assert_eq!(gain.shape, [config.head_dim]);
        json.as_object_mut().unwrap().remove("head_dim");
        assert_eq!(parse_config(&json).unwrap().1.head_dim, 128);
        json["use_sliding_window"] = true.into();
        assert!(parse_config(&json).unwrap_err().to_string().contains("use_sliding_window"));
        // What no class of Hugging Face has.
        for config in [
            TransformerConfig { window: Some(100), ..config },
            TransformerConfig { attention_softcap: 50.0, ..llama.clone() },
            TransformerConfig { logit_softcap: 30.0, ..presets::named("gpt2").unwrap() },
            TransformerConfig { qk_norm: true, ..presets::named("gpt2").unwrap() },
        ] {
            let family = Family::of(&config);
            assert_eq!(family, Family::Firebox);
            assert_eq!(parse_config(&family.config_json(&config)).unwrap(), (family, config));
        }
    }

    #[test]
    fn entries_cover_every_parameter_once() {
        let normed = TransformerConfig { qk_norm: true, ..presets::depth(2, 31) };
        for (name, config) in presets::all().into_iter().chain([("QK-norm", normed)]) {
            for family in [Family::of(&config), Family::Firebox] {
                let entries = family.entries(&config);
                let elements: usize = entries.iter().map(|e| e.shape.iter().product::<usize>()).sum();
                assert_eq!(elements, config.num_params(), "{name}");
                for e in &entries {
                    let pieces: usize = e.pieces.iter().map(|p| p.shape.iter().product::<usize>()).sum();
                    assert_eq!(pieces, e.shape.iter().product::<usize>(), "{name} {}", e.param);
                    let parts: usize = e.pieces.iter().map(|p| p.rows.1 * p.columns.1).sum();
                    assert_eq!(parts, e.shape.iter().product::<usize>());
                }
                let mut names: Vec<_> = entries.iter().flat_map(|e| e.pieces.iter().map(|p| &p.name)).collect();
                names.sort();
                names.dedup();
                assert_eq!(names.len(), entries.iter().map(|e| e.pieces.len()).sum::<usize>(), "{name}: names repeat");
            }
        }
    }

    #[test]
    fn errors_name_the_key() {
        let error = |json: Value| parse_config(&json).unwrap_err().to_string();
        assert!(error(json!({"model_type": "bert"})).contains("bert"));
        assert!(error(json!({"model_type": "gpt2", "n_embd": 8, "n_head": 3})).contains("n_head"));
        assert!(error(json!({"model_type": "gpt2", "n_embd": "wide"})).contains("n_embd"));
        assert!(error(json!({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}})).contains("yarn"));
        assert!(error(json!([])).contains("object"));
    }
}
