//! What ranks send in a step is what `docs/parallelism.md` says, and what they do is seen.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::observe::{Event, Observer, Observers, RanksRecord, RunInfo, metrics};
use firebox_train::{Layout, Recipe, Trainer, Zero};

/// Micro-batches of a step, tokens of each, width and blocks of the model.
const M: u64 = 8;
const T: u64 = 16;
const D: u64 = 32;
const BLOCKS: u64 = 4;

fn recipe(tied: bool) -> Recipe {
    let tied = format!("model.tied={tied}");
    let set = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1 }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 3, batch_rows = 8, micro_batch_rows = 1, log_every = 1 }",
        "model={ d_model = 32, n_layers = 4, n_heads = 4, n_kv_heads = 2, context = 16 }",
        &tied,
        "eval={ every = 0, sample_tokens = 0 }",
        "checkpoint={ every = 0 }",
    ];
    Recipe::load("tiny", &set.map(str::to_owned)).unwrap()
}

fn dataset(dir: &Path) -> Arc<Dataset> {
    let text: String = (0..400u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
    let path = dir.join("text.txt");
    std::fs::write(&path, text).unwrap();
    let source = Source::new([path.display().to_string()]);
    Arc::new(prepare(&recipe(false).data, &[source], &dir.join("cache"), &mut |_| {}).unwrap())
}

/// Trains with a timeline of the last step; the run's folder, and the number of parameters.
fn train(dir: &Path, dataset: &Arc<Dataset>, ranks: usize, layout: Layout, name: &'static str) -> (PathBuf, u64) {
    let (folder, dataset) = (dir.join(name), dataset.clone());
    let run = {
        let folder = folder.clone();
        move |comm: Option<Communicator>| {
            let device = Backend::NdArray.device().unwrap();
            let mut trainer = Trainer::new(recipe(name == "tied"), &folder, &dataset, &device, None).unwrap();
            let first = comm.as_ref().is_none_or(|comm| comm.rank() == 0);
            if let Some(comm) = comm {
                trainer = trainer.with_ranks(comm, layout)?;
            }
            let mut trainer = trainer.with_timeline();
            let info = RunInfo { dir: folder.clone(), ..trainer.info("ndarray", 1, String::new()) };
            let mut observers = if first { Observers::files() } else { Observers::new() };
            observers.on_event(&Event::RunStarted(&info))?;
            trainer.run(&info, &mut observers, &AtomicBool::new(false)).map(|summary| summary.params)
        }
    };
    let params = match ranks {
        0 => run(None).unwrap(),
        _ => spawn(ranks, move |comm| {
            let _threads = threads::for_rank(1).unwrap();
            run(Some(comm))
        })
        .unwrap()[0],
    };
    (folder, params)
}

/// Bytes and calls with a message to each other rank, all ranks together.
#[derive(Clone, Copy, Default)]
struct Sent {
    bytes: u64,
    messages: u64,
}

impl std::ops::Add for Sent {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, messages: self.messages + other.messages }
    }
}

impl std::ops::Mul<Sent> for u64 {
    type Output = Sent;
    fn mul(self, of: Sent) -> Sent {
        Sent { bytes: self * of.bytes, messages: self * of.messages }
    }
}

/// Of n ranks, each of which has a part of so many bytes.
fn all_gather(n: u64, bytes: u64) -> Sent {
    Sent { bytes: bytes * (n - 1), messages: n * (n - 1) }
}

/// The same to and fro.
fn all_reduce(n: u64, bytes: u64) -> Sent {
    2 * all_gather(n, bytes)
}

fn layout(zero: u8, pp: usize, tp: usize) -> Layout {
    Layout { zero: Zero::try_from(zero).unwrap(), pp, tp, ..Layout::default() }
}

/// The squared norm of the gradients, of parameters with and without weight decay.
fn squares(n: u64) -> Sent {
    all_gather(n, 2 * 8 * n)
}

/// The gradients of `m` micro-batches on each of `n` ranks, of `stages`; the sums or parameters; losses; with ZeRO, squares.
fn data_parallel(n: u64, params: u64, stages: u64, zero: bool, back: Sent) -> Sent {
    let m = M / n;
    let gradients = m * Sent { bytes: 4 * params * (n - 1), messages: stages * n * (n - 1) };
    let losses = all_gather(n, 8 * M);
    let squares = if zero { squares(n) } else { Sent::default() };
    gradients + back + losses + squares
}

/// The parameters of `stages` for each micro-batch, forward and backward; those of the last, of which there are `last`, once.
fn brought_together(n: u64, params: u64, stages: u64, last: u64) -> Sent {
    M / n * Sent { bytes: 4 * (2 * params - last) * (n - 1), messages: (2 * stages - 1) * n * (n - 1) }
}

/// What `n` ranks that divide matrices send for `m` micro-batches: `blocks` of them, and the ends.
fn tensor_parallel(n: u64, sequence_parallel: bool) -> Sent {
    let residual = 4 * T * D;
    // The weights of a block's two norms.
    let norms = 2 * all_reduce(n, 4 * D);
    let block = if sequence_parallel { 10 * all_gather(n, residual) } else { 4 * all_reduce(n, residual) };
    let embedding = if sequence_parallel { 2 * all_gather(n, residual) } else { all_reduce(n, residual) };
    // Where tokens are divided, each rank has a part of the last norm's gradient as well.
    let last_norm = all_reduce(n, 4 * D);
    let head = if sequence_parallel { 2 * all_gather(n, residual) + last_norm } else { all_reduce(n, residual) };
    // Of each token: the largest logit, then three sums.
    let loss = all_gather(n, 4 * T * n * 4);
    M * (BLOCKS * (block + norms) + embedding + head + loss) + squares(n)
}

