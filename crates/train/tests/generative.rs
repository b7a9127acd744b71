//! Objectives that make images: the same run on several ranks gives the losses of one, and one that goes on from a checkpoint the bits of one that was never interrupted.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use firebox_data::Tokenizer;
use firebox_data::images::{ImageRow, Preprocess, read_images};
use firebox_models::mae::Mae;
use firebox_models::transformer::Head;
use firebox_models::vq::VqModel;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::Device;
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::Checkpoint;
use firebox_train::draw::{Painter, Studio};
use firebox_train::generate::Sampling;
use firebox_train::model_io::load;
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo};
use firebox_train::task::{ImageTokens, MaskedImage, Model, PictureRows, Task, TaskRecipe, TextToImage};
use firebox_train::{ImageTokenizer, Layout, Recipe, TrainError, Trainer, Zero};

#[path = "../../data/examples/shapes.rs"]
mod shapes;

const SIZE: usize = 16;

/// A run of a task: how each rank makes its trainer's parts.
type Start<M> = Arc<dyn Fn(&Device) -> (Box<dyn Task<M>>, M) + Send + Sync>;

struct Run<M> {
    recipe: Recipe,
    start: Start<M>,
}

/// The losses of the steps, and what was evaluated.
#[derive(Default)]
struct Seen {
    losses: Vec<f64>,
    val_loss: f64,
    metrics: Vec<(String, f64)>,
    pictures: Vec<Vec<u8>>,
}

impl Observer for Seen {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::Step(step) => self.losses.push(step.loss),
            Event::Evaluated(found) => {
                self.val_loss = found.val_loss;
                self.metrics = found.metrics.clone().into_iter().collect();
            }
            Event::Pictured { png, .. } => self.pictures.push(png.to_vec()),
            _ => {}
        }
        Ok(())
    }
}

impl<M: Model> Run<M> {
    fn trainer(
        &self,
        dir: &Path,
        ranks: Option<(Communicator, Layout)>,
        from: Option<&Path>,
    ) -> Result<Seen, TrainError> {
        let device = Backend::NdArray.device().unwrap();
        let (task, model) = (self.start)(&device);
        let from = from.map(|from| Checkpoint::open(from).unwrap());
        let mut trainer = match &from {
            Some(at) => Trainer::open_task(self.recipe.clone(), dir, task, &device, model, at)?,
            None => Trainer::of_task(self.recipe.clone(), dir, task, &device, model)?,
        };
        if let Some((comm, layout)) = ranks {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        if let Some(at) = &from {
            trainer.restore(at)?;
        }
        let mut seen = Seen::default();
        trainer.run(&RunInfo::default(), &mut seen, &AtomicBool::new(false))?;
        Ok(seen)
    }

    fn alone(&self, dir: &Path, from: Option<&Path>) -> Seen {
        self.trainer(dir, None, from).unwrap()
    }

    fn on_ranks(
        &self,
        dir: &Path,
        ranks: usize,
        layout: Layout,
    ) -> Result<Seen, Box<firebox_parallel::WorldError<TrainError>>> {
        let (run, dir) = (Self { recipe: self.recipe.clone(), start: self.start.clone() }, dir.to_path_buf());
        let mut seen = spawn(ranks, move |comm| {
            let _threads = threads::for_rank(1).unwrap();
            run.trainer(&dir, Some((comm, layout)), None)
        })?;
        Ok(seen.remove(0))
    }

    /// On one rank, on one from the middle of it, and on two of these layouts.
    fn assert_same(&self, dir: &Path, layouts: &[(&str, Layout)]) -> Seen {
        let one = self.alone(&dir.join("one"), None);
        assert!(one.losses.len() == 6 && one.losses.iter().all(|loss| loss.is_finite()), "{:?}", one.losses);
        let again = self.alone(&dir.join("again"), Some(&dir.join("one/checkpoints/step-3")));
        assert_eq!(again.losses, one.losses[3..], "after a resume");
        for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
            let bytes = |run: &str| std::fs::read(dir.join(run).join("checkpoints/step-6").join(file)).unwrap();
            assert!(bytes("again") == bytes("one"), "after a resume {file} differs");
        }
        for (name, layout) in layouts {
            let many = self.on_ranks(&dir.join(name), 2, *layout).unwrap();
            let all = many.losses.iter().zip(&one.losses).chain([(&many.val_loss, &one.val_loss)]);
            // Sums over ranks are added in another order.
            for (got, want) in all {
                assert!((got / want - 1.0).abs() < 1e-5, "{name}: {:?}, one rank {:?}", many.losses, one.losses);
            }
            for ((name, got), (_, want)) in many.metrics.iter().zip(&one.metrics) {
                assert!((got - want).abs() < 1e-3 * want.abs(), "{name}: {got}, one rank {want}");
            }
        }
        one
    }
}

