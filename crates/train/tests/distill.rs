//! Students: what they learn, the same on every layout and after a resume; and teachers that do not fit.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use firebox_data::{Dataset, Source, prepare};
use firebox_models::transformer::ContextKind;
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::threads;
use firebox_train::checkpoint::{Checkpoint, TensorFile};
use firebox_train::observe::{DistillRecord, Event, ObserveError, Observer, Observers, RunInfo};
use firebox_train::{DistillRecipe, Layout, Recipe, TrainError, Trainer, Zero, model_io};

const MODEL: &str = "model={ d_model = 32, n_layers = 4, n_heads = 4, n_kv_heads = 2, context = 16, dropout = 0 }";

fn recipe(extra: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1, isolate_documents = true }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 10, batch_rows = 8, micro_batch_rows = 2, log_every = 1 }",
        MODEL,
        "eval={ every = 5, sample_tokens = 0 }",
        "checkpoint={ every = 5, keep_last = 5 }",
        // A gradient that is nothing but rounding must not become a whole step.
        "optimizer={ lr = 5e-3, eps = 1e-5 }",
    ];
    let set: Vec<String> = base.iter().chain(extra).map(ToString::to_string).collect();
    Recipe::load("tiny", &set).unwrap()
}

/// A corpus, and a teacher that has seen it.
struct School {
    dir: tempfile::TempDir,
    dataset: Arc<Dataset>,
}

impl School {
    fn new() -> Self {
        Self::of("boxes of fire", &["train.steps=30"])
    }

    fn of(what: &str, teacher: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..400u64).map(|i| format!("{i} {what}, {} of water\n", i * i % 991)).collect();
        let path = dir.path().join("text.txt");
        std::fs::write(&path, text).unwrap();
        let source = Source::new([path.display().to_string()]);
        let dataset = prepare(&recipe(&[]).data, &[source], &dir.path().join("cache"), &mut |_| {}).unwrap();
        let school = Self { dir, dataset: Arc::new(dataset) };
        school.learn(&recipe(teacher), 0, Layout::default(), "teacher", None);
        school
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn student(&self, extra: &[&str]) -> Recipe {
        let teacher = format!("distill.teacher={:?}", self.path("teacher").display().to_string());
        recipe(&[&["model.n_layers=2", &teacher][..], extra].concat())
    }

    fn trainer(&self, recipe: Recipe) -> Result<Trainer<'_>, TrainError> {
        let device = Backend::NdArray.device().unwrap();
        Trainer::new(recipe, &self.path("none"), &self.dataset, &device, None)
    }

    /// What is seen of a run on `ranks` (0: without any), from a checkpoint where there is one.
    fn learn(&self, recipe: &Recipe, ranks: usize, layout: Layout, name: &str, from: Option<&Path>) -> Seen {
        let (recipe, dir, dataset, seen) = (recipe.clone(), self.path(name), self.dataset.clone(), Seen::default());
        let (kept, from) = (seen.clone(), from.map(Path::to_path_buf));
        let run = move |comm: Option<Communicator>| {
            let device = Backend::NdArray.device().unwrap();
            let checkpoint = from.as_ref().map(|from| Checkpoint::open(from).unwrap());
            let mut trainer = match &checkpoint {
                Some(at) => Trainer::open(recipe.clone(), &dir, &dataset, &device, at).unwrap(),
                None => Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap(),
            };
            let mut observers = Observers::new();
            if comm.as_ref().is_none_or(|comm| comm.rank() == 0) {
                observers.push(seen.clone());
            }
            if let Some(comm) = comm {
                trainer = trainer.with_ranks(comm, layout)?;
            }
            if let Some(at) = &checkpoint {
                trainer.restore(at).unwrap();
            }
            trainer.run(&RunInfo::default(), &mut observers, &AtomicBool::new(false)).map(drop)
        };
        match ranks {
            0 => run(None).unwrap(),
            _ => drop(
                spawn(ranks, move |comm| {
                    let _threads = threads::for_rank(1).unwrap();
                    run(Some(comm))
                })
                .unwrap(),
            ),
        }
        kept
    }

    fn bytes(&self, name: &str, step: u64, file: &str) -> Vec<u8> {
        std::fs::read(self.path(name).join(format!("checkpoints/step-{step}")).join(file)).unwrap()
    }
}

/// Losses of steps and evaluations, and the parts of those.
#[derive(Clone, Default)]
struct Seen {
    losses: Arc<Mutex<Vec<f64>>>,
    parts: Arc<Mutex<Vec<DistillRecord>>>,
}

impl Observer for Seen {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::Step(record) => {
                self.losses.lock().unwrap().push(record.loss);
                self.parts.lock().unwrap().extend(record.distill);
            }
            Event::Evaluated(record) => self.losses.lock().unwrap().push(record.val_loss),
            _ => {}
        }
        Ok(())
    }
}

