//! Names, layouts and config of Hugging Face's `CLIPModel`.

use serde_json::{Map, Value, json};

use super::config::{ClipConfig, LOGIT_SCALE};
use crate::transformer::hf::{Entry, Family, HfError, Piece};
use crate::transformer::presets;
use crate::transformer::{EncoderConfig, FeedForward, Head, ImageConfig, NormKind, Positions, TransformerConfig};

/// The `model_type` of Firebox's own config, for towers that `CLIPModel` has not.
const OWN: &str = "firebox_clip";

/// Whether a `config.json` is that of two towers.
pub fn is_clip(config: &Value) -> bool {
    config.get("model_type").is_some_and(|kind| kind == "clip" || kind == OWN)
}

/// Whether a tensor of a file is a buffer, which each program makes itself.
pub fn is_buffer(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
}

/// Parts of a block, and what both towers call them.
const PARTS: [(&str, &[&str]); 6] = [
    ("attn_norm", &["layer_norm1"]),
    ("attn.qkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("attn.out", &["self_attn.out_proj"]),
    ("mlp_norm", &["layer_norm2"]),
    ("mlp.input", &["mlp.fc1"]),
    ("mlp.output", &["mlp.fc2"]),
];

/// Whether `CLIPModel` has such towers.
fn is_covered(config: &ClipConfig) -> bool {
    let plain = |tower: &TransformerConfig| {
        tower.norm == NormKind::LayerNorm
            && tower.bias
            && tower.feed_forward != FeedForward::SwiGlu
            && tower.positions == Positions::Learned
            && tower.n_heads == tower.n_kv_heads
            && tower.n_heads * tower.head_dim == tower.d_model
            && tower.reduction.is_none()
            && !tower.qk_norm
            && tower.window.is_none()
            && tower.attention_softcap == 0.0
    };
    let encoder = EncoderConfig { embed_norm: true, ..EncoderConfig::default() };
    plain(&config.text)
        && plain(&config.image)
        && config.image.encoder == Some(encoder)
        && config.image.image.is_some_and(|image| !image.bias)
}

/// Every parameter in order, with the tensors that it is stored as: under our names where `CLIPModel` has no such towers.
pub fn entries(config: &ClipConfig) -> Vec<Entry> {
    let covered = is_covered(config);
    let tower = |ours: &str, config: &TransformerConfig| -> Vec<Entry> {
        let own = Family::Firebox.entries(config).into_iter();
        own.map(|entry| {
            let named = if covered { of_clip(&entry, config) } else { None };
            let pieces = named.unwrap_or_else(|| {
                let name = |piece: &Piece| Piece { name: format!("{ours}.{}", piece.name), ..piece.clone() };
                entry.pieces.iter().map(name).collect()
            });
            Entry { param: format!("{ours}.{}", entry.param), shape: entry.shape, pieces }
        })
        .collect()
    };
    let projection = |ours: &str, theirs: &str, d: usize| {
        let (shape, width) = (vec![d, config.width], config.width);
        let (rows, columns) = ((0, d), (0, width));
        let name = format!("{theirs}_projection.weight");
        let piece = Piece { name, shape: vec![width, d], rows, columns, transposed: true };
        Entry { param: format!("{ours}_proj"), shape, pieces: vec![piece] }
    };
    let mut scale = Entry::whole("scale", &[1], "logit_scale");
    scale.pieces[0].shape.clear();
    let projections =
        [projection("image", "visual", config.image.d_model), projection("text", "text", config.text.d_model)];
    let towers = [tower("image", &config.image), tower("text", &config.text)];
    towers.into_iter().flatten().chain(projections).chain([scale]).collect()
}

/// The tensors of a tower's parameter.
fn of_clip(entry: &Entry, config: &TransformerConfig) -> Option<Vec<Piece>> {
    let (part, end) = entry.param.rsplit_once('.')?;
    let image = config.image;
    let base = if image.is_some() { "vision_model" } else { "text_model" };
    let width = *entry.shape.last()?;
    let rows = (0, entry.shape.iter().product::<usize>() / width.max(1));
    let whole = |name: &str| {
        let piece = Piece {
            name: format!("{base}.{name}"),
            shape: entry.shape.clone(),
            rows,
            columns: (0, width),
            transposed: false,
        };
        Some(vec![piece])
    };
    let number = part.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    let Some((number, part)) = number else {
        return match (part, end) {
            ("embed", _) => match image {
                Some(ImageConfig { channels, patch, .. }) => Some(vec![Piece {
                    name: format!("{base}.embeddings.patch_embedding.weight"),
                    shape: vec![width, channels, patch, patch],
                    rows,
                    columns: (0, width),
                    transposed: true,
                }]),
                None => whole("embeddings.token_embedding.weight"),
            },
            ("positions", _) => whole("embeddings.position_embedding.weight"),
            ("patches", "class") => whole("embeddings.class_embedding"),
            ("embed_norm", end) => whole(&format!("pre_layrnorm.{end}")),
            ("norm", end) if image.is_some() => whole(&format!("post_layernorm.{end}")),
            ("norm", end) => whole(&format!("final_layer_norm.{end}")),
            _ => None,
        };
    };
    let (_, theirs) = PARTS.iter().find(|(ours, _)| *ours == part)?;
    let n = width / theirs.len();
    let matrix = entry.shape.len() == 2;
    let piece = |(i, name): (usize, &&str)| Piece {
        name: format!("{base}.encoder.layers.{number}.{name}.{end}"),
        shape: if matrix { vec![n, rows.1] } else { vec![n] },
        rows,
        columns: (i * n, n),
        transposed: matrix,
    };
    Some(theirs.iter().enumerate().map(piece).collect())
}

/// The `config.json` of two towers.
pub fn config_json(config: &ClipConfig) -> Value {
    if !is_covered(config) {
        return json!({ "architectures": ["FireboxClip"], "model_type": OWN, "clip": config });
    }
    let tower = |tower: &TransformerConfig, model_type: &str| {
        json!({
            "model_type": model_type,
            "hidden_size": tower.d_model,
            "intermediate_size": tower.d_ff,
            "num_hidden_layers": tower.n_layers,
            "num_attention_heads": tower.n_heads,
            "projection_dim": config.width,
            "hidden_act": match tower.feed_forward {
                FeedForward::QuickGelu => "quick_gelu",
                FeedForward::Gelu => "gelu_new",
                _ => "gelu",
            },
            "layer_norm_eps": tower.norm_eps,
            "attention_dropout": 0.0,
            "initializer_range": tower.init_std,
        })
    };
    let (mut text, mut vision) = (tower(&config.text, "clip_text_model"), tower(&config.image, "clip_vision_model"));
    text["vocab_size"] = config.text.vocab_size.into();
    text["max_position_embeddings"] = config.text.context.into();
    // Whoever reads it takes the vector of the first of these. Nothing begins a text.
    text["eos_token_id"] = config.end.into();
    text["bos_token_id"] = config.end.into();
    if let Some(ImageConfig { size, patch, channels, .. }) = config.image.image {
        for (key, value) in [("image_size", size), ("patch_size", patch), ("num_channels", channels)] {
            vision[key] = value.into();
        }
    }
    json!({
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.width,
        "logit_scale_init_value": config.logit_scale,
        "initializer_factor": 1.0,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "float32",
    })
}

/// Reads a `config.json`.
///
/// # Errors
/// [`HfError`] names the key at fault.
pub fn parse(json: &Value) -> Result<ClipConfig, HfError> {
    let kind = json.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
    let config = match kind {
        "clip" => of_keys(json)?,
        OWN => {
            let config = json.get("clip").cloned().unwrap_or(Value::Null);
            let wrong = |error: serde_json::Error| key("clip", "a shape of two towers", error.to_string());
            serde_json::from_value(config).map_err(wrong)?
        }
        other => return Err(HfError::Architecture { got: other.to_owned() }),
    };
    config.validate()?;
    Ok(config)
}

fn key(key: &str, expected: &'static str, got: String) -> HfError {
    HfError::Key { key: key.into(), expected, got }
}

fn of_keys(json: &Value) -> Result<ClipConfig, HfError> {
    let nothing = Map::new();
    let part = |name: &str| match json.get(name) {
        None | Some(Value::Null) => Ok(&nothing),
        Some(Value::Object(part)) => Ok(part),
        Some(other) => Err(key(name, "an object", other.to_string())),
    };
    let (text, vision) = (part("text_config")?, part("vision_config")?);
    // What transformers takes where a file says nothing.
    let size = [("image_size", 224), ("patch_size", 32), ("num_channels", 3)];
    let [size, patch, channels] = size.map(|(name, default)| count(vision, "vision_config", name, default));
    let image = ImageConfig { size: size?, patch: patch?, channels: channels?, bias: false };
    let encoder = EncoderConfig { embed_norm: true, ..EncoderConfig::default() };
    if image.patch == 0 {
        return Err(key("vision_config.patch_size", "a count above 0", "0".into()));
    }
    let vision = TransformerConfig {
        vocab_size: image.patch_values(),
        context: image.tokens(),
        encoder: Some(encoder),
        image: Some(image),
        ..tower(vision, "vision_config", [768, 3072, 12, 12])?
    };
    // What transformers 4 wrote whatever the token was: it is the largest then.
    let end = count(text, "text_config", "eos_token_id", 2)?;
    let text = TransformerConfig {
        vocab_size: count(text, "text_config", "vocab_size", 49408)?,
        context: count(text, "text_config", "max_position_embeddings", 77)?,
        ..tower(text, "text_config", [512, 2048, 12, 8])?
    };
    let top = json.as_object().unwrap_or(&nothing);
    let width = count(top, "", "projection_dim", 512)?;
    let logit_scale = number(top, "", "logit_scale_init_value", LOGIT_SCALE)?;
    Ok(ClipConfig { logit_scale, ..ClipConfig::new(vision, text, width, end) })
}

fn path(of: &str, name: &str) -> String {
    if of.is_empty() { name.to_owned() } else { format!("{of}.{name}") }
}

fn count(map: &Map<String, Value>, of: &str, name: &str, default: usize) -> Result<usize, HfError> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(default),
        // Far more than there is, and small enough to multiply.
        Some(value) => match value.as_u64().filter(|n| *n < 1 << 31) {
            Some(n) => Ok(n as usize),
            None => Err(key(&path(of, name), "a count", value.to_string())),
        },
    }
}

