//! Raw text in, training batches out.
//!
//! ```text
//! files, folders, globs -> documents -> filters, duplicates -> tokens in memory-mapped shards -> batches
//! ```
//!
//! - [`prepare`] reads .txt, .md, .rs, .jsonl (also gzip and Zstandard) and .parquet, one document at a time; makes or
//!   loads a [`Tokenizer`]; holds out documents for validation; writes token shards into a cache that is keyed by the
//!   contents of the files. Text of any size passes through bounded memory, and bytes that are not UTF-8 stay as they are.
//! - [`Loader`] makes batches as a pure function of a seed and a sample number, so that a run can be resumed anywhere and
//!   any number of ranks sees the same order. Every token is a target once per epoch.
//! - [`Dataset::val_batches`] passes over the held-out tokens in order, for loss and bits per byte.
//!
//! # Example
//!
//! ```
//! use firebox_data::{DataConfig, Source, ValSplit, prepare};
//!
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! std::fs::write(folder.join("a.txt"), "The quick brown fox jumps over the lazy dog.\n".repeat(50))?;
//!
//! let config = DataConfig { tokenizer: "char".into(), val_split: ValSplit::Tail, ..DataConfig::default() };
//! let source = Source::new([folder.join("*.txt").to_string_lossy()]);
//! let data = prepare(&config, &[source], &folder.join("cache"), &mut |_| {})?;
//! println!("{}", data.stats);
//!
//! let loader = data.train_loader(16, 42)?;
//! let batch = loader.batch(0, 4);
//! assert_eq!(batch.inputs.len(), 4 * 16);
//! // The same rows, as two ranks would ask for them.
//! assert_eq!(batch.inputs[2 * 16..], loader.batch(2, 2).inputs);
//!
//! let text = data.tokenizer.decode(&data.train[0].tokens(0..20));
//! assert_eq!(text, b"The quick brown fox ");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The order of things
//!
//! Paths are read in the order in which they are given, sorted inside folders and globs. A document's side of the split
//! is decided by the hash of its bytes alone ([`ValSplit::Hash`]), so that renaming and reordering files moves none; where
//! fewer documents than that needs leave one side empty, the last part of the text is held out instead, and
//! [`Stats::split_fell_back`] says so. Of duplicates the first one read is kept.

mod cache;
mod config;
mod error;
mod files;
mod hash;
pub mod images;
pub mod loader;
mod minhash;
mod parquet_file;
mod permute;
mod prepare;
mod read;
mod records;
mod scan;
pub mod shard;
mod stats;
pub mod template;
pub mod tokenizer;

pub use config::{DataConfig, Filters, Source, ValSplit};
pub use error::DataError;
pub use files::{Compression, CorpusFile, Format, list_files};
pub use loader::{Batch, IGNORE_INDEX, Loader, LoaderConfig, ValBatches};
pub use prepare::{Dataset, Progress, prepare};
pub use read::{PART_BYTES, Part, read_documents};
pub use records::{Order, Record, hold_out, read_records};
pub use shard::TokenStream;
pub use stats::Stats;
pub use template::{Answered, Chat, ChatTemplate, Example};
pub use tokenizer::{END_OF_TEXT, Encoded, SMALLEST_BPE, Tokenizer};
