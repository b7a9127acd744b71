//! A run needs no more memory the longer it goes. In a program of its own: other tests would be measured with it.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::AtomicBool;

use firebox_data::{Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo};
use firebox_train::{Recipe, Trainer};

/// What the allocator may shift about between two steps.
const SLACK: u64 = 3 << 20;

/// Resident memory after the steps in question.
struct Memory(Vec<u64>, Vec<u64>);

impl Observer for Memory {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        if let Event::Step(step) = event
            && self.0.contains(&step.step)
        {
            self.1.push(step.memory_bytes);
        }
        Ok(())
    }
}

/// Trains a tiny model with evaluations and checkpoints on the way, and compares the memory after these steps.
fn train(steps: &[u64], set: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    let lines: String = (0..4000u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
    std::fs::write(&text, lines).unwrap();
    let last = steps.last().unwrap();
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.02 }",
        "schedule={ kind = \"constant\" }",
        &format!("train={{ steps = {last}, batch_rows = 4, micro_batch_rows = 2, log_every = 1 }}"),
        "model={ d_model = 48, n_layers = 3, n_heads = 3, context = 32, dropout = 0.1 }",
        "eval={ every = 30, sample_tokens = 8 }",
        "checkpoint.every=40",
    ];
    let set: Vec<String> = base.iter().chain(set).map(ToString::to_string).collect();
    let recipe = Recipe::load("tiny", &set).unwrap();
    let source = Source::new([text.display().to_string()]);
    let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
    let device = Backend::NdArray.device().unwrap();
    let mut trainer = Trainer::new(recipe, &dir.path().join("run"), &dataset, &device, None).unwrap();
    let mut memory = Memory(steps.to_vec(), vec![]);
    trainer.run(&RunInfo::default(), &mut memory, &AtomicBool::new(false)).unwrap();
    let found = memory.1;
    println!("{set:?}: resident bytes after steps {steps:?}: {found:?}");
    assert_eq!(found.len(), steps.len());
    let first = found[0];
    assert!(first > 0, "this system does not tell");
    for (step, bytes) in steps.iter().zip(&found) {
        assert!(
            *bytes <= first + (first / 50).max(SLACK),
            "{first} bytes after step {}, {bytes} after step {step}",
            steps[0]
        );
    }
}

const SAVING: [&str; 5] = [
    "memory.recompute=2",
    "memory.offload=disk",
    "memory.optimizer_in_backward=true",
    "optimizer.clip=0",
    "train.micro_batch_rows=0",
];

#[test]
fn memory_stays_flat() {
    train(&[100, 300], &[]);
    train(&[100, 300], &SAVING);
}

#[test]
#[ignore = "two minutes"]
fn memory_stays_flat_for_long() {
    train(&[100, 1000, 5000], &[]);
    train(&[100, 1000, 5000], &SAVING);
}
