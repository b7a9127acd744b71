//! Language modelling: the next token of a text.

use firebox_data::{Dataset, Loader, Tokenizer};
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;

use super::{HeldOut, Task};
use crate::TrainError;
use crate::evaluate::token_batch;
use crate::generate::{Sampling, generate};
use crate::recipe::EvalRecipe;
use crate::trainer::prompt_ids;

/// The next token of each token of a prepared corpus.
pub struct Language<'a> {
    dataset: &'a Dataset,
    loader: Loader,
    context: usize,
    token_bytes: Vec<u32>,
    seed: u64,
    eval: EvalRecipe,
}

impl<'a> Language<'a> {
    /// Rows of `context` tokens, in the order of `seed`; `eval` says what the model writes at evaluations.
    ///
    /// # Errors
    /// [`TrainError::Data`]: a corpus shorter than the context, or a prompt with characters that the tokenizer does not have.
    pub fn new(dataset: &'a Dataset, context: usize, seed: u64, eval: &EvalRecipe) -> Result<Self, TrainError> {
        if eval.sample_tokens > 0 {
            prompt_ids(&dataset.tokenizer, eval.prompt.as_bytes())?;
        }
        let (loader, token_bytes) = (dataset.train_loader(context, seed)?, dataset.tokenizer.token_bytes());
        Ok(Self { dataset, loader, context, token_bytes, seed, eval: eval.clone() })
    }
}

impl Task<Transformer> for Language<'_> {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let parts: Vec<_> = (0..rows)
            .step_by(micro_rows)
            .map(|at| self.loader.batch(first + at as u64, micro_rows.min(rows - at)))
            .collect();
        // Each part's loss is scaled by the targets of the whole batch, so that parts add up to the large batch.
        let targets = parts.iter().map(firebox_data::Batch::target_count).sum();
        Ok(parts.into_iter().map(|part| token_batch(part, targets)).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        let batches = self.dataset.val_batches(self.context, rows);
        Box::new(batches.map(|batch| HeldOut::of_tokens(batch, &self.token_bytes)))
    }

    fn has_held_out(&self) -> bool {
        !self.dataset.val.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.context
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.dataset.tokenizer)
    }

    fn sample(&self, model: &Transformer) -> Result<Option<String>, TrainError> {
        let tokenizer = &self.dataset.tokenizer;
        let prompt = prompt_ids(tokenizer, self.eval.prompt.as_bytes())?;
        let sampling = Sampling { seed: self.seed, ..Sampling::default() };
        let eot = tokenizer.eot().map(|id| id as i32);
        let ids = generate(model, &prompt, self.eval.sample_tokens, &sampling, eot, |_| true)?;
        let ids: Vec<u32> = ids.into_iter().filter(|id| Some(*id) != eot).map(|id| id as u32).collect();
        Ok(Some(String::from_utf8_lossy(&tokenizer.decode(&ids)).into_owned()))
    }

    fn has_samples(&self) -> bool {
        self.eval.sample_tokens > 0
    }

    fn language(&self) -> Option<(&Dataset, &Loader)> {
        Some((self.dataset, &self.loader))
    }
}
