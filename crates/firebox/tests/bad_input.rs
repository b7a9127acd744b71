//! Bad input gets one line that says what is wrong and what to do, and exit code 2.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Ended, Lab, Run};

/// A lab with a finished run of four steps in `run`.
fn lab_with_run() -> (Lab, Run) {
    let lab = Lab::new(60);
    let run = lab.trained("run", &["--set", "train.steps=8", "--set", "eval.every=0"]);
    assert_eq!(run.saved(), [4, 8]);
    (lab, run)
}

#[track_caller]
fn all_fail(lab: &Lab, cases: &[(&str, &[&str])]) {
    for (line, words) in cases {
        let args: Vec<&str> = line.split_whitespace().collect();
        lab.call(&args).failed(2, words);
    }
}

#[test]
fn text() {
    let lab = Lab::new(60);
    lab.write("empty.txt", "");
    lab.write("short.txt", "too short");
    lab.write("none/image.png", "no text");
    lab.write("bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 3\n");
    lab.write("other.jsonl", "{\"body\": \"x\", \"id\": 1}\n");
    lab.write("no.parquet", "no parquet");
    lab.write("no.jsonl.gz", "no gzip");
    lab.write("no.jsonl.zst", "no zstd");
    lab.write("broken.json", "{\"version\": \"1.0\", \"model\": ");
    lab.write("strange.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"Telepathy\"}}");
    all_fail(
        &lab,
        &[
            ("train tiny", &["--data"]),
            ("tokenize", &["--data"]),
            ("train tiny --data absent.txt", &["absent.txt"]),
            ("train tiny --data *.nothing", &["*.nothing"]),
            ("train tiny --data [", &["glob", "["]),
            ("train tiny --data none", &["none", ".txt", ".jsonl"]),
            ("train tiny --data empty.txt", &["empty"]),
            ("train tiny --data short.txt", &["too short", "context 64", "smaller context"]),
            ("train tiny --data bad.jsonl", &["bad.jsonl:2", "JSON"]),
            ("train tiny --data other.jsonl", &["other.jsonl:1", "no field `text`", "body, id"]),
            ("train tiny --data no.parquet", &["no.parquet", "parquet"]),
            ("train tiny --data no.jsonl.gz", &["no.jsonl.gz", "gzip"]),
            ("train tiny --data no.jsonl.zst", &["no.jsonl.zst", "zstd"]),
            ("train tiny --data docs.jsonl --set data.tokenizer=broken.json", &["tokenizer", "broken.json"]),
            ("train tiny --data docs.jsonl --set data.tokenizer=strange.json", &["tokenizer", "strange.json"]),
            ("train tiny --data docs.jsonl --set data.tokenizer=absent.json", &["absent.json"]),
            ("train tiny --data docs.jsonl --set data.vocab_size=100", &["data.vocab_size", "257"]),
        ],
    );
    assert!(!lab.path("runs").exists(), "nothing was started");
}

#[cfg(unix)]
#[test]
fn text_that_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt as _;
    let lab = Lab::new(1);
    let secret = lab.write("secret.txt", "hidden");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&secret).is_ok() {
        // Root reads everything; a folder in the place of a file cannot be read by anyone.
        std::fs::remove_file(&secret).unwrap();
        std::os::unix::fs::symlink("secret.txt", &secret).unwrap();
    }
    lab.call(&["train", "tiny", "--data", "secret.txt"]).failed(2, &["secret.txt"]);
}

#[test]
fn bytes_that_are_not_utf8_are_kept() {
    let lab = Lab::new(1);
    let mut bytes = Vec::new();
    for i in 0..4000u32 {
        bytes.extend(b"caf\xe9 \xff\xfe ");
        bytes.push((i * i % 251) as u8);
    }
    lab.write("latin.txt", &bytes);
    for tokenizer in ["bpe", "char"] {
        let out = format!("run-{tokenizer}");
        let set = format!("data.tokenizer={tokenizer}");
        let ended = lab.call(&["train", "tiny", "--data", "latin.txt", "--out", &out, "--set", &set]).succeeded();
        assert!(ended.stdout.contains("36.0 kB in 1 documents"), "{}", ended.stdout);
    }
}

