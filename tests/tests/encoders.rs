//! Encoders as transformers saves them (`golden/encoders.py`): they load with its hidden states and logits, with padding and token types; what goes out again is what came in.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use firebox::models::transformer::hf::Family;
use firebox::models::transformer::{Head, Pool, Pooler, Transformer};
use firebox::models::{Extra, TokenBatch};
use firebox::tensor::device::Backend;
use firebox::tensor::ops::Sequence;
use firebox::train::checkpoint::TensorFile;
use firebox::train::export::export;
use firebox::train::import::import;
use firebox::train::model_io::{load, to_host};
use firebox_tests::golden;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const FAMILIES: [(&str, Family); 4] = [
    ("bert", Family::Bert),
    ("roberta", Family::Roberta),
    ("distilbert", Family::DistilBert),
    ("albert", Family::Albert),
];
/// What f32 makes of two layers; transformers' own error is as large.
const CLOSE: f64 = 2e-6;

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

struct Lab {
    dir: tempfile::TempDir,
    file: TensorFile,
    family: &'static str,
    configs: Value,
}

impl Lab {
    fn new(family: &'static str) -> Self {
        let configs = fs::read(golden(&format!("encoder-{family}.json"))).unwrap();
        let file = TensorFile::open(golden(&format!("encoder-{family}.safetensors"))).unwrap();
        let configs = serde_json::from_slice(&configs).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), file, family, configs }
    }

    fn cases(&self) -> Vec<String> {
        self.configs.as_object().unwrap().keys().cloned().collect()
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        let bytes = self.file.bytes(name).unwrap_or_default();
        bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The tensors as the class of this case saves them.
    fn tensors(&self, case: &str) -> Tensors {
        let base = if case == "hidden" { String::new() } else { format!("{}.", self.family) };
        let name = |name: &str| match name.split_once(':') {
            Some((other, head)) if other == case && head != "output" => Some(head.to_owned()),
            None if name.contains('.') => Some(format!("{base}{name}")),
            _ => None,
        };
        let tensor = |old: &str| {
            let (dtype, shape) = (self.file.dtype(old).unwrap(), self.file.shape(old).unwrap().to_vec());
            Some((name(old)?, dtype, shape, self.file.bytes(old).unwrap().to_vec()))
        };
        self.file.names().filter_map(tensor).collect()
    }

    fn folder(&self, to: &str, case: &str, tensors: &Tensors) -> PathBuf {
        let dir = self.dir.path().join(to);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("config.json"), self.configs[case].to_string()).unwrap();
        let view = |(name, dtype, shape, bytes): &'_ (String, Dtype, Vec<usize>, Vec<u8>)| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).map(|view| view.data().to_vec()).unwrap())
        };
        let data: HashMap<String, Vec<u8>> = tensors.iter().map(view).collect();
        let views: HashMap<&String, TensorView<'_>> = tensors
            .iter()
            .map(|(name, dtype, shape, _)| (name, TensorView::new(*dtype, shape.clone(), &data[name]).unwrap()))
            .collect();
        safetensors::serialize_to_file(&views, None, &dir.join("model.safetensors")).unwrap();
        dir
    }

    fn batch(&self) -> TokenBatch {
        let lengths: Vec<usize> = self.ints("lengths").into_iter().map(|n| n as usize).collect();
        let ids = self.ints("input_ids");
        let tokens = ids.len() / lengths.len();
        let mut batch = TokenBatch::new(ids, vec![-1; tokens * lengths.len()], Sequence::padded(tokens, &lengths));
        batch.extra = Some(Arc::new(Extra { token_types: self.ints("token_type_ids"), ..Extra::default() }));
        batch
    }

    /// How far what the model at `path` gives is from transformers', to the largest of it.
    fn distance(&self, path: &Path, case: &str) -> f64 {
        let model = load(path, &Backend::NdArray.device().unwrap()).unwrap().model;
        let got = outputs(&model, &self.batch());
        let want = self.file.f32(&format!("{case}:output")).unwrap();
        assert_eq!(got.len(), want.len(), "{} {case}", self.family);
        let size = want.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
        // The golden values are 0 for padding, of which nobody asks.
        let per_row = case == "classes" || case == "values";
        let [rows, tokens] = [self.ints("lengths").len(), self.ints("input_ids").len()];
        let width = got.len() / if per_row { rows } else { tokens };
        let row = tokens / rows;
        let known = |i: usize| per_row || (i / width) % row < self.ints("lengths")[i / width / row] as usize;
        let off = got.iter().zip(&want).enumerate().filter(|(i, _)| known(*i));
        off.fold(0f64, |most, (_, (g, w))| most.max(f64::from((g - w).abs()))) / size
    }
}

