//! `firebox draw`, from pictures to a picture: what the commands of the manual do, small.
#![allow(clippy::unwrap_used)]

mod common;

use common::Lab;

#[path = "../../data/examples/shapes.rs"]
mod shapes;

/// Small models, few steps.
const SMALL: [&str; 10] = [
    "model.n_layers=1",
    "model.d_model=32",
    "model.n_heads=2",
    "train.steps=4",
    "train.batch_rows=4",
    "train.log_every=1",
    "schedule={ kind = \"constant\" }",
    "data.val_fraction=0.2",
    "eval.every=2",
    "checkpoint.every=2",
];

fn train(recipe: &str, out: &str, more: &[&str]) -> Vec<String> {
    let mut args = vec!["train", recipe, "--data", "shapes", "--out", out];
    SMALL.iter().chain(more).for_each(|set| args.extend(["--set", set]));
    args.into_iter().map(String::from).collect()
}

#[test]
fn pictures_are_learned_and_drawn() {
    let lab = Lab::new(1);
    shapes::write(&lab.path("shapes"), 20, 16, 1);
    let call = |args: &[String]| lab.call(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let image = "model.image={ size = 16, patch = 4, channels = 3 }";
    call(&train("image-tokens", "vq", &[image, "task.codes=16"])).succeeded();
    let drawing = ["task.text_tokens=40", "data.tokenizer=char", "eval.sample_tokens=1"];
    let missing = call(&train("text-to-image", "t2i", &drawing));
    missing.failed(2, &["task.image_tokens", "image_tokens"]);
    let with = [&drawing[..], &["task.image_tokens=\"vq\""]].concat();
    call(&train("text-to-image", "t2i", &with)).succeeded();
    assert!(lab.path("t2i/samples/step-4.png").is_file() && lab.path("t2i/samples/step-2.png").is_file());
    // What is needed goes along.
    std::fs::rename(lab.path("vq"), lab.path("elsewhere")).unwrap();
    let draw = |prompt: &str| lab.call(&["draw", "t2i", "--prompt", prompt, "--out", "a.png"]);
    draw("a red circle in the middle").succeeded();
    let png = std::fs::read(lab.path("a.png")).unwrap();
    assert!(png.starts_with(b"\x89PNG\r\n"), "{:?}", &png[..8]);
    draw(&"a red circle ".repeat(9)).failed(2, &["the caption has", "expected at most 39"]);
    lab.call(&["draw", "elsewhere", "--prompt", "a", "--out", "b.png"]).failed(2, &["text_to_image"]);
    lab.call(&["generate", "elsewhere"]).failed(2, &["firebox_vq"]);
    call(&train("image-tokens", "bad", &["model.image={ size = 30, patch = 4, channels = 3 }"]))
        .failed(2, &["image.patch", "must divide"]);
}
