//! Tasks on images: generated pictures are told apart and find their captions; the losses are the same whatever ranks there are, and after a resume.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use firebox_data::Tokenizer;
use firebox_data::images::Preprocess;
use firebox_models::clip::Clip;
use firebox_models::transformer::ImageConfig;
use firebox_parallel::{Communicator, WorldError, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::Checkpoint;
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo};
use firebox_train::task::images::{ImageClasses, ImageText, Images};
use firebox_train::task::{Model, Task, TaskRecipe, load_clip};
use firebox_train::{Layout, Recipe, TrainError, Trainer, Zero};
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

const SIDE: usize = 16;
const SHAPES: [&str; 3] = ["square", "cross", "ring"];
const COLORS: [(&str, [u8; 3]); 4] =
    [("red", [220, 40, 40]), ("green", [40, 200, 60]), ("blue", [50, 70, 230]), ("white", [240, 240, 240])];
const PLACES: [(&str, usize, usize); 4] =
    [("top left", 0, 0), ("top right", 8, 0), ("bottom left", 0, 8), ("bottom right", 8, 8)];

/// A number below `n`, of the number of a picture and of a choice.
fn choice(picture: usize, choice: usize, n: usize) -> usize {
    let mut x = (picture * 8 + choice) as u64 + 0x9e37;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) % n as u64) as usize
}

/// A shape of 6 x 6 pixels in a quarter of a dark picture, moved by a pixel or two, as a PNG; its shape and caption.
fn picture(i: usize) -> (Vec<u8>, &'static str, String) {
    let (shape, color, place) = (choice(i, 0, 3), choice(i, 1, 4), choice(i, 2, 4));
    let (dx, dy) = (choice(i, 3, 3), choice(i, 4, 3));
    let (color_name, color) = COLORS[color];
    let (place_name, left, top) = PLACES[place];
    let mut pixels: Vec<u8> = (0..SIDE * SIDE * 3).map(|at| choice(i, at + 5, 40) as u8).collect();
    for y in 0..6 {
        for x in 0..6 {
            let inside = match SHAPES[shape] {
                "square" => true,
                "cross" => matches!(x, 2 | 3) || matches!(y, 2 | 3),
                _ => matches!(x, 0 | 5) || matches!(y, 0 | 5),
            };
            if inside {
                let at = ((top + dy + y) * SIDE + left + dx + x) * 3;
                pixels[at..at + 3].copy_from_slice(&color);
            }
        }
    }
    let mut png = vec![];
    PngEncoder::new(&mut png).write_image(&pixels, SIDE as u32, SIDE as u32, ExtendedColorType::Rgb8).unwrap();
    (png, SHAPES[shape], format!("a {color_name} {} at the {place_name}", SHAPES[shape]))
}

/// `n` pictures from number `first` on in a folder, with a line of .jsonl for each.
fn pictures(dir: &Path, name: &str, first: usize, n: usize) -> String {
    std::fs::create_dir_all(dir.join(name)).unwrap();
    let mut lines = String::new();
    for i in first..first + n {
        let (png, shape, caption) = picture(i);
        std::fs::write(dir.join(format!("{name}/{i}.png")), png).unwrap();
        lines += &format!("{{\"image\": \"{i}.png\", \"label\": \"{shape}\", \"caption\": \"{caption}\"}}\n");
    }
    let path = dir.join(format!("{name}/rows.jsonl"));
    std::fs::write(&path, lines).unwrap();
    path.display().to_string()
}

