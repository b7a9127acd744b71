//! `cargo xtask train`: build Firebox for a backend, then train with it.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Args, ValueEnum};

use crate::cargo::{build_binary, replace_self};
use crate::error::Result;
use crate::say;
use crate::workspace::Workspace;

/// Builds Firebox, then trains a model with it.
///
/// With no arguments it trains a small decoder on the Rust source of Firebox's own dependencies and ends within
/// minutes. Everything after `--` goes to `firebox train`; see `cargo xtask train -- --help` for what that takes.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask train                                      the default run
  cargo xtask train shakespeare-char -- --data FILE      a built-in recipe on a text of yours
  cargo xtask train my-recipe.toml --backend wgpu        a recipe of yours on the GPU
  cargo xtask train -- --depth 6 --set optimizer.lr=1e-3 the default run, larger
  cargo xtask train --ranks 2 -- --zero 2                on two ranks that divide the optimizer's state
  cargo xtask train --mpi 4 -- --elastic                 on four processes, and on with those that remain if one is lost
  cargo xtask train -- --help                            all options of `firebox train`

The first build takes about 7 minutes on 2 cores (a GPU backend: another 16); later ones take seconds.
Ctrl-C writes a checkpoint and ends; `-- --resume --out RUN` goes on from there.")]
pub struct Train {
    /// A built-in recipe or a TOML file. Without one: `default`, or with --resume the recipe of the run.
    recipe: Option<String>,
    /// What to compute on. Backends other than ndarray are added by a cargo feature and built when first asked for.
    #[arg(long, value_enum, default_value_t = Backend::Ndarray)]
    backend: Backend,
    /// Train on N ranks, threads of one process that share the work of every step.
    #[arg(long, value_name = "N", conflicts_with = "mpi")]
    ranks: Option<u16>,
    /// Train on N processes of MPI: builds with it; Firebox starts `mpirun`. Needs an MPI with its headers and libclang (Debian: openmpi-bin libopenmpi-dev
    /// libclang-dev).
    #[arg(long, value_name = "N")]
    mpi: Option<u16>,
    /// Options for `firebox train`.
    #[arg(last = true, value_name = "FIREBOX OPTIONS")]
    options: Vec<String>,
}

/// A backend; each is a cargo feature of the `firebox` package, and ndarray is the default one.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The CPU, on burn-ndarray; the default.
    Ndarray,
    /// The CPU, on burn-flex.
    Flex,
    /// Any GPU, through wgpu and WGSL shaders.
    Wgpu,
    /// A GPU through Vulkan and SPIR-V shaders.
    Vulkan,
    /// Apple's GPUs through Metal.
    Metal,
    /// wgpu's WebGPU.
    Webgpu,
    /// NVIDIA's GPUs through CUDA.
    Cuda,
    /// AMD's GPUs through ROCm.
    Rocm,
}

impl Backend {
    /// The name, which is also the cargo feature and the value of `firebox train --backend`.
    fn name(self) -> &'static str {
        match self {
            Self::Ndarray => "ndarray",
            Self::Flex => "flex",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Webgpu => "webgpu",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    /// The features to add to the default ones.
    fn features(self) -> Vec<&'static str> {
        match self {
            Self::Ndarray => vec![],
            other => vec![other.name()],
        }
    }

    /// The third-party library whose presence in the target folder tells a warm build from a cold one.
    fn library(self) -> &'static str {
        match self {
            Self::Ndarray => "libburn_ndarray-",
            Self::Flex => "libburn_flex-",
            _ => "libburn_cubecl-",
        }
    }
}

/// What a build from cold took on 2 cores, in minutes: the default one, and what a GPU backend adds.
const DEFAULT_MINUTES: u32 = 7;
const GPU_MINUTES: u32 = 16;

/// How long the build will take, where it is more than one waits for without being told: `None` if the backend was
/// built before.
fn first_build(deps: &Path, backend: Backend) -> Option<String> {
    if built_before(deps, backend.library()) {
        return None;
    }
    let default = if built_before(deps, Backend::Ndarray.library()) { 0 } else { DEFAULT_MINUTES };
    let minutes = default + if matches!(backend, Backend::Ndarray | Backend::Flex) { 0 } else { GPU_MINUTES };
    Some(match minutes {
        0 => format!("first time for {}: some minutes", backend.name()),
        _ => format!("first time for {}: about {minutes} minutes on 2 cores", backend.name()),
    })
}

