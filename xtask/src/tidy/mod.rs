//! `cargo xtask tidy`: what the project has agreed, as code that fails.

mod layers;
pub mod links;
mod sources;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Args;

use crate::cargo::{cargo, line, status};
use crate::error::{Error, Result};
use crate::say;
use crate::workspace::Workspace;

/// Checks format, lints, documentation and the rules of the workspace.
///
/// The rules: crates depend on each other in one direction only and take every dependency from the root manifest's
/// table; burn stays out of the data crate and of xtask; backend features are named in one device module; a panic says
/// why it cannot happen; every crate opens with documentation; no file is longer than one reads in a sitting; no path of
/// somebody's machine; links between documents lead somewhere.
#[derive(Args)]
#[command(after_help = "A finding names the file, the line and what to do. `cargo fmt` repairs the format.")]
pub struct Tidy {
    /// Check only the rules and the format, which takes a second.
    #[arg(long)]
    fast: bool,
}

impl Tidy {
    /// Runs the checks and reports.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        let checks = if self.fast { fast(workspace)? } else { run_all(workspace)? };
        let failed: Vec<&str> = checks.iter().filter(|check| !check.passed).map(|check| check.name).collect();
        if failed.is_empty() {
            eprintln!("tidy: all {} passed", say::plural(checks.len(), "check"));
            Ok(ExitCode::SUCCESS)
        } else {
            eprintln!("tidy: failed: {}", failed.join(", "));
            Ok(ExitCode::FAILURE)
        }
    }
}

/// One check and how it ended.
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// Whether nothing was found.
    pub passed: bool,
}

/// Something that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where, relative to the root.
    pub path: PathBuf,
    /// The line, from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

impl Finding {
    fn new(path: &Path, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.line {
            0 => write!(f, "{path}: {}", self.message),
            line => write!(f, "{path}:{line}: {}", self.message),
        }
    }
}

/// All checks, quick ones first. A check that fails does not stop those after it.
pub fn run_all(workspace: &Workspace) -> Result<Vec<Check>> {
    let mut checks = fast(workspace)?;
    // Clippy and rustdoc check the dependencies once, for both, in the profile in which they are built: macros and
    // build scripts are those of the build.
    let mut clippy = cargo(workspace);
    clippy.args(["clippy", "--release", "--workspace", "--all-targets", "--locked"]).args(["--", "-D", "warnings"]);
    let mut doc = cargo(workspace);
    doc.args(["doc", "--release", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings");
    checks.push(command("lints", &mut clippy)?);
    checks.push(command("documentation", &mut doc)?);
    Ok(checks)
}

fn fast(workspace: &Workspace) -> Result<Vec<Check>> {
    let files = text_files(&workspace.root)?;
    let mut format = cargo(workspace);
    // The names of the files are enough: `cargo fmt` repairs them.
    format.args(["fmt", "--all", "--", "--check", "-l"]);
    Ok(vec![
        command("format", &mut format)?,
        found("layers", || layers::check(workspace))?,
        found("sources", || Ok(sources::check(&files)))?,
        found("links", || Ok(links::check(&workspace.root, &files)))?,
    ])
}

fn command(name: &'static str, command: &mut Command) -> Result<Check> {
    let start = Instant::now();
    eprintln!("    {}", line(command));
    let passed = status(command)?.success();
    report(name, passed, start);
    Ok(Check { name, passed })
}

fn found(name: &'static str, check: impl FnOnce() -> Result<Vec<Finding>>) -> Result<Check> {
    let start = Instant::now();
    let findings = check()?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    let passed = findings.is_empty();
    report(name, passed, start);
    Ok(Check { name, passed })
}

fn report(name: &str, passed: bool, start: Instant) {
    let verdict = if passed { "ok" } else { "FAILED" };
    eprintln!("    {name} {verdict} ({})", say::duration(start.elapsed()));
}

/// A text file of the repository.
pub struct TextFile {
    /// Relative to the root.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

impl TextFile {
    /// Whether the name ends so.
    pub fn is(&self, extension: &str) -> bool {
        self.path.extension().is_some_and(|found| found == extension)
    }
}

/// The extensions of files that people write.
const TEXT: [&str; 9] = ["rs", "toml", "md", "py", "sh", "yml", "yaml", "txt", "json"];

/// Folders that hold no sources: build outputs, runs, the built book, version control.
const SKIPPED: [&str; 6] = ["target", "runs", "book", ".git", "__pycache__", "node_modules"];

/// Reads the text files of the repository, in a fixed order.
pub fn text_files(root: &Path) -> Result<Vec<TextFile>> {
    let mut files = vec![];
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(Error::io("read the folder", &folder))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("read the folder", &folder))?;
            let path = entry.path();
            let name = entry.file_name();
            let kind = entry.file_type().map_err(Error::io("look at", &path))?;
            if kind.is_dir() {
                if !SKIPPED.iter().any(|skipped| name == *skipped) {
                    folders.push(path);
                }
            } else if kind.is_file() && is_text(&path) {
                let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
                // Test data may be arbitrary bytes.
                if let Ok(text) = String::from_utf8(bytes) {
                    let path = path.strip_prefix(root).unwrap_or(&path).to_owned();
                    files.push(TextFile { path, text });
                }
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// A known extension, or a script without one in the folder `.ci`.
fn is_text(path: &Path) -> bool {
    match path.extension() {
        Some(extension) => TEXT.iter().any(|known| extension == *known),
        None => path.parent().and_then(Path::file_name).is_some_and(|folder| folder == ".ci"),
    }
}
