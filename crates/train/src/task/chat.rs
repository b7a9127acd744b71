//! Instruction and chat tuning: the model's answers in conversations, or what follows prompts.

use std::fmt;
use std::sync::Arc;

use firebox_data::{Answered, ChatTemplate, Example, Order, Record, Tokenizer, hold_out, read_records};
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use serde::{Deserialize, Serialize};

use super::rows::{Packed, batch, pack, places, room, targets};
use super::{HeldOut, Task};
use crate::TrainError;
use crate::generate::{Sampling, generate};
use crate::recipe::Recipe;
use crate::words::{Ends, Growing, Words};

/// The recipe's `[task]` of kind `chat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChatRecipe {
    /// Of which tokens the loss is.
    pub train_on: TrainOn,
    /// How conversations become text: `model`, by the model's own template, `none`, for rows with `prompt` and `completion` as they are, or a file with a template.
    pub template: String,
    /// Several conversations share a row of `train.row_tokens`, and do not see each other.
    pub packing: bool,
    /// Held-out rows, in place of a share (`data.val_fraction`) of those to train on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
}

impl Default for ChatRecipe {
    fn default() -> Self {
        Self { train_on: TrainOn::Answers, template: "model".into(), packing: true, val: None }
    }
}

/// Of which tokens the loss is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// Those that the model says, with the one that ends each answer.
    Answers,
    /// All.
    All,
}

/// Conversations to learn from. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Conversations(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    words: Words,
    template: Option<ChatTemplate>,
    ends: Ends,
    train: Rows,
    held: Rows,
    order: Order,
    answers_alone: bool,
    token_bytes: Vec<u32>,
    /// Tokens of the longest row.
    longest: usize,
    seed: u64,
    sample_tokens: usize,
}

/// Texts and the rows that they are in.
#[derive(Debug)]
struct Rows {
    texts: Vec<Answered>,
    rows: Vec<Packed>,
}

impl Rows {
    fn texts(&self, row: usize) -> Vec<&Answered> {
        self.rows[row].iter().map(|&text| &self.texts[text as usize]).collect()
    }
}

/// What became of the rows of a file, to print at the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Read {
    /// Texts to train on, and held out.
    pub texts: [usize; 2],
    /// Rows that they fill.
    pub rows: [usize; 2],
    /// Tokens to train on.
    pub tokens: usize,
    /// How many of them are targets.
    pub targets: usize,
    /// Tokens of a row at most.
    pub room: usize,
    /// Texts that are longer.
    pub cut: usize,
    /// Tokens of answers that were lost so.
    pub lost: usize,
    /// Texts of which no token of an answer is left.
    pub dropped: usize,
}

impl fmt::Display for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { texts: [train, held], rows, tokens, targets, room, cut, lost, dropped } = self;
        write!(f, "{train} conversations in {} rows, {tokens} tokens of which {targets} are learned", rows[0])?;
        write!(f, "; {held} held out in {} rows", rows[1])?;
        if *cut > 0 {
            write!(f, "; {cut} were cut at {room} tokens and lost {lost} tokens of answers")?;
        }
        if *dropped > 0 {
            write!(f, "; {dropped} were left out, whose answers begin behind these")?;
        }
        Ok(())
    }
}

