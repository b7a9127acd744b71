//! Runs that learn answers and preferences: the same numbers on every layout, and after an interruption.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use firebox_data::Tokenizer;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{Observers, RunInfo, Summary};
use firebox_train::task::{Conversations, Preferences, Task, TaskRecipe};
use firebox_train::{Layout, Recipe, Trainer, Zero};

struct Lab {
    dir: tempfile::TempDir,
    tokenizer: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (' '..='~').chain(['\n']).collect();
        let tokenizer = dir.path().join("tokenizer.json");
        Tokenizer::from_chars_of(text.as_bytes()).unwrap().save(&tokenizer).unwrap();
        let (mut chats, mut pairs) = (String::new(), String::new());
        for i in 0..60u64 {
            let (a, b) = (i % 7, i * i % 9);
            writeln!(chats, r#"{{"prompt": "{a}+{b}=", "completion": "{}"}}"#, a + b).unwrap();
            writeln!(pairs, r#"{{"prompt": "{a}+{b}=", "chosen": "{}", "rejected": "about {}"}}"#, a + b, a * b)
                .unwrap();
        }
        std::fs::write(dir.path().join("chat.jsonl"), chats).unwrap();
        std::fs::write(dir.path().join("preference.jsonl"), pairs).unwrap();
        Self { dir, tokenizer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn recipe(&self, task: &str, extra: &[&str]) -> Recipe {
        let data = format!("data={{ tokenizer = {:?}, val_fraction = 0.2 }}", self.tokenizer.display().to_string());
        let task = format!("task={{ kind = {task:?} }}");
        let base = [
            &data,
            &task,
            "schedule={ kind = \"constant\" }",
            "train={ steps = 8, batch_rows = 6, micro_batch_rows = 2, log_every = 1 }",
            "model={ d_model = 32, n_layers = 2, n_heads = 4, n_kv_heads = 2, context = 160, tied = false }",
            "eval={ every = 4, sample_tokens = 4 }",
            "checkpoint={ every = 4, keep_last = 5 }",
            "optimizer.lr=5e-3",
        ];
        let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
        Recipe::load("tiny", &set).unwrap()
    }

    /// Trains on `ranks` (0: without any) in `to`, from a checkpoint where there is one.
    fn train(
        &self,
        task: &str,
        to: &str,
        (ranks, layout): (usize, Layout),
        extra: &[&str],
        from: Option<PathBuf>,
    ) -> Summary {
        let (recipe, dir) = (self.recipe(task, extra), self.path(to));
        let paths = vec![self.path(&format!("{task}.jsonl")).display().to_string()];
        match recipe.task.clone() {
            TaskRecipe::Chat(of) => {
                let (task, read) = Conversations::read(&recipe, &of, &paths).unwrap();
                assert_eq!(read.texts, [48, 12]);
                run(recipe, dir, task, (ranks, layout), from)
            }
            TaskRecipe::Preference(of) => {
                let (task, read) = Preferences::read(&recipe, &of, &paths).unwrap();
                assert_eq!(read.pairs, [48, 12]);
                let task = task.with_reference(&recipe, &dir, &Backend::NdArray.device().unwrap()).unwrap();
                run(recipe, dir, task, (ranks, layout), from)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn run<T>(recipe: Recipe, dir: PathBuf, task: T, (ranks, layout): (usize, Layout), from: Option<PathBuf>) -> Summary
where
    T: Task<firebox_models::transformer::Transformer> + Clone + 'static,
{
    let run = move |comm: Option<Communicator>| {
        let device = Backend::NdArray.device().unwrap();
        let model = recipe.first_model(task.tokenizer().unwrap().vocab_size(), &device).unwrap();
        let (recipe, task, found) =
            (recipe.clone(), Box::new(task.clone()), from.as_ref().map(|at| Checkpoint::open(at).unwrap()));
        let mut trainer = match &found {
            Some(at) => Trainer::open_task(recipe, &dir, task, &device, model, at).unwrap(),
            None => Trainer::of_task(recipe, &dir, task, &device, model).unwrap(),
        };
        if let Some(comm) = comm {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        if let Some(at) = &found {
            trainer.restore(at).unwrap();
        }
        trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false))
    };
    if ranks == 0 {
        return run(None).unwrap();
    }
    let done = spawn(ranks, move |comm| {
        let _threads = threads::for_rank(1).unwrap();
        run(Some(comm))
    });
    done.unwrap().swap_remove(0)
}

/// The largest difference of a tensor of two runs, to the largest value of the tensor.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|dir| TensorFile::open(dir.join("checkpoints/step-8")).unwrap());
    let of = |name: &str| {
        let [x, y] = [&a, &b].map(|file| file.f32(name).unwrap());
        let largest = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        x.iter().zip(&y).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest
    };
    a.names().map(of).fold(0.0, f32::max)
}

fn every_layout_takes_the_steps_of_one_rank(task: &str, learned: impl Fn(&Summary)) {
    let lab = Lab::new();
    let plain = (0, Layout::default());
    let one = lab.train(task, "one", plain, &[], None);
    learned(&one);
    let loss = one.val_loss.unwrap();
    let zero = |zero: u8| Layout { zero: Zero::try_from(zero).unwrap(), ..Layout::default() };
    for (name, ranks, layout) in [
        ("dp", 2, zero(0)),
        ("zero-3", 2, zero(3)),
        ("tp", 2, Layout { tp: 2, ..zero(0) }),
        ("tp-sequence", 2, Layout { tp: 2, sequence_parallel: true, ..zero(0) }),
        ("pp", 2, Layout { pp: 2, ..zero(0) }),
    ] {
        let many = lab.train(task, name, (ranks, layout), &[], None);
        let off = apart(&lab.path("one"), &lab.path(name));
        println!("{task}, {name}: {:?}, one rank {loss}, parameters {off} apart", many.val_loss);
        assert!((many.val_loss.unwrap() / loss - 1.0).abs() < 1e-5, "{name}: {:?}, one rank {loss}", many.val_loss);
        assert!(off < 1e-4, "{name}: {off}");
    }
    // From the middle: the bits of the run that was never interrupted.
    std::fs::create_dir(lab.path("resumed")).unwrap();
    let half = lab.path("one/checkpoints/step-4");
    let resumed = lab.train(task, "resumed", plain, &[], Some(half));
    assert_eq!(resumed.val_loss.unwrap().to_bits(), loss.to_bits());
    for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
        let [a, b] =
            ["one", "resumed"].map(|run| std::fs::read(lab.path(&format!("{run}/checkpoints/step-8/{file}"))).unwrap());
        assert!(a == b, "{file} differs");
    }
}

#[test]
fn answers_are_learned_on_every_layout() {
    every_layout_takes_the_steps_of_one_rank("chat", |summary| {
        assert!(summary.val_loss.unwrap() < 4.0 && summary.val_bpb.unwrap() > 0.0, "{summary:?}");
    });
}

#[test]
fn preferences_are_learned_on_every_layout() {
    every_layout_takes_the_steps_of_one_rank("preference", |summary| {
        // Of two answers of which nothing is known the loss is ln 2.
        assert!(summary.val_loss.unwrap() < 0.69, "{summary:?}");
        let metric = |name: &str| summary.metrics[name];
        assert!(metric("accuracy") > 0.9 && metric("margin") > 0.0, "{summary:?}");
        assert!((metric("reward_chosen") - metric("reward_rejected") - metric("margin")).abs() < 1e-9);
    });
}

#[test]
fn ranks_that_divide_rows_are_refused_for_preferences() {
    let lab = Lab::new();
    let recipe = lab.recipe("preference", &[]);
    let TaskRecipe::Preference(of) = recipe.task.clone() else { panic!() };
    let paths = vec![lab.path("preference.jsonl").display().to_string()];
    let (task, _) = Preferences::read(&recipe, &of, &paths).unwrap();
    let task = task.with_reference(&recipe, &lab.path("none"), &Backend::NdArray.device().unwrap()).unwrap();
    let dir = lab.path("none");
    let error = spawn(2, move |comm| {
        let device = Backend::NdArray.device().unwrap();
        let model = recipe.first_model(96, &device).unwrap();
        let trainer = Trainer::of_task(recipe.clone(), &dir, Box::new(task.clone()), &device, model).unwrap();
        trainer.with_ranks(comm, Layout { cp: 2, ..Layout::default() }).map(drop)
    });
    assert!(error.unwrap_err().to_string().contains("whole rows"));
}

#[test]
fn packed_or_not_the_tokens_are_the_same() {
    let lab = Lab::new();
    let paths = vec![lab.path("chat.jsonl").display().to_string()];
    let learned = |extra: &[&str]| {
        let recipe = lab.recipe("chat", extra);
        let TaskRecipe::Chat(of) = recipe.task.clone() else { panic!() };
        let (task, read) = Conversations::read(&recipe, &of, &paths).unwrap();
        let mut all: Vec<i32> = vec![];
        // An epoch, in micro-batches of several sizes.
        for (first, rows) in [(0, 1), (1, read.rows[0] - 1)] {
            let batches = task.batches(first, rows, 3).unwrap();
            let share: f64 = batches.iter().map(firebox_models::TokenBatch::share).sum();
            assert!((share - 1.0).abs() < 1e-9, "the parts of a step are all of its targets: {share}");
            all.extend(batches.iter().flat_map(|batch| batch.targets.iter().copied()).filter(|target| *target >= 0));
        }
        assert_eq!(all.len(), read.targets);
        all.sort_unstable();
        (all, read)
    };
    let (packed, of_packed) = learned(&[]);
    let (alone, of_alone) = learned(&["task.packing=false"]);
    assert_eq!(packed, alone);
    assert!(of_alone.rows[0] == 48 && of_packed.rows[0] < 48, "{of_packed}, {of_alone}");
    let (everything, _) = learned(&["task.train_on=all"]);
    assert!(everything.len() > packed.len());
    // Cut: ten answers have two digits.
    let (_, cut) = learned(&["train.row_tokens=64"]);
    assert!(cut.cut == 60 && cut.lost == 10 && cut.dropped == 0, "{cut}");
    // Their answers begin after 54 tokens.
    let recipe = lab.recipe("chat", &["train.row_tokens=50"]);
    let TaskRecipe::Chat(of) = recipe.task.clone() else { panic!() };
    let error = Conversations::read(&recipe, &of, &paths).unwrap_err().to_string();
    assert!(error.contains("train.row_tokens = 50"), "{error}");
}