impl Train {
    /// Builds, then becomes `firebox train`.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        match first_build(&workspace.target.join("release/deps"), self.backend) {
            Some(time) => say::heading(&format!("building Firebox ({time})")),
            None => say::heading("building Firebox"),
        }
        let start = Instant::now();
        let binary = build_binary(workspace, &["firebox"], "firebox", "release", &self.features())?;
        eprintln!("    built in {}", say::duration(start.elapsed()));
        let arguments = self.arguments();
        say::heading(&format!("firebox {}", arguments.join(" ")));
        // A short path, where there is one: `firebox` prints it in the commands that it suggests.
        let binary = env::current_dir()
            .ok()
            .and_then(|here| binary.strip_prefix(here).map(Path::to_path_buf).ok())
            .unwrap_or(binary);
        let mut command = Command::new(&binary);
        command.args(&arguments);
        replace_self(command, &binary)
    }

    fn features(&self) -> Vec<&'static str> {
        let mut features = self.backend.features();
        features.extend(self.mpi.map(|_| "mpi"));
        features
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["train".to_owned()];
        arguments.extend(self.recipe.clone());
        // The default is left to `firebox`, so that a recipe may choose.
        if self.backend != Backend::Ndarray {
            arguments.extend(["--backend".to_owned(), self.backend.name().to_owned()]);
        }
        if let Some(ranks) = self.ranks {
            arguments.extend(["--ranks".to_owned(), ranks.to_string()]);
        }
        if let Some(ranks) = self.mpi {
            arguments.extend(["--mpi".to_owned(), ranks.to_string()]);
        }
        arguments.extend(self.options.iter().cloned());
        arguments
    }
}

/// Whether a library of that name prefix lies in the folder of build outputs.
fn built_before(deps: &Path, prefix: &str) -> bool {
    fs::read_dir(deps)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(recipe: Option<&str>, backend: Backend, options: &[&str]) -> Train {
        Train {
            recipe: recipe.map(str::to_owned),
            backend,
            ranks: None,
            mpi: None,
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    #[test]
    fn the_default_leaves_every_choice_to_firebox() {
        assert_eq!(train(None, Backend::Ndarray, &[]).arguments(), ["train"]);
        assert!(Backend::Ndarray.features().is_empty());
    }

    #[test]
    fn recipe_backend_and_options_are_handed_on() {
        let arguments = train(Some("char"), Backend::Wgpu, &["--set", "optimizer.lr=1e-3"]).arguments();
        let expected = ["train", "char", "--backend", "wgpu", "--set", "optimizer.lr=1e-3"];
        assert_eq!(arguments, expected);
        assert_eq!(Backend::Wgpu.features(), ["wgpu"]);
    }

    #[test]
    fn ranks_are_threads_or_processes_of_mpi() {
        let threads = Train { ranks: Some(3), ..train(None, Backend::Ndarray, &["--zero", "2"]) };
        assert_eq!(threads.arguments(), ["train", "--ranks", "3", "--zero", "2"]);
        let mpi = Train { mpi: Some(4), ..train(None, Backend::Ndarray, &["--elastic"]) };
        assert_eq!(
            (mpi.arguments(), mpi.features()),
            (["train", "--mpi", "4", "--elastic"].map(str::to_owned).to_vec(), vec!["mpi"])
        );
    }

    #[test]
    fn value_names_are_the_features() {
        for backend in Backend::value_variants() {
            let name = backend.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(name.as_deref(), Some(backend.name()));
        }
    }

    #[test]
    fn a_missing_target_folder_is_a_cold_build() {
        let nowhere = Path::new("/no/such/folder");
        assert!(!built_before(nowhere, "libburn"));
        let time = |backend| first_build(nowhere, backend).unwrap_or_default();
        assert_eq!(time(Backend::Ndarray), "first time for ndarray: about 7 minutes on 2 cores");
        assert_eq!(time(Backend::Wgpu), "first time for wgpu: about 23 minutes on 2 cores");
    }
}
