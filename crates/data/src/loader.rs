//! Batches, as a pure function of (seed, sample number).
//!
//! **Rows.** A row is a window of `context` inputs of the stream, its targets the same window one token later. A stream
//! of N tokens has N - 1 targets; within an epoch every one of them stands in exactly one row (the first token of the
//! stream is never a target, since nothing precedes it). N - 1 is seldom a multiple of the context, so that the first and
//! the last row of the stream may be short: they are filled up with ignored targets. How the shortness divides between
//! them is drawn per epoch, so that rows begin at other places in other epochs.
//!
//! **Documents.** `<|endoftext|>` is the first token of each document. The target of a document's last token is thus the
//! separator of the next one: this is how the end of a text is learned. With `isolate_documents`, a separator opens a new
//! segment whose positions begin at 0; a document that is cut by a row goes on in another row as a segment of its own,
//! also from position 0.
//!
//! **Order.** Within an epoch the rows are permuted by a computed permutation (a Feistel network), so that sample number s
//! needs no state. Sources are mixed in blocks of 4,096 samples, in which each source has its share, at permuted places.

use crate::error::DataError;
use crate::permute::{permute, random};
use crate::shard::TokenStream;
use std::sync::Arc;

/// Target where nothing is to be predicted.
pub const IGNORE_INDEX: i32 = -100;

/// Samples in which every source has exactly its share.
const MIX_BLOCK: u64 = 4096;

// Purposes of random numbers, so that no two draw the same ones.
const PURPOSE_ORDER: u64 = 1 << 60;
const PURPOSE_SHIFT: u64 = 2 << 60;
const PURPOSE_MIX: u64 = 3 << 60;

/// Rows of tokens; every vector is `[rows, context]`, row after row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Tokens per row.
    pub context: usize,
    /// Token ids.
    pub inputs: Vec<i32>,
    /// The tokens that follow the inputs; [`IGNORE_INDEX`] where nothing is to be predicted.
    pub targets: Vec<i32>,
    /// Number of the document inside the row, from 0. All 0 unless documents are isolated.
    pub segments: Vec<i32>,
    /// Position inside the segment, from 0.
    pub positions: Vec<i32>,
}

impl Batch {
    fn empty(rows: usize, context: usize) -> Self {
        let capacity = rows * context;
        let vec = || Vec::with_capacity(capacity);
        Self { rows, context, inputs: vec(), targets: vec(), segments: vec(), positions: vec() }
    }

    /// Targets that count.
    pub fn target_count(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE_INDEX).count()
    }

    /// Bytes of text that the targets stand for, given the bytes of each token: what a sum of losses in bits is divided
    /// by to give bits per byte.
    pub fn target_bytes(&self, token_bytes: &[u32]) -> u64 {
        self.targets.iter().filter_map(|&t| token_bytes.get(usize::try_from(t).ok()?)).map(|&b| u64::from(b)).sum()
    }

    /// Appends a row: the inputs from `start` on, `count` of them with a target, then padding.
    fn push_row(&mut self, stream: &TokenStream, start: u64, count: usize, isolate: bool) {
        let window = stream.tokens(start..start + count as u64 + 1);
        let padding = self.context - count;
        self.inputs.extend(window[..count].iter().map(|&t| t as i32));
        self.inputs.extend(std::iter::repeat_n(0, padding));
        self.targets.extend(window[1..].iter().map(|&t| t as i32));
        self.targets.extend(std::iter::repeat_n(IGNORE_INDEX, padding));
        if !isolate {
            self.segments.extend(std::iter::repeat_n(0, self.context));
            self.positions.extend(0..self.context as i32);
            return;
        }
        let mut bounds: Vec<usize> =
            stream.document_starts(start + 1..start + count as u64).iter().map(|s| (s - start) as usize).collect();
        if padding > 0 {
            bounds.push(count);
        }
        bounds.push(self.context);
        let mut from = 0;
        for (segment, to) in bounds.into_iter().enumerate() {
            self.segments.extend(std::iter::repeat_n(segment as i32, to - from));
            self.positions.extend(0..(to - from) as i32);
            from = to;
        }
    }
}

