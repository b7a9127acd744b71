//! One token per character, nanoGPT's way, in a file that `tokenizers` reads too.

use super::alphabet::{fallback_byte, fallback_token};
use crate::error::DataError;
use serde_json::json;
use std::collections::{BTreeSet, HashMap};

/// The characters of a corpus, and the bytes of it that are not UTF-8.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CharSet {
    chars: BTreeSet<char>,
    ascii: u128,
    invalid: BTreeSet<u8>,
}

impl CharSet {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_ascii() {
                    self.ascii |= 1 << c as u32;
                } else {
                    self.chars.insert(c);
                }
            }
            self.invalid.extend(chunk.invalid());
        }
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.ascii |= other.ascii;
        self.chars.extend(other.chars);
        self.invalid.extend(other.invalid);
    }

    /// The tokens: characters in order of code point, then one `<0xNN>` per byte that is not UTF-8.
    fn tokens(&self) -> Vec<String> {
        let ascii = (0..128u8).filter(|&c| self.ascii >> c & 1 == 1).map(|c| char::from(c).to_string());
        let other = self.chars.iter().map(char::to_string);
        ascii.chain(other).chain(self.invalid.iter().map(|&b| fallback_token(b))).collect()
    }

    /// A `tokenizer.json`: a BPE without merges, whose tokens are the characters.
    pub(crate) fn to_json(&self) -> String {
        let vocab: serde_json::Map<String, serde_json::Value> =
            self.tokens().into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": !self.invalid.is_empty(), "ignore_merges": false,
                "vocab": vocab, "merges": [],
            },
        });
        format!("{file:#}\n")
    }
}

/// Encodes characters.
pub(crate) struct Chars {
    ascii: [Option<u32>; 128],
    other: HashMap<char, u32>,
    invalid: [Option<u32>; 256],
    count: usize,
}

impl Chars {
    /// From the vocabulary of a file; `None` when a token is more than a character.
    pub(crate) fn from_vocab<'a>(vocab: impl IntoIterator<Item = (&'a str, u32)>) -> Option<Self> {
        let mut chars = Self { ascii: [None; 128], other: HashMap::new(), invalid: [None; 256], count: 0 };
        for (token, id) in vocab {
            chars.count += 1;
            let mut letters = token.chars();
            match (letters.next(), letters.next()) {
                (Some(c), None) if c.is_ascii() => chars.ascii[c as usize] = Some(id),
                (Some(c), None) => drop(chars.other.insert(c, id)),
                _ => chars.invalid[fallback_byte(token)? as usize] = Some(id),
            }
        }
        Some(chars)
    }

    pub(crate) fn encode_into(&self, bytes: &[u8], out: &mut Vec<u32>) -> Result<(), DataError> {
        let unknown = |character: String| DataError::UnknownCharacter { character, vocab_size: self.count };
        out.reserve(bytes.len());
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                let id = if c.is_ascii() { self.ascii[c as usize] } else { self.other.get(&c).copied() };
                out.push(id.ok_or_else(|| unknown(format!("{c:?}")))?);
            }
            for &byte in chunk.invalid() {
                out.push(self.invalid[byte as usize].ok_or_else(|| unknown(format!("byte 0x{byte:02X} (not UTF-8)")))?);
            }
        }
        Ok(())
    }
}
