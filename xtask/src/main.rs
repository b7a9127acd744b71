//! `cargo xtask`: the commands with which one uses and develops Firebox.
//!
//! ```text
//! cargo xtask train            build Firebox and train a small model
//! cargo xtask test --install   install what the tests need, then run them all
//! cargo xtask bench            measure Firebox beside PyTorch
//! cargo xtask tidy             format, lints, documentation, layering rules
//! cargo xtask setup            say what this machine lacks
//! cargo xtask docs             build the API documentation and the book
//! ```
//!
//! It depends on no other crate of the workspace and on nothing heavy, so that it is there within seconds of a fresh
//! clone. Each command says what it runs and how long that took.

mod bench;
mod cargo;
mod docs;
mod error;
mod say;
mod setup;
mod test;
mod tidy;
mod train;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// Builds, runs, tests and checks Firebox.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    Train(train::Train),
    Test(test::Test),
    Bench(bench::Bench),
    Tidy(tidy::Tidy),
    Setup(setup::Setup),
    Docs(docs::Docs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = Workspace::locate().and_then(|workspace| match cli.command {
        Task::Train(task) => task.run(&workspace),
        Task::Test(task) => task.run(&workspace),
        Task::Bench(task) => task.run(&workspace),
        Task::Tidy(task) => task.run(&workspace),
        Task::Setup(task) => task.run(&workspace),
        Task::Docs(task) => task.run(&workspace),
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}