/// How batches are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Tokens per row.
    pub context: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Segments and positions restart at each document.
    pub isolate_documents: bool,
}

/// How a stream is divided into rows.
#[derive(Debug, Clone, Copy)]
struct Layout {
    targets: u64,
    context: u64,
    rows: u64,
    /// Ignored targets of an epoch, in the first and last row together.
    slack: u64,
}

impl Layout {
    /// The fewest rows that hold all targets; when those leave too little slack to shift the rows, one more.
    fn new(tokens: u64, context: usize, shifted: bool) -> Self {
        let targets = tokens.saturating_sub(1);
        let context = context as u64;
        let mut rows = targets.div_ceil(context);
        let mut slack = rows * context - targets;
        if shifted && slack < context / 2 {
            rows += 1;
            slack += context;
        }
        Self { targets, context, rows, slack }
    }

    /// Ignored targets of the first row in an epoch. Each of the two short rows keeps at least one target.
    fn shift(&self, seed: u64, epoch: u64) -> u64 {
        let low = self.slack.saturating_sub(self.context - 1);
        let high = self.slack.min(self.context - 1);
        low + random(seed ^ PURPOSE_SHIFT, epoch) % (high - low + 1)
    }

    /// First input and number of targets of a row.
    fn row(&self, row: u64, shift: u64) -> (u64, usize) {
        let start = (row * self.context).saturating_sub(shift);
        let end = ((row + 1) * self.context - shift).min(self.targets);
        (start, (end - start) as usize)
    }
}

/// Endless batches of training tokens.
#[derive(Debug, Clone)]
pub struct Loader {
    config: LoaderConfig,
    streams: Vec<(Arc<TokenStream>, Layout)>,
    /// Samples of each stream in a block, summed up: stream k has the places `shares[k]..shares[k + 1]`.
    shares: Vec<u64>,
}

impl Loader {
    /// Batches of one or more streams, each with a weight: its share of the samples.
    ///
    /// # Errors
    /// [`DataError::TooShort`] when a stream has fewer tokens than one row needs, [`DataError::BadConfig`] when a weight or
    /// the context is not positive.
    pub fn new(streams: Vec<(Arc<TokenStream>, f64)>, config: LoaderConfig) -> Result<Self, DataError> {
        if config.context == 0 {
            let reason = "a row needs at least one token".into();
            return Err(DataError::BadConfig { key: "context", value: "0".into(), reason });
        }
        if streams.is_empty() {
            return Err(DataError::NoSources);
        }
        for (number, (stream, weight)) in streams.iter().enumerate() {
            if !(weight.is_finite() && *weight > 0.0) {
                let reason = "a weight is a number above 0".into();
                return Err(DataError::BadConfig { key: "sources.weight", value: weight.to_string(), reason });
            }
            if stream.len() <= config.context as u64 {
                let source_name = format!("source {}", number + 1);
                return Err(DataError::TooShort { tokens: stream.len(), context: config.context, source_name });
            }
        }
        let weights: Vec<f64> = streams.iter().map(|(_, w)| *w).collect();
        let layout = |s: &TokenStream| Layout::new(s.len(), config.context, true);
        let streams = streams.into_iter().map(|(s, _)| (s.clone(), layout(&s))).collect();
        Ok(Self { config, streams, shares: shares(&weights) })
    }

    /// Rows `first_sample..first_sample + rows` of the endless sequence of samples: a pure function of the seed and these
    /// two numbers. Rank r of R takes its slice of a global batch of B rows with
    /// `batch(step * B + r * B / R, B / R)`, and the ranks' rows together are those of one rank.
    pub fn batch(&self, first_sample: u64, rows: usize) -> Batch {
        let mut batch = Batch::empty(rows, self.config.context);
        for sample in first_sample..first_sample + rows as u64 {
            let (stream, epoch, row) = self.place(sample);
            let (tokens, layout) = &self.streams[stream];
            let (start, count) = layout.row(row, layout.shift(self.stream_seed(stream), epoch));
            batch.push_row(tokens, start, count, self.config.isolate_documents);
        }
        batch
    }

