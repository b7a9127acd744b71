//! `firebox tokenize`, and text to dataset for the other commands.

use std::path::{Path, PathBuf};

use clap::Args;
use firebox::corpus::rust_sources;
use firebox::data::{DataConfig, DataError, Dataset, Progress, Source, prepare};
use firebox::train::Recipe;
use indicatif::{ProgressBar, ProgressStyle};

use super::CliError;

/// Text and where its tokens are kept.
#[derive(Args)]
pub struct DataArgs {
    /// File, folder or glob of .txt, .md, .rs, .jsonl, .jsonl.zst, .jsonl.gz or .parquet; may be given several times. Default: the Rust source of
    /// Firebox's own dependencies.
    #[arg(long = "data", value_name = "PATH")]
    data: Vec<String>,
    /// Where token shards are cached.
    #[arg(long, value_name = "DIR", env = "FIREBOX_CACHE")]
    cache: Option<PathBuf>,
}

#[derive(Args)]
pub struct TokenizeArgs {
    /// Recipe whose `data` table is used.
    #[arg(default_value = "default")]
    recipe: String,
    #[command(flatten)]
    data: DataArgs,
    /// Value of the recipe, such as data.vocab_size=8192.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub fn run(args: TokenizeArgs) -> Result<(), CliError> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let (dataset, described) = args.data.dataset(&recipe.data, &recipe.sources)?;
    println!("{described}");
    println!("{}", dataset.stats);
    println!("tokens: {}", dataset.dir.display());
    Ok(())
}

impl DataArgs {
    /// The prepared corpus and what it is in a few words.
    pub fn dataset(&self, config: &DataConfig, recipe_sources: &[Source]) -> Result<(Dataset, String), CliError> {
        let (sources, what) = if !self.data.is_empty() {
            (vec![Source::new(self.data.clone())], self.data.join(", "))
        } else if !recipe_sources.is_empty() {
            let paths: Vec<String> = recipe_sources.iter().flat_map(|s| s.paths.clone()).collect();
            (recipe_sources.to_vec(), paths.join(", "))
        } else {
            let here = std::env::current_dir().map_err(CliError::Output)?;
            let source = rust_sources(&here)?;
            let what = format!("Rust source of {} packages that Firebox depends on", source.paths.len());
            (vec![source], what)
        };
        let dataset = tokens(config, &sources, &self.cache_dir())?;
        let described = format!("{what}: {}", megabytes(dataset.stats.bytes));
        Ok((dataset, described))
    }

    /// Files, folders and globs of a task whose data are rows: those given, or else the recipe's.
    pub fn paths(&self, recipe_sources: &[Source]) -> Result<Vec<String>, CliError> {
        let paths = match self.data.is_empty() {
            false => self.data.clone(),
            true => recipe_sources.iter().flat_map(|source| source.paths.clone()).collect(),
        };
        if paths.is_empty() { Err(DataError::NoSources.into()) } else { Ok(paths) }
    }

    fn cache_dir(&self) -> PathBuf {
        if let Some(dir) = &self.cache {
            return dir.clone();
        }
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        base.unwrap_or_else(std::env::temp_dir).join("firebox")
    }
}

/// Runs `prepare` with a line that shows how far it is.
pub fn tokens(config: &DataConfig, sources: &[Source], cache: &Path) -> Result<Dataset, CliError> {
    let bar = ProgressBar::no_length();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
    let mut stage = String::new();
    let dataset = prepare(config, sources, cache, &mut |progress| {
        let (name, line) = describe(&progress);
        bar.set_message(line);
        bar.tick();
        // Without a terminal: one line per stage.
        if bar.is_hidden() && name != stage && super::ranks::speaks() {
            eprintln!("{name}");
        }
        stage = name.to_string();
    })?;
    bar.finish_and_clear();
    Ok(dataset)
}

fn describe(progress: &Progress) -> (&'static str, String) {
    match progress {
        Progress::Hashing { bytes, total } => {
            ("looking at the text", format!("looking at the text: {} of {}", megabytes(*bytes), megabytes(*total)))
        }
        Progress::Cached => ("tokens are in the cache", "tokens are in the cache".into()),
        Progress::Torn { reason } => {
            ("the cache is torn and made again", format!("the cache is torn ({reason}): made again"))
        }
        Progress::Scanning { documents, bytes } => {
            ("reading documents", format!("reading: {documents} documents, {}", megabytes(*bytes)))
        }
        Progress::TrainingTokenizer { bytes, vocab_size } => {
            ("training the tokenizer", format!("training a tokenizer of {vocab_size} tokens on {}", megabytes(*bytes)))
        }
        Progress::Tokenizing { bytes, total, tokens } => {
            ("tokenizing", format!("tokenizing: {} of {}, {tokens} tokens", megabytes(*bytes), megabytes(*total)))
        }
        _ => ("preparing", "preparing".into()),
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
