//! Checkpoints of quantized decoders: what is written is what computes, and nothing else is opened.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use firebox_compress::quantize::{Ranges, nearest};
use firebox_compress::{Matrix, Quantized, ScalarFormat};
use firebox_data::Tokenizer;
use firebox_models::TokenBatch;
use firebox_models::transformer::packed::{from_matrix, matrix_shape, to_matrix};
use firebox_models::transformer::{ExpertsConfig, Transformer, TransformerConfig, presets};
use firebox_tensor::device::Backend;
use firebox_train::TrainError;
use firebox_train::export::export;
use firebox_train::generate::{Sampling, generate};
use firebox_train::model_io::{load, parameters, to_host};
use firebox_train::quantized::{Weights, save};
use serde_json::{Value, json};

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog\n";

fn config(name: &str) -> TransformerConfig {
    let base = presets::named(name).unwrap();
    let n_kv_heads = if base.positions == firebox_models::transformer::Positions::Learned { 4 } else { 2 };
    TransformerConfig {
        vocab_size: Tokenizer::from_chars_of(TEXT).unwrap().vocab_size(),
        d_model: 64,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads,
        head_dim: 16,
        d_ff: 96,
        context: 16,
        init_std: 0.2,
        tied: name == "gpt2",
        ..base
    }
}

/// A model's parameters, and how some of them are quantized.
struct Case {
    config: TransformerConfig,
    values: HashMap<String, Vec<f32>>,
    formats: BTreeMap<String, ScalarFormat>,
}

impl Case {
    fn new(config: TransformerConfig, formats: &[(&str, &str)]) -> Self {
        let model = Transformer::new(&config, 7, &Backend::NdArray.device().unwrap()).unwrap();
        let values: HashMap<_, _> =
            parameters(&model).into_iter().map(|(name, values)| (name, to_host(values))).collect();
        let format = |name: &String| {
            let (_, format) = formats.iter().find(|(part, _)| name.contains(part))?;
            Some((name.clone(), format.parse().unwrap()))
        };
        let formats = values.keys().filter_map(format).collect();
        Self { config, values, formats }
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        let entries = firebox_models::transformer::hf::Family::of(&self.config).entries(&self.config);
        entries.into_iter().find(|entry| entry.param == name).unwrap().shape
    }

    fn quantized(&self, name: &str, format: ScalarFormat) -> Quantized {
        let shape = self.shape(name);
        let [rows, cols] = matrix_shape(name, &shape).unwrap();
        let matrix = Matrix::new(rows, cols, to_matrix(name, &shape, self.values[name].clone())).unwrap();
        nearest(&matrix, format, Ranges::Absmax).unwrap()
    }

    fn weights(&self, name: &str) -> Weights {
        match self.formats.get(name) {
            Some(format) => Weights::Quantized(self.quantized(name, *format)),
            None => Weights::Full(self.values[name].clone()),
        }
    }

    fn save(&self, dir: &Path) {
        let tokenizer = Tokenizer::from_chars_of(TEXT).unwrap();
        save(dir, &self.config, &self.formats, Some(&tokenizer), |name| Ok(self.weights(name))).unwrap();
    }

    /// The same in f32: the values of the codes.
    fn save_full(&self, dir: &Path) {
        let value = |name: &str| match self.weights(name) {
            Weights::Full(values) => values,
            Weights::Quantized(q) => from_matrix(name, &self.shape(name), q.dequantize().values().to_vec()),
        };
        save(dir, &self.config, &BTreeMap::new(), None, |name| Ok(Weights::Full(value(name)))).unwrap();
    }
}

fn logits(dir: &Path, backend: Backend) -> (Transformer, Vec<f32>) {
    let model = load(dir, &backend.device().unwrap()).unwrap().model;
    let ids: Vec<i32> = (0..16).map(|i| i * 5 % model.config().vocab_size as i32).collect();
    let logits = to_host(model.logits(&TokenBatch::plain(1, 16, ids, vec![-100; 16])));
    (model, logits)
}

