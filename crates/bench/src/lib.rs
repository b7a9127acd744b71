//! # firebox-bench
//!
//! The benchmark: Firebox beside PyTorch and plain burn. Started by `cargo xtask bench`, which builds it and installs PyTorch in
//! the target folder.
//!
//! Every contender is a child process (`protocol`). The driver starts them all and lets them work in turns (`race`), so that whatever
//! else the machine does meets all of them alike; results are medians over the rounds. They are printed as Markdown, kept as JSON, and
//! with `--write-docs` put into docs/benchmarks.md.

#[cfg(feature = "baseline")]
mod baseline;
pub mod cli;
mod compress;
pub mod contender;
mod docs;
pub mod error;
mod kernel_calls;
pub mod kernels;
mod machine;
pub mod models;
mod mup;
mod optim;
mod peak;
mod plot;
pub mod protocol;
mod quality;
pub mod race;
mod scaling;
mod shootout;
mod speedrun;
mod stats;
mod step;
mod table;
mod train;
mod worker;
