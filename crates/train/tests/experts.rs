//! A mixture of experts in a run: balanced, resumed, and divided in every way the same numbers.
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
use firebox_train::observe::{Event, MetricsWriter, Observer, Observers, RunInfo, metrics};
use firebox_train::{Layout, Recipe, Trainer, Zero};

/// Four experts of each block, two for each token.
fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1, isolate_documents = true }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 6, batch_rows = 8, micro_batch_rows = 1, log_every = 1 }",
        "model={ d_model = 16, n_layers = 2, n_heads = 2, d_ff = 24, context = 16, n_experts = 4, tied = false, router_aux_loss = 0.02 }",
        "eval={ every = 3, sample_tokens = 3 }",
        "checkpoint={ every = 3, keep_last = 5 }",
        "optimizer.lr=5e-3",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

/// Balanced by biases, with a capacity that drops tokens.
const BIASED: [&str; 3] = ["model.router_bias_rate=0.05", "model.router_aux_loss=0", "model.capacity_factor=0.8"];

fn dataset(dir: &Path) -> Arc<Dataset> {
    let text: String = (0..300u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
    let path = dir.join("text.txt");
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    Arc::new(prepare(&recipe(&[]).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap())
}

fn data(zero: u8) -> Layout {
    Layout { zero: Zero::try_from(zero).unwrap(), ..Layout::default() }
}

/// Trains on `ranks` (0: without any) in `dir`, from a checkpoint where there is one; the validation loss.
fn train(ranks: usize, layout: Layout, dir: &Path, dataset: &Arc<Dataset>, extra: &[&str], from: Option<&Path>) -> f64 {
    let (recipe, dir, dataset) = (recipe(extra), dir.to_path_buf(), dataset.clone());
    let from = from.map(Path::to_path_buf);
    let run = move |comm: Option<Communicator>| {
        let device = Backend::NdArray.device().unwrap();
        let checkpoint = from.as_ref().map(|from| Checkpoint::open(from).unwrap());
        let mut trainer = match &checkpoint {
            Some(at) => Trainer::open(recipe.clone(), &dir, &dataset, &device, at).unwrap(),
            None => Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap(),
        };
        let first = comm.as_ref().is_none_or(|comm| comm.rank() == 0);
        if let Some(comm) = comm {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        if let Some(at) = &checkpoint {
            trainer.restore(at).unwrap();
        }
        let mut observers = Observers::new();
        let info = RunInfo { dir: dir.clone(), ..RunInfo::default() };
        if first {
            observers.push(MetricsWriter::new());
            observers.on_event(&Event::RunStarted(&info)).unwrap();
        }
        trainer.run(&info, &mut observers, &AtomicBool::new(false))
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

fn at(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("checkpoints/step-{step}"))
}

fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    std::fs::read(at(dir, 6).join(file)).unwrap()
}

fn assert_same_bits(what: &str, a: &Path, b: &Path) {
    let optimizer = ["adamw", "muon"].map(|kind| format!("optimizer/{kind}.safetensors"));
    let optimizer = optimizer.into_iter().find(|file| at(a, 6).join(file).is_file()).unwrap();
    for file in ["model.safetensors", &optimizer] {
        assert!(bytes(a, file) == bytes(b, file), "{what}: {file} differs");
    }
}

/// Tokens of the busiest expert over the mean, by step.
fn loads(dir: &Path) -> Vec<f64> {
    let metrics = metrics::read(&dir.join("metrics.jsonl")).unwrap().unwrap();
    metrics.steps.iter().map(|step| step.expert_load.unwrap()).collect()
}

#[test]
fn copies_states_and_stages_are_divided_as_with_dense_layers() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let bf16 = ["precision={ compute = \"bf16\", params = \"bf16\" }"];
    for (name, extra) in [("aux", &[][..]), ("biased", &BIASED), ("bf16", &bf16), ("muon", &["optimizer.kind=muon"])] {
        let one = dir.path().join(name);
        let loss = train(0, data(0), &one, &dataset, extra, None);
        let loads = loads(&one);
        assert!(loads.len() == 6 && loads.iter().all(|load| (1.0..=2.0).contains(load)), "{loads:?}");
        // Computed again, in other places, and from the middle.
        let again = [extra, &["memory.recompute=blocks"]].concat();
        let other = dir.path().join(format!("{name}-again"));
        train(0, data(0), &other, &dataset, &again, Some(&at(&one, 3)));
        assert_same_bits("resumed", &one, &other);
        for (ranks, layout) in [(2, data(0)), (4, Layout { pp: 2, ..data(0) })] {
            let many = dir.path().join(format!("{name}-{ranks}"));
            assert_eq!(train(ranks, layout, &many, &dataset, extra, None).to_bits(), loss.to_bits(), "{ranks}");
            assert_same_bits(name, &one, &many);
            assert_eq!(self::loads(&many), loads, "what ranks saw is added up");
        }
        // Only the norm's last bit may differ; in bf16 that rounds other parameters up.
        for zero in [2, 3].into_iter().filter(|zero| *zero < 3 || name == "aux") {
            let many = dir.path().join(format!("{name}-zero-{zero}"));
            let divided = train(3, data(zero), &many, &dataset, extra, None);
            let bound = if name == "bf16" { 2e-2 } else { 1e-5 };
            assert!((divided / loss - 1.0).abs() < bound, "{name}, zero {zero}: {divided}, one rank {loss}");
        }
    }
}

#[test]
fn rows_can_be_divided_where_nothing_is_of_whole_rows() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let extra = ["model.router_bias_rate=0.05", "model.router_aux_loss=0"];
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let loss = train(0, data(0), &one, &dataset, &extra, None);
    let divided = train(2, Layout { cp: 2, ..data(0) }, &two, &dataset, &extra, None);
    assert!((divided / loss - 1.0).abs() < 1e-5, "{divided}, one rank {loss}");
    assert_eq!(loads(&two), loads(&one));
}

#[test]
fn biases_and_the_loss_balance() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let base =
        ["train.steps=30", "eval.every=0", "checkpoint.every=0", "model.experts_per_token=1", "model.init_std=0.6"];
    let last = |name: &str, extra: &[&str]| {
        let run = dir.path().join(name);
        train(0, data(0), &run, &dataset, &[&base, extra].concat(), None);
        let loads = loads(&run);
        loads[20..].iter().sum::<f64>() / 10.0
    };
    let alone = last("alone", &["model.router_aux_loss=0"]);
    let biased = last("biased", &["model.router_aux_loss=0", "model.router_bias_rate=0.02"]);
    let aux = last("aux", &["model.router_aux_loss=0.1"]);
    println!("busiest expert over the mean: alone {alone}, biases {biased}, loss {aux}");
    assert!(biased < alone - 0.2 && aux < alone - 0.2, "alone {alone}, biases {biased}, loss {aux}");
    // The biases are in the checkpoint, and move by whole steps of the rate.
    let file = TensorFile::open(dir.path().join("biased/checkpoints/step-30")).unwrap();
    let bias = file.f32("blocks.0.experts.bias").unwrap();
    assert!(bias.iter().any(|x| *x != 0.0));
    assert!(bias.iter().all(|x| (x / 0.02 - (x / 0.02).round()).abs() < 1e-3), "{bias:?}");
}