fn recipe(name: &str, extra: &[&str]) -> Recipe {
    let base = [
        "model.n_layers=2",
        "model.d_model=32",
        "model.n_heads=2",
        "model.d_ff=64",
        "train.log_every=1",
        "eval.every=0",
        "checkpoint.every=0",
        "schedule={ kind = \"constant\" }",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load(name, &set).unwrap()
}

fn classes(extra: &[&str]) -> Recipe {
    let base = [
        "model.image={ size = 16, patch = 4, channels = 3 }",
        "model.head={ classes = { n = 3, pooler = \"first\" } }",
    ];
    recipe("image-classes", &base.iter().chain(extra).copied().collect::<Vec<_>>())
}

fn towers(extra: &[&str]) -> Recipe {
    let base =
        ["model.image={ size = 16, patch = 4, channels = 3, bias = false }", "task.width=24", "task.text.context=40"];
    recipe("image-text", &base.iter().chain(extra).copied().collect::<Vec<_>>())
}

#[derive(Default)]
struct Seen {
    losses: Vec<f64>,
    metrics: Vec<(String, f64)>,
}

impl Observer for Seen {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::Step(step) => self.losses.push(step.loss),
            Event::Evaluated(eval) => {
                self.metrics = eval.metrics.iter().map(|(name, value)| (name.clone(), *value)).collect();
            }
            _ => {}
        }
        Ok(())
    }
}

impl Seen {
    fn metric(&self, name: &str) -> f64 {
        let found = self.metrics.iter().find(|(key, _)| key == name);
        found.unwrap_or_else(|| panic!("no {name} among {:?}", self.metrics)).1
    }
}

/// A task and the model that it starts with.
trait Case<M: Model>: Task<M> + Clone + 'static {
    fn model(&self, recipe: &Recipe) -> M;
}

impl Case<firebox_models::transformer::Transformer> for ImageClasses {
    fn model(&self, recipe: &Recipe) -> firebox_models::transformer::Transformer {
        recipe.first_model(1, &Backend::NdArray.device().unwrap()).unwrap()
    }
}

impl Case<Clip> for ImageText {
    fn model(&self, recipe: &Recipe) -> Clip {
        let TaskRecipe::ImageText(task) = &recipe.task else { panic!("another task") };
        let config = task.towers(recipe, self.tokenizer().unwrap()).unwrap();
        Clip::new(&config, recipe.seed, &Backend::NdArray.device().unwrap().autodiff()).unwrap()
    }
}

fn run_one<M: Model>(
    task: &impl Case<M>,
    recipe: &Recipe,
    dir: &Path,
    from: Option<&Path>,
    ranks: Option<(Communicator, Layout)>,
) -> Result<Seen, TrainError> {
    let device = Backend::NdArray.device().unwrap();
    let (task, model) = (Box::new(task.clone()), task.model(recipe));
    let checkpoint = from.map(|from| Checkpoint::open(from).unwrap());
    let mut trainer = match &checkpoint {
        Some(checkpoint) => Trainer::open_task(recipe.clone(), dir, task, &device, model, checkpoint)?,
        None => Trainer::of_task(recipe.clone(), dir, task, &device, model)?,
    };
    if let Some((comm, layout)) = ranks {
        trainer = trainer.with_ranks(comm, layout)?;
    }
    if let Some(checkpoint) = &checkpoint {
        trainer.restore(checkpoint)?;
    }
    let mut seen = Seen::default();
    trainer.run(&RunInfo::default(), &mut seen, &AtomicBool::new(false))?;
    Ok(seen)
}

/// The losses on two ranks.
fn on_two<M: Model>(
    task: &impl Case<M>,
    recipe: &Recipe,
    dir: PathBuf,
    layout: Layout,
) -> Result<Vec<f64>, Box<WorldError<TrainError>>> {
    let (task, recipe) = (task.clone(), recipe.clone());
    let mut seen = spawn(2, move |comm| {
        let _threads = threads::for_rank(1).unwrap();
        run_one(&task, &recipe, &dir, None, Some((comm, layout)))
    })?;
    Ok(seen.swap_remove(0).losses)
}

fn zero(zero: Zero) -> Layout {
    Layout { zero, ..Layout::default() }
}

fn tensor_parallel() -> Layout {
    Layout { tp: 2, ..Layout::default() }
}

