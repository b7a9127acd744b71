//! Links between the repository's documents: a relative link must lead to a file, and its fragment to a heading.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::{Finding, TextFile};

/// Checks the links of every Markdown file.
pub fn check(root: &Path, files: &[TextFile]) -> Vec<Finding> {
    let mut findings = vec![];
    for file in files.iter().filter(|file| file.is("md")) {
        for (line, target) in links(&file.text) {
            if is_external(&target) {
                continue;
            }
            let (path, fragment) = match target.split_once('#') {
                Some((path, fragment)) => (path, Some(fragment)),
                None => (target.as_str(), None),
            };
            let linked = if path.is_empty() {
                file.path.clone()
            } else {
                let folder = file.path.parent().unwrap_or(Path::new(""));
                normalize(&folder.join(path))
            };
            let linked_file = files.iter().find(|other| other.path == linked);
            if linked_file.is_none() && !root.join(&linked).exists() {
                let message = format!("the link to `{target}` leads nowhere");
                findings.push(Finding::new(&file.path, line, message));
                continue;
            }
            if let (Some(fragment), Some(linked_file)) = (fragment, linked_file)
                && linked_file.is("md")
                && !anchors(&linked_file.text).contains(fragment)
            {
                let message = format!("`{}` has no heading `#{fragment}`", linked.display());
                findings.push(Finding::new(&file.path, line, message));
            }
        }
    }
    findings
}

/// The targets of inline links, images and reference definitions, outside code.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = vec![];
    for (number, line) in prose(text) {
        let line = without_code_spans(line);
        let mut rest = line.as_str();
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            if let Some(end) = rest.find(')') {
                let target = rest[..end].split_whitespace().next().unwrap_or_default();
                found.push((number, target.to_owned()));
                rest = &rest[end..];
            }
        }
        if line.starts_with('[')
            && let Some((_, target)) = line.split_once("]: ")
        {
            found.push((number, target.trim().to_owned()));
        }
    }
    found
}

/// The lines outside fenced code blocks.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut in_code = false;
    let mut lines = vec![];
    for (i, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            lines.push((i + 1, line));
        }
    }
    lines
}

fn without_code_spans(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

fn is_external(target: &str) -> bool {
    target.contains("://") || target.starts_with("mailto:")
}

/// The fragments that a page's headings answer to, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .into_iter()
        .filter(|(_, line)| line.starts_with('#'))
        .map(|(_, line)| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}

/// Resolves `.` and `..` by name.
fn normalize(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                result.pop();
            }
            part => result.push(part),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> TextFile {
        TextFile { path: PathBuf::from(path), text: text.to_owned() }
    }

    #[test]
    fn links_outside_code_are_found() {
        let text = "[a](a.md) and ![b](b.svg \"title\")\n```\n[no](c.md)\n```\n`[no](d.md)` [e](e.md#f)\n[g]: g.md\n";
        let found: Vec<String> = links(text).into_iter().map(|(_, target)| target).collect();
        assert_eq!(found, ["a.md", "b.svg", "e.md#f", "g.md"]);
    }

    #[test]
    fn headings_become_fragments() {
        let found = anchors("# The `firebox` binary\n## Exit codes, and why\n```\n# comment\n```\n# 训练\n");
        let expected = ["exit-codes-and-why", "the-firebox-binary", "训练"];
        assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn broken_links_are_named_with_their_line() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let files = [
            file("Cargo.md", "# Here\n[ok](Cargo.toml) [web](https://burn.dev) [self](#here)\n[bad](no.md)\n"),
            file("src/a.md", "[up](../src/main.rs)\n\n[bad](#nowhere)\n"),
        ];
        let findings = check(root, &files);
        let shown: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["Cargo.md:3: the link to `no.md` leads nowhere", "src/a.md:3: `src/a.md` has no heading `#nowhere`",]
        );
    }
}
