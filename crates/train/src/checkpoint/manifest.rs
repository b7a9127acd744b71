//! `manifest.json`: what a checkpoint holds, and how to see that it is whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::CheckpointError;

/// The name of the manifest in a checkpoint folder.
pub const MANIFEST: &str = "manifest.json";

const FORMAT: &str = "firebox-checkpoint";
const VERSION: u32 = 1;
/// Room for a hundred thousand files; a larger manifest is refused before it is read.
const MAX_MANIFEST: u64 = 16 << 20;
/// Stands for the checksum while the checksum is computed.
const NO_CHECKSUM: &str = "0000000000000000000000000000000000000000000000000000000000000000";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Bytes.
    pub(super) size: u64,
    /// SHA-256 of the content, 64 lower-case hexadecimal digits.
    pub(super) sha256: String,
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
        let mut manifest =
            Self { format: FORMAT.into(), version: VERSION, step, metric, files, sha256: NO_CHECKSUM.into() };
        manifest.sha256 = hex(&Sha256::digest(manifest.text()));
        manifest
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
        if manifest.format != FORMAT || manifest.version != VERSION {
            return Err(CheckpointError::WrongKind {
                path: path.to_owned(),
                expected: format!("the format {FORMAT} {VERSION}"),
                got: format!("{} {}", manifest.format, manifest.version),
            });
        }
        for name in manifest.files.keys() {
            check_name(path, name)?;
        }
        let right = Self::new(manifest.step, manifest.metric, manifest.files.clone());
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
                let file = File::open(path).map_err(CheckpointError::io("read", path))?;
                let (_, sha256) = hash(file).map_err(CheckpointError::io("read", path))?;
                check_hash(path, entry, sha256)?;
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

pub(super) fn check_hash(path: &Path, entry: &FileEntry, sha256: String) -> Result<(), CheckpointError> {
    if sha256 == entry.sha256 {
        return Ok(());
    }
    Err(CheckpointError::torn(path, format!("content with SHA-256 {}", entry.sha256), sha256))
}

/// Reads to the end: how many bytes there were, and their SHA-256.
fn hash(mut from: impl io::Read) -> io::Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok((size, hex(&hasher.finalize()))),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
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
        let entry = |size| FileEntry { size, sha256: hex(&Sha256::digest(b"x")) };
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
        let text = br#"{"format":"firebox-checkpoint","version":2,"shards":[]}"#;
        let error = Manifest::parse(Path::new(MANIFEST), text).unwrap_err();
        assert!(matches!(error, CheckpointError::WrongKind { .. }), "{error}");
    }
}
