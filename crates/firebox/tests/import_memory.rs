//! What imports, loads and fine-tuning in 4 bits take of memory: tensors come in one by one, whatever the model's size, and a run takes what the manual says.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use common::Lab;
use serde_json::json;

const LAYERS: usize = 16;
const WIDTH: usize = 512;
const VOCAB: usize = 8000;
const INNER: usize = 2048;

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, WIDTH])];
    for i in 0..LAYERS {
        let layer = |name: &str| format!("model.layers.{i}.{name}.weight");
        all.extend(
            ["q_proj", "k_proj", "v_proj", "o_proj"]
                .map(|name| (layer(&format!("self_attn.{name}")), vec![WIDTH, WIDTH])),
        );
        all.extend(["input_layernorm", "post_attention_layernorm"].map(|name| (layer(name), vec![WIDTH])));
        all.extend(["gate_proj", "up_proj"].map(|name| (layer(&format!("mlp.{name}")), vec![INNER, WIDTH])));
        all.push((layer("mlp.down_proj"), vec![WIDTH, INNER]));
    }
    all.push(("model.norm.weight".into(), vec![WIDTH]));
    all
}

fn parameters() -> usize {
    tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// A safetensors file of ones, `bytes` each.
fn write(path: &Path, tensors: &[(String, Vec<usize>)], dtype: &str) {
    let one: &[u8] = match dtype {
        "F32" => &[0, 0, 0x80, 0x3f],
        "F16" => &[0, 0x3c],
        _ => &[0x80, 0x3f],
    };
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let begin = end;
        end += one.len() * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
    }
    let text = serde_json::Value::from(header).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let part = one.repeat((1 << 20) / one.len());
    let mut left = end;
    while left > 0 {
        let n = left.min(part.len());
        file.write_all(&part[..n]).unwrap();
        left -= n;
    }
}

fn folder(lab: &Lab, name: &str, dtype: &str, files: usize) {
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
        "max_position_embeddings": 512, "tie_word_embeddings": true, "rms_norm_eps": 1e-5,
    });
    lab.write(&format!("{name}/config.json"), config.to_string());
    let all = tensors();
    if files == 1 {
        return write(&lab.path(&format!("{name}/model.safetensors")), &all, dtype);
    }
    let mut map = serde_json::Map::new();
    for (i, part) in all.chunks(all.len().div_ceil(files)).enumerate() {
        let file = format!("model-{:05}-of-{files:05}.safetensors", i + 1);
        write(&lab.path(&format!("{name}/{file}")), part, dtype);
        map.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    lab.write(&format!("{name}/model.safetensors.index.json"), json!({ "weight_map": map }).to_string());
}

/// The most memory that a command had, pages of mapped files among it.
fn peak(lab: &Lab, args: &[&str]) -> u64 {
    let mut child = lab.firebox(args).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        // kB. Gone, once the process has ended.
        let now = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        most = now.map_or(most, |kb| most.max(kb * 1000));
        if let Some(code) = child.try_wait().unwrap() {
            assert!(code.success(), "{args:?}");
            return most;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn imports_and_loads_stay_below_1_3_times_the_model() {
    let lab = Lab::new(1);
    let of = |bytes: usize| (parameters() * bytes) as f64;
    folder(&lab, "f32", "F32", 1);
    folder(&lab, "bf16", "BF16", 3);
    folder(&lab, "f16", "F16", 1);
    let cases: &[(&str, &[&str], usize)] = &[
        ("f32", &["--dtype", "f32"], 4),
        ("f32", &["--dtype", "bf16"], 2),
        ("f32", &["--dtype", "f16"], 2),
        ("bf16", &[], 2),
        ("f16", &["--dtype", "f32"], 4),
    ];
    for (source, args, bytes) in cases {
        let args = [&["import", source, "--out", "out"], *args].concat();
        let most = peak(&lab, &args) as f64;
        println!("{args:?}: {:.0} MB of a model of {:.0} MB: {:.2}", most / 1e6, of(*bytes) / 1e6, most / of(*bytes));
        assert!(most > 1e6 && most < 1.3 * of(*bytes), "{args:?}: {most} bytes of {}", of(*bytes));
        std::fs::remove_dir_all(lab.path("out")).unwrap();
    }
    // Computing in f32, whatever the file has.
    for source in ["f32", "bf16"] {
        let most = peak(&lab, &["logits", source, "--ids", "1,2,3", "--out", "l.safetensors"]) as f64;
        println!("logits {source}: {:.0} MB, {:.2}", most / 1e6, most / of(4));
        assert!(most < 1.3 * of(4), "{source}: {most} bytes of {}", of(4));
    }
}

/// The table of docs/finetuning.md.
#[test]
fn qlora_takes_what_its_formula_says() {
    const ROWS: usize = 2;
    const TOKENS: usize = 512;
    const RANK: usize = 16;
    let lab = Lab::new(60);
    folder(&lab, "base", "F32", 1);
    // What there is besides the model: the program, its data and tokenizer.
    let run = lab.trained("small", &[]);
    let program = {
        let args = ["train", "small.toml", "--data", "docs.jsonl", "--out", "again"];
        peak(&lab, &args) as f64
    };
    let tokenizer = std::fs::read(run.dir.join("checkpoints/step-40/tokenizer.json")).unwrap();
    lab.write("base/tokenizer.json", tokenizer);
    let in_blocks = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER);
    let trained = LAYERS * 2 * RANK * (WIDTH + WIDTH);
    let model = 0.53125 * in_blocks as f64 + 2.0 * (parameters() - in_blocks) as f64 + 16.0 * trained as f64;
    // Queries, keys, values and attention's output are as wide as the model.
    let of_block = |tokens: usize| (4 * tokens * (2 * WIDTH + 4 * WIDTH + 2 * INNER)) as f64;
    let work = of_block(ROWS * TOKENS) + (4 * WIDTH * 2 * INNER) as f64 + f64::from(16 << 20);
    for (recompute, activations) in [
        ("none", LAYERS as f64 * of_block(ROWS * TOKENS)),
        ("blocks", (LAYERS * 4 * ROWS * TOKENS * WIDTH) as f64 + of_block(ROWS * TOKENS)),
    ] {
        let set = [
            format!("memory.recompute={recompute}"),
            format!(
                "train={{ steps = 3, batch_rows = {ROWS}, micro_batch_rows = {ROWS}, row_tokens = {TOKENS}, log_every = 1 }}"
            ),
            "eval={ every = 0, max_batches = 1, sample_tokens = 0 }".into(),
            "schedule={ kind = \"constant\" }".into(),
        ];
        let rank = RANK.to_string();
        let mut args = vec!["finetune", "--from", "base", "--qlora", &rank, "--data", "docs.jsonl", "--out", recompute];
        set.iter().for_each(|set| args.extend(["--set", set]));
        let (got, want) = (peak(&lab, &args) as f64, program + model + activations + work);
        println!("QLoRA, recompute {recompute}: {:.0} MB, by the formula {:.0}", got / 1e6, want / 1e6);
        assert!((got / want - 1.0).abs() < 0.1, "recompute {recompute}: {got} bytes, by the formula {want}");
    }
}
