//! Where each token of a batch stands, and the rotations of positions.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Tensor, TensorData};

/// Positions and segments of a batch of `[B, T]` tokens: what attention needs to know besides the values. Cheap to clone; made once
/// per batch and shared by all layers.
#[derive(Clone, Debug)]
pub struct Sequence(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    batch: usize,
    tokens: usize,
    positions: Vec<i32>,
    starts: Vec<u32>,
    // What composed attention needs on its device, made at the first layer.
    mask: OnceLock<(Option<usize>, Tensor<4, Bool>)>,
    rotation: OnceLock<[Tensor<4>; 2]>,
}

impl Sequence {
    /// A batch of `batch` rows whose tokens stand at `positions` and belong to `segments` (documents, numbered along each row); both
    /// `[B, T]`. Attention does not cross segments.
    ///
    /// # Panics
    /// If the lengths are not `B T`, a position is negative, or a segment number decreases along a row.
    pub fn new(batch: usize, tokens: usize, positions: Vec<i32>, segments: &[i32]) -> Self {
        let n = batch * tokens;
        assert!(
            positions.len() == n && segments.len() == n,
            "sequence: {batch} rows of {tokens} tokens need {n} positions and segments"
        );
        assert!(positions.iter().all(|&p| p >= 0), "sequence: negative position");
        let mut starts = Vec::with_capacity(n);
        for row in segments.chunks_exact(tokens.max(1)) {
            let mut start = 0;
            for (i, &segment) in row.iter().enumerate() {
                if i > 0 && segment != row[i - 1] {
                    assert!(segment > row[i - 1], "sequence: segment numbers decrease along a row");
                    start = i as u32;
                }
                starts.push(start);
            }
        }
        Self(Arc::new(Inner { batch, tokens, positions, starts, mask: OnceLock::new(), rotation: OnceLock::new() }))
    }

    /// Rows of one segment each, at positions `0..tokens`.
    pub fn plain(batch: usize, tokens: usize) -> Self {
        let positions = (0..batch).flat_map(|_| 0..tokens as i32).collect();
        Self::new(batch, tokens, positions, &vec![0; batch * tokens])
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

    /// First token of each token's segment, `[B, T]`.
    pub(crate) fn starts(&self) -> &[u32] {
        &self.0.starts
    }

    /// `[B, 1, T, T]`, true where a query must not see a key. One window serves all layers of a model.
    pub(crate) fn mask(&self, window: Option<usize>, device: &Device) -> Tensor<4, Bool> {
        let (batch, t) = (self.0.batch, self.0.tokens);
        let make = || {
            let hidden: Vec<bool> = (0..batch * t)
                .flat_map(|i| {
                    let (start, last) = (self.0.starts[i] as usize, i % t);
                    let first = start.max((last + 1).saturating_sub(window.unwrap_or(usize::MAX)));
                    (0..t).map(move |key| key < first || key > last)
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
        let half = head_dim / 2;
        let angle = |i: usize| {
            let (p, j) = (i / half.max(1), i % half.max(1));
            p as f64 * theta.powf(-2.0 * j as f64 / head_dim as f64)
        };
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