#[test]
fn recipes() {
    let lab = Lab::new(60);
    lab.write("key.toml", "name = \"x\"\n[optimizer]\nlearning_rate = 1e-3\nwieght_decay = 0.1\n");
    lab.write("table.toml", "name = \"x\"\n[optimiser]\nlr = 1e-3\n");
    lab.write("torn.toml", "name = \"x");
    lab.write("nameless.toml", "seed = 1\n");
    let train = |recipe: &str, set: &str| {
        let mut args = vec!["train", recipe, "--data", "docs.jsonl"];
        args.extend(set.split_whitespace().flat_map(|value| ["--set", value]));
        lab.call(&args)
    };
    for (recipe, set, words) in [
        ("tinny", "", &["no recipe `tinny`", "tiny", "shakespeare-char"][..]),
        ("absent.toml", "", &["absent.toml"]),
        ("key.toml", "", &["key.toml", "learning_rate"]),
        ("table.toml", "", &["optimiser", "did you mean `optimizer`?"]),
        ("torn.toml", "", &["torn.toml"]),
        ("nameless.toml", "", &["name"]),
        ("tiny", "optimizer.lrr=1", &["lrr", "did you mean `lr`?"]),
        ("tiny", "trian.steps=1", &["did you mean `train`?"]),
        ("tiny", "train.steps", &["train.steps", "key=value"]),
        ("tiny", "train.steps=many", &["many", "u64"]),
        ("tiny", "train.steps=0", &["train.steps", "at least 1"]),
        ("tiny", "optimizer={kind='schedule_free'} average={kind='ema'}", &["average", "schedule_free"]),
        ("tiny", "average={kind='ema',decay=1.0}", &["decay", "1"]),
        ("tiny", "prune.keep_zeros=false", &["prune.keep_zeros", "prune.sparsity"]),
        ("tiny", "prune.keep_zeros=true", &["prune.keep_zeros", "--init", "without a zero"]),
        ("tiny", "prune={sparsity=1.0,end_step=5}", &["prune.sparsity = 1", "(0, 1)"]),
        ("tiny", "prune={sparsity=0.5,begin_step=6,end_step=5}", &["prune.begin_step = 6", "end_step = 5"]),
        ("tiny", "prune={sparsity=0.5,end_step=1000000}", &["prune.end_step", "train.steps"]),
        ("tiny", "prune={pattern='5:4',end_step=5}", &["5:4", "N:M"]),
        ("tiny", "prune={pattern='2:4',sparsity=0.75,end_step=5}", &["prune.sparsity = 0.75", "0.5"]),
        ("tiny", "prune={pattern='3:7',end_step=5}", &["prune.pattern", "3:7"]),
        ("tiny", "prune={sparsity=0.5,end_step=5,scope='row'}", &["row", "global"]),
        ("tiny", "prune={sparsity=0.5,end_step=5} average={kind='ema'}", &["prune", "average"]),
        ("tiny", "qat.bits=5", &["qat.bits = 5", "8, 4, 3 or 2"]),
        ("tiny", "qat.group=48", &["qat.group = 48", "32, 64 or 128"]),
        ("tiny", "qat.group=128", &["qat.group", "does not divide 64"]),
        ("tiny", "qat.method=pact", &["pact", "lsq"]),
        ("tiny", "qat.bits=4 average={kind='ema'}", &["qat", "average"]),
        ("tiny", "qat.bits=4 model.n_experts=4", &["qat", "4 experts"]),
        ("tiny", "qat.bits=4 precision={compute='bf16',params='bf16'}", &["precision.params", "qat"]),
        ("tiny", "watch.on_spike=panic", &["panic", "rollback"]),
        ("tiny", "watch.threshold=0", &["watch.threshold"]),
        (
            "tiny",
            "watch.noise_scale_every=5 train.micro_batch_rows=0",
            &["watch.noise_scale_every", "micro_batch_rows"],
        ),
        ("tiny", "watch.noise_scale_every=-5", &["-5"]),
        ("tiny", "model.capacity_factor=1.25", &["model.capacity_factor = 1.25", "model.n_experts"]),
        ("tiny", "model.n_experts=4 model.experts_per_token=5", &["experts_per_token = 5", "1 to n_experts = 4"]),
        ("tiny", "model.n_experts=1", &["n_experts = 1", "2 to 65536"]),
        ("tiny", "model.n_experts=4 model.router_bias_rate=-1", &["router_bias_rate = -1"]),
        ("tiny", "model.n_experts=4 model.feed_forward=gelu", &["feed_forward", "swi_glu with n_experts"]),
        ("tiny", "optimizer.clip=-1", &["clip = -1", "a norm"]),
        ("tiny", "optimizer.clip=nan", &["clip = NaN", "a norm"]),
        ("tiny", "optimizer.clip=hard", &["clip", "a norm such as 1.0"]),
        ("tiny", "optimizer.clip={adaptive=0}", &["clip.adaptive = 0"]),
        ("tiny", "optimizer.clip={adaptiv=0.1}", &["clip", "{ adaptive = 0.01 }"]),
        ("tiny", "optimizer={groups=[{kinds=['head'],clip=-2}]}", &["clip = -2"]),
        (
            "tiny",
            "optimizer={clip=0,groups=[{kinds=['vector'],clip=2}]} memory.optimizer_in_backward=true",
            &["optimizer.groups.clip = 2", "optimizer_in_backward"],
        ),
        ("tiny", "schedule.kind=sawtooth", &["sawtooth", "cosine"]),
        ("tiny", "schedule.warmup_steps=100000", &["warmup"]),
        ("tiny", "schedule={kind=\"wsd\",decay=\"exponential\"}", &["min_lr_ratio = 0", "exponential"]),
        ("tiny", "schedule={kind=\"one_cycle\",rise_fraction=2}", &["rise_fraction = 2"]),
        ("tiny", "train.batch_warmup={start_rows=0,steps=9}", &["train.batch_warmup.start_rows = 0", "batch_rows"]),
        ("tiny", "train.batch_warmup={start_rows=99,steps=9}", &["train.batch_warmup.start_rows = 99"]),
        ("tiny", "optimizer.batch_scaling={rule=\"sqrt\",reference_rows=0}", &["batch_scaling.reference_rows = 0"]),
        ("tiny", "optimizer.batch_scaling={rule=\"root\",reference_rows=9}", &["batch_scaling", "root", "sqrt"]),
        ("tiny", "optimizer.beta2=1.5", &["beta2", "1.5"]),
        ("tiny", "optimizer.lr=-1", &["lr", "-1"]),
        ("tiny", "optimizer.kind=lionn", &["lionn", "did you mean `lion`?"]),
        ("tiny", "optimizer.state=int7", &["int7", "did you mean `int8`?"]),
        ("tiny", "optimizer={kind='lion',beta2=-1}", &["beta2", "-1"]),
        ("tiny", "optimizer={groups=[{params=['nope.*']}]}", &["no parameter is in the group `nope.*`"]),
        ("tiny", "optimizer={groups=[{params=['a{b']}]}", &["a{b", "patterns"]),
        ("tiny", "model.d_model=96 model.n_heads=5", &["n_heads", "96", "5"]),
        ("tiny", "model.n_heads=4 model.n_kv_heads=3", &["n_kv_heads", "divide"]),
        ("tiny", "model.n_layers=4 model.layers_per_block=3", &["layers_per_block = 3", "divide n_layers = 4"]),
        ("tiny", "model.layers_per_block=0", &["layers_per_block = 0", "divide"]),
        ("tiny", "model.delta_rank=2", &["delta_rank = 2", "layers_per_block"]),
        ("tiny", "model.d_model=64 model.n_heads=2 model.embed_dim=65", &["embed_dim = 65", "less than d_model = 64"]),
        ("tiny", "model.low_rank.qkv=4096", &["low_rank.qkv = 4096", "smaller side"]),
        ("tiny", "model.low_rank.qvk=8", &["low_rank", "did you mean `qkv`?"]),
        ("tiny", "model.n_layers=0 model.depth=1", &["n_layers", "at least 1"]),
        ("tiny", "model.d_model=0", &["0"]),
        ("tiny", "model.n_heads=0", &["n_heads", "0"]),
        ("tiny", "model.head_dim=7", &["head_dim", "even"]),
        ("tiny", "model.context=0", &["context", "0"]),
        ("tiny", "model.attention_softcap=-1", &["attention_softcap", "-1"]),
        ("tiny", "model.logit_softcap=inf", &["logit_softcap", "inf"]),
        ("tiny", "model.dropout=1", &["dropout", "1"]),
        ("tiny", "model.vocab_size=10", &["vocab_size", "10"]),
        ("tiny", "model.preset=gpt7", &["preset"]),
    ] {
        train(recipe, set).failed(2, words);
    }
    assert!(!lab.path("runs").exists(), "nothing was started");
    lab.call(&["recipe", "show", "tinny"]).failed(2, &["no recipe `tinny`"]);
}

