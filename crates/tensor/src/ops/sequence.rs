//! Where each token of a batch stands, and the rotations of positions.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Tensor, TensorData};

use super::collective::part;

/// Positions and segments of a batch of `[B, T]` tokens: what attention needs to know besides the values. Cheap to clone; made once
/// per batch and shared by all layers. It may be one rank's [part](Self::part) of a batch whose rows several ranks have divided.
#[derive(Clone, Debug)]
pub struct Sequence(Arc<Inner>);

/// The tokens of a row of `tokens` that rank `rank` of `size` has where ranks divide rows: of 2 N chunks, as even as can be, number r and number 2 N - 1 - r. So
/// under a causal mask all ranks have the same to compute, since what the first chunk sees less, the other sees more (Zhu, 2024, "zigzag ring attention").
pub fn zigzag(tokens: usize, rank: usize, size: usize) -> [Range<usize>; 2] {
    [rank, 2 * size - 1 - rank].map(|chunk| part(tokens, chunk, 2 * size))
}

/// The values of a batch's tokens, `[B, T]`, that rank `rank` of `size` has of each row.
pub fn zigzag_part<T: Copy>(values: &[T], tokens: usize, rank: usize, size: usize) -> Vec<T> {
    let rows = values.chunks_exact(tokens.max(1));
    rows.flat_map(|row| zigzag(tokens, rank, size).map(|chunk| &row[chunk]).concat()).collect()
}

/// The keys of one rank as the queries of a [`Sequence`] see them.
#[derive(Debug)]
pub(crate) struct Keys {
    /// Of each row.
    pub tokens: usize,
    /// `[B, tokens]`
    pub positions: Vec<i32>,
    /// Of each query the first key that it sees, and the one behind the last, `[B, T]`.
    pub seen: Vec<[u32; 2]>,
}

#[derive(Debug)]
struct Inner {
    batch: usize,
    tokens: usize,
    positions: Vec<i32>,
    /// First token of each token's segment in the whole row.
    starts: Vec<u32>,
    /// Of each token the one behind the last that it sees in the whole row: behind itself, or behind its segment.
    ends: Vec<u32>,
    bidirectional: bool,
    part: Option<Part>,
    keys: OnceLock<(Option<usize>, Arc<[Keys]>)>,
    // What composed attention needs on its device, made at the first layer.
    mask: OnceLock<(Option<usize>, Tensor<4, Bool>)>,
    rotation: OnceLock<[Tensor<4>; 2]>,
}

/// That several ranks have divided the rows of a batch.
#[derive(Debug)]
struct Part {
    whole: Sequence,
    rank: usize,
    size: usize,
}

impl Sequence {
    /// A batch of `batch` rows whose tokens stand at `positions` and belong to `segments` (documents, numbered along each row); both
    /// `[B, T]`. Attention does not cross segments, and no token sees those after it.
    ///
    /// # Panics
    /// If the lengths are not `B T`, a position is negative, or a segment number decreases along a row.
    pub fn new(batch: usize, tokens: usize, positions: Vec<i32>, segments: &[i32]) -> Self {
        Self::of_segments(batch, tokens, positions, segments, false)
    }

