//! Near duplicates by MinHash and locality-sensitive hashing (Broder 1997, "On the resemblance and containment of
//! documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3).
//!
//! A document is the set of its shingles, five words in a row; where the script has no spaces, each character beyond
//! ASCII is a word. 128 minima of it estimate the Jaccard similarity of two documents to about 0.04. Bands of minima find
//! the candidates, and the share of equal minima decides. Memory: some 300 to 1,000 bytes per kept document.

use crate::hash::{hash64, mix64};
use std::collections::HashMap;

/// Minima per document.
const MINIMA: usize = 128;
/// Words per shingle.
const WORDS: usize = 5;
/// A word is cut here, so that a document without spaces stays bounded.
const LONGEST_WORD: usize = 1 << 12;

/// Reads a document in parts and keeps the minima.
pub(crate) struct MinHasher {
    minima: [u32; MINIMA],
    window: [u64; WORDS],
    words: u64,
    word: Vec<u8>,
}

impl MinHasher {
    pub(crate) fn new() -> Self {
        Self { minima: [u32::MAX; MINIMA], window: [0; WORDS], words: 0, word: Vec::new() }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte.is_ascii_whitespace() {
                self.end_word();
                continue;
            }
            if byte >= 0xc0 || self.word.len() == LONGEST_WORD {
                self.end_word();
            }
            self.word.push(byte);
        }
    }

    fn end_word(&mut self) {
        if self.word.is_empty() {
            return;
        }
        self.window[self.words as usize % WORDS] = hash64(&self.word, 1);
        self.word.clear();
        self.words += 1;
        if self.words >= WORDS as u64 {
            self.shingle();
        }
    }

    fn shingle(&mut self) {
        let from = self.words as usize % WORDS;
        let joined = (0..WORDS).fold(0u64, |h, i| mix64(h ^ self.window[(from + i) % WORDS]));
        let x = joined as u32 ^ (joined >> 32) as u32;
        for (k, minimum) in self.minima.iter_mut().enumerate() {
            // A different bijection of 32 bits for each k: the finalizer of MurmurHash3 after a different offset.
            let mut h = x ^ (k as u32 + 1).wrapping_mul(0x9e37_79b9);
            h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
            h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
            *minimum = (*minimum).min(h ^ (h >> 16));
        }
    }

    /// The signature: 16 bits of each minimum. Two different minima agree in them once in 65,536.
    pub(crate) fn finish(mut self) -> [u16; MINIMA] {
        self.end_word();
        if self.words < WORDS as u64 {
            self.window[self.words as usize % WORDS] ^= self.words;
            self.shingle();
        }
        self.minima.map(|m| m as u16)
    }
}

/// The kept documents so far.
pub(crate) struct NearIndex {
    needed: usize,
    bands: usize,
    rows: usize,
    buckets: HashMap<u64, u32>,
    signatures: Vec<[u16; MINIMA]>,
}

impl NearIndex {
    pub(crate) fn new(threshold: f64) -> Self {
        let (bands, rows) = bands_for(threshold);
        let needed = (threshold * MINIMA as f64).ceil() as usize;
        Self { needed, bands, rows, buckets: HashMap::new(), signatures: Vec::new() }
    }

    /// True when a kept document is at least as similar as the threshold; otherwise the document is kept from now on.
    pub(crate) fn is_near(&mut self, signature: [u16; MINIMA]) -> bool {
        let keys: Vec<u64> = (0..self.bands)
            .map(|band| hash64(bytemuck::cast_slice(&signature[band * self.rows..(band + 1) * self.rows]), band as u64))
            .collect();
        let similar = |&other: &u32| {
            let equal = self.signatures[other as usize].iter().zip(signature.iter()).filter(|(a, b)| a == b).count();
            equal >= self.needed
        };
        if keys.iter().filter_map(|key| self.buckets.get(key)).any(similar) {
            return true;
        }
        let number = self.signatures.len() as u32;
        for key in keys {
            self.buckets.entry(key).or_insert(number);
        }
        self.signatures.push(signature);
        false
    }
}

/// Bands and rows per band for a threshold: the probability of becoming a candidate, 1 - (1 - s^rows)^bands, is to
/// exceed 0.98 at the threshold, with as many rows (as few false candidates) as that allows.
fn bands_for(threshold: f64) -> (usize, usize) {
    let candidates = [32, 16, 8, 6, 5, 4, 3, 2];
    let good = candidates
        .into_iter()
        .map(|rows| (MINIMA / rows, rows))
        .find(|&(bands, rows)| 1.0 - (1.0 - threshold.powi(rows as i32)).powi(bands as i32) > 0.98);
    good.unwrap_or((MINIMA, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(seed: u64, words: usize) -> Vec<String> {
        (0..words as u64).map(|i| format!("w{}", mix64(seed * 1_000_003 + i) % 5000)).collect()
    }

    fn signature(words: &[String]) -> [u16; MINIMA] {
        let mut hasher = MinHasher::new();
        // In odd parts: a part may end inside a word.
        words.join(" ").as_bytes().chunks(7).for_each(|part| hasher.update(part));
        hasher.finish()
    }

    #[test]
    fn near_ones_are_found_and_others_are_kept() {
        let mut index = NearIndex::new(0.8);
        for seed in 0..50 {
            let original = text(seed, 400);
            assert!(!index.is_near(signature(&original)), "a new text was called near");
            // One word of 400 changed: 5 of 396 shingles differ, similarity 0.975.
            let mut near = original.clone();
            near[200] = "changed".into();
            assert!(index.is_near(signature(&near)), "missed at similarity 0.975");
            // Every fourth word changed: nearly no shingle is shared.
            let far: Vec<String> = original
                .iter()
                .enumerate()
                .map(|(i, w)| if i % 4 == 0 { format!("{w}x{seed}") } else { w.clone() })
                .collect();
            assert!(!NearIndex::new(0.8).is_near(signature(&far)));
            let mut only = NearIndex::new(0.8);
            only.is_near(signature(&original));
            assert!(!only.is_near(signature(&far)));
        }
    }

    #[test]
    fn the_estimate_is_the_similarity() {
        let a = text(1, 2000);
        for cut in [200, 1000, 1800] {
            let mut b = a[cut..].to_vec();
            b.extend(text(2, cut));
            let shared = (2000 - cut - 4) as f64;
            let expected = shared / (2.0 * 1996.0 - shared);
            let equal =
                signature(&a).iter().zip(signature(&b).iter()).filter(|(x, y)| x == y).count() as f64 / MINIMA as f64;
            // Three standard deviations of a mean of 128.
            let tolerance = 3.0 * (expected * (1.0 - expected) / MINIMA as f64).sqrt();
            assert!((equal - expected).abs() < tolerance, "{equal} for {expected}");
        }
    }

    #[test]
    fn text_without_spaces_has_shingles() {
        let zh: String =
            (0..600u32).filter_map(|i| char::from_u32(0x4e00 + (mix64(u64::from(i)) % 3000) as u32)).collect();
        let near = zh.replacen(zh.chars().nth(300).unwrap_or('中'), "一", 1);
        let sign = |t: &str| {
            let mut hasher = MinHasher::new();
            hasher.update(t.as_bytes());
            hasher.finish()
        };
        let mut index = NearIndex::new(0.8);
        assert!(!index.is_near(sign(&zh)));
        assert!(index.is_near(sign(&near)));
    }
}
