//! Every kind of optimizer through the training loop: it learns, and goes on from a checkpoint bit for bit.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::checkpoint::Checkpoint;
use firebox_train::observe::{Observers, RunInfo};
use firebox_train::{Recipe, Trainer};

const STEPS: u64 = 40;
const HALF: u64 = 20;

fn recipe(optimizer: &str) -> Recipe {
    let set = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1 }".to_owned(),
        "schedule={ kind = \"constant\" }".to_owned(),
        format!("train={{ steps = {STEPS}, batch_rows = 4, micro_batch_rows = 2 }}"),
        "model={ d_model = 64, n_layers = 1, n_heads = 2, context = 32, dropout = 0.1 }".to_owned(),
        "eval={ every = 0, sample_tokens = 0 }".to_owned(),
        format!("checkpoint={{ every = {HALF}, keep_last = 5 }}"),
        format!("optimizer={optimizer}"),
    ];
    Recipe::load("tiny", &set).unwrap()
}

fn dataset(dir: &Path, recipe: &Recipe) -> Dataset {
    let text = dir.join("text.txt");
    let lines: String = (0..3000u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
    std::fs::write(&text, lines).unwrap();
    prepare(&recipe.data, &[Source::new([text.display().to_string()])], &dir.join("cache"), &mut |_| {}).unwrap()
}

#[test]
fn optimizers_learn_and_resume() {
    let device = Backend::NdArray.device().unwrap();
    for (optimizer, best, files) in [
        ("{ kind = \"adamw\", lr = 1e-2, state = \"int8\" }", 3.0, 1),
        ("{ kind = \"adamw\", lr = 1e-2, state = \"bf16\" }", 3.0, 1),
        ("{ kind = \"muon\", lr = 2e-2 }", 3.0, 1),
        ("{ kind = \"soap\", lr = 1e-2, precondition_frequency = 3 }", 3.0, 1),
        ("{ kind = \"sophia\", lr = 5e-3, every = 4 }", 3.2, 1),
        ("{ kind = \"schedule_free\", lr = 2e-2 }", 3.0, 2),
        (
            "{ kind = \"lion\", lr = 2e-3, groups = [{ kinds = [\"embedding\", \"head\"], algorithm = { kind = \"adafactor\" } }] }",
            3.2,
            1,
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(optimizer);
        let dataset = dataset(dir.path(), &recipe);
        let run = |trainer: &mut Trainer<'_>| {
            let summary = trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false)).unwrap();
            summary.val_loss.unwrap()
        };
        let whole = dir.path().join("whole");
        let loss = run(&mut Trainer::new(recipe.clone(), &whole, &dataset, &device, None).unwrap());
        assert!(loss < best, "{optimizer}: {loss}");

        let half = Checkpoint::open(whole.join(format!("checkpoints/step-{HALF}"))).unwrap();
        let resumed = dir.path().join("resumed");
        let again = run(&mut Trainer::resume(recipe, &resumed, &dataset, &device, &half).unwrap());
        assert_eq!(loss.to_bits(), again.to_bits(), "{optimizer}");
        let mut compared = 0;
        let mut compare = |name: &str| {
            let read = |run: &Path| std::fs::read(run.join(format!("checkpoints/step-{STEPS}")).join(name)).ok();
            let (one, two) = (read(&whole), read(&resumed));
            assert!(one == two, "{optimizer}: {name} differs");
            compared += usize::from(one.is_some());
        };
        ["model.safetensors", "trained.safetensors"].iter().for_each(|name| compare(name));
        assert_eq!(compared, files, "{optimizer}");
        let kind = optimizer.split('"').nth(1).unwrap();
        let state = format!("optimizer/{kind}.safetensors");
        let read = |run: &Path| std::fs::read(run.join(format!("checkpoints/step-{STEPS}")).join(&state)).unwrap();
        assert!(read(&whole) == read(&resumed), "{optimizer}: {state} differs");
    }
}
