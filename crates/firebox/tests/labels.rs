//! Tasks on labelled rows and on hidden text by the `firebox` command: runs to their end, and what is wrong with rows in one line.
#![allow(clippy::unwrap_used)]

mod common;

use common::Lab;
use serde_json::json;

const RECIPE: &str = r#"
name = "labels"
[model]
d_model = 32
n_layers = 2
n_heads = 4
context = 24
[data]
vocab_size = 320
val_fraction = 0.2
[optimizer]
lr = 3e-3
[schedule]
kind = "constant"
[train]
steps = 40
batch_rows = 8
micro_batch_rows = 4
log_every = 10
[eval]
every = 0
sample_tokens = 0
[checkpoint]
every = 20
"#;

const ENCODER: &str = "model={ d_model = 32, n_layers = 2, n_heads = 4, context = 24, norm = 'layer_norm', feed_forward = 'gelu_exact', positions = 'learned', bias = true, \
     encoder = { norm_after = true, embed_norm = true, token_types = 2 } }";

fn lab() -> Lab {
    let lab = Lab::new(60);
    lab.write("labels.toml", RECIPE);
    let mut rows = String::new();
    for i in 0..100 {
        let (noun, verb) = (["boiler", "whistle"][i % 2], ["feeds", "warms", "opens"][i % 3]);
        let text = format!("the {noun} {verb} number {i}");
        let row = json!({
            "text": text, "label": noun, "size": i % 2,
            "tokens": text.split(' ').collect::<Vec<_>>(), "labels": ["O", "B-part", "O", "O", "O"],
            "spans": [{ "start": 4, "end": 4 + noun.len(), "label": "part" }],
            "anchor": format!("{noun} {verb}"), "positive": text,
        });
        rows += &format!("{row}\n");
    }
    lab.write("rows.jsonl", rows);
    lab
}

#[test]
fn runs_say_what_they_are_worth_and_names_are_in_the_checkpoint() {
    let lab = lab();
    for (out, task, metric, least) in [
        ("classes", "{ kind = 'classes' }", "accuracy", 0.9),
        ("words", "{ kind = 'token_classes' }", "entity_f1", 0.9),
        ("spans", "{ kind = 'token_classes', spans = 'spans' }", "entity_f1", 0.9),
        ("values", "{ kind = 'values', label = 'size' }", "pearson", 0.8),
        ("embedding", "{ kind = 'embedding' }", "mrr", 0.1),
    ] {
        let task = format!("task={task}");
        let args = ["train", "labels.toml", "--data", "rows.jsonl", "--out", out, "--set", ENCODER, "--set", &task];
        let ended = lab.call(&args).succeeded();
        assert!(ended.stderr.contains(metric), "{}", ended.stderr);
        let summary = lab.run(out).json("summary.json");
        let got = summary["metrics"][metric].as_f64().unwrap();
        assert!(got >= least, "{out}: {metric} is {got}");
        let config = lab.run(out).json("checkpoints/step-40/config.json");
        match out {
            "classes" => assert_eq!(config["id2label"], json!({ "0": "boiler", "1": "whistle" })),
            "spans" => assert_eq!(config["id2label"], json!({ "0": "O", "1": "B-part", "2": "I-part" })),
            _ => {}
        }
    }
    // What one task has trained, another goes on from; with names of other classes, too.
    let other = "task={ kind = 'classes', label = 'size', labels = ['small', 'large'] }";
    let args = ["finetune", "--from", "classes", "--data", "rows.jsonl", "--out", "tuned", "--set", other];
    let short = ["--set", "train.steps=2", "--set", "train.batch_rows=4", "--set", "schedule.warmup_steps=1"];
    lab.call(&[&args[..], &short].concat()).succeeded();
    let config = lab.run("tuned").json("checkpoints/step-2/config.json");
    assert_eq!(config["id2label"], json!({ "0": "small", "1": "large" }));
}

#[test]
fn hidden_text_is_learned() {
    let lab = lab();
    for (out, task, model) in [
        ("masked", "{ kind = 'masked', whole_word = true }", ENCODER),
        ("spans", "{ kind = 'spans' }", "model.qk_norm=true"),
    ] {
        let task = format!("task={task}");
        let args = ["train", "labels.toml", "--data", "docs.jsonl", "--out", out, "--set", model, "--set", &task];
        lab.call(&args).succeeded();
        let losses = lab.run(out).series("loss");
        assert!(losses.last().unwrap().1 < losses[0].1 - 0.5, "{out}: {losses:?}");
        // Goes on where it is.
        lab.call(&["train", "--resume", "--out", out, "--data", "docs.jsonl", "--set", "train.steps=42"]).succeeded();
        assert_eq!(lab.run(out).step(), 42);
    }
    let config = lab.run("masked").json("checkpoints/step-40/tokenizer_config.json");
    assert_eq!(config["mask_token"], "[MASK]");
}