#[test]
fn every_format_computes_the_values_of_its_codes() {
    let dir = tempfile::tempdir().unwrap();
    // Linear layers and tables; the matrices that are packed, and the error that rounding the inputs to 8 bits may make.
    let cases = [
        ("int8-channel", "int8-channel", 10, 0.1),
        ("int8", "int8", 10, 0.1),
        ("int4-g32", "int4-g64", 10, 1e-4),
        ("int4-g32-sym", "int4-channel-sym", 10, 1e-4),
        ("int4-tensor", "int4-tensor-sym", 10, 1e-4),
        ("nf4-g32", "nf4", 10, 1e-4),
        ("int3-g32", "int3-channel-sym", 10, 1e-4),
        ("int2-g32-sym", "int2-g32", 10, 1e-4),
        ("fp8-channel", "int8-asym", 0, 1e-4),
        ("int8-g32", "fp8", 0, 1e-4),
        ("int4-g32", "int8-channel-asym", 8, 1e-4),
    ];
    for (i, (linear, table, packed, tolerance)) in cases.into_iter().enumerate() {
        for (family, tied) in [("llama-30m", false), ("gpt2", true)] {
            let formats = [("attn.qkv.weight", linear), ("attn.out.weight", linear), ("mlp.input.weight", linear)];
            let more = [("mlp.output.weight", linear), ("embed", table), ("head", table)];
            let case = Case::new(config(family), &[&formats[..], &more].concat());
            assert_eq!(case.config.tied, tied);
            let [small, full] = ["small", "full"].map(|kind| dir.path().join(format!("{kind}-{i}-{family}")));
            case.save(&small);
            case.save_full(&full);
            for backend in [Backend::NdArray, Backend::Flex].into_iter().filter(|backend| backend.compiled()) {
                let ((model, got), (_, want)) = (logits(&small, backend), logits(&full, backend));
                let expected = if tied && packed == 10 { 9 } else { packed };
                assert_eq!(model.packed().count(), expected, "{linear} {table}");
                let size = want.iter().fold(0f32, |size, x| size.max(x.abs()));
                let error = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(error <= tolerance * size, "{linear} {table} {family} {backend}: {error} of {size}");
                if packed > 0 {
                    // In memory, as the format promises; codes of 2 and 3 bits take 4, zero points and sums of codes a few more.
                    let promise: f64 = case
                        .formats
                        .iter()
                        .map(|(name, format)| {
                            let q = case.quantized(name, *format);
                            let n = (q.rows() * q.cols()) as f64;
                            n * q.bits_per_weight().max(4.0) / 8.0
                        })
                        .sum();
                    let bytes: usize = model.packed().map(|matrix| matrix.bytes()).sum();
                    assert!((bytes as f64) < 1.5 * promise + 9.0 * 70.0, "{linear}: {bytes} bytes for {promise}");
                }
            }
        }
    }
}

#[test]
fn a_quantized_model_writes_and_is_measured_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let case =
        Case::new(config("llama-30m"), &[("attn.", "int4-g32"), ("mlp.", "int8-channel"), ("embed", "int8-channel")]);
    let (small, full) = (dir.path().join("small"), dir.path().join("full"));
    case.save(&small);
    case.save_full(&full);
    let device = Backend::NdArray.device().unwrap();
    let loaded = load(&small, &device).unwrap();
    assert!(loaded.tokenizer.is_some() && loaded.model.is_packed());
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let text = generate(&loaded.model, &[1, 2, 3], 20, &greedy, None, |_| true).unwrap();
    assert_eq!(text.len(), 23);
    // The same bits twice, file by file.
    let again = dir.path().join("again");
    case.save(&again);
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert_eq!(std::fs::read(small.join(file)).unwrap(), std::fs::read(again.join(file)).unwrap(), "{file}");
    }
    // Somebody who asks for parameters gets them in f32.
    let values: HashMap<_, _> = parameters(&loaded.model).into_iter().collect();
    let want: HashMap<_, _> = parameters(&load(&full, &device).unwrap().model).into_iter().collect();
    for (name, want) in want {
        assert_eq!(to_host(values[&name].clone()), to_host(want), "{name}");
    }
    let error = load(&small, &device.autodiff()).unwrap_err();
    assert!(error.is_input() && error.to_string().contains("without gradients"), "{error}");
}