    /// The same for encoders: a token sees all of its segment, before it and after it. Padding is a segment of its own at the end of a row.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn bidirectional(batch: usize, tokens: usize, positions: Vec<i32>, segments: &[i32]) -> Self {
        Self::of_segments(batch, tokens, positions, segments, true)
    }

    /// Rows for encoders of one segment each, as long as `lengths` says, at positions from 0 on; what is left of `tokens` is padding.
    ///
    /// # Panics
    /// If a row is longer than `tokens`.
    pub fn padded(tokens: usize, lengths: &[usize]) -> Self {
        assert!(lengths.iter().all(|&n| n <= tokens), "sequence: rows of {lengths:?} tokens in {tokens}");
        let positions = lengths.iter().flat_map(|_| 0..tokens as i32).collect();
        let segments: Vec<i32> = lengths.iter().flat_map(|&n| (0..tokens).map(move |i| i32::from(i >= n))).collect();
        Self::bidirectional(lengths.len(), tokens, positions, &segments)
    }

    fn of_segments(batch: usize, tokens: usize, positions: Vec<i32>, segments: &[i32], bidirectional: bool) -> Self {
        let n = batch * tokens;
        assert!(
            positions.len() == n && segments.len() == n,
            "sequence: {batch} rows of {tokens} tokens need {n} positions and segments"
        );
        assert!(positions.iter().all(|&p| p >= 0), "sequence: negative position");
        let (mut starts, mut ends) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for row in segments.chunks_exact(tokens.max(1)) {
            assert!(row.is_sorted(), "sequence: segment numbers decrease along a row");
            let mut start = 0;
            for segment in row.chunk_by(|a, b| a == b) {
                let end = start + segment.len();
                starts.extend(std::iter::repeat_n(start as u32, segment.len()));
                ends.extend((start..end).map(|i| if bidirectional { end as u32 } else { i as u32 + 1 }));
                start = end;
            }
        }
        Self::make(batch, tokens, positions, [starts, ends], bidirectional, None)
    }

    fn make(
        batch: usize,
        tokens: usize,
        positions: Vec<i32>,
        [starts, ends]: [Vec<u32>; 2],
        bidirectional: bool,
        part: Option<Part>,
    ) -> Self {
        let (keys, mask, rotation) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self(Arc::new(Inner { batch, tokens, positions, starts, ends, bidirectional, part, keys, mask, rotation }))
    }

    /// Whether tokens see those after them.
    pub fn is_bidirectional(&self) -> bool {
        self.0.bidirectional
    }

    /// Of each row the tokens that rank `rank` of `size` has ([`zigzag`]): B and T are then those of the part.
    ///
    /// # Panics
    /// If this is a part already, or its tokens see those after them: ranks divide causal rows alone.
    pub fn part(&self, rank: usize, size: usize) -> Self {
        assert!(self.0.part.is_none(), "sequence: a part cannot be divided again");
        if size == 1 {
            return self.clone();
        }
        assert!(
            !self.0.bidirectional,
            "sequence: ranks divide causal rows, not an encoder's: use one context-parallel rank"
        );
        let (batch, tokens) = (self.batch(), self.tokens());
        let mine = zigzag(tokens, rank, size).map(|chunk| chunk.len()).iter().sum();
        let positions = zigzag_part(&self.0.positions, tokens, rank, size);
        let seen = [&self.0.starts, &self.0.ends].map(|bounds| zigzag_part(bounds, tokens, rank, size));
        Self::make(batch, mine, positions, seen, false, Some(Part { whole: self.clone(), rank, size }))
    }

    /// The whole batch, of which this may be a part.
    pub fn whole(&self) -> &Self {
        self.0.part.as_ref().map_or(self, |part| &part.whole)
    }

    /// This rank's number among those that divide the rows, and how many there are.
    pub fn divided(&self) -> (usize, usize) {
        self.0.part.as_ref().map_or((0, 1), |part| (part.rank, part.size))
    }

    /// Where some tokens of this part, counted over its rows, are in the whole batch, counted likewise.
    pub fn runs(&self, tokens: Range<usize>) -> Vec<Range<usize>> {
        let (rank, size) = self.divided();
        if size == 1 {
            return vec![tokens];
        }
        let whole = self.whole().tokens();
        let mut runs = vec![];
        for row in 0..self.batch() {
            let mut at = row * self.tokens();
            for chunk in zigzag(whole, rank, size) {
                let (start, end) = (tokens.start.max(at), tokens.end.min(at + chunk.len()));
                if start < end {
                    let first = row * whole + chunk.start;
                    runs.push(first + start - at..first + end - at);
                }
                at += chunk.len();
            }
        }
        runs
    }

    /// Rows of one segment each, at positions `0..tokens`.
    pub fn plain(batch: usize, tokens: usize) -> Self {
        let positions = (0..batch).flat_map(|_| 0..tokens as i32).collect();
        Self::new(batch, tokens, positions, &vec![0; batch * tokens])
    }

    /// How many tokens the first segment of each row has: all but the padding, where a row is one text.
    pub fn lengths(&self) -> Vec<usize> {
        let rows = self.0.starts.chunks_exact(self.0.tokens.max(1));
        rows.map(|row| row.iter().position(|&start| start > 0).unwrap_or(row.len())).collect()
    }

    /// B
    pub fn batch(&self) -> usize {
        self.0.batch
    }

    /// T
    pub fn tokens(&self) -> usize {
        self.0.tokens
    }

    /// Position of each token, `[B, T]`.
    pub fn positions(&self) -> &[i32] {
        &self.0.positions
    }

    /// The keys of each rank that has a part of the rows, for queries that see at most `window` of them. One window serves all layers of a model.
    pub(crate) fn keys(&self, window: Option<usize>) -> Arc<[Keys]> {
        let (_, size) = self.divided();
        let make = || (0..size).map(|rank| self.keys_of(rank, window)).collect();
        let (made_for, keys) = self.0.keys.get_or_init(|| (window, make()));
        if *made_for == window { keys.clone() } else { make() }
    }

    fn keys_of(&self, owner: usize, window: Option<usize>) -> Keys {
        let ((rank, size), whole) = (self.divided(), self.whole());
        let tokens = whole.tokens();
        let mine = zigzag(tokens, rank, size);
        let theirs = zigzag(tokens, owner, size);
        // How many of their tokens are before token `i` of the row.
        let before = |i: usize| -> u32 {
            theirs.iter().map(|chunk| (i.clamp(chunk.start, chunk.end) - chunk.start) as u32).sum()
        };
        let places = (0..self.batch()).flat_map(|_| mine.iter().cloned().flatten());
        let seen = places.zip(&self.0.starts).zip(&self.0.ends).map(|((i, &start), &end)| {
            let first = (start as usize).max((i + 1).saturating_sub(window.unwrap_or(usize::MAX)));
            [before(first), before(end as usize)]
        });
        Keys {
            tokens: theirs.iter().map(|chunk| chunk.len()).sum(),
            positions: zigzag_part(whole.positions(), tokens, owner, size),
            seen: seen.collect(),
        }
    }

    /// `[B, 1, T, T]`, true where a query must not see a key. One window serves all layers of a model.
    pub(crate) fn mask(&self, window: Option<usize>, device: &Device) -> Tensor<4, Bool> {
        let (batch, t) = (self.0.batch, self.0.tokens);
        let make = || {
            let hidden: Vec<bool> = (0..batch * t)
                .flat_map(|i| {
                    let (start, end) = (self.0.starts[i] as usize, self.0.ends[i] as usize);
                    let first = start.max((i % t + 1).saturating_sub(window.unwrap_or(usize::MAX)));
                    (0..t).map(move |key| key < first || key >= end)
                })
                .collect();
            Tensor::from_data(TensorData::new(hidden, [batch, 1, t, t]), device)
        };
        let (made_for, mask) = self.0.mask.get_or_init(|| (window, make()));
        if *made_for == window { mask.clone() } else { make() }
    }

    /// Cosines and sines of each token's position, `[B, 1, T, E / 2]`. One table serves all layers of a model.
    pub(crate) fn rotation(&self, table: &RopeTable, device: &Device) -> [Tensor<4>; 2] {
        self.0.rotation.get_or_init(|| table.at(&self.0.positions, self.0.batch, device)).clone()
    }
}

