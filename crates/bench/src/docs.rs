//! The generated parts of docs/benchmarks.md.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The documents' folder of the workspace that this was built from.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Replaces a section of docs/benchmarks.md.
///
/// # Errors
/// [`Error::Marker`], [`Error::Io`].
pub fn write_section(name: &str, text: &str) -> Result<()> {
    write_section_of("benchmarks.md", name, text)
}

/// Replaces a section of another document.
///
/// # Errors
/// As [`write_section`].
pub fn write_section_of(document: &str, name: &str, text: &str) -> Result<()> {
    let path = folder().join(document);
    let document = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let [begin, end] = markers(name);
    let replaced = replace(&document, [&begin, &end], text)
        .ok_or_else(|| Error::Marker { path: path.clone(), marker: format!("{begin} … {end}") })?;
    fs::write(&path, replaced).map_err(Error::io("write", &path))
}

/// Writes a plot beside the document; returns the Markdown that shows it.
///
/// # Errors
/// [`Error::Io`].
pub fn write_plot(name: &str, title: &str, svg: &str) -> Result<String> {
    let file = format!("bench-{name}.svg");
    let path = folder().join(&file);
    fs::write(&path, svg).map_err(Error::io("write", &path))?;
    Ok(format!("![{title}]({file})"))
}

fn markers(name: &str) -> [String; 2] {
    [format!("<!-- begin: bench {name} -->"), format!("<!-- end: bench {name} -->")]
}

/// The document with what stands between two lines replaced; `None` if one is missing.
fn replace(document: &str, [begin, end]: [&str; 2], text: &str) -> Option<String> {
    let start = document.find(begin)? + begin.len();
    let length = document[start..].find(end)?;
    Some(format!("{}\n\n{}\n\n{}", &document[..start], text.trim(), &document[start + length..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_section_changes() {
        let [begin, end] = markers("train");
        let document = format!("# Title\n\n{begin}\nold\n{end}\n\nrest\n");
        let new = replace(&document, [&begin, &end], "\nnew\n");
        let expected = format!("# Title\n\n{begin}\n\nnew\n\n{end}\n\nrest\n");
        assert_eq!(new.as_ref(), Some(&expected));
        assert_eq!(replace(&expected, [&begin, &end], "new"), new, "twice is once");
        assert_eq!(replace("nothing", [&begin, &end], "new"), None);
    }

    #[test]
    fn the_document_has_every_section() {
        let document = fs::read_to_string(folder().join("benchmarks.md")).unwrap_or_default();
        for name in ["train", "kernels", "context", "width", "depth", "speedrun"] {
            let [begin, end] = markers(name);
            assert!(document.contains(&begin) && document.contains(&end), "{name}");
        }
    }
}
