//! Models as transformers saves them (`golden/imported.py`): they load with its logits, in one file or several, with and without prefixes; what goes out again is what came in.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use firebox::data::Tokenizer;
use firebox::models::TokenBatch;
use firebox::models::transformer::{Transformer, TransformerConfig};
use firebox::tensor::device::Backend;
use firebox::train::checkpoint::{Dtype, TensorFile};
use firebox::train::export::export;
use firebox::train::import::import;
use firebox::train::model_io::{load, to_host};
use firebox_tests::golden;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const NAMES: [&str; 6] = ["gpt2", "llama3", "llama-linear", "qwen2", "qwen3", "mistral"];
/// transformers' own error in f32 is a tenth of this.
const LOGITS: f64 = 1e-5;

struct Lab {
    dir: tempfile::TempDir,
    file: TensorFile,
    name: &'static str,
}

impl Lab {
    fn new(name: &'static str) -> Self {
        let file = TensorFile::open(golden(&format!("import-{name}.safetensors"))).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), file, name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn weights(&self) -> Vec<String> {
        self.file.names().filter(|name| name.contains('.')).map(String::from).collect()
    }

    /// A folder with these tensors under the names that `rename` gives them, in as many files.
    fn folder(&self, to: &str, files: usize, rename: impl Fn(&str) -> String) -> PathBuf {
        let dir = self.path(to);
        fs::create_dir(&dir).unwrap();
        fs::copy(golden(&format!("import-{}.json", self.name)), dir.join("config.json")).unwrap();
        let mut map = BTreeMap::new();
        for part in 0..files {
            let file = match files {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", part + 1),
            };
            let names = self.weights();
            let names = names.iter().enumerate().filter(|(i, _)| i % files == part).map(|(_, name)| name);
            let view = |name: &String| {
                let (dtype, shape) = (self.file.dtype(name).unwrap(), self.file.shape(name).unwrap().to_vec());
                (rename(name), TensorView::new(dtype, shape, self.file.bytes(name).unwrap()).unwrap())
            };
            let views: HashMap<String, TensorView<'_>> = names.map(view).collect();
            map.extend(views.keys().map(|name| (name.clone(), file.clone())));
            safetensors::serialize_to_file(&views, None, &dir.join(&file)).unwrap();
        }
        if files > 1 {
            let index = json!({ "metadata": {}, "weight_map": map });
            fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        dir
    }

    /// How far the logits of the model at `path` are from transformers', to the largest of them.
    fn distance(&self, path: &Path) -> f64 {
        let model = load(path, &Backend::NdArray.device().unwrap()).unwrap().model;
        let ids = self.file.bytes("input_ids").unwrap();
        let ids: Vec<i32> = ids.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let n = ids.len();
        let got = to_host(model.logits(&TokenBatch::plain(1, n, ids, vec![-1; n])));
        let want = self.file.f32("logits").unwrap();
        let size = want.iter().fold(0f64, |most, x| most.max(f64::from(x.abs())));
        got.iter().zip(&want).fold(0f64, |most, (g, w)| most.max(f64::from((g - w).abs()))) / size
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn logits_are_transformers_and_tensors_go_out_as_they_came() {
    for name in NAMES {
        let lab = Lab::new(name);
        let folder = lab.folder("folder", 1, str::to_owned);
        let off = lab.distance(&folder);
        assert!(off < LOGITS, "{name}: logits are {off:.1e} off");
        println!("{name}: logits {off:.1e} off");
        fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": [2, 5]}").unwrap();
        fs::write(folder.join("chat_template.jinja"), "{{ messages }}").unwrap();
        let imported = lab.path("imported");
        import(folder.to_str().unwrap(), None, &imported).unwrap();
        let again = lab.path("again");
        export(&imported, "hf:same".parse().unwrap(), &again).unwrap();
        for dir in [&imported, &again] {
            let file = TensorFile::open(dir).unwrap();
            assert_eq!(file.len(), lab.weights().len(), "{name}");
            for tensor in lab.weights() {
                // GPT-2's came without a prefix, as on the hub.
                let there = if name == "gpt2" { format!("transformer.{tensor}") } else { tensor.clone() };
                assert_eq!(file.dtype(&there).unwrap(), lab.file.dtype(&tensor).unwrap(), "{name} {tensor}");
                assert!(file.bytes(&there).unwrap() == lab.file.bytes(&tensor).unwrap(), "{name} {tensor}");
            }
            assert_eq!(json(&dir.join("config.json")), json(&folder.join("config.json")), "{name}");
            for side in ["generation_config.json", "chat_template.jinja"] {
                assert_eq!(fs::read(dir.join(side)).unwrap(), fs::read(folder.join(side)).unwrap());
            }
        }
        assert_eq!(lab.distance(&again), off, "{name}");
    }
}

#[test]
fn files_and_prefixes_are_as_on_the_hub() {
    for name in ["gpt2", "llama3", "qwen2"] {
        let lab = Lab::new(name);
        let off = lab.distance(&lab.folder("one", 1, str::to_owned));
        assert_eq!(lab.distance(&lab.folder("three", 3, str::to_owned)), off, "{name}");
        let other = |tensor: &str| match name {
            "gpt2" => format!("transformer.{tensor}"),
            _ => tensor.trim_start_matches("model.").to_owned(),
        };
        assert_eq!(lab.distance(&lab.folder("other-names", 2, other)), off, "{name}");
        let imported = lab.path("half");
        import(lab.path("three").to_str().unwrap(), Some(Dtype::F16), &imported).unwrap();
        assert!(lab.distance(&imported) < 3e-3, "{name}");
        assert_eq!(json(&imported.join("config.json"))["dtype"], "float16");
        assert!(TensorFile::open(&imported).unwrap().names().all(|tensor| !tensor.starts_with("h.")));
    }
}

#[test]
fn everything_that_does_not_fit_is_said_at_once() {
    let lab = Lab::new("llama3");
    let rename = |name: &str| match name {
        "model.layers.0.mlp.up_proj.weight" => "model.layers.0.mlp.upp_proj.weight".to_owned(),
        // [32, 32] and [16, 32], in each other's place.
        "model.layers.1.self_attn.q_proj.weight" => "model.layers.1.self_attn.k_proj.weight".to_owned(),
        "model.layers.1.self_attn.k_proj.weight" => "model.layers.1.self_attn.q_proj.weight".to_owned(),
        other => other.to_owned(),
    };
    let folder = lab.folder("wrong", 1, rename);
    let error = load(&folder, &Backend::NdArray.device().unwrap()).unwrap_err().to_string();
    for part in ["1 missing", "up_proj", "upp_proj", "2 of another shape", "1 in the file but not in the model"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// Out to llama.cpp's order of rows and names, and back.
#[test]
fn gguf_is_read_as_it_was_written() {
    let letters: String = (' '..='~').filter(|c| !c.is_ascii_uppercase()).take(67).collect();
    let tokenizer = Tokenizer::from_chars_of(letters.as_bytes()).unwrap();
    for name in ["llama-tiny", "llama-tiny-tied", "import-qwen2", "import-qwen3"] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        fs::copy(golden(&format!("{name}.json")), folder.join("config.json")).unwrap();
        let file = TensorFile::open(golden(&format!("{name}.safetensors"))).unwrap();
        let known = |name: &&str| name.contains('.') && !name.starts_with("grad.") && !name.starts_with("final.");
        let views = file.names().filter(known).map(|name| {
            let (dtype, shape) = (file.dtype(name).unwrap(), file.shape(name).unwrap().to_vec());
            (name.to_owned(), TensorView::new(dtype, shape, file.bytes(name).unwrap()).unwrap())
        });
        let views: HashMap<String, TensorView<'_>> = views.collect();
        safetensors::serialize_to_file(&views, None, &folder.join("model.safetensors")).unwrap();
        tokenizer.save(folder.join("tokenizer.json")).unwrap();
        let gguf = dir.path().join("model.gguf");
        export(&folder, "gguf:f32".parse().unwrap(), &gguf).unwrap();

        let device = Backend::NdArray.device().unwrap();
        let [a, b] = [&folder, &gguf].map(|path| load(path, &device).unwrap());
        let want = TransformerConfig { init_std: b.model.config().init_std, ..a.model.config().clone() };
        assert_eq!(&want, b.model.config(), "{name}");
        let logits = |model: &Transformer| {
            let ids: Vec<i32> = (0..20).map(|i| i * 13 % 60).collect();
            to_host(model.logits(&TokenBatch::plain(1, 20, ids, vec![-1; 20])))
        };
        assert_eq!(logits(&a.model), logits(&b.model), "{name}");
        let text = b"some text, 12345 (of it)";
        let ids = |tokenizer: Option<Tokenizer>| tokenizer.unwrap().encode(text).unwrap();
        assert_eq!(ids(a.tokenizer), ids(b.tokenizer), "{name}");
        // And a folder again, with the same tensors.
        let imported = dir.path().join("imported");
        import(gguf.to_str().unwrap(), None, &imported).unwrap();
        let back = TensorFile::open(&imported).unwrap();
        assert!(views.keys().all(|name| back.f32(name).unwrap() == file.f32(name).unwrap()), "{name}");
        let config = json(&imported.join("config.json"));
        assert_eq!(config["model_type"], json(&folder.join("config.json"))["model_type"], "{name}");
    }
}
