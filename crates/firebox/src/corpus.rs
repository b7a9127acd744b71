//! The corpus that every machine has which built Firebox: the Rust source of the workspace's own locked dependencies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cargo_metadata::{CargoOpt, DependencyKind, MetadataCommand, Node, Package, PackageId};
use firebox_data::Source;

/// Why there is no default corpus.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// No workspace to ask.
    #[error("no --data given, and {} is not inside Firebox's source tree, whose dependencies are the default corpus: give text with --data PATH", .0.display())]
    NoWorkspace(PathBuf),
    /// cargo cannot answer.
    #[error("no --data given, and the default corpus cannot be found: cargo metadata --locked: {0}")]
    Cargo(String),
    /// Nothing was found.
    #[error(
        "no --data given, and the sources of the dependencies are not on this machine: run `cargo fetch --locked`, or give text with --data PATH"
    )]
    Empty,
}

/// The `src` folders of all packages that `firebox` depends on from a registry, by name and version: `Cargo.lock` pins them, so the
/// corpus is the same wherever the lock file is. Asks `cargo metadata --locked`, without
/// the network first; where cargo lacks a locked package's source, it fetches it.
///
/// # Errors
/// [`CorpusError`], each with what to do.
pub fn rust_sources(start: &Path) -> Result<Source, CorpusError> {
    let manifest = start.ancestors().map(|dir| dir.join("Cargo.toml")).find(|path| {
        std::fs::read_to_string(path).is_ok_and(|text| text.contains("[workspace]") && text.contains("firebox-train"))
    });
    let manifest = manifest.ok_or_else(|| CorpusError::NoWorkspace(start.into()))?;
    let run = |offline: bool| {
        let mut options = vec!["--locked".to_string()];
        if offline {
            options.push("--offline".into());
        }
        // One platform whatever the machine, so that the list does not depend on where it is made.
        options.extend(["--filter-platform".into(), "x86_64-unknown-linux-gnu".into()]);
        MetadataCommand::new()
            .manifest_path(&manifest)
            .features(CargoOpt::SomeFeatures(vec![]))
            .other_options(options)
            .exec()
    };
    let metadata =
        run(true).or_else(|_| run(false)).map_err(|e| CorpusError::Cargo(e.to_string().replace('\n', " ")))?;
    let resolve = metadata.resolve.ok_or_else(|| CorpusError::Cargo("it resolved nothing".into()))?;
    let packages: BTreeMap<&PackageId, &Package> = metadata.packages.iter().map(|p| (&p.id, p)).collect();
    let nodes: BTreeMap<&PackageId, &Node> = resolve.nodes.iter().map(|n| (&n.id, n)).collect();
    let mut open: Vec<&PackageId> = metadata.packages.iter().filter(|p| p.name == "firebox").map(|p| &p.id).collect();
    let mut found = BTreeMap::new();
    while let Some(id) = open.pop() {
        let (Some(package), Some(node)) = (packages.get(id), nodes.get(id)) else { continue };
        if found.insert((package.name.to_string(), package.version.clone()), *package).is_none() {
            open.extend(
                node.deps
                    .iter()
                    .map(|d| &d.pkg)
                    .filter(|id| packages.get(id).is_some_and(|p| is_built(package, node, p))),
            );
        }
    }
    let folders: Vec<String> = found
        .values()
        .filter(|p| p.source.is_some())
        .filter_map(|p| p.manifest_path.parent().map(|dir| dir.join("src")))
        .filter(|dir| dir.is_dir())
        .map(|dir| format!("{dir}/**/*.rs"))
        .collect();
    if folders.is_empty() {
        return Err(CorpusError::Empty);
    }
    Ok(Source::new(folders))
}

/// Whether a build of `package` with its resolved features builds `dependency` into it. (The graph that cargo prints also has edges to optional
/// packages which no feature switches on.)
fn is_built(package: &Package, node: &Node, dependency: &Package) -> bool {
    package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal && d.name == *dependency.name).any(|d| {
        let name = d.rename.as_ref().unwrap_or(&d.name);
        let on =
            |value: &String| *value == format!("dep:{name}") || value.starts_with(&format!("{name}/")) || value == name;
        let features = node.features.iter().filter_map(|f| package.features.get(&**f));
        !d.optional || features.flatten().any(on) || node.features.iter().any(|f| &**f == name)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_the_dependencies_in_a_fixed_order() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = rust_sources(here).unwrap();
        assert!(source.paths.iter().any(|p| p.contains("burn-core-")), "{:?}", source.paths);
        assert!(source.paths.len() > 100, "{} packages", source.paths.len());
        assert_eq!(source, rust_sources(here).unwrap());
    }

    #[test]
    fn outside_of_a_workspace_it_says_what_to_do() {
        let error = rust_sources(Path::new("/")).unwrap_err().to_string();
        assert!(error.contains("--data"), "{error}");
    }
}
