//! Where the workspace is and what cargo knows of it.

use std::env;
use std::path::{Path, PathBuf};

use cargo_metadata::{Metadata, MetadataCommand};

use crate::cargo::output;
use crate::error::{Error, Result};

/// The workspace that this xtask belongs to.
pub struct Workspace {
    /// The folder of the root `Cargo.toml`.
    pub root: PathBuf,
    /// Where cargo builds (`CARGO_TARGET_DIR` and cargo's configuration are respected).
    pub target: PathBuf,
    /// The members and their manifests, without the graph of third-party crates.
    pub members: Metadata,
}

impl Workspace {
    /// Finds the workspace through the environment that `cargo run` gives, so that a target folder shared by two
    /// clones serves each of them.
    pub fn locate() -> Result<Self> {
        let manifest_dir =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir.parent().map_or_else(|| manifest_dir.clone(), Path::to_path_buf);
        let members = metadata(&root, |command| {
            command.no_deps();
        })?;
        Ok(Self { target: members.target_directory.clone().into(), root, members })
    }

    /// The dependency graph as `Cargo.lock` pins it, with default features, for this machine: what a build has
    /// downloaded anyway.
    pub fn graph(&self) -> Result<Metadata> {
        let mut options = vec!["--locked".to_owned()];
        if let Some(host) = output("rustc", &["-vV"]).as_deref().and_then(host) {
            options.extend(["--filter-platform".to_owned(), host.to_owned()]);
        }
        metadata(&self.root, |command| {
            command.other_options(options);
        })
    }

    /// A path as the user sees it: relative to the root.
    pub fn relative<'a>(&self, path: &'a Path) -> &'a Path {
        path.strip_prefix(&self.root).unwrap_or(path)
    }
}

fn metadata(root: &Path, adjust: impl FnOnce(&mut MetadataCommand)) -> Result<Metadata> {
    let manifest = root.join("Cargo.toml");
    let mut command = MetadataCommand::new();
    // Cargo's own messages go to the terminal: on a fresh clone it downloads crates here, which takes a while.
    command.manifest_path(&manifest).verbose(true);
    adjust(&mut command);
    command.exec().map_err(|source| Error::Metadata { manifest, source: Box::new(source) })
}

/// The target triple that `rustc -vV` builds for by default.
fn host(version: &str) -> Option<&str> {
    version.lines().find_map(|line| line.strip_prefix("host: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_read_from_rustc() {
        let version =
            "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nhost: aarch64-apple-darwin\nLLVM version: 22\n";
        assert_eq!(host(version), Some("aarch64-apple-darwin"));
        assert_eq!(host("rustc 1.95.0"), None);
    }
}
