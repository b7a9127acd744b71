//! Damage of any kind is seen, and the checkpoint before is used.

use std::fs;
use std::path::Path;

use firebox_train::checkpoint::{Checkpoint, CheckpointError, Verify, find_best, find_latest};

use super::{consistent_value, write};

/// Steps 1 and 2 in `dir`, and the files of step 2.
fn two(dir: &Path) -> Vec<String> {
    write(dir, 1, 1.0, 20, Some(1.0)).unwrap();
    let newest = Checkpoint::open(write(dir, 2, 2.0, 20, Some(0.5)).unwrap()).unwrap();
    newest.files().map(|(name, _)| name.to_owned()).chain(["manifest.json".to_owned()]).collect()
}

/// Asserts that step 2 is refused and step 1 taken instead.
#[track_caller]
fn falls_back(dir: &Path, what: &str) {
    for found in [find_latest(dir), find_best(dir)] {
        let found = found.unwrap();
        assert_eq!(found.checkpoint.step(), 1, "{what}");
        assert_eq!(found.skipped.len(), 1, "{what}");
        assert!(found.skipped[0].path.ends_with("step-2"), "{what}");
    }
    assert!(Checkpoint::open(dir.join("step-2")).is_err(), "{what}");
}

/// For each file of step 2 and each changed content that `changes` makes of it: the damage is seen.
fn every_change_is_seen(changes: impl Fn(&[u8]) -> Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let mut tried = 0;
    for name in two(dir.path()) {
        let path = dir.path().join("step-2").join(&name);
        let whole = fs::read(&path).unwrap();
        for changed in changes(&whole) {
            fs::write(&path, &changed).unwrap();
            falls_back(dir.path(), &format!("{name}, change {tried}"));
            tried += 1;
        }
        fs::write(&path, &whole).unwrap();
    }
    assert!(tried > 100, "{tried}");
    let found = find_latest(dir.path()).unwrap();
    assert_eq!(consistent_value(&found.checkpoint), 2.0, "whole again");
    consistent_value(&Checkpoint::open(dir.path().join("step-1")).unwrap());
}

#[test]
fn a_cut_at_any_byte() {
    every_change_is_seen(|whole| (0..whole.len()).map(|at| whole[..at].to_vec()).collect());
}

#[test]
fn a_flip_of_any_byte() {
    every_change_is_seen(|whole| {
        let flip = |at: usize| {
            let mut changed = whole.to_vec();
            changed[at] ^= 1 << (at % 8);
            changed
        };
        (0..whole.len()).map(flip).collect()
    });
}

#[test]
fn zeros_where_data_should_be_and_more_than_there_should_be() {
    // What some file systems leave after a power cut: the size is there and the content is not.
    every_change_is_seen(|whole| {
        let zeros = |from: usize| [&whole[..from], &vec![0; whole.len() - from]].concat();
        // From far enough before the end that the content there is not zero already.
        (0..whole.len().saturating_sub(1))
            .map(zeros)
            .filter(|changed| changed != whole)
            .chain([[whole, b"\0"].concat(), [whole, whole].concat()])
            .collect()
    });
}

#[test]
fn missing_files_and_files_of_another_kind() {
    let dir = tempfile::tempdir().unwrap();
    for name in two(dir.path()) {
        let path = dir.path().join("step-2").join(&name);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        falls_back(dir.path(), &name);
        fs::create_dir(&path).unwrap();
        falls_back(dir.path(), &name);
        fs::remove_dir(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    assert_eq!(find_latest(dir.path()).unwrap().checkpoint.step(), 2);
}

#[test]
fn a_renamed_checkpoint_is_not_taken_for_a_later_one() {
    let dir = tempfile::tempdir().unwrap();
    two(dir.path());
    fs::rename(dir.path().join("step-1"), dir.path().join("step-3")).unwrap();
    let found = find_latest(dir.path()).unwrap();
    assert_eq!((found.checkpoint.step(), found.skipped.len()), (2, 1));
    assert_eq!(Checkpoint::open(dir.path().join("step-3")).unwrap().step(), 1, "by its own name one may open it");
}

#[test]
fn sizes_find_cuts_and_hashes_find_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    two(dir.path());
    let folder = dir.path().join("step-2");
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let quick = Checkpoint::open_with(&folder, Verify::Sizes).unwrap();
    assert!(matches!(quick.bytes("model.safetensors"), Err(CheckpointError::Torn { .. })), "seen when it is read");
    assert!(Checkpoint::open(&folder).is_err());
    bytes.pop();
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Checkpoint::open_with(&folder, Verify::Sizes), Err(CheckpointError::Torn { .. })));
}

#[test]
fn all_damaged_says_so_for_each() {
    let dir = tempfile::tempdir().unwrap();
    two(dir.path());
    for step in [1, 2] {
        fs::write(dir.path().join(format!("step-{step}/config.json")), "{}").unwrap();
    }
    for error in [find_latest(dir.path()).unwrap_err(), find_best(dir.path()).unwrap_err()] {
        let CheckpointError::NoneValid { skipped, .. } = &error else { panic!("{error}") };
        assert_eq!(skipped.len(), 2);
        let text = error.to_string();
        assert!(text.contains("step-1") && text.contains("step-2") && text.contains("config.json"), "{text}");
    }
}
