//! `bench compress`: what each method makes of one trained model.
//!
//! Every row is a pipeline of `firebox compress` from the same model, in a folder of its own: run again, what is there is not done again.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use firebox_data::{DataConfig, Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::compress::pipeline::{Pipeline, Row};
use firebox_train::compress::recipe::CompressRecipe;
use firebox_train::compress::report::picture;
use firebox_train::model_io::load;
use firebox_train::observe::Observers;
use firebox_train::{Recipe, TrainError, Trainer};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::table::Table;

/// A table of the results: what it shows, and its rows: name, and steps as TOML.
struct Group {
    title: &'static str,
    rows: Vec<(&'static str, String)>,
}

/// What a training run after a step is, or before one.
const TUNE: &str = "recipe = 'default'\nset = ['train.steps=120', 'train.batch_rows=16', 'train.micro_batch_rows=8', 'optimizer.lr=1e-4', \
    'schedule={ kind = \"wsd\", warmup_steps = 10, decay_fraction = 0.8 }', 'eval.sample_tokens=0', 'eval.every=0', 'checkpoint.every=120'";

/// For a model that has lost what it knew.
const LEARN: &str = "optimizer.lr=1e-3";

fn step(kind: &str, keys: &[(&str, &str)]) -> String {
    let keys: String = keys.iter().map(|(key, value)| format!("{key} = '{value}'\n")).collect();
    format!("[[steps]]\nkind = '{kind}'\n{keys}")
}

fn quantize(format: &str, method: &str) -> String {
    step("quantize", &[("format", format), ("method", method)])
}

fn prune(method: &str, sparsity: &str) -> String {
    step("prune", &[("method", method), ("sparsity", sparsity)])
}

/// Training, with more values of the recipe.
fn tune(kind: &str, more: &[&str]) -> String {
    let more: String = more.iter().map(|value| format!(", '{value}'")).collect();
    format!("[[steps]]\nkind = '{kind}'\n{TUNE}{more}]\n")
}

fn groups() -> Vec<Group> {
    let half = "[[steps]]\nkind = 'shrink'\nlayers = 3\n";
    let mixed = format!("{}budget = {{ bits_per_weight = 4.0 }}\n", quantize("int4", "gptq"));
    vec![
        Group {
            title: "8 bits",
            rows: vec![
                ("int8, a scale for the tensor", quantize("int8", "nearest")),
                ("int8, a scale for each output", quantize("int8-channel", "nearest")),
                ("int8, SmoothQuant", quantize("int8-channel", "smoothquant")),
                ("fp8", quantize("fp8", "nearest")),
            ],
        },
        Group {
            title: "4 bits in groups of 64",
            rows: vec![
                ("int4, nearest", quantize("int4", "nearest")),
                ("int4, ranges of least squares", quantize("int4", "mse")),
                ("int4, AWQ", quantize("int4", "awq")),
                ("int4, GPTQ", quantize("int4", "gptq")),
                ("nf4, nearest", quantize("nf4", "nearest")),
                ("nf4, GPTQ", quantize("nf4", "gptq")),
            ],
        },
        Group {
            title: "3 and 2 bits in groups of 64",
            rows: vec![
                ("4 bits on average, GPTQ", mixed),
                ("int3, nearest", quantize("int3", "nearest")),
                ("int3, AWQ", quantize("int3", "awq")),
                ("int3, GPTQ", quantize("int3", "gptq")),
                ("int2, nearest", quantize("int2", "nearest")),
                ("int2, GPTQ", quantize("int2", "gptq")),
            ],
        },
        Group {
            title: "Half of the weights zero",
            rows: vec![
                ("magnitude", prune("magnitude", "0.5")),
                ("magnitude, global", prune("global_magnitude", "0.5")),
                ("Wanda", prune("wanda", "0.5")),
                ("SparseGPT", prune("sparse_gpt", "0.5")),
                ("magnitude 2:4", prune("magnitude", "2:4")),
                ("Wanda 2:4", prune("wanda", "2:4")),
                ("SparseGPT 2:4", prune("sparse_gpt", "2:4")),
                ("magnitude 4:8", prune("magnitude", "4:8")),
                ("Wanda 4:8", prune("wanda", "4:8")),
                ("SparseGPT 4:8", prune("sparse_gpt", "4:8")),
            ],
        },
        Group {
            title: "With 120 more steps of training",
            rows: vec![
                ("f32, as it is", tune("train", &[])),
                (
                    "int4, trained for it (LSQ)",
                    tune("train", &["qat.bits=4", "qat.group=64", "qat.method=lsq"])
                        + &quantize("int4-g64-sym", "nearest"),
                ),
                (
                    "int2, trained for it (LSQ)",
                    tune("train", &["qat.bits=2", "qat.group=64", "qat.method=lsq"])
                        + &quantize("int2-g64-sym", "nearest"),
                ),
                ("SparseGPT 2:4, recovered", prune("sparse_gpt", "2:4") + &tune("train", &["prune.keep_zeros=true"])),
                ("3 of 6 layers, trained alone", half.to_owned() + &tune("train", &[LEARN])),
                (
                    "3 of 6 layers, distilled",
                    half.to_owned() + &tune("distill", &[LEARN, "distill.alpha=0.1", "distill.temperature=1.0"]),
                ),
                (
                    "pairs of layers share",
                    "[[steps]]\nkind = 'share'\nlayers_per_block = 2\n".to_owned() + &tune("train", &[LEARN]),
                ),
                (
                    "all layers share",
                    "[[steps]]\nkind = 'share'\nlayers_per_block = 6\n".to_owned() + &tune("train", &[LEARN]),
                ),
            ],
        },
    ]
}

/// What came of a model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    group: String,
    name: String,
    row: Row,
}

