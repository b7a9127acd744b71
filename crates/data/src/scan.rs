//! The first pass over the corpus: what is kept, on which side of the split, and what the tokenizer is made from.

use crate::config::{DataConfig, Filters, ValSplit};
use crate::error::DataError;
use crate::hash::{first_128, hash64};
use crate::minhash::{MinHasher, NearIndex};
use crate::read::Part;
use crate::stats::Stats;
use crate::tokenizer::CharSet;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BinaryHeap, HashSet};

/// Lines of a document whose repetition is measured; more would cost memory without changing the share.
const LINES_MEASURED: usize = 1 << 20;

/// What becomes of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Train,
    Val,
    Dropped,
}

/// The result of the first pass.
pub(crate) struct Scanned {
    /// One per document, in order of reading.
    pub(crate) fates: Vec<Fate>,
    pub(crate) stats: Stats,
    pub(crate) chars: CharSet,
    pub(crate) sample: Vec<Vec<u8>>,
    /// Characters kept, per stream of training tokens.
    pub(crate) group_chars: Vec<u64>,
    /// By position rather than by hash.
    pub(crate) tail: bool,
}

/// Takes the parts of all documents, in order.
pub(crate) struct Scanner<'a> {
    config: &'a DataConfig,
    groups: &'a [usize],
    seen: HashSet<u128>,
    near: Option<NearIndex>,
    open: Option<Document>,
    sample: Sample,
    out: Scanned,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(config: &'a DataConfig, groups: &'a [usize], n_groups: usize) -> Self {
        let out = Scanned {
            fates: Vec::new(),
            stats: Stats::default(),
            chars: CharSet::default(),
            sample: Vec::new(),
            group_chars: vec![0; n_groups],
            tail: config.val_split == ValSplit::Tail,
        };
        let cap = if config.tokenizer == "bpe" { config.tokenizer_sample_bytes } else { 0 };
        let sample = Sample { cap, held: 0, pieces: BinaryHeap::new() };
        Self {
            config,
            groups,
            seen: HashSet::new(),
            near: config.near_dedup.map(NearIndex::new),
            open: None,
            sample,
            out,
        }
    }

    /// Measures a batch of parts on all threads, then decides about its documents in order.
    pub(crate) fn batch(&mut self, parts: Vec<Part>) {
        let mut documents: Vec<(Document, Vec<Part>)> = Vec::new();
        for part in parts {
            if part.first {
                documents.push((Document::new(self.config, part.source), vec![part]));
            } else if let Some((_, parts)) = documents.last_mut() {
                parts.push(part);
            } else if let Some(open) = self.open.take() {
                documents.push((open, vec![part]));
            }
        }
        documents.par_iter_mut().with_max_len(16).for_each(|(document, parts)| {
            parts.iter().for_each(|part| document.update(&part.bytes));
        });
        for (document, parts) in documents {
            let ended = parts.last().is_some_and(|p| p.last);
            let mut wanted = true;
            let document = if ended {
                wanted = self.decide(document) == Fate::Train;
                None
            } else {
                Some(document)
            };
            if wanted {
                parts.into_iter().for_each(|part| self.sample.offer(part.bytes));
            }
            self.open = document;
        }
    }

    /// Decides about a document that has been read to its end.
    fn decide(&mut self, document: Document) -> Fate {
        let stats = &mut self.out.stats;
        stats.documents += 1;
        stats.bytes += document.bytes;
        let Document { source, bytes, chars, invalid, set, .. } = document;
        let hash = first_128(document.hasher);
        let filters = &self.config.filters;
        let repeated = document.lines.as_ref().map_or(0.0, Lines::repeated);
        let counter = if bytes == 0 {
            Some(&mut stats.dropped_empty)
        } else if filters.min_bytes.is_some_and(|min| bytes < min) {
            Some(&mut stats.dropped_short)
        } else if filters.max_bytes.is_some_and(|max| bytes > max) {
            Some(&mut stats.dropped_long)
        } else if filters.max_symbol_ratio.is_some_and(|max| document.symbols as f64 > max * chars as f64) {
            Some(&mut stats.dropped_symbols)
        } else if filters.max_line_bytes.is_some_and(|max| document.longest_line > max) {
            Some(&mut stats.dropped_line)
        } else if filters.max_repeated_lines.is_some_and(|max| repeated > max) {
            Some(&mut stats.dropped_repeated)
        } else if self.config.dedup && !self.seen.insert(hash) {
            Some(&mut stats.dropped_exact)
        } else if let (Some(index), Some(minima)) = (&mut self.near, document.minima)
            && index.is_near(minima.finish())
        {
            Some(&mut stats.dropped_near)
        } else {
            None
        };
        let fate = if let Some(counter) = counter {
            *counter += 1;
            Fate::Dropped
        } else {
            stats.invalid_utf8 += u64::from(invalid);
            stats.chars += chars;
            self.out.group_chars[self.groups[source]] += chars;
            if let Some(set) = set {
                self.out.chars.merge(set);
            }
            if !self.out.tail && held_out(hash, self.config.val_fraction) { Fate::Val } else { Fate::Train }
        };
        self.out.fates.push(fate);
        fate
    }

    /// Closes the pass.
    pub(crate) fn finish(mut self) -> Result<Scanned, DataError> {
        let out = &mut self.out;
        let count = |fate| out.fates.iter().filter(|f| **f == fate).count();
        let (train, val) = (count(Fate::Train), count(Fate::Val));
        if train + val == 0 {
            return Err(DataError::EmptyCorpus(format!(
                "none of {} documents was kept: {} are empty, {} were dropped by data.filters and data.dedup",
                out.stats.documents,
                out.stats.dropped_empty,
                out.stats.dropped() - out.stats.dropped_empty
            )));
        }
        if !out.tail && self.config.val_fraction > 0.0 && (train == 0 || val == 0) {
            out.tail = true;
            out.stats.split_fell_back = true;
            out.fates.iter_mut().filter(|f| **f == Fate::Val).for_each(|f| *f = Fate::Train);
        }
        out.sample = self.sample.into_texts();
        Ok(self.out)
    }
}

