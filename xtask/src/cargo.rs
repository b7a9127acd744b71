//! Starting cargo and other programs.

use std::env;
use std::ffi::OsStr;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use cargo_metadata::Message;

use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// A cargo command that runs in the workspace's root.
pub fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&workspace.root);
    // What `cargo run` set for xtask describes xtask, not what is built next.
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The command line as one would type it.
pub fn line(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_stem().unwrap_or(command.get_program());
    let mut line = name.to_string_lossy().into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        line.push(' ');
        if argument.contains([' ', '*', '"', '$']) {
            line.push_str(&format!("'{argument}'"));
        } else {
            line.push_str(&argument);
        }
    }
    line
}

/// Runs a command with inherited streams and says how it ended.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    command.status().map_err(|source| Error::Spawn {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
        advice: "is it installed and on the PATH?",
    })
}

/// Runs a command with inherited streams; a failure is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if status.success() { Ok(()) } else { Err(Error::Failed { command: line(command), status }) }
}

/// The trimmed standard output of a command that succeeds, `None` if it is missing or fails.
pub fn output<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Builds one binary in a profile and returns where cargo put it.
///
/// Features are those that all of `packages` ask for together: a package beside the binary's own keeps its dependencies, which are
/// shared, from being built once more.
pub fn build_binary(
    workspace: &Workspace,
    packages: &[&str],
    binary: &'static str,
    profile: &str,
    features: &[&str],
) -> Result<PathBuf> {
    let mut command = cargo(workspace);
    command
        .args(["build", "--profile", profile, "--locked", "--bin", binary])
        .args(packages.iter().flat_map(|package| ["-p", package]))
        .arg("--message-format=json-render-diagnostics");
    if !features.is_empty() {
        command.arg("--features").arg(features.join(","));
    }
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|source| Error::Spawn {
        program: "cargo".to_owned(),
        source,
        advice: "install Rust from https://rustup.rs",
    })?;
    let mut executable = None;
    if let Some(stdout) = child.stdout.take() {
        for message in Message::parse_stream(BufReader::new(stdout)) {
            let message = message.map_err(Error::io("read the messages of", "cargo build"))?;
            if let Message::CompilerArtifact(artifact) = message
                && artifact.target.name == binary
                && let Some(path) = artifact.executable
            {
                executable = Some(path.into_std_path_buf());
            }
        }
    }
    let status = child.wait().map_err(Error::io("wait for", "cargo build"))?;
    if !status.success() {
        return Err(Error::Failed { command: line(&command), status });
    }
    executable.ok_or(Error::NoExecutable { binary })
}

/// Becomes the program, so that signals and the exit code are the program's own.
#[cfg(unix)]
pub fn replace_self(mut command: Command, binary: &Path) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Err(Error::Io { operation: "run", path: binary.to_owned(), source: command.exec() })
}

/// Runs the program and hands on its exit code.
#[cfg(not(unix))]
pub fn replace_self(mut command: Command, binary: &Path) -> Result<ExitCode> {
    let status = command.status().map_err(Error::io("run", binary))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_can_be_pasted() {
        let mut command = Command::new("/opt/rust/bin/cargo");
        command.args(["test", "--release", "a b"]);
        assert_eq!(line(&command), "cargo test --release 'a b'");
    }

    #[test]
    fn a_missing_program_has_no_output() {
        assert_eq!(output("no-such-program-anywhere", &["x"]), None);
    }
}
