//! The layering of the crates: who may depend on whom, read from cargo's metadata and the manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use cargo_metadata::{Metadata, PackageId};
use toml::{Table, Value};

use super::Finding;
use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// Which members of the workspace each member may depend on. Dependencies point one way, from what composes to what
/// computes; a member that is missing here may depend on none.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("firebox-parallel", &[]),
    ("firebox-tensor", &["firebox-parallel"]),
    ("firebox-data", &[]),
    ("firebox-models", &["firebox-parallel", "firebox-tensor"]),
    ("firebox-compress", &["firebox-models", "firebox-tensor"]),
    ("firebox-optim", &["firebox-tensor"]),
    (
        "firebox-train",
        &["firebox-compress", "firebox-data", "firebox-models", "firebox-optim", "firebox-parallel", "firebox-tensor"],
    ),
    (
        "firebox",
        &[
            "firebox-compress",
            "firebox-data",
            "firebox-models",
            "firebox-optim",
            "firebox-parallel",
            "firebox-tensor",
            "firebox-train",
        ],
    ),
    (
        "firebox-tests",
        &[
            "firebox",
            "firebox-compress",
            "firebox-data",
            "firebox-models",
            "firebox-optim",
            "firebox-tensor",
            "firebox-train",
        ],
    ),
    (
        "firebox-bench",
        &[
            "firebox",
            "firebox-compress",
            "firebox-data",
            "firebox-models",
            "firebox-optim",
            "firebox-tensor",
            "firebox-train",
        ],
    ),
    ("xtask", &[]),
];

/// Members that build without burn, directly and through others: data and ranks are useful without a tensor, and
/// xtask must be there in seconds.
const WITHOUT_BURN: [&str; 3] = ["firebox-data", "firebox-parallel", "xtask"];

/// Checks every member's manifest and the graph of all dependencies.
pub fn check(workspace: &Workspace) -> Result<Vec<Finding>> {
    let mut findings = vec![];
    let members: BTreeSet<&str> = workspace.members.packages.iter().map(|package| package.name.as_str()).collect();
    for package in &workspace.members.packages {
        let manifest = package.manifest_path.as_std_path();
        let shown = workspace.relative(manifest);
        let ours = package
            .dependencies
            .iter()
            .map(|dependency| dependency.name.as_str())
            .filter(|name| members.contains(name));
        for edge in forbidden(&package.name, ours) {
            findings.push(Finding::new(shown, 0, edge));
        }
        findings.extend(manifest_findings(shown, &read_table(manifest)?));
    }
    let graph = workspace.graph()?;
    for member in WITHOUT_BURN {
        if let Some(burn) = reaches_burn(&graph, member) {
            let message = format!("{member} must build without burn, but depends on {burn}");
            findings.push(Finding::new(Path::new("Cargo.lock"), 0, message));
        }
    }
    Ok(findings)
}

/// Says for each dependency on a member that is not allowed what is.
fn forbidden<'a>(package: &str, dependencies: impl Iterator<Item = &'a str>) -> Vec<String> {
    let allowed = ALLOWED.iter().find(|(name, _)| *name == package).map_or(&[][..], |(_, allowed)| *allowed);
    dependencies
        .filter(|dependency| !allowed.contains(dependency))
        .map(|dependency| {
            let list = if allowed.is_empty() { "no member of the workspace".to_owned() } else { allowed.join(", ") };
            format!("{package} must not depend on {dependency}; it may depend on {list}")
        })
        .collect()
}

