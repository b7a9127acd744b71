//! `cargo xtask test`: every test of the project, in parts, each with its time.

mod counts;
pub mod install;
pub mod vulkan;

use std::env;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use clap::{Args, ValueEnum};

use self::counts::Counts;
use self::install::Python;
use crate::cargo::{cargo, line, run};
use crate::error::{Error, Result};
use crate::say;
use crate::tidy;
use crate::workspace::Workspace;

/// Runs every test of the project.
///
/// The parts, in order: the workspace's unit, documentation and end-to-end tests on the default backend; clients
/// (TensorBoard, transformers, ONNX Runtime and gguf read what Firebox wrote); tidy; ranks as processes of MPI; the other backends, wgpu on a Vulkan driver and flex. What
/// lacks its tools is skipped and listed at the end; where the variable CI is `true` that is a failure.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask test --install      install what is missing, then run all
  cargo xtask test                run what this machine can run
  cargo xtask test workspace      only the tests of the default backend
  cargo xtask test --clients      only llama.cpp, built from source

From a cold clone, 2 cores need about 40 minutes, 16 of which are the build with wgpu; later runs take minutes.
The last line counts tests; each check of tidy and each part that could not start counts as one.")]
pub struct Test {
    /// The parts to run [default: all].
    #[arg(value_enum, value_name = "PART")]
    parts: Vec<Part>,
    /// Install what the tests need: Debian packages (a software Vulkan driver, python3-venv, Open MPI) by apt-get, TensorBoard and other clients by
    /// pip into the target folder, rustfmt and clippy by rustup. Each is named; what is there is left alone.
    #[arg(long)]
    install: bool,
    /// Only the clients that are built from source, which no other call runs: llama.cpp opens what Firebox exported. Builds and installs it into the target
    /// folder first, in about 20 minutes on 2 cores.
    #[arg(long, conflicts_with = "parts")]
    clients: bool,
    /// Before the tests, write the golden values anew with PyTorch (implies installing it into the target folder).
    #[arg(long)]
    regenerate_goldens: bool,
}

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Unit, documentation and end-to-end tests on the default backend.
    Workspace,
    /// TensorBoard, transformers, ONNX Runtime and gguf read what Firebox wrote.
    Clients,
    /// The checks of `cargo xtask tidy`.
    Tidy,
    /// Ranks as processes of MPI, started by mpirun.
    Mpi,
    /// The same training on wgpu, on a software Vulkan driver if there is one, and on flex.
    Backends,
    /// llama.cpp opens what Firebox exported.
    #[value(skip)]
    Llama,
}

/// In this order: the other backends last, because they build for long and everything before shares one build.
const ALL: [Part; 5] = [Part::Workspace, Part::Clients, Part::Tidy, Part::Mpi, Part::Backends];

/// The package that holds the end-to-end tests.
const END_TO_END: &str = "firebox-tests";

/// Python environments of the clients: the folder, what it has, and the environment variable in which tests find it.
const CLIENTS: [[&str; 3]; 2] = [
    ["python", "tests/clients/requirements.txt", "FIREBOX_PYTHON"],
    ["python-torch", "tests/clients/requirements-torch.txt", "FIREBOX_TORCH_PYTHON"],
];
const LLAMA: [&str; 3] = ["python-llama", "tests/clients/requirements-llama.txt", "FIREBOX_LLAMA_PYTHON"];

/// How a part ended.
#[derive(Default)]
struct Outcome {
    counts: Counts,
    /// What could not run because of something that this machine lacks.
    missing: Option<String>,
}

impl From<Counts> for Outcome {
    fn from(counts: Counts) -> Self {
        Self { counts, missing: None }
    }
}

impl Outcome {
    fn missing(what: impl Into<String>) -> Self {
        Self { counts: Counts::default(), missing: Some(what.into()) }
    }
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Self::Workspace => "workspace: unit, documentation and end-to-end tests on the default backend",
            Self::Clients => "clients: TensorBoard, transformers, ONNX Runtime and gguf read what Firebox wrote",
            Self::Tidy => "tidy: format, lints, documentation, layering",
            Self::Mpi => "mpi: collectives, training and faults between processes",
            Self::Backends => "backends: the same training on wgpu and flex (about 16 minutes to build on 2 cores)",
            Self::Llama => "llama: llama.cpp opens what Firebox exported",
        }
    }

    fn name(self) -> &'static str {
        self.title().split(':').next().unwrap_or_default()
    }
}