/// Cosines and sines of rotary positions (Su et al., arXiv:2104.09864): position p turns pair j by `p * theta^(-2 j / E)`.
#[derive(Clone, PartialEq)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl std::fmt::Debug for RopeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RopeTable({} positions, {} pairs)", self.positions(), self.half)
    }
}

impl RopeTable {
    /// The table for positions `0..positions` and heads of width `head_dim`.
    ///
    /// # Panics
    /// If `head_dim` is odd.
    pub fn new(theta: f64, head_dim: usize, positions: usize) -> Self {
        assert!(head_dim.is_multiple_of(2), "rotary positions need an even head width, got {head_dim}");
        let turns: Vec<f64> = (0..head_dim / 2).map(|j| theta.powf(-2.0 * j as f64 / head_dim as f64)).collect();
        Self::of_frequencies(&turns, positions)
    }

    /// The table for positions `0..positions`, of which each turns pair j by `frequencies[j]`.
    pub fn of_frequencies(frequencies: &[f64], positions: usize) -> Self {
        let half = frequencies.len();
        let angle = |i: usize| (i / half.max(1)) as f64 * frequencies[i % half.max(1)];
        let n = positions * half;
        Self {
            half,
            cos: (0..n).map(|i| angle(i).cos() as f32).collect(),
            sin: (0..n).map(|i| angle(i).sin() as f32).collect(),
        }
    }

    /// How many positions the table has.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    pub(crate) fn half(&self) -> usize {
        self.half
    }

    pub(crate) fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of `positions` (`batch` rows), each `[B, 1, T, E / 2]`.
    pub fn at(&self, positions: &[i32], batch: usize, device: &Device) -> [Tensor<4>; 2] {
        let tokens = positions.len() / batch.max(1);
        [&self.cos, &self.sin].map(|table| {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|&p| {
                    let at = p as usize * self.half;
                    table[at..at + self.half].iter().copied()
                })
                .collect();
            Tensor::from_data(TensorData::new(values, [batch, 1, tokens, self.half]), device)
        })
    }
}

/// Rotates the pairs (j, j + E/2) of `x [B, H, T, E]` by `[cos, sin]` of `[B, 1, T, E / 2]` (see [`RopeTable::at`]).
pub fn rotate_half(x: Tensor<4>, [cos, sin]: [Tensor<4>; 2]) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let a = x.clone().narrow(3, 0, half);
    let b = x.narrow(3, half, half);
    Tensor::cat(vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin], 3)
}