/// Of a pipeline of `p` ranks, with `stages` of the plan: activations and gradients; the loss, and the squares of the norm.
fn pipeline(p: u64, stages: u64) -> Sent {
    let between = stages - 1;
    let loss = Sent { bytes: 8 * (p - 1), messages: p * (p - 1) };
    Sent { bytes: M * 2 * between * 4 * T * D, messages: M * 2 * between } + loss + squares(p)
}

#[test]
fn ranks_send_what_the_documentation_says() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let parallel = |sequence_parallel| Layout { sequence_parallel, ..layout(0, 1, 2) };
    let scheduled = |schedule| Layout { schedule, ..layout(0, 2, 1) };
    type Formula = Box<dyn Fn(u64) -> Sent>;
    let stages = BLOCKS + 2;
    let table = 4 * D * dataset.tokenizer.vocab_size() as u64;
    let sums = |params| all_gather(4, 4 * params);
    // The head and its norm.
    let last = table / 4 + D;
    let shared = Sent { bytes: (M + 1) * table, messages: M + 1 };
    let cases: Vec<(&'static str, usize, Layout, Formula)> = vec![
        ("dp", 4, layout(0, 1, 1), Box::new(move |params| data_parallel(4, params, stages, false, sums(params)))),
        ("zero", 4, layout(2, 1, 1), Box::new(move |params| data_parallel(4, params, stages, true, sums(params)))),
        (
            "zero-3",
            4,
            layout(3, 1, 1),
            Box::new(move |params| data_parallel(4, params, stages, true, brought_together(4, params, stages, last))),
        ),
        ("tp", 2, parallel(false), Box::new(|_| tensor_parallel(2, false))),
        ("sp", 2, parallel(true), Box::new(|_| tensor_parallel(2, true))),
        ("1f1b", 2, scheduled(Schedule::OneForwardOneBackward), Box::new(|_| pipeline(2, 2))),
        ("tied", 2, layout(0, 2, 1), Box::new(move |_| pipeline(2, 2) + shared)),
        ("interleaved", 2, scheduled(Schedule::Interleaved { stages_per_rank: 2 }), Box::new(|_| pipeline(2, 4))),
        ("zb-h1", 2, scheduled(Schedule::ZeroBubbleH1), Box::new(|_| pipeline(2, 2))),
    ];
    let mut wrong = vec![];
    for (name, ranks, layout, formula) in cases {
        let (folder, params) = train(dir.path(), &dataset, ranks, layout, name);
        let steps = metrics::read(&folder.join("metrics.jsonl")).unwrap().unwrap().steps;
        assert_eq!(steps.len(), 3);
        let want = formula(params);
        for step in steps {
            let got: RanksRecord = step.ranks.unwrap();
            println!("{name}: {got:?}, by formula {} bytes, {} messages", want.bytes, want.messages);
            if (got.bytes_sent, got.messages_sent) != (want.bytes, want.messages) {
                wrong.push(name);
            }
            for share in [Some(got.idle), Some(got.communication), got.overlap, got.bubble].into_iter().flatten() {
                assert!((0.0..=1.0).contains(&share), "{name}: {got:?}");
            }
            assert_eq!(got.bubble.is_some(), layout.pp > 1, "{name}");
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn what_each_rank_did_is_a_trace_and_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (ranks, layout, name) in
        [(0, Layout::default(), "one"), (2, layout(2, 1, 1), "zero"), (4, layout(0, 2, 1), "pipes")]
    {
        let (folder, _) = train(dir.path(), &dataset, ranks, layout, name);
        let text = std::fs::read_to_string(folder.join("timeline.json")).unwrap();
        let trace: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(trace["otherData"]["step"], 3, "the last step of a short run");
        let events = trace["traceEvents"].as_array().unwrap();
        let n = ranks.max(1);
        for rank in 0..n {
            let of = |kind: &str| {
                let mine = events.iter().filter(|event| event["pid"] == rank && event["cat"] == kind);
                mine.map(|event| (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap())).collect::<Vec<_>>()
            };
            // Each micro-batch on one rank of each of the pipelines.
            let passes = M as usize * layout.pp / n;
            assert_eq!((of("forward").len(), of("backward").len(), of("update").len()), (passes, passes, 1), "{name}");
            assert!(of("forward")[0].0 < of("backward")[0].0 && of("backward")[0].0 < of("update")[0].0, "{name}");
            if ranks > 0 {
                assert!(!of("communication").is_empty() && !of("idle").is_empty(), "{name}, rank {rank}");
                let background = of("background").iter().map(|(_, dur)| dur).sum::<f64>();
                assert!(background > 0.0, "{name}: gradients go out in the background");
            }
        }
        let named = |rank: usize| format!("rank {rank}");
        assert!((0..n).all(|rank| events.iter().any(|event| event["args"]["name"] == named(rank))), "{name}");
        let html = std::fs::read_to_string(folder.join("report.html")).unwrap();
        assert!(html.contains("What each rank did in step 3") && html.contains("forward of"), "{name}");
        assert_eq!(html.contains("waits in "), ranks > 0, "{name}");
    }
}