fn outputs(model: &Transformer, batch: &TokenBatch) -> Vec<f32> {
    match model.config().head {
        Head::Masked | Head::TokenClasses { .. } => to_host(model.token_logits(batch)),
        Head::Classes { .. } | Head::Values { .. } => to_host(model.row_logits(batch)),
        _ => to_host(model.hidden(batch)),
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn outputs_are_transformers_and_tensors_go_out_as_they_came() {
    for (name, family) in FAMILIES {
        let lab = Lab::new(name);
        for case in lab.cases() {
            let tensors = lab.tensors(&case);
            let folder = lab.folder(&case, &case, &tensors);
            let model = load(&folder, &Backend::NdArray.device().unwrap()).unwrap().model;
            let config = model.config();
            let pooler = if name == "distilbert" { Pooler::Relu } else { Pooler::Tanh };
            let head = match &case[..] {
                "hidden" => Head::Hidden,
                "masked" | "pretraining" => Head::Masked,
                "classes" => Head::Classes { n: 3, pooler },
                "values" => Head::Values { n: 1, pooler },
                _ => Head::TokenClasses { n: 5 },
            };
            assert_eq!((config.head, Family::of(config)), (head, family), "{name} {case}");
            let labels = if case == "classes" { vec!["ham", "spam", "neither"] } else { vec![] };
            assert_eq!(config.labels, labels, "{name} {case}");
            let off = lab.distance(&folder, &case);
            println!("{name} {case}: {off:.1e} off");
            assert!(off < CLOSE, "{name} {case}: {off:.1e} off");

            let [imported, again] = ["imported", "again"].map(|step| lab.dir.path().join(format!("{step}-{case}")));
            import(folder.to_str().unwrap(), None, &imported).unwrap();
            export(&imported, "hf:same".parse().unwrap(), &again).unwrap();
            for dir in [&imported, &again] {
                let file = TensorFile::open(dir).unwrap();
                assert_eq!(file.len(), tensors.len(), "{name} {case}: BERT's pooler too");
                for (tensor, dtype, shape, bytes) in &tensors {
                    assert_eq!((file.dtype(tensor).unwrap(), file.shape(tensor).unwrap()), (*dtype, &shape[..]));
                    assert!(file.bytes(tensor).unwrap() == bytes, "{name} {case} {tensor}");
                }
                assert_eq!(json(&dir.join("config.json")), json(&folder.join("config.json")), "{name} {case}");
            }
            assert_eq!(lab.distance(&again, &case), off, "{name} {case}");
        }
    }
}

/// What a run writes of them: its `config.json` is what transformers' class with that head reads, and Firebox itself.
#[test]
fn configs_that_firebox_writes_are_read_again() {
    for (name, family) in FAMILIES {
        let lab = Lab::new(name);
        for case in lab.cases() {
            let folder = lab.folder(&case, &case, &lab.tensors(&case));
            let model = load(&folder, &Backend::NdArray.device().unwrap()).unwrap().model;
            let written = family.config_json(model.config());
            for key in ["architectures", "model_type", "max_position_embeddings", "id2label", "vocab_size"] {
                let case_ending = if case == "pretraining" && key == "architectures" { "ForMaskedLM" } else { "" };
                let want = &lab.configs[&case][key];
                assert!(
                    written[key] == *want || written[key].to_string().contains(case_ending) && !case_ending.is_empty(),
                    "{name} {case} {key}"
                );
            }
            fs::write(folder.join("config.json"), written.to_string()).unwrap();
            let again = load(&folder, &Backend::NdArray.device().unwrap()).unwrap().model;
            assert_eq!(again.config(), model.config(), "{name} {case}");
        }
    }
}

#[test]
fn names_are_as_on_the_hub_and_as_they_were() {
    for (name, _) in FAMILIES {
        let lab = Lab::new(name);
        for case in ["hidden", "masked"] {
            let tensors = lab.tensors(case);
            let off = lab.distance(&lab.folder(&format!("{case}-plain"), case, &tensors), case);
            // Norms as TensorFlow named them, a buffer, and the tied decoder and its bias once more.
            let base = format!("{name}.");
            let mut old: Tensors = tensors
                .iter()
                .map(|(tensor, dtype, shape, bytes)| {
                    let norm = tensor.to_lowercase().contains("norm");
                    let name = match (norm, tensor.rsplit_once('.').unwrap()) {
                        (true, (part, "weight")) => format!("{part}.gamma"),
                        (true, (part, "bias")) => format!("{part}.beta"),
                        _ => tensor.clone(),
                    };
                    let name = match case {
                        "hidden" => format!("{base}{name}"),
                        _ => name.trim_start_matches(&base).to_owned(),
                    };
                    (name, *dtype, shape.clone(), bytes.clone())
                })
                .collect();
            let positions: Vec<u8> = (0..24i64).flat_map(i64::to_le_bytes).collect();
            old.push(("embeddings.position_ids".into(), Dtype::I64, vec![1, 24], positions));
            let copy = |of: &str, to: &str| {
                let (_, dtype, shape, bytes) = tensors.iter().find(|(name, ..)| name.ends_with(of)).unwrap();
                (to.to_owned(), *dtype, shape.clone(), bytes.clone())
            };
            let decoder = match name {
                "bert" => "cls.predictions.decoder",
                "roberta" => "lm_head.decoder",
                "distilbert" => "vocab_projector",
                _ => "predictions.decoder",
            };
            if case == "masked" {
                old.push(copy("word_embeddings.weight", &format!("{decoder}.weight")));
                if name != "distilbert" {
                    let bias = decoder.replace("decoder", "bias");
                    old.push(copy(&bias, &format!("{decoder}.bias")));
                }
            }
            assert_eq!(lab.distance(&lab.folder(&format!("{case}-old"), case, &old), case), off, "{name} {case}");
        }
    }
}

/// Without `architectures`, and as sentence-transformers has it: rows become vectors as the files beside the model say, and go out with these.
#[test]
fn folders_of_sentence_transformers_are_models_of_embeddings() {
    let lab = Lab::new("bert");
    let tensors = lab.tensors("hidden");
    let folder = lab.folder("sentences", "hidden", &tensors);
    let mut config = lab.configs["hidden"].clone();
    config.as_object_mut().unwrap().remove("architectures");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let head =
        |folder: &Path| load(folder, &Backend::NdArray.device().unwrap()).map(|loaded| loaded.model.config().head);
    assert_eq!(head(&folder).unwrap(), Head::Hidden);

    let module =
        |kind: &str, path: &str| json!({ "type": format!("sentence_transformers.models.{kind}"), "path": path });
    let modules = |list: Value| fs::write(folder.join("modules.json"), list.to_string()).unwrap();
    fs::create_dir(folder.join("1_Pooling")).unwrap();
    let pooling = |value: Value| fs::write(folder.join("1_Pooling/config.json"), value.to_string()).unwrap();
    let plain = [module("Transformer", ""), module("Pooling", "1_Pooling")];
    modules(json!([plain[0], plain[1], module("Normalize", "2_Normalize")]));
    pooling(
        json!({ "word_embedding_dimension": 16, "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false }),
    );
    let Head::Embedding { pool: Pool::Mean, normalize: true, .. } = head(&folder).unwrap() else {
        panic!("{:?}", head(&folder))
    };
    modules(json!(plain));
    pooling(json!({ "pooling_mode_cls_token": true }));
    let Head::Embedding { pool: Pool::First, normalize: false, .. } = head(&folder).unwrap() else {
        panic!("{:?}", head(&folder))
    };
    let imported = lab.dir.path().join("imported");
    import(folder.to_str().unwrap(), None, &imported).unwrap();
    assert_eq!(head(&imported).unwrap(), head(&folder).unwrap());
    assert_eq!(json(&imported.join("1_Pooling/config.json")), json!({ "pooling_mode_cls_token": true }));
    assert_eq!(TensorFile::open(&imported).unwrap().len(), tensors.len());

    for (value, word) in [
        (json!({ "pooling_mode_max_tokens": true }), "pooling_mode_max_tokens"),
        (json!({ "pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true }), "pooling_mode_max_tokens"),
        (json!({}), "pooling_mode_mean_tokens"),
        (json!([]), "1_Pooling"),
    ] {
        pooling(value);
        let error = head(&folder).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    pooling(json!({ "pooling_mode_cls_token": true }));
    for (list, word) in [
        (json!([plain[0], plain[1], module("Dense", "2_Dense")]), "Dense"),
        (json!([plain[0], module("Pooling", "../elsewhere")]), "../elsewhere"),
        (json!({}), "modules.json"),
    ] {
        modules(list);
        let error = head(&folder).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_is_not_supported_is_said() {
    let cases: [(&str, &str, Value, &str); 12] = [
        ("bert", "hidden_act", json!("relu"), "hidden_act"),
        ("bert", "position_embedding_type", json!("relative_key"), "relative_key"),
        ("bert", "is_decoder", json!(true), "is_decoder"),
        ("bert", "num_attention_heads", json!(5), "num_attention_heads"),
        ("bert", "architectures", json!(["BertForQuestionAnswering"]), "...ForTokenClassification"),
        ("bert", "type_vocab_size", json!("two"), "type_vocab_size"),
        ("roberta", "hidden_act", json!("gelu_new"), "gelu_new"),
        ("roberta", "pad_token_id", json!(40), "max_position_embeddings"),
        ("distilbert", "activation", json!("relu"), "activation"),
        ("albert", "inner_group_num", json!(2), "inner_group_num"),
        ("albert", "num_hidden_groups", json!(3), "num_hidden_groups"),
        ("albert", "embedding_size", json!(16), "embedding_size"),
    ];
    for (name, key, value, word) in cases {
        let lab = Lab::new(name);
        let folder = lab.folder("folder", "hidden", &lab.tensors("hidden"));
        let mut config = lab.configs["hidden"].clone();
        config[key] = value;
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let error = load(&folder, &Backend::NdArray.device().unwrap()).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(word), "{error}");
    }
    let lab = Lab::new("bert");
    let mut config = lab.configs["classes"].clone();
    let folder = lab.folder("folder", "classes", &lab.tensors("classes"));
    let error = |config: &Value| {
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        load(&folder, &Backend::NdArray.device().unwrap()).unwrap_err().to_string()
    };
    config["id2label"] = json!({ "0": "a", "2": "b", "3": "c" });
    assert!(error(&config).contains("none for 1"));
    config["id2label"] = json!({ "0": "a", "1": "b" });
    assert!(error(&config).contains("[3, 16]"), "a classifier of three classes");
    config["problem_type"] = json!("multi_label_classification");
    assert!(error(&config).contains("multi_label_classification"));
    // Other programs have causal decoders.
    for (format, word) in [("gguf:f16", "GGUF"), ("onnx", "ONNX")] {
        let folder = lab.folder(word, "masked", &lab.tensors("masked"));
        let error = export(&folder, format.parse().unwrap(), lab.dir.path().join("out")).unwrap_err();
        assert!(
            error.is_input() && error.to_string().contains(word) && error.to_string().contains("encoder"),
            "{error}"
        );
    }
    assert!(!lab.dir.path().join("out").exists());
}
