//! Attention over rows that several ranks have divided: each rank gets all tokens of some of the heads (DeepSpeed-Ulysses, Jacobs et al., arXiv:2309.14509).

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;
use firebox_parallel::Communicator;

use super::attention::{AttentionConfig, attention};
use super::collective::{assert_host, done, part};
use super::extension::FusedOps;
use super::ring::assert_divided;
use super::sequence::{Sequence, zigzag};
use super::vjp::{Keep, Sink, Vjp};
use crate::adapter::HostBackend;
use crate::buffers::buffer;

/// The query heads and key-value heads of rank `rank` of `size` where ranks divide `heads` and `kv_heads`: query heads go where their key-value head goes; where there are
/// fewer of those than ranks, ranks have one together. `None` if that does not come out even.
pub fn heads_of_rank(heads: usize, kv_heads: usize, rank: usize, size: usize) -> Option<[Range<usize>; 2]> {
    if kv_heads >= size {
        let kv = part(kv_heads, rank, size);
        let group = heads / kv_heads;
        return Some([kv.start * group..kv.end * group, kv]);
    }
    let even = size.is_multiple_of(kv_heads) && heads.is_multiple_of(size);
    let kv = rank * kv_heads / size;
    even.then(|| [part(heads, rank, size), kv..kv + 1])
}

/// [`attention`] where the ranks of `group` have divided the rows: `qkv` and the output are those of this rank's tokens. All ranks must call it with
/// parts of the same batch.
///
/// An all-to-all brings each rank all tokens of its [heads](heads_of_rank), another one their output to the ranks of its tokens; the same in backward. The gradients of
/// a key-value head that ranks have together are added up in their order.
///
/// # Shapes
/// - `qkv`: `[B, part of T, (H + 2 K) E]`; output `[B, part of T, H E]`
///
/// # Panics
/// As `attention`, and if the heads do not divide, `sequence` is not this rank's [part](Sequence::part), the device is no CPU backend, or a rank of the
/// group fails.
pub fn ulysses_attention(
    qkv: Tensor<3>,
    config: &AttentionConfig,
    sequence: &Sequence,
    group: &Communicator,
) -> Tensor<3> {
    assert_divided(sequence, group);
    assert_host(&qkv.device());
    if group.size() == 1 {
        return attention(qkv, config, sequence);
    }
    let AttentionConfig { n_heads: h, n_kv_heads: k, head_dim: e, .. } = *config;
    assert_eq!(qkv.dims(), [sequence.batch(), sequence.tokens(), config.qkv_width()], "attention: [q | k | v] rows");
    let heads: Option<Vec<_>> = (0..group.size()).map(|rank| heads_of_rank(h, k, rank, group.size())).collect();
    let heads = match heads {
        Some(heads) => heads,
        None => panic!("attention: {h} heads and {k} key-value heads cannot be divided among {} ranks", group.size()),
    };
    let [queries, keys] = heads[group.rank()].clone();
    let wide = |heads: &Range<usize>, first: usize| (first + heads.start) * e..(first + heads.end) * e;
    let all = heads.iter().map(|[q, kv]| vec![wide(q, 0), wide(kv, h), wide(kv, h + k)]).collect();
    let outputs = heads.iter().map(|[q, _]| vec![wide(q, 0)]).collect();
    let swap = |x: Tensor<3>, columns: Vec<Vec<Range<usize>>>, to_columns: bool| {
        let op = Swap { sequence: sequence.clone(), columns: columns.into(), group: group.clone(), to_columns };
        Tensor::from_dispatch(Dispatch::fused_swap(x.into_dispatch(), op))
    };
    let config = AttentionConfig { n_heads: queries.len(), n_kv_heads: keys.len(), ..config.clone() };
    let out = attention(swap(qkv, all, true), &config, sequence.whole());
    swap(out, outputs, false)
}

/// From some tokens with all columns to all tokens with some columns, or back, by an all-to-all.
#[derive(Clone, Debug)]
pub(crate) struct Swap {
    /// This rank's tokens.
    sequence: Sequence,
    /// Those of each rank; several may have the same.
    columns: Arc<[Vec<Range<usize>>]>,
    group: Communicator,
    to_columns: bool,
}