#[test]
fn rows_that_do_not_fit_are_named() {
    let lab = lab();
    let write = |name: &str, rows: &[serde_json::Value]| {
        let good = json!({ "text": "a", "label": "ham", "n": 0, "tokens": ["a"], "labels": ["O"], "spans": [], "anchor": "a", "positive": "b", "size": 1.0 });
        let other = json!({ "text": "b", "label": "spam", "n": 1, "tokens": ["b"], "labels": ["B-x"], "spans": [], "anchor": "a", "positive": "b", "size": 1.0 });
        let rows: Vec<String> = [good, other].iter().chain(rows).map(ToString::to_string).collect();
        lab.write(name, rows.join("\n"));
    };
    write("missing.jsonl", &[json!({ "text": "a" })]);
    write("unknown.jsonl", &[json!({ "text": "a", "label": "eggs", "n": 2 })]);
    write("mixed.jsonl", &[json!({ "text": "a", "label": 3, "n": -1 })]);
    write("words.jsonl", &[json!({ "tokens": ["a", "b"], "labels": ["O"] })]);
    write("places.jsonl", &[json!({ "text": "abc", "spans": [{ "start": 1, "end": 9, "label": "x" }] })]);
    write("numbers.jsonl", &[json!({ "text": "a", "size": [1.0, 2.0] })]);
    write("text.jsonl", &[json!({ "text": "a", "size": "large" })]);
    write("list.jsonl", &[json!({ "text": ["a"], "label": "ham", "anchor": 3, "positive": "b" })]);
    lab.write("same.jsonl", "{\"text\": \"a\", \"label\": 1}\n".repeat(2).replace('1', "\"x\""));
    for (data, task, words) in [
        ("missing.jsonl", "{ kind = 'classes' }", &["missing.jsonl:3", "no field `label`"][..]),
        (
            "unknown.jsonl",
            "{ kind = 'classes', labels = ['ham', 'spam'] }",
            &["unknown.jsonl:3", "eggs", "2 classes (ham, spam)"],
        ),
        (
            "unknown.jsonl",
            "{ kind = 'classes', label = 'n', labels = ['ham', 'spam'] }",
            &["unknown.jsonl:3", "label 2", "from 0 to 1"],
        ),
        ("mixed.jsonl", "{ kind = 'classes' }", &["mixed.jsonl:3", "label 3", "names or all as numbers"]),
        ("mixed.jsonl", "{ kind = 'classes', label = 'n' }", &["mixed.jsonl:3", "label -1"]),
        ("same.jsonl", "{ kind = 'classes' }", &["same.jsonl:", "two classes at least"]),
        ("words.jsonl", "{ kind = 'token_classes' }", &["words.jsonl:3", "2 words and 1 labels"]),
        (
            "places.jsonl",
            "{ kind = 'token_classes', spans = 'spans' }",
            &["places.jsonl:3", "span 1 to 9", "3 characters"],
        ),
        (
            "numbers.jsonl",
            "{ kind = 'values', label = 'size' }",
            &["numbers.jsonl:3", "1 numbers as in the first row, got 2"],
        ),
        ("text.jsonl", "{ kind = 'values', label = 'size' }", &["text.jsonl:3", "expected a number"]),
        ("list.jsonl", "{ kind = 'classes' }", &["list.jsonl:3", "expected text, got a list"]),
        ("list.jsonl", "{ kind = 'embedding' }", &["list.jsonl:3", "`anchor`", "a number"]),
        (
            "rows.jsonl",
            "{ kind = 'classes', labels = ['boiler', 'whistle'], val = 'unknown.jsonl' }",
            &["unknown.jsonl:1", "label \"ham\""],
        ),
        ("rows.jsonl", "{ kind = 'classes', pooler = 'last' }", &["head.pooler", "encoder"]),
        ("rows.jsonl", "{ kind = 'embedding', temperature = 0.0 }", &["temperature", "positive"]),
        ("rows.jsonl", "{ kind = 'klasses' }", &["klasses", "did you mean `classes`?"]),
        ("rows.jsonl", "{ kind = 'classes', txt = 'x' }", &["txt", "did you mean `text`?"]),
        ("docs.jsonl", "{ kind = 'masked', mask_fraction = 1.5 }", &["task.mask_fraction", "1.5"]),
        ("docs.jsonl", "{ kind = 'spans' }", &["head", "language"]),
    ] {
        let task = format!("task={task}");
        let args = ["train", "labels.toml", "--data", data, "--set", ENCODER, "--set", &task];
        lab.call(&args).failed(2, words);
    }
    lab.call(&["train", "labels.toml", "--data", "docs.jsonl", "--set", "task={ kind = 'masked' }"])
        .failed(2, &["head", "masked"]);
    assert!(!lab.path("runs").exists(), "nothing was started");
}
