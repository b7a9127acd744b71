//! Files made to do harm.

use std::fs;
use std::path::Path;

use firebox_train::checkpoint::{Checkpoint, CheckpointError, TensorFile, Writer};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::{names, write};

fn sha256(bytes: impl AsRef<[u8]>) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A manifest with a right checksum that names one file.
fn forge(name: &str, content: &[u8]) -> String {
    let zeros = "0".repeat(64);
    let text = format!(
        "{{\n  \"format\": \"firebox-checkpoint\",\n  \"version\": 1,\n  \"step\": 1,\n  \"metric\": null,\n  \"files\": {{\n    \
         {}: {{\n      \"size\": {},\n      \"sha256\": \"{}\"\n    }}\n  }},\n  \"sha256\": \"{zeros}\"\n}}\n",
        serde_json::to_string(name).unwrap(),
        content.len(),
        sha256(content),
    );
    text.replace(&format!("\"sha256\": \"{zeros}\""), &format!("\"sha256\": \"{}\"", sha256(&text)))
}

#[test]
fn a_manifest_cannot_reach_out_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("step-1");
    fs::create_dir(&folder).unwrap();
    for path in [dir.path().join("secret"), folder.join("plain")] {
        fs::write(path, "secret").unwrap();
    }
    // The forged manifest is right in everything else.
    fs::write(folder.join("manifest.json"), forge("plain", b"secret")).unwrap();
    assert_eq!(Checkpoint::open(&folder).unwrap().bytes("plain").unwrap(), b"secret");

    let absolute = dir.path().join("secret").to_str().unwrap().to_owned();
    for name in ["../secret", &absolute, "x/../../secret", "./plain", "..\\secret", "plain\0", "", "manifest.json"] {
        fs::write(folder.join("manifest.json"), forge(name, b"secret")).unwrap();
        match Checkpoint::open(&folder) {
            Err(CheckpointError::UnsafeName { name: found, .. }) => assert_eq!(found, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn the_writer_stays_in_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["../x", "/tmp/firebox-must-not-be-here", "a/../../x", "manifest.json", "a\\b"] {
        let mut writer = Writer::create(dir.path(), 1).unwrap();
        assert!(matches!(writer.bytes(name, b"x"), Err(CheckpointError::UnsafeName { .. })), "{name}");
    }
    assert!(names(dir.path()).is_empty());
    assert!(!Path::new("/tmp/firebox-must-not-be-here").exists());
}

#[test]
fn a_manifest_of_endless_length_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write(dir.path(), 1, 0.0, 1, None).unwrap();
    let file = fs::File::create(folder.join("manifest.json")).unwrap();
    file.set_len(1 << 40).unwrap(); // a sparse file: it takes no room on the disk
    assert!(matches!(Checkpoint::open(&folder), Err(CheckpointError::Torn { .. })));
}

#[test]
fn a_header_length_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for (length, size) in [(u64::MAX, 16), (1 << 40, 1 << 30), (100_000_001, 200_000_000), (9, 16)] {
        fs::write(&path, length.to_le_bytes()).unwrap();
        fs::OpenOptions::new().append(true).open(&path).unwrap().set_len(size).unwrap();
        for place in [dir.path(), &path] {
            let error = TensorFile::open(place).unwrap_err();
            assert!(matches!(error, CheckpointError::Torn { .. }), "{error}");
        }
    }
}

/// Two shards and an index that names them as `names`.
fn shards(dir: &Path, names: [&str; 2]) {
    for (i, value) in [(1, 1.0f32), (2, 2.0)] {
        let header = format!(r#"{{"t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &value.to_le_bytes()].concat();
        fs::write(dir.join(format!("model-{i}.safetensors")), bytes).unwrap();
    }
    let index =
        serde_json::json!({ "metadata": { "total_size": 8 }, "weight_map": { "t1": names[0], "t2": names[1] } });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_are_read_and_their_index_stays_in_its_folder() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("model");
    fs::create_dir_all(dir.join("inner")).unwrap();
    shards(&dir, ["model-1.safetensors", "model-2.safetensors"]);
    for path in [dir.clone(), dir.join("model.safetensors.index.json")] {
        let file = TensorFile::open(path).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["t1", "t2"]);
        assert_eq!(file.f32("t2").unwrap(), [2.0]);
    }
    for place in [outer.path().to_owned(), dir.join("inner")] {
        fs::copy(dir.join("model-2.safetensors"), place.join("model-2.safetensors")).unwrap();
    }
    let absolute = outer.path().join("model-2.safetensors").to_str().unwrap().to_owned();
    for name in ["../model-2.safetensors", "inner/model-2.safetensors", "inner/../model-2.safetensors", &absolute, ".."]
    {
        shards(&dir, ["model-1.safetensors", name]);
        let error = TensorFile::open(&dir).unwrap_err();
        assert!(matches!(error, CheckpointError::UnsafeName { .. }), "{name}: {error}");
    }
    for (name, missing) in [("absent.safetensors", true), ("model-1.safetensors", false), ("inner", false)] {
        shards(&dir, ["model-1.safetensors", name]);
        let error = TensorFile::open(&dir).unwrap_err();
        assert_eq!(matches!(error, CheckpointError::Missing { .. }), missing, "{name}: {error}");
    }
    fs::write(dir.join("model.safetensors.index.json"), "[]").unwrap();
    assert!(matches!(TensorFile::open(&dir), Err(CheckpointError::Json { .. })));
    assert!(matches!(TensorFile::open(outer.path()), Err(CheckpointError::Missing { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in the file: an error, or tensors of the size that their shape says.
    #[test]
    fn no_header_makes_the_reader_fall(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), prop::sample::select(b"0123456789,[]{}\"-".to_vec())]), 1..4),
        keep in any::<prop::sample::Index>(), cut in any::<bool>(),
    ) {
        let header = br#"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"y":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}}"#;
        let mut bytes = [&(header.len() as u64).to_le_bytes()[..], header, &[7; 10]].concat();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        let file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        if let Ok(tensors) = TensorFile::open(file.path()) {
            for name in tensors.names() {
                let elements: usize = tensors.shape(name).unwrap().iter().product();
                prop_assert_eq!(tensors.bytes(name).unwrap().len() * 8, elements * tensors.dtype(name).unwrap().bitsize());
                if let Ok(values) = tensors.f32(name) {
                    prop_assert_eq!(values.len(), elements);
                }
            }
        }
    }
}
