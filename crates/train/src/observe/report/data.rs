//! What a run folder tells about its run.

use std::path::{Path, PathBuf};

use crate::observe::compare::Baselines;
use crate::observe::metrics::{self, Metrics};
use crate::observe::record::{RunInfo, Summary};
use crate::observe::{EvalRecord, ObserveError, StepRecord, files};
use crate::timeline::Timeline;

/// At most this many samples are shown, first and last among them.
const MAX_SAMPLES: usize = 8;
/// Bytes read of one sample.
const MAX_SAMPLE: u64 = 8 << 10;
/// Bytes read of the recipe.
const MAX_RECIPE: u64 = 1 << 20;

/// The content of a run folder.
pub(super) struct Run {
    pub dir: PathBuf,
    pub info: RunInfo,
    pub recipe: Option<String>,
    pub metrics: Metrics,
    pub summary: Option<Summary>,
    pub baselines: Option<Baselines>,
    /// What each rank did in a step.
    pub timeline: Option<Timeline>,
    /// (step, text), lowest step first.
    pub samples: Vec<(u64, String)>,
    /// The latest checkpoint: (step, folder).
    pub checkpoint: Option<(u64, PathBuf)>,
}

impl Run {
    pub fn read(dir: &Path) -> Result<Self, ObserveError> {
        let info: Option<RunInfo> = files::read_json(&dir.join("run.json"), "the description of a run")?;
        let metrics = metrics::read(&dir.join("metrics.jsonl"))?;
        if info.is_none() && metrics.is_none() {
            return Err(ObserveError::NotARun { path: dir.to_path_buf() });
        }
        let info = info.unwrap_or_else(|| RunInfo { version: String::new(), started_unix_s: 0, ..RunInfo::default() });
        let mut samples = Vec::new();
        for (step, path) in spread(files::samples_in(dir)?, MAX_SAMPLES) {
            if let Some(text) = files::read_text(&path, MAX_SAMPLE)? {
                samples.push((step, text));
            }
        }
        Ok(Self {
            recipe: files::read_text(&dir.join("recipe.toml"), MAX_RECIPE)?,
            metrics: metrics.unwrap_or_default(),
            summary: files::read_json(&dir.join("summary.json"), "the summary of a run")?,
            baselines: files::read_json(&dir.join("baselines.json"), "sizes of compressed text")?,
            // One that is too large to be read is no reason to go without a report.
            timeline: files::read_json(&dir.join("timeline.json"), "a timeline").unwrap_or_default(),
            samples,
            checkpoint: files::numbered(&dir.join("checkpoints"), "step-", "")?.pop(),
            dir: dir.to_path_buf(),
            info,
        })
    }

    pub fn name(&self) -> String {
        if !self.info.name.is_empty() {
            return self.info.name.clone();
        }
        self.dir.file_name().map_or_else(|| "Run".to_owned(), |name| name.to_string_lossy().into_owned())
    }

    pub fn last_step(&self) -> Option<&StepRecord> {
        self.metrics.steps.last()
    }

    pub fn last_eval(&self) -> Option<&EvalRecord> {
        self.metrics.evals.last()
    }

    /// The evaluation with the lowest loss.
    pub fn best_eval(&self) -> Option<&EvalRecord> {
        self.metrics
            .evals
            .iter()
            .filter(|eval| eval.val_loss.is_finite())
            .min_by(|a, b| a.val_loss.total_cmp(&b.val_loss))
    }

    pub fn steps(&self) -> u64 {
        self.summary.as_ref().map(|summary| summary.steps).or(self.last_step().map(|r| r.step)).unwrap_or(0)
    }

    pub fn tokens(&self) -> u64 {
        self.summary.as_ref().map(|summary| summary.tokens).or(self.last_step().map(|r| r.tokens)).unwrap_or(0)
    }

    pub fn params(&self) -> u64 {
        self.summary.as_ref().map_or(self.info.params, |summary| summary.params)
    }

    /// Bits per byte of the held-out text at the end, or at the last evaluation of an unfinished run.
    pub fn val_bpb(&self) -> Option<f64> {
        let stored = self.summary.as_ref().and_then(|summary| summary.val_bpb);
        stored.or(self.last_eval().map(|eval| eval.val_bpb)).filter(|bpb| bpb.is_finite() && *bpb > 0.0)
    }

    pub fn val_loss(&self) -> Option<f64> {
        let stored = self.summary.as_ref().and_then(|summary| summary.val_loss);
        stored.or(self.last_eval().map(|eval| eval.val_loss)).filter(|loss| loss.is_finite())
    }

    /// The training loss at the end: as the run gave it, or the end of its moving average.
    pub fn train_loss(&self) -> Option<f64> {
        let stored = self.summary.as_ref().and_then(|summary| summary.train_loss);
        let losses: Vec<_> = self.metrics.steps.iter().map(|record| (record.step as f64, record.loss)).collect();
        stored.or_else(|| super::charts::smooth(&losses).last().map(|(_, loss)| *loss)).filter(|loss| loss.is_finite())
    }

    /// The gradient noise scale in rows and tokens: at the end, or the last logged.
    pub fn noise_scale(&self) -> Option<(f64, f64)> {
        let at_end = self.summary.as_ref().map(|summary| (summary.noise_scale_rows, summary.noise_scale_tokens));
        let (rows, tokens) = at_end.or(self.last_step().map(|r| (r.noise_scale_rows, r.noise_scale_tokens)))?;
        rows.zip(tokens)
    }

    /// Steps that were skipped: all of them, also those of which `metrics.jsonl` has no line.
    pub fn skipped(&self) -> u64 {
        let listed = self.metrics.skipped.len() as u64;
        self.summary.as_ref().map_or(listed, |summary| summary.skipped_steps.max(listed))
    }
}

/// At most `n` items at equal distances, first and last included.
fn spread<T>(items: Vec<T>, n: usize) -> Vec<T> {
    let len = items.len();
    if len <= n {
        return items;
    }
    let keep: Vec<usize> = (0..n).map(|i| i * (len - 1) / (n - 1)).collect();
    items.into_iter().enumerate().filter(|(i, _)| keep.contains(i)).map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn spread_keeps_both_ends() {
        assert_eq!(spread((0..100).collect(), 4), [0, 33, 66, 99]);
        assert_eq!(spread(vec![1, 2], 4), [1, 2]);
    }
}
