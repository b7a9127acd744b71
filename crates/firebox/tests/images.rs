//! `firebox` on images: what is learned without labels is of use with them, and evaluations say what a run said, whatever form the data have.
#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::sync::Arc;

use common::{Ended, Lab};
use firebox_data::images::png;
use parquet::data_type::{ByteArray, ByteArrayType};
use serde_json::{Value, json};

#[path = "../../data/examples/shapes.rs"]
mod shapes;

const SIDE: usize = 8;

/// The lit segments of a digit: top, upper left and right, middle, lower left and right, bottom.
const SEGMENTS: [[u8; 7]; 10] = [
    [1, 1, 1, 0, 1, 1, 1],
    [0, 0, 1, 0, 0, 1, 0],
    [1, 0, 1, 1, 1, 0, 1],
    [1, 0, 1, 1, 0, 1, 1],
    [0, 1, 1, 1, 0, 1, 0],
    [1, 1, 0, 1, 0, 1, 1],
    [1, 1, 0, 1, 1, 1, 1],
    [1, 0, 1, 0, 0, 1, 0],
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 1, 1],
];

/// A number below `n`, of the number of a picture and of a choice.
fn choice(picture: usize, choice: usize, n: usize) -> usize {
    let mut x = (picture * 128 + choice) as u64 + 0x9e37;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) % n as u64) as usize
}

/// A digit of five by seven pixels somewhere in a noisy picture, and which it is.
fn digit(i: usize) -> (Vec<u8>, usize) {
    let label = choice(i, 0, 10);
    let (left, top, ink) = (choice(i, 1, 4), choice(i, 2, 2), 110 + choice(i, 3, 100));
    let mut pixels: Vec<u8> = (0..SIDE * SIDE).map(|at| choice(i, 4 + at, 90) as u8).collect();
    let mut draw = |x: usize, y: usize| {
        let pixel = &mut pixels[(top + y) * SIDE + left + x];
        *pixel = pixel.saturating_add(ink as u8);
    };
    for (segment, lit) in SEGMENTS[label].iter().enumerate() {
        if *lit == 0 {
            continue;
        }
        match segment {
            0 | 3 | 6 => (1..4).for_each(|x| draw(x, segment)),
            1 | 4 => (1..3).for_each(|y| draw(0, if segment == 1 { y } else { y + 3 })),
            _ => (1..3).for_each(|y| draw(4, if segment == 2 { y } else { y + 3 })),
        }
    }
    (png(&pixels, SIDE, 1), label)
}

/// Digits number `first..first + n` in a folder for each class.
fn digits(lab: &Lab, name: &str, first: usize, n: usize) {
    for i in first..first + n {
        let (png, label) = digit(i);
        lab.write(&format!("{name}/{label}/{i}.png"), png);
    }
}

fn call(lab: &Lab, args: &[&str], set: &[&str]) -> Ended {
    let set = set.iter().flat_map(|set| ["--set", set]);
    lab.call(&args.iter().copied().chain(set).collect::<Vec<_>>())
}

/// What `firebox eval --json` says.
fn evaluated(lab: &Lab, model: &str, data: &str) -> Value {
    let ended = lab.call(&["eval", model, "--data", data, "--json"]).succeeded();
    serde_json::from_str(&ended.stdout).unwrap()
}

/// What the last evaluation of a run measured besides its loss.
fn measured(lab: &Lab, run: &str) -> Value {
    let metrics = lab.run(run).metrics();
    metrics.into_iter().rev().map(|mut row| row["metrics"].take()).find(Value::is_object).unwrap()
}

/// The accuracy of a linear layer on the features of an encoder that stays as it is.
fn probe(lab: &Lab, encoder: &str) -> f64 {
    let out = format!("{encoder}-probe");
    let args = ["finetune", "--from", encoder, "--task", "image_classes", "--data", "train", "--out", &out];
    let set = [
        "task.val=\"test\"",
        "freeze.params=[\"embed*\", \"patches*\", \"positions*\", \"blocks.*\", \"norm.*\"]",
        "train.steps=400",
        "train.batch_rows=64",
        "train.micro_batch_rows=64",
        "optimizer.lr=1e-2",
        "optimizer.weight_decay=0.0",
        "eval.every=400",
        "schedule.warmup_steps=20",
    ];
    call(lab, &args, &set).succeeded();
    measured(lab, &out)["accuracy"].as_f64().unwrap()
}