#[track_caller]
fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * want.abs(), "{what}, step {step}: {got}, and on one rank {want}");
    }
}

fn same_model(a: &Path, b: &Path, step: u64) -> bool {
    let [a, b] =
        [a, b].map(|dir| std::fs::read(dir.join(format!("checkpoints/step-{step}/model.safetensors"))).unwrap());
    a == b
}

/// Sums in another order, over a few steps of training.
const ROUNDING: f64 = 2e-5;

fn class_task(dir: &Path, recipe: &Recipe, train: usize, held_out: usize) -> ImageClasses {
    let image = recipe.model.image.unwrap();
    let [train, val] =
        [("train", 0, train), ("val", 5000, held_out)].map(|(name, first, n)| pictures(dir, name, first, n));
    let images = Images::read(&[train], Some(&val), 0.0, Preprocess::vit(image.size, image.channels)).unwrap();
    let TaskRecipe::ImageClasses(task) = &recipe.task else { panic!("another task") };
    ImageClasses::new(recipe, task, &image, images).unwrap()
}

fn text_task(dir: &Path, recipe: &Recipe, train: usize, held_out: usize) -> ImageText {
    let image: ImageConfig = recipe.model.image.unwrap();
    let [train, val] =
        [("train", 0, train), ("val", 5000, held_out)].map(|(name, first, n)| pictures(dir, name, first, n));
    let images = Images::read(&[train], Some(&val), 0.0, Preprocess::clip(image.size, image.channels)).unwrap();
    let TaskRecipe::ImageText(task) = &recipe.task else { panic!("another task") };
    let captions = ImageText::captions(task, &images).unwrap();
    let tokenizer = Tokenizer::train_bpe(&captions, 300).unwrap();
    ImageText::new(recipe, task, 40, tokenizer, images).unwrap()
}

#[test]
fn a_vision_transformer_tells_shapes_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = classes(&["train.steps=500", "train.batch_rows=32", "model.dropout=0.0", "optimizer.lr=3e-3"]);
    let task = class_task(dir.path(), &recipe, 600, 100);
    assert_eq!(task.classes(), ["cross", "ring", "square"]);
    recipe.model.labels = task.classes().to_vec();
    let out = dir.path().join("run");
    let seen = run_one(&task, &recipe, &out, None, None).unwrap();
    let accuracy = seen.metric("accuracy");
    assert!(accuracy >= 0.95, "accuracy {accuracy}");
    let checkpoint = out.join("checkpoints/step-500");
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(checkpoint.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["id2label"]["1"], "ring");
    let file = std::fs::read(checkpoint.join("preprocessor_config.json")).unwrap();
    let read = Preprocess::from_json(&serde_json::from_slice(&file).unwrap(), SIDE, 3).unwrap();
    assert_eq!(read, Preprocess::vit(SIDE, 3));
}

#[test]
fn classes_have_the_losses_of_one_rank_on_several() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = classes(&[
        "train.steps=6",
        "train.batch_rows=16",
        "train.micro_batch_rows=4",
        "checkpoint={ every = 3, keep_last = 5 }",
    ]);
    let task = class_task(dir.path(), &recipe, 64, 16);
    let one = dir.path().join("one");
    let alone = run_one(&task, &recipe, &one, None, None).unwrap();
    let two = |layout, name: &str| on_two(&task, &recipe, dir.path().join(name), layout).unwrap();
    assert_eq!(two(zero(Zero::None), "dp"), alone.losses);
    assert!(same_model(&one, &dir.path().join("dp"), 6));
    assert_close("zero 3", &two(zero(Zero::Parameters), "zero"), &alone.losses, ROUNDING);
    assert_close("tp", &two(tensor_parallel(), "tp"), &alone.losses, ROUNDING);
    let again = dir.path().join("again");
    let resumed = run_one(&task, &recipe, &again, Some(&one.join("checkpoints/step-3")), None).unwrap();
    assert_eq!(resumed.losses, alone.losses[3..]);
    assert!(same_model(&one, &again, 6));
    // Dropout's masks depend on no layout, but tokens are divided where there is a head of tokens alone.
    let divided = Layout { sequence_parallel: true, ..tensor_parallel() };
    let error = on_two(&task, &recipe, dir.path().join("sp"), divided).unwrap_err().to_string();
    assert!(error.contains("sequence parallelism off"), "{error}");
}