impl Swap {
    fn width(&self, rank: usize) -> usize {
        self.columns[rank].iter().map(Range::len).sum()
    }

    /// How many columns there are.
    fn all_columns(&self) -> usize {
        self.columns.iter().flatten().map(|columns| columns.end).max().unwrap_or(0)
    }

    /// Where each rank's tokens are, by rows, in the whole batch.
    fn runs(&self, rank: usize) -> Vec<Range<usize>> {
        let (whole, size) = (self.sequence.whole(), self.group.size());
        let t = whole.tokens();
        let rows = 0..whole.batch();
        rows.flat_map(|b| zigzag(t, rank, size).map(|chunk| b * t + chunk.start..b * t + chunk.end)).collect()
    }

    fn tokens(&self, rank: usize) -> usize {
        self.runs(rank).iter().map(Range::len).sum()
    }

    fn exchange(&self, data: Vec<f32>, count: impl Fn(usize) -> usize) -> Vec<f32> {
        let counts: Vec<usize> = (0..self.group.size()).map(count).collect();
        let (came, _) = done(self.group.all_to_all(&data, &counts));
        came
    }

    /// All tokens of this rank's columns from all columns of its tokens.
    fn to_columns(&self, x: &[f32]) -> Vec<f32> {
        let (size, mine) = (self.group.size(), self.group.rank());
        let all = self.all_columns();
        let rows = x.len() / all;
        let mut data = Vec::with_capacity((0..size).map(|rank| rows * self.width(rank)).sum());
        for columns in self.columns.iter() {
            for row in x.chunks_exact(all) {
                columns.iter().for_each(|columns| data.extend_from_slice(&row[columns.clone()]));
            }
        }
        let came = self.exchange(data, |rank| rows * self.width(rank));
        let width = self.width(mine);
        let mut out = buffer(self.sequence.whole().batch() * self.sequence.whole().tokens() * width);
        let mut rest = &came[..];
        for run in (0..size).flat_map(|rank| self.runs(rank)) {
            let (here, later) = rest.split_at(run.len() * width);
            out[run.start * width..run.end * width].copy_from_slice(here);
            rest = later;
        }
        out
    }

    /// All columns of this rank's tokens from all tokens of its columns: what several ranks have is added up.
    fn to_tokens(&self, x: &[f32]) -> Vec<f32> {
        let (size, mine) = (self.group.size(), self.group.rank());
        let width = self.width(mine);
        let mut data = Vec::with_capacity(x.len());
        for run in (0..size).flat_map(|rank| self.runs(rank)) {
            data.extend_from_slice(&x[run.start * width..run.end * width]);
        }
        let came = self.exchange(data, |rank| self.tokens(rank) * width);
        let (all, rows) = (self.all_columns(), self.tokens(mine));
        let mut out = buffer(rows * all);
        out.fill(0.0);
        let mut rest = &came[..];
        for columns in self.columns.iter() {
            for row in out.chunks_exact_mut(all) {
                for columns in columns {
                    let (here, later) = rest.split_at(columns.len());
                    row[columns.clone()].iter_mut().zip(here).for_each(|(sum, x)| *sum += x);
                    rest = later;
                }
            }
        }
        out
    }

    /// The values there, and their shape.
    fn swapped(&self, x: &[f32], to_columns: bool) -> (Vec<f32>, [usize; 3]) {
        let (part, whole) = (&self.sequence, self.sequence.whole());
        if to_columns {
            (self.to_columns(x), [whole.batch(), whole.tokens(), self.width(self.group.rank())])
        } else {
            (self.to_tokens(x), [part.batch(), part.tokens(), self.all_columns()])
        }
    }
}

/// One way is the other's gradient.
impl Vjp<1> for Swap {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let (values, shape) = self.swapped(B::values(x).as_ref(), self.to_columns);
        B::tensor(values, &shape)
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let (values, shape) = self.swapped(B::values(grad).as_ref(), !self.to_columns);
        [dx.put(&shape, values)]
    }
}
