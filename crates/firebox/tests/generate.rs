//! Generation and logits, by library and by command.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;

use common::Lab;
use firebox::models::TokenBatch;
use firebox::models::transformer::{FeedForward, Head, NormKind, Positions, Transformer, TransformerConfig};
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::generate::{Sampling, generate};
use firebox::train::model_io::{load, to_host};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 1337 };

/// Odd sizes; weights large enough that the most likely token is not always the same.
fn models() -> [(&'static str, Transformer); 2] {
    let llama = TransformerConfig {
        vocab_size: 37,
        d_model: 30,
        n_layers: 2,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 6,
        d_ff: 22,
        context: 17,
        window: None,
        qk_norm: true,
        attention_softcap: 4.0,
        logit_softcap: 6.0,
        qkv_bias: false,
        rope_scaling: None,
        labels: vec![],
        encoder: None,
        image: None,
        head: Head::default(),
        experts: None,
        reduction: Default::default(),
        norm: NormKind::RmsNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::SwiGlu,
        positions: Positions::Rotary { theta: 10_000.0 },
        bias: false,
        adapter: None,
        tied: false,
        dropout: 0.0,
        init_std: 0.3,
    };
    let gpt2 = TransformerConfig {
        n_heads: 5,
        n_kv_heads: 5,
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
        reduction: Default::default(),
        norm: NormKind::LayerNorm,
        feed_forward: FeedForward::Gelu,
        positions: Positions::Learned,
        bias: true,
        tied: true,
        dropout: 0.1,
        ..llama.clone()
    };
    let device = Backend::NdArray.device().unwrap();
    [("llama", llama), ("gpt2", gpt2)].map(|(name, config)| (name, Transformer::new(&config, 7, &device).unwrap()))
}

/// Logits of what follows `ids`, without a cache.
fn next_logits(model: &Transformer, ids: &[i32]) -> Vec<f32> {
    let logits = to_host(model.logits(&TokenBatch::plain(1, ids.len(), ids.to_vec(), vec![-100; ids.len()])));
    logits[logits.len() - model.config().vocab_size..].to_vec()
}

/// Greedy choice of `n` tokens, everything computed anew for each.
fn greedy_without_cache(model: &Transformer, prompt: &[i32], n: usize) -> Vec<i32> {
    let context = model.config().context;
    let mut ids = prompt.to_vec();
    let mut start = ids.len().saturating_sub(context);
    for _ in 0..n {
        if ids.len() - start > context {
            start = ids.len() - context / 2;
        }
        let logits = next_logits(model, &ids[start..]);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).unwrap();
        ids.push(best as i32);
    }
    ids
}

#[test]
fn greedy_with_the_cache_is_greedy_without() {
    for (name, model) in models() {
        let context = model.config().context as i32;
        for prompt in [vec![3], vec![5, 0, 36, 5, 11], (0..context - 1).collect(), (0..context + 9).collect()] {
            let want = greedy_without_cache(&model, &prompt, 60);
            let got = generate(&model, &prompt, 60, &GREEDY, None, |_| true).unwrap();
            assert_eq!(got, want, "{name}, prompt of {} tokens", prompt.len());
            let distinct = want[prompt.len()..].iter().collect::<HashSet<_>>().len();
            assert!(distinct > 3, "{name}: {distinct} distinct tokens test little");
        }
    }
}

#[test]
fn sampling_is_what_its_settings_say() {
    for (name, model) in models() {
        let of = |sampling: &Sampling| generate(&model, &[1, 2, 3], 40, sampling, None, |_| true).unwrap();
        let greedy = of(&GREEDY);
        let free = Sampling { temperature: 1.0, ..GREEDY };
        assert_eq!(of(&free), of(&free), "{name}: the same seed");
        assert_ne!(of(&free), of(&Sampling { seed: 2, ..free.clone() }), "{name}: another seed");
        assert_ne!(of(&free), greedy, "{name}: temperature 1");
        assert_eq!(of(&Sampling { top_k: 1, ..free.clone() }), greedy, "{name}: top-k 1");
        assert_eq!(of(&Sampling { top_p: 1e-9, ..free.clone() }), greedy, "{name}: a tiny top-p");
        assert_eq!(of(&Sampling { temperature: 1e-9, ..free.clone() }), greedy, "{name}: a tiny temperature");
        assert_eq!(of(&Sampling { top_k: 1000, ..free.clone() }), of(&free), "{name}: top-k of all");
        // Without repetition as long as tokens last.
        let fresh = of(&Sampling { repetition_penalty: 1e9, ..GREEDY });
        assert_ne!(fresh, greedy, "{name}: repetition penalty");
        let start = &fresh[..fresh.len().min(10)];
        assert_eq!(start.iter().collect::<HashSet<_>>().len(), start.len(), "{name}: {start:?}");
    }
}