impl Seen {
    fn losses(&self) -> Vec<f64> {
        self.losses.lock().unwrap().clone()
    }

    fn parts(&self) -> Vec<DistillRecord> {
        self.parts.lock().unwrap().clone()
    }

    #[track_caller]
    fn assert_as(&self, other: &Self, what: &str) {
        let pairs = |seen: &Self| {
            let parts = seen.parts();
            let numbers = parts.iter().flat_map(|parts| {
                let hints = parts.hidden_loss.into_iter().chain(parts.relation_loss);
                [parts.hard_loss, parts.soft_loss].into_iter().chain(hints)
            });
            numbers.chain(seen.losses()).collect::<Vec<_>>()
        };
        let (mine, theirs) = (pairs(self), pairs(other));
        assert_eq!(mine.len(), theirs.len(), "{what}");
        let apart = mine.iter().zip(&theirs).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        println!("{what}: {apart:e} apart");
        assert!(apart < 1e-5, "{what}: {mine:?}, one rank {theirs:?}");
    }
}

fn layouts() -> Vec<(&'static str, usize, Layout)> {
    let none = Layout::default();
    let zero = |level: u8| Layout { zero: Zero::try_from(level).unwrap(), ..none };
    vec![
        ("dp 2", 2, none),
        ("zero 2", 2, zero(2)),
        ("zero 3", 2, zero(3)),
        ("pp 2", 2, Layout { pp: 2, ..none }),
        ("pp 2 zb-h1, dp 2", 4, Layout { pp: 2, schedule: Schedule::ZeroBubbleH1, ..none }),
        ("tp 2", 2, Layout { tp: 2, ..none }),
        ("tp 2 sequence, pp 2", 4, Layout { tp: 2, pp: 2, sequence_parallel: true, ..none }),
        ("cp 2 ring", 2, Layout { cp: 2, ..none }),
        ("cp 2 ulysses, zero 3", 4, Layout { cp: 2, context: ContextKind::Ulysses, ..zero(3) }),
    ]
}

#[test]
fn every_layout_takes_the_steps_of_one_rank() {
    let school = School::new();
    for extra in [
        &[][..],
        &["model.n_kv_heads=4", "distill.alpha=0.1", "model.logit_softcap=5.0"],
        &["model.d_model=24", "distill.hidden=0.5"],
        &["model.d_model=24", "distill.relations=0.5", "distill.relation_layer=3"],
        &["distill.cache_top_k=5", "model.d_model=24"],
    ] {
        let recipe = school.student(extra);
        let one = school.learn(&recipe, 0, Layout::default(), "one", None);
        assert_eq!(one.parts().len(), 10);
        for (name, ranks, layout) in layouts() {
            if !extra.is_empty() && ["dp 2", "zero 2", "pp 2"].contains(&name) {
                continue;
            }
            let DistillRecipe { hidden, relations, .. } = recipe.distill.clone().unwrap();
            if hidden > 0.0 && layout.sequence_parallel || relations > 0.0 && layout.tp * layout.cp > 1 {
                continue;
            }
            let many = school.learn(&recipe, ranks, layout, "many", None);
            many.assert_as(&one, &format!("{extra:?} on {name}"));
            std::fs::remove_dir_all(school.path("many")).unwrap();
        }
        std::fs::remove_dir_all(school.path("one")).unwrap();
    }
}

#[test]
fn a_resumed_student_takes_the_same_steps_to_the_bit() {
    let school = School::new();
    for (name, extra) in [
        ("plain", &["model.dropout=0.1"][..]),
        ("hints", &["model.d_model=24", "distill.hidden=0.5", "distill.relations=0.5", "distill.relation_heads=1"]),
        ("cached", &["distill.cache_top_k=5"]),
        ("frugal", &["memory={ recompute = \"blocks\", offload = \"disk\" }", "distill.temperature=4"]),
    ] {
        let recipe = school.student(extra);
        school.learn(&recipe, 0, Layout::default(), name, None);
        let again = format!("{name}-again");
        let half = school.path(name).join("checkpoints/step-5");
        school.learn(&recipe, 0, Layout::default(), &again, Some(&half));
        let hints = (name == "hints").then_some("distill.safetensors");
        for file in ["model.safetensors", "optimizer/adamw.safetensors"].into_iter().chain(hints) {
            assert!(school.bytes(name, 10, file) == school.bytes(&again, 10, file), "{name}: {file} differs");
        }
    }
}

/// How memory is saved changes no bit of a student.
#[test]
fn memory_options_change_nothing() {
    let school = School::new();
    let hints = ["distill.hidden=0.5", "distill.relations=0.5"];
    let frugal = [&hints[..], &["memory.recompute=blocks"]].concat();
    let one = school.learn(&school.student(&hints), 0, Layout::default(), "kept", None);
    let two = school.learn(&school.student(&frugal), 0, Layout::default(), "again", None);
    assert_eq!(one.losses(), two.losses());
    assert_eq!(one.parts(), two.parts());
    assert!(school.bytes("kept", 10, "model.safetensors") == school.bytes("again", 10, "model.safetensors"));
}

