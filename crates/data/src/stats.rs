//! Counts of what was read, dropped and kept, for the log and the report.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What became of the corpus. Bytes are those of the text, after decompression.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Files read.
    pub files: u64,
    /// Documents read.
    pub documents: u64,
    /// Bytes of text read.
    pub bytes: u64,
    /// Characters kept (a byte that is not UTF-8 counts as one).
    pub chars: u64,
    /// Documents without text.
    pub dropped_empty: u64,
    /// Documents with the same bytes as an earlier one.
    pub dropped_exact: u64,
    /// Documents similar to an earlier one.
    pub dropped_near: u64,
    /// Documents under `filters.min_bytes`.
    pub dropped_short: u64,
    /// Documents over `filters.max_bytes`.
    pub dropped_long: u64,
    /// Documents over `filters.max_symbol_ratio`.
    pub dropped_symbols: u64,
    /// Documents over `filters.max_line_bytes`.
    pub dropped_line: u64,
    /// Documents over `filters.max_repeated_lines`.
    pub dropped_repeated: u64,
    /// Documents kept that hold bytes which are not UTF-8 (kept as they are).
    pub invalid_utf8: u64,
    /// Documents to train on; one that is cut by a split by position counts on both sides.
    pub train_documents: u64,
    /// Documents held out.
    pub val_documents: u64,
    /// Bytes to train on.
    pub train_bytes: u64,
    /// Bytes held out.
    pub val_bytes: u64,
    /// Tokens to train on, separators included.
    pub train_tokens: u64,
    /// Tokens held out, separators included.
    pub val_tokens: u64,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// True when too few documents for a split by hash made the split one by position.
    pub split_fell_back: bool,
}

impl Stats {
    /// Documents dropped, for whatever reason.
    pub fn dropped(&self) -> u64 {
        self.reasons().iter().map(|(_, n)| n).sum()
    }

    fn reasons(&self) -> [(&'static str, u64); 8] {
        [
            ("empty", self.dropped_empty),
            ("exact duplicates", self.dropped_exact),
            ("near duplicates", self.dropped_near),
            ("too short", self.dropped_short),
            ("too long", self.dropped_long),
            ("too many symbols", self.dropped_symbols),
            ("too long lines", self.dropped_line),
            ("repeated lines", self.dropped_repeated),
        ]
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} documents of {} files", size(self.bytes), self.documents, self.files)?;
        if self.dropped() > 0 {
            let reasons: Vec<String> =
                self.reasons().iter().filter(|(_, n)| *n > 0).map(|(why, n)| format!("{n} {why}")).collect();
            write!(f, ", dropped {}", reasons.join(", "))?;
        }
        if self.invalid_utf8 > 0 {
            write!(f, ", {} with bytes that are not UTF-8", self.invalid_utf8)?;
        }
        write!(
            f,
            "; train {} tokens of {} documents, validate {} of {}{}; vocabulary {}",
            self.train_tokens,
            self.train_documents,
            self.val_tokens,
            self.val_documents,
            if self.split_fell_back { " (the tail: too few documents to split by hash)" } else { "" },
            self.vocab_size
        )
    }
}

/// Bytes for a person to read.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