#[test]
fn experts_load_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let moe = presets::named("firebox-moe-3m").unwrap();
    let experts: Option<ExpertsConfig> = moe.experts;
    let config = TransformerConfig { experts, d_model: 64, n_layers: 1, context: 16, vocab_size: 28, ..moe };
    let case = Case::new(config, &[("experts.input", "int4-g32"), ("attn.qkv", "int4-g32")]);
    let [small, full] = ["small", "full"].map(|name| dir.path().join(name));
    case.save(&small);
    case.save_full(&full);
    let ((model, got), (_, want)) = (logits(&small, Backend::NdArray), logits(&full, Backend::NdArray));
    assert_eq!(model.packed().count(), 1);
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-4));
}

/// What goes out of a quantized checkpoint are the numbers that its codes stand for.
#[test]
fn exports_have_the_values_of_the_codes() {
    let dir = tempfile::tempdir().unwrap();
    let moe = presets::named("firebox-moe-3m").unwrap();
    let moe = TransformerConfig { d_model: 64, n_layers: 1, context: 16, vocab_size: 28, ..moe };
    let formats = [("attn.qkv.weight", "int4-g32"), ("mlp.input.weight", "int8-channel"), ("embed", "nf4-g32")];
    let formats = [&formats[..], &[("experts.input", "int3-g32")]].concat();
    for (i, config) in [config("llama-30m"), config("gpt2"), moe].into_iter().enumerate() {
        let case = Case::new(config, &formats);
        let [small, full] = ["small", "full"].map(|kind| dir.path().join(format!("{kind}-{i}")));
        case.save(&small);
        case.save_full(&full);
        for (target, file) in [("hf", "model.safetensors"), ("onnx", "model.onnx_data")] {
            let [got, want] = [&small, &full].map(|from| {
                let out = from.with_extension(target);
                export(from, target.parse().unwrap(), &out).unwrap();
                std::fs::read(out.join(file)).unwrap()
            });
            assert!(got == want, "{i} {target}");
        }
        let model = load(small.with_extension("hf"), &Backend::NdArray.device().unwrap()).unwrap().model;
        assert_eq!(model.packed().count(), 0);
    }
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::new(config("gpt2"), &[("mlp.input.weight", "int4-g32")]);
    let at = dir.path().join("model");
    let text = |result: Result<(), TrainError>| {
        let error = result.unwrap_err();
        assert!(error.is_input(), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
        error.to_string()
    };
    let formats = |name: &str, format: &str| BTreeMap::from([(name.to_owned(), format.parse().unwrap())]);
    let with = |formats: &BTreeMap<_, _>| save(&at, &case.config, formats, None, |name| Ok(case.weights(name)));
    assert!(text(with(&formats("blocks.9.mlp.input.weight", "int8"))).contains("blocks.9"));
    assert!(text(with(&formats("norm.weight", "int8"))).contains("a vector"));
    assert!(text(with(&formats("blocks.0.mlp.input.weight", "int4-g128"))).contains("multiple of 128"));
    assert!(text(with(&formats("embed.weight", "int8"))).contains("embed.weight"));
    let failing = save(&at, &case.config, &case.formats, None, |name| match name {
        "norm.weight" => Err(TrainError::Input { what: "x", expected: "y".into(), got: "z".into() }),
        _ => Ok(case.weights(name)),
    });
    assert_eq!(text(failing), "x: expected y, got z");
    case.save(&at);
    let error = with(&case.formats).unwrap_err().to_string();
    assert!(error.contains("does not exist yet"), "{error}");
}

/// A folder with one thing changed.
struct Changed {
    dir: PathBuf,
    header: Value,
    data: Vec<u8>,
}

impl Changed {
    fn of(from: &Path, dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
        let file = std::fs::read(from.join("model.safetensors")).unwrap();
        let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        Self { dir, header: serde_json::from_slice(&file[8..8 + n]).unwrap(), data: file[8 + n..].to_vec() }
    }

    fn config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.dir.join("config.json");
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    }

    fn error(&self) -> String {
        let header = self.header.to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat();
        std::fs::write(self.dir.join("model.safetensors"), file).unwrap();
        match load(&self.dir, &Backend::NdArray.device().unwrap()) {
            Ok(_) => panic!("{} was opened", self.dir.display()),
            Err(error) => {
                assert!(error.is_input());
                error.to_string()
            }
        }
    }
}

