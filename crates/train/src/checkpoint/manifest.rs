//! `manifest.json`: what a checkpoint holds, and how to see that it is whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::CheckpointError;
use super::pieces::{Hash, PORTION};

/// The name of the manifest in a checkpoint folder.
pub const MANIFEST: &str = "manifest.json";

const FORMAT: &str = "firebox-checkpoint";
/// 2: files may have pieces.
const VERSION: u32 = 2;
/// Room for a hundred thousand files; a larger manifest is refused before it is read.
const MAX_MANIFEST: u64 = 16 << 20;
/// Stands for the checksum while the checksum is computed.
const NO_CHECKSUM: &str = "0000000000000000000000000000000000000000000000000000000000000000";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Bytes.
    pub(super) size: u64,
    /// SHA-256 of the content, 64 lower-case hexadecimal digits; of a file in pieces, that of their hashes, one after the other.
    pub(super) sha256: String,
    /// The pieces, in order, where there is more than one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pieces: Vec<PieceEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PieceEntry {
    /// Bytes.
    size: u64,
    /// SHA-256 of these bytes.
    sha256: String,
}

impl FileEntry {
    /// A file that consists of pieces of these sizes and hashes.
    pub(super) fn new(pieces: impl IntoIterator<Item = (u64, Hash)>) -> Self {
        let pieces: Vec<_> = pieces.into_iter().collect();
        let size = pieces.iter().map(|(size, _)| size).sum();
        if let [(_, hash)] = pieces.as_slice() {
            return Self { size, sha256: hex(hash), pieces: vec![] };
        }
        let mut all = Sha256::new();
        pieces.iter().for_each(|(_, hash)| all.update(hash));
        let entry = |(size, hash): &(u64, Hash)| PieceEntry { size: *size, sha256: hex(hash) };
        Self { size, sha256: hex(&all.finalize()), pieces: pieces.iter().map(entry).collect() }
    }

    /// Where each piece begins, and its size and hash.
    fn pieces(&self) -> Vec<(u64, u64, &str)> {
        if self.pieces.is_empty() {
            return vec![(0, self.size, &self.sha256)];
        }
        let starts = self.pieces.iter().scan(0u64, |at, piece| {
            let start = *at;
            *at = at.saturating_add(piece.size);
            Some((start, piece.size, piece.sha256.as_str()))
        });
        starts.collect()
    }

    /// Whether the pieces are all of the file.
    fn is_whole(&self) -> bool {
        let last = self.pieces().last().map(|(start, size, _)| start.saturating_add(*size));
        last == Some(self.size)
    }

    /// Compares a file of the right size with the hashes.
    fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        // What takes long with a large file: on all threads.
        self.pieces().into_par_iter().try_for_each(|(start, size, sha256)| {
            let read = || {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(start))?;
                hash(file.take(size))
            };
            check_hash(path, sha256, read().map_err(CheckpointError::io("read", path))?)
        })
    }

    /// Compares the content of a file with the hashes.
    pub(super) fn check_bytes(&self, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
        let torn = |got| CheckpointError::torn(path, format!("{} bytes", self.size), format!("{got} bytes"));
        if bytes.len() as u64 != self.size {
            return Err(torn(bytes.len()));
        }
        self.pieces().into_iter().try_for_each(|(start, size, sha256)| {
            let piece = &bytes[start as usize..(start + size) as usize];
            check_hash(path, sha256, hex(&Sha256::digest(piece)))
        })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: String,
    version: u32,
    pub(super) step: u64,
    /// What is to be minimized, usually the validation loss; `null` if there was none.
    pub(super) metric: Option<f64>,
    /// By name, relative to the folder, with `/` between parts.
    pub(super) files: BTreeMap<String, FileEntry>,
    /// SHA-256 of this very text with 64 zeros in this place.
    sha256: String,
}

/// To tell a newer version, whose other fields are unknown, from a damaged file.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u32,
}