#[test]
fn generation_stops_where_it_is_told() {
    let [(_, model), _] = models();
    let all = generate(&model, &[4], 30, &GREEDY, None, |_| true).unwrap();
    let stop = all[8];
    let first = all[1..].iter().position(|id| *id == stop).unwrap() + 1;
    let mut seen = vec![];
    let until = generate(&model, &[4], 30, &GREEDY, Some(stop), |id| {
        seen.push(id);
        true
    });
    assert_eq!(until.unwrap(), all[..first], "the token that ends a text is not part of it");
    assert_eq!(seen, all[1..first], "each token is handed over as it comes");
    assert_eq!(generate(&model, &[4], 30, &GREEDY, None, |_| false).unwrap().len(), 2);
    assert_eq!(generate(&model, &[4], 0, &GREEDY, None, |_| true).unwrap(), [4]);
    for (prompt, sampling) in [
        (&[][..], GREEDY),
        (&[37], GREEDY),
        (&[-1], GREEDY),
        (&[1], Sampling { temperature: f64::NAN, ..GREEDY }),
        (&[1], Sampling { top_p: 1.5, ..GREEDY }),
    ] {
        generate(&model, prompt, 3, &sampling, None, |_| true).unwrap_err();
    }
}

#[test]
fn commands_do_what_the_library_does() {
    let lab = Lab::new(150);
    let run = lab.trained("run", &[]);
    let loaded = load(&run.dir, &Backend::NdArray.device().unwrap()).unwrap();
    let (model, tokenizer) = (loaded.model, loaded.tokenizer.unwrap());

    lab.call(&["logits", "run", "--ids", "1,2,3,5,8,13", "--out", "l.safetensors"]).succeeded();
    let file = TensorFile::open(lab.path("l.safetensors")).unwrap();
    let v = model.config().vocab_size;
    assert_eq!(file.names().collect::<Vec<_>>(), ["logits"]);
    assert_eq!(file.shape("logits").unwrap(), [6, v]);
    let want = to_host(model.logits(&TokenBatch::plain(1, 6, vec![1, 2, 3, 5, 8, 13], vec![-100; 6])));
    assert_eq!(file.f32("logits").unwrap(), want);
    // A checkpoint and a folder in Hugging Face's form load as the run does.
    for folder in ["run/checkpoints", "run/checkpoints/step-40"] {
        lab.call(&["logits", folder, "--ids", "1,2,3,5,8,13", "--out", "again.safetensors"]).succeeded();
        assert!(
            std::fs::read(lab.path("again.safetensors")).unwrap() == std::fs::read(lab.path("l.safetensors")).unwrap()
        );
    }

    let text =
        |args: &[&str]| lab.call(&[&["generate", "run", "--prompt", "The fire"], args].concat()).succeeded().stdout;
    let greedy = text(&["--temperature", "0", "--max-tokens", "40"]);
    let prompt = firebox::train::prompt_ids(&tokenizer, b"The fire").unwrap();
    let eot = tokenizer.eot().map(|id| id as i32);
    let ids = generate(&model, &prompt, 40, &GREEDY, eot, |_| true).unwrap();
    let ids: Vec<u32> = ids.into_iter().filter(|id| Some(*id) != eot).map(|id| id as u32).collect();
    assert_eq!(greedy, format!("{}\n", String::from_utf8(tokenizer.decode(&ids)).unwrap()));
    assert_eq!(text(&["--seed", "3"]), text(&["--seed", "3"]));
    assert_ne!(text(&["--seed", "3"]), text(&["--seed", "4"]));
    assert_eq!(text(&["--top-k", "1", "--max-tokens", "40"]), greedy);
}
