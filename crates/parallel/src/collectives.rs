//! What an engine does: the trait beneath [`Communicator`](crate::Communicator), on bytes and safe to hold as an object.

use std::fmt;
use std::sync::Arc;

use crate::element::{Buffer, DType, ReduceOp};
use crate::error::Result;

/// What a call is, as errors name it and as ranks compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant is named after the method of Communicator")]
pub enum Operation {
    Barrier,
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    AllToAll,
    Broadcast {
        /// The rank in the group that has the data.
        root: usize,
    },
    Split,
    Send {
        /// The receiver, as numbered in the group.
        to: usize,
        tag: u32,
    },
    Recv {
        /// The sender, as numbered in the group.
        from: usize,
        tag: u32,
    },
}

/// An operation with the type and number of elements on which ranks must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The operation.
    pub operation: Operation,
    /// Element type and count of the whole (of `out` for all-gather); `None` where there is nothing to agree on.
    pub data: Option<(DType, usize)>,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Operation::Barrier => write!(f, "barrier")?,
            Operation::AllReduce(op) => write!(f, "all_reduce ({op})")?,
            Operation::ReduceScatter(op) => write!(f, "reduce_scatter ({op})")?,
            Operation::AllGather => write!(f, "all_gather")?,
            Operation::AllToAll => write!(f, "all_to_all")?,
            Operation::Broadcast { root } => write!(f, "broadcast from {root}")?,
            Operation::Split => write!(f, "split")?,
            Operation::Send { to, tag } => write!(f, "send to {to} (tag {tag})")?,
            Operation::Recv { from, tag } => write!(f, "recv from {from} (tag {tag})")?,
        }
        match self.data {
            // What is sent all to all has no size on which ranks agree, only a type.
            Some((dtype, _)) if self.operation == Operation::AllToAll => write!(f, " of {dtype}"),
            Some((dtype, len)) => write!(f, " of {len} {dtype}"),
            None => Ok(()),
        }
    }
}

/// A collective call with its buffers, which are in the machine's byte order and aligned for `dtype`.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields are those of the methods of Communicator")]
pub enum Call<'a> {
    Barrier,
    AllReduce {
        data: &'a mut [u8],
        dtype: DType,
        op: ReduceOp,
    },
    ReduceScatter {
        data: &'a [u8],
        out: &'a mut [u8],
        dtype: DType,
        op: ReduceOp,
    },
    AllGather {
        data: &'a [u8],
        out: &'a mut [u8],
        dtype: DType,
    },
    AllToAll {
        data: &'a [u8],
        dtype: DType,
        /// Elements for each rank; they add up to `data`.
        counts: &'a [usize],
        /// Becomes what was received, in the order of the ranks.
        out: &'a mut Buffer,
        /// Becomes the elements received from each rank.
        out_counts: &'a mut Vec<usize>,
    },
    Broadcast {
        data: &'a mut [u8],
        dtype: DType,
        root: usize,
    },
    /// An all-gather of one color and key per rank, from which each computes the groups.
    Split {
        data: &'a [u8],
        out: &'a mut [u8],
    },
}

impl Call<'_> {
    /// What the ranks must agree on.
    pub fn signature(&self) -> Signature {
        let of = |dtype: DType, bytes: usize| Some((dtype, bytes / dtype.size()));
        let (operation, data) = match self {
            Self::Barrier => (Operation::Barrier, None),
            Self::AllReduce { data, dtype, op } => (Operation::AllReduce(*op), of(*dtype, data.len())),
            Self::ReduceScatter { data, dtype, op, .. } => (Operation::ReduceScatter(*op), of(*dtype, data.len())),
            Self::AllGather { out, dtype, .. } => (Operation::AllGather, of(*dtype, out.len())),
            Self::AllToAll { dtype, .. } => (Operation::AllToAll, of(*dtype, 0)),
            Self::Broadcast { data, dtype, root } => (Operation::Broadcast { root: *root }, of(*dtype, data.len())),
            Self::Split { .. } => (Operation::Split, None),
        };
        Signature { operation, data }
    }
}

/// Blocking and non-blocking calls go through lanes of their own, so that one never waits for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Calls that the caller waits for.
    Blocking = 0,
    /// Calls of the communication thread.
    Background = 1,
}

/// A group of ranks as one of them sees it. Use it through [`Communicator`](crate::Communicator), which gives it types and
/// checks arguments; implement it to bring another transport.
///
/// An engine promises that
/// - reductions are made in the order of the ranks, with [`bf16`](half::bf16) widened to `f32`: the same bits in every engine and run;
/// - calls of one lane are matched across the ranks in their order, lanes independently of each other;
/// - no call waits longer than the timeout of the world for other ranks, and its error names them;
/// - calls that do not match are an error on every rank.
pub trait Collectives: Send + Sync {
    /// The number of this rank in the group.
    fn rank(&self) -> usize;

    /// The world's number of each rank of the group.
    fn world_ranks(&self) -> &[usize];

    /// Makes a collective call and returns when this rank's part is done and its buffers are its own again.
    fn call(&self, lane: Lane, call: Call<'_>) -> Result<()>;

    /// Hands a message over and returns without waiting for the receiver.
    fn send(&self, to: usize, tag: u32, message: Buffer) -> Result<()>;

    /// Takes the next place in the queue for messages from a rank with a tag.
    fn post_recv(&self, from: usize, tag: u32) -> Result<u64>;

    /// Waits for the message of a place in the queue.
    fn recv(&self, from: usize, tag: u32, place: u64) -> Result<Buffer>;

    /// A new group of all ranks that give the same color, ordered by key, then by rank; `None` for no color.
    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn Collectives>>>;

    /// Tells all ranks of the world, where that can be done, that this one gives up.
    fn abandon(&self, why: &str);
}

/// The members of this rank's new group, as ranks of the old one, from all colors (-1 for none) and keys.
pub(crate) fn members(gathered: &[i64], color: u32) -> Vec<usize> {
    let mut members: Vec<(i64, usize)> = gathered
        .chunks_exact(2)
        .enumerate()
        .filter(|(_, pair)| pair[0] == i64::from(color))
        .map(|(rank, pair)| (pair[1], rank))
        .collect();
    members.sort_unstable();
    members.into_iter().map(|(_, rank)| rank).collect()
}