impl Manifest {
    pub(super) fn new(step: u64, metric: Option<f64>, files: BTreeMap<String, FileEntry>) -> Self {
        // JSON has no NaN or infinity, and neither can be a best value.
        let metric = metric.filter(|m| m.is_finite());
        Self { format: FORMAT.into(), version: VERSION, step, metric, files, sha256: String::new() }.sealed()
    }

    /// With the checksum of its text.
    fn sealed(mut self) -> Self {
        self.sha256 = NO_CHECKSUM.into();
        self.sha256 = hex(&Sha256::digest(self.text()));
        self
    }

    /// The one text of this manifest: reading accepts no other, so that a change of any byte is seen.
    pub(super) fn text(&self) -> Vec<u8> {
        // Strings, integers and finite floats under string keys always serialize.
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Reads and checks the manifest of the checkpoint folder `dir`, but not yet the files it names.
    pub(super) fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = &dir.join(MANIFEST);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(no_manifest(dir)),
            Err(source) => return Err(CheckpointError::io("read", path)(source)),
        };
        let mut text = Vec::new();
        file.take(MAX_MANIFEST + 1).read_to_end(&mut text).map_err(CheckpointError::io("read", path))?;
        if text.len() as u64 > MAX_MANIFEST {
            return Err(CheckpointError::torn(path, format!("at most {MAX_MANIFEST} bytes"), "more"));
        }
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Self, CheckpointError> {
        if let Ok(found) = serde_json::from_slice::<Version>(text)
            && found.format == FORMAT
            && found.version > VERSION
        {
            return Err(CheckpointError::WrongKind {
                path: path.to_owned(),
                expected: format!("a checkpoint of version {VERSION} or before"),
                got: format!("version {}, of a newer Firebox: update Firebox to read it", found.version),
            });
        }
        let manifest: Self = serde_json::from_slice(text)
            .map_err(|error| CheckpointError::torn(path, "a manifest", format!("text that is none ({error})")))?;
        if manifest.format != FORMAT || !(1..=VERSION).contains(&manifest.version) {
            return Err(CheckpointError::WrongKind {
                path: path.to_owned(),
                expected: format!("the format {FORMAT} {VERSION}"),
                got: format!("{} {}", manifest.format, manifest.version),
            });
        }
        for (name, entry) in &manifest.files {
            check_name(path, name)?;
            if !entry.is_whole() {
                return Err(CheckpointError::torn(path, format!("pieces of {name} that are all of it"), "others"));
            }
        }
        let right = manifest.clone().sealed();
        if right.text() != text {
            return Err(CheckpointError::torn(
                path,
                format!("the checksum {} and text as Firebox writes it", right.sha256),
                format!("the checksum {} or changed text", manifest.sha256),
            ));
        }
        Ok(manifest)
    }

    /// Compares the files in `dir` with the manifest: their sizes and, if `hashes`, their content.
    pub(super) fn verify(&self, dir: &Path, hashes: bool) -> Result<(), CheckpointError> {
        // All sizes first: that is quick and finds what a crash or a broken copy leaves.
        for (name, entry) in &self.files {
            let path = &dir.join(name);
            let found = std::fs::metadata(path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    CheckpointError::torn(path, format!("{} bytes", entry.size), "no file")
                }
                _ => CheckpointError::io("read", path)(error),
            })?;
            if !found.is_file() {
                return Err(CheckpointError::torn(path, "a file", "something else"));
            }
            if found.len() != entry.size {
                return Err(CheckpointError::torn(
                    path,
                    format!("{} bytes", entry.size),
                    format!("{} bytes", found.len()),
                ));
            }
        }
        if hashes {
            for (name, entry) in &self.files {
                let path = &dir.join(name);
                entry.check(path)?;
            }
        }
        Ok(())
    }
}

