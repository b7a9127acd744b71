//! `firebox eval`: how well a checkpoint does.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use firebox::data::{DataConfig, Source, Tokenizer, ValBatches, read_records};
use firebox::models::transformer::{Head, Transformer};
use firebox::train::TrainError;
use firebox::train::evaluate::choices::{Choice, Form, Question, log_likelihoods, score, with_shots};
use firebox::train::evaluate::{Evaluation, OfRows, Scorer, evaluate, head_of, on_rows};
use firebox::train::task::images::{on_images, takes_images};
use serde_json::{Value, json};

use super::text::ModelArgs;
use super::{CliError, prepare};

#[derive(Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text, or .jsonl or .parquet rows of questions, or with labels, where the checkpoint has a head for them: file, folder or glob; may be given several times.
    #[arg(long = "data", value_name = "PATH", required = true)]
    data: Vec<String>,
    /// What the rows are; found out from the first one of a .jsonl file, if not given.
    #[arg(long)]
    task: Option<EvalTask>,
    /// Of questions: examples that are shown with their answers before each one.
    #[arg(long, value_name = "K", default_value_t = 0)]
    shots: usize,
    /// Rows from which examples are taken, the first ones; those of --data, if not given.
    #[arg(long, value_name = "PATH")]
    shots_from: Vec<String>,
    /// Of rows with labels: which fields hold what, as task.text=sentence; as in the checkpoint's run, if not given.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Field of .jsonl lines or column of .parquet files that holds the text.
    #[arg(long, default_value = "text")]
    text_field: String,
    /// Let rows of tokens cross documents.
    #[arg(long)]
    join_documents: bool,
    /// Rows evaluated at once.
    #[arg(long, default_value_t = 8)]
    rows: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write the JSON to a file as well, with what was found for each question.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EvalTask {
    /// Loss, perplexity and bits per byte of text.
    Text,
    /// Multiple choice in HellaSwag's form: ctx_a, ctx_b, activity_label, endings, label.
    Hellaswag,
    /// Multiple choice in ARC's form: question, choices, answerKey.
    Arc,
    /// Multiple choice: context or query, choices, gold or answer.
    Choices,
}

impl EvalTask {
    fn form(self) -> Option<Form> {
        match self {
            Self::Text => None,
            Self::Hellaswag => Some(Form::Hellaswag),
            Self::Arc => Some(Form::Arc),
            Self::Choices => Some(Form::Choices),
        }
    }
}

pub fn run(args: EvalArgs) -> Result<(), CliError> {
    let path = args.model.path();
    let images = takes_images(path);
    let head = if images { Head::Hidden } else { head_of(path)? };
    let form = match args.task {
        Some(task) => task.form(),
        None => args.data.first().and_then(|path| form_of(Path::new(path), &args.text_field)),
    };
    let found = match (head, form) {
        (Head::Language, Some(form)) => multiple_choice(&args, form)?,
        (Head::Language, None) => text(&args)?,
        (_, Some(_)) if args.task.is_some() => {
            let expected = "a model that predicts the next token".into();
            return Err(TrainError::Input { what: "checkpoint", expected, got: format!("one with {head:?}") }.into());
        }
        _ => {
            let on = if images { on_images } else { on_rows };
            labelled(on(path, &args.data, &args.set, args.rows.max(1), &args.model.device()?)?)
        }
    };
    if let Some(path) = &args.out {
        let io = |source| TrainError::Io { operation: "write", path: path.clone(), source };
        let aside = path.with_extension("tmp");
        std::fs::write(&aside, format!("{:#}\n", found.all))
            .and_then(|()| std::fs::rename(&aside, path))
            .map_err(io)?;
    }
    if args.json {
        println!("{:#}", found.json);
    } else {
        print!("{}", table(&found.table));
    }
    Ok(())
}

/// What an evaluation found.
struct Found {
    json: Value,
    /// With what was found for each row.
    all: Value,
    table: Vec<Vec<String>>,
}

/// The form of a .jsonl file's first row, if that is a question.
fn form_of(path: &Path, text_field: &str) -> Option<Form> {
    /// Of a first line; what is longer is no question.
    const MOST: u64 = 1 << 20;
    if path.extension()? != "jsonl" {
        return None;
    }
    let mut lines = BufReader::new(File::open(path).ok()?.take(MOST)).lines();
    let line = lines.find(|line| line.as_ref().map_or(true, |line| !line.trim().is_empty()))?.ok()?;
    let fields: serde_json::Map<String, Value> = serde_json::from_str(&line).ok()?;
    if fields.contains_key(text_field) { None } else { Form::of(&fields) }
}

/// Columns as wide as what stands in them: the first to the left, others to the right.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (i, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // PANIC: text takes whatever is written.
            if i == 0 { write!(line, "{cell:width$}") } else { write!(line, "  {cell:>width$}") }.expect("a text");
        }
        out += line.trim_end();
        out.push('\n');
    }
    out
}

