//! GGUF files that PyPI's `gguf` wrote (`golden/gguf_files.py`): the logits are those of transformers, the tokens those of who made the tokenizers; and what is broken is an error.
#![allow(clippy::unwrap_used)]

use std::fs;

use firebox::data::Tokenizer;
use firebox::models::TokenBatch;
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::TensorFile;
use firebox::train::import::import;
use firebox::train::model_io::{Loaded, load, to_host};
use firebox_tests::golden;
use serde_json::Value;

/// Of the largest logit. transformers computes in f32 as well.
const LOGITS: f32 = 1e-5;

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u64> {
    tokenizer.encode(text.as_bytes()).unwrap().into_iter().map(u64::from).collect()
}

#[test]
fn files_of_llama_cpp_are_transformers_models() {
    let device = Backend::NdArray.device().unwrap();
    let goldens = TensorFile::open(golden("gguf-files.safetensors")).unwrap();
    let about: Value = serde_json::from_str(goldens.metadata()["firebox"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in ["types", "llama3"] {
        let file = golden(&format!("gguf-{name}.gguf"));
        let folder = dir.path().join(name);
        import(file.to_str().unwrap(), None, &folder).unwrap();
        let key = format!("{name}.input_ids");
        let inputs: Vec<i32> = bytes_to_i32(goldens.bytes(&key).unwrap());
        let want = goldens.f32(&format!("{name}.logits")).unwrap();
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        for path in [&file, &folder] {
            let Loaded { model, tokenizer, .. } = load(path, &device).unwrap();
            let n = inputs.len();
            let got = to_host(model.logits(&TokenBatch::plain(1, n, inputs.clone(), vec![-1; n])));
            let off = got.iter().zip(&want).fold(0f32, |most, (g, w)| most.max((g - w).abs())) / largest;
            println!("{}: {off:.1e}", path.display());
            assert!(got.len() == want.len() && off < LOGITS, "{}: {off}", path.display());

            let tokenizer = tokenizer.unwrap();
            for (text, want) in about["texts"].as_array().unwrap().iter().zip(about["ids"][name].as_array().unwrap()) {
                // sentencepiece replaces other characters before it divides a text, of which a GGUF file says nothing.
                if name == "llama3" && !text.as_str().unwrap().is_ascii() {
                    continue;
                }
                let (text, want): (&str, Vec<u64>) =
                    (text.as_str().unwrap(), want.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect());
                assert_eq!(ids(&tokenizer, text), want, "{name}: {text:?}");
                // Whether texts begin with a token, the file says.
                let begins = name == "llama3";
                let whole = tokenizer.encode_whole(text, None).unwrap().ids;
                assert_eq!(whole.len(), want.len() + usize::from(begins), "{name}: {text:?}");
                assert!(!begins || whole[0] == 1);
            }
        }
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], name == "llama3");
        assert_eq!(config["bos_token_id"], 1);
    }
    let template = fs::read_to_string(dir.path().join("types/chat_template.jinja")).unwrap();
    assert_eq!(Value::from(template), about["chat"]);
}

fn bytes_to_i32(bytes: &[u8]) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect()
}

/// Where a key of the metadata has its value, behind its type.
fn value_of(file: &[u8], key: &str) -> usize {
    let at = file.windows(key.len()).position(|bytes| bytes == key.as_bytes()).unwrap();
    at + key.len() + 4
}

#[test]
fn what_is_broken_is_an_error_and_takes_no_memory() {
    let device = Backend::NdArray.device().unwrap();
    let good = fs::read(golden("gguf-llama3.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.gguf");
    let error = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        load(&path, &device).unwrap_err().to_string()
    };
    // Cut off anywhere; what follows the last tensor only fills up.
    for n in (0..good.len() - 64).step_by(997) {
        let said = error(&good[..n]);
        assert!(said.contains("broken.gguf") && !said.contains('\n'), "cut at {n}: {said}");
    }
    // Counts of billions, of what the file has a few.
    let u32_at = |key: &str| value_of(&good, key);
    for key in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.key_length",
        "llama.context_length",
        "llama.rope.dimension_count",
    ] {
        for claim in [0u32, 0x7fff_fff0, u32::MAX] {
            let mut bytes = good.clone();
            bytes[u32_at(key)..][..4].copy_from_slice(&claim.to_le_bytes());
            let said = error(&bytes);
            assert!(!said.is_empty() && said.len() < 4000, "{key} = {claim}: {said}");
        }
    }
    // Any byte of the head may be another: the file is another one, or an error, and nothing panics.
    let mut state = 1u64;
    for _ in 0..400 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (at, flip) = ((state >> 33) as usize % 9_300, (state >> 20) as u8 | 1);
        let mut bytes = good.clone();
        bytes[at] ^= flip;
        fs::write(&path, &bytes).unwrap();
        drop(load(&path, &device));
    }
    // Another architecture, and another tokenizer: what there is, is named.
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = good.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut bytes = good.clone();
        bytes[at..][..to.len()].copy_from_slice(to.as_bytes());
        error(&bytes)
    };
    let said = replaced("llama", "mamba");
    assert!(said.contains("mamba") && said.contains("qwen2"), "{said}");
}
