//! Shapes from 1M to 70B parameters. Each derives from another where it can.

use super::config::{FeedForward, NormKind, Positions, TransformerConfig};
use super::experts::ExpertsConfig;
use super::head::Head;
use super::reduction::Reduction;

/// The single dial: everything follows from the number of blocks. A Llama-style decoder with width 64 per block (nanochat's aspect ratio),
/// heads of width 64 (32 in models of less than four blocks' width), SwiGLU of 8/3 the width rounded up to a multiple of 32, tied embeddings up to 12 blocks.
/// Initial weights are those of [`depth_init_std`].
pub fn depth(n_layers: usize, vocab_size: usize) -> TransformerConfig {
    let d_model = 64 * n_layers.max(1);
    let head_dim = if d_model < 256 { 32 } else { 64 };
    let n_heads = d_model / head_dim;
    TransformerConfig {
        vocab_size,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads: n_heads,
        head_dim,
        d_ff: (d_model * 8 / 3).next_multiple_of(32),
        context: 256,
        window: None,
        qk_norm: false,
        attention_softcap: 0.0,
        logit_softcap: 0.0,
        qkv_bias: false,
        rope_scaling: None,
        labels: vec![],
        encoder: None,
        image: None,
        head: Head::default(),
        experts: None,
        reduction: Reduction::default(),
        norm: NormKind::RmsNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::SwiGlu,
        positions: Positions::Rotary { theta: 10_000.0 },
        bias: false,
        adapter: None,
        tied: n_layers <= 12,
        dropout: 0.0,
        init_std: depth_init_std(d_model),
    }
}

/// Standard deviation of initial weights of the [`depth`] models: `d_model^-1/2` keeps activations at their size. With GPT-2's 0.02, a model of width 128
/// needs more than twice the tokens to the same loss.
pub fn depth_init_std(d_model: usize) -> f64 {
    1.0 / (d_model.max(1) as f64).sqrt()
}

/// GPT-2 of a given size (Radford et al., 2019, table 2).
fn gpt2(n_layers: usize, d_model: usize, n_heads: usize) -> TransformerConfig {
    TransformerConfig {
        vocab_size: 50_257,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads: n_heads,
        head_dim: d_model / n_heads,
        d_ff: 4 * d_model,
        context: 1024,
        window: None,
        qk_norm: false,
        attention_softcap: 0.0,
        logit_softcap: 0.0,
        qkv_bias: false,
        rope_scaling: None,
        labels: vec![],
        encoder: None,
        image: None,
        head: Head::default(),
        experts: None,
        reduction: Reduction::default(),
        norm: NormKind::LayerNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::Gelu,
        positions: Positions::Learned,
        bias: true,
        adapter: None,
        tied: true,
        dropout: 0.1,
        init_std: 0.02,
    }
}

/// Llama 2 of a given size (Touvron et al., arXiv:2307.09288).
fn llama2(n_layers: usize, d_model: usize, n_heads: usize, n_kv_heads: usize, d_ff: usize) -> TransformerConfig {
    TransformerConfig {
        vocab_size: 32_000,
        d_ff,
        d_model,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim: d_model / n_heads,
        context: 4096,
        window: None,
        adapter: None,
        tied: false,
        init_std: 0.02,
        ..depth(n_layers, 32_000)
    }
}

/// nanoGPT's CPU model: GPT-2 without biases and dropout, 4 layers of width 128, context 64.
pub fn nanogpt_cpu(vocab_size: usize) -> TransformerConfig {
    TransformerConfig { vocab_size, context: 64, bias: false, dropout: 0.0, ..gpt2(4, 128, 4) }
}

/// Every preset: name and shape.
pub fn all() -> Vec<(&'static str, TransformerConfig)> {
    let llama3 = |base: TransformerConfig| TransformerConfig {
        vocab_size: 128_256,
        context: 8192,
        positions: Positions::Rotary { theta: 500_000.0 },
        ..base
    };
    let small =
        || TransformerConfig { d_model: 128, n_layers: 4, n_heads: 4, n_kv_heads: 4, d_ff: 352, ..depth(2, 2048) };
    vec![
        ("firebox-1m", small()),
        ("nanogpt-cpu", nanogpt_cpu(65)),
        (
            "firebox-4m",
            TransformerConfig { d_model: 256, n_layers: 4, n_heads: 4, n_kv_heads: 4, d_ff: 704, ..depth(4, 4096) },
        ),
        (
            "firebox-14m",
            TransformerConfig { context: 256, vocab_size: 4096, tied: false, dropout: 0.0, ..gpt2(6, 384, 6) },
        ),
        (
            "firebox-moe-3m",
            TransformerConfig {
                d_ff: 192,
                qk_norm: true,
                experts: Some(ExpertsConfig { n_experts: 8, experts_per_token: 2, ..ExpertsConfig::default() }),
                ..small()
            },
        ),
        ("llama-30m", TransformerConfig { n_kv_heads: 4, context: 1024, ..depth(8, 8192) }),
        ("gpt2", gpt2(12, 768, 12)),
        ("gpt2-medium", gpt2(24, 1024, 16)),
        ("gpt2-large", gpt2(36, 1280, 20)),
        ("gpt2-xl", gpt2(48, 1600, 25)),
        (
            "smollm2-135m",
            TransformerConfig {
                vocab_size: 49_152,
                context: 8192,
                adapter: None,
                tied: true,
                positions: Positions::Rotary { theta: 100_000.0 },
                ..llama2(30, 576, 9, 3, 1536)
            },
        ),
        ("tinyllama-1.1b", TransformerConfig { context: 2048, ..llama2(22, 2048, 32, 4, 5632) }),
        ("llama-3.2-1b", TransformerConfig { tied: true, context: 131_072, ..llama3(llama2(16, 2048, 32, 8, 8192)) }),
        ("llama-2-7b", llama2(32, 4096, 32, 32, 11_008)),
        ("llama-3-8b", llama3(llama2(32, 4096, 32, 8, 14_336))),
        ("llama-2-13b", llama2(40, 5120, 40, 40, 13_824)),
        ("llama-2-70b", llama2(80, 8192, 64, 8, 28_672)),
        ("llama-3-70b", llama3(llama2(80, 8192, 64, 8, 28_672))),
    ]
}

/// The preset of that name.
pub fn named(name: &str) -> Option<TransformerConfig> {
    all().into_iter().find(|(n, _)| *n == name).map(|(_, config)| config)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_those_of_the_papers() {
        for (name, millions) in [
            ("gpt2", 124.4),
            ("gpt2-medium", 354.8),
            ("gpt2-large", 774.0),
            ("gpt2-xl", 1557.6),
            ("smollm2-135m", 134.5),
            ("tinyllama-1.1b", 1100.0),
            ("llama-3.2-1b", 1235.8),
            ("llama-2-7b", 6738.4),
            ("llama-3-8b", 8030.3),
            ("llama-2-13b", 13015.9),
            ("llama-2-70b", 68976.6),
            ("llama-3-70b", 70553.7),
        ] {
            let got = named(name).unwrap().num_params() as f64 / 1e6;
            assert!((got - millions).abs() < 0.06, "{name}: {got}");
        }
    }

    #[test]
    fn all_are_valid() {
        for (name, config) in all() {
            config.validate().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        for n in 1..40 {
            depth(n, 1000).validate().unwrap();
        }
    }
}
