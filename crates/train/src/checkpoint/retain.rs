//! Which checkpoints stay.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::error::CheckpointError;
use super::folder::{self, Kind};
use super::reader::{Checkpoint, Skipped, Verify, open_entry};

/// What [`prune`] did.
#[derive(Debug, Default)]
pub struct Pruned {
    /// The steps whose checkpoints stay, the oldest first.
    pub kept: Vec<u64>,
    /// The folders that were removed, the oldest first.
    pub removed: Vec<PathBuf>,
    /// Damaged or foreign folders. They are neither counted nor removed: what to do with them is for a person to say.
    pub skipped: Vec<Skipped>,
}

/// Keeps the last `keep_last` valid checkpoints in `dir` and, if `keep_best`, the one with the lowest metric (of equal
/// ones the newest); removes the others.
///
/// A checkpoint is removed only after one of those that stay has been read and found whole, and the last valid one is
/// never removed: `keep_last = 0` keeps one unless there is a best.
///
/// # Errors
///
/// If the folder cannot be read or a checkpoint cannot be removed. What was removed before stays removed.
pub fn prune(dir: impl AsRef<Path>, keep_last: usize, keep_best: bool) -> Result<Pruned, CheckpointError> {
    let dir = dir.as_ref();
    folder::clean(dir);
    let mut entries = folder::scan(dir)?;
    entries.retain(|entry| entry.kind == Kind::Finished);
    entries.sort_by_key(|entry| Reverse(entry.step));

    let mut pruned = Pruned::default();
    let mut whole = Vec::new();
    for entry in entries {
        match open_entry(&entry, Verify::Sizes) {
            Ok(checkpoint) => whole.push((entry, checkpoint)),
            Err(reason) => pruned.skipped.push(Skipped { path: entry.path, reason }),
        }
    }

    // Sizes do not show every damage: nothing goes before one of those that stay has been read and found whole. Usually
    // that is the one just written, whose bytes are still in memory.
    let keep = loop {
        let keep = choose(whole.iter().map(|(_, checkpoint)| checkpoint), keep_last, keep_best);
        let Some(first) = whole.iter().position(|(entry, _)| keep.contains(&entry.step)) else { break keep };
        match open_entry(&whole[first].0, Verify::Hashes) {
            Ok(_) => break keep,
            Err(reason) => pruned.skipped.push(Skipped { path: whole.remove(first).0.path, reason }),
        }
    };

    for (entry, _) in whole.into_iter().rev() {
        if keep.contains(&entry.step) {
            pruned.kept.push(entry.step);
        } else {
            folder::discard(dir, entry.step, &entry.path).map_err(CheckpointError::io("remove", &entry.path))?;
            pruned.removed.push(entry.path);
        }
    }
    Ok(pruned)
}

/// The steps to keep of `checkpoints`, which come in order from the newest on.
fn choose<'a>(
    checkpoints: impl Iterator<Item = &'a Checkpoint> + Clone,
    keep_last: usize,
    keep_best: bool,
) -> BTreeSet<u64> {
    let rated = checkpoints.clone().filter_map(|c| Some((c.metric()?, c.step())));
    let best = rated.min_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))).filter(|_| keep_best);
    let last = if best.is_none() { keep_last.max(1) } else { keep_last };
    checkpoints.take(last).map(Checkpoint::step).chain(best.map(|(_, step)| step)).collect()
}
