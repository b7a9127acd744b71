//! The same run on several ranks: the same numbers, and checkpoints that go on with any number of them.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{Observers, RunInfo};
use firebox_train::{Layout, Recipe, Trainer, Zero};

#[path = "ranks/matrix.rs"]
mod matrix;
#[path = "ranks/zero.rs"]
mod zero;

fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1, isolate_documents = true }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 10, batch_rows = 8, micro_batch_rows = 1, log_every = 1 }",
        "model={ d_model = 32, n_layers = 2, n_heads = 4, n_kv_heads = 2, context = 16, dropout = 0.1 }",
        "eval={ every = 5, sample_tokens = 0 }",
        "checkpoint={ every = 5, keep_last = 5 }",
        "optimizer.lr=5e-3",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

fn dataset(dir: &Path) -> Arc<Dataset> {
    let text: String = (0..400u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
    let path = dir.join("text.txt");
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    Arc::new(prepare(&recipe(&[]).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap())
}

/// Trains on `ranks` (0: without any) in `dir`, from a checkpoint where there is one; the validation loss.
fn train(ranks: usize, zero: u8, dir: &Path, dataset: &Arc<Dataset>, extra: &[&str], from: Option<&Path>) -> f64 {
    train_as(ranks, data(zero), dir, dataset, extra, from)
}

fn data(zero: u8) -> Layout {
    Layout { zero: Zero::try_from(zero).unwrap(), ..Layout::default() }
}

fn train_as(
    ranks: usize,
    layout: Layout,
    dir: &Path,
    dataset: &Arc<Dataset>,
    extra: &[&str],
    from: Option<&Path>,
) -> f64 {
    let (recipe, dir, dataset) = (recipe(extra), dir.to_path_buf(), dataset.clone());
    let from = from.map(Path::to_path_buf);
    let run = move |comm: Option<Communicator>| {
        let device = Backend::NdArray.device().unwrap();
        let checkpoint = from.as_ref().map(|from| Checkpoint::open(from).unwrap());
        let mut trainer = match &checkpoint {
            Some(at) => Trainer::open(recipe.clone(), &dir, &dataset, &device, at).unwrap(),
            None => Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap(),
        };
        if let Some(comm) = comm {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        if let Some(at) = &checkpoint {
            trainer.restore(at).unwrap();
        }
        trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false))
    };
    if ranks == 0 {
        return run(None).unwrap().val_loss.unwrap();
    }
    let losses = spawn(ranks, move |comm| {
        let _threads = threads::for_rank(1).unwrap();
        run(Some(comm)).map(|summary| summary.val_loss.unwrap())
    })
    .unwrap();
    assert!(losses.iter().all(|loss| loss.to_bits() == losses[0].to_bits()), "ranks disagree: {losses:?}");
    losses[0]
}

fn bytes(dir: &Path, step: u64, file: &str) -> Vec<u8> {
    std::fs::read(dir.join(format!("checkpoints/step-{step}")).join(file)).unwrap()
}

/// The largest difference of a tensor of two files, to the largest value of the tensor.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|dir| TensorFile::open(dir.join("checkpoints/step-10")).unwrap());
    let of = |name: &str| {
        let [x, y] = [&a, &b].map(|file| file.f32(name).unwrap());
        let largest = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        x.iter().zip(&y).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest
    };
    a.names().map(of).fold(0.0, f32::max)
}

#[test]
fn any_number_of_ranks_gives_the_bits_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let one = dir.path().join("one");
    let loss = train(0, 0, &one, &dataset, &[], None);
    for ranks in [1, 2, 3, 8] {
        let many = dir.path().join(format!("dp-{ranks}"));
        assert_eq!(train(ranks, 0, &many, &dataset, &[], None).to_bits(), loss.to_bits(), "{ranks} ranks");
        for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
            assert!(bytes(&one, 10, file) == bytes(&many, 10, file), "{ranks} ranks: {file} differs");
        }
    }
}

/// Parameters and states of a checkpoint that is written beside the steps are those of its own step, whoever writes which piece.
#[test]
fn checkpoints_are_the_same_written_beside_the_steps_and_between_them() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let extra = ["checkpoint={ every = 1, keep_last = 9, background = false }"];
    let (between, beside) = (dir.path().join("between"), dir.path().join("beside"));
    train(0, 0, &between, &dataset, &extra, None);
    train(3, 0, &beside, &dataset, &["checkpoint={ every = 1, keep_last = 9 }"], None);
    for step in 2..=10 {
        for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
            assert!(bytes(&between, step, file) == bytes(&beside, step, file), "step {step}: {file} differs");
        }
    }
}