#[test]
fn a_prompt_that_cannot_be_encoded_is_found_before_the_first_step() {
    let lab = Lab::new(60);
    Ended::new(lab.train("run", &["--set", "eval.prompt=火"]).output().unwrap(), "prompt".into())
        .failed(2, &["火", "character"]);
    assert_eq!(lab.run("run").step(), 0);
}

#[test]
fn flags() {
    let (lab, _) = lab_with_run();
    all_fail(
        &lab,
        &[
            ("train tiny --data docs.jsonl --backend abacus", &["abacus"]),
            ("train tiny --data docs.jsonl --nonsense", &["--nonsense"]),
            ("train tiny --data docs.jsonl --ranks 2 --zero 4", &["--zero", "3 (parameters too)"]),
            ("train tiny --data docs.jsonl --ranks 2 --dp-replicate 2", &["dp-replicate", "zero 1, 2 or 3"]),
            ("train tiny --data docs.jsonl --ranks 4 --zero 3 --pp 2", &["0, 1 or 2 with pp"]),
            ("train tiny --data docs.jsonl --cp 2 --cp-kind rings", &["--cp-kind", "ring or ulysses"]),
            ("train tiny --data docs.jsonl --ranks 3 --cp 2", &["divides the 3 ranks", "cp 2"]),
            ("train tiny --data docs.jsonl --cp 2 --set model.context=3", &["context", "at least 4: two chunks"]),
            ("train tiny --depth 3", &["--depth"]),
            ("train --depth 0 --data docs.jsonl", &["--depth", "at least 1"]),
            ("train tiny --seed -1", &["-1"]),
            ("fly", &["fly"]),
            ("eval run", &["--data"]),
            ("train small.toml --data docs.jsonl --out run", &["run", "--resume", "--out"]),
            ("train tiny --resume --data docs.jsonl --out absent", &["absent"]),
            ("train tiny --data docs.jsonl --sed 3", &["--sed", "--seed"]),
            ("report absent", &["absent"]),
        ],
    );
    // A backend which this build does not have says how to get it.
    let missing = ["flex", "wgpu", "vulkan", "metal", "webgpu", "cuda", "rocm"].into_iter().filter_map(|backend| {
        let ended = lab.call(&["generate", "run", "--max-tokens", "1", "--backend", backend]);
        (ended.code != Some(0)).then_some((backend, ended))
    });
    for (backend, ended) in missing {
        ended.failed(2, &[backend]);
    }
}