#[test]
fn micro_batches_share_the_balancing_loss() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    // The cross-entropy is that of the whole batch to rounding; the loss is the mean over the micro-batches' own.
    let loss = |name: &str, rows: &str| {
        let extra = [rows, "model.router_aux_loss=0.5"];
        train(0, data(0), &dir.path().join(name), &dataset, &extra, None)
    };
    let [one, four] = [loss("one", "train.micro_batch_rows=8"), loss("four", "train.micro_batch_rows=2")];
    assert!((one / four - 1.0).abs() < 2e-2, "whole {one}, in parts {four}");
}

/// The largest difference of a tensor of two runs, to the largest value of the tensor.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|dir| TensorFile::open(at(dir, 6)).unwrap());
    let of = |name: &str| {
        let [x, y] = [&a, &b].map(|file| file.f32(name).unwrap());
        let largest = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        x.iter().zip(&y).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest
    };
    a.names().map(of).fold(0.0, f32::max)
}

/// Ranks, those that divide experts, those of a pipeline, what copies divide, and the order of work.
const GRIDS: [(usize, usize, usize, u8, Schedule); 6] = [
    (2, 2, 1, 0, Schedule::OneForwardOneBackward),
    (4, 4, 1, 0, Schedule::OneForwardOneBackward),
    (4, 2, 1, 2, Schedule::OneForwardOneBackward),
    (4, 2, 1, 0, Schedule::OneForwardOneBackward),
    (4, 2, 2, 0, Schedule::ZeroBubbleH1),
    (8, 2, 2, 2, Schedule::OneForwardOneBackward),
];

