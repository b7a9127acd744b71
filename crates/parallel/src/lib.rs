//! Training on many ranks: how they talk, how they are laid out, and in which order a pipeline works.
//!
//! - [`Communicator`]: all-reduce, reduce-scatter, all-gather, all-to-all, broadcast, send, receive, barrier and split, for
//!   `f32`, `bf16`, integers and bytes, blocking and in the background. Ranks are threads of one process ([`spawn`],
//!   [`Threads`]) or, with the feature `mpi`, processes of MPI (`Mpi`). [`Collectives`] is the trait beneath, for other transports.
//! - [`Mesh`]: the ranks as a grid `dp_replicate × dp_shard × cp × pp × tp`, with experts over the data axes, and a communicator
//!   for each group in which a rank takes part.
//! - [`pipeline`]: schedules (all-forward-all-backward, 1F1B, interleaved, ZB-H1, ZB-V) as lists of actions per rank, a checker
//!   that proves them, a simulator that times them, and cutting a model into stages by cost.
//!
//! - [`Meter`]: what a rank sends, how long it waits for others, and how much of its communication goes on behind its computations.
//!
//! Reductions are made in the order of the ranks: the same bits every time. A rank that panics, ends, hangs, or makes another
//! call than the others is an error on every rank that waits for it, and the error names it.
//!
//! # Example
//!
//! ```
//! use firebox_parallel::{CommError, ReduceOp, spawn};
//!
//! let sums = spawn(4, |comm| {
//!     // Reduced in the background while this thread goes on.
//!     let pending = comm.start_all_reduce(vec![1.0f32; 1000], ReduceOp::Sum)?;
//!
//!     // A ring: each rank sends its number to the next.
//!     let next = (comm.rank() + 1) % comm.size();
//!     let previous = (comm.rank() + comm.size() - 1) % comm.size();
//!     comm.send(vec![comm.rank() as u32], next, 0)?;
//!     assert_eq!(comm.recv::<u32>(previous, 0)?, [previous as u32]);
//!
//!     Ok::<f32, CommError>(pending.wait()?[0])
//! })?;
//! assert_eq!(sums, [4.0; 4]);
//!
//! // A rank that fails takes the others with it, and is named.
//! let error = spawn(3, |comm| {
//!     if comm.rank() == 1 {
//!         return Err("out of data".to_owned());
//!     }
//!     comm.barrier().map_err(|error| error.to_string())
//! });
//! assert_eq!(error.unwrap_err().to_string(), "rank 1 failed: out of data");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod collectives;
mod communicator;
mod element;
mod error;
mod mesh;
mod meter;
#[cfg(feature = "mpi")]
mod mpi;
pub mod pipeline;
mod threads;
mod world;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;
pub use collectives::{Call, Collectives, Lane, Operation, Signature};
pub use communicator::{Communicator, Pending};
pub use element::{Buffer, DType, Element, ReduceOp};
pub use error::{CommError, Result};
pub use half::bf16;
pub use mesh::{Axis, Coordinates, Degrees, Mesh, MeshError};
pub use meter::{Meter, Place, Recorded, Traffic, clock};
pub use world::{DEFAULT_TIMEOUT, Failure, Threads, WorldError, spawn};