/// Whether a document is held out: by the first half of its hash, as a fraction of all hashes.
fn held_out(hash: u128, fraction: f64) -> bool {
    ((hash >> 64) as u64 as f64) < fraction * 2f64.powi(64)
}

/// A document while it is read.
struct Document {
    source: usize,
    hasher: Sha256,
    bytes: u64,
    chars: u64,
    invalid: bool,
    symbols: u64,
    count_symbols: bool,
    line: u64,
    longest_line: u64,
    lines: Option<Lines>,
    minima: Option<MinHasher>,
    set: Option<CharSet>,
}

impl Document {
    fn new(config: &DataConfig, source: usize) -> Self {
        let Filters { max_symbol_ratio, max_repeated_lines, .. } = config.filters;
        Self {
            source,
            hasher: Sha256::new(),
            bytes: 0,
            chars: 0,
            invalid: false,
            symbols: 0,
            count_symbols: max_symbol_ratio.is_some(),
            line: 0,
            longest_line: 0,
            lines: max_repeated_lines.map(|_| Lines::default()),
            minima: config.near_dedup.map(|_| MinHasher::new()),
            set: (config.tokenizer == "char").then(CharSet::default),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        let (chars, invalid) = count_chars(bytes);
        self.chars += chars;
        self.invalid |= invalid > 0;
        if self.count_symbols {
            let symbol = |c: &char| !c.is_alphanumeric() && !c.is_whitespace();
            let valid: u64 = bytes.utf8_chunks().map(|c| c.valid().chars().filter(symbol).count() as u64).sum();
            self.symbols += valid + invalid;
        }
        for line in bytes.split_inclusive(|&b| b == b'\n') {
            self.line += line.len() as u64;
            self.longest_line = self.longest_line.max(self.line);
            if line.ends_with(b"\n") {
                self.line = 0;
            }
            if let Some(lines) = &mut self.lines {
                lines.add(line);
            }
        }
        if let Some(minima) = &mut self.minima {
            minima.update(bytes);
        }
        if let Some(set) = &mut self.set {
            set.add(bytes);
        }
    }
}

/// Characters, of which a byte that is not UTF-8 is one, and how many such bytes.
pub(crate) fn count_chars(bytes: &[u8]) -> (u64, u64) {
    let leads = |text: &[u8]| text.iter().filter(|&&b| b & 0xc0 != 0x80).count() as u64;
    if std::str::from_utf8(bytes).is_ok() {
        return (leads(bytes), 0);
    }
    bytes.utf8_chunks().fold((0, 0), |(chars, invalid), chunk| {
        let bad = chunk.invalid().len() as u64;
        (chars + leads(chunk.valid().as_bytes()) + bad, invalid + bad)
    })
}

/// Repetition of lines.
#[derive(Default)]
struct Lines {
    seen: HashSet<u64>,
    all: u64,
    again: u64,
}

impl Lines {
    fn add(&mut self, line: &[u8]) {
        let line = line.trim_ascii();
        if line.is_empty() || self.seen.len() == LINES_MEASURED {
            return;
        }
        self.all += 1;
        self.again += u64::from(!self.seen.insert(hash64(line, 2)));
    }

