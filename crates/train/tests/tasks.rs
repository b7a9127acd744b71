//! Tasks on labelled rows and on hidden text: the same run on several ranks, however they divide it, and after an interruption.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox_data::{Source, Tokenizer, prepare};
use firebox_models::transformer::{Head, Transformer};
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo};
use firebox_train::task::labelled::Records;
use firebox_train::task::{Hidden, Labelled, Task};
use firebox_train::{Layout, Recipe, TrainError, Trainer, Zero};
use serde_json::json;

/// A task, and on what model.
#[derive(Clone)]
struct Case {
    name: &'static str,
    task: &'static str,
    encoder: bool,
    /// Whether its loss compares rows: one rank then has those of all ranks in one micro-batch.
    couples_rows: bool,
}

const CASES: [Case; 8] = [
    Case {
        name: "classes",
        task: "{ kind = 'classes', second = 'other', label = 'kind' }",
        encoder: true,
        couples_rows: false,
    },
    Case { name: "classes-decoder", task: "{ kind = 'classes', label = 'kind' }", encoder: false, couples_rows: false },
    Case { name: "token-classes", task: "{ kind = 'token_classes' }", encoder: true, couples_rows: false },
    Case { name: "values", task: "{ kind = 'values', label = 'sizes' }", encoder: true, couples_rows: false },
    Case {
        name: "embedding",
        task: "{ kind = 'embedding', anchor = 'text', positive = 'other' }",
        encoder: true,
        couples_rows: true,
    },
    Case {
        name: "embedding-negatives",
        task: "{ kind = 'embedding', anchor = 'text', positive = 'other', negative = 'wrong' }",
        encoder: false,
        couples_rows: true,
    },
    Case { name: "masked", task: "{ kind = 'masked', whole_word = true }", encoder: true, couples_rows: false },
    Case { name: "spans", task: "{ kind = 'spans' }", encoder: false, couples_rows: false },
];

impl Case {
    fn recipe(&self, extra: &[String]) -> Recipe {
        let shape = match self.encoder {
            true => {
                "encoder = { norm_after = true, embed_norm = true, token_types = 2 }, norm = 'layer_norm', feed_forward = 'gelu_exact', positions = 'learned', bias = true"
            }
            false => "tied = true",
        };
        let base = [
            format!("task={}", self.task),
            format!(
                "model={{ d_model = 16, n_layers = 2, n_heads = 4, n_kv_heads = 4, context = 24, init_std = 0.1, {shape} }}"
            ),
            "data={ vocab_size = 320, val_fraction = 0.1 }".into(),
            "schedule={ kind = 'constant' }".into(),
            "train={ steps = 6, batch_rows = 8, micro_batch_rows = 4, log_every = 1 }".into(),
            "eval={ every = 0, sample_tokens = 0 }".into(),
            "checkpoint={ every = 3, keep_last = 5 }".into(),
            // Gradients of what has no influence (a bias of keys) are rounding noise.
            "optimizer={ kind = 'adamw', lr = 5e-3, eps = 1e-3 }".into(),
        ];
        Recipe::load("tiny", &[&base[..], extra].concat()).unwrap()
    }

    /// The task, and the head that it needs.
    fn task(&self, recipe: &Recipe, data: &Path) -> (Head, Box<dyn Task<Transformer>>) {
        let path = data.join("rows.jsonl").display().to_string();
        if let "masked" | "spans" = self.name {
            let dataset = prepare(&recipe.data, &[Source::new([path])], &data.join("cache"), &mut |_| {}).unwrap();
            let task = Hidden::new(recipe, dataset).unwrap();
            return (task.head(), Box::new(task));
        }
        let records = Records::read(&[path], None, recipe.data.val_fraction).unwrap();
        let tokenizer = Tokenizer::train_bpe(&records.texts(), recipe.data.vocab_size).unwrap();
        let task = Labelled::new(recipe, &records, tokenizer).unwrap();
        (task.head(), Box::new(task))
    }

    /// Trains on `ranks` (0: without any) in `dir`, from a checkpoint where there is one; the losses of the steps.
    fn train(
        &self,
        ranks: usize,
        layout: Layout,
        lab: &Path,
        dir: &str,
        extra: &[String],
        from: Option<&str>,
    ) -> Vec<f64> {
        let mut recipe = self.recipe(extra);
        let (head, _) = self.task(&recipe, lab);
        recipe.model.head = Some(head);
        let (lab, dir) = (lab.to_path_buf(), lab.join(dir));
        let from = from.map(|from| lab.join(from));
        let run = {
            let case = self.clone();
            move |comm: Option<Communicator>| {
                let device = Backend::NdArray.device().unwrap();
                let (_, task) = case.task(&recipe, &lab);
                let model = recipe.first_model(task.tokenizer().unwrap().vocab_size(), &device)?;
                let checkpoint = from.as_ref().map(|from| Checkpoint::open(from).unwrap());
                let mut trainer = match &checkpoint {
                    Some(at) => Trainer::open_task(recipe.clone(), &dir, task, &device, model, at)?,
                    None => Trainer::of_task(recipe.clone(), &dir, task, &device, model)?,
                };
                if let Some(comm) = comm {
                    trainer = trainer.with_ranks(comm, layout)?;
                }
                if let Some(at) = &checkpoint {
                    trainer.restore(at)?;
                }
                let mut losses = Losses::default();
                let summary = trainer.run(&RunInfo::default(), &mut losses, &AtomicBool::new(false))?;
                assert!(summary.val_loss.is_some_and(f64::is_finite), "held out");
                Ok::<_, TrainError>(losses.0)
            }
        };
        if ranks == 0 {
            return run(None).unwrap();
        }
        let mut losses = spawn(ranks, move |comm| {
            let _threads = threads::for_rank(1).unwrap();
            run(Some(comm))
        })
        .unwrap();
        losses.swap_remove(0)
    }
}

