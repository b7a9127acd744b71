//! Rows of a table.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData};

use super::collective::assert_host;
use super::extension::FusedOps;
use super::vjp::{Keep, Sink, Vjp, dims, map1};
use crate::adapter::HostBackend;
use crate::buffers::buffer;
use crate::device::is_fused;
use crate::kernels::embedding as kernel;

/// `table[ids]` as `[B, T, D]`.
///
/// # Shapes
/// - `table`: `[V, D]`, `ids`: `B * T` values
///
/// # Panics
/// If an id is not in the table, or there are not `batch * tokens` ids.
pub fn embedding(table: Tensor<2>, ids: Arc<[i32]>, batch: usize, tokens: usize) -> Tensor<3> {
    let [v, d] = table.dims();
    assert_eq!(ids.len(), batch * tokens, "embedding: {} ids for {batch} rows of {tokens} tokens", ids.len());
    if let Some(bad) = ids.iter().find(|&&id| id < 0 || id as usize >= v) {
        panic!("embedding: id {bad} is not in the table of {v} rows");
    }
    if is_fused(&table.device()) {
        let op = Embedding { vocab: v, ids, batch, tokens };
        return Tensor::from_dispatch(Dispatch::fused_embedding(table.into_dispatch(), op));
    }
    let data = TensorData::new(ids.to_vec(), [batch * tokens]);
    let ids = Tensor::<1, Int>::from_data(data, &table.device());
    table.select(0, ids).reshape([batch, tokens, d])
}

/// This rank's share of `table[ids]`, of whose table it has the rows from `first` on: zeros for ids in other ranks' rows. The sum over
/// the ranks is [`embedding`].
///
/// # Shapes
/// - `table`: `[part of V, D]`, `ids`: `B * T` values below V = `vocab`; output `[B, T, D]`
///
/// # Panics
/// If an id is not in the whole table, there are not `batch * tokens` ids, or the device is no CPU backend.
pub fn vocab_embedding(
    table: Tensor<2>,
    first: usize,
    vocab: usize,
    ids: &[i32],
    batch: usize,
    tokens: usize,
) -> Tensor<3> {
    let rows = table.dims()[0];
    assert_eq!(ids.len(), batch * tokens, "embedding: {} ids for {batch} rows of {tokens} tokens", ids.len());
    if let Some(bad) = ids.iter().find(|&&id| id < 0 || id as usize >= vocab) {
        panic!("embedding: id {bad} is not in the table of {vocab} rows");
    }
    assert_host(&table.device());
    let here = first..first + rows;
    let ids = ids.iter().map(|&id| if here.contains(&(id as usize)) { id - first as i32 } else { -1 }).collect();
    let op = Embedding { vocab: rows, ids, batch, tokens };
    Tensor::from_dispatch(Dispatch::fused_embedding(table.into_dispatch(), op))
}

/// See [`embedding`]; ids of -1 give rows of zeros.
#[derive(Clone, Debug)]
pub(crate) struct Embedding {
    /// Rows of the table.
    vocab: usize,
    ids: Arc<[i32]>,
    batch: usize,
    tokens: usize,
}

/// Of the table, whose values backward does not need.
impl Vjp<1> for Embedding {
    const KEEPS: [Keep; 1] = [Keep::Nothing];

    fn forward<B: HostBackend>(&self, [table]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        let d = dims::<B>(&table)[1];
        let shape = [self.batch, self.tokens, d];
        match B::bits(table) {
            Ok(bits) => {
                let mut out = buffer(shape.iter().product());
                kernel::gather_bf16(bits.as_ref(), d, &self.ids, &mut out);
                B::tensor(out, &shape)
            }
            Err(table) => map1::<B>(table, &shape, |table, out| kernel::gather(table, d, &self.ids, out)),
        }
    }

    fn backward<B: HostBackend>(
        &self,
        _: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dtable]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let d = dims::<B>(&grad)[2];
        let dy = B::values(grad);
        [dtable.fill(&[self.vocab, d], |dtable, into| {
            kernel::scatter(dy.as_ref(), d, &self.ids, dtable, into);
        })]
    }
}
