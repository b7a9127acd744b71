//! Which checkpoints stay.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use firebox_train::checkpoint::{Checkpoint, CheckpointError, Writer, find_best, find_latest, prune};
use proptest::prelude::*;

use super::{hidden, names, write};

/// A checkpoint as quick to write as can be.
fn tiny(dir: &Path, step: u64, metric: Option<f64>) {
    let mut writer = Writer::create(dir, step).unwrap();
    writer.bytes("x", &step.to_le_bytes()).unwrap();
    writer.finish_with_metric(metric).unwrap();
}

fn steps(dir: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> =
        names(dir).iter().filter_map(|name| name.strip_prefix("step-")).map(|n| n.parse().unwrap()).collect();
    steps.sort_unstable();
    steps
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    None,
    Size,
    Content,
}

fn damage(dir: &Path, step: u64, damage: Damage) {
    let path = dir.join(format!("step-{step}/x"));
    match damage {
        Damage::None => {}
        Damage::Size => fs::write(path, "").unwrap(),
        Damage::Content => fs::write(path, [255; 8]).unwrap(),
    }
}

fn checkpoints(damages: Vec<Damage>) -> impl Strategy<Value = BTreeMap<u64, (Option<f64>, Damage)>> {
    let metric = prop_oneof![1 => Just(None), 3 => (0..4u8).prop_map(|m| Some(f64::from(m)))];
    prop::collection::btree_map(0..30u64, (metric, prop::sample::select(damages)), 0..7)
}

fn make(dir: &Path, all: &BTreeMap<u64, (Option<f64>, Damage)>) {
    for (&step, &(metric, _)) in all {
        tiny(dir, step, metric);
    }
    for (&step, &(_, how)) in all {
        damage(dir, step, how);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_last_and_the_best_stay_and_nothing_else(
        all in checkpoints(vec![Damage::None, Damage::None, Damage::Size]), keep_last in 0usize..4, keep_best: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &all);
        let valid: Vec<(u64, Option<f64>)> =
            all.iter().filter(|(_, (_, how))| *how == Damage::None).map(|(&step, &(metric, _))| (step, metric)).collect();
        let best = valid.iter().filter_map(|&(step, metric)| Some((metric?, step)))
            .fold(None, |best: Option<(f64, u64)>, next| if best.is_none_or(|b| next.0 <= b.0) { Some(next) } else { best })
            .map(|(_, step)| step);
        match (find_best(dir.path()), best) {
            (Ok(found), Some(step)) => prop_assert_eq!(found.checkpoint.step(), step),
            (Err(CheckpointError::Missing { .. } | CheckpointError::NoneValid { .. }), None) => {}
            (found, best) => prop_assert!(false, "{:?} instead of {:?}", found, best),
        }
        let best = best.filter(|_| keep_best);
        let keep_last = if best.is_none() { keep_last.max(1) } else { keep_last };
        let last = valid.iter().rev().take(keep_last).map(|&(step, _)| step);
        let mut expected: Vec<u64> = last.chain(best).collect();
        expected.sort_unstable();
        expected.dedup();

        let pruned = prune(dir.path(), keep_last, keep_best).unwrap();
        prop_assert_eq!(&pruned.kept, &expected);
        prop_assert_eq!(pruned.removed.len(), valid.len() - expected.len());
        prop_assert_eq!(pruned.skipped.len(), all.len() - valid.len());
        let damaged = all.iter().filter(|(_, (_, how))| *how != Damage::None).map(|(&step, _)| step);
        let mut there: Vec<u64> = expected.iter().copied().chain(damaged).collect();
        there.sort_unstable();
        prop_assert_eq!(steps(dir.path()), there);
        prop_assert!(hidden(dir.path()).is_empty());
        for step in expected {
            Checkpoint::open(dir.path().join(format!("step-{step}"))).unwrap();
        }
        // Once more changes nothing.
        prop_assert!(prune(dir.path(), keep_last, keep_best).unwrap().removed.is_empty());
    }

    #[test]
    fn a_valid_one_stays_whatever_is_damaged(
        all in checkpoints(vec![Damage::None, Damage::Size, Damage::Content]), keep_last in 0usize..3, keep_best: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &all);
        let some_valid = all.values().any(|(_, how)| *how == Damage::None);
        prune(dir.path(), keep_last, keep_best).unwrap();
        prop_assert_eq!(find_latest(dir.path()).is_ok(), some_valid);
    }
}

#[test]
fn the_newest_is_damaged_within() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=4 {
        tiny(dir.path(), step, None);
    }
    damage(dir.path(), 4, Damage::Content);
    let pruned = prune(dir.path(), 2, false).unwrap();
    assert_eq!(pruned.kept, [2, 3]);
    assert_eq!(steps(dir.path()), [2, 3, 4], "the damaged one is for a person to look at");
    assert!(pruned.skipped[0].path.ends_with("step-4"));
}

#[test]
fn what_is_not_a_checkpoint_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=3 {
        write(dir.path(), step, 0.0, 1, None).unwrap();
    }
    fs::create_dir(dir.path().join("best-so-far")).unwrap();
    fs::create_dir(dir.path().join("step-0002")).unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    prune(dir.path(), 1, true).unwrap();
    assert_eq!(names(dir.path()), ["best-so-far", "notes.txt", "step-0002", "step-3"]);
    assert!(matches!(prune(dir.path().join("absent"), 1, true), Err(CheckpointError::Missing { .. })));
}

#[test]
fn a_half_deleted_checkpoint_is_never_found_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    tiny(dir.path(), 1, None);
    tiny(dir.path(), 2, None);
    fs::rename(dir.path().join("step-2"), dir.path().join(".step-2.gone-1.0")).unwrap();
    assert_eq!(find_latest(dir.path()).unwrap().checkpoint.step(), 1);
    prune(dir.path(), 5, false).unwrap();
    assert_eq!(names(dir.path()), ["step-1"]);
}