fn layout(zero: u8, tp: usize) -> Layout {
    Layout { zero: Zero::try_from(zero).unwrap(), tp, ..Layout::default() }
}

fn recipe(task: &str, more: &[&str]) -> Recipe {
    let base = [
        "schedule={ kind = \"constant\" }",
        "train={ steps = 6, batch_rows = 8, micro_batch_rows = 2, log_every = 1 }",
        "data={ val_fraction = 0.2, tokenizer = \"char\" }",
        "eval={ every = 3, sample_tokens = 0 }",
        "checkpoint={ every = 3, keep_last = 5 }",
        "model.n_layers=1",
        "model.d_model=32",
        "model.n_heads=2",
    ];
    let set: Vec<String> = base.iter().chain(more).map(ToString::to_string).collect();
    Recipe::load(task, &set).unwrap()
}

/// Pictures of shapes in a folder.
fn images(dir: &Path, n: u64) -> Vec<ImageRow> {
    let folder = dir.join("shapes");
    shapes::write(&folder, n, SIZE, 1);
    read_images(&[folder.display().to_string()], &Preprocess::vit(SIZE, 3)).unwrap()
}

fn image_tokens(dir: &Path, n: u64, more: &[&str]) -> Run<VqModel> {
    let recipe = recipe(
        "image-tokens",
        &[&["model.image={ size = 16, patch = 4, channels = 3 }", "task.codes=24"], more].concat(),
    );
    let TaskRecipe::ImageTokens(task) = recipe.task.clone() else { panic!("{:?}", recipe.task) };
    let shape = task.shape(&recipe.model).unwrap();
    let preprocess = Preprocess::vit(SIZE, 3);
    let rows = PictureRows::new(images(dir, n), &preprocess, recipe.data.val_fraction, recipe.seed).unwrap();
    let (task, seed) = (ImageTokens::new(rows, shape.image.patches()), recipe.seed);
    let start = move |device: &Device| {
        let model = VqModel::new(&shape, seed, &device.clone().autodiff()).unwrap();
        (Box::new(task.clone()) as Box<dyn Task<VqModel>>, model)
    };
    Run { recipe, start: Arc::new(start) }
}

#[test]
fn a_quantizer_takes_the_same_steps_on_ranks_and_after_a_resume() {
    let dir = tempfile::tempdir().unwrap();
    let run = image_tokens(dir.path(), 40, &[]);
    let seen = run.assert_same(dir.path(), &[("dp", layout(0, 1)), ("zero-3", layout(3, 1))]);
    let names: Vec<&str> = seen.metrics.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["codes_used", "mse", "perplexity", "psnr"]);
    let error = run.on_ranks(&dir.path().join("tp"), 2, layout(0, 2)).err().unwrap().to_string();
    assert!(error.contains("tp: expected 1 with this model (vector quantizer"), "{error}");
}

#[test]
fn a_masked_autoencoder_takes_the_same_steps_on_ranks_and_after_a_resume() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("masked-image", &["model.image={ size = 16, patch = 4, channels = 3 }"]);
    let TaskRecipe::MaskedImage(task) = recipe.task.clone() else { panic!("{:?}", recipe.task) };
    let config = task.shape(&recipe.model).unwrap();
    assert_eq!((config.image().patches(), config.seen()), (16, 4));
    let rows = images(dir.path(), 40);
    let rows = PictureRows::new(rows, &Preprocess::vit(SIZE, 3), recipe.data.val_fraction, recipe.seed).unwrap();
    let (task, seed) = (MaskedImage::new(rows, config.clone(), recipe.seed), recipe.seed);
    let [step, next] = [0, 8].map(|first| task.batches(first, 8, 8).unwrap()[0].sequence.positions().to_vec());
    assert!(step != next && step.chunks(5).all(|row| row[0] == 0 && row.is_sorted()), "{step:?}");
    let start = move |device: &Device| {
        let model = Mae::new(&config, seed, &device.clone().autodiff()).unwrap();
        (Box::new(task.clone()) as Box<dyn Task<Mae>>, model)
    };
    let run = Run { recipe, start: Arc::new(start) };
    let layouts = [("dp", layout(0, 1)), ("zero-2", layout(2, 1)), ("zero-3", layout(3, 1)), ("tp", layout(0, 2))];
    run.assert_same(dir.path(), &layouts);

    // It loads as its encoder, which another task starts from.
    let device = Backend::NdArray.device().unwrap();
    let encoder = load(dir.path().join("tp"), &device).unwrap().model;
    assert!(encoder.config().image.is_some() && encoder.config().head == Head::Hidden);
}

