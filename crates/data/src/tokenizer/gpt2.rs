//! GPT-2's division of text into words, and words into tokens, fast.
//!
//! The pattern is that of GPT-2's `encoder.py` and of the `ByteLevel` pre-tokenizer of Hugging Face's `tokenizers`:
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```
//!
//! A scanner by hand does what the regular expression does, some fifty times faster; which characters are letters,
//! numbers and white space it asks the library's own expression engine, so that the two agree in every version. A small
//! cache of words saves most of the merging. The tests hold the library against it.

use crate::error::DataError;
use crate::hash::hash64;
use std::sync::{LazyLock, Mutex};
use tokenizers::Model;
use tokenizers::models::bpe::BPE;
use tokenizers::utils::SysRegex;

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;

/// The class of every character, by code point.
static CLASSES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut classes = vec![OTHER; 0x11_0000];
    let everything: String = (0..0x11_0000).filter_map(char::from_u32).collect();
    for (pattern, class) in [(r"\p{L}+", LETTER), (r"\p{N}+", NUMBER), (r"\s+", SPACE)] {
        let regex = SysRegex::new(pattern).unwrap_or_else(|e| unreachable!("a constant pattern: {e}"));
        for (start, end) in regex.find_iter(&everything) {
            everything[start..end].chars().for_each(|c| classes[c as usize] = class);
        }
    }
    classes
});

/// The class of every ASCII character, for which the large table need not be built.
static ASCII: [u8; 128] = {
    let mut classes = [OTHER; 128];
    let mut i = 0;
    while i < 128 {
        let c = i as u8;
        classes[i] = if c.is_ascii_alphabetic() {
            LETTER
        } else if c.is_ascii_digit() {
            NUMBER
        } else if matches!(c, 9..=13 | b' ') {
            SPACE
        } else {
            OTHER
        };
        i += 1;
    }
    classes
};

/// Class and length in bytes of the character at `at`.
#[inline]
fn class_at(text: &str, at: usize) -> (u8, usize) {
    let byte = text.as_bytes()[at];
    if byte < 128 {
        return (ASCII[byte as usize], 1);
    }
    match text[at..].chars().next() {
        Some(c) => (CLASSES[c as usize], c.len_utf8()),
        None => (OTHER, 1),
    }
}

/// The end of the run of one class that starts at `at`.
#[inline]
fn run_end(text: &str, mut at: usize, class: u8) -> usize {
    while at < text.len() {
        let (c, length) = class_at(text, at);
        if c != class {
            break;
        }
        at += length;
    }
    at
}

/// The end of the word that starts at `start`.
fn word_end(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    let rest = &bytes[start..];
    if rest[0] == b'\'' {
        match rest.get(1) {
            Some(b's' | b't' | b'm' | b'd') => return start + 2,
            Some(b'r' | b'v') if rest.get(2) == Some(&b'e') => return start + 3,
            Some(b'l') if rest.get(2) == Some(&b'l') => return start + 3,
            _ => {}
        }
    }
    let after_space = start + usize::from(rest[0] == b' ');
    if after_space < text.len() {
        let (class, length) = class_at(text, after_space);
        if class != SPACE {
            return run_end(text, after_space + length, class);
        }
    }
    // White space: all of it at the end of the text, else all but the last character, which belongs to the next word.
    let end = run_end(text, start, SPACE);
    if end == text.len() {
        return end;
    }
    let last = text[start..end].char_indices().next_back().map_or(0, |(i, _)| i);
    if last == 0 { end } else { start + last }
}

/// Calls `each` with every word of the text, in order; together they are the text.
pub(crate) fn words<'a>(text: &'a str, mut each: impl FnMut(&'a [u8])) {
    let mut start = 0;
    while start < text.len() {
        let end = word_end(text, start);
        each(&text.as_bytes()[start..end]);
        start = end;
    }
}

/// Words and tokens that fit a slot; longer ones are merged anew each time.
const WORD_BYTES: usize = 23;
const WORD_IDS: usize = 9;
/// Slots of a cache: at 64 bytes a slot, 2 MiB, of which frequent words keep the used part in the processor's own cache.
const SLOTS: usize = 1 << 15;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Slot {
    ids: [u32; WORD_IDS],
    /// Number of ids; 0 marks an empty slot.
    count: u8,
    length: u8,
    word: [u8; WORD_BYTES],
}

/// A direct-mapped cache from words to tokens.
struct WordCache(Vec<Slot>);

impl WordCache {
    fn new() -> Self {
        Self(vec![Slot { ids: [0; WORD_IDS], count: 0, length: 0, word: [0; WORD_BYTES] }; SLOTS])
    }
}

/// The byte-level BPE of GPT-2's kind: exact, and fast.
pub(crate) struct Gpt2 {
    bpe: BPE,
    /// Token of each single byte.
    byte_ids: [u32; 256],
    /// One cache per thread of the pool, and one for all other threads.
    caches: Vec<Mutex<Option<WordCache>>>,
}

impl Gpt2 {
    pub(crate) fn new(mut bpe: BPE, byte_ids: [u32; 256]) -> Self {
        // The library's cache is shared by all threads and would only be filled with what misses ours.
        bpe.resize_cache(0);
        let caches = (0..=rayon::current_num_threads()).map(|_| Mutex::new(None)).collect();
        Self { bpe, byte_ids, caches }
    }

    /// Appends the tokens of any bytes. What is not UTF-8 becomes one token per byte.
    pub(crate) fn encode_into(&self, bytes: &[u8], out: &mut Vec<u32>) -> Result<(), DataError> {
        let slot = rayon::current_thread_index().unwrap_or(usize::MAX).min(self.caches.len() - 1);
        // A poisoned cache holds at worst a half-written slot of a thread that panicked: start a new one.
        let mut guard = self.caches[slot].lock().unwrap_or_else(|poisoned| {
            let mut guard = poisoned.into_inner();
            *guard = None;
            guard
        });
        let cache = guard.get_or_insert_with(WordCache::new);
        let mut failure = None;
        for chunk in bytes.utf8_chunks() {
            words(chunk.valid(), |word| {
                if let Err(e) = self.word(cache, word, out) {
                    failure.get_or_insert(e);
                }
            });
            out.extend(chunk.invalid().iter().map(|&b| self.byte_ids[b as usize]));
        }
        failure.map_or(Ok(()), Err)
    }

    #[inline]
    fn word(&self, cache: &mut WordCache, word: &[u8], out: &mut Vec<u32>) -> Result<(), DataError> {
        if let [byte] = word {
            out.push(self.byte_ids[*byte as usize]);
            return Ok(());
        }
        if word.len() > WORD_BYTES {
            return self.merge(word, out);
        }
        let slot = &mut cache.0[hash64(word, 0) as usize % SLOTS];
        if slot.count > 0 && slot.length as usize == word.len() && &slot.word[..word.len()] == word {
            out.extend_from_slice(&slot.ids[..slot.count as usize]);
            return Ok(());
        }
        let from = out.len();
        self.merge(word, out)?;
        let ids = &out[from..];
        if !ids.is_empty() && ids.len() <= WORD_IDS {
            slot.count = ids.len() as u8;
            slot.length = word.len() as u8;
            slot.ids[..ids.len()].copy_from_slice(ids);
            slot.word[..word.len()].copy_from_slice(word);
        }
        Ok(())
    }

    fn merge(&self, word: &[u8], out: &mut Vec<u32>) -> Result<(), DataError> {
        let text = super::alphabet::to_chars(word);
        let tokens = self
            .bpe
            .tokenize(&text)
            .map_err(|e| DataError::Tokenizer { operation: "encode with", reason: e.to_string() })?;
        out.extend(tokens.iter().map(|t| t.id));
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn by_the_library(text: &str) -> Vec<String> {
        let splitter = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, true, true);
        let mut split = PreTokenizedString::from(text);
        splitter.pre_tokenize(&mut split).unwrap();
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(s, _, _)| s.to_owned())
            .collect()
    }

    fn by_hand(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        words(text, |w| found.push(super::super::alphabet::to_chars(w)));
        found
    }

    #[test]
    fn ascii_table_is_the_large_one() {
        assert_eq!(&ASCII[..], &CLASSES[..128]);
    }

    #[test]
    fn splits_as_the_library_does_where_it_is_delicate() {
        for text in [
            "",
            " ",
            "  ",
            "a",
            " a",
            "  a",
            "\n\n  a",
            "a  ",
            "don't we'll I'm they've he'd you're 's '",
            "x'sy 'lx ''s",
            "\t\tif x:\r\n",
            "a\u{a0}b\u{a0}\u{a0}b\u{3000}",
            "3.14e10 ½ Ⅷ٣",
            "中文，标点 é\u{301}🙂🙂 x",
            "\u{85}\u{2028}x",
            " '\u{0}",
        ] {
            assert_eq!(by_hand(text), by_the_library(text), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn splits_as_the_library_does(text in "\\PC*|[ a'strevmld\n\t0é\u{a0}]*|.*") {
            prop_assert_eq!(by_hand(&text), by_the_library(&text));
        }
    }
}
