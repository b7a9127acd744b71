//! Adapters beside a model that stays as it is: what checkpoints hold, what goes on from them, and the same run on several ranks.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use firebox_data::{Dataset, Source, prepare};
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{Observers, RunInfo};
use firebox_train::{Layout, Recipe, TrainError, Trainer, Zero, merge_adapters, model_io};

fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1, isolate_documents = true }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 10, batch_rows = 4, micro_batch_rows = 1, log_every = 1 }",
        "model={ d_model = 32, n_layers = 3, n_heads = 4, n_kv_heads = 2, context = 16, dropout = 0.1 }",
        "eval={ every = 0, sample_tokens = 0 }",
        "checkpoint={ every = 5, keep_last = 5 }",
        "optimizer.lr=5e-3",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
    base: PathBuf,
    dataset: Arc<Dataset>,
}

impl Place {
    /// A model that was trained before.
    fn new(extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..400u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
        let path = dir.path().join("text.txt");
        std::fs::write(&path, text).unwrap();
        let source = Source::new([path.display().to_string()]);
        let recipe = recipe(extra);
        let dataset = prepare(&recipe.data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
        let (base, device) = (dir.path().join("base"), Backend::NdArray.device().unwrap());
        let mut trainer = Trainer::new(recipe, &base, &dataset, &device, None).unwrap();
        trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false)).unwrap();
        drop(trainer);
        Self { dir, base, dataset: Arc::new(dataset) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn recipe(&self, adapter: &str, extra: &[&str]) -> Recipe {
        let recipe = recipe(extra).starting_from(&self.base).unwrap();
        let adapter = (!adapter.is_empty()).then(|| adapter.to_owned());
        Recipe { data: self::recipe(&[]).data, ..recipe.with(&Vec::from_iter(adapter)).unwrap() }
    }

    /// Trains on `ranks` (0: without any), from a checkpoint where there is one; the validation loss.
    fn train(
        &self,
        recipe: &Recipe,
        ranks: usize,
        layout: Layout,
        name: &str,
        from: Option<&Path>,
    ) -> Result<f64, TrainError> {
        let (recipe, dir, dataset) = (recipe.clone(), self.at(name), self.dataset.clone());
        let from = from.map(Path::to_path_buf);
        let run = move |comm: Option<Communicator>| {
            let device = Backend::NdArray.device().unwrap();
            let checkpoint = from.as_ref().map(|from| Checkpoint::open(from).unwrap());
            let mut trainer = match &checkpoint {
                Some(at) => Trainer::open(recipe.clone(), &dir, &dataset, &device, at)?,
                None => {
                    let init = recipe.initial_model(&device)?;
                    Trainer::new(recipe.clone(), &dir, &dataset, &device, init)?
                }
            };
            if let Some(comm) = comm {
                trainer = trainer.with_ranks(comm, layout)?;
            }
            if let Some(at) = &checkpoint {
                trainer.restore(at)?;
            }
            let summary = trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false))?;
            Ok(summary.val_loss.unwrap())
        };
        if ranks == 0 {
            return run(None);
        }
        let losses = spawn(ranks, move |comm| {
            let _threads = threads::for_rank(1).unwrap();
            Ok::<_, TrainError>(run(Some(comm)))
        });
        losses.unwrap().into_iter().next().unwrap()
    }
}

fn one() -> Layout {
    Layout::default()
}

const LORA: &str = "adapter={ kind = \"lora\", rank = 3, targets = [\"all\"] }";
const DORA: &str =
    "adapter={ kind = \"dora\", rank = 3, targets = [\"q_proj\", \"v_proj\", \"o_proj\", \"down_proj\"] }";
const QLORA: &str = "adapter={ kind = \"lora\", rank = 3, targets = [\"all\"], base = \"nf4\" }";
const HALF: &str = "adapter={ kind = \"lora\", rank = 3, base = \"bf16\" }";

fn logits(model: &Transformer) -> Vec<f32> {
    let ids: Vec<i32> = (0..12).map(|i| i * 5 % 17).collect();
    let batch = TokenBatch::plain(1, 12, ids.clone(), ids);
    model.logits(&batch).into_data().try_into_vec().unwrap()
}

fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * (1.0 + a.abs()))
}

