//! Rules on source files, line by line.

use std::path::Path;

use super::{Finding, TextFile};

/// The longest Rust file: more is not read in a sitting.
const MAX_LINES: usize = 600;

/// Files which may be longer, each with its reason. There are none.
const LONG_FILES: [&str; 0] = [];

/// Names of backend features.
const BACKENDS: [&str; 8] = ["ndarray", "flex", "wgpu", "vulkan", "metal", "webgpu", "cuda", "rocm"];

/// Where a backend feature may be named: the device module, the adapter to the backends' own tensors, and the two
/// declarations of operations that burn's backends are extended with.
const BACKEND_FILES: [&str; 4] = [
    "crates/tensor/src/device.rs",
    "crates/tensor/src/adapter.rs",
    "crates/tensor/src/ops/extension.rs",
    "crates/tensor/src/ops/optim.rs",
];

/// Words that belong to somebody's machine. In two halves, so that this file does not find itself.
const FORBIDDEN: [(&str, &str); 5] = [("/ro", "ot/"), ("/wo", "rk/"), ("/ho", "me/"), ("TO", "DO"), ("FIX", "ME")];

/// Checks all files.
pub fn check(files: &[TextFile]) -> Vec<Finding> {
    let mut findings = vec![];
    for file in files {
        findings.extend(forbidden_words(&file.path, &file.text));
        if file.is("rs") {
            findings.extend(length(&file.path, &file.text));
            findings.extend(opening(&file.path, &file.text));
            if is_library_code(&file.path) {
                findings.extend(backend_features(&file.path, &file.text));
                findings.extend(panics(&file.path, &file.text));
            }
        }
    }
    findings
}

/// Code that runs for users: the crates' sources without their tests.
fn is_library_code(path: &Path) -> bool {
    let in_source = path.starts_with("crates") && path.components().any(|part| part.as_os_str() == "src");
    let in_tests = path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs");
    in_source && !in_tests
}

fn forbidden_words(path: &Path, text: &str) -> Vec<Finding> {
    let mut findings = vec![];
    if path.ends_with("Cargo.lock") {
        return findings;
    }
    for (number, line) in numbered(text) {
        for (first, second) in FORBIDDEN {
            if contains_word(line, &format!("{first}{second}")) {
                let message = format!("`{first}{second}` must not be here: say it without, or do it");
                findings.push(Finding::new(path, number, message));
            }
        }
    }
    findings
}

/// Whether `line` holds `word` not as the end of a longer word or of a relative path.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let joined = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '.');
        let path = word.ends_with('/');
        !joined(before) && (path || !joined(after))
    })
}

fn length(path: &Path, text: &str) -> Option<Finding> {
    let lines = text.lines().count();
    let excepted = LONG_FILES.iter().any(|long| path.ends_with(long));
    (lines > MAX_LINES && !excepted).then(|| {
        let message = format!("{lines} lines; split it: {MAX_LINES} are what one reads in a sitting");
        Finding::new(path, 0, message)
    })
}

/// The roots of crates, examples and test programs say what they are.
fn opening(path: &Path, text: &str) -> Option<Finding> {
    let root = ["src/lib.rs", "src/main.rs"].iter().any(|root| path.ends_with(root))
        || path.parent().is_some_and(|folder| folder.ends_with("examples") || folder.ends_with("tests/tests"));
    (root && !text.trim_start().starts_with("//!"))
        .then(|| Finding::new(path, 1, "open with `//!`: what this is, and how to use it"))
}

fn backend_features(path: &Path, text: &str) -> Vec<Finding> {
    let allowed = BACKEND_FILES.iter().any(|file| path == Path::new(file));
    if allowed {
        return vec![];
    }
    code_lines(text)
        .filter(|(_, line)| {
            BACKENDS.iter().any(|backend| {
                line.contains(&format!("feature = \"{backend}\"")) || line.contains(&format!("feature=\"{backend}\""))
            })
        })
        .map(|(number, _)| {
            let message = format!("backend features are named only in {}", BACKEND_FILES.join(", "));
            Finding::new(path, number, message)
        })
        .collect()
}

