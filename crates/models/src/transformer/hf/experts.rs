//! Mixtures of experts: Mixtral, which is Mistral's, and Qwen 3's with QK-norm. Each expert's matrices are tensors of their own there.

use serde_json::{Value, json};

use super::HfError;
use super::keys::Keys;
use super::pieces::{Entry, Piece};
use crate::transformer::config::TransformerConfig;
use crate::transformer::experts::ExpertsConfig;

/// Whether a class of Hugging Face has the experts that `config` has, if it has any: without biases and capacities; a single expert per token keeps its probability in
/// Qwen 3 alone.
pub(super) fn have_a_class(config: &TransformerConfig) -> bool {
    config.experts.is_none_or(|experts| {
        experts.router_bias_rate == 0.0
            && experts.capacity_factor == 0.0
            && (experts.experts_per_token > 1 || config.qk_norm)
    })
}

/// The experts of block `i`: with what stands before all names, or under our own.
pub(super) fn entries(
    prefix: Option<&str>,
    config: &TransformerConfig,
    experts: &ExpertsConfig,
    i: usize,
) -> Vec<Entry> {
    let (n, d, f) = (experts.n_experts, config.d_model, config.d_ff);
    let ours = |part: &str| format!("blocks.{i}.experts.{part}");
    let Some(prefix) = prefix else {
        let mut entries = vec![
            Entry::whole(&ours("router.weight"), &[d, n], &ours("router.weight")),
            Entry::whole(&ours("input.weight"), &[n, d, 2 * f], &ours("input.weight")),
            Entry::whole(&ours("output.weight"), &[n, f, d], &ours("output.weight")),
        ];
        if experts.router_bias_rate > 0.0 {
            entries.push(Entry::whole(&ours("bias"), &[n], &ours("bias")));
        }
        return entries;
    };
    let (layer, [gate, up, down]) = match config.qk_norm {
        true => (format!("{prefix}layers.{i}.mlp"), ["gate_proj", "up_proj", "down_proj"]),
        false => (format!("{prefix}layers.{i}.block_sparse_moe"), ["w1", "w3", "w2"]),
    };
    let piece = |name: String, rows: (usize, usize), columns: (usize, usize)| {
        let name = format!("{layer}.{name}.weight");
        Piece { name, shape: vec![columns.1, rows.1], rows, columns, transposed: true }
    };
    let of_expert = |e: usize, part: &str| format!("experts.{e}.{part}");
    let input = |e: usize| [(gate, 0), (up, f)].map(|(part, first)| piece(of_expert(e, part), (e * d, d), (first, f)));
    let output = |e: usize| piece(of_expert(e, down), (e * f, f), (0, d));
    let router = vec![piece("gate".into(), (0, d), (0, n))];
    vec![
        Entry { param: ours("router.weight"), shape: vec![d, n], pieces: router },
        Entry { param: ours("input.weight"), shape: vec![n, d, 2 * f], pieces: (0..n).flat_map(input).collect() },
        Entry { param: ours("output.weight"), shape: vec![n, f, d], pieces: (0..n).map(output).collect() },
    ]
}

/// The experts in a `config.json` of the dense model. Returns how the names of its classes begin.
pub(super) fn write(config: &TransformerConfig, experts: &ExpertsConfig, json: &mut Value) -> &'static str {
    json["num_experts_per_tok"] = experts.experts_per_token.into();
    json["router_aux_loss_coef"] = experts.router_aux_loss.into();
    json["output_router_logits"] = (experts.router_aux_loss > 0.0).into();
    if config.qk_norm {
        json["model_type"] = "qwen3_moe".into();
        json["num_experts"] = experts.n_experts.into();
        json["moe_intermediate_size"] = config.d_ff.into();
        json["norm_topk_prob"] = (experts.experts_per_token > 1).into();
        json["decoder_sparse_step"] = 1.into();
        json["mlp_only_layers"] = json!([]);
        "Qwen3Moe"
    } else {
        json["model_type"] = "mixtral".into();
        json["num_local_experts"] = experts.n_experts.into();
        json["sliding_window"] = config.window.map_or(Value::Null, Value::from);
        "Mixtral"
    }
}