#[test]
fn a_linear_layer_reads_more_of_a_masked_autoencoder_than_of_a_random_encoder() {
    let lab = Lab::new(1);
    digits(&lab, "train", 0, 1500);
    digits(&lab, "test", 1500, 300);
    let pretrain = |out: &str, steps: &str, lr: &str| {
        let set = [
            "model={ image = { size = 8, patch = 2, channels = 1 }, d_model = 64, d_ff = 128, n_layers = 4, n_heads = 4 }",
            "eval.every=0",
            "checkpoint.every=0",
            "schedule.warmup_steps=20",
            &format!("train.steps={steps}"),
            &format!("optimizer.lr={lr}"),
        ];
        call(&lab, &["train", "masked-image", "--data", "train", "--out", out], &set).succeeded();
    };
    pretrain("random", "21", "1e-9");
    pretrain("learned", "1500", "1e-3");
    let [random, learned] = ["random", "learned"].map(|encoder| probe(&lab, encoder));
    println!("a linear layer on a random encoder {random:.3}, on a masked autoencoder {learned:.3}");
    assert!(learned > random + 0.1, "random {random}, learned {learned}");
}

/// Rows `{image: {bytes}, label}`, as Hugging Face's data sets have them.
fn parquet(lab: &Lab, name: &str, rows: &[(Vec<u8>, String)]) {
    let schema = "message m { optional group image { optional binary bytes; } required binary label (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let file = std::fs::File::create(lab.path(name)).unwrap();
    let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let images: Vec<ByteArray> = rows.iter().map(|(png, _)| png.clone().into()).collect();
    let labels: Vec<ByteArray> = rows.iter().map(|(_, label)| label.as_str().into()).collect();
    for (values, levels) in [(images, Some(vec![2; rows.len()])), (labels, None)] {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, levels.as_deref(), None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn folders_lines_and_parquet_of_the_same_images_are_evaluated_alike() {
    let lab = Lab::new(1);
    digits(&lab, "train", 0, 200);
    digits(&lab, "test", 200, 60);
    let rows: Vec<(Vec<u8>, String)> = (200..260).map(digit).map(|(png, label)| (png, label.to_string())).collect();
    parquet(&lab, "test.parquet", &rows);
    let mut lines = String::new();
    for (i, (_, label)) in rows.iter().enumerate() {
        let row = json!({ "image": format!("test/{label}/{}.png", 200 + i), "label": label });
        writeln!(lines, "{row}").unwrap();
    }
    lab.write("test.jsonl", lines);
    let set = [
        "task.val=\"test\"",
        "model.image={ size = 8, patch = 2, channels = 1 }",
        "model.d_model=32",
        "model.d_ff=64",
        "model.n_layers=2",
        "model.dropout=0.0",
        "train.steps=250",
        "train.batch_rows=32",
        "schedule.warmup_steps=5",
        "eval.every=250",
    ];
    call(&lab, &["train", "image-classes", "--data", "train", "--out", "classes"], &set).succeeded();
    let last = measured(&lab, "classes");
    assert!(last["accuracy"].as_f64().unwrap() > 0.2, "{last}");
    for data in ["test", "test.jsonl", "test.parquet"] {
        let found = evaluated(&lab, "classes", data);
        for key in ["accuracy", "macro_f1"] {
            let (got, want) = (found[key].as_f64(), last[key].as_f64());
            assert!(got.is_some() && got == want, "{data} {key}: {found} {last}");
        }
    }
    // Some of the training data as rows of .parquet.
    parquet(
        &lab,
        "train.parquet",
        &(0..40).map(digit).map(|(png, label)| (png, label.to_string())).collect::<Vec<_>>(),
    );
    let few = [
        "train.steps=2",
        "data.val_fraction=0.2",
        "model.image={ size = 8, patch = 2, channels = 1 }",
        "schedule.warmup_steps=1",
    ];
    call(&lab, &["train", "image-classes", "--data", "train.parquet", "--out", "of-parquet"], &few).succeeded();
    lab.write("torn.parquet", &std::fs::read(lab.path("test.parquet")).unwrap()[..200]);
    lab.call(&["eval", "classes", "--data", "torn.parquet"]).failed(2, &["torn.parquet"]);
}

#[test]
fn retrieval_is_evaluated_as_the_run_did() {
    let lab = Lab::new(1);
    shapes::write(&lab.path("pairs"), 120, 16, 1);
    shapes::write(&lab.path("held"), 30, 16, 2);
    let set = [
        "task.val=\"held/rows.jsonl\"",
        "task.width=16",
        "model.image={ size = 16, patch = 4, channels = 3, bias = false }",
        "model.d_model=32",
        "model.d_ff=64",
        "model.n_layers=1",
        "train.steps=10",
        "train.batch_rows=16",
        "schedule.warmup_steps=2",
        "eval.every=10",
        "data.vocab_size=300",
    ];
    call(&lab, &["train", "image-text", "--data", "pairs/rows.jsonl", "--out", "towers"], &set).succeeded();
    let found = evaluated(&lab, "towers", "held/rows.jsonl");
    let last = measured(&lab, "towers");
    let of_run = last.as_object().unwrap();
    let recalls: Vec<&String> = of_run.keys().filter(|key| key.contains("recall")).collect();
    assert_eq!(recalls.len(), 4, "{last}");
    for key in recalls {
        assert_eq!(found[key], of_run[key], "{key}: {found}");
    }
}
