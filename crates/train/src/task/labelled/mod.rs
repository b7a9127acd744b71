//! Rows of text with labels: a class per row or per word, numbers, or texts that belong together.
//!
//! A row is one text (or two, with what the tokenizer puts around and between them); those of a micro-batch are padded to the longest. Encoders and causal decoders take the same rows.

mod evaluate;
mod names;
mod recipe;
mod rows;

use std::fmt;
use std::sync::Arc;

use firebox_data::{DataError, IGNORE_INDEX, Order, Record, Tokenizer, hold_out, read_records};
use firebox_models::transformer::hf::Family;
use firebox_models::transformer::{Head, Pool, Pooler, Transformer, TransformerConfig};
use firebox_models::{Extra, TokenBatch};
use firebox_tensor::ops::Sequence;
use serde_json::Value;

use super::{HeldOut, Task, TaskRecipe};
use crate::TrainError;
use crate::recipe::Recipe;
pub(super) use evaluate::largest;
use names::Names;
pub use recipe::{ClassesRecipe, EmbeddingRecipe, TokenClassesRecipe, ValuesRecipe};
use rows::{Reader, Row, Target, Text};

/// Rows to train on, and rows that are held out.
#[derive(Debug, Clone)]
pub struct Records {
    /// Those to train on.
    pub train: Vec<Record>,
    /// Those that are held out.
    pub held_out: Vec<Record>,
}

impl Records {
    /// Of files, folders and globs. Held out are the rows of `val`, or else a `fraction` of the others.
    ///
    /// # Errors
    /// As [`read_records`].
    pub fn read<S: AsRef<str>>(paths: &[S], val: Option<&str>, fraction: f64) -> Result<Self, DataError> {
        let all = read_records(paths)?;
        let (train, held_out) = match val {
            Some(val) => (all, read_records(&[val])?),
            None => hold_out(all, fraction),
        };
        Ok(Self { train, held_out })
    }

    fn all(&self) -> impl Iterator<Item = &Record> {
        self.train.iter().chain(&self.held_out)
    }

    /// All their texts: of fields that hold any, and of lists of words.
    pub fn texts(&self) -> Vec<String> {
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Array(words) => {
                let words: Option<Vec<&str>> = words.iter().map(Value::as_str).collect();
                words.map(|words| words.join(" "))
            }
            _ => None,
        };
        self.train.iter().flat_map(|record| record.fields.values().filter_map(text)).collect()
    }
}

/// What is said of rows.
#[derive(Debug)]
enum Kind {
    Classes(Names),
    TokenClasses(Names),
    Values(usize),
    Embedding,
}

/// A task on rows with labels: `classes`, `token_classes`, `values` or `embedding`.
#[derive(Debug, Clone)]
pub struct Labelled(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    head: Head,
    train: Vec<Row>,
    held_out: Vec<Row>,
    order: Order,
    tokenizer: Tokenizer,
    /// Whether tokens see those after them.
    encoder: bool,
    /// What fills up rows.
    padding: i32,
    /// Rows that are in memory at once.
    micro_rows: usize,
}

impl Labelled {
    /// The task of a recipe, whose model's head is of no account.
    ///
    /// # Errors
    /// [`TrainError::Data`] names the row at fault; [`TrainError::Input`] for another task, or a model with fewer tokens than the tokenizer.
    pub fn new(recipe: &Recipe, records: &Records, tokenizer: Tokenizer) -> Result<Self, TrainError> {
        let config = recipe.model.resolve(tokenizer.vocab_size())?;
        if config.vocab_size < tokenizer.vocab_size() {
            let expected = format!("at least the tokenizer's {} tokens", tokenizer.vocab_size());
            return Err(TrainError::Input { what: "model.vocab_size", expected, got: config.vocab_size.to_string() });
        }
        let types = config.encoder.map_or(0, |encoder| encoder.token_types);
        let reader = Reader { tokenizer: &tokenizer, most: recipe.train.row_tokens(config.context), types };
        let (kind, [train, held_out]) = match &recipe.task {
            TaskRecipe::Classes(task) => reader.classes(task, records)?,
            TaskRecipe::TokenClasses(task) => reader.token_classes(task, records)?,
            TaskRecipe::Values(task) => reader.values(task, records)?,
            TaskRecipe::Embedding(task) => reader.embedding(task, records)?,
            other => {
                let expected = "classes, token_classes, values or embedding".to_owned();
                return Err(TrainError::Input { what: "task.kind", expected, got: format!("{other:?}") });
            }
        };
        let head = head(&kind, &recipe.task, &config);
        TransformerConfig { head, labels: vec![], ..config.clone() }.validate()?;
        let padding = ["[PAD]", "<pad>", "<|pad|>"].iter().find_map(|name| tokenizer.token_id(name));
        Ok(Self(Arc::new(Inner {
            kind,
            head,
            order: Order::new(train.len(), recipe.seed),
            train,
            held_out,
            encoder: config.encoder.is_some(),
            padding: padding.or(tokenizer.eot()).unwrap_or(0) as i32,
            tokenizer,
            micro_rows: recipe.train.micro_rows(),
        })))
    }

    /// The head that a model needs for it.
    pub fn head(&self) -> Head {
        self.0.head
    }

    /// The names of its classes, where they have names.
    pub fn labels(&self) -> Vec<String> {
        match &self.0.kind {
            Kind::Classes(names) | Kind::TokenClasses(names) if names.are_given() => names.all().to_vec(),
            _ => vec![],
        }
    }
}

