//! Rows whose tokens ranks have divided: the run of one rank, beside every other axis, and checkpoints that go on either way.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_models::transformer::ContextKind;
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{Observers, RunInfo};
use firebox_train::{Layout, Recipe, Trainer, Zero};

/// A context that no number of chunks divides. AdamW's epsilon is large enough that it does not make whole steps of roundings.
fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1, isolate_documents = true }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 10, batch_rows = 4, micro_batch_rows = 1, log_every = 1 }",
        "model={ d_model = 32, n_layers = 2, n_heads = 8, n_kv_heads = 2, context = 37, dropout = 0.1 }",
        "eval={ every = 5, sample_tokens = 4 }",
        "checkpoint={ every = 5, keep_last = 5 }",
        "optimizer={ lr = 5e-3, eps = 1e-4 }",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

/// Documents of a few tokens, of which a row has several, and of more than a row.
fn dataset(dir: &Path) -> Arc<Dataset> {
    let document = |i: u64| format!("{i} boxes of fire, {} of water; ", i * i % 991).repeat(1 + (i % 5) as usize);
    let text: String = (0..300).map(|i| format!("{}\n", serde_json::json!({ "text": document(i) }))).collect();
    let path = dir.join("text.jsonl");
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    Arc::new(prepare(&recipe(&[]).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap())
}

/// Trains in `dir`, on one rank without a layout, from a checkpoint where there is one; the validation loss.
fn train(
    on: Option<(usize, Layout)>,
    dir: &Path,
    dataset: &Arc<Dataset>,
    extra: &[&str],
    from: Option<&Path>,
) -> Result<f64, String> {
    let (recipe, dir, dataset) = (recipe(extra), dir.to_path_buf(), dataset.clone());
    let from = from.map(Path::to_path_buf);
    let run = move |ranks: Option<(Communicator, Layout)>| {
        let device = Backend::NdArray.device().unwrap();
        let mut trainer = match &from {
            Some(from) => {
                let checkpoint = Checkpoint::open(from).unwrap();
                Trainer::resume(recipe.clone(), &dir, &dataset, &device, &checkpoint)?
            }
            None => Trainer::new(recipe.clone(), &dir, &dataset, &device, None)?,
        };
        if let Some((comm, layout)) = ranks {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        let summary = trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false))?;
        Ok::<_, firebox_train::TrainError>(summary.val_loss.unwrap())
    };
    let Some((ranks, layout)) = on else { return run(None).map_err(|error| error.to_string()) };
    let losses = spawn(ranks, move |comm| {
        let _threads = threads::for_rank(1).unwrap();
        run(Some((comm, layout)))
    });
    let losses = losses.map_err(|error| error.to_string())?;
    assert!(losses.iter().all(|loss| loss.to_bits() == losses[0].to_bits()), "ranks disagree: {losses:?}");
    Ok(losses[0])
}

/// The largest difference of a tensor of two runs, to the largest value of the tensor.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|dir| TensorFile::open(dir.join("checkpoints/step-10")).unwrap());
    let of = |name: &str| {
        let [x, y] = [&a, &b].map(|file| file.f32(name).unwrap());
        let largest = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        x.iter().zip(&y).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest
    };
    a.names().map(of).fold(0.0, f32::max)
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
        let loss = train(None, &dir.join("one"), dataset, extra, None).unwrap();
        Self { dir: dir.to_path_buf(), dataset, extra, loss }
    }

    /// On ranks, on one rank from the middle of that, and on ranks from the middle of this.
    fn assert_same(&self, name: &str, ranks: usize, layout: Layout) {
        let Self { dataset, extra, loss, .. } = *self;
        let (one, many) = (self.dir.join("one"), self.dir.join(name));
        let half = |run: &Path| run.join("checkpoints/step-5");
        let divided = train(Some((ranks, layout)), &many, dataset, extra, None).unwrap();
        println!("{name}: {divided}, one rank {loss}, parameters {} apart", apart(&one, &many));
        assert!(apart(&one, &many) < 1e-4, "{name}: {}", apart(&one, &many));
        let back = train(None, &many.join("back"), dataset, extra, Some(&half(&many))).unwrap();
        let forth = train(Some((ranks, layout)), &many.join("forth"), dataset, extra, Some(&half(&one))).unwrap();
        for (what, got) in [("all the way", divided), ("back", back), ("forth", forth)] {
            assert!((got / loss - 1.0).abs() < 1e-5, "{name}, {what}: {got}, one rank {loss}");
        }
    }
}

fn context(cp: usize, context: ContextKind) -> Layout {
    Layout { cp, context, ..Layout::default() }
}

const KINDS: [ContextKind; 2] = [ContextKind::Ring, ContextKind::Ulysses];