/// `.unwrap()` and `.expect(` outside tests, without a comment `// PANIC:` on the line or right above that says why
/// the value is always there.
fn panics(path: &Path, text: &str) -> Vec<Finding> {
    let lines: Vec<&str> = text.lines().collect();
    code_lines(text)
        .filter(|(_, line)| {
            line.contains(".unwrap()")
                || line.contains(".expect(")
                || line.contains("todo!(")
                || line.contains("unimplemented!(")
        })
        .filter(|(number, line)| !line.contains("// PANIC:") && !reason_above(&lines[..number - 1]))
        .map(|(number, _)| {
            let message = "return an error, or say in a comment `// PANIC: ...` why this cannot happen";
            Finding::new(path, number, message)
        })
        .collect()
}

/// Whether the statement that ends here, or the comment above it, holds a `// PANIC:`.
fn reason_above(above: &[&str]) -> bool {
    for line in above.iter().rev().take(8) {
        let line = line.trim();
        if line.starts_with("// PANIC:") {
            return true;
        }
        // Go up through comments and the statement's own lines.
        if line.is_empty() || line.ends_with([';', '}']) {
            return false;
        }
    }
    false
}

/// The lines of code: without comments and without a test module, which stands last in a file.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    numbered(text)
        .take_while(|(_, line)| line.trim_end() != "#[cfg(test)]")
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(findings: impl IntoIterator<Item = Finding>) -> Vec<usize> {
        findings.into_iter().map(|finding| finding.line).collect()
    }

    #[test]
    fn backend_features_stay_in_the_device_module() {
        let text =
            "#[cfg(feature = \"wgpu\")]\nfn a() {}\n// cfg(feature = \"wgpu\") in words\n#[cfg(feature = \"extra\")]\n";
        let elsewhere = Path::new("crates/train/src/lib.rs");
        assert_eq!(lines(backend_features(elsewhere, text)), [1]);
        for allowed in ["crates/tensor/src/device.rs", "crates/tensor/src/adapter.rs"] {
            assert_eq!(lines(backend_features(Path::new(allowed), text)), [0; 0]);
        }
    }

    #[test]
    fn panics_need_a_reason() {
        let path = Path::new("crates/data/src/a.rs");
        let bad = "let a = b.unwrap();\nlet c = d\n    .expect(\"d\");\n";
        assert_eq!(lines(panics(path, bad)), [1, 3]);
        let good = "\
// PANIC: the header was checked above
let a = b.unwrap();
let c = d.expect(\"d\"); // PANIC: always set
// PANIC: two lines
// of reason
let e = f
    .g()
    .expect(\"f\");
/// Like `x.unwrap()`.
let h = i.unwrap_or(1);
#[cfg(test)]
mod tests { fn t() { x.unwrap() } }
";
        assert_eq!(lines(panics(path, good)), [0; 0]);
        let stale = "// PANIC: for this one\nlet a = b.unwrap();\nlet c = d.unwrap();\n";
        assert_eq!(lines(panics(path, stale)), [3]);
    }

    #[test]
    fn tests_are_no_library_code() {
        assert!(is_library_code(Path::new("crates/data/src/loader.rs")));
        for path in ["crates/data/src/loader/tests.rs", "crates/data/tests/a.rs", "xtask/src/main.rs"] {
            assert!(!is_library_code(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn machine_paths_are_found_as_words() {
        let path = Path::new("docs/a.md");
        let root = format!("/ro{}", "ot/");
        assert_eq!(lines(forbidden_words(path, &format!("x\nsee {root}data\n"))), [2]);
        assert_eq!(lines(forbidden_words(path, &format!("see ..{root}data\n"))), [0; 0]);
        let task = format!("TO{}", "DO");
        assert_eq!(lines(forbidden_words(path, &format!("// {task}: later\n"))), [1]);
        assert_eq!(lines(forbidden_words(path, &format!("{task}S\n"))), [0; 0]);
    }

    #[test]
    fn long_files_and_silent_crates_are_found() {
        let path = Path::new("crates/data/src/lib.rs");
        assert!(length(path, &"\n".repeat(MAX_LINES)).is_none());
        assert!(length(path, &"\n".repeat(MAX_LINES + 1)).is_some());
        assert!(opening(path, "//! Data.\n").is_none());
        assert!(opening(path, "use std::fs;\n").is_some());
        assert!(opening(Path::new("crates/data/src/loader.rs"), "use std::fs;\n").is_none());
        assert!(opening(Path::new("crates/data/examples/a.rs"), "fn main() {}\n").is_some());
    }
}
