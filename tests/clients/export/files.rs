//! What CI opens: transformers, ONNX Runtime, PyPI's gguf.

use firebox::compress::gguf::Gguf;

use super::*;

#[track_caller]
fn hf(model: &Model, class: &str) {
    let exported = model.export("hf:f32");
    let answer = model.ask("hf", &exported.path);
    assert_eq!((answer["class"].as_str(), answer["dtype"].as_str()), (Some(class), Some("torch.float32")));
    same_tokens(model, &answer, false);
    let far = difference(&floats(&answer["logits"]), &logits(&model.loaded, &model.ids));
    println!("{class}: {far:e}");
    assert!(far < 1e-4, "{class}: {far}");
    assert_eq!(ints(&answer["greedy"]), greedy(&model.loaded, &model.ids), "{class}");
    // What went out comes back in.
    let back = load(&exported.path, &Backend::NdArray.device().unwrap()).unwrap();
    assert!(logits(&back, &model.ids) == logits(&model.loaded, &model.ids));
}

#[track_caller]
fn onnx(model: &Model) {
    let want = logits(&model.loaded, &model.ids);
    let exported = model.export("onnx:f32");
    let answer = model.ask("onnx", &exported.path);
    let far = difference(&floats(&answer["logits"]), &want);
    println!("onnx: {far:e}");
    assert!(far < 1e-4, "{far}");
    assert_eq!(ints(&answer["greedy"]), greedy(&model.loaded, &model.ids));
    let names: Vec<&str> = answer["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(names[..4], ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]);
    assert_eq!(
        names[names.len() - 5..],
        ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    );

    // A row with padding before it, in a batch: as without. The last id comes after the last but three.
    let n = model.ids.len();
    let short = [&model.ids[..n - 3], &[model.ids[n - 3]]].concat();
    let far = difference(&floats(&answer["padded"]), &logits(&model.loaded, &short));
    assert!(far < 1e-4, "padded: {far}");

    let small = model.export("onnx:int8");
    assert!((small.bytes as f64) < 0.6 * exported.bytes as f64, "{} of {}", small.bytes, exported.bytes);
    let answer = model.ask("onnx", &small.path);
    let far = difference(&floats(&answer["logits"]), &want);
    println!("onnx int8: {far:e}");
    assert!(far < 0.3, "int8: {far}");
}

/// What PyPI's gguf reads is what Firebox reads.
#[track_caller]
fn gguf(model: &Model, architecture: &str) {
    for kind in ["f32", "q8_0", "q4_k"] {
        let exported = model.export(&format!("gguf:{kind}"));
        let answer = model.ask("gguf", &exported.path);
        assert_eq!(answer["metadata"]["general.architecture"], architecture);
        let file = Gguf::open(&exported.path).unwrap();
        let mut formats = vec![];
        for info in file.tensors() {
            let theirs = &answer["tensors"][&info.name];
            assert_eq!(theirs["shape"], json!(info.shape), "{}", info.name);
            assert_eq!(theirs["type"], info.format.name());
            let values: Vec<f64> = file.values(&info.name).unwrap().into_iter().map(f64::from).collect();
            let weighted = values.iter().enumerate().map(|(i, x)| i as f64 * x);
            let sums = [values.iter().sum(), values.iter().map(|x| x.abs()).sum::<f64>(), weighted.sum()];
            for (got, want) in theirs["sums"].as_array().unwrap().iter().zip(sums) {
                let got = got.as_f64().unwrap();
                assert!((got - want).abs() <= 1e-6 * want.abs().max(1.0), "{}: {got}, {want}", info.name);
            }
            formats.push(info.format);
        }
        assert_eq!(formats.len(), answer["tensors"].as_object().unwrap().len());
        let fallbacks: Vec<_> = exported.fallbacks.iter().map(|(_, format)| *format).collect();
        assert!(fallbacks.iter().all(|format| formats.contains(format)));
    }
}

#[test]
fn llama_models_are_opened() {
    let model = Model::llama();
    hf(&model, "LlamaForCausalLM");
    // transformers computes in the type of the weights.
    for (target, dtype, most) in [("hf:f16", "torch.float16", 0.02), ("hf:bf16", "torch.bfloat16", 0.15)] {
        let answer = model.ask("hf", &model.export(target).path);
        assert_eq!(answer["dtype"], dtype);
        let far = difference(&floats(&answer["logits"]), &logits(&model.loaded, &model.ids));
        println!("{target}: {far:e}");
        assert!(far < most, "{target}: {far}");
    }
    onnx(&model);
    gguf(&model, "llama");
}

#[test]
fn qwen3_models_are_opened() {
    let model = Model::qwen3();
    hf(&model, "Qwen3ForCausalLM");
    onnx(&model);
    gguf(&model, "qwen3");
    let small = model.export("gguf:q6_k");
    assert!(small.fallbacks.iter().any(|(name, format)| name == "token_embd.weight" && format.name() == "Q8_0"));
}

#[test]
fn gpt2_models_are_opened() {
    let model = Model::gpt2();
    hf(&model, "GPT2LMHeadModel");
    onnx(&model);
    gguf(&model, "gpt2");
}

#[test]
fn experts_are_opened() {
    let model = Model::experts(true);
    onnx(&model);
    gguf(&model, "qwen3moe");
}

#[test]
fn onnx_has_words_for_what_others_have_not() {
    let bounds =
        ["model.attention_softcap=3", "model.logit_softcap=6", "model.window=7", "model.feed_forward=gelu_exact"];
    let shape = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96", "model.bias=true"];
    let model = Model::trained(&[&bounds[..], &shape].concat());
    let run = model.dir.path().join("run");
    for (target, format) in [("hf", "Hugging Face"), ("gguf", "GGUF")] {
        let error = export(&run, target.parse().unwrap(), model.dir.path().join("refused")).unwrap_err().to_string();
        for word in [format, "attention_softcap", "logit_softcap", "GELU", "biases", "--format onnx"] {
            assert!(error.contains(word), "{error}");
        }
        assert!(!model.dir.path().join("refused").exists());
    }
    onnx(&model);
}
