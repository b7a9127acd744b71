//! The `firebox` command: the only place that knows flags.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
