//! Prepared text of which parts are hidden, to be predicted: single tokens from those around them (`masked`), or spans after the text (`spans`).
//!
//! A masked row is `[CLS]`, a window of the text, `[SEP]`. As RoBERTa's full sentences (Liu et al., arXiv:1907.11692, section 4.2), a window may go over the end of a document, where the
//! tokenizer's separator stands; with `data.isolate_documents`, tokens see their own document alone. There is no second sentence. What is hidden is drawn anew each time a row is read, by the number
//! of the sample; of held-out rows it is always the same.

mod masks;
mod spans;

use std::sync::Arc;

use firebox_data::{Batch, Dataset, IGNORE_INDEX, Loader, Tokenizer};
use firebox_models::TokenBatch;
use firebox_models::transformer::{Head, Transformer, TransformerConfig};
use firebox_tensor::random::{Counter, Purpose};
use serde_json::json;

use super::{HeldOut, Task, TaskRecipe};
use crate::TrainError;
use crate::recipe::Recipe;
pub use masks::MaskedRecipe;
use masks::{AROUND, Masking};
use spans::Corruption;
pub use spans::SpansRecipe;

/// Rows of a prepared corpus of which parts are hidden: the task `masked` or `spans`.
#[derive(Debug, Clone)]
pub struct Hidden(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dataset: Dataset,
    loader: Loader,
    tokenizer: Tokenizer,
    how: How,
    /// Of a row.
    tokens: usize,
    seed: u64,
}

#[derive(Debug)]
enum How {
    Masks(Masking),
    Spans(Corruption),
}

impl Hidden {
    /// The task of a recipe, whose model's head is of no account. A tokenizer without what stands for hidden text gets it.
    ///
    /// # Errors
    /// [`TrainError`]: another task, an impossible share or shape, rows without room for text, or a corpus shorter than one.
    pub fn new(recipe: &Recipe, dataset: Dataset) -> Result<Self, TrainError> {
        let (how, tokenizer) = match &recipe.task {
            TaskRecipe::Masked(task) => {
                let tokenizer = match dataset.tokenizer.mask_tokens() {
                    Some(_) => Tokenizer::from_json(dataset.tokenizer.json().to_owned())?,
                    None => dataset.tokenizer.with_mask_tokens()?,
                };
                (How::Masks(Masking::new(task, &tokenizer)?), tokenizer)
            }
            TaskRecipe::Spans(task) => {
                let (how, tokenizer) = Corruption::new(task, &dataset.tokenizer)?;
                (How::Spans(how), tokenizer)
            }
            other => {
                let expected = "masked or spans".to_owned();
                return Err(TrainError::Input { what: "task.kind", expected, got: format!("{other:?}") });
            }
        };
        let head = how.head();
        let config = TransformerConfig { head, labels: vec![], ..recipe.model.resolve(tokenizer.vocab_size())? };
        config.validate()?;
        if config.vocab_size < tokenizer.vocab_size() {
            let expected =
                format!("at least the tokenizer's {} tokens, those for hidden text among them", tokenizer.vocab_size());
            return Err(TrainError::Input { what: "model.vocab_size", expected, got: config.vocab_size.to_string() });
        }
        let tokens = recipe.train.row_tokens(config.context);
        let divided = match how {
            How::Masks(how) => tokens.checked_sub(AROUND).filter(|&n| n > 0).map(|text| (How::Masks(how), text)),
            How::Spans(how) => how.for_rows(tokens).map(|(how, text)| (How::Spans(how), text)),
        };
        let Some((how, text)) = divided else {
            let expected = "room for text beside what stands for hidden text".to_owned();
            return Err(TrainError::Input { what: "train.row_tokens", expected, got: tokens.to_string() });
        };
        let loader = dataset.train_loader(text, recipe.seed)?;
        Ok(Self(Arc::new(Inner { dataset, loader, tokenizer, how, tokens, seed: recipe.seed })))
    }

    /// The head that a model needs for it.
    pub fn head(&self) -> Head {
        self.0.how.head()
    }
}

impl How {
    fn head(&self) -> Head {
        match self {
            Self::Masks(_) => Head::Masked,
            Self::Spans(_) => Head::Language,
        }
    }
}

/// Tokens of text in a row, before what fills it up.
fn text_tokens(text: &Batch, row: usize) -> usize {
    let targets = &text.targets[row * text.context..(row + 1) * text.context];
    targets.iter().filter(|&&target| target != IGNORE_INDEX).count()
}

fn count(batch: &TokenBatch) -> usize {
    batch.targets.iter().filter(|&&target| target >= 0).count()
}

impl Inner {
    /// Rows, the first of which is sample number `first`.
    fn training(&self, first: u64, rows: usize) -> TokenBatch {
        self.rows(&self.loader.batch(first, rows), |row| Counter::new(self.seed, Purpose::Masking, first + row as u64))
    }

    fn rows(&self, text: &Batch, counter: impl Fn(usize) -> Counter) -> TokenBatch {
        match &self.how {
            How::Masks(how) => how.rows(text, counter),
            How::Spans(how) => how.rows(text, counter),
        }
    }
}

impl Task<Transformer> for Hidden {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let part = |at: usize| self.0.training(first + at as u64, micro_rows.min(rows - at));
        let parts: Vec<TokenBatch> = (0..rows).step_by(micro_rows).map(part).collect();
        let all: usize = parts.iter().map(count).sum();
        let scaled = |batch| TokenBatch { loss_scale: 1.0 / all.max(1) as f64, ..batch };
        Ok(parts.into_iter().map(scaled).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        let mut first = 0;
        Box::new(self.0.dataset.val_batches(self.0.loader.context(), rows).map(move |text| {
            // Whatever the seed of the run.
            let batch = self.0.rows(&text, |row| Counter::new(0, Purpose::HeldOutMasking, first + row as u64));
            first += text.rows as u64;
            let count = count(&batch) as u64;
            HeldOut { batch, count, bytes: 0 }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.dataset.val.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.0.tokens
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.0.tokenizer)
    }

    /// What transformers wants to know of the tokenizer of a masked model.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        if let How::Spans(_) = self.0.how {
            return vec![];
        }
        let name = |names: [&'static str; 2]| names.into_iter().find(|name| self.0.tokenizer.token_id(name).is_some());
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "cls_token": name(["[CLS]", "<s>"]),
            "sep_token": name(["[SEP]", "</s>"]),
            "pad_token": name(["[PAD]", "<pad>"]),
            "mask_token": name(["[MASK]", "<mask>"]),
            "model_max_length": self.0.tokens,
        });
        vec![("tokenizer_config.json".into(), config.to_string().into_bytes())]
    }
}
