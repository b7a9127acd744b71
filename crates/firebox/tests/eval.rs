//! `firebox eval`: questions in all forms, and rows that are none.
#![allow(clippy::unwrap_used)]

mod common;

use common::Lab;
use serde_json::{Value, json};

/// A lab with a run of one step on characters, those of questions among them.
fn lab() -> Lab {
    let lab = Lab::new(40);
    let text = std::fs::read_to_string(lab.path("docs.jsonl")).unwrap();
    lab.write("docs.jsonl", text.replace(".\\n", ".\\nQuestion: who opens it?\\nAnswer: warms, "));
    let set = ["train.steps=1", "eval.every=0", "schedule={ kind = 'constant' }"].map(|set| ["--set", set]);
    lab.trained("run", set.as_flattened());
    lab
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[test]
fn questions_are_answered() {
    let lab = lab();
    let rows: Vec<Value> = (0..5)
        .map(|i| json!({ "query": "The boiler feeds", "choices": ["the fire", "the valve, 3 times"], "answer": i % 2 }))
        .collect();
    lab.write("rows.jsonl", lines(&rows));
    let arc =
        json!({ "question": "w", "choices": { "text": ["fire", "valve"], "label": ["A", "B"] }, "answerKey": "B" });
    let other = json!({ "question": "o", "choices": { "text": ["a", "b"], "label": ["A", "B"] }, "answerKey": "A" });
    lab.write("other.jsonl", lines(&[other]));
    lab.write("arc.jsonl", lines(&[arc.clone(), arc]));
    let hellaswag = json!({ "activity_label": "The driver", "ctx_a": "warms", "ctx_b": "the", "endings": ["fire", "valve"], "label": "1" });
    lab.write("hellaswag.jsonl", lines(&[hellaswag]));

    let ended = lab.call(&["eval", "run", "--data", "rows.jsonl", "--json", "--out", "found.json"]).succeeded();
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&found["task"], &found["rows"], &found["shots"]), (&json!("choices"), &json!(5), &json!(0)));
    // One answer is the most likely one, the same for all.
    let acc = found["acc"].as_f64().unwrap();
    assert!(acc == 0.4 || acc == 0.6, "{acc}");
    assert!(found["acc_norm"].is_f64() && found["acc_norm_stderr"].is_f64());
    let all: Value = serde_json::from_slice(&std::fs::read(lab.path("found.json")).unwrap()).unwrap();
    let of_rows = all["questions"].as_array().unwrap();
    assert_eq!(of_rows.len(), 5);
    let first = &of_rows[0]["log_likelihoods"];
    // 18 characters of 30 or so, after one step.
    let nats = first[1].as_f64().unwrap();
    assert!((-100.0..-20.0).contains(&nats), "{first}");
    // However many come with it.
    for row in of_rows {
        let (a, b) = (row["log_likelihoods"][1].as_f64().unwrap(), nats);
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }

    let ended = lab.call(&["eval", "run", "--data", "arc.jsonl"]).succeeded();
    let table: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(table[0], "task  shots  rows     score   value  stderr");
    assert!(table[1].starts_with("arc       0     2       acc  "), "{table:?}");
    let ended = lab.call(&["eval", "run", "--data", "hellaswag.jsonl", "--json"]).succeeded();
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&found["task"], &found["acc_stderr"]), (&json!("hellaswag"), &Value::Null));
    // Examples change what the model sees.
    let shown = |args: &[&str]| -> Value {
        let args = [&["eval", "run", "--data", "arc.jsonl", "--out", "shown.json"], args].concat();
        lab.call(&args).succeeded();
        serde_json::from_slice(&std::fs::read(lab.path("shown.json")).unwrap()).unwrap()
    };
    let (none, one) = (shown(&[]), shown(&["--shots", "1", "--shots-from", "other.jsonl"]));
    assert_ne!(none["questions"], one["questions"]);
}

#[test]
fn text_is_measured() {
    let lab = lab();
    let ended = lab.call(&["eval", "run", "--data", "docs.jsonl", "--json"]).succeeded();
    let found: Value = serde_json::from_str(&ended.stdout).unwrap();
    let (loss, perplexity) = (found["loss"].as_f64().unwrap(), found["perplexity"].as_f64().unwrap());
    assert!((loss.exp() - perplexity).abs() < 1e-9 && found["task"] == "text");
    let ended = lab.call(&["eval", "run", "--data", "docs.jsonl"]).succeeded();
    assert!(ended.stdout.starts_with("loss ") && ended.stdout.contains("nats per token"), "{}", ended.stdout);
}

/// Rows whose class is in their words.
fn reviews(n: usize) -> String {
    let row = |i: usize| {
        let (label, word) = [("good", "shines"), ("bad", "leaks"), ("old", "rusts")][i % 3];
        json!({ "sentence": format!("The boiler {i} {word}"), "label": label })
    };
    lines(&(0..n).map(row).collect::<Vec<_>>())
}

