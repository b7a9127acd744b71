//! The driver with workers of its own program on a tiny model; PyTorch is not needed.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use firebox_bench::contender::{Contender, Programs};
use firebox_bench::models::training;
use firebox_bench::protocol::{Job, Task, Training};
use firebox_bench::race::{Entry, race};
use firebox_models::transformer::{TransformerConfig, presets};

fn programs() -> Programs {
    Programs { own: PathBuf::from(env!("CARGO_BIN_EXE_firebox-bench")), ..Programs::default() }
}

fn tiny() -> Training {
    let model = TransformerConfig {
        n_layers: 2,
        d_model: 32,
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: 16,
        d_ff: 64,
        context: 16,
        ..presets::nanogpt_cpu(17)
    };
    training(model, 3, 16)
}

fn entry(threads: usize, task: Task, contender: Contender, n: usize, rounds: usize) -> Entry {
    Entry { job: Job { contender, threads, task }, n, rounds }
}

#[test]
fn two_workers_take_turns_and_train_the_same_model() {
    let train = |threads, rounds| entry(threads, Task::Train(tiny()), Contender::Firebox, 4, rounds);
    let recompute = entry(1, Task::Train(tiny()), Contender::FireboxRecompute, 4, 1);
    let entries = [train(1, 3), train(2, 2), entry(2, Task::Peak, Contender::Peak, 1, 1), recompute];
    let mut lines = vec![];
    let raced = race(&programs(), &entries, &mut |line| lines.push(line.to_owned())).unwrap();
    assert_eq!(raced.iter().map(|raced| raced.rounds.len()).collect::<Vec<_>>(), [3, 2, 1, 1]);
    let (one, two) = (&raced[0], &raced[1]);
    assert_eq!(one.ready.params, tiny().model.num_params() as u64);
    assert!((one.ready.loss - 17f64.ln()).abs() < 0.1, "random weights know nothing: {}", one.ready.loss);
    assert_eq!(one.rounds[1].value, two.rounds[1].value, "the number of threads changes no bit");
    assert_eq!(one.rounds[0].value, raced[3].rounds[0].value, "nor does recomputation");
    assert!(one.rounds[2].value < one.ready.loss, "it learns the batch");
    assert!(one.rounds.iter().all(|done| done.seconds > 0.0) && one.ended.peak_rss_bytes > 1 << 20);
    assert!(raced[2].rounds[0].value > 1e8, "a machine of less than 0.1 GFLOP/s: {:?}", raced[2].rounds[0]);
    // Rounds are interleaved: first everyone's first.
    let turns: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("round ")?.split(' ').next()).collect();
    assert_eq!(turns, ["1/3", "1/3", "1/3", "1/3", "2/3", "2/3", "3/3"]);
}

#[test]
fn a_worker_that_dies_says_why() {
    let model = TransformerConfig { n_kv_heads: 3, ..tiny().model };
    let task = Task::Train(Training { model, ..tiny() });
    let error = race(&programs(), &[entry(1, task, Contender::Firebox, 1, 1)], &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("firebox died") && error.contains("n_kv_heads"), "{error}");
}

#[test]
fn kernels_are_called_as_often_as_asked() {
    let kernels: Vec<_> =
        firebox_bench::kernels::all().into_iter().filter(|kernel| kernel.to_string().contains("768 x 128")).collect();
    assert!(kernels.len() >= 3, "sgemm, linear and layer-norm of the smallest model");
    let task = Task::Kernels(kernels);
    let raced = race(&programs(), &[entry(1, task, Contender::Firebox, 2, 1)], &mut |_| {}).unwrap();
    assert!(raced[0].rounds[0].seconds > 0.0);
}
