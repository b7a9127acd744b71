//! `firebox compress` as its users call it: to the end, killed and called again, and asked for what cannot be.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Lab, names, wait_until};

const RECIPE: &str = r#"
calibration = { rows = 8 }
eval = { max_batches = 4, speed_tokens = 4 }
[[steps]]
kind = "prune"
method = "sparse_gpt"
sparsity = "2:4"
[[steps]]
kind = "train"
recipe = "small.toml"
set = ["train.steps=8", "prune.keep_zeros=true"]
[[steps]]
kind = "export"
format = "hf"
[[steps]]
kind = "quantize"
format = "int4-channel"
method = "awq"
"#;

/// What does not depend on the machine: names, sizes and perplexities.
fn rows(lab: &Lab, out: &str) -> Vec<(String, u64, String)> {
    let rows = lab.run(out).json("results.json");
    let row = |row: &serde_json::Value| {
        let measured = &row["measured"];
        (row["name"].as_str().unwrap().into(), measured["bytes"].as_u64().unwrap(), measured["perplexity"].to_string())
    };
    rows.as_array().unwrap().iter().map(row).collect()
}

#[test]
fn a_killed_pipeline_goes_on_and_ends_in_the_same_model() {
    let lab = Lab::new(60);
    lab.trained("run", &["--set", "train.steps=20"]);
    lab.write("compress.toml", RECIPE);
    let args = |out| ["compress", "run", "--recipe", "compress.toml", "--data", "docs.jsonl", "--out", out];
    let whole = lab.call(&args("whole")).succeeded();
    for word in ["sparsegpt 2:4", "awq int4-channel", "report.html", "4-quantize"] {
        assert!(whole.stdout.contains(word), "{word}: {}", whole.stdout);
    }
    let want = rows(&lab, "whole");
    assert_eq!(want.len(), 5);
    assert!(want[4].1 * 3 < want[0].1, "{want:?}");

    // Killed after each row, and a little later each time.
    for done in 0..5usize {
        let mut child = lab.firebox(&args("parts")).spawn().unwrap();
        let results = lab.path("parts/results.json");
        let reached = || std::fs::read_to_string(&results).is_ok_and(|text| text.matches("\"name\"").count() >= done);
        if wait_until(&mut child, reached) {
            std::thread::sleep(Duration::from_millis(20 * done as u64));
            child.kill().unwrap();
        }
        child.wait().unwrap();
    }
    lab.call(&args("parts")).succeeded();
    assert_eq!(rows(&lab, "parts"), want);
    let model = |out: &str| std::fs::read(lab.path(out).join("4-quantize/model.safetensors")).unwrap();
    assert!(model("parts") == model("whole"));

    let text = lab.call(&["generate", "parts/4-quantize", "--prompt", "The ", "--max-tokens", "8"]).succeeded().stdout;
    assert!(text.starts_with("The "), "{text}");
}

#[test]
fn what_cannot_be_is_said_in_one_line() {
    let lab = Lab::new(40);
    lab.trained("run", &["--set", "train.steps=8"]);
    let with = |steps: &str, words: &[&str]| {
        lab.write("bad.toml", steps);
        lab.call(&["compress", "run", "--recipe", "bad.toml", "--data", "docs.jsonl", "--out", "out"]).failed(2, words);
        let left = names(&lab.path("out"));
        assert!(left.iter().all(|name| name == "tokenizer.json"), "{steps}: {left:?}");
    };
    with("steps = []", &["steps", "at least one"]);
    with("[[steps]]\nkind = 'prun'\n", &["prun", "did you mean `prune`?"]);
    with("[[steps]]\nkind = 'prune'\nsparsity = 1.0\n", &["sparsity", "nothing is left"]);
    with("[[steps]]\nkind = 'prune'\nsparsity = '4:2'\n", &["sparsity", "4:2"]);
    with("[[steps]]\nkind = 'quantize'\nformat = 'int5'\n", &["int5"]);
    with("[[steps]]\nkind = 'quantize'\nformat = 'q4_k'\n", &["q4_k", "export"]);
    with("[[steps]]\nkind = 'quantize'\nformat = 'int4-g128'\nmethod = 'nearest'\n", &["128", "blocks.0"]);
    with("calibration = { rows = 4000000 }\n[[steps]]\nkind = 'prune'\nsparsity = 0.5\n", &["calibration", "--data"]);
    with("[[steps]]\nkind = 'export'\nformat = 'pickle'\n", &["hf, gguf or onnx", "pickle"]);
    with("[[steps]]\nkind = 'distill'\nset = ['distill.alpha=2']\n", &["distill.alpha"]);
    let quantize = "[[steps]]\nkind = 'quantize'\nformat = 'int8'\nmethod = 'nearest'\n";
    with(&format!("{quantize}[[steps]]\nkind = 'share'\nlayers_per_block = 2\n"), &["after quantize", "share"]);
    lab.call(&["compress", "run", "--recipe", "nothing", "--data", "docs.jsonl"]).failed(2, &["int8, int4"]);
    lab.call(&["compress", "absent", "--recipe", "int8", "--data", "docs.jsonl"]).failed(2, &["absent"]);

    // A step of another pipeline would be taken for one of this.
    lab.write(
        "one.toml",
        "eval = { speed_tokens = 0 }\n[[steps]]\nkind = 'prune'\nmethod = 'magnitude'\nsparsity = 0.5\n",
    );
    let one = ["compress", "run", "--recipe", "one.toml", "--data", "docs.jsonl", "--out", "one"];
    lab.call(&one).succeeded();
    lab.call(&[&one[..], &["--set", "eval.max_batches=1"]].concat()).failed(2, &["--out"]);
}