#[test]
fn labels_are_compared() {
    let lab = Lab::new(4);
    lab.write("rows.jsonl", reviews(30));
    lab.write("val.jsonl", reviews(12));
    let recipe = lab.write("small.toml", common::SMALL);
    let task = r#"task={ kind = "classes", text = "sentence", val = "val.jsonl" }"#;
    let args = ["train", recipe.to_str().unwrap(), "--data", "rows.jsonl", "--out", "run", "--set", task];
    lab.call(&[&args[..], &["--set", "train.steps=20"]].concat()).succeeded();
    let run = lab.run("run");
    let last = run.metrics().into_iter().rfind(|line| line["metrics"].is_object()).unwrap();
    let eval = |args: &[&str]| lab.call(&[&["eval", "run", "--data", "val.jsonl"], args].concat());
    // Which field holds the text says the run's recipe.
    let found: Value = serde_json::from_str(&eval(&["--json"]).succeeded().stdout).unwrap();
    assert_eq!((&found["task"], &found["rows"]), (&json!("classes"), &json!(12)));
    for (name, want) in last["metrics"].as_object().unwrap() {
        assert_eq!(&found[name], want, "{name}");
    }
    let (loss, want) = (found["loss"].as_f64().unwrap(), last["val_loss"].as_f64().unwrap());
    assert!((loss - want).abs() < 1e-5, "{loss} {want}");
    assert!(last["metrics"].get("accuracy").is_some());
    // Rows of one class alone are still of three.
    lab.write("one.jsonl", lines(&[json!({ "sentence": "The boiler leaks", "label": "bad" })]));
    let ended = lab.call(&["eval", "run", "--data", "one.jsonl"]).succeeded();
    assert!(ended.stdout.contains("f1 bad") && ended.stdout.contains("f1 old"), "{}", ended.stdout);
    lab.write("new.jsonl", lines(&[json!({ "sentence": "The boiler sings", "label": "loud" })]));
    lab.call(&["eval", "run", "--data", "new.jsonl"]).failed(2, &["new.jsonl:1", "loud", "bad, good, old"]);
    lab.write("number.jsonl", lines(&[json!({ "sentence": "The boiler sings", "label": 3 })]));
    lab.call(&["eval", "run", "--data", "number.jsonl"]).failed(2, &["number.jsonl:1", "0 to 2"]);
    eval(&["--set", "task.text=words"]).failed(2, &["no field `words`"]);
    eval(&["--set", "task.texts=words"]).failed(2, &["texts"]);
    eval(&["--set", "task.kind=values"]).failed(2, &["task.kind"]);
    eval(&["--task", "arc"]).failed(2, &["predicts the next token"]);
}

#[test]
fn bad_rows() {
    let lab = lab();
    let good = json!({ "context": "The fire", "choices": ["warms", "opens"], "gold": 0 });
    let with = |key: &str, value: Value| {
        let mut row = good.clone();
        row[key] = value;
        row
    };
    let arc = |key: &str| json!({ "question": "The", "choices": { "text": ["a", "b"], "label": ["A", "B"] }, "answerKey": key });
    let cases: &[(&str, Value, &[&str])] = &[
        ("choices", with("gold", json!(2)), &[":2:", "`gold`", "0 to 1", "got 2"]),
        ("choices", with("gold", json!(-1)), &["`gold`", "got -1"]),
        ("choices", with("gold", json!("closes")), &["`gold`", "closes"]),
        ("choices", with("gold", Value::Null), &["no field `gold`"]),
        ("choices", with("choices", json!(["warms"])), &["two choices or more, got 1"]),
        ("choices", with("choices", json!(["warms", ""])), &["an empty one"]),
        ("choices", with("choices", json!("warms")), &["`choices`", "a list of texts"]),
        ("choices", with("context", json!(3)), &["`context`", "expected text, got a number"]),
        ("choices", with("choices", json!(["warms", "warms ".repeat(9)])), &["choice", "1 to 24 tokens", "got 55"]),
        ("choices", with("context", json!("ж")), &["ж"]),
        ("arc", arc("C"), &["`answerKey`", "one of A, B", "\"C\""]),
        ("arc", json!({ "question": "The", "choices": ["a"], "answerKey": "A" }), &["`choices`", "`text` and `label`"]),
        (
            "hellaswag",
            json!({ "activity_label": "The", "ctx": "fire", "endings": ["a", "b"], "label": "" }),
            &["`label`", "0 to 1"],
        ),
    ];
    for (task, row, words) in cases {
        let first = match *task {
            "arc" => arc("A"),
            "hellaswag" => json!({ "activity_label": "The", "ctx": "fire", "endings": ["a", "b"], "label": "0" }),
            _ => good.clone(),
        };
        lab.write("rows.jsonl", lines(&[first, row.clone()]));
        lab.call(&["eval", "run", "--data", "rows.jsonl", "--task", task, "--out", "found.json"]).failed(2, words);
    }
    lab.write("rows.jsonl", lines(&[good]));
    lab.call(&["eval", "run", "--data", "rows.jsonl", "--task", "riddles"]).failed(2, &["riddles", "hellaswag"]);
    lab.call(&["eval", "run", "--data", "rows.jsonl", "--shots", "1"]).failed(2, &["shots", "the 0 examples"]);
    lab.call(&["eval", "run", "--data", "docs.jsonl", "--shots", "1"]).failed(2, &["--shots", "0 of text"]);
    lab.call(&["eval", "run", "--data", "absent.jsonl", "--task", "arc"]).failed(2, &["absent.jsonl"]);
    lab.call(&["eval", "absent", "--data", "rows.jsonl"]).failed(2, &["absent"]);
    assert!(!lab.path("found.json").exists(), "nothing is written");
}