impl Keys<'_> {
    pub(super) fn mixtral(&self) -> Result<TransformerConfig, HfError> {
        let config = TransformerConfig { window: self.count_or("sliding_window")?, ..self.llama()? };
        let experts = self.experts("num_local_experts")?;
        if experts.experts_per_token == 1 {
            // Its weight would always be 1.
            return Err(HfError::Unsupported { key: "num_experts_per_tok", got: "1".into() });
        }
        Ok(TransformerConfig { experts: Some(experts), ..config })
    }

    pub(super) fn qwen3_moe(&self) -> Result<TransformerConfig, HfError> {
        let unsupported = |key, got: String| Err(HfError::Unsupported { key, got });
        // Every block has experts, and their weights are those of `ExpertsConfig`.
        let step = self.count_or("decoder_sparse_step")?.unwrap_or(1);
        if step != 1 {
            return unsupported("decoder_sparse_step", step.to_string());
        }
        if let Some(dense) = self.0.get("mlp_only_layers").and_then(Value::as_array).filter(|dense| !dense.is_empty()) {
            return unsupported("mlp_only_layers", Value::from(dense.clone()).to_string());
        }
        // transformers 5 writes the second.
        let key = if self.0.contains_key("num_experts") { "num_experts" } else { "num_local_experts" };
        let experts = self.experts(key)?;
        let normalized = self.flag_or("norm_topk_prob", false)?;
        if normalized != (experts.experts_per_token > 1) {
            return unsupported("norm_topk_prob", normalized.to_string());
        }
        Ok(TransformerConfig { experts: Some(experts), d_ff: self.count("moe_intermediate_size")?, ..self.qwen3()? })
    }

    fn experts(&self, count: &str) -> Result<ExpertsConfig, HfError> {
        Ok(ExpertsConfig {
            n_experts: self.count(count)?,
            experts_per_token: self.count("num_experts_per_tok")?,
            router_aux_loss: self.number_or("router_aux_loss_coef", 0.001)?,
            router_bias_rate: 0.0,
            capacity_factor: 0.0,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Family, parse_config};
    use super::*;
    use crate::transformer::presets;

    #[test]
    fn experts_make_mixtral_and_qwen3_moe_or_ours() {
        let qwen = presets::named("firebox-moe-3m").unwrap();
        let mixtral = TransformerConfig { qk_norm: false, window: Some(64), ..qwen.clone() };
        for (config, model_type) in [(&qwen, "qwen3_moe"), (&mixtral, "mixtral")] {
            let json = Family::of(config).config_json(config);
            assert_eq!(json["model_type"], model_type);
            assert_eq!(parse_config(&json).unwrap(), (Family::Llama, config.clone()));
        }
        let entries = Family::Llama.entries(&mixtral);
        let down = entries.iter().find(|e| e.param == "blocks.2.experts.output.weight").unwrap();
        assert_eq!(down.pieces[7].name, "model.layers.2.block_sparse_moe.experts.7.w2.weight");
        let experts = qwen.experts.unwrap();
        let with = |experts, config: &TransformerConfig| TransformerConfig { experts: Some(experts), ..config.clone() };
        let single = ExpertsConfig { experts_per_token: 1, ..experts };
        assert_eq!(Family::of(&with(single, &qwen)), Family::Llama);
        for config in [
            with(single, &mixtral),
            with(ExpertsConfig { router_bias_rate: 1e-3, ..experts }, &qwen),
            with(ExpertsConfig { capacity_factor: 1.25, ..experts }, &qwen),
        ] {
            let family = Family::of(&config);
            assert_eq!(family, Family::Firebox);
            assert_eq!(parse_config(&family.config_json(&config)).unwrap(), (family, config.clone()));
            let elements: usize = family.entries(&config).iter().map(|e| e.shape.iter().product::<usize>()).sum();
            assert_eq!(elements, config.num_params());
        }
    }

    #[test]
    fn what_the_decoder_lacks_is_said() {
        let config = presets::named("firebox-moe-3m").unwrap();
        let json = Family::Llama.config_json(&config);
        for (key, value) in [
            ("norm_topk_prob", json!(false)),
            ("decoder_sparse_step", json!(2)),
            ("mlp_only_layers", json!([1])),
            ("num_experts_per_tok", json!(9)),
        ] {
            let mut json = json.clone();
            json[key] = value;
            let error = parse_config(&json).unwrap_err().to_string();
            assert!(error.contains(key.trim_start_matches("num_").trim_end_matches("_per_tok")), "{error}");
        }
    }
}