fn number(map: &Map<String, Value>, of: &str, name: &str, default: f64) -> Result<f64, HfError> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value.as_f64().ok_or_else(|| key(&path(of, name), "a number", value.to_string())),
    }
}

/// The keys that both towers have.
fn tower(
    map: &Map<String, Value>,
    of: &str,
    [width, inner, layers, heads]: [usize; 4],
) -> Result<TransformerConfig, HfError> {
    let count = |name, default| count(map, of, name, default);
    let (d_model, n_heads) = (count("hidden_size", width)?, count("num_attention_heads", heads)?);
    if n_heads == 0 || !d_model.is_multiple_of(n_heads) {
        let got = format!("{n_heads} for hidden_size = {d_model}");
        return Err(key(&path(of, "num_attention_heads"), "a divisor of the width", got));
    }
    let feed_forward = match map.get("hidden_act").map(Value::as_str) {
        None | Some(Some("quick_gelu")) => FeedForward::QuickGelu,
        Some(Some("gelu")) => FeedForward::GeluExact,
        Some(Some("gelu_new" | "gelu_pytorch_tanh")) => FeedForward::Gelu,
        Some(other) => {
            return Err(HfError::Unsupported { key: "hidden_act", got: format!("{other:?}") });
        }
    };
    Ok(TransformerConfig {
        d_model,
        n_layers: count("num_hidden_layers", layers)?,
        n_heads,
        n_kv_heads: n_heads,
        head_dim: d_model / n_heads,
        d_ff: count("intermediate_size", inner)?,
        norm: NormKind::LayerNorm,
        norm_eps: number(map, of, "layer_norm_eps", 1e-5)?,
        feed_forward,
        positions: Positions::Learned,
        bias: true,
        tied: true,
        head: Head::Hidden,
        dropout: 0.0,
        init_std: number(map, of, "initializer_range", 0.02)?,
        ..presets::depth(1, 1)
    })
}