impl Conversations {
    /// Those of the rows in `paths`.
    ///
    /// # Errors
    /// [`TrainError`]: a file that cannot be read, a row that is no conversation, a template that objects to one.
    pub fn read(recipe: &Recipe, task: &ChatRecipe, paths: &[String]) -> Result<(Self, Read), TrainError> {
        let words = Words::of_recipe(recipe)?;
        let template = words.template_named(&task.template)?;
        let (room, _) = room(recipe, words.tokenizer.vocab_size())?;
        let (mut read, answers_alone) = (Read { room, ..Read::default() }, task.train_on == TrainOn::Answers);
        let mut tokens = |records: Vec<Record>| -> Result<Vec<Answered>, TrainError> {
            let mut texts = vec![];
            for record in records {
                let example = Example::of_record(&record, template.is_some())?;
                let text = example.tokens(template.as_ref(), &words.tokenizer);
                texts.extend(read.keep(text.map_err(|error| record.bad(error.to_string()))?));
            }
            Ok(texts)
        };
        let records = read_records(paths)?;
        let (train, held) = match &task.val {
            Some(path) => (tokens(records)?, tokens(read_records(&[path])?)?),
            None => hold_out(tokens(records)?, recipe.data.val_fraction),
        };
        if train.is_empty() {
            let expected = format!("conversations with an answer within train.row_tokens = {room} tokens");
            return Err(TrainError::Input { what: "data", expected, got: format!("none in {}", paths.join(", ")) });
        }
        let in_rows = |texts: Vec<Answered>, order: Order| {
            let places = (0..texts.len()).map(|i| order.row(i as u64)).map(|i| (i as u32, places(&texts[i])));
            let rows = if task.packing { pack(places, room) } else { places.map(|(i, _)| vec![i]).collect() };
            Rows { texts, rows }
        };
        let (n, held_n) = (train.len(), held.len());
        let (train, held) = (in_rows(train, Order::new(n, recipe.seed)), in_rows(held, Order::new(held_n, 0)));
        read.texts = [n, held_n];
        read.rows = [train.rows.len(), held.rows.len()];
        read.tokens = train.texts.iter().map(|text| text.ids.len()).sum();
        read.targets = train.texts.iter().map(|text| if answers_alone { text.answers() } else { places(text) }).sum();
        let length = |row: usize| train.texts(row).into_iter().map(places).sum::<usize>();
        let inner = Inner {
            ends: words.ends(template.as_ref())?,
            order: Order::new(train.rows.len(), recipe.seed ^ 1),
            token_bytes: words.tokenizer.token_bytes(),
            longest: (0..train.rows.len()).map(length).max().unwrap_or(1),
            seed: recipe.seed,
            sample_tokens: recipe.eval.sample_tokens,
            words,
            template,
            train,
            held,
            answers_alone,
        };
        Ok((Self(Arc::new(inner)), read))
    }
}

impl Read {
    /// The text, as far as it fits into a row; none where that has nothing to learn.
    fn keep(&mut self, mut text: Answered) -> Option<Answered> {
        if places(&text) > self.room {
            let before = text.answers();
            text.cut(self.room + 1);
            self.cut += 1;
            self.lost += before - text.answers();
        }
        if text.answers() == 0 {
            self.dropped += 1;
            return None;
        }
        Some(text)
    }
}

impl Task<Transformer> for Conversations {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let inner = &self.0;
        let rows: Vec<_> = (first..first + rows as u64).map(|i| inner.train.texts(inner.order.row(i))).collect();
        let mut parts: Vec<_> = rows.chunks(micro_rows.max(1)).map(|rows| batch(rows, inner.answers_alone)).collect();
        // Each part's loss is scaled by the targets of the whole batch, so that parts add up to the large batch.
        let all: usize = parts.iter().map(targets).sum();
        parts.iter_mut().for_each(|part| part.loss_scale = 1.0 / all.max(1) as f64);
        Ok(parts)
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        let (inner, rows) = (&self.0, rows.max(1));
        let held = &inner.held;
        Box::new((0..held.rows.len()).step_by(rows).map(move |first| {
            let last = (first + rows).min(held.rows.len());
            let texts: Vec<_> = (first..last).map(|row| held.texts(row)).collect();
            let batch = batch(&texts, inner.answers_alone);
            let bytes = |&target: &i32| u64::from(inner.token_bytes.get(target as usize).copied().unwrap_or(0));
            let bytes = batch.targets.iter().filter(|&&target| target >= 0).map(bytes).sum();
            HeldOut { count: targets(&batch) as u64, bytes, batch }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.held.rows.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.0.longest
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.0.words.tokenizer)
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.0.words.files(self.0.template.as_ref())
    }

    fn sample(&self, model: &Transformer) -> Result<Option<String>, TrainError> {
        let (inner, tokenizer) = (&self.0, &self.0.words.tokenizer);
        let Some(asked) = inner.held.texts.first() else { return Ok(None) };
        let prompt: Vec<i32> = asked.prompt().iter().map(|&id| id as i32).collect();
        if prompt.is_empty() {
            return Ok(None);
        }
        let sampling = Sampling { temperature: 0.0, seed: inner.seed, ..Sampling::default() };
        let mut growing = Growing::new(tokenizer, &inner.ends);
        generate(model, &prompt, inner.sample_tokens, &sampling, None, |id| growing.push(id).is_some())?;
        let question = tokenizer.decode(asked.prompt());
        Ok(Some(format!("{}\n{}", String::from_utf8_lossy(&question).trim(), growing.finish().0.trim())))
    }

    fn has_samples(&self) -> bool {
        self.0.sample_tokens > 0 && self.has_held_out()
    }
}