#[test]
fn what_a_model_is_asked() {
    let (lab, _) = lab_with_run();
    all_fail(
        &lab,
        &[
            ("logits run --ids 1,2,1000 --out l.safetensors", &["token id", "1000"]),
            ("logits run --ids=-1 --out l.safetensors", &["token id", "-1"]),
            ("logits run --ids 1,x --out l.safetensors", &["x"]),
            ("logits run --ids 1 --out absent/l.safetensors", &["absent"]),
            ("logits absent --ids 1 --out l.safetensors", &["absent"]),
            ("generate run --prompt 火", &["火", "character"]),
            ("generate run --temperature=-1", &["temperature", "-1"]),
            ("generate run --top-p 0", &["top-p", "0"]),
            ("generate run --repetition-penalty 0", &["repetition-penalty", "0"]),
            ("generate absent", &["absent"]),
            ("eval run --data absent.txt", &["absent.txt"]),
        ],
    );
    lab.call(&["logits", "run", "--ids", &["1"; 25].join(","), "--out", "l.safetensors"])
        .failed(2, &["context of 24", "25"]);
    assert!(!lab.path("l.safetensors").exists());
    lab.write("foreign.txt", "Zürich");
    lab.call(&["eval", "run", "--data", "foreign.txt"]).failed(2, &["character"]);
}