/// The losses of the steps.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        if let Event::Step(record) = event {
            self.0.push(record.loss);
        }
        Ok(())
    }
}

/// Rows with all fields.
fn rows(lab: &Path) {
    let [nouns, verbs] =
        [["boiler", "fire", "valve", "piston", "driver"], ["feeds", "warms", "opens", "turns", "watches"]];
    let mut lines = String::new();
    for i in 0..80 {
        let (noun, verb) = (nouns[i % 5], verbs[i * 3 % 5]);
        let text = format!("the {noun} {verb} the {} {}", nouns[(i * i + 2) % 5], "again ".repeat(i % 4));
        let words: Vec<&str> = text.split_whitespace().collect();
        let labels: Vec<&str> = words.iter().map(|word| if nouns.contains(word) { "B-noun" } else { "O" }).collect();
        let row = json!({
            "text": text, "tokens": words, "labels": labels, "kind": noun, "sizes": [text.len() as f64 / 30.0, i % 2],
            "other": format!("{noun} {verb} {i}"), "wrong": format!("{} {verb} {i}", nouns[(i + 1) % 5]),
        });
        writeln!(lines, "{row}").unwrap();
    }
    std::fs::write(lab.join("rows.jsonl"), lines).unwrap();
}

/// The largest difference of a tensor of two runs, to the largest value of the tensor.
fn apart(a: &Path, b: &Path) -> f32 {
    let [a, b] = [a, b].map(|dir| TensorFile::open(dir.join("checkpoints/step-6")).unwrap());
    let of = |name: &str| {
        let [x, y] = [&a, &b].map(|file| file.f32(name).unwrap());
        let largest = x.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        x.iter().zip(&y).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest
    };
    a.names().map(of).fold(0.0, f32::max)
}

#[test]
fn every_task_takes_the_steps_of_one_rank_on_two() {
    let dir = tempfile::tempdir().unwrap();
    let lab = dir.path();
    rows(lab);
    let zero = |zero| Layout { zero: Zero::try_from(zero).unwrap(), ..Layout::default() };
    let tp = Layout { tp: 2, ..Layout::default() };
    for case in CASES {
        let whole = if case.couples_rows { 8 } else { 4 };
        let one_name = format!("{}-one", case.name);
        let one = case.train(0, Layout::default(), lab, &one_name, &[format!("train.micro_batch_rows={whole}")], None);
        assert_eq!(one.len(), 6);
        assert!(one.iter().all(|loss| loss.is_finite() && *loss > 0.0) && one[0] != one[5], "{}: {one:?}", case.name);
        for (layout_name, layout, micro_rows) in [("dp", zero(0), 4), ("zero-3", zero(3), 4), ("tp", tp, whole)] {
            let name = format!("{}-{layout_name}", case.name);
            let many = case.train(2, layout, lab, &name, &[format!("train.micro_batch_rows={micro_rows}")], None);
            let off = one.iter().zip(&many).fold(0f64, |worst, (a, b)| worst.max((b / a - 1.0).abs()));
            println!(
                "{name}: losses {off:.1e} apart, parameters {:.1e}",
                apart(&lab.join(&one_name), &lab.join(&name))
            );
            assert!(off < 1e-5, "{name}: {many:?}, one rank {one:?}");
            assert!(apart(&lab.join(&one_name), &lab.join(&name)) < 1e-4, "{name}");
        }
    }
}

#[test]
fn every_task_goes_on_as_if_it_had_not_been_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let lab = dir.path();
    rows(lab);
    for case in CASES {
        let (whole, again) = (format!("{}-whole", case.name), format!("{}-again", case.name));
        let extra = ["model.dropout=0.1".into()];
        let losses = case.train(0, Layout::default(), lab, &whole, &extra, None);
        let rest = case.train(0, Layout::default(), lab, &again, &extra, Some(&format!("{whole}/checkpoints/step-3")));
        let bits = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&losses[3..]), bits(&rest), "{}", case.name);
        for file in ["model.safetensors", "optimizer/adamw.safetensors", "config.json"] {
            let [a, b] =
                [&whole, &again].map(|run| std::fs::read(lab.join(run).join("checkpoints/step-6").join(file)).unwrap());
            assert!(a == b, "{}: {file} differs", case.name);
        }
    }
}

#[test]
fn rows_that_are_compared_are_divided_evenly() {
    let dir = tempfile::tempdir().unwrap();
    let lab = dir.path();
    rows(lab);
    let case = CASES[4].clone();
    let (mut recipe, lab) = (case.recipe(&["train.micro_batch_rows=3".into()]), lab.to_path_buf());
    recipe.model.head = Some(case.task(&recipe, &lab).0);
    let error = spawn(2, move |comm| {
        let device = Backend::NdArray.device().unwrap();
        let (_, task) = case.task(&recipe, &lab);
        let model = recipe.first_model(task.tokenizer().unwrap().vocab_size(), &device)?;
        Trainer::of_task(recipe.clone(), &lab, task, &device, model)?.with_ranks(comm, Layout::default()).map(drop)
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("whose rows the loss compares"), "{error}");
}
