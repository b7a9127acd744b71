//! nanoGPT's setting for a CPU on tinyshakespeare, in full.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::Lab;

/// 40 thousand lines of Shakespeare, as <https://github.com/karpathy/char-rnn> collected them: where `FIREBOX_SHAKESPEARE` says, or beside the
/// source tree.
fn corpus() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/tinyshakespeare.txt");
    let named = std::env::var_os("FIREBOX_SHAKESPEARE").map(PathBuf::from);
    named.or_else(|| beside.is_file().then_some(beside))
}

#[test]
fn nanogpts_setting_reaches_its_loss() {
    let Some(corpus) = corpus() else {
        return common::skipped(
            "no tinyshakespeare.txt: name one in FIREBOX_SHAKESPEARE to train nanoGPT's setting on it",
        );
    };
    let lab = Lab::new(1);
    let corpus = corpus.canonicalize().unwrap();
    let ended =
        lab.call(&["train", "shakespeare-char", "--data", corpus.to_str().unwrap(), "--out", "run"]).succeeded();
    assert!(ended.stdout.contains("vocabulary 65"), "{}", ended.stdout);
    let run = lab.run("run");
    let summary = run.json("summary.json");
    assert_eq!((summary["steps"].as_u64(), summary["skipped_steps"].as_u64()), (Some(2000), Some(0)));
    let loss = summary["val_loss"].as_f64().unwrap();
    // nanoGPT itself reports 1.88.
    assert!(loss <= 1.90, "validation loss {loss}");
    println!("validation loss {loss}, {} s", summary["wall_s"]);
}
