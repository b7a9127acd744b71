//! Loss and bits per byte on held-out text, choices between answers, and what labels say.

pub mod choices;
mod labelled;
mod likelihood;

use firebox_data::Batch;
use firebox_models::transformer::Transformer;
use firebox_models::{Staged, TokenBatch};
use firebox_tensor::ops::Sequence;
use serde::Serialize;

use crate::model_io::to_host;
use crate::task::HeldOut;

pub use labelled::{OfRows, head_of, on_rows};
pub use likelihood::Scorer;

/// What an evaluation found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss per predicted token, nats.
    pub loss: f64,
    /// Bits per byte of text: the total loss in bits over the bytes of the predicted tokens, so that models with different
    /// tokenizers compare. The tokens that end documents cost bits and count no bytes.
    pub bpb: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Bytes of text predicted.
    pub bytes: u64,
}

/// The batch as the model takes it, its loss scaled to be the mean over `targets` targets.
pub fn token_batch(batch: Batch, targets: usize) -> TokenBatch {
    let sequence = Sequence::new(batch.rows, batch.context, batch.positions, &batch.segments);
    let mut tokens = TokenBatch::new(batch.inputs, batch.targets, sequence);
    tokens.loss_scale = 1.0 / targets.max(1) as f64;
    tokens
}

impl HeldOut {
    /// Rows of text; `token_bytes` is the tokenizer's.
    pub fn of_tokens(batch: Batch, token_bytes: &[u32]) -> Self {
        let count = batch.target_count();
        let bytes = if count == 0 { 0 } else { batch.target_bytes(token_bytes) };
        Self { batch: token_batch(batch, count), count: count as u64, bytes }
    }
}

/// Evaluates a model (on a device without gradients) over batches; `token_bytes` is the tokenizer's.
pub fn evaluate(model: &Transformer, batches: impl Iterator<Item = Batch>, token_bytes: &[u32]) -> Evaluation {
    Tally::evaluation(&tallies(model, batches.map(|batch| HeldOut::of_tokens(batch, token_bytes)), |batch| batch))
}

/// What one batch adds to an evaluation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tally {
    nats: f64,
    tokens: u64,
    bytes: u64,
}

/// One for each batch, of which the model is shown what `prepare` makes of it.
pub(crate) fn tallies<M: Staged>(
    model: &M,
    batches: impl Iterator<Item = HeldOut>,
    prepare: impl Fn(TokenBatch) -> TokenBatch,
) -> Vec<Tally> {
    let tally = |held: HeldOut| {
        let tally = Tally::of(&held);
        // One without targets, too: ranks that share the model's parts run the same stages.
        let batch = prepare(held.batch);
        let loss = to_host(model.loss(&batch, None))[0];
        tally.with_loss(f64::from(loss))
    };
    batches.map(tally).collect()
}

impl Tally {
    /// Before the model has seen the batch.
    pub(crate) fn of(held: &HeldOut) -> Self {
        Self { nats: 0.0, tokens: held.count, bytes: held.bytes }
    }

    /// With the batch's mean loss.
    pub(crate) fn with_loss(self, loss: f64) -> Self {
        let nats = if self.tokens == 0 { 0.0 } else { loss * self.tokens as f64 };
        Self { nats, ..self }
    }

    /// All together, added up in their order.
    pub(crate) fn evaluation(tallies: &[Self]) -> Evaluation {
        let nats = tallies.iter().fold(0.0, |sum, tally| sum + tally.nats);
        let tokens: u64 = tallies.iter().map(|tally| tally.tokens).sum();
        let bytes: u64 = tallies.iter().map(|tally| tally.bytes).sum();
        Evaluation {
            loss: nats / tokens.max(1) as f64,
            bpb: if bytes == 0 { 0.0 } else { nats / std::f64::consts::LN_2 / bytes as f64 },
            tokens,
            bytes,
        }
    }
}

/// As three numbers, exact up to 2^53.
impl From<Tally> for [f64; 3] {
    fn from(Tally { nats, tokens, bytes }: Tally) -> Self {
        [nats, tokens as f64, bytes as f64]
    }
}

impl From<[f64; 3]> for Tally {
    fn from([nats, tokens, bytes]: [f64; 3]) -> Self {
        Self { nats, tokens: tokens as u64, bytes: bytes as u64 }
    }
}
