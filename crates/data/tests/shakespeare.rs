//! nanoGPT's data, to the number. Runs where the file is: its path in `FIREBOX_SHAKESPEARE`.
#![allow(clippy::unwrap_used, missing_docs)]

use firebox_data::{DataConfig, Source, ValSplit, prepare};
use std::path::{Path, PathBuf};

fn file() -> Option<PathBuf> {
    let named = std::env::var_os("FIREBOX_SHAKESPEARE").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/tinyshakespeare.txt");
    [named, Some(beside)].into_iter().flatten().find(|p| p.is_file())
}

#[test]
fn tinyshakespeare_is_nanogpts() {
    let Some(path) = file() else {
        eprintln!("SKIPPED: no tinyshakespeare.txt; name it in FIREBOX_SHAKESPEARE");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let config = DataConfig {
        tokenizer: "char".into(),
        val_split: ValSplit::Tail,
        val_fraction: 0.1,
        isolate_documents: false,
        ..DataConfig::default()
    };
    let data = prepare(&config, &[Source::new([path.to_string_lossy()])], dir.path(), &mut |_| {}).unwrap();
    // The numbers that nanoGPT's data/shakespeare_char/prepare.py prints.
    assert_eq!(data.tokenizer.vocab_size(), 65);
    assert_eq!((data.stats.train_tokens, data.stats.val_tokens), (1_003_854, 111_540));
    let text = std::fs::read(&path).unwrap();
    assert_eq!(data.val_documents().flatten().collect::<Vec<u8>>(), text[1_003_854..]);
    // "\n !$&',-.3:;?ABC...": the newline is 0, the space 1, and "First" begins the text as 18 47 56 57 58.
    assert_eq!(data.train[0].tokens(0..5), [18, 47, 56, 57, 58]);
    assert_eq!(data.tokenizer.encode(b"\n !").unwrap(), [0, 1, 2]);
}