#[test]
fn divided_states_take_the_same_steps() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (name, extra) in [
        ("adamw", &[][..]),
        ("muon", &["optimizer.kind=muon", "memory.recompute=blocks"]),
        ("sophia", &["optimizer.kind=sophia", "optimizer.lr=1e-3"]),
        ("lamb", &["optimizer.kind=lamb", "precision={ compute = \"bf16\", params = \"bf16\" }"]),
    ] {
        let one = dir.path().join(name);
        let loss = train(0, 0, &one, &dataset, extra, None);
        for ranks in [2, 3, 8] {
            let many = dir.path().join(format!("{name}-{ranks}"));
            let divided = train(ranks, 2, &many, &dataset, extra, None);
            println!("{name} on {ranks}: {divided}, one rank {loss}, parameters {} apart", apart(&one, &many));
            let bound = if name == "lamb" { 2e-2 } else { 1e-5 };
            assert!((divided / loss - 1.0).abs() < bound, "{name}, {ranks} ranks: {divided}, one {loss}");
            assert!(name == "lamb" || apart(&one, &many) < 1e-4, "{name}, {ranks} ranks: {}", apart(&one, &many));
        }
    }
}

#[test]
fn checkpoints_go_on_with_other_numbers_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let whole = dir.path().join("whole");
    // Without clipping there is no sum over the ranks that could differ in its last bit.
    let extra = ["optimizer.clip=0"];
    let loss = train(4, 2, &whole, &dataset, &extra, None);
    let half = whole.join("checkpoints/step-5");
    for (ranks, zero) in [(0, 0), (1, 2), (3, 2), (2, 0), (8, 1)] {
        let other = dir.path().join(format!("on-{ranks}-{zero}"));
        let again = train(ranks, zero, &other, &dataset, &extra, Some(&half));
        assert_eq!(again.to_bits(), loss.to_bits(), "on {ranks} ranks, zero {zero}");
        for file in ["model.safetensors", "optimizer/adamw.safetensors"] {
            assert!(bytes(&whole, 10, file) == bytes(&other, 10, file), "{ranks} ranks, zero {zero}: {file} differs");
        }
    }
}

/// A run on one rank, for others to be compared with.
struct OneRank<'a> {
    dir: PathBuf,
    dataset: &'a Arc<Dataset>,
    extra: &'a [&'a str],
    loss: f64,
}

impl<'a> OneRank<'a> {
    fn new(dir: &Path, dataset: &'a Arc<Dataset>, extra: &'a [&'a str]) -> Self {
        let loss = train(0, 0, &dir.join("one"), dataset, extra, None);
        Self { dir: dir.to_path_buf(), dataset, extra, loss }
    }

    /// On ranks, on one rank from the middle of that, and on ranks from the middle of this.
    fn assert_same(&self, name: &str, ranks: usize, layout: Layout) {
        let Self { dataset, extra, loss, .. } = *self;
        let (one, many) = (self.dir.join("one"), self.dir.join(name.replace([',', ' '], "")));
        let half = |run: &Path| run.join("checkpoints/step-5");
        let divided = train_as(ranks, layout, &many, dataset, extra, None);
        println!("{name}: {divided}, one rank {loss}, parameters {} apart", apart(&one, &many));
        assert!(apart(&one, &many) < 1e-4, "{name}: {}", apart(&one, &many));
        let back = train(0, 0, &many.join("back"), dataset, extra, Some(&half(&many)));
        let forth = train_as(ranks, layout, &many.join("forth"), dataset, extra, Some(&half(&one)));
        for (what, got) in [("all the way", divided), ("back", back), ("forth", forth)] {
            assert!((got / loss - 1.0).abs() < 1e-5, "{name}, {what}: {got}, one rank {loss}");
        }
    }
}

/// Ranks, those of a pipeline among them, what is divided, and the order of work.
const PIPES: [(usize, usize, u8, Schedule); 6] = [
    (2, 2, 0, Schedule::OneForwardOneBackward),
    (4, 4, 0, Schedule::AllForwardAllBackward),
    (4, 2, 0, Schedule::ZeroBubbleH1),
    (2, 2, 0, Schedule::ZeroBubbleV),
    (4, 2, 2, Schedule::Interleaved { stages_per_rank: 2 }),
    (8, 2, 2, Schedule::OneForwardOneBackward),
];

#[test]
fn pipelines_and_copies_of_them_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for tied in ["model.tied=true", "model.tied=false"] {
        let extra = [tied, "model.n_layers=4", "eval.sample_tokens=4"];
        let one = OneRank::new(&dir.path().join(tied), &dataset, &extra);
        for (ranks, pp, zero, schedule) in PIPES {
            if zero > 0 && tied == "model.tied=true" {
                continue;
            }
            let layout = Layout { pp, schedule, ..data(zero) };
            let name = format!("{tied}-{ranks}-{pp}-{zero}-{schedule}");
            one.assert_same(&name, ranks, layout);
        }
    }
}