    /// Stream, epoch of the stream, and row of a sample.
    fn place(&self, sample: u64) -> (usize, u64, u64) {
        let (stream, index) = if self.streams.len() == 1 {
            (0, sample)
        } else {
            let (block, place) = (sample / MIX_BLOCK, sample % MIX_BLOCK);
            let place = permute(place, MIX_BLOCK, random(self.config.seed ^ PURPOSE_MIX, block));
            let stream = self.shares.partition_point(|&s| s <= place) - 1;
            let share = self.shares[stream + 1] - self.shares[stream];
            (stream, block * share + place - self.shares[stream])
        };
        let rows = self.streams[stream].1.rows;
        let epoch = index / rows;
        let key = random(self.stream_seed(stream) ^ PURPOSE_ORDER, epoch);
        (stream, epoch, permute(index % rows, rows, key))
    }

    fn stream_seed(&self, stream: usize) -> u64 {
        random(self.config.seed, stream as u64) & ((1 << 60) - 1)
    }

    /// Rows per epoch of all streams together. With one stream, samples `0..samples_per_epoch` hold every target once;
    /// with several, each stream has its own epoch and its share of the samples.
    pub fn samples_per_epoch(&self) -> u64 {
        self.streams.iter().map(|(_, l)| l.rows).sum()
    }

    /// Targets per epoch of all streams together.
    pub fn targets_per_epoch(&self) -> u64 {
        self.streams.iter().map(|(_, l)| l.targets).sum()
    }

    /// Tokens per row.
    pub fn context(&self) -> usize {
        self.config.context
    }
}

/// Places of a block for each stream, by the method of largest remainders, at least one each; summed up.
fn shares(weights: &[f64]) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / total * MIX_BLOCK as f64).collect();
    let mut counts: Vec<u64> = exact.iter().map(|e| (*e as u64).max(1)).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    for &k in by_remainder.iter().cycle() {
        match counts.iter().sum::<u64>().cmp(&MIX_BLOCK) {
            std::cmp::Ordering::Less => counts[k] += 1,
            std::cmp::Ordering::Equal => break,
            // Only where the least share of one was rounded up: the largest gives it.
            std::cmp::Ordering::Greater => {
                if let Some(largest) = counts.iter_mut().max() {
                    *largest -= 1;
                }
            }
        }
    }
    let mut sums = vec![0];
    counts.iter().for_each(|c| sums.push(sums[sums.len() - 1] + c));
    sums
}

/// The batches of one pass over held-out tokens, in order: every token but the first is a target once.
#[derive(Debug, Clone)]
pub struct ValBatches {
    stream: Arc<TokenStream>,
    layout: Layout,
    rows: usize,
    isolate: bool,
    next: u64,
}

impl ValBatches {
    /// Batches of up to `rows` rows (the last has fewer). A stream shorter than the context gives one padded row.
    pub fn new(stream: Arc<TokenStream>, context: usize, rows: usize, isolate_documents: bool) -> Self {
        let layout = Layout::new(stream.len(), context.max(1), false);
        Self { stream, layout, rows: rows.max(1), isolate: isolate_documents, next: 0 }
    }

    /// Targets of the whole pass.
    pub fn targets(&self) -> u64 {
        self.layout.targets
    }
}

impl Iterator for ValBatches {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let rows = (self.layout.rows - self.next).min(self.rows as u64);
        if rows == 0 {
            return None;
        }
        let mut batch = Batch::empty(rows as usize, self.layout.context as usize);
        for row in self.next..self.next + rows {
            let (start, count) = self.layout.row(row, 0);
            batch.push_row(&self.stream, start, count, self.isolate);
        }
        self.next += rows;
        Some(batch)
    }
}