/// The loss is made of its parts, and the student comes closer to its teacher.
#[test]
fn a_student_learns_from_its_teacher() {
    let school = School::new();
    let recipe = school.student(&["distill.alpha=0.25", "train.steps=30"]);
    let seen = school.learn(&recipe, 0, Layout::default(), "student", None);
    let parts = seen.parts();
    let first = parts[0];
    let loss = 0.25 * first.hard_loss + 0.75 * first.soft_loss;
    assert!((seen.losses()[0] / loss - 1.0).abs() < 1e-6, "{} is not {loss}", seen.losses()[0]);
    let last = parts[29];
    assert!(last.soft_loss < 0.5 * first.soft_loss && last.hard_loss < first.hard_loss, "{first:?} {last:?}");
}

/// A student with all of its teacher's layers is the teacher, and has nothing to learn from it.
#[test]
fn a_student_starts_from_evenly_spaced_layers() {
    let school = School::new();
    let all = school.student(&["model.n_layers=4", "distill.init=teacher", "train.steps=1"]);
    let seen = school.learn(&all, 0, Layout::default(), "all", None);
    assert!(seen.parts()[0].soft_loss.abs() < 1e-6, "{:?}", seen.parts()[0]);
    // Two of four: the first and the last.
    let half = school.student(&["distill.init=teacher", "optimizer.lr=1e-12", "train.steps=1"]);
    school.learn(&half, 0, Layout::default(), "half", None);
    let file = |name: &str, step| TensorFile::open(school.path(name).join(format!("checkpoints/step-{step}"))).unwrap();
    let (student, teacher) = (file("half", 1), file("teacher", 30));
    let mut compared = 0;
    for name in student.names() {
        let of_teacher = name.replace("layers.1.", "layers.3.").replace(".h.1.", ".h.3.");
        compared += usize::from(of_teacher != name);
        let [mine, theirs] = [student.f32(name).unwrap(), teacher.f32(&of_teacher).unwrap()];
        assert!(mine.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-6), "{name} is not {of_teacher}");
    }
    assert!(compared > 0);
    let device = Backend::NdArray.device().unwrap();
    assert_eq!(model_io::load(school.path("half"), &device).unwrap().model.config().n_layers, 2);
}

