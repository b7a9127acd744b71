//! ViT and CLIP as transformers saves them (`golden/vision.py`): they load with its outputs, and their tensors go out as they came.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use firebox::models::transformer::Transformer;
use firebox::models::{Extra, Staged, TokenBatch};
use firebox::tensor::device::Backend;
use firebox::tensor::ops::Sequence;
use firebox::train::checkpoint::TensorFile;
use firebox::train::export::export;
use firebox::train::import::import;
use firebox::train::model_io::{load, to_host};
use firebox::train::task::{Model, load_clip};
use firebox_tests::golden;
use safetensors::tensor::TensorView;

/// transformers' own error in f32 is a tenth of this.
const TOLERANCE: f64 = 1e-5;

/// What is in a file besides the model's tensors.
const SAID: [&str; 9] =
    ["pixels", "logits", "hidden", "input_ids", "lengths", "text_embeds", "image_embeds", "logits_per_image", "loss"];

fn weights(file: &TensorFile) -> Vec<String> {
    let of_model = |name: &&str| !SAID.contains(name) && !name.starts_with("grad.");
    file.names().filter(of_model).map(String::from).collect()
}

/// The golden model as a folder.
fn folder(dir: &Path, name: &str) -> TensorFile {
    let file = TensorFile::open(golden(&format!("{name}.safetensors"))).unwrap();
    fs::create_dir(dir).unwrap();
    fs::copy(golden(&format!("{name}.json")), dir.join("config.json")).unwrap();
    let views: HashMap<String, TensorView<'_>> = weights(&file)
        .into_iter()
        .map(|name| {
            let (dtype, shape) = (file.dtype(&name).unwrap(), file.shape(&name).unwrap().to_vec());
            let view = TensorView::new(dtype, shape, file.bytes(&name).unwrap()).unwrap();
            (name, view)
        })
        .collect();
    safetensors::serialize_to_file(&views, None, &dir.join("model.safetensors")).unwrap();
    file
}

/// How far values are from those of a golden tensor, to the largest of them.
fn distance(got: &[f32], file: &TensorFile, name: &str) -> f64 {
    let want = file.f32(name).unwrap();
    assert_eq!(got.len(), want.len(), "{name}");
    let size = want.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
    got.iter().zip(&want).fold(0f64, |most, (g, w)| most.max(f64::from((g - w).abs()))) / size
}

#[track_caller]
fn assert_near(got: Vec<f32>, file: &TensorFile, name: &str) {
    let off = distance(&got, file, name);
    println!("{name}: {off:.1e} off");
    assert!(off < TOLERANCE, "{name}: {off:.1e} off");
}

fn ints(file: &TensorFile, name: &str) -> Vec<i32> {
    file.bytes(name).unwrap().chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn of_pixels(file: &TensorFile, sequence: Sequence, inputs: Vec<i32>) -> TokenBatch {
    let rows = sequence.batch();
    let mut batch = TokenBatch::new(inputs.clone(), vec![-1; inputs.len()], sequence);
    batch.loss_scale = 1.0 / rows as f64;
    batch.extra = Some(Arc::new(Extra { pixels: file.f32("pixels").unwrap(), ..Extra::default() }));
    batch
}

fn images(model: &Transformer, file: &TensorFile) -> TokenBatch {
    let tokens = model.config().context;
    of_pixels(file, Sequence::padded(tokens, &[tokens; 2]), vec![0; 2 * tokens])
}

#[test]
fn vision_transformers_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    for name in ["vit-classes", "vit-hidden"] {
        let from = dir.path().join(name);
        let file = folder(&from, name);
        let [imported, again] = ["imported", "again"].map(|of| dir.path().join(format!("{name}-{of}")));
        import(from.to_str().unwrap(), None, &imported).unwrap();
        export(&imported, "hf:same".parse().unwrap(), &again).unwrap();
        for at in [&from, &imported, &again] {
            let model = load(at, &device).unwrap().model;
            let batch = images(&model, &file);
            match name {
                "vit-classes" => assert_near(to_host(model.row_logits(&batch)), &file, "logits"),
                _ => assert_near(to_host(model.hidden(&batch)), &file, "hidden"),
            }
            let there = TensorFile::open(at).unwrap();
            for tensor in weights(&file) {
                assert!(there.bytes(&tensor).unwrap() == file.bytes(&tensor).unwrap(), "{name} {tensor}");
            }
            assert_eq!(there.len(), weights(&file).len());
        }
        let model = load(&from, &device).unwrap().model;
        assert_eq!(model.config().labels.first().map(String::as_str), (name == "vit-classes").then_some("ape"));
    }
}

