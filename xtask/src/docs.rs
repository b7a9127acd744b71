//! `cargo xtask docs`: the API documentation and the book.

use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Args;

use crate::cargo::{cargo, output, run};
use crate::error::Result;
use crate::say;
use crate::tidy::{links, text_files};
use crate::workspace::Workspace;

/// Checks the links between documents, then builds the API documentation and the book.
///
/// The book needs `mdbook` (`cargo install mdbook --locked`); without it the other two are done.
#[derive(Args)]
pub struct Docs {
    /// Open the API documentation in the browser when it is built.
    #[arg(long)]
    open: bool,
}

impl Docs {
    /// Checks, builds, and says where the results are.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        say::heading("links between documents");
        let files = text_files(&workspace.root)?;
        let findings = links::check(&workspace.root, &files);
        for finding in &findings {
            eprintln!("{finding}");
        }
        let start = Instant::now();
        say::heading("API documentation (rustdoc)");
        let mut doc = cargo(workspace);
        doc.args(["doc", "--release", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings");
        if self.open {
            doc.args(["--open", "-p", "firebox"]);
        }
        run(&mut doc)?;
        println!("{} ({})", workspace.target.join("doc/firebox/index.html").display(), say::duration(start.elapsed()));
        say::heading("the book (mdbook)");
        if output("mdbook", &["--version"]).is_some() {
            let book = workspace.target.join("book");
            run(Command::new("mdbook").arg("build").arg(workspace.root.join("docs")).arg("--dest-dir").arg(&book))?;
            println!("{}", book.join("index.html").display());
        } else {
            println!("not built: mdbook is missing; cargo install mdbook --locked");
        }
        if findings.is_empty() {
            Ok(ExitCode::SUCCESS)
        } else {
            eprintln!("{} between documents", say::plural(findings.len(), "broken link"));
            Ok(ExitCode::FAILURE)
        }
    }
}
