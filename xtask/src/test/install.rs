//! `cargo xtask test --install`: what the tests need from Debian, Python and rustup. What is there already is left
//! alone, so that a second call takes no time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::vulkan;
use crate::cargo::{output, run};
use crate::error::{Error, Result};
use crate::say;
use crate::workspace::Workspace;

/// A Debian package, why the tests need it, and whether what it brings is there.
pub struct Package {
    /// The name in Debian and Ubuntu.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Looks for what it brings, wherever that came from.
    pub present: fn() -> bool,
}

/// What the tests need beyond Rust and a C compiler, but for MPI.
const BASE: [Package; 3] = [
    Package { name: "libvulkan1", purpose: "Vulkan's loader, for the wgpu tests", present: vulkan::has_loader },
    Package {
        name: "mesa-vulkan-drivers",
        purpose: "a software Vulkan driver, for the wgpu tests",
        present: || vulkan::lavapipe().is_some(),
    },
    Package {
        name: "python3-venv",
        purpose: "Python, for the tests in which other programs read what Firebox wrote",
        present: || base_python().is_some(),
    },
];

/// What ranks as processes of MPI need.
pub const MPI: [Package; 3] = [
    Package {
        name: "openmpi-bin",
        purpose: "mpirun, for the MPI tests",
        present: || output("mpirun", &["--version"]).is_some(),
    },
    Package {
        name: "libopenmpi-dev",
        purpose: "MPI's headers, for the MPI tests",
        present: || output("mpicc", &["-show"]).is_some(),
    },
    Package { name: "libclang-dev", purpose: "libclang, to build against MPI's headers", present: has_libclang },
];

/// All that the tests need beyond Rust and a C compiler.
pub fn packages() -> impl Iterator<Item = &'static Package> {
    BASE.iter().chain(&MPI)
}

/// Whether the generator of bindings to C finds libclang, as it looks: where it is told, where the system links from, and where LLVM's
/// packages put it.
fn has_libclang() -> bool {
    let holds = |folder: &Path| {
        fs::read_dir(folder).is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libclang.so"))
        })
    };
    let told = std::env::var_os("LIBCLANG_PATH").map(PathBuf::from).into_iter();
    let llvm = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let llvm = llvm.filter(|entry| entry.file_name().to_string_lossy().starts_with("llvm"));
    told.chain(llvm.map(|entry| entry.path().join("lib"))).any(|folder| holds(&folder))
        || output("ldconfig", &["-p"]).is_some_and(|list| list.contains("libclang.so"))
}

/// The rustup components that tidy needs, with the cargo subcommand that each brings.
const COMPONENTS: [(&str, &str); 2] = [("rustfmt", "fmt"), ("clippy", "clippy")];

/// Installs the missing Debian packages with apt-get, through sudo when not root.
pub fn debian() -> Result<()> {
    let missing: Vec<&Package> = packages().filter(|package| !(package.present)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if output("apt-get", &["--version"]).is_none() {
        return Err(Error::Install {
            what: names.join(", "),
            why: "this system has no apt-get; install what your system calls these, then call again \
                  without --install"
                .to_owned(),
        });
    }
    for package in &missing {
        say::heading(&format!("installing {} ({})", package.name, package.purpose));
    }
    run(apt_get()?.arg("update").arg("-qq"))?;
    run(apt_get()?.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&names))
}

/// Adds the missing rustup components.
pub fn rustup() -> Result<()> {
    for (component, subcommand) in COMPONENTS {
        if output("cargo", &[subcommand, "--version"]).is_none() {
            say::heading(&format!("installing {component} (for cargo xtask tidy)"));
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// A Python environment of its own, in the target folder, with exactly what a requirements file pins.
pub struct Python {
    folder: PathBuf,
    requirements: PathBuf,
}

impl Python {
    /// The environment of that name for `requirements`, a file of the repository.
    pub fn new(workspace: &Workspace, name: &str, requirements: &str) -> Self {
        Self { folder: workspace.target.join("xtask").join(name), requirements: workspace.root.join(requirements) }
    }

    /// The interpreter, if the environment is complete and holds what the requirements say today.
    pub fn interpreter(&self) -> Option<PathBuf> {
        let wanted = fs::read(&self.requirements).ok()?;
        let installed = fs::read(self.stamp()).ok()?;
        let interpreter = self.path();
        (wanted == installed && interpreter.is_file()).then_some(interpreter)
    }

    /// Creates the environment and installs the requirements, if that is still to be done.
    pub fn install(&self) -> Result<PathBuf> {
        if let Some(interpreter) = self.interpreter() {
            return Ok(interpreter);
        }
        let base = base_python().ok_or_else(|| Error::Install {
            what: "a Python environment".to_owned(),
            why: "Python 3 with its modules venv and ensurepip is missing; on Debian and Ubuntu: \
                  apt-get install python3-venv"
                .to_owned(),
        })?;
        let requirements = fs::read_to_string(&self.requirements).map_err(Error::io("read", &self.requirements))?;
        let names: Vec<&str> = requirements
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with(['#', '-']))
            .collect();
        say::heading(&format!("installing {} from PyPI into {}", names.join(", "), self.folder.display()));
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).map_err(Error::io("remove", &self.folder))?;
        }
        run(Command::new(base).args(["-m", "venv"]).arg(&self.folder))?;
        run(Command::new(self.path())
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
            .arg(&self.requirements))?;
        // Written last: an environment without it is an interrupted one.
        fs::copy(&self.requirements, self.stamp()).map_err(Error::io("write", self.stamp()))?;
        Ok(self.path())
    }

    fn path(&self) -> PathBuf {
        self.folder.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
    }

    fn stamp(&self) -> PathBuf {
        self.folder.join("installed.txt")
    }
}

/// The first Python 3 that can create environments.
fn base_python() -> Option<&'static str> {
    ["python3", "/usr/bin/python3", "python"].into_iter().find(|python| {
        let probe = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 9))";
        output(python, &["-c", probe]).is_some()
    })
}

/// `apt-get` that asks nothing.
fn apt_get() -> Result<Command> {
    let root = output("id", &["-u"]).as_deref() == Some("0");
    let mut command = if root {
        Command::new("env")
    } else if Path::new("/usr/bin/sudo").exists() {
        let mut sudo = Command::new("sudo");
        sudo.arg("env");
        sudo
    } else {
        let names: Vec<&str> = packages().map(|package| package.name).collect();
        return Err(Error::Install {
            what: "Debian packages".to_owned(),
            why: format!("not root, and there is no sudo; as root: apt-get install {}", names.join(" ")),
        });
    };
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_counts_only_when_complete_and_current() {
        let folder = std::env::temp_dir().join(format!("xtask-python-{}", std::process::id()));
        let requirements = folder.join("requirements.txt");
        let python = Python { folder: folder.join("env"), requirements: requirements.clone() };
        let interpreter = python.path();
        for path in [&interpreter, &requirements] {
            if let Some(parent) = path.parent() {
                assert!(fs::create_dir_all(parent).is_ok());
            }
            assert!(fs::write(path, "tensorboard==1\n").is_ok());
        }
        assert_eq!(python.interpreter(), None, "no stamp: interrupted");
        assert!(fs::copy(&requirements, python.stamp()).is_ok());
        assert_eq!(python.interpreter(), Some(interpreter));
        assert!(fs::write(&requirements, "tensorboard==2\n").is_ok());
        assert_eq!(python.interpreter(), None, "the requirements changed");
        assert!(fs::remove_dir_all(&folder).is_ok());
    }
}