#[test]
fn captions_and_pictures_find_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = towers(&["train.steps=900", "train.batch_rows=48", "optimizer.lr=3e-3"]);
    let task = text_task(dir.path(), &recipe, 800, 100);
    let out = dir.path().join("run");
    let seen = run_one(&task, &recipe, &out, None, None).unwrap();
    for name in ["text_recall_at_1", "image_recall_at_1"] {
        assert!(seen.metric(name) > 0.9, "{name}: {}", seen.metric(name));
    }
    // What was saved is what was evaluated.
    let loaded = load_clip(&out, &Backend::NdArray.device().unwrap()).unwrap();
    assert_eq!(loaded.tokenizer.unwrap().json(), task.tokenizer().unwrap().json());
    let mut again = task.evaluate(&loaded.model, usize::MAX);
    again.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(again, seen.metrics);
}

#[test]
fn captions_have_the_losses_of_one_rank_on_several() {
    let dir = tempfile::tempdir().unwrap();
    let set = |micro: &'static str| {
        ["train.steps=6", "train.batch_rows=16", micro, "checkpoint={ every = 3, keep_last = 5 }"]
    };
    // All rows are compared with each other: those of one micro-batch, or of the two that two ranks have at the same time.
    let (whole, halves) = (towers(&set("train.micro_batch_rows=16")), towers(&set("train.micro_batch_rows=8")));
    let task = text_task(dir.path(), &whole, 64, 16);
    let one = dir.path().join("one");
    let alone = run_one(&task, &whole, &one, None, None).unwrap();
    assert!(alone.losses[5] < alone.losses[0]);
    let two = |recipe: &Recipe, layout, name: &str| on_two(&task, recipe, dir.path().join(name), layout).unwrap();
    assert_close("dp", &two(&halves, zero(Zero::None), "dp"), &alone.losses, ROUNDING);
    assert_close("zero 3", &two(&halves, zero(Zero::Parameters), "zero"), &alone.losses, ROUNDING);
    assert_close("tp", &two(&whole, tensor_parallel(), "tp"), &alone.losses, ROUNDING);
    // Two rounds of two micro-batches are those of one rank with twice the rows in each.
    let (rounds, quarters) = (towers(&set("train.micro_batch_rows=8")), towers(&set("train.micro_batch_rows=4")));
    let in_rounds = run_one(&task, &rounds, &dir.path().join("rounds"), None, None).unwrap();
    assert!((in_rounds.losses[0] - alone.losses[0]).abs() > 1e-2, "fewer rows to tell apart are another loss");
    assert_close("rounds", &two(&quarters, zero(Zero::None), "quarters"), &in_rounds.losses, ROUNDING);
    let again = dir.path().join("again");
    let resumed = run_one(&task, &whole, &again, Some(&one.join("checkpoints/step-3")), None).unwrap();
    assert_eq!(resumed.losses, alone.losses[3..]);
    assert!(same_model(&one, &again, 6));
    let refuse = |recipe: &Recipe, layout, name: &str| {
        on_two(&task, recipe, dir.path().join(name), layout).unwrap_err().to_string()
    };
    let error = refuse(&halves, Layout { pp: 2, ..Layout::default() }, "pp");
    assert!(error.contains("pp") && error.contains("compares the rows"), "{error}");
    let error = refuse(&whole, zero(Zero::None), "uneven");
    assert!(error.contains("multiples of the 2 ranks"), "{error}");
}
