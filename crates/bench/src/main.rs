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
mod cli;
mod contender;
mod docs;
mod error;
mod kernel_calls;
mod kernels;
mod machine;
mod models;
mod peak;
mod plot;
mod protocol;
mod race;
mod scaling;
mod speedrun;
mod stats;
mod step;
mod table;
mod train;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