/// The results.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    model: String,
    start: Row,
    outcomes: Vec<Outcome>,
}

/// Runs all, or what is left of it, in `folder`, from the model in `model` or one that is trained there.
///
/// # Errors
/// [`Error::Train`].
pub fn run(model: Option<&Path>, data: &[String], folder: &Path, quick: bool) -> Result<Report> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let own = folder.join("model");
    let start = match model {
        Some(path) => path.to_path_buf(),
        None => {
            train(&own, data, folder, quick)?;
            own
        }
    };
    let device = Backend::NdArray.device()?;
    let loaded = load(&start, &device)?;
    let tokenizer = folder.join("tokenizer.json");
    // PANIC: models that Firebox trains have one.
    loaded.tokenizer.expect("a tokenizer").save(&tokenizer).map_err(TrainError::from)?;
    let dataset = dataset(&tokenizer.display().to_string(), data, folder)?;
    let description = describe(&loaded.model);
    let (mut first, mut outcomes) = (None, vec![]);
    for group in groups() {
        for (name, steps) in &group.rows {
            eprintln!("    {}: {name}", group.title);
            let settings = if quick {
                "[calibration]\nrows = 8\n[eval]\nmax_batches = 2\nspeed_tokens = 0\n"
            } else {
                "[calibration]\nrows = 64\n[eval]\nmax_batches = 32\nspeed_tokens = 0\n"
            };
            let recipe = CompressRecipe::parse(name, &format!("{steps}{settings}"), &[]).map_err(TrainError::from)?;
            let out = folder.join(slug(name));
            let rows =
                Pipeline::open(recipe, &start, &out, &dataset, &device)?.run(&mut |_| {}, &AtomicBool::new(false))?;
            first.get_or_insert_with(|| rows[0].clone());
            outcomes.extend(rows.last().map(|row| Outcome {
                group: group.title.into(),
                name: (*name).to_owned(),
                row: row.clone(),
            }));
        }
    }
    // PANIC: there are groups with rows, and each pipeline measures where it starts.
    Ok(Report { model: description, start: first.expect("a first row"), outcomes })
}

fn describe(model: &firebox_models::transformer::Transformer) -> String {
    let c = model.config();
    format!(
        "A decoder of {:.1}M parameters ({} layers, width {}, context {}, {} tokens)",
        c.num_params() as f64 / 1e6,
        c.n_layers,
        c.d_model,
        c.context,
        c.vocab_size
    )
}

