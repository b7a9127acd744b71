//! Loss and bits per byte on held-out text.

use firebox_data::Batch;
use firebox_models::decoder::Decoder;
use firebox_models::{Staged, TokenBatch};
use firebox_tensor::ops::Sequence;
use serde::Serialize;

use crate::model_io::to_host;

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

/// Evaluates a model (on a device without gradients) over batches; `token_bytes` is the tokenizer's.
pub fn evaluate(model: &Decoder, batches: impl Iterator<Item = Batch>, token_bytes: &[u32]) -> Evaluation {
    let (mut nats, mut tokens, mut bytes) = (0.0, 0u64, 0u64);
    for batch in batches {
        let n = batch.target_count();
        if n == 0 {
            continue;
        }
        bytes += batch.target_bytes(token_bytes);
        tokens += n as u64;
        let loss = to_host(model.loss(&token_batch(batch, n), None))[0];
        nats += f64::from(loss) * n as f64;
    }
    Evaluation {
        loss: nats / tokens.max(1) as f64,
        bpb: nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
        tokens,
        bytes,
    }
}
