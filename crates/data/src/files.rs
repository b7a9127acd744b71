//! From paths, folders and globs to the list of files that are read, in a fixed order.

use crate::config::Source;
use crate::error::DataError;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// How the bytes of a file become documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Format {
    /// The whole file is one document.
    Plain,
    /// Every line is a JSON object with a text field.
    Jsonl,
    /// A column holds the texts.
    Parquet,
}

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, of one or more members.
    Gzip,
    /// Zstandard, of one or more frames.
    Zstd,
}

/// A file of the corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusFile {
    /// Where it is.
    pub path: PathBuf,
    /// Which of the sources it belongs to.
    pub source: usize,
    /// Length on disk, in bytes.
    pub bytes: u64,
    /// How it is read.
    pub format: Format,
    /// How it is compressed.
    pub compression: Compression,
    /// Field or column of the text.
    pub text_field: String,
}

/// Extensions that are looked for in a folder.
const KNOWN: [&str; 7] = [".txt", ".md", ".rs", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"];

/// Lists the files of all sources: in the order of the sources and of their paths, sorted by path inside a folder or a
/// glob, each file once. Names that start with a dot are skipped inside folders.
///
/// # Errors
/// When there is no source, a path does not exist or cannot be read, or a folder or glob holds no text.
pub fn list_files(sources: &[Source], text_field: &str) -> Result<Vec<CorpusFile>, DataError> {
    if sources.iter().all(|s| s.paths.is_empty()) {
        return Err(DataError::NoSources);
    }
    let mut files = Vec::new();
    let mut seen = HashSet::new();
    for (number, source) in sources.iter().enumerate() {
        for pattern in &source.paths {
            for path in expand(pattern)? {
                let metadata = std::fs::metadata(&path).map_err(DataError::io("open", &path))?;
                if !seen.insert(path.clone()) {
                    continue;
                }
                let (format, compression) = format_of(&path);
                let text_field = source.text_field.clone().unwrap_or_else(|| text_field.to_owned());
                files.push(CorpusFile { path, source: number, bytes: metadata.len(), format, compression, text_field });
            }
        }
    }
    Ok(files)
}

/// Format and compression by the file's name; what is not known is plain text.
fn format_of(path: &Path) -> (Format, Compression) {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = name.strip_suffix(".zst") {
        (stem, Compression::Zstd)
    } else {
        (name.as_str(), Compression::None)
    };
    let format = match stem {
        s if s.ends_with(".jsonl") => Format::Jsonl,
        s if s.ends_with(".parquet") && compression == Compression::None => Format::Parquet,
        _ => Format::Plain,
    };
    (format, compression)
}

/// Extensions of images.
const IMAGES: [&str; 3] = [".png", ".jpg", ".jpeg"];

fn ends_with_any(file: &Path, extensions: &[&str]) -> bool {
    let name = file.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    extensions.iter().any(|known| name.ends_with(known))
}

/// Whether a file's name is that of an image.
pub(crate) fn is_image(file: &Path) -> bool {
    ends_with_any(file, &IMAGES)
}

/// The images that a file, a folder or a glob names, sorted; none of a folder without any.
pub(crate) fn image_files(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let path = Path::new(pattern);
    if path.is_dir() {
        walk(path, is_image)
    } else {
        Ok(expand(pattern)?.into_iter().filter(|f| is_image(f)).collect())
    }
}

fn expand(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let path = Path::new(pattern);
    let nothing = |why: &str| Err(DataError::NothingMatches { pattern: pattern.to_owned(), why: why.to_owned() });
    if path.is_dir() {
        let found = walk(path, |file| ends_with_any(file, &KNOWN))?;
        return if found.is_empty() { nothing("the folder holds no file of text") } else { Ok(found) };
    }
    // A file with brackets in its name is that file, not a glob.
    if path.exists() {
        return Ok(vec![path.to_owned()]);
    }
    if !pattern.contains(['*', '?', '[', '{']) {
        return nothing("there is no such file or folder");
    }
    let bad = |e: globset::Error| DataError::BadGlob { pattern: pattern.to_owned(), reason: e.kind().to_string() };
    let glob = globset::GlobBuilder::new(pattern.strip_prefix("./").unwrap_or(pattern))
        .literal_separator(true)
        .build()
        .map_err(bad)?
        .compile_matcher();
    let base = glob_base(pattern);
    if !base.is_dir() {
        return nothing(&format!("there is no folder {}", base.display()));
    }
    let found = walk(&base, |file| glob.is_match(file.strip_prefix("./").unwrap_or(file)))?;
    if found.is_empty() { nothing("no file matches the glob") } else { Ok(found) }
}

/// The folder before the first component with a wildcard.
fn glob_base(pattern: &str) -> PathBuf {
    let fixed = pattern.find(['*', '?', '[', '{']).unwrap_or(pattern.len());
    match pattern[..fixed].rfind('/') {
        Some(0) => PathBuf::from("/"),
        Some(slash) => PathBuf::from(&pattern[..slash]),
        None => PathBuf::from("."),
    }
}

fn walk(base: &Path, mut wanted: impl FnMut(&Path) -> bool) -> Result<Vec<PathBuf>, DataError> {
    let mut found = Vec::new();
    let hidden = |e: &walkdir::DirEntry| e.depth() > 0 && e.file_name().as_encoded_bytes().starts_with(b".");
    for entry in walkdir::WalkDir::new(base).follow_links(true).into_iter().filter_entry(|e| !hidden(e)) {
        let entry = entry.map_err(|e| {
            let path = e.path().unwrap_or(base).to_owned();
            let source =
                e.into_io_error().unwrap_or_else(|| std::io::Error::other("a link leads back to its own folder"));
            DataError::Io { operation: "list", path, source }
        })?;
        if entry.file_type().is_file() && wanted(entry.path()) {
            found.push(entry.into_path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn folders_globs_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("b/c")).unwrap();
        std::fs::create_dir_all(root.join(".hidden")).unwrap();
        for name in ["z.txt", "a.md", "b/c/x.rs", "b/y.jsonl.zst", "b/n.bin", ".hidden/h.txt", "odd[1].py"] {
            std::fs::write(root.join(name), "text").unwrap();
        }
        let list = |paths: &[&str]| {
            let source = Source::new(paths.iter().map(|p| format!("{}{p}", root.display())));
            list_files(&[source], "text").map(|files| {
                files
                    .iter()
                    .map(|f| f.path.strip_prefix(root).unwrap().to_string_lossy().into_owned())
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(list(&[""]).unwrap(), ["a.md", "b/c/x.rs", "b/y.jsonl.zst", "z.txt"]);
        assert_eq!(list(&["/**/*.rs", "/z.txt", "/b"]).unwrap(), ["b/c/x.rs", "z.txt", "b/y.jsonl.zst"]);
        assert_eq!(list(&["/b/*"]).unwrap(), ["b/n.bin", "b/y.jsonl.zst"]);
        assert_eq!(list(&["/odd[1].py"]).unwrap(), ["odd[1].py"]);
        assert!(list(&["/nothing"]).unwrap_err().to_string().contains("no such file"));
        assert!(list(&["/*.csv"]).unwrap_err().to_string().contains("no file matches"));
        assert!(matches!(list_files(&[], "text"), Err(DataError::NoSources)));
    }
}