fn slug(name: &str) -> String {
    let kept = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    kept.collect::<String>().split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

fn dataset(tokenizer: &str, data: &[String], folder: &Path) -> Result<Dataset> {
    // Enough for the steps; each run ends with an evaluation on all that is held out.
    let max_bytes = Some(8 << 20);
    let config = DataConfig { tokenizer: tokenizer.into(), vocab_size: 2048, max_bytes, ..DataConfig::default() };
    let found = prepare(&config, &[Source::new(data.to_vec())], &folder.join("cache"), &mut |_| {});
    Ok(found.map_err(TrainError::from)?)
}

/// The model at the start, and the steps it takes: a quarter of what its size would bear, so that the benchmark ends within the hour.
fn recipe(quick: bool) -> Result<Recipe> {
    let set = if quick {
        [
            "model.d_model=64",
            "model.n_heads=2",
            "model.head_dim=32",
            "model.d_ff=128",
            "model.n_layers=2",
            "train.steps=20",
        ]
        .map(String::from)
        .to_vec()
    } else {
        vec!["train.steps=500".into()]
    };
    let mut set: Vec<String> = set;
    set.extend(
        [
            "train.batch_rows=16",
            "train.micro_batch_rows=8",
            "data.vocab_size=2048",
            "schedule={ kind = \"wsd\", warmup_steps = 10, decay_fraction = 0.4 }",
            "eval.sample_tokens=0",
            "eval.every=0",
            "checkpoint.every=50",
        ]
        .map(String::from),
    );
    Ok(Recipe::depth(6).with(&set).map_err(TrainError::from)?)
}

fn train(run: &Path, data: &[String], folder: &Path, quick: bool) -> Result<()> {
    let device = Backend::NdArray.device()?;
    let (recipe, dataset) = (recipe(quick)?, dataset("bpe", data, folder)?);
    let found = firebox_train::checkpoint::find_latest(run.join("checkpoints")).ok().map(|found| found.checkpoint);
    let mut trainer = match &found {
        Some(checkpoint) => Trainer::open(recipe, run, &dataset, &device, checkpoint)?,
        None => Trainer::new(recipe, run, &dataset, &device, None)?,
    };
    if let Some(checkpoint) = &found {
        trainer.restore(checkpoint)?;
    }
    let info = trainer.info("ndarray", rayon::current_num_threads(), data.join(", "));
    trainer.run(&info, &mut Observers::standard(), &AtomicBool::new(false))?;
    Ok(())
}

impl Report {
    /// The tables, in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "{}, perplexity {:.4} on held-out text in f32 ({:.1} MB).\n",
            self.model,
            self.start.measured.perplexity,
            self.start.measured.bytes as f64 / 1e6
        );
        for group in groups() {
            let mut table = Table::new(["", "perplexity", "change", "MB", "bits a weight", "parameters", "zeros"]);
            for outcome in self.outcomes.iter().filter(|outcome| outcome.group == group.title) {
                let m = &outcome.row.measured;
                table.row([
                    outcome.name.clone(),
                    format!("{:.4}", m.perplexity),
                    format!("{:+.2} %", 100.0 * (m.perplexity / self.start.measured.perplexity - 1.0)),
                    format!("{:.2}", m.bytes as f64 / 1e6),
                    format!("{:.2}", m.bits_per_weight),
                    format!("{:.2}M", m.parameters as f64 / 1e6),
                    format!("{:.0} %", 100.0 * m.sparsity),
                ]);
            }
            text.push_str(&format!("\n**{}**\n\n{table}", group.title));
        }
        text
    }

    /// The picture: perplexity by size.
    ///
    /// # Errors
    /// [`Error::Draw`].
    pub fn picture(&self) -> Result<String> {
        let size = |row: &Row| row.measured.bytes as f64 / 1e6;
        let mut points = vec![(size(&self.start), self.start.measured.perplexity, "f32".to_owned())];
        // Zeros that are stored as floats take as much room: those models have no place here.
        let stored = |m: &firebox_train::compress::measure::Measured| m.bits_per_weight < 31.0 || m.sparsity < 0.4;
        let shown = self.outcomes.iter().filter(|outcome| stored(&outcome.row.measured));
        points.extend(shown.map(|o| (size(&o.row), o.row.measured.perplexity, o.name.clone())));
        picture(&points).map_err(|error| Error::Draw { plot: "compress".into(), reason: error.to_string() })
    }
}