/// The commands that load a model.
#[track_caller]
fn no_command_loads(lab: &Lab, checkpoint: &str, words: &[&str]) {
    for args in [
        &["generate", checkpoint][..],
        &["eval", checkpoint, "--data", "docs.jsonl"],
        &["logits", checkpoint, "--ids", "1", "--out", "l.safetensors"],
    ] {
        lab.call(args).failed(2, words);
    }
}

#[test]
fn another_architecture() {
    let (lab, run) = lab_with_run();
    // Without a manifest, as a folder from elsewhere.
    let copy = |name: &str, config: &str| {
        let model = std::fs::read(run.dir.join("checkpoints/step-8/model.safetensors")).unwrap();
        lab.write(&format!("{name}/model.safetensors"), model);
        lab.write(&format!("{name}/config.json"), config);
    };
    copy("mamba", r#"{"model_type": "mamba", "hidden_size": 32}"#);
    no_command_loads(&lab, "mamba", &["mamba", "gpt2", "bert", "vit"]);
    copy("bert", r#"{"model_type": "bert", "hidden_size": 32}"#);
    no_command_loads(&lab, "bert", &["intermediate_size"]);
    copy("nothing", "{}");
    no_command_loads(&lab, "nothing", &["config.json", "(none)", "gpt2"]);
    copy("no-json", "{\"model_type\": ");
    no_command_loads(&lab, "no-json", &["config.json"]);
    let gpt2 =
        r#"{"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}"#;
    copy("other-tensors", gpt2);
    no_command_loads(&lab, "other-tensors", &["model.safetensors", "missing"]);
    let config = std::fs::read_to_string(run.dir.join("checkpoints/step-8/config.json")).unwrap();
    let wide = config.replace("\"intermediate_size\": 48", "\"intermediate_size\": 50");
    assert_ne!(wide, config);
    copy("other-shape", &wide);
    no_command_loads(&lab, "other-shape", &["model.safetensors", "48", "50"]);
    copy("no-tokenizer", &config);
    lab.call(&["generate", "no-tokenizer"]).failed(2, &["tokenizer.json"]);
    lab.call(&["logits", "no-tokenizer", "--ids", "1", "--out", "l.safetensors"]).succeeded();
}

#[test]
fn torn_checkpoints() {
    let (lab, run) = lab_with_run();
    let cut = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    let resume =
        || lab.train("run", &["--set", "train.steps=8", "--set", "eval.every=0", "--resume"]).output().unwrap();
    let want = run.fingerprint();
    let newest = run.dir.join("checkpoints/step-8/model.safetensors");
    cut(&newest);
    // The one before is used, with a warning, and the end is the same.
    let generated = lab.call(&["generate", "run", "--max-tokens", "4"]).succeeded();
    assert!(!generated.stdout.is_empty());
    let ended = Ended::new(resume(), "resume".into()).succeeded();
    assert!(ended.stdout.contains("resuming from") && ended.stdout.contains("step-4"), "{}", ended.stdout);
    let warning = ended.stderr.lines().find(|line| line.starts_with("warning:")).unwrap();
    assert!(warning.contains("step-8") && warning.contains("model.safetensors"), "{warning}");
    want.assert_equals(&run.fingerprint(), "from the checkpoint before");

    // A single byte of the newest, and the only other one cut: nothing is left to use.
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    cut(&run.dir.join("checkpoints/step-4/optimizer/adamw.safetensors"));
    no_command_loads(&lab, "run", &["step-8", "step-4"]);
    Ended::new(resume(), "resume".into()).failed(2, &["none of the 2 checkpoints", "model.safetensors", "adamw"]);
    no_command_loads(&lab, "run/checkpoints/step-8", &["model.safetensors", "damaged"]);
}

#[test]
fn exports() {
    let (lab, run) = lab_with_run();
    let export = |from: &str, format: &str, kind: &str, out: &str, words: &[&str]| {
        let mut args = vec!["export", from, "--format", format, "--out", out];
        if !kind.is_empty() {
            args.extend(["--type", kind]);
        }
        lab.call(&args).failed(2, words);
        assert!(!lab.path(out).exists() || out == "docs.jsonl", "{args:?}");
    };
    export("run", "pickle", "", "out", &["--format", "hf, gguf or onnx", "pickle"]);
    export("run", "hf", "q8_0", "out", &["--type", "f32, f16, bf16, same for hf", "q8_0"]);
    export("run", "gguf", "int8", "out", &["--type", "q4_k", "int8"]);
    export("run", "onnx", "f16", "out", &["--type", "f32, int8 for onnx", "f16"]);
    export("run", "gguf", "", "docs.jsonl", &["docs.jsonl exists already"]);
    export("absent", "hf", "", "out", &["absent"]);
    lab.call(&["export", "run", "--format", "hf"]).failed(2, &["--out"]);

    // Whatever has no word in a format, before anything is written.
    let odd = ["--set", "model.logit_softcap=30", "--set", "train.steps=6"];
    lab.trained("odd", &odd);
    for format in ["hf", "gguf"] {
        export("odd", format, "", "out", &["logit_softcap", "Llama", "--format onnx"]);
    }
    lab.trained("window", &["--set", "model.window=5", "--set", "train.steps=6"]);
    export("window", "gguf", "", "out", &["GGUF", "sliding window"]);
    let one = ["--set", "model.n_experts=4", "--set", "model.experts_per_token=1", "--set", "model.qk_norm=true"];
    lab.trained("experts", &[&one[..], &["--set", "train.steps=6"]].concat());
    export("experts", "gguf", "", "out", &["GGUF", "single expert"]);

    // Without its tokenizer.
    let step = run.dir.join("checkpoints/step-8");
    for name in ["config.json", "model.safetensors"] {
        lab.write(&format!("plain/{name}"), std::fs::read(step.join(name)).unwrap());
    }
    export("plain", "gguf", "", "out", &["tokenizer", "no tokenizer.json"]);
    lab.call(&["export", "plain", "--format", "hf", "--out", "whole"]).succeeded();

    // Torn, and with a number that none is.
    let mut bytes = std::fs::read(step.join("model.safetensors")).unwrap();
    lab.write("plain/model.safetensors", &bytes[..bytes.len() - 5]);
    export("plain", "hf", "", "out", &["model.safetensors", "bytes of tensors"]);
    let n = bytes.len();
    bytes[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    lab.write("plain/model.safetensors", &bytes);
    lab.write("plain/tokenizer.json", std::fs::read(step.join("tokenizer.json")).unwrap());
    for format in ["hf", "gguf", "onnx"] {
        export("plain", format, "", "out", &["finite", "NaN"]);
    }
}

#[test]
fn a_run_is_not_continued_as_another() {
    let (lab, _) = lab_with_run();
    let resume = |args: &[&str]| Ended::new(lab.train("run", args).output().unwrap(), format!("{args:?}"));
    resume(&["--resume", "--set", "model.d_ff=64"]).failed(2, &["cannot continue", "64", "48"]);
    lab.write("other.txt", "entirely other characters: ÄÖÜ ".repeat(100));
    lab.call(&["train", "--resume", "--data", "other.txt", "--out", "run"]).failed(2, &["cannot continue", "corpus"]);
}

#[test]
fn a_run_that_diverges_says_so() {
    let lab = Lab::new(60);
    Ended::new(lab.train("run", &["--set", "optimizer.lr=1e30"]).output().unwrap(), "absurd".into()).failed(2, &["lr"]);
    let absurd = ["optimizer.lr=1e6", "optimizer.clip=0", "optimizer.weight_decay=0"];
    let set: Vec<&str> = absurd.iter().flat_map(|value| ["--set", value]).collect();
    let ended = Ended::new(lab.train("run", &set).output().unwrap(), "diverge".into());
    ended.failed(1, &["training diverged", "5 steps in a row", "optimizer.lr"]);
    let run = lab.run("run");
    let skipped: Vec<u64> = run
        .metrics()
        .iter()
        .filter(|line| line["skipped"].is_string())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert!(skipped.len() >= 5, "{skipped:?}");
    let last = skipped[skipped.len() - 1];
    assert!(skipped.ends_with(&[last - 4, last - 3, last - 2, last - 1, last]), "{skipped:?}");
    assert!(run.series("loss").iter().all(|(step, loss)| loss.is_finite() && !skipped.contains(step)));
}

#[test]
fn students() {
    let (lab, run) = lab_with_run();
    lab.write("other.txt", "Zebras quiz the 12 judges; 7 foxes jump!\n".repeat(200));
    all_fail(
        &lab,
        &[
            ("distill", &["TEACHER"]),
            ("distill absent tiny --data docs.jsonl --out student", &["absent"]),
            (
                "distill run small.toml --data docs.jsonl --out student --set distill.temperature=0",
                &["temperature = 0"],
            ),
            (
                "distill run small.toml --data docs.jsonl --out student --set distill.alpha=2",
                &["distill.alpha = 2", "0 to 1"],
            ),
            (
                "distill run small.toml --data docs.jsonl --out student --set distill.init=student",
                &["distill", "random"],
            ),
            ("distill run small.toml --data docs.jsonl --out student --set distill.temp=1", &["temp", "temperature"]),
            (
                "distill run small.toml --data docs.jsonl --out student --set distill.init=teacher --set model.d_model=64",
                &["model.d_model", "the teacher's", "64"],
            ),
            (
                "distill run small.toml --data other.txt --out student --set data.tokenizer=char",
                &["distill.teacher", "tokenizer"],
            ),
            ("distill run small.toml --data docs.jsonl --out student --cache-logits 100000", &["distill.cache_top_k"]),
        ],
    );
    assert!(!lab.path("student").exists(), "nothing was started");
    drop(run);
}

#[test]
fn a_student_goes_on_where_it_stopped() {
    let (lab, _) = lab_with_run();
    let call = |more: &str| {
        let line =
            format!("distill run small.toml --data docs.jsonl --set model.n_layers=1 --set train.steps=8 {more}");
        lab.call(&line.split_whitespace().collect::<Vec<_>>()).succeeded()
    };
    call("--out whole --cache-logits 6");
    call("--out half --cache-logits 6");
    // As if it had been killed after its first checkpoint.
    std::fs::remove_dir_all(lab.path("half/checkpoints/step-8")).unwrap();
    call("--out half --cache-logits 6 --resume");
    let file = |run: &str| std::fs::read(lab.path(run).join("checkpoints/step-8/model.safetensors")).unwrap();
    assert!(file("whole") == file("half"));
    let metrics = std::fs::read_to_string(lab.path("half/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"soft_loss\""), "{metrics}");
}
