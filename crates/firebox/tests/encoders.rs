//! `firebox logits` of encoders, and what else refuses them.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::Lab;
use firebox::data::Tokenizer;
use firebox::models::transformer::{
    EncoderConfig, FeedForward, Head, NormKind, Pool, Pooler, Positions, Transformer, TransformerConfig, presets,
};
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::model_io::{parameters, to_host};
use firebox::train::quantized::{Weights, save};

const LINES: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nfire\nburn\n##s\n.";

fn config(head: Head) -> TransformerConfig {
    let encoder = EncoderConfig { norm_after: true, embed_norm: true, token_types: 2, position_offset: 0 };
    TransformerConfig {
        encoder: Some(encoder),
        head,
        context: 12,
        norm: NormKind::LayerNorm,
        feed_forward: FeedForward::GeluExact,
        positions: Positions::Learned,
        bias: true,
        tied: true,
        n_kv_heads: presets::depth(1, 10).n_heads,
        ..presets::depth(1, 10)
    }
}

#[test]
fn every_head_says_something_of_tokens() {
    let lab = Lab::new(1);
    let tokenizer = Tokenizer::from_word_pieces(LINES, true, None).unwrap();
    let d = config(Head::Hidden).d_model;
    let classes = Head::Classes { n: 3, pooler: Pooler::Tanh };
    let embedding = Head::Embedding { pool: Pool::Mean, normalize: true, temperature: 0.05 };
    /// Name, head, and what is written for it, with its shape.
    type Case<'a> = (&'a str, Head, &'a [(&'a str, &'a [usize])]);
    let all: [Case<'_>; 5] = [
        ("hidden", Head::Hidden, &[("hidden", &[6, d])]),
        ("masked", Head::Masked, &[("logits", &[6, 10])]),
        ("classes", classes, &[("logits", &[3])]),
        ("tokens", Head::TokenClasses { n: 4 }, &[("logits", &[6, 4])]),
        ("embedding", embedding, &[("embedding", &[d]), ("hidden", &[6, d])]),
    ];
    for (name, head, want) in all {
        let config = config(head);
        let model = Transformer::new(&config, 3, &Backend::NdArray.device().unwrap()).unwrap();
        let values: BTreeMap<String, Vec<f32>> =
            parameters(&model).into_iter().map(|(name, value)| (name, to_host(value))).collect();
        let value = |param: &str| Ok(Weights::Full(values[param].clone()));
        save(&lab.path(name), &config, &BTreeMap::new(), Some(&tokenizer), value).unwrap();
        lab.call(&["logits", name, "--text", "Fire burns.", "--out", "text.safetensors"]).succeeded();
        // [CLS] fire burn ##s . [SEP]
        lab.call(&["logits", name, "--ids", "2,6,7,8,9,3", "--out", "ids.safetensors"]).succeeded();
        let [text, ids] =
            ["text", "ids"].map(|name| TensorFile::open(lab.path(&format!("{name}.safetensors"))).unwrap());
        let found: Vec<(&str, &[usize])> = text.names().map(|name| (name, text.shape(name).unwrap())).collect();
        assert_eq!(found, want, "{name}");
        assert!(want.iter().all(|(name, _)| text.bytes(name).unwrap() == ids.bytes(name).unwrap()), "{name}");
        lab.call(&["logits", name, "--ids", "2,6,3", "--types", "0,0,1", "--out", "types.safetensors"]).succeeded();
        lab.call(&["logits", name, "--ids", "2,6,3", "--types", "0,2,1", "--out", "x"])
            .failed(2, &["--types", "2 types"]);
        lab.call(&["logits", name, "--ids", "2,6,3", "--types", "0,1", "--out", "x"]).failed(2, &["--types"]);
        lab.call(&["generate", name, "--prompt", "fire"]).failed(2, &["causal decoder", "an encoder"]);
        lab.call(&["export", name, "--format", "gguf", "--out", "x"]).failed(2, &["GGUF", "an encoder"]);
    }
    lab.call(&["logits", "masked", "--ids", "2", "--text", "a", "--out", "x"]).failed(2, &["--text"]);
    lab.call(&["export", "embedding", "--format", "hf", "--out", "sentences"]).succeeded();
    for file in ["modules.json", "1_Pooling/config.json", "tokenizer_config.json"] {
        assert!(lab.path("sentences").join(file).is_file(), "{file}");
    }
    lab.call(&["logits", "sentences", "--text", "fire", "--out", "text.safetensors"]).succeeded();
    assert!(TensorFile::open(lab.path("text.safetensors")).unwrap().names().any(|name| name == "embedding"));
}