fn trained_quantizer(dir: &Path) -> PathBuf {
    let run = image_tokens(dir, 40, &[]);
    let out = dir.join("quantizer");
    run.alone(&out, None);
    out
}

#[test]
fn drawing_takes_the_same_steps_on_ranks_and_after_a_resume() {
    let dir = tempfile::tempdir().unwrap();
    let out = trained_quantizer(dir.path());
    let mut recipe = recipe("text-to-image", &["task.text_tokens=40", "eval.sample_tokens=1"]);
    let rows = images(dir.path(), 40);
    let TaskRecipe::TextToImage(task) = recipe.task.clone() else { panic!("{:?}", recipe.task) };
    let captions: Vec<String> = rows.iter().flat_map(|row| row.captions("caption").unwrap()).collect();
    let text = || Tokenizer::from_chars_of(captions.concat().as_bytes()).unwrap();
    let device = Backend::NdArray.device().unwrap();
    let quantizer = ImageTokenizer::load(&out, &device).unwrap();
    let make = |rows: &[ImageRow], task| TextToImage::new(rows, text(), quantizer.clone(), task, (0.2, recipe.seed));
    let task = make(&rows, &task).unwrap().with_samples("a red circle in the middle", 3).unwrap();
    let layout_of = *task.layout();
    assert_eq!((layout_of.codes, layout_of.image_tokens, layout_of.context()), (24, 16, 55));
    recipe.model.vocab_size = Some(layout_of.vocab_size());
    recipe.model.context = Some(layout_of.context());
    let of_start = recipe.clone();
    let start = move |device: &Device| {
        let model = of_start.first_model(1, device).unwrap();
        (Box::new(task.clone()) as Box<dyn Task<_>>, model)
    };
    let run = Run { recipe, start: Arc::new(start) };
    let layouts = [("dp", layout(0, 1)), ("zero-3", layout(3, 1)), ("tp", layout(0, 2))];
    let seen = run.assert_same(dir.path(), &layouts);
    assert!(seen.losses[5] < seen.losses[0], "{:?}", seen.losses);
    assert_eq!(seen.pictures.len(), 2);

    // The quantizer's run is not needed any more.
    std::fs::remove_dir_all(&out).unwrap();
    let studio = Studio::load(&dir.path().join("tp"), &device).unwrap();
    let draw = |seed| studio.painter().draw("a red circle in the middle", &Sampling { seed, ..Painter::sampling() });
    let picture = draw(3).unwrap();
    assert_eq!((picture.size, picture.channels, picture.pixels.len()), (SIZE, 3, 3 * SIZE * SIZE));
    assert_eq!(draw(3).unwrap(), picture);
    assert!(draw(4).unwrap() != picture);
    let bad = studio.painter().draw(&"red ".repeat(20), &Painter::sampling()).unwrap_err().to_string();
    assert!(bad.contains("the caption has 80 tokens: expected at most 39"), "{bad}");
    let not = ImageTokenizer::load(&dir.path().join("one"), &device).unwrap_err().to_string();
    assert!(not.contains("model_type") && not.contains("image_tokens"), "{not}");
}

#[test]
fn a_quantizer_learns_to_give_images_back() {
    let dir = tempfile::tempdir().unwrap();
    let more = [
        "train.steps=1000",
        "train.batch_rows=16",
        "train.micro_batch_rows=16",
        "eval.every=0",
        "checkpoint.every=0",
        "optimizer.lr=3e-3",
        "task.codes=64",
    ];
    let seen = image_tokens(dir.path(), 200, &more).alone(&dir.path().join("run"), None);
    let metric = |name: &str| seen.metrics.iter().find(|(known, _)| known == name).unwrap().1;
    println!("{:?}", seen.metrics);
    // What giving back the mean of all pixels would have.
    let pixels: Vec<f64> =
        images(dir.path(), 200).iter().flat_map(|row| row.pixels.clone()).map(|v| f64::from(v) / 255.0).collect();
    let mean = pixels.iter().sum::<f64>() / pixels.len() as f64;
    let variance = pixels.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / pixels.len() as f64;
    println!("variance {variance}");
    assert!(metric("mse") < 0.3 * variance, "{:?}, variance {variance}", seen.metrics);
    // Most patches are empty, and have the same code; the codebook has not collapsed.
    assert!(metric("codes_used") > 0.1 && metric("perplexity") > 1.5, "{:?}", seen.metrics);
}