#[test]
fn files_from_elsewhere_are_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let case =
        Case::new(config("llama-30m"), &[("attn.qkv", "int4-g32"), ("mlp.input", "int8-channel"), ("embed", "fp8")]);
    let good = dir.path().join("good");
    case.save(&good);
    let name = "blocks.0.attn.qkv.weight";
    let key = |json: &mut Value, value: Value| json["quantization_config"]["tensors"][name] = value;
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Value));
    let changes: [Change<'_>; 12] = [
        ("load the model that was quantized", &|json| json["quantization_config"]["quant_method"] = json!("gptq")),
        ("got nothing", &|json| json["quantization_config"] = json!({})),
        ("expected 1, got 2", &|json| json["quantization_config"]["version"] = json!(2)),
        ("unknown field", &|json| json["quantization_config"]["bits"] = json!(4)),
        ("the name of a format", &|json| key(json, json!("int5"))),
        ("GGUF", &|json| key(json, json!("q4_0"))),
        ("multiple of 128", &|json| key(json, json!("int4-g128"))),
        ("blocks.0.attn.qkv.weight.codes", &|json| key(json, json!("int3-g32"))),
        ("blocks.0.attn.qkv.weight.zeros", &|json| key(json, json!("int4-g32-sym"))),
        ("blocks.7", &|json| json["quantization_config"]["tensors"]["blocks.7.attn.qkv.weight"] = json!("int8")),
        ("a vector", &|json| json["quantization_config"]["tensors"]["norm.weight"] = json!("int8")),
        ("model.layers.0.self_attn.q_proj.weight", &|json| {
            json["quantization_config"]["tensors"].as_object_mut().unwrap().remove(name);
        }),
    ];
    for (i, (text, change)) in changes.into_iter().enumerate() {
        let changed = Changed::of(&good, dir.path().join(format!("config-{i}")));
        changed.config(change);
        let error = changed.error();
        assert!(error.contains(text), "{text}: {error}");
    }
    let of = |part: &str, what: &dyn Fn(&mut Changed, [usize; 2])| {
        let mut changed = Changed::of(&good, dir.path().join(format!("file-{part}-{:p}", what)));
        let place = &changed.header[format!("{name}.{part}")]["data_offsets"];
        let [from, to] = [0, 1].map(|i| place[i].as_u64().unwrap() as usize);
        what(&mut changed, [from, to]);
        changed.error()
    };
    let error = of("scales", &|changed, [from, _]| changed.data[from..from + 2].copy_from_slice(&[0, 0x7c]));
    assert!(error.contains("finite"), "{error}");
    let error = of("zeros", &|changed, [from, _]| changed.data[from] = 100);
    assert!(error.contains("100"), "{error}");
    let error = of("zeros", &|changed, _| changed.header[format!("{name}.zeros")]["dtype"] = json!("U8"));
    assert!(error.contains("`blocks.0.attn.qkv.weight.zeros` in I8"), "{error}");
    let error = of("codes", &|changed, _| {
        let shape = changed.header[format!("{name}.codes")]["shape"].as_array().unwrap().clone();
        changed.header[format!("{name}.codes")]["shape"] = json!([shape[1], shape[0]]);
    });
    assert!(error.contains("codes"), "{error}");
    let error = of("codes", &|changed, _| changed.data.truncate(changed.data.len() - 1));
    assert!(error.contains("damaged"), "{error}");
    let mut changed = Changed::of(&good, dir.path().join("nan"));
    let from = changed.header["embed.weight.codes"]["data_offsets"][0].as_u64().unwrap() as usize;
    changed.data[from] = 0x7f;
    let error = changed.error();
    assert!(error.contains("127"), "{error}");
}
