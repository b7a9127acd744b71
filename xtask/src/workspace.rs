//! Where the workspace is and what cargo knows of it.

use std::env;
use std::path::{Path, PathBuf};

use cargo_metadata::{Metadata, MetadataCommand};

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

    /// The whole dependency graph as `Cargo.lock` pins it.
    pub fn graph(&self) -> Result<Metadata> {
        metadata(&self.root, |command| {
            command.other_options(["--locked".to_owned()]).features(cargo_metadata::CargoOpt::AllFeatures);
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