/// The head of a task: as the recipe says, or the model has it.
fn head(kind: &Kind, task: &TaskRecipe, config: &TransformerConfig) -> Head {
    let usual = match config.head {
        Head::Classes { pooler, .. } | Head::Values { pooler, .. } => pooler,
        _ if config.encoder.is_none() => Pooler::Last,
        _ => Family::pooler(config).unwrap_or(Pooler::Tanh),
    };
    match (kind, task) {
        (Kind::Classes(names), TaskRecipe::Classes(ClassesRecipe { pooler, .. })) => {
            Head::Classes { n: names.all().len(), pooler: pooler.unwrap_or(usual) }
        }
        (Kind::Values(n), TaskRecipe::Values(ValuesRecipe { pooler, .. })) => {
            Head::Values { n: *n, pooler: pooler.unwrap_or(usual) }
        }
        (Kind::Embedding, TaskRecipe::Embedding(EmbeddingRecipe { pool, normalize, temperature, .. })) => {
            let (of_model, normal) = match config.head {
                Head::Embedding { pool, normalize, .. } => (pool, normalize),
                _ => (Pool::Mean, true),
            };
            let (pool, normalize) = (pool.unwrap_or(of_model), normalize.unwrap_or(normal));
            Head::Embedding { pool, normalize, temperature: *temperature }
        }
        (Kind::TokenClasses(names), _) => Head::TokenClasses { n: names.all().len() },
        _ => config.head,
    }
}

impl Inner {
    /// Rows padded to the longest; the loss is a mean over `count`.
    fn batch(&self, rows: &[&Row], count: usize) -> TokenBatch {
        // All rows of a task have as many texts.
        let texts: Vec<&Text> = rows.iter().flat_map(|row| &row.texts).collect();
        let lengths: Vec<usize> = texts.iter().map(|text| text.ids.len()).collect();
        let tokens = lengths.iter().copied().max().unwrap_or(1);
        let (mut inputs, mut token_types) = (Vec::with_capacity(texts.len() * tokens), vec![]);
        for text in &texts {
            inputs.extend_from_slice(&text.ids);
            inputs.resize(inputs.len().next_multiple_of(tokens), self.padding);
            if !text.types.is_empty() {
                token_types.extend_from_slice(&text.types);
                token_types.resize(inputs.len(), 0);
            }
        }
        let mut extra = Extra { token_types, ..Extra::default() };
        let mut targets = vec![IGNORE_INDEX; inputs.len()];
        for (i, row) in rows.iter().enumerate() {
            match &row.target {
                Target::Class(class) => extra.labels.push(*class),
                Target::Values(values) => extra.values.extend_from_slice(values),
                Target::Classes(classes) => targets[i * tokens..][..classes.len()].copy_from_slice(classes),
                Target::Own => {
                    // The candidates of a row stand side by side; the first is its own.
                    extra.labels.push((i * (row.texts.len() - 1)) as i32);
                    extra.labels.extend(std::iter::repeat_n(-1, row.texts.len() - 1));
                }
            }
        }
        let sequence = if self.encoder {
            Sequence::padded(tokens, &lengths)
        } else {
            let segments: Vec<i32> =
                lengths.iter().flat_map(|&n| (0..tokens).map(move |i| i32::from(i >= n))).collect();
            Sequence::new(lengths.len(), tokens, lengths.iter().flat_map(|_| 0..tokens as i32).collect(), &segments)
        };
        let mut batch = TokenBatch::new(inputs, targets, sequence);
        batch.loss_scale = 1.0 / count.max(1) as f64;
        batch.extra = Some(Arc::new(extra));
        batch
    }

    fn held_out_rows(&self, rows: usize) -> impl Iterator<Item = Vec<&Row>> {
        self.held_out.chunks(rows.max(1)).map(|rows| rows.iter().collect())
    }
}

impl Task<Transformer> for Labelled {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let Inner { order, train, kind, .. } = &*self.0;
        let mut rows: Vec<&Row> = (first..first + rows as u64).map(|sample| &train[order.row(sample)]).collect();
        if !matches!(kind, Kind::Embedding) {
            // Rows of like length together have little padding; which loss compares rows must not know their lengths.
            rows.sort_by_key(|row| row.tokens());
        }
        let count = rows.iter().map(|row| row.count()).sum();
        Ok(rows.chunks(micro_rows).map(|rows| self.0.batch(rows, count)).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.0.held_out_rows(rows).map(|rows| {
            let count: usize = rows.iter().map(|row| row.count()).sum();
            HeldOut { batch: self.0.batch(&rows, count), count: count as u64, bytes: 0 }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.held_out.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.0.train.iter().map(Row::tokens).max().unwrap_or(0)
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.0.tokenizer)
    }

    fn metrics(&self, model: &Transformer, limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        Ok(self.0.metrics(model, limit.map_or(usize::MAX, |n| n as usize)))
    }

    fn has_metrics(&self) -> bool {
        true
    }
}

/// What it is made of, in a few words.
impl fmt::Display for Labelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, train, held_out, .. } = &*self.0;
        write!(f, "{} rows, {} held out", train.len(), held_out.len())?;
        match kind {
            Kind::Classes(names) => write!(f, ", {} classes", names.all().len()),
            Kind::TokenClasses(names) => write!(f, ", {} classes of words", names.all().len()),
            Kind::Values(1) => write!(f, ", one number each"),
            Kind::Values(n) => write!(f, ", {n} numbers each"),
            Kind::Embedding => write!(f, " of texts that belong together"),
        }
    }
}