/// Colour, shape and place of the most similar of many real pictures.
fn classified(pixels: &[u8], real: &[shapes::Drawn]) -> [usize; 3] {
    let apart = |one: &shapes::Drawn| -> u64 {
        one.pixels.iter().zip(pixels).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum()
    };
    let nearest = real.iter().min_by_key(|one| apart(one)).unwrap();
    [nearest.color, nearest.shape, nearest.place]
}

#[test]
fn what_is_asked_for_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let device = Backend::NdArray.device().unwrap();
    let long = |steps: &'static str| {
        [
            steps,
            "train.batch_rows=32",
            "train.micro_batch_rows=32",
            "eval.every=0",
            "checkpoint.every=0",
            "optimizer.lr=3e-3",
        ]
    };
    let out = dir.path().join("quantizer");
    let quantizer = [&long("train.steps=800")[..], &["task.codes=64", "model.d_model=48"]].concat();
    image_tokens(dir.path(), 1000, &quantizer).alone(&out, None);
    let quantizer = ImageTokenizer::load(&out, &device).unwrap();

    let shape = [
        "task.text_tokens=16",
        "model.d_model=64",
        "model.n_layers=2",
        "eval.sample_tokens=0",
        "data.val_fraction=0.05",
    ];
    let mut recipe = recipe("text-to-image", &[&long("train.steps=700")[..], &shape].concat());
    let rows = images(dir.path(), 1000);
    let TaskRecipe::TextToImage(task) = recipe.task.clone() else { panic!("{:?}", recipe.task) };
    let captions: Vec<String> = rows.iter().flat_map(|row| row.captions("caption").unwrap()).collect();
    let text = Tokenizer::train_bpe(&captions, 512).unwrap();
    let task = TextToImage::new(&rows, text, quantizer, &task, (0.05, recipe.seed)).unwrap();
    let layout = *task.layout();
    (recipe.model.vocab_size, recipe.model.context) = (Some(layout.vocab_size()), Some(layout.context()));
    let of_start = recipe.clone();
    let start =
        move |device: &Device| (Box::new(task.clone()) as Box<dyn Task<_>>, of_start.first_model(1, device).unwrap());
    let out = dir.path().join("run");
    Run { recipe, start: Arc::new(start) }.alone(&out, None);

    // None of these was learned from: other seeds.
    let real: Vec<shapes::Drawn> = (0..3000).map(|i| shapes::drawn(SIZE, 7, i)).collect();
    let right = |got: [usize; 3], want: [usize; 3]| [0, 1, 2].map(|i| f64::from(u8::from(got[i] == want[i])) / 90.0);
    let (mut of_real, mut drawn) = ([0.0; 3], [0.0; 3]);
    let studio = Studio::load(&out, &device).unwrap();
    for i in 0..90 {
        let one = shapes::drawn(SIZE, 8, i as u64);
        let sum = |all: &mut [f64; 3], more: [f64; 3]| all.iter_mut().zip(more).for_each(|(a, b)| *a += b);
        sum(&mut of_real, right(classified(&one.pixels, &real), [one.color, one.shape, one.place]));
        let want = [i % 6, i / 6 % 3, i / 18];
        let (color, shape, place) = (shapes::COLORS[want[0]].0, shapes::SHAPES[want[1]], shapes::PLACES[want[2]].0);
        let sampling = Sampling { temperature: 0.5, seed: i as u64, ..Painter::sampling() };
        let picture = studio.painter().draw(&format!("a {color} {shape} in the {place}"), &sampling).unwrap();
        sum(&mut drawn, right(classified(&picture.pixels, &real), want));
    }
    println!("right in colour, shape and place: of real pictures {of_real:?}, of those drawn {drawn:?}");
    // By chance: 1/6, 1/3, 1/5.
    assert!(drawn[0] > 0.8 && drawn[1] > 0.5 && drawn[2] > 0.9, "{drawn:?}; of real pictures {of_real:?}");
}