fn cells<const N: usize>(row: [&str; N]) -> Vec<String> {
    row.map(str::to_owned).to_vec()
}

fn multiple_choice(args: &EvalArgs, form: Form) -> Result<Found, CliError> {
    let read = |paths: &[String]| -> Result<Vec<Question>, CliError> {
        let rows = read_records(paths)?;
        Ok(rows.iter().map(|row| form.question(row)).collect::<Result<_, _>>()?)
    };
    let asked = read(&args.data)?;
    let questions = match (args.shots, &args.shots_from[..]) {
        (0, _) => asked,
        (shots, []) => with_shots(&asked, &asked, shots)?,
        (shots, from) => with_shots(&asked, &read(from)?, shots)?,
    };
    let scorer = Scorer::open(args.model.path(), &args.model.device()?)?;
    let found = log_likelihoods(&scorer, &questions)?;
    let scores = score(&questions, &found);
    let mut json = json!({ "task": form.name(), "shots": args.shots });
    merge(&mut json, json!(scores));
    let row = |(question, found): (&Question, &Vec<f64>)| {
        let Choice { likely, likely_norm } = Choice::of(question, found);
        json!({ "gold": question.gold, "likely": likely, "likely_norm": likely_norm, "log_likelihoods": found })
    };
    let mut all = json.clone();
    all["questions"] = questions.iter().zip(&found).map(row).collect();
    let error = |error: Option<f64>| error.map_or_else(|| "-".to_owned(), |error| format!("{error:.4}"));
    let line = |name: &str, value: f64, stderr| {
        let rows = scores.rows.to_string();
        cells([form.name(), &args.shots.to_string(), &rows, name, &format!("{value:.4}"), &error(stderr)])
    };
    let table = vec![
        cells(["task", "shots", "rows", "score", "value", "stderr"]),
        line("acc", scores.acc, scores.acc_stderr),
        line("acc_norm", scores.acc_norm, scores.acc_norm_stderr),
    ];
    Ok(Found { json, all, table })
}

/// Rows with labels, or images, of checkpoints that have a head for them.
fn labelled(OfRows { task, rows, evaluation, metrics }: OfRows) -> Found {
    let mut json = json!({ "task": task, "rows": rows, "loss": evaluation.loss });
    merge(&mut json, metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect());
    let line = |name: &str, value: f64| cells([task, &rows.to_string(), name, &format!("{value:.4}")]);
    let mut table = vec![cells(["task", "rows", "score", "value"]), line("loss", evaluation.loss)];
    table.extend(metrics.iter().map(|(name, value)| line(name, *value)));
    Found { all: json.clone(), json, table }
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn text(args: &EvalArgs) -> Result<Found, CliError> {
    if args.shots > 0 {
        let expected = "0 of text: examples are shown before questions".into();
        return Err(TrainError::Input { what: "--shots", expected, got: args.shots.to_string() }.into());
    }
    let (model, tokenizer) = args.model.load_with_tokenizer()?;
    let found = evaluated(args, &model, &tokenizer)?;
    let mut json = json!({ "task": "text", "perplexity": found.loss.exp() });
    merge(&mut json, json!(found));
    let table = vec![
        cells(["loss", &format!("{:.4}", found.loss), "nats per token"]),
        cells(["perplexity", &format!("{:.3}", found.loss.exp()), ""]),
        cells(["bits/byte", &format!("{:.4}", found.bpb), ""]),
        cells(["tokens", &found.tokens.to_string(), ""]),
        cells(["bytes", &found.bytes.to_string(), ""]),
    ];
    Ok(Found { all: json.clone(), json, table })
}

fn evaluated(args: &EvalArgs, model: &Transformer, tokenizer: &Tokenizer) -> Result<Evaluation, CliError> {
    let scratch = Scratch::new()?;
    let tokenizer_path = scratch.0.join("tokenizer.json");
    tokenizer.save(&tokenizer_path)?;
    let config = DataConfig {
        tokenizer: tokenizer_path.display().to_string(),
        // Everything is evaluated, as it is.
        val_fraction: 0.0,
        dedup: false,
        isolate_documents: !args.join_documents,
        text_field: args.text_field.clone(),
        ..DataConfig::default()
    };
    let dataset = prepare::tokens(&config, &[Source::new(args.data.clone())], &scratch.0)?;
    let context = model.config().context;
    let batches = dataset
        .train
        .iter()
        .flat_map(|stream| ValBatches::new(stream.clone(), context, args.rows.max(1), config.isolate_documents));
    Ok(evaluate(model, batches, &tokenizer.token_bytes()))
}

/// A folder that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, CliError> {
        let dir = std::env::temp_dir().join(format!("firebox-eval-{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(|source| TrainError::Io {
            operation: "create",
            path: dir.clone(),
            source,
        })?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