#[test]
fn a_run_goes_on_as_if_never_interrupted_and_keeps_adapters_alone() {
    let place = Place::new(&[]);
    let whole = std::fs::metadata(place.base.join("checkpoints/step-10/model.safetensors")).unwrap().len();
    for (name, adapter) in [("lora", LORA), ("dora", DORA), ("qlora", QLORA), ("half", HALF)] {
        let recipe = place.recipe(adapter, &[]);
        let loss = place.train(&recipe, 0, one(), name, None).unwrap();
        let at = |run: &str, step: u64| place.at(run).join(format!("checkpoints/step-{step}"));
        let resumed = format!("{name}-resumed");
        let again = place.train(&recipe, 0, one(), &resumed, Some(&at(name, 5))).unwrap();
        assert_eq!(loss.to_bits(), again.to_bits(), "{name}");
        for file in ["adapter_model.safetensors", "optimizer/adamw.safetensors"] {
            let [a, b] = [name, &resumed].map(|run| std::fs::read(at(run, 10).join(file)).unwrap());
            assert!(a == b, "{name}: {file} differs");
        }
        let checkpoint = at(name, 10);
        assert!(!checkpoint.join("model.safetensors").exists(), "{name}");
        let file = TensorFile::open(checkpoint.join("adapter_model.safetensors")).unwrap();
        assert!(file.names().all(|name| name.starts_with("base_model.model.model.layers.") && name.contains("lora_")));
        let size = std::fs::metadata(checkpoint.join("adapter_model.safetensors")).unwrap().len();
        assert!(2 * size < whole, "{name}: {size} of {whole} bytes");
        let learned = file.f32("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight").unwrap();
        assert!(learned.iter().any(|v| *v != 0.0), "{name}");
    }
}

#[test]
fn adapters_and_the_merged_model_are_one() {
    let place = Place::new(&[]);
    for (name, adapter) in [("lora", LORA), ("dora", DORA)] {
        let recipe = place.recipe(adapter, &[]);
        let device = Backend::NdArray.device().unwrap();
        let init = recipe.initial_model(&device).unwrap();
        let dir = place.at(name);
        let mut trainer = Trainer::new(recipe, &dir, &place.dataset, &device, init).unwrap();
        trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false)).unwrap();
        let trained = logits(trainer.model());
        let before = logits(&model_io::load(&place.base, &device).unwrap().model);
        assert!(!close(&trained, &before, 1e-2), "{name}: nothing was learned");
        // Whoever opens a run with adapters gets the model that has them in its weights.
        let opened = model_io::load(&dir, &device).unwrap().model;
        assert!(opened.config().adapter.is_none());
        assert!(close(&trained, &logits(&opened), 1e-5), "{name}");
        let out = place.at(&format!("{name}-merged"));
        merge_adapters(&dir, None, &out).unwrap();
        let merged = model_io::load(&out, &device).unwrap().model;
        assert!(close(&trained, &logits(&merged), 1e-5), "{name}");
        // The folder of a checkpoint is one of PEFT as well, and another run starts from its adapters.
        let folder = place.at(&format!("{name}-peft"));
        std::fs::create_dir(&folder).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(dir.join("checkpoints/step-10").join(file), folder.join(file)).unwrap();
        }
        let opened = model_io::load(&folder, &device).unwrap().model;
        assert!(close(&trained, &logits(&opened), 1e-5), "{name}");
        let again = place.at(&format!("{name}-again"));
        merge_adapters(&folder, Some(&place.base), &again).unwrap();
        let start = format!("adapter.init={:?}", folder.display().to_string());
        let recipe = place.recipe(adapter, &[]).with(&[start]).unwrap();
        let init = recipe.initial_model(&device).unwrap();
        let trainer = Trainer::new(recipe, &again, &place.dataset, &device, init).unwrap();
        assert!(close(&trained, &logits(trainer.model()), 1e-6), "{name}");
    }
}

