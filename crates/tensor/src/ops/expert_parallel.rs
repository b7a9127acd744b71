//! Experts that ranks have divided among them (GShard, Lepikhin et al., arXiv:2006.16668): rows travel to the ranks of their experts and back.

use std::sync::Arc;

use burn::tensor::Tensor;
use firebox_parallel::Communicator;

use super::collective::{done, exchange_rows, part};
use super::experts::Routing;
use crate::kernels::experts::Group;

/// The way of a batch's rows to the ranks of their experts: each rank of a group has its own batch, and its [`part`] of the experts.
#[derive(Clone, Debug)]
pub struct Exchange {
    group: Communicator,
    /// Rows for each rank.
    sent: Arc<[usize]>,
    /// Rows from each rank.
    received: Arc<[usize]>,
    groups: Arc<[Group]>,
}

impl Exchange {
    /// Tells the other ranks how many rows come. All of the group must call it.
    ///
    /// # Panics
    /// If a rank of the group fails, see the [collectives](super::collective).
    pub fn new(routing: &Routing, group: &Communicator) -> Self {
        let (n, size) = (routing.n_experts(), group.size());
        let rows: Vec<u32> = routing.groups().iter().map(|group| group.rows as u32).collect();
        let parts: Vec<_> = (0..size).map(|rank| part(n, rank, size)).collect();
        let counts: Vec<usize> = parts.iter().map(ExactSizeIterator::len).collect();
        let mine = counts[group.rank()];
        let (coming, _) = done(group.all_to_all(&rows, &counts));
        // Of each rank its rows, sorted by expert.
        let groups = coming.iter().enumerate().map(|(i, &rows)| Group { expert: i % mine, rows: rows as usize });
        let total = |rows: &[u32]| rows.iter().map(|&rows| rows as usize).sum::<usize>();
        Self {
            sent: parts.iter().map(|part| total(&rows[part.clone()])).collect(),
            received: coming.chunks(mine.max(1)).map(total).collect(),
            groups: groups.collect(),
            group: group.clone(),
        }
    }

    /// Which of this rank's experts, counted from its first, the rows that have come go to.
    pub fn groups(&self) -> &Arc<[Group]> {
        &self.groups
    }

    /// The rows of all ranks for this rank's experts, from the rows of this rank's tokens.
    ///
    /// # Shapes
    /// - `x`: `[rows, D]` as of [`dispatch`](super::experts::dispatch); output `[rows received, D]`
    ///
    /// # Panics
    /// If `x` is not on a CPU backend, or a rank of the group fails, here or in backward.
    pub fn there(&self, x: Tensor<2>) -> Tensor<2> {
        exchange_rows(x, [self.sent.clone(), self.received.clone()], &self.group)
    }

    /// The way back.
    ///
    /// # Shapes
    /// - `y`: `[rows received, D]`; output `[rows, D]`
    ///
    /// # Panics
    /// As [`there`](Self::there).
    pub fn back(&self, y: Tensor<2>) -> Tensor<2> {
        exchange_rows(y, [self.received.clone(), self.sent.clone()], &self.group)
    }
}
