//! What a compressed model is worth: its size, its loss on held-out text, its speed.

use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;
use firebox_data::Dataset;
use firebox_models::transformer::Transformer;
use serde::{Deserialize, Serialize};

use super::recipe::EvalPart;
use crate::TrainError;
use crate::evaluate::evaluate;
use crate::generate::{Sampling, generate};
use crate::model_io::{Folder, later, load};

/// A model, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Bytes of the tensors in its file.
    pub bytes: u64,
    /// Parameters, each once.
    pub parameters: u64,
    /// Share of the blocks' matrices that is zero, of those that are stored as floats.
    pub sparsity: f64,
    /// Bits in the file for each parameter.
    pub bits_per_weight: f64,
    /// Loss on held-out text, nats per token.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Bits per byte of held-out text.
    pub bpb: f64,
    /// Tokens generated per second, one after the other; 0 where that was not measured.
    pub tokens_per_s: f64,
}

/// Measures the model in `path` on the held-out part of `dataset`.
///
/// # Errors
/// As [`load`]; [`TrainError::Input`] for a model that has fewer tokens than the dataset's tokenizer.
pub fn measure(path: &Path, dataset: &Dataset, device: &Device, part: &EvalPart) -> Result<Measured, TrainError> {
    let model = load(path, device)?.model;
    let vocab_size = dataset.tokenizer.vocab_size();
    if model.config().vocab_size < vocab_size {
        let expected = format!("a model for the {vocab_size} tokens of its tokenizer");
        return Err(TrainError::Input { what: "model", expected, got: model.config().vocab_size.to_string() });
    }
    let limit = if part.max_batches == 0 { usize::MAX } else { part.max_batches as usize };
    let batches = dataset.val_batches(model.config().context, part.rows).take(limit);
    let found = evaluate(&model, batches, &dataset.tokenizer.token_bytes());
    let (bytes, parameters) = (tensor_bytes(path)?, model.config().num_params() as u64);
    Ok(Measured {
        bytes,
        parameters,
        sparsity: sparsity(&model),
        bits_per_weight: 8.0 * bytes as f64 / parameters as f64,
        loss: found.loss,
        perplexity: found.loss.exp(),
        bpb: found.bpb,
        tokens_per_s: if part.speed_tokens == 0 { 0.0 } else { speed(&model, dataset, part.speed_tokens)? },
    })
}

/// Bytes of a model's tensors.
fn tensor_bytes(path: &Path) -> Result<u64, TrainError> {
    let file = Folder::open(path)?.file;
    let sizes = file.names().map(|name| Ok(file.bytes(name)?.len() as u64));
    sizes.sum::<Result<u64, TrainError>>()
}

fn sparsity(model: &Transformer) -> f64 {
    let matrices =
        later(model).into_iter().filter(|(info, _)| info.name.starts_with("blocks.") && info.shape.len() > 1);
    let (mut zeros, mut all) = (0, 0);
    for (_, values) in matrices {
        let values = values();
        zeros += values.iter().filter(|&&v| v == 0.0).count();
        all += values.len();
    }
    zeros as f64 / all.max(1) as f64
}

/// Tokens per second after a short prompt.
fn speed(model: &Transformer, dataset: &Dataset, tokens: usize) -> Result<f64, TrainError> {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let stream = &dataset.val;
    let prompt: Vec<i32> = stream.tokens(0..stream.len().min(8)).iter().map(|&t| t as i32).collect();
    let started = Instant::now();
    // The first token waits for the prompt and for parameters that are read.
    let mut first = None;
    generate(model, &prompt, tokens, &greedy, None, |_| {
        first.get_or_insert_with(Instant::now);
        true
    })?;
    let since = first.unwrap_or(started).elapsed().as_secs_f64();
    Ok((tokens.saturating_sub(1)) as f64 / since.max(1e-9))
}