/// Every dependency comes from the root's table, every crate takes the workspace's lints and says what it is.
fn manifest_findings(path: &Path, manifest: &Table) -> Vec<Finding> {
    let mut findings = vec![];
    let targets = manifest.get("target").and_then(Value::as_table);
    let sections = std::iter::once(manifest)
        .chain(targets.into_iter().flat_map(|targets| targets.values().filter_map(Value::as_table)));
    for section in sections {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let table = section.get(kind).and_then(Value::as_table);
            for (name, value) in table.into_iter().flatten() {
                let inherits = value.get("workspace").and_then(Value::as_bool) == Some(true);
                if !inherits {
                    findings.push(Finding::new(
                        path,
                        0,
                        format!(
                            "{kind} `{name}` must be `{name}.workspace = true`, with its version in the root's \
                             [workspace.dependencies]"
                        ),
                    ));
                }
            }
        }
    }
    let lints = manifest.get("lints").and_then(|lints| lints.get("workspace"));
    if lints.and_then(Value::as_bool) != Some(true) {
        findings.push(Finding::new(path, 0, "add `[lints]` with `workspace = true`"));
    }
    let description = manifest
        .get("package")
        .and_then(|package| package.get("description"))
        .and_then(Value::as_str)
        .unwrap_or_default();
    if description.split_whitespace().count() < 3 {
        findings.push(Finding::new(path, 0, "the package's description must say what it is"));
    }
    findings
}

/// The first burn crate that a member reaches through normal and build dependencies.
fn reaches_burn(graph: &Metadata, member: &str) -> Option<String> {
    let names: BTreeMap<&PackageId, &str> =
        graph.packages.iter().map(|package| (&package.id, package.name.as_str())).collect();
    let resolve = graph.resolve.as_ref()?;
    let mut seen = BTreeSet::new();
    let mut open: Vec<&PackageId> = names.iter().filter(|(_, name)| **name == member).map(|(id, _)| *id).collect();
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        let name = names.get(id).copied().unwrap_or_default();
        if name == "burn" || name.starts_with("burn-") {
            return Some(name.to_owned());
        }
        if let Some(node) = resolve.nodes.iter().find(|node| node.id == *id) {
            open.extend(&node.dependencies);
        }
    }
    None
}

fn read_table(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    text.parse().map_err(|source| Error::Toml { path: path.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn dependencies_point_one_way() {
        assert!(forbidden("firebox-train", ["firebox-optim", "firebox-data"].into_iter()).is_empty());
        let up = forbidden("firebox-tensor", ["firebox-models"].into_iter());
        assert_eq!(up, ["firebox-tensor must not depend on firebox-models; it may depend on firebox-parallel"]);
        let sideways = forbidden("firebox-optim", ["firebox-models", "firebox-tensor"].into_iter());
        assert_eq!(sideways.len(), 1);
        assert_eq!(forbidden("firebox-new", ["firebox-tensor"].into_iter()).len(), 1);
    }

    #[test]
    fn what_is_allowed_has_no_cycle() {
        // Each entry may name only entries above it.
        for (i, (name, allowed)) in ALLOWED.iter().enumerate() {
            for dependency in *allowed {
                let above = ALLOWED[..i].iter().any(|(earlier, _)| earlier == dependency);
                assert!(above, "{name} -> {dependency}");
            }
        }
    }

    #[test]
    fn a_good_manifest_has_no_findings() {
        let manifest = r#"
            [package]
            description = "Reads text and writes tokens"
            [lints]
            workspace = true
            [dependencies]
            serde.workspace = true
            zstd = { workspace = true, optional = true }
            [target.'cfg(unix)'.dependencies]
            libc.workspace = true
        "#;
        let findings = manifest_findings(Path::new("Cargo.toml"), &manifest.parse().unwrap());
        assert_eq!(findings, []);
    }

    #[test]
    fn a_bad_manifest_is_told_each_fault() {
        let manifest = r#"
            [package]
            description = "Data crate"
            [dependencies]
            serde = "1"
            [dev-dependencies]
            tempfile = { version = "3" }
            [target.'cfg(unix)'.dependencies]
            libc = { path = "../libc", workspace = false }
        "#;
        let findings = manifest_findings(Path::new("Cargo.toml"), &manifest.parse().unwrap());
        let messages: Vec<&str> = findings.iter().map(|finding| finding.message.as_str()).collect();
        assert_eq!(messages.len(), 5, "{messages:#?}");
        for name in ["`serde`", "`tempfile`", "`libc`"] {
            assert!(messages.iter().any(|message| message.contains(name)), "{name}");
        }
    }
}