#[test]
fn what_does_not_fit_is_said_before_the_start() {
    let school = School::new();
    let other = School::of("bags of sand & ash", &["train.steps=1"]);
    let of_other = format!("distill.teacher={:?}", other.path("teacher").display().to_string());
    for (extra, says) in [
        (&[of_other.as_str()][..], "tokenizer"),
        (&["distill.teacher=nowhere"], "nowhere"),
        (&["model.vocab_size=99"], "model.vocab_size: expected the teacher's"),
        (&["model.context=32"], "model.context: expected at most the teacher's 16"),
        (&["distill.init=teacher", "model.d_model=64"], "model.d_model: expected the teacher's 32"),
        (&["distill.init=teacher", "model.n_layers=5"], "model.n_layers: expected at most the teacher's 4"),
        (&["distill.init=teacher", "model.norm=layer_norm"], "the teacher's shape"),
        (&["distill.cache_top_k=99"], "distill.cache_top_k: expected at most"),
        (&["distill.relations=1", "distill.relation_layer=5"], "distill.relation_layer: expected a layer"),
        (&["distill.relations=1", "distill.relation_heads=3"], "distill.relation_heads: expected a divisor"),
    ] {
        let error = school.trainer(school.student(extra)).err().unwrap();
        assert!(error.is_input() && error.to_string().contains(says), "{error}");
    }
    for (set, says) in [
        ("temperature=0", "distill.temperature = 0: expected a number above 0"),
        ("temperature=-1", "a number above 0"),
        ("alpha=1.5", "distill.alpha = 1.5: expected a share from 0 to 1"),
        ("alpha=nan", "a share from 0 to 1"),
        ("hidden=-1", "distill.hidden = -1: expected a weight"),
        ("teacher=''", "the path of a checkpoint"),
        ("temprature=2", "did you mean `temperature`"),
    ] {
        let set = ["distill.teacher=x".to_owned(), format!("distill.{set}")];
        let error = Recipe::load("tiny", &set).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_ranks_cannot_learn_is_said_before_the_start() {
    let school = School::new();
    for (layout, extra, says) in [
        (Layout { tp: 2, sequence_parallel: true, ..Layout::default() }, "distill.hidden=1", "sequence-parallel"),
        (Layout { tp: 2, ..Layout::default() }, "distill.relations=1", "0 with tp or cp"),
        (Layout { cp: 2, ..Layout::default() }, "distill.relations=1", "0 with tp or cp"),
    ] {
        let (recipe, dataset, dir) = (school.student(&[extra]), school.dataset.clone(), school.path("none"));
        let error = spawn(2, move |comm| {
            let device = Backend::NdArray.device().unwrap();
            let trainer = Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap();
            trainer.with_ranks(comm, layout).map(drop)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

/// A wider teacher's hidden states and relations come nearer with training.
#[test]
fn a_student_of_another_width_learns_from_the_inside() {
    let school = School::new();
    let extra = ["model.d_model=24", "distill.hidden=1", "distill.relations=1", "train.steps=40"];
    let seen = school.learn(&school.student(&extra), 0, Layout::default(), "student", None);
    let parts = seen.parts();
    let [first, last] = [parts[0], parts[39]].map(|parts| [parts.hidden_loss.unwrap(), parts.relation_loss.unwrap()]);
    assert!(last[0] < 0.7 * first[0] && last[1] < 0.7 * first[1], "{first:?} {last:?}");
    // The student is a model as any other.
    let device = Backend::NdArray.device().unwrap();
    assert!(model_io::load(school.path("student"), &device).unwrap().model.projections.is_empty());
}

/// With all tokens kept the teacher says the same from the file as live; with a few, less.
#[test]
fn predictions_are_kept_in_a_file() {
    let school = School::new();
    let vocab = school.dataset.tokenizer.vocab_size();
    let live = school.learn(&school.student(&[]), 0, Layout::default(), "live", None);
    let all = school.student(&[&format!("distill.cache_top_k={vocab}")]);
    let kept = school.learn(&all, 0, Layout::default(), "kept", None);
    let apart = |kept: &Seen| {
        let pairs = live.losses().into_iter().zip(kept.losses());
        pairs.map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max)
    };
    assert!(apart(&kept) < 1e-4, "{}", apart(&kept));
    let few = school.learn(&school.student(&["distill.cache_top_k=8"]), 0, Layout::default(), "few", None);
    // To have fewer outcomes makes no divergence larger; what the student starts from is the same.
    let [first, of_few] = [live.parts()[0], few.parts()[0]];
    assert!(of_few.soft_loss > 0.5 * first.soft_loss && of_few.soft_loss <= first.soft_loss, "{first:?} {of_few:?}");
    assert!((of_few.hard_loss / first.hard_loss - 1.0).abs() < 1e-6, "{first:?} {of_few:?}");
    // Ranks make the same file together.
    school.learn(&school.student(&["distill.cache_top_k=8"]), 3, Layout::default(), "three", None);
    let file = |name: &str| std::fs::read(school.path(name).join("teacher-top-k.bin")).unwrap();
    assert!(file("few") == file("three"));
}

#[test]
fn predictions_of_another_kind_are_refused() {
    let school = School::new();
    school.learn(&school.student(&["distill.cache_top_k=4"]), 0, Layout::default(), "student", None);
    school.learn(&recipe(&["train.steps=3"]), 0, Layout::default(), "other", None);
    let other = format!("distill.teacher={:?}", school.path("other/checkpoints/step-3").display().to_string());
    let file = school.path("student").join("teacher-top-k.bin");
    let whole = std::fs::read(&file).unwrap();
    let refused = |extra: &[&str], says: &str| {
        let device = Backend::NdArray.device().unwrap();
        let recipe = school.student(&[&["distill.cache_top_k=4"], extra].concat());
        let mut trainer = Trainer::new(recipe, &school.path("student"), &school.dataset, &device, None).unwrap();
        let ended = trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false));
        let error = ended.unwrap_err();
        assert!(error.is_input() && error.to_string().contains(says), "{error}");
    };
    refused(&[&other], "teacher");
    refused(&["seed=7"], "seed 7");
    refused(&["distill.temperature=3"], "temperature 3");
    refused(&["distill.cache_top_k=5"], "k 5");
    refused(&["train.steps=11"], "samples 88");
    for (bytes, says) in [
        (whole[..whole.len() - 1].to_vec(), "bytes"),
        (whole[..100].to_vec(), "something else"),
        (vec![], "teacher-top-k.bin"),
        ([&whole[..1024], &vec![0xff; whole.len() - 1024]].concat(), "sample 0 without them"),
    ] {
        std::fs::write(&file, bytes).unwrap();
        refused(&[], says);
    }
    // What is gone is made again.
    std::fs::remove_file(&file).unwrap();
    std::fs::remove_dir_all(school.path("student/checkpoints")).unwrap();
    school.learn(&school.student(&["distill.cache_top_k=4"]), 0, Layout::default(), "student", None);
    assert!(std::fs::read(&file).unwrap() == whole);
}
