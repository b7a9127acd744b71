//! What llama.cpp does with a file, beside what Firebox does with the same weights.

use std::collections::HashMap;

use firebox::compress::blocks::BlockType;
use firebox::train::checkpoint::TensorFile;
use safetensors::tensor::{Dtype, TensorView};

use super::*;

/// The model with every matrix as `block` leaves it, where it has rows that fit.
fn rounded(model: &Model, block: BlockType) -> Loaded {
    let (from, to) = (model.dir.path().join("hf-f32"), model.dir.path().join(format!("rounded-{block:?}")));
    if !from.exists() {
        model.export("hf:f32");
    }
    std::fs::create_dir(&to).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let file = TensorFile::open(&from).unwrap();
    let mut tensors = vec![];
    for name in file.names() {
        let (shape, mut values) = (file.shape(name).unwrap().to_vec(), file.f32(name).unwrap());
        if shape.len() == 2 {
            let block = match block {
                BlockType::Q4_K if shape[1] % 256 != 0 => BlockType::Q5_0,
                BlockType::Q6_K if shape[1] % 256 != 0 => BlockType::Q8_0,
                block => block,
            };
            let mut bytes = vec![];
            block.quantize(&values, shape[1], &mut bytes).unwrap();
            block.dequantize(&bytes, &mut values).unwrap();
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((name.to_owned(), shape, bytes));
    }
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    load(&to, &Backend::NdArray.device().unwrap()).unwrap()
}

/// Where the most likely token is so by more than `margin`, both say the same.
#[track_caller]
fn same_choices(got: &[f32], want: &[f32], vocab: usize, margin: f32) {
    let best = |row: &[f32]| {
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        (order[0], row[order[0]] - row[order[1]])
    };
    let mut clear = 0;
    for (i, (got, want)) in got.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
        let (token, lead) = best(want);
        if lead > margin {
            clear += 1;
            assert_eq!(best(got).0, token, "after {i} tokens");
        }
    }
    assert!(clear > 3, "only {clear} tokens are clear");
}

#[track_caller]
fn floats_are_equal(model: &Model, most: f32) {
    let answer = model.ask("llama", &model.export("gguf:f32").path);
    same_tokens(model, &answer, true);
    let far = difference(&floats(&answer["logits"]), &logits(&model.loaded, &model.ids));
    println!("f32: {far:e}");
    assert!(far < most, "{far}");
    assert_eq!(ints(&answer["greedy"]), greedy(&model.loaded, &model.ids));
}

/// llama.cpp multiplies with activations in f16, bf16 or 8 bits: that is most of the difference.
#[track_caller]
fn rounded_are_close(model: &Model, kinds: &[(&str, f32)]) {
    let vocab = model.loaded.model.config().vocab_size;
    for (kind, most) in kinds {
        let block = BlockType::ALL.into_iter().find(|block| block.name().eq_ignore_ascii_case(kind)).unwrap();
        let answer = model.ask("llama", &model.export(&format!("gguf:{kind}")).path);
        let (got, want) = (floats(&answer["logits"]), logits(&rounded(model, block), &model.ids));
        let far = difference(&got, &want);
        println!("{kind}: {far:e}, weights alone {:e}", difference(&want, &logits(&model.loaded, &model.ids)));
        assert!(far < *most, "{kind}: {far}");
        same_choices(&got, &want, vocab, 2.0 * most);
    }
}

const KINDS: [(&str, f32); 9] = [
    ("f16", 0.02),
    ("bf16", 0.1),
    ("q8_0", 0.3),
    ("q6_k", 0.2),
    ("q5_1", 0.2),
    ("q5_0", 0.2),
    ("q4_1", 0.2),
    ("q4_0", 0.2),
    ("q4_k", 0.2),
];

#[test]
fn llama_is_the_same_in_llama_cpp() {
    let model = Model::llama();
    floats_are_equal(&model, 1e-4);
    rounded_are_close(&model, &KINDS);
}

#[test]
fn qwen3_is_the_same_in_llama_cpp() {
    let model = Model::qwen3();
    floats_are_equal(&model, 1e-4);
    rounded_are_close(&model, &[KINDS[0], KINDS[2], KINDS[8]]);
}

#[test]
fn experts_are_the_same_in_llama_cpp() {
    for qk_norm in [false, true] {
        let model = Model::experts(qk_norm);
        floats_are_equal(&model, 1e-4);
        rounded_are_close(&model, &[KINDS[0]]);
    }
}

#[test]
fn gpt2_is_the_same_in_llama_cpp() {
    // llama.cpp looks GELU up in a table of f16.
    floats_are_equal(&Model::gpt2(), 2e-3);
}

#[test]
fn characters_are_the_same_in_llama_cpp() {
    let shape = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96", "data.tokenizer=char"];
    let model = Model::trained(&shape);
    let answer = model.ask("llama", &model.export("gguf:f32").path);
    for (text, tokens) in TEXTS[..2].iter().zip(answer["tokens"].as_array().unwrap()) {
        assert_eq!(ints(tokens), Model::tokens(&model.loaded, text), "{text:?}");
    }
    assert_eq!(answer["texts"][1], TEXTS[1]);
    assert_eq!(ints(&answer["greedy"]), greedy(&model.loaded, &model.ids));
}
