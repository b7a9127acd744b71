//! Images in memory, as tasks that learn from pixels alone read them.

use std::sync::Arc;

use firebox_data::images::{ImageRow, Preprocess};
use firebox_data::{Order, hold_out};
use firebox_models::{Extra, TokenBatch};
use firebox_tensor::ops::Sequence;

use crate::TrainError;
use crate::task::HeldOut;

/// Images `[C, S, S]`, as bytes.
#[derive(Debug, Clone)]
pub struct Pictures {
    rows: Arc<[Vec<u8>]>,
    preprocess: Arc<Preprocess>,
}

impl Pictures {
    /// Of these pixels, which `preprocess` has made.
    pub fn new(rows: Vec<Vec<u8>>, preprocess: Preprocess) -> Self {
        Self { rows: rows.into(), preprocess: preprocess.into() }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How they were made.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// What a model takes of some of them, `[B, C, S, S]`.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn normalized(&self, rows: impl IntoIterator<Item = usize>) -> Vec<f32> {
        let mut out = vec![];
        rows.into_iter().for_each(|row| self.preprocess.normalize(&self.rows[row], &mut out));
        out
    }

    /// Rows of `tokens` patches, whose loss is a mean over `of` rows.
    pub(super) fn batch(&self, rows: &[usize], tokens: usize, of: usize) -> TokenBatch {
        let n = rows.len() * tokens;
        let sequence = Sequence::padded(tokens, &vec![tokens; rows.len()]);
        let extra = Extra { pixels: self.normalized(rows.iter().copied()), ..Extra::default() };
        TokenBatch {
            loss_scale: 1.0 / of.max(1) as f64,
            extra: Some(extra.into()),
            ..TokenBatch::new(vec![0; n], vec![-100; n], sequence)
        }
    }

    /// All in order, `rows` at a time.
    pub(super) fn chunks(&self, rows: usize) -> impl Iterator<Item = Vec<usize>> + use<> {
        let n = self.len();
        (0..n).step_by(rows.max(1)).map(move |at| (at..(at + rows.max(1)).min(n)).collect())
    }
}

/// Images to learn from and images that are held out, in the order in which a run reads them.
#[derive(Debug, Clone)]
pub struct PictureRows {
    /// To learn from.
    pub train: Pictures,
    /// Held out.
    pub held: Pictures,
    order: Order,
}

impl PictureRows {
    /// Holds out a share of the rows; what is left is read in the order of `seed`.
    ///
    /// # Errors
    /// Where there is no row.
    pub fn new(rows: Vec<ImageRow>, preprocess: &Preprocess, held_out: f64, seed: u64) -> Result<Self, TrainError> {
        let (train, held) = hold_out(rows.into_iter().map(|row| row.pixels).collect(), held_out);
        if train.is_empty() {
            return Err(TrainError::Input { what: "data", expected: "images".into(), got: "none".into() });
        }
        let order = Order::new(train.len(), seed);
        let [train, held] = [train, held].map(|rows| Pictures::new(rows, preprocess.clone()));
        Ok(Self { train, held, order })
    }

    /// The rows of the samples of a step, in micro-batches, with their numbers.
    pub(super) fn step(&self, first: u64, rows: usize, micro_rows: usize) -> Vec<Vec<(u64, usize)>> {
        let samples: Vec<(u64, usize)> =
            (first..first + rows as u64).map(|sample| (sample, self.order.row(sample))).collect();
        samples.chunks(micro_rows.max(1)).map(<[_]>::to_vec).collect()
    }

    /// What goes into checkpoints: how images were made.
    pub(super) fn files(&self) -> Vec<(String, Vec<u8>)> {
        let json = self.train.preprocess().to_json();
        vec![("preprocessor_config.json".into(), format!("{json:#}").into_bytes())]
    }

    /// Micro-batches of a step.
    pub(super) fn batches(&self, first: u64, rows: usize, micro_rows: usize, tokens: usize) -> Vec<TokenBatch> {
        let part = |part: Vec<(u64, usize)>| {
            let at: Vec<usize> = part.into_iter().map(|(_, row)| row).collect();
            self.train.batch(&at, tokens, rows)
        };
        self.step(first, rows, micro_rows).into_iter().map(part).collect()
    }

    /// Held-out batches.
    pub(super) fn held_out(&self, rows: usize, tokens: usize) -> impl Iterator<Item = HeldOut> + '_ {
        self.held.chunks(rows).map(move |at| HeldOut {
            batch: self.held.batch(&at, tokens, at.len()),
            count: at.len() as u64,
            bytes: 0,
        })
    }
}