#[test]
fn divided_rows_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let learned = ["model.positions=\"learned\"", "model.tied=true", "memory.recompute=blocks", "model.window=11"];
    let rotary = ["model.tied=false", "model.qk_norm=true"];
    for (name, extra) in [("learned", &learned[..]), ("rotary", &rotary)] {
        let one = OneRank::new(&dir.path().join(name), &dataset, extra);
        for (cp, kind) in [2, 4].into_iter().flat_map(|cp| KINDS.map(|kind| (cp, kind))) {
            one.assert_same(&format!("{name}-{cp}-{kind:?}"), cp, context(cp, kind));
        }
    }
}

#[test]
fn divided_rows_beside_every_other_axis_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let zero = |zero: Zero, layout: Layout| Layout { zero, ..layout };
    let grids = |kind: ContextKind| {
        let rows = context(2, kind);
        [
            (format!("{kind:?}-dp2-zero2"), 4, zero(Zero::States, rows)),
            (format!("{kind:?}-dp2-zero3"), 4, zero(Zero::Parameters, rows)),
            (format!("{kind:?}-tp2-pp2"), 8, Layout { tp: 2, pp: 2, ..rows }),
        ]
    };
    let rows = context(2, ContextKind::Ring);
    let others = [
        ("pp2-zb-v".to_owned(), 4, Layout { pp: 2, schedule: Schedule::ZeroBubbleV, ..rows }),
        ("dp2x2-zero2".to_owned(), 8, Layout { dp_replicate: 2, ..zero(Zero::States, rows) }),
        ("tp2-sequence-dp2".to_owned(), 8, Layout { tp: 2, sequence_parallel: true, ..rows }),
    ];
    let [ring, ulysses] = KINDS.map(grids);
    for (tied, layouts) in [("model.tied=true", ring.to_vec()), ("model.tied=false", [ring, ulysses, others].concat())]
    {
        let extra = [tied];
        let one = OneRank::new(&dir.path().join(tied), &dataset, &extra);
        for (name, ranks, layout) in layouts {
            one.assert_same(&name, ranks, layout);
        }
    }
}

#[test]
fn what_needs_whole_parameters_goes_over_divided_rows() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (name, extra) in [
        ("average", &["average={ kind = \"ema\", decay = 0.9 }"][..]),
        ("schedule-free", &["optimizer.kind=schedule_free"]),
        ("muon", &["optimizer.kind=muon"]),
    ] {
        let one = OneRank::new(&dir.path().join(name), &dataset, extra);
        one.assert_same("divided", 2, context(2, ContextKind::Ring));
    }
}

#[test]
fn a_spike_takes_divided_rows_back() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let extra = [
        "watch={ on_spike = \"rollback\", threshold = 1.0, warmup_steps = 2, max_rollbacks = 2 }",
        "checkpoint={ every = 1, keep_last = 20 }",
        // Single rows, whose losses vary and hardly fall.
        "train={ steps = 10, batch_rows = 1 }",
        "optimizer={ kind = \"sgd\", lr = 0.01 }",
    ];
    let one = OneRank::new(dir.path(), &dataset, &extra);
    let many = dir.path().join("many");
    let loss = train(Some((2, context(2, ContextKind::Ring))), &many, &dataset, &extra, None).unwrap();
    let rollbacks = [dir.path().join("one"), many.clone()].map(|run| {
        let state = std::fs::read(run.join("checkpoints/step-10/state.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&state).unwrap()["watch"]["rollbacks"].as_u64().unwrap()
    });
    assert!(rollbacks[0] > 0 && rollbacks[0] == rollbacks[1], "{rollbacks:?}");
    assert!(
        apart(&dir.path().join("one"), &many) < 1e-4 && (loss / one.loss - 1.0).abs() < 1e-5,
        "{loss} {}",
        one.loss
    );
}

#[test]
fn rows_that_cannot_be_divided_are_refused_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (ranks, layout, extra, says) in [
        (3, context(2, ContextKind::Ring), &[][..], "cp 2, pp 1, tp 1"),
        (4, context(4, ContextKind::Ring), &["model.context=7"], "at least 8: two chunks for each of 4 ranks"),
        (3, context(3, ContextKind::Ulysses), &[], "use the ring"),
        (
            4,
            Layout { tp: 2, ..context(2, ContextKind::Ulysses) },
            &["model.n_heads=2", "model.n_kv_heads=2"],
            "of 2 of tensor",
        ),
        (2, context(2, ContextKind::Ring), &["optimizer={ kind = \"sophia\" }"], "whole rows"),
    ] {
        let got = train(Some((ranks, layout)), &dir.path().join("none"), &dataset, extra, None);
        let error = got.unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}