    fn repeated(&self) -> f64 {
        self.again as f64 / self.all.max(1) as f64
    }
}

/// The pieces of text with the smallest hashes, up to a number of bytes: a sample of the whole corpus in one pass and in
/// bounded memory, the same whatever the order of files.
struct Sample {
    cap: u64,
    held: u64,
    pieces: BinaryHeap<(u64, Vec<u8>)>,
}

impl Sample {
    /// Keeps a piece while it is among the fewest smallest ones that reach the cap: what that leaves does not depend on
    /// the order of offers.
    fn offer(&mut self, bytes: Vec<u8>) {
        if self.cap == 0 || bytes.is_empty() {
            return;
        }
        let rank = hash64(&bytes, 3);
        if self.held >= self.cap && self.pieces.peek().is_some_and(|(largest, _)| rank >= *largest) {
            return;
        }
        self.held += bytes.len() as u64;
        self.pieces.push((rank, bytes));
        while self.pieces.peek().is_some_and(|(_, largest)| self.held - largest.len() as u64 >= self.cap) {
            self.drop_largest();
        }
    }

    fn drop_largest(&mut self) {
        if let Some((_, piece)) = self.pieces.pop() {
            self.held -= piece.len() as u64;
        }
    }

    fn into_texts(mut self) -> Vec<Vec<u8>> {
        // The piece that reached the cap crossed it; it stays only where it is the only one.
        if self.held > self.cap && self.pieces.len() > 1 {
            self.drop_largest();
        }
        self.pieces.into_sorted_vec().into_iter().map(|(_, piece)| piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_is_bounded_and_independent_of_order() {
        let pieces: Vec<Vec<u8>> = (0..500u32).map(|i| vec![b'a' + (i % 26) as u8; 50 + i as usize % 77]).collect();
        let run = |order: &mut dyn Iterator<Item = &Vec<u8>>| {
            let mut sample = Sample { cap: 2000, held: 0, pieces: BinaryHeap::new() };
            order.for_each(|p| sample.offer(p.clone()));
            assert!(sample.held <= 2000 + 127);
            sample.into_texts()
        };
        let forward = run(&mut pieces.iter());
        let held = forward.iter().map(Vec::len).sum::<usize>();
        assert!((1873..=2000).contains(&held), "{held}");
        assert!(forward == run(&mut pieces.iter().rev()), "the order of offers matters");
    }

    #[test]
    fn characters_are_counted_over_invalid_bytes() {
        assert_eq!(count_chars("aé中🙂".as_bytes()), (4, 0));
        assert_eq!(count_chars(b"a\xff\xc3\xa9\xe4\xb8"), (5, 3));
    }
}