#[test]
fn clip_is_that_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("clip");
    let file = folder(&from, "clip");
    let device = Backend::NdArray.device().unwrap().autodiff();
    let model = load_clip(&from, &device).unwrap().model;
    let lengths: Vec<usize> = ints(&file, "lengths").iter().map(|n| *n as usize).collect();
    let tokens = 7;
    let segments: Vec<i32> = lengths.iter().flat_map(|&n| (0..tokens).map(move |i| i32::from(i >= n))).collect();
    let positions = (0..3).flat_map(|_| 0..tokens as i32).collect();
    let batch = of_pixels(&file, Sequence::new(3, tokens, positions, &segments), ints(&file, "input_ids"));
    let (images, texts) = (model.image_embeds(&batch), model.text_embeds(&batch));
    assert_near(to_host(images.clone()), &file, "image_embeds");
    assert_near(to_host(texts.clone()), &file, "text_embeds");
    assert_near(to_host(images.matmul(texts.transpose()) * model.factor().unsqueeze::<2>()), &file, "logits_per_image");
    let loss = model.loss(&batch, Some(0));
    assert_near(to_host(loss.clone()), &file, "loss");
    let grads = loss.backward();
    let grad = model.scale.val().grad(&grads).unwrap();
    assert_near(to_host(grad), &file, "grad.logit_scale");
    for (ours, theirs) in [(&model.text_proj, "text_projection"), (&model.image_proj, "visual_projection")] {
        let grad = ours.val().grad(&grads).unwrap().transpose();
        assert_near(to_host(grad), &file, &format!("grad.{theirs}.weight"));
    }
    // What would be written are the tensors that came.
    let params: HashMap<String, Vec<f32>> =
        firebox::train::model_io::parameters(&model).into_iter().map(|(name, value)| (name, to_host(value))).collect();
    let (mut written, entries) = (vec![], model.entries());
    for entry in &entries {
        for piece in &entry.pieces {
            assert_eq!(file.shape(&piece.name).unwrap(), piece.shape, "{}", piece.name);
            assert_eq!(entry.split(&params[&entry.param], piece), file.f32(&piece.name).unwrap(), "{}", piece.name);
            written.push(piece.name.clone());
        }
    }
    let mut there = weights(&file);
    written.sort();
    there.sort();
    assert_eq!(written, there);
    let again = firebox::models::clip::hf::parse(&model.config_json()).unwrap();
    assert_eq!(again, *model.config());
}

#[test]
fn a_wrong_config_is_said_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let mut number = 0;
    let mut with = |name: &str, part: &str, key: &str, value: serde_json::Value| {
        number += 1;
        let from = dir.path().join(number.to_string());
        folder(&from, name);
        let path = from.join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let at = if part.is_empty() { &mut json } else { &mut json[part] };
        at[key] = value;
        fs::write(&path, json.to_string()).unwrap();
        let error = match name {
            "clip" => load_clip(&from, &device).err().map(|error| error.to_string()),
            _ => load(&from, &device).err().map(|error| error.to_string()),
        };
        error.unwrap_or_else(|| panic!("{key} was taken"))
    };
    for (name, part, key, value) in [
        ("vit-classes", "", "patch_size", serde_json::json!(5)),
        ("vit-classes", "", "patch_size", serde_json::json!(0)),
        ("vit-classes", "", "num_channels", serde_json::json!(2)),
        ("vit-classes", "", "hidden_act", serde_json::json!("relu")),
        ("vit-classes", "", "qkv_bias", serde_json::json!(false)),
        ("clip", "vision_config", "patch_size", serde_json::json!(0)),
        ("clip", "vision_config", "image_size", serde_json::json!(1u64 << 40)),
        ("clip", "text_config", "hidden_act", serde_json::json!("relu")),
        ("clip", "text_config", "num_attention_heads", serde_json::json!(5)),
        ("clip", "", "projection_dim", serde_json::json!(21)),
    ] {
        let error = with(name, part, key, value.clone());
        assert!(!error.contains('\n') && error.len() < 1500, "{key} = {value}: {error}");
    }
}
