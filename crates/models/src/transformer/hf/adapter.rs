//! Adapters as PEFT names them, and how `config.json` says that a checkpoint has some.

use super::{Entry, HfError, Keys, Piece};
use crate::transformer::adapter::Adapted;
use crate::transformer::config::TransformerConfig;

/// The key of `config.json` with a checkpoint's adapters.
pub(super) const KEY: &str = "firebox_adapter";

/// What PEFT puts before the names of the model that it wraps.
pub const PREFIX: &str = "base_model.model.";

pub(super) fn read(keys: &Keys<'_>, config: TransformerConfig) -> Result<TransformerConfig, HfError> {
    let Some(json) = keys.0.get(KEY).filter(|value| !value.is_null()) else { return Ok(config) };
    let adapter = serde_json::from_value(json.clone()).map_err(|error| HfError::Key {
        key: KEY.into(),
        expected: "a kind, a rank, alpha and targets",
        got: error.to_string(),
    })?;
    Ok(TransformerConfig { adapter: Some(adapter), ..config })
}

/// The parameters of the adapter of a weight, if it has one. The layer of a piece that is a tensor of the file is that tensor's; others, which no class of Hugging Face has, are named after
/// ours.
pub(super) fn entries(config: &TransformerConfig, weight: &Entry) -> Vec<Entry> {
    let Some(layer) = weight.param.strip_suffix(".weight") else { return vec![] };
    let Some(Adapted { pieces, shapes }) = config.adapter_of(layer) else { return vec![] };
    let modules: Vec<String> = pieces.iter().enumerate().map(|(i, piece)| module(weight, layer, i, piece)).collect();
    let rank = config.adapter.map_or(0, |adapter| adapter.rank);
    let mut first = 0;
    let columns: Vec<(usize, usize)> = pieces
        .iter()
        .map(|piece| {
            first += piece.len();
            (first - piece.len(), piece.len())
        })
        .collect();
    let entry = |(param, shape): (String, Vec<usize>)| {
        let pieces = modules.iter().enumerate().map(|(i, module)| {
            let name = |tensor: &str| format!("{PREFIX}{module}.{tensor}");
            let (from, n) = columns[i];
            let [rows, width] = match shape[..] {
                [rows, _] if param.ends_with(".down") => [rows, rank],
                [rows, _] => [rows, n],
                _ => [1, n],
            };
            let (name, at) = match param.rsplit_once('.').map_or("", |(_, field)| field) {
                "down" => (name("lora_A.weight"), i * rank),
                "up" => (name("lora_B.weight"), from),
                _ => (name("lora_magnitude_vector"), from),
            };
            let vector = shape.len() == 1;
            let shape = if vector { vec![width] } else { vec![width, rows] };
            Piece { name, shape, rows: (0, rows), columns: (at, width), transposed: !vector }
        });
        Entry { pieces: pieces.collect(), param: param.clone(), shape }
    };
    shapes.into_iter().map(entry).collect()
}

/// The name of the layer that a piece of an adapter belongs to.
fn module(weight: &Entry, layer: &str, i: usize, piece: &std::ops::Range<usize>) -> String {
    let same = weight.pieces.iter().find(|file| file.columns == (piece.start, piece.len()));
    match same.and_then(|file| file.name.strip_suffix(".weight")) {
        Some(module) => module.to_owned(),
        None => format!("{layer}.{i}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Family, parse_config};
    use crate::transformer::{AdapterConfig, AdapterKind, Target, Targets, TransformerConfig, presets};

    fn config(preset: &str, targets: Targets) -> TransformerConfig {
        let adapter = AdapterConfig { kind: AdapterKind::Dora, rank: 4, alpha: 8.0, rslora: false, targets };
        TransformerConfig { adapter: Some(adapter), dropout: 0.0, ..presets::named(preset).unwrap() }
    }

    #[test]
    fn adapters_have_the_names_and_shapes_of_peft() {
        let config = config("llama-30m", Targets::new([Target::Query, Target::Value, Target::Up]));
        let entries = Family::Llama.entries(&config);
        let elements: usize = entries.iter().map(|entry| entry.shape.iter().product::<usize>()).sum();
        assert_eq!(elements, config.num_params());
        let find = |name: &str| entries.iter().flat_map(|e| &e.pieces).find(|piece| piece.name == name).unwrap();
        let (d, h) = (config.d_model, config.n_heads * config.head_dim);
        let k = config.n_kv_heads * config.head_dim;
        let path = "base_model.model.model.layers.1";
        let a = find(&format!("{path}.self_attn.v_proj.lora_A.weight"));
        assert_eq!((&a.shape[..], a.columns, a.transposed), (&[4, d][..], (4, 4), true));
        let b = find(&format!("{path}.self_attn.v_proj.lora_B.weight"));
        assert_eq!((&b.shape[..], b.columns), (&[k, 4][..], (h, k)));
        let m = find(&format!("{path}.mlp.up_proj.lora_magnitude_vector"));
        assert_eq!((&m.shape[..], m.columns, m.transposed), (&[config.d_ff][..], (0, config.d_ff), false));
        assert_eq!(parse_config(&Family::Llama.config_json(&config)).unwrap(), (Family::Llama, config));
    }

    #[test]
    fn one_layer_stays_one() {
        let config = config("gpt2", Targets::new([Target::Packed, Target::Out, Target::Down]));
        let entries = Family::Gpt2.entries(&config);
        let names: Vec<&str> = entries
            .iter()
            .flat_map(|entry| &entry.pieces)
            .map(|piece| piece.name.as_str())
            .filter(|name| name.contains(".h.0.") && name.ends_with("lora_B.weight"))
            .collect();
        let path = "base_model.model.transformer.h.0";
        let expected = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"].map(|m| format!("{path}.{m}.lora_B.weight"));
        assert_eq!(names, expected);
        let json = Family::Gpt2.config_json(&config);
        assert_eq!(json["firebox_adapter"]["targets"], serde_json::json!(["c_attn", "o_proj", "down_proj"]));
        assert_eq!(parse_config(&json).unwrap(), (Family::Gpt2, config));
    }
}