impl Test {
    /// Installs if asked, runs the parts, reports.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        let start = Instant::now();
        let environment = |[folder, requirements, _]: [&str; 3]| Python::new(workspace, folder, requirements);
        if self.install {
            install::debian()?;
            install::rustup()?;
            for client in CLIENTS {
                environment(client).install()?;
            }
        }
        if self.clients {
            environment(LLAMA).install()?;
        }
        if self.regenerate_goldens {
            regenerate_goldens(workspace)?;
        }
        let parts = match self.parts {
            _ if self.clients => vec![Part::Llama],
            parts if parts.is_empty() => ALL.to_vec(),
            parts => parts,
        };
        let ci = env::var("CI").is_ok_and(|value| value == "true");
        let mut total = Counts::default();
        let mut report = vec![];
        for part in parts {
            say::heading(part.title());
            let start = Instant::now();
            let Outcome { mut counts, missing } = match part {
                Part::Workspace => workspace_tests(workspace)?,
                Part::Clients => client_tests(workspace, &CLIENTS, None)?,
                Part::Tidy => tidy_checks(workspace)?,
                Part::Mpi => mpi_tests(workspace)?,
                Part::Backends => backend_tests(workspace)?,
                Part::Llama => client_tests(workspace, &[LLAMA], Some("llama"))?,
            };
            let mut words = String::new();
            if let Some(what) = missing {
                let verdict = if ci { "FAILED" } else { "SKIPPED" };
                *(if ci { &mut counts.failed } else { &mut counts.skipped }) += 1;
                let advice = "`cargo xtask test --install` installs it on Debian and Ubuntu";
                words = format!("; {verdict}: {what} is missing, {advice}");
            }
            let words = format!("{counts}{words}");
            total += counts;
            let line = format!("{:9} {words} ({})", part.name(), say::duration(start.elapsed()));
            eprintln!("    {line}");
            report.push(line);
        }
        say::heading(&format!("all parts, {}", say::duration(start.elapsed())));
        for line in report {
            eprintln!("    {line}");
        }
        println!("{total}");
        Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn workspace_tests(workspace: &Workspace) -> Result<Outcome> {
    counted(&mut cargo_test(workspace)).map(Outcome::from)
}

/// The tests of clients, with Pythons that have them; or those alone that are in an optional module of the exports, with the feature of its name.
fn client_tests(workspace: &Workspace, clients: &[[&str; 3]], only: Option<&str>) -> Result<Outcome> {
    let mut command = end_to_end(workspace, "clients");
    if let Some(only) = only {
        command.args(["--features", &format!("{END_TO_END}/{only}"), "--", &format!("export::{only}::")]);
    }
    for [folder, requirements, variable] in clients {
        let Some(python) = Python::new(workspace, folder, requirements).interpreter() else {
            return Ok(Outcome::missing(format!("Python with {requirements}")));
        };
        command.env(variable, python);
    }
    counted(&mut command).map(Outcome::from)
}

/// The collectives in a selection of their own, which builds in seconds; then training, with the workspace's features and MPI's.
fn mpi_tests(workspace: &Workspace) -> Result<Outcome> {
    if let Some(missing) = install::MPI.iter().find(|package| !(package.present)()) {
        return Ok(Outcome::missing(missing.name));
    }
    let mut command = cargo(workspace);
    command.args(["test", "--release", "--locked", "-p", "firebox-parallel", "--features", "mpi", "--test", "mpi"]);
    let mut counts = counted(&mut command)?;
    let mut command = cargo(workspace);
    command.args(["test", "--release", "--locked", "-p", "firebox", "--features", "mpi", "--test", "mpi"]);
    counts += counted(&mut command)?;
    Ok(counts.into())
}

fn backend_tests(workspace: &Workspace) -> Result<Outcome> {
    let variables = match vulkan::environment(workspace)? {
        Ok(variables) => variables,
        Err(missing) => return Ok(Outcome::missing(missing)),
    };
    for (name, value) in &variables {
        eprintln!("    {name}={}", value.display());
    }
    counted(end_to_end(workspace, "wgpu").envs(variables)).map(Outcome::from)
}

fn tidy_checks(workspace: &Workspace) -> Result<Outcome> {
    let checks = tidy::run_all(workspace)?;
    let passed = checks.iter().filter(|check| check.passed).count();
    Ok(Counts { passed, failed: checks.len() - passed, skipped: 0 }.into())
}

/// All tests go through this one selection of packages, so that features resolve in one way and nothing is built twice.
fn cargo_test(workspace: &Workspace) -> Command {
    let mut command = cargo(workspace);
    command.args(["test", "--release", "--workspace", "--locked", "--no-fail-fast"]);
    command
}

/// One test program of the end-to-end package, with the features that its manifest requires for it.
fn end_to_end(workspace: &Workspace, name: &str) -> Command {
    let mut command = cargo_test(workspace);
    command.args(["--test", name]);
    let features = workspace
        .members
        .packages
        .iter()
        .filter(|package| package.name.as_str() == END_TO_END)
        .flat_map(|package| &package.targets)
        .filter(|target| target.name == name)
        .flat_map(|target| &target.required_features);
    for feature in features {
        command.arg("--features").arg(format!("{END_TO_END}/{feature}"));
    }
    command
}

/// Runs a test command, shows its output as it comes and adds up what it says.
fn counted(command: &mut Command) -> Result<Counts> {
    eprintln!("    {}", line(command));
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|source| Error::Spawn {
        program: "cargo".to_owned(),
        source,
        advice: "install Rust from https://rustup.rs",
    })?;
    let mut counts = Counts::default();
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut bytes = vec![];
        loop {
            bytes.clear();
            let n = reader.read_until(b'\n', &mut bytes).map_err(Error::io("read the output of", "cargo test"))?;
            if n == 0 {
                break;
            }
            if let Some(program) = Counts::from_line(&String::from_utf8_lossy(&bytes)) {
                counts += program;
            }
            // A closed terminal must not end the tests.
            let _ = io::stdout().write_all(&bytes);
        }
    }
    let status = child.wait().map_err(Error::io("wait for", "cargo test"))?;
    if !status.success() && counts.failed == 0 {
        // It did not build, or a test program died before it could count.
        counts.failed = 1;
    }
    Ok(counts)
}

/// Runs the generators of the golden values with the Python packages that they pin.
fn regenerate_goldens(workspace: &Workspace) -> Result<()> {
    let python = Python::new(workspace, "python-goldens", "tests/golden/requirements.txt").install()?;
    let folder = workspace.root.join("tests/golden");
    let mut scripts: Vec<_> = std::fs::read_dir(&folder)
        .map_err(Error::io("read the folder", &folder))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "py"))
        .collect();
    scripts.sort();
    for script in scripts {
        say::heading(&format!("golden values: {}", workspace.relative(&script).display()));
        run(Command::new(&python).arg(&script).current_dir(&folder))?;
    }
    Ok(())
}