/// Ranks, those that divide matrices, whether tokens too, those of a pipeline, and what copies divide.
const GRIDS: [(usize, usize, bool, usize, u8); 6] = [
    (2, 2, false, 1, 0),
    (4, 4, true, 1, 0),
    (4, 2, true, 1, 2),
    (4, 2, false, 2, 0),
    (8, 2, true, 2, 0),
    (8, 4, false, 1, 2),
];

#[test]
fn divided_matrices_beside_every_other_axis_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for tied in ["model.tied=true", "model.tied=false"] {
        let extra = [tied, "model.n_layers=4", "model.dropout=0", "eval.sample_tokens=4"];
        let one = OneRank::new(&dir.path().join(tied), &dataset, &extra);
        for (ranks, tp, sequence_parallel, pp, zero) in GRIDS {
            let layout = Layout { tp, sequence_parallel, pp, ..data(zero) };
            let name = format!("{tied}-{ranks}-tp{tp}-{sequence_parallel}-pp{pp}-zero{zero}");
            one.assert_same(&name, ranks, layout);
        }
    }
}

/// A shared block is reduced and updated once, wherever the stages are that use it.
#[test]
fn shared_blocks_and_narrow_embeddings_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let all = ["model.n_layers=4", "model.layers_per_block=4", "model.embed_dim=12", "model.tied=true"];
    let pairs =
        ["model.n_layers=4", "model.layers_per_block=2", "model.delta_rank=3", "model.tied=false", "model.dropout=0"];
    let pipe = |schedule| Layout { pp: 2, schedule, ..data(0) };
    let matrices = |sequence_parallel| Layout { tp: 2, sequence_parallel, ..data(0) };
    let pipes = [Schedule::OneForwardOneBackward, Schedule::ZeroBubbleV, Schedule::Interleaved { stages_per_rank: 2 }]
        .map(pipe);
    for (name, extra, layouts) in [
        ("all", &all[..], [&pipes[..], &[data(3), matrices(false), matrices(true)]].concat()),
        ("pairs", &pairs[..], [&pipes[..], &[data(3), data(2)]].concat()),
    ] {
        let one = OneRank::new(&dir.path().join(name), &dataset, extra);
        let copies = one.dir.join("copies");
        assert_eq!(train(2, 0, &copies, &dataset, extra, None).to_bits(), one.loss.to_bits());
        assert!(bytes(&copies, 10, "model.safetensors") == bytes(&one.dir.join("one"), 10, "model.safetensors"));
        for (i, layout) in layouts.into_iter().enumerate() {
            one.assert_same(&format!("{name}-{i}"), 2, layout);
        }
    }
}

#[test]
fn what_ranks_cannot_do_is_said_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let pipe = |zero, pp| Layout { pp, ..data(zero) };
    let matrices = |tp, sequence_parallel| Layout { tp, sequence_parallel, ..data(0) };
    for (ranks, layout, extra, says) in [
        (9, data(0), &[][..], "9 ranks, 8 micro-batches"),
        (2, data(0), &["watch.noise_scale_every=2"], "watch.noise_scale_every"),
        (2, data(2), &["optimizer.kind=schedule_free"], "schedule_free"),
        (3, pipe(0, 2), &[], "divides the 3 ranks"),
        (2, matrices(2, false), &["optimizer.kind=muon"], "whole matrices"),
        (8, matrices(8, false), &["model.n_heads=2", "model.n_kv_heads=1"], "n_kv_heads"),
        (6, pipe(0, 2), &[], "multiples of the 3 pipelines"),
        (4, pipe(2, 2), &["model.tied=true"], "model.tied = false"),
        (
            4,
            pipe(2, 2),
            &["model.tied=false", "model.n_layers=4", "model.layers_per_block=4"],
            "model.layers_per_block = 1",
        ),
        (2, matrices(2, false), &["model.low_rank={ qkv = 4 }"], "low_rank.qkv"),
        (2, matrices(2, false), &["model.layers_per_block=2", "model.delta_rank=2"], "delta_rank"),
        (2, pipe(0, 2), &["optimizer.kind=sophia"], "sophia"),
        (2, pipe(0, 2), &["average={ kind = \"ema\", decay = 0.9 }"], "average"),
        (8, pipe(0, 8), &[], "fewer ranks"),
    ] {
        let (recipe, run, dataset) = (recipe(extra), dir.path().join("none"), dataset.clone());
        let error = spawn(ranks, move |comm| {
            let device = Backend::NdArray.device().unwrap();
            let trainer = Trainer::new(recipe.clone(), &run, &dataset, &device, None).unwrap();
            trainer.with_ranks(comm, layout).map(drop)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
