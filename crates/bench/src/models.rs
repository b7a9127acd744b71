//! The models of `bench train`.

use firebox_models::transformer::{AdapterConfig, AdapterKind, Target as Layer, Targets, TransformerConfig, presets};
use serde::{Deserialize, Serialize};

use crate::protocol::Training;

/// A model with its batch, and what Firebox is to reach with it.
pub struct Spec {
    /// Its name on the command line.
    pub name: String,
    /// What it is.
    pub title: String,
    /// The training.
    pub training: Training,
    /// Steps of a round.
    pub steps: usize,
    /// What is aimed for.
    pub target: Option<Target>,
}

/// What Firebox is to reach.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Target {
    /// Tokens/s over the best of PyTorch, at least.
    pub speed: f64,
    /// Share of the peak rate, at least.
    pub mfu: f64,
    /// Peak memory over PyTorch's, at most.
    pub memory: f64,
    /// The same where blocks are computed again in backward.
    pub recompute_memory: Option<f64>,
}

/// All of them.
pub fn all() -> Vec<Spec> {
    // The presets are part of the library's interface, and tested there.
    let preset = |name| presets::named(name).unwrap_or_else(|| presets::depth(1, 256));
    let gpt2 = TransformerConfig { dropout: 0.0, ..preset("gpt2") };
    // GPT-2's initial weights, so that all losses start near ln V.
    let llama = TransformerConfig { tied: false, init_std: 0.02, ..preset("llama-30m") };
    vec![
        Spec {
            name: "gpt-14m".to_owned(),
            title: "GPT-2 style, 6 layers of width 384, vocabulary 4096".to_owned(),
            training: training(preset("firebox-14m"), 8, 256),
            steps: 4,
            target: Some(Target { speed: 1.4, mfu: 0.80, memory: 0.4, recompute_memory: None }),
        },
        Spec {
            name: "gpt2-124m".to_owned(),
            title: "GPT-2 124M, 12 layers of width 768, vocabulary 50257, tied".to_owned(),
            training: training(gpt2, 4, 256),
            steps: 2,
            target: Some(Target { speed: 1.35, mfu: 0.80, memory: 0.65, recompute_memory: Some(0.5) }),
        },
        Spec {
            name: "nanogpt-cpu".to_owned(),
            title: "nanoGPT's CPU setting, 4 layers of width 128, 65 characters, tied".to_owned(),
            training: training(presets::nanogpt_cpu(65), 12, 64),
            steps: 80,
            target: Some(Target { speed: 1.7, mfu: 0.65, memory: 0.2, recompute_memory: None }),
        },
        Spec {
            name: "llama-30m".to_owned(),
            title: "Llama style, 8 layers of width 512, 8 heads over 4, SwiGLU, context 1024, vocabulary 8192"
                .to_owned(),
            training: training(llama, 4, 1024),
            steps: 2,
            target: Some(Target { speed: 1.4, mfu: 0.75, memory: 0.6, recompute_memory: None }),
        },
    ]
}

/// Those of `bench finetune`, beside transformers' models and PEFT's adapters. Speed and memory do not depend on the weights, which are random.
pub fn finetune() -> Vec<Spec> {
    let smollm2 = presets::named("smollm2-135m").unwrap_or_else(|| presets::depth(1, 256));
    let smollm2 = TransformerConfig { dropout: 0.0, ..smollm2 };
    let targets = Targets::new([Layer::Query, Layer::Value]);
    let lora = AdapterConfig { kind: AdapterKind::Lora, rank: 16, alpha: 32.0, rslora: false, targets };
    let target = Some(Target { speed: 1.3, mfu: 0.6, memory: 0.7, recompute_memory: None });
    let spec = |name: &str, title: &str, model| Spec {
        name: name.to_owned(),
        title: title.to_owned(),
        training: Training { transformers: true, ..training(model, 1, 512) },
        steps: 2,
        target,
    };
    vec![
        spec("smollm2-full", "SmolLM2-135M's shape, all parameters", smollm2.clone()),
        spec(
            "smollm2-lora",
            "SmolLM2-135M's shape, LoRA of rank 16 on queries and values",
            TransformerConfig { adapter: Some(lora), ..smollm2 },
        ),
    ]
}

/// The training of a model, with nanoGPT's AdamW and clipping.
pub fn training(model: TransformerConfig, batch: usize, tokens: usize) -> Training {
    Training {
        model,
        batch,
        tokens,
        seed: 1337,
        // Low enough that losses fall evenly without a warm-up, and can be compared.
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        weight_decay: 0.1,
        clip: 1.0,
        warmup_steps: 2,
        transformers: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_are_the_ones_that_the_titles_say() {
        let millions: Vec<f64> =
            all().iter().map(|spec| (spec.training.model.num_params() as f64 / 1e5).round() / 10.0).collect();
        assert_eq!(millions, [13.9, 124.4, 0.8, 31.6]);
        let millions: Vec<f64> =
            finetune().iter().map(|spec| (spec.training.model.num_params() as f64 / 1e5).round() / 10.0).collect();
        assert_eq!(millions, [134.5, 135.4]);
        for spec in all().into_iter().chain(finetune()) {
            assert_eq!(spec.training.model.validate(), Ok(()), "{}", spec.name);
            assert!(spec.training.tokens <= spec.training.model.context && spec.training.model.dropout == 0.0);
        }
    }
}
