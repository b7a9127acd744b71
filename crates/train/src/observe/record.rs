//! What is recorded of a run; the fields are the keys of its JSON files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What is known when a run starts: `run.json`.
///
/// Everything but [`dir`](Self::dir) may be left at its default; the report leaves out what it isn't told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunInfo {
    /// The run folder. Not stored: a folder can be moved.
    #[serde(skip)]
    pub dir: PathBuf,
    /// The run's name: that of the recipe.
    pub name: String,
    /// The resolved recipe. Stored as `recipe.toml`, not in `run.json`.
    #[serde(skip)]
    pub recipe_toml: String,
    /// The model in a few words: "Llama decoder, 6 layers, width 384".
    pub model: String,
    /// The data in a few words: "Rust source of 312 crates, 48.1 MB".
    pub data: String,
    /// Trainable parameters.
    pub params: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps done before this start: 0 for a new run, the checkpoint's step for a resumed one.
    pub start_step: u64,
    /// Tokens a step reads, over all micro-batches and ranks; after the batch warmup, where there is one.
    pub tokens_per_step: u64,
    /// The device the run uses: "ndarray", "wgpu", ...
    pub backend: String,
    /// Threads the backend uses, 0 if unknown.
    pub threads: u32,
    /// Measured matrix multiplication peak of the machine, FLOP/s; 0 if not measured.
    pub peak_flops: f64,
    /// Floating point operations of forward and backward for one token, FLOP.
    pub flops_per_token: f64,
    /// When the run was started, seconds since 1970 UTC; 0 if unknown.
    pub started_unix_s: u64,
    /// How the binary is called, for the commands that the report suggests.
    pub program: String,
    /// Firebox's version.
    pub version: String,
}

impl Default for RunInfo {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            name: String::new(),
            recipe_toml: String::new(),
            model: String::new(),
            data: String::new(),
            params: 0,
            total_steps: 0,
            start_step: 0,
            tokens_per_step: 0,
            backend: String::new(),
            threads: 0,
            peak_flops: 0.0,
            flops_per_token: 0.0,
            started_unix_s: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            program: "firebox".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl RunInfo {
    /// Model FLOPs utilization at a speed: the share of the measured peak that the model's own operations use
    /// (PaLM, arXiv:2204.02311, appendix B), from 0 to 1; 0 when the peak is not known.
    pub fn mfu(&self, tokens_per_s: f64) -> f64 {
        if self.peak_flops > 0.0 { tokens_per_s * self.flops_per_token / self.peak_flops } else { 0.0 }
    }
}

/// One logged step: a line of `metrics.jsonl`.
///
/// A number that is not finite is stored as `null` and read back as NaN, as JSON has no NaN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included: the first is 1.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean cross-entropy of the step's tokens, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// Global L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Speed since the record before, tokens per second.
    #[serde(deserialize_with = "null_is_nan")]
    pub tokens_per_s: f64,
    /// Model FLOPs utilization, from 0 to 1; see [`RunInfo::mfu`].
    #[serde(deserialize_with = "null_is_nan")]
    pub mfu: f64,
    /// Resident memory of the process, bytes.
    pub memory_bytes: u64,
    /// The gradient noise scale ([`NoiseScale`](crate::NoiseScale)), rows, where it is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise_scale_rows: Option<f64>,
    /// The same in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise_scale_tokens: Option<f64>,
    /// How uneven the choice of experts was in the step, where there are any: tokens of the busiest expert over the mean, in the worst block. 1: even.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<f64>,
    /// The parts of a student's loss.
    #[serde(flatten)]
    pub distill: Option<DistillRecord>,
    /// What ranks did, where there are several.
    #[serde(flatten)]
    pub ranks: Option<RanksRecord>,
}

/// The parts of a student's loss in a step, each without its weight: keys of the same line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DistillRecord {
    /// The loss of the targets, nats per token.
    pub hard_loss: f64,
    /// The squared temperature times the divergence from the teacher's predictions, nats per token.
    pub soft_loss: f64,
    /// The mean squared error of the blocks' outputs against the teacher's, summed over the blocks, where they learn from those. It is no part of the step's loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_loss: Option<f64>,
    /// The divergence of the attention relations, nats per token, where they are learned. It is no part of the step's loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relation_loss: Option<f64>,
}

/// What the ranks of a run did in a step: keys of the same line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RanksRecord {
    /// Bytes that they sent to each other, all together; see [`Traffic`](firebox_parallel::Traffic).
    pub bytes_sent: u64,
    /// Messages, all together.
    pub messages_sent: u64,
    /// The share of their time for which they waited for others, from 0 to 1.
    pub idle: f64,
    /// The share for which they stood while data moved.
    pub communication: f64,
    /// Of the time in which data moved, the share in which the rank computed; absent where none moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<f64>,
    /// The share of the pipelines' time in which ranks computed nothing; absent without pipelines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bubble: Option<f64>,
}

/// One evaluation on what is held out: a line of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps done when it was evaluated.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean cross-entropy of the held-out tokens, nats per token.
    #[serde(deserialize_with = "null_is_nan")]
    pub val_loss: f64,
    /// The same per byte of the text, bits: comparable between tokenizers and with compressors. 0 where what is held out is no text.
    #[serde(deserialize_with = "null_is_nan")]
    pub val_bpb: f64,
    /// `val_loss` of the averaged parameters, where there is an average.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss_average: Option<f64>,
    /// The share of zeros in the matrices of the blocks, from 0 to 1, of a run that prunes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// What else the task measures, by name: accuracy, recall.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// The result of a run: `summary.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// Trainable parameters.
    pub params: u64,
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Time from start to end, evaluations and checkpoints included, seconds.
    pub wall_s: f64,
    /// Mean speed while training, tokens per second.
    pub tokens_per_s: f64,
    /// Model FLOPs utilization at that speed, from 0 to 1.
    pub mfu: Option<f64>,
    /// Training loss at the end, nats per token.
    pub train_loss: Option<f64>,
    /// Held-out loss at the end, nats per token; `None` without evaluation.
    pub val_loss: Option<f64>,
    /// Held-out loss at the end, bits per byte.
    pub val_bpb: Option<f64>,
    /// Lowest held-out loss, nats per token.
    pub best_val_loss: Option<f64>,
    /// The step that had it.
    pub best_step: Option<u64>,
    /// Peak resident memory, bytes.
    pub peak_memory_bytes: u64,
    /// Steps that did not update the parameters, as the loss or gradient was not finite.
    pub skipped_steps: u64,
    /// The gradient noise scale ([`NoiseScale`](crate::NoiseScale)) at the end, rows, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_scale_rows: Option<f64>,
    /// The same in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_scale_tokens: Option<f64>,
    /// The share of zeros in the matrices of the blocks at the end, of a run that prunes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// What else the task measured at the end, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// Why the run ended: "done", "interrupted", "early stop" or a message.
    pub stopped: String,
}

fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
