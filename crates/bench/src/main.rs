//! The program that `cargo xtask bench` starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    match firebox_bench::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