#[test]
fn divided_experts_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (name, extra) in [("aux", &[][..]), ("biased", &BIASED)] {
        let one = dir.path().join(name);
        let loss = train(0, data(0), &one, &dataset, extra, None);
        for (ranks, ep, pp, zero, schedule) in GRIDS {
            let layout = Layout { ep, pp, schedule, ..data(zero) };
            let what = format!("{name}-{ranks}-ep{ep}-pp{pp}-zero{zero}");
            let many = dir.path().join(&what);
            let divided = train(ranks, layout, &many, &dataset, extra, None);
            println!("{what}: {divided}, one rank {loss}, parameters {} apart", apart(&one, &many));
            assert!(apart(&one, &many) < 1e-4, "{what}: {}", apart(&one, &many));
            assert_eq!(loads(&many), loads(&one), "{what}");
            // On one rank from the middle of that, and on ranks from the middle of this.
            let back = train(0, data(0), &many.join("back"), &dataset, extra, Some(&at(&many, 3)));
            let forth = train(ranks, layout, &many.join("forth"), &dataset, extra, Some(&at(&one, 3)));
            for (way, got) in [("all the way", divided), ("back", back), ("forth", forth)] {
                assert!((got / loss - 1.0).abs() < 1e-5, "{what}, {way}: {got}, one rank {loss}");
            }
        }
    }
}

#[test]
fn experts_need_not_divide_evenly() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let extra = ["train.batch_rows=6", "model.experts_per_token=1", "memory.recompute=blocks"];
    let (one, three) = (dir.path().join("one"), dir.path().join("three"));
    let loss = train(0, data(0), &one, &dataset, &extra, None);
    let divided = train(3, Layout { ep: 3, ..data(0) }, &three, &dataset, &extra, None);
    assert!((divided / loss - 1.0).abs() < 1e-5, "{divided}, one rank {loss}");
    assert!(apart(&one, &three) < 1e-4, "{}", apart(&one, &three));
}

#[test]
fn what_ranks_with_experts_cannot_do_is_said_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let experts = |ep, tp| Layout { ep, tp, ..data(0) };
    for (ranks, layout, extra, says) in [
        (2, experts(2, 1), &["model.n_experts=0"][..], "n_experts"),
        (8, experts(8, 1), &[], "at least the 8 ranks"),
        (4, experts(3, 1), &[], "ep must divide"),
        (3, experts(3, 1), &[], "multiples of the 3 ranks"),
        (2, experts(1, 2), &[], "n_experts"),
        (2, experts(2, 1), &["optimizer.kind=muon"], "whole matrices"),
        (2, experts(2, 1), &["train.batch_warmup={ start_rows = 4, steps = 2 }"], "batch_warmup"),
        (2, Layout { zero: Zero::Parameters, ..experts(2, 1) }, &[], "zero 3"),
        (2, Layout { cp: 2, ..data(0) }, &[], "router_bias_rate balances"),
        (2, data(3), &["model.router_bias_rate=0.1"], "biases are on every rank"),
        (2, experts(2, 1), &["average={ kind = \"ema\", decay = 0.9 }"], "average"),
    ] {
        let mut recipe = recipe(extra);
        // A coefficient is refused without experts.
        recipe.model.router_aux_loss = recipe.model.router_aux_loss.filter(|_| recipe.model.n_experts != Some(0));
        let (run, dataset) = (dir.path().join("none"), dataset.clone());
        let error = spawn(ranks, move |comm| {
            let device = Backend::NdArray.device().unwrap();
            let trainer = Trainer::new(recipe.clone(), &run, &dataset, &device, None).unwrap();
            trainer.with_ranks(comm, layout).map(drop)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
