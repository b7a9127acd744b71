//! Checkpoint folders that survive a crash, a kill and a full disk.
//!
//! # Layout
//!
//! ```text
//! RUN/checkpoints/
//!   step-1000/                 a finished checkpoint; the name appears only when everything below is on the disk
//!     model.safetensors        parameters, under Hugging Face names where the architecture has them
//!     config.json              the architecture
//!     tokenizer.json           the tokenizer
//!     optimizer/*.safetensors  the optimizer's state
//!     state.json               step, seeds, loader position, schedule, recipe hash
//!     manifest.json            size and SHA-256 of every file above (large ones by pieces), the step, the metric, a checksum of itself
//!   .step-2000.tmp-4711/       being written by process 4711 (its folder is locked while that process lives)
//!   .step-1000.old-4711.0/     the former step-1000, for the moment between the two renames that replace it
//!   .step-500.gone-4711.1/     being deleted
//! ```
//!
//! Which files a checkpoint holds is the caller's choice; this module fixes only `manifest.json` and how folders come
//! and go. It works on host memory and knows neither a model nor a device.
//!
//! # Guarantees
//!
//! - **All or nothing.** [`Writer`] writes aside, flushes every file and folder to the disk, writes the manifest last,
//!   and renames. A process killed at any moment leaves either the whole new checkpoint or none of it, and never
//!   touches an earlier one. Writing a step again replaces it with the same guarantee.
//! - **A full disk costs only the checkpoint being written.** Its folder is removed at once, and
//!   [`CheckpointError::Full`] says how much was needed and how much is free.
//! - **Damage is seen.** [`Checkpoint::open`] compares the size and SHA-256 of each file with the manifest, and the
//!   manifest with its own checksum. [`find_latest`] steps back over damaged checkpoints and says which and why.
//! - **Nothing from outside is trusted.** Names in manifests and shard indices cannot leave their folder, lengths are
//!   checked before memory is taken, and tensor offsets are validated before the first byte is read.
//! - **Bounded memory.** Tensors are written and read one at a time.
//! - **The same content gives the same bytes**, so two checkpoints can be compared file by file.
//!
//! Files must not be changed in place while a [`TensorFile`] is open on them, because it is a memory map. Everything in
//! this module replaces files by renaming, and so keeps to that.
//!
//! # Example
//!
//! ```
//! use firebox_train::checkpoint::{Dtype, TensorSpec, Writer, encode_f32, find_latest, prune};
//! use std::collections::BTreeMap;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let run = tempfile::tempdir()?;
//! let dir = run.path().join("checkpoints");
//!
//! for step in [100, 200, 300] {
//!     let specs = [TensorSpec::f32("lm_head.weight", [2, 3]), TensorSpec::new("norm.weight", [3], Dtype::BF16)];
//!     // Each tensor is fetched only when it is its turn.
//!     let data = specs.iter().map(|spec| {
//!         let values = vec![step as f32; spec.shape.iter().product()];
//!         encode_f32(&values, spec.dtype).expect("a float type").into_owned()
//!     });
//!     let mut writer = Writer::create(&dir, step)?;
//!     writer.tensors("model.safetensors", &BTreeMap::new(), &specs, data)?;
//!     writer.json("state.json", &serde_json::json!({ "step": step }))?;
//!     writer.finish_with_metric(Some(1.0 / step as f64))?; // validation loss: lower is better
//! }
//! prune(&dir, 2, true)?; // the last two, and the best
//!
//! let found = find_latest(&dir)?;
//! assert_eq!(found.checkpoint.step(), 300);
//! assert!(found.skipped.is_empty()); // damaged ones would be listed here
//! let tensors = found.checkpoint.tensors("model.safetensors")?;
//! assert_eq!(tensors.shape("lm_head.weight")?, [2, 3]);
//! assert_eq!(tensors.f32("norm.weight")?, [300.0; 3]);
//! # Ok(())
//! # }
//! ```

mod error;
mod folder;
mod manifest;
mod pieces;
mod reader;
mod report;
mod retain;
mod tensors;
mod writer;

pub use error::CheckpointError;
pub use manifest::MANIFEST;
pub(crate) use pieces::{Hash, PieceWriter, TensorPlan};
pub use reader::{Checkpoint, Found, Skipped, Verify, find_best, find_latest, resolve};
pub use report::{LoadReport, WrongShape};
pub use retain::{Pruned, prune};
pub use safetensors::Dtype;
pub(crate) use tensors::header;
pub use tensors::{TensorFile, TensorSpec, encode_f32};
pub use writer::Writer;
