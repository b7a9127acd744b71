//! `bench compress`: what each method makes of one trained model.
//!
//! Every row is a pipeline of `firebox compress` from the same model, in a folder of its own: run again, what is there is not done again.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use firebox_data::{DataConfig, Dataset, Source, prepare};
use firebox_tensor::device::Backend;
use firebox_train::compress::pipeline::{Pipeline, Row};
use firebox_train::compress::recipe::CompressRecipe;
use firebox_train::compress::report::picture;
use firebox_train::model_io::load;
use firebox_train::observe::Observers;
use firebox_train::{Recipe, Trainer};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::table::Table;

/// A table of the results: what it shows, and its rows: name, and steps as TOML.
struct Group {
    title: &'static str,
    rows: &'static [(&'static str, &'static str)],
}

/// Rows that begin with the training of a model of their own, from nothing: name, values of the recipe.
const GROUPS: [Group; 5] = [
    Group {
        title: "Quantization, 8 bits",
        rows: &[
            ("int8, a scale for the tensor", "kind = 'quantize'\nformat = 'int8'\nmethod = 'nearest'"),
            ("int8, a scale for each output", "kind = 'quantize'\nformat = 'int8-channel'\nmethod = 'nearest'"),
            ("int8, SmoothQuant", "kind = 'quantize'\nformat = 'int8-channel'\nmethod = 'smoothquant'"),
            ("fp8", "kind = 'quantize'\nformat = 'fp8'\nmethod = 'nearest'"),
        ],
    },
    Group {
        title: "Quantization, 4 bits in groups of 64",
        rows: &[
            ("int4, nearest", "kind = 'quantize'\nformat = 'int4'\nmethod = 'nearest'"),
            ("int4, least squares ranges", "kind = 'quantize'\nformat = 'int4'\nmethod = 'mse'"),
            ("int4, AWQ", "kind = 'quantize'\nformat = 'int4'\nmethod = 'awq'"),
            ("int4, GPTQ", "kind = 'quantize'\nformat = 'int4'\nmethod = 'gptq'"),
            ("nf4, nearest", "kind = 'quantize'\nformat = 'nf4'\nmethod = 'nearest'"),
        ],
    },
    Group {
        title: "Quantization, 3 and 2 bits in groups of 64",
        rows: &[
            ("int3, nearest", "kind = 'quantize'\nformat = 'int3'\nmethod = 'nearest'"),
            ("int3, AWQ", "kind = 'quantize'\nformat = 'int3'\nmethod = 'awq'"),
            ("int3, GPTQ", "kind = 'quantize'\nformat = 'int3'\nmethod = 'gptq'"),
            (
                "4 bits on average, GPTQ",
                "kind = 'quantize'\nformat = 'int4'\nmethod = 'gptq'\nbudget = { bits_per_weight = 4.0 }",
            ),
            ("int2, nearest", "kind = 'quantize'\nformat = 'int2'\nmethod = 'nearest'"),
            ("int2, GPTQ", "kind = 'quantize'\nformat = 'int2'\nmethod = 'gptq'"),
        ],
    },
    Group {
        title: "Pruning, half of the weights",
        rows: &[
            ("magnitude", "kind = 'prune'\nmethod = 'magnitude'\nsparsity = 0.5"),
            ("magnitude, global", "kind = 'prune'\nmethod = 'global_magnitude'\nsparsity = 0.5"),
            ("Wanda", "kind = 'prune'\nmethod = 'wanda'\nsparsity = 0.5"),
            ("SparseGPT", "kind = 'prune'\nmethod = 'sparse_gpt'\nsparsity = 0.5"),
            ("magnitude 2:4", "kind = 'prune'\nmethod = 'magnitude'\nsparsity = '2:4'"),
            ("Wanda 2:4", "kind = 'prune'\nmethod = 'wanda'\nsparsity = '2:4'"),
            ("SparseGPT 2:4", "kind = 'prune'\nmethod = 'sparse_gpt'\nsparsity = '2:4'"),
            ("SparseGPT 4:8", "kind = 'prune'\nmethod = 'sparse_gpt'\nsparsity = '4:8'"),
        ],
    },
    Group {
        title: "Structures removed",
        rows: &[],
    },
];

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
    loaded.tokenizer.expect("a tokenizer").save(&tokenizer).map_err(firebox_train::TrainError::from)?;
    let dataset = dataset(&tokenizer.display().to_string(), data, folder)?;
    let description = describe(&loaded.model);
    let (mut first, mut outcomes) = (None, vec![]);
    for group in &GROUPS {
        for (name, steps) in group.rows {
            eprintln!("    {}: {name}", group.title);
            let settings = if quick {
                "[calibration]\nrows = 8\n[eval]\nmax_batches = 2\nspeed_tokens = 0\n"
            } else {
                "[calibration]\nrows = 64\n[eval]\nmax_batches = 32\nspeed_tokens = 64\n"
            };
            let recipe = CompressRecipe::parse(name, &format!("{settings}[[steps]]\n{steps}\n"), &[])?;
            let out = folder.join(slug(name));
            let rows = Pipeline::open(recipe, &start, &out, &dataset, &device)?
                .run(&mut |_| {}, &AtomicBool::new(false))?;
            first.get_or_insert_with(|| rows[0].clone());
            outcomes.extend(rows.last().map(|row| Outcome {
                group: group.title.into(),
                name: (*name).into(),
                row: row.clone(),
            }));
        }
    }
    // PANIC: there are groups with rows, and each pipeline measures where it starts.
    Ok(Report { model: description, start: first.expect("a first row"), outcomes })
}

fn describe(model: &firebox_models::decoder::Decoder) -> String {
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
    let config = DataConfig { tokenizer: tokenizer.into(), vocab_size: 2048, ..DataConfig::default() };
    let found = prepare(&config, &[Source::new(data.to_vec())], &folder.join("cache"), &mut |_| {});
    Ok(found.map_err(firebox_train::TrainError::from)?)
}

/// The model at the start, and the steps it takes: a quarter of what its size would bear, so that the benchmark ends within the hour.
fn recipe(quick: bool) -> Result<Recipe> {
    let set = if quick {
        ["model.d_model=64", "model.n_heads=2", "model.head_dim=32", "model.d_ff=128", "model.n_layers=2", "train.steps=20"]
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
    Ok(Recipe::depth(6).with(&set)?)
}

fn train(run: &PathBuf, data: &[String], folder: &Path, quick: bool) -> Result<()> {
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
            "{}, perplexity {:.4} on held-out text in f32 ({:.1} MB, {:.0} tokens/s).\n",
            self.model,
            self.start.measured.perplexity,
            self.start.measured.bytes as f64 / 1e6,
            self.start.measured.tokens_per_s
        );
        for group in GROUPS.iter().filter(|group| !group.rows.is_empty()) {
            let mut table = Table::new(["", "perplexity", "change", "MB", "bits a weight", "parameters", "zeros", "tokens/s"]);
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
                    format!("{:.0}", m.tokens_per_s),
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
        // What is zero takes as much room: those have no place here.
        let shown = self.outcomes.iter().filter(|outcome| outcome.row.measured.sparsity < 0.4);
        points.extend(shown.map(|o| (size(&o.row), o.row.measured.perplexity, o.name.clone())));
        picture(&points).map_err(|error| Error::Draw { plot: "compress".into(), reason: error.to_string() })
    }
}