#[test]
fn any_layout_has_the_losses_of_one_rank() {
    let place = Place::new(&["model.dropout=0.0"]);
    let zero = |level: u8| Layout { zero: Zero::try_from(level).unwrap(), ..one() };
    let tp = |sequence_parallel| Layout { tp: 2, sequence_parallel, ..one() };
    for (name, adapter) in [("lora", LORA), ("dora", DORA), ("qlora", QLORA), ("half", HALF)] {
        let recipe = place.recipe(adapter, &["model.dropout=0.0"]);
        let loss = place.train(&recipe, 0, one(), name, None).unwrap();
        let layouts = [
            ("dp", zero(0)),
            ("zero-2", zero(2)),
            ("zero-3", zero(3)),
            ("tp", tp(false)),
            ("sp", tp(true)),
            ("pp", Layout { pp: 2, ..one() }),
        ];
        for (kind, layout) in layouts {
            let run = format!("{name}-{kind}");
            let found = place.train(&recipe, 2, layout, &run, None);
            if name == "qlora" && layout.tp > 1 {
                let error = found.unwrap_err().to_string();
                assert!(error.contains("adapter.base") && error.contains("nf4"), "{error}");
                continue;
            }
            let found = found.unwrap_or_else(|error| panic!("{run}: {error}"));
            assert!((found - loss).abs() < 1e-5 * loss, "{run}: {found}, on one rank {loss}");
            let [a, b] = [name, &run].map(|run| {
                TensorFile::open(place.at(run).join("checkpoints/step-10/adapter_model.safetensors")).unwrap()
            });
            for tensor in a.names() {
                let (a, b) = (a.f32(tensor).unwrap(), b.f32(tensor).unwrap());
                let largest = a.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
                let apart = a.iter().zip(&b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
                assert!(apart < 2e-3 * largest, "{run}: {tensor} is {apart} off of {largest}");
                assert!(kind != "dp" || a == b, "{run}: {tensor}");
            }
        }
        // A run of one rank goes on with two.
        let from = place.at(name).join("checkpoints/step-5");
        let found = place.train(&recipe, 2, zero(3), &format!("{name}-on"), Some(&from)).unwrap();
        assert!((found - loss).abs() < 1e-5 * loss, "{name}: {found}, on one rank {loss}");
    }
}

#[test]
fn what_is_frozen_stays_and_layers_learn_at_their_rates() {
    let place = Place::new(&[]);
    let run = |name: &str, extra: &[&str], ranks: usize, layout: Layout| {
        let recipe = place.recipe("", extra);
        place.train(&recipe, ranks, layout, name, None).unwrap();
        TensorFile::open(place.at(name).join("checkpoints/step-10/model.safetensors")).unwrap()
    };
    let before = TensorFile::open(place.base.join("checkpoints/step-10/model.safetensors")).unwrap();
    let frozen = ["freeze={ params = [\"embed.*\", \"blocks.0.*\", \"*norm*\"] }"];
    let stays = |name: &str| name.contains("embed") || name.contains("layers.0.") || name.contains("norm");
    let after = run("frozen", &frozen, 0, one());
    for name in before.names() {
        assert_eq!(before.f32(name).unwrap() == after.f32(name).unwrap(), stays(name), "{name}");
    }
    for (kind, layout) in [
        ("zero", Layout { zero: Zero::Parameters, ..one() }),
        ("tp", Layout { tp: 2, ..one() }),
        ("pp", Layout { pp: 2, ..one() }),
    ] {
        let divided = run(&format!("frozen-{kind}"), &frozen, 2, layout);
        for name in before.names() {
            let (a, b) = (after.f32(name).unwrap(), divided.f32(name).unwrap());
            assert!(close(&a, &b, 1e-3), "{kind}: {name}");
            assert!(!stays(name) || a == b, "{kind}: {name}");
        }
    }
    // Of the first step, whose size AdamW makes of the rate alone.
    let one_step = ["train.steps=1", "optimizer.layer_decay=0.5", "optimizer.weight_decay=0.0", "optimizer.lr=1e-3"];
    let after = run_one(&place, &one_step);
    let moved = |name: &str| {
        let (a, b) = (before.f32(name).unwrap(), after.f32(name).unwrap());
        a.iter().zip(&b).fold(0f32, |most, (a, b)| most.max((a - b).abs()))
    };
    let of_layer = |layer: usize| moved(&format!("model.layers.{layer}.self_attn.o_proj.weight"));
    for (found, expected) in [(moved("model.norm.weight"), 1e-3), (of_layer(2), 5e-4), (of_layer(0), 1.25e-4)] {
        assert!((found / expected - 1.0).abs() < 0.05, "{found}, expected {expected}");
    }
}

fn run_one(place: &Place, extra: &[&str]) -> TensorFile {
    let recipe = place.recipe("", extra);
    place.train(&recipe, 0, one(), "one-step", None).unwrap();
    TensorFile::open(place.at("one-step").join("checkpoints/step-1/model.safetensors")).unwrap()
}

#[test]
fn mistakes_are_said_in_a_line() {
    let place = Place::new(&[]);
    let device = Backend::NdArray.device().unwrap();
    let refuse = |extra: &[&str]| {
        let recipe = place.recipe("", extra);
        let init = recipe.initial_model(&device).unwrap();
        Trainer::new(recipe, &place.at("refused"), &place.dataset, &device, init).map(|_| ()).unwrap_err().to_string()
    };
    let error = refuse(&["adapter.targets=[\"w_q\"]"]);
    assert!(error.contains("w_q") && error.contains("q_proj"), "{error}");
    let error = refuse(&["adapter.rank=1000"]);
    assert!(error.contains("adapter.rank") && error.contains("1000"), "{error}");
    let error = refuse(&["freeze.params=[\"blocks.9.*\"]"]);
    assert!(error.contains("blocks.9.*"), "{error}");
    let error = refuse(&["freeze.params=[\"*\"]"]);
    assert!(error.contains("something to train"), "{error}");
    let parse = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        Recipe::load("tiny", &set).unwrap_err().to_string()
    };
    assert!(parse(&["adapter.base=nf4"]).contains("adapter.base"));
    assert!(parse(&["adapter.kind=lorra"]).contains("did you mean `lora`?"));
    assert!(parse(&["optimizer.layer_decay=1.5"]).contains("layer_decay"));
    // A model that is no longer the one that adapters were trained for.
    let recipe = place.recipe(LORA, &["train.steps=1"]);
    place.train(&recipe, 0, one(), "moved", None).unwrap();
    let file = place.base.join("checkpoints/step-10/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = model_io::load(place.at("moved"), &device).unwrap_err().to_string();
    assert!(error.contains("as it was") || error.contains("checksum"), "{error}");
    assert_eq!(error.lines().count(), 1);
}