fn no_manifest(dir: &Path) -> CheckpointError {
    let Ok(found) = std::fs::metadata(dir) else {
        return CheckpointError::Missing {
            operation: "open",
            path: dir.to_owned(),
            expected: "a checkpoint folder".into(),
        };
    };
    let got = if !found.is_dir() {
        "a file"
    } else if dir.join("checkpoints").is_dir() {
        "a run folder: name the checkpoint in it, checkpoints/step-N"
    } else if dir.join("config.json").exists() && dir.join("state.json").exists() {
        "a checkpoint without manifest.json, which is written last: it was cut off, or not copied whole"
    } else if dir.join("config.json").exists() {
        "a folder without manifest.json: if it is a Hugging Face model, `firebox import` it first"
    } else {
        "a folder without manifest.json"
    };
    CheckpointError::WrongKind { path: dir.to_owned(), expected: "a checkpoint folder".into(), got: got.into() }
}

fn check_hash(path: &Path, expected: &str, got: String) -> Result<(), CheckpointError> {
    if got == expected {
        return Ok(());
    }
    Err(CheckpointError::torn(path, format!("content with SHA-256 {expected}"), got))
}

/// Reads to the end: the SHA-256 of what there was.
fn hash(mut from: impl io::Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; PORTION];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Accepts only names that stay in their folder on every system: parts of ordinary characters with `/` between.
///
/// `path`: the file in which the name stands.
pub(super) fn check_name(path: &Path, name: &str) -> Result<(), CheckpointError> {
    let reason = if name.is_empty() {
        "is empty"
    } else if name.len() > 1024 {
        "is too long"
    } else if name.starts_with('/') {
        "is an absolute path"
    } else if name.contains(['\\', ':', '\0']) || name.contains(char::is_control) {
        "has a character that is no part of a plain name"
    } else if name.split('/').any(|part| part == "..") {
        "leads out of the folder"
    } else if name.split('/').any(|part| part.is_empty() || part == ".") {
        "has an empty part"
    } else if name == MANIFEST {
        "is the manifest itself"
    } else {
        return Ok(());
    };
    Err(CheckpointError::UnsafeName { path: path.to_owned(), name: name.to_owned(), reason })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let entry = |size| FileEntry::new([(size, Sha256::digest(b"x").into())]);
        let files = [("model.safetensors".to_owned(), entry(1)), ("optimizer/adamw.safetensors".to_owned(), entry(7))];
        Manifest::new(u64::MAX, Some(0.1 + 0.2), files.into())
    }

    #[test]
    fn text_and_back() {
        let manifest = sample();
        assert_eq!(Manifest::parse(Path::new(MANIFEST), &manifest.text()).unwrap(), manifest);
        assert_eq!(Manifest::new(1, Some(f64::NAN), BTreeMap::new()).metric, None);
    }

    #[test]
    fn every_bit_counts() {
        let text = sample().text();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut changed = text.clone();
                changed[at] ^= 1 << bit;
                assert!(Manifest::parse(Path::new(MANIFEST), &changed).is_err(), "byte {at} bit {bit}");
            }
            assert!(Manifest::parse(Path::new(MANIFEST), &text[..at]).is_err(), "cut at {at}");
        }
        assert!(Manifest::parse(Path::new(MANIFEST), &[&text[..], b"\n"].concat()).is_err());
    }

    #[test]
    fn names_stay_in_the_folder() {
        for name in ["a", "a.b", "optimizer/adamw.safetensors", "x/y/z", "..a", "a..", "manifest.json.bak", "模型.json"]
        {
            check_name(Path::new(MANIFEST), name).unwrap();
        }
        let long = "x".repeat(1025);
        for name in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\\..\\b",
            "C:x",
            "a\0b",
            "a\nb",
            "manifest.json",
            &long,
        ] {
            let error = check_name(Path::new(MANIFEST), name).unwrap_err();
            assert!(matches!(error, CheckpointError::UnsafeName { .. }), "{name}");
        }
    }

    #[test]
    fn a_newer_version_is_not_called_damaged() {
        let text = br#"{"format":"firebox-checkpoint","version":99,"shards":[]}"#;
        let error = Manifest::parse(Path::new(MANIFEST), text).unwrap_err();
        assert!(matches!(error, CheckpointError::WrongKind { .. }), "{error}");
    }
}
