//! Text to tokens and back.
//!
//! Every tokenizer is a Hugging Face `tokenizer.json`, also one of characters, so that one file format serves training,
//! checkpoints and other programs. How a file is used depends on what it describes:
//!
//! | file | encoding | lossless |
//! |---|---|---|
//! | byte-level BPE with GPT-2's pre-tokenizer (what [`Tokenizer::train_bpe`] makes, and GPT-2's own) | own scanner and word cache, merges by `tokenizers` | any bytes |
//! | any other byte-level BPE (Llama 3, Qwen: other patterns, normalizers) | `tokenizers`; bytes that are not UTF-8 one by one | any bytes, unless it normalizes |
//! | characters | own table | any bytes of the corpus it was built from |
//! | anything else (SentencePiece, WordPiece) | `tokenizers` | as far as that tokenizer is; not UTF-8 only with byte fallback |
//!
//! Text never becomes a special token: `<|endoftext|>` written in a document is encoded as those characters.

mod alphabet;
mod chars;
mod gpt2;
mod masks;
mod special;
mod train;
mod word_pieces;

pub(crate) use chars::CharSet;
pub use masks::{MaskTokens, Words};
pub use special::Encoded;

use crate::error::DataError;
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::ModelWrapper;

/// The token that precedes every document.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The smallest vocabulary of a byte-level BPE: all bytes and [`END_OF_TEXT`].
pub const SMALLEST_BPE: usize = 257;
/// Names of the token between documents in other families, in order of preference.
const SEPARATORS: [&str; 6] = [END_OF_TEXT, "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "[SEP]"];

/// A tokenizer; see the [module](self) for the kinds.
pub struct Tokenizer {
    json: String,
    kind: Kind,
    vocab_size: usize,
    eot: Option<u32>,
    table: Table,
    /// The library's, made when it is asked for.
    special: special::Special,
}

enum Kind {
    Gpt2(Box<gpt2::Gpt2>),
    Bytes(Box<tokenizers::Tokenizer>, Box<[u32; 256]>),
    Chars(Box<chars::Chars>),
    Library(Box<tokenizers::Tokenizer>, Vec<Option<u32>>),
}

/// The bytes of each token, back to back; none for special tokens.
struct Table {
    ends: Vec<usize>,
    bytes: Vec<u8>,
}

impl Table {
    fn new(tokens: &[Vec<u8>]) -> Self {
        let mut table = Self { ends: Vec::with_capacity(tokens.len()), bytes: Vec::new() };
        for token in tokens {
            table.bytes.extend_from_slice(token);
            table.ends.push(table.bytes.len());
        }
        table
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match self.ends.get(id) {
            Some(&end) => &self.bytes[if id == 0 { 0 } else { self.ends[id - 1] }..end],
            None => &[],
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("kind", &self.kind_name()).field("vocab_size", &self.vocab_size).finish()
    }
}

impl Tokenizer {
    /// The tokenizer of the characters of a text, in order of code point, as nanoGPT builds it. It has no separator.
    ///
    /// # Errors
    /// When there is no character.
    pub fn from_chars_of(text: &[u8]) -> Result<Self, DataError> {
        let mut set = CharSet::default();
        set.add(text);
        Self::from_json(set.to_json())
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be read or is not one.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(DataError::io("open", path))?;
        let wrong = |reason: String| DataError::Tokenizer {
            operation: "load",
            reason: format!("{}: {reason}", path.display()),
        };
        let json = String::from_utf8(bytes).map_err(|e| wrong(e.to_string()))?;
        Self::from_json(json).map_err(|e| match e {
            DataError::Tokenizer { reason, .. } => wrong(reason),
            other => other,
        })
    }

    /// Writes the `tokenizer.json`, byte for byte as it was loaded: aside, flushed, renamed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), DataError> {
        crate::cache::write_atomically(path.as_ref(), self.json.as_bytes())
    }

    /// From the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is not one.
    pub fn from_json(json: String) -> Result<Self, DataError> {
        let wrong = |reason: String| DataError::Tokenizer { operation: "load", reason };
        let file: Value = serde_json::from_str(&json).map_err(|e| wrong(format!("not JSON: {e}")))?;
        let mut library = tokenizers::Tokenizer::from_bytes(json.as_bytes())
            .map_err(|e| wrong(format!("not a tokenizer.json: {e}")))?;
        // What stands in a document is text, whatever it looks like.
        library.set_encode_special_tokens(true);
        // Files of encoders say how long a row may be, and fill it up; a document is as long as it is.
        let unlimited = library.with_truncation(None);
        unlimited.map_err(|e| wrong(e.to_string()))?.with_padding(None);
        let vocab = library.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(wrong("the vocabulary is empty".into()));
        }
        if vocab_size > (1 << 24).max(4 * vocab.len()) {
            return Err(wrong(format!("token id {} of a vocabulary of {}", vocab_size - 1, vocab.len())));
        }
        let special: HashMap<u32, bool> =
            library.get_added_tokens_decoder().into_iter().map(|(id, t)| (id, t.special)).collect();
        let eot =
            SEPARATORS.iter().filter_map(|name| vocab.get(*name).copied()).find(|id| special.get(id) == Some(&true));
        let byte_level = byte_level_ids(&file, &vocab);
        let mut tokens = vec![Vec::new(); vocab_size];
        for (token, &id) in &vocab {
            tokens[id as usize] = match special.get(&id) {
                Some(true) => Vec::new(),
                Some(false) => token.clone().into_bytes(),
                None => token_bytes(token, file["decoder"]["type"] == "ByteLevel"),
            };
        }
        let kind = kind_of(&file, library, byte_level, &vocab, &special);
        Ok(Self { json, kind, vocab_size, eot, table: Table::new(&tokens), special: Default::default() })
    }

    /// The tokens of any bytes, without a separator.
    ///
    /// # Errors
    /// When a tokenizer of characters meets one it does not know, or a tokenizer without byte fallback bytes that are
    /// not UTF-8. A byte-level BPE encodes everything.
    pub fn encode(&self, bytes: &[u8]) -> Result<Vec<u32>, DataError> {
        let mut ids = Vec::with_capacity(bytes.len() / 3);
        self.encode_into(bytes, &mut ids)?;
        Ok(ids)
    }

    /// [`Self::encode`], appended to `out`.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_into(&self, bytes: &[u8], out: &mut Vec<u32>) -> Result<(), DataError> {
        match &self.kind {
            Kind::Gpt2(gpt2) => gpt2.encode_into(bytes, out),
            Kind::Chars(chars) => chars.encode_into(bytes, out),
            Kind::Bytes(library, byte_ids) => by_library(library, bytes, out, |b| Some(byte_ids[b as usize])),
            Kind::Library(library, byte_ids) => by_library(library, bytes, out, |b| byte_ids[b as usize]),
        }
    }

    /// The bytes of tokens. Special tokens have none; unknown ids neither.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        if let Kind::Library(library, _) = &self.kind
            && let Ok(text) = library.decode(ids, true)
        {
            return text.into_bytes();
        }
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        ids.iter().for_each(|&id| bytes.extend_from_slice(self.table.get(id)));
        bytes
    }

    /// Number of tokens, or one more than the largest id where ids are missing: the width of embedding and head.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that precedes every document, where the tokenizer has one.
    pub fn eot(&self) -> Option<u32> {
        self.eot
    }

    /// Bytes of text per token id, 0 for special tokens: what bits per byte are computed with. Exact for byte-level
    /// and character tokenizers, an estimate (leading spaces of SentencePiece counted) for others.
    pub fn token_bytes(&self) -> Vec<u32> {
        (0..self.vocab_size as u32).map(|id| self.table.get(id).len() as u32).collect()
    }

    /// "byte-level BPE", "characters", or "other": for the log.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Gpt2(_) | Kind::Bytes(..) => "byte-level BPE",
            Kind::Chars(_) => "characters",
            Kind::Library(..) => "other",
        }
    }

    /// Bytes in GPT-2's alphabet, in which the vocabularies of byte-level BPE are written.
    pub fn bytes_as_text(bytes: &[u8]) -> String {
        alphabet::to_chars(bytes)
    }

    /// The text of the `tokenizer.json`.
    pub fn json(&self) -> &str {
        &self.json
    }
}

/// Bytes of an ordinary token.
fn token_bytes(token: &str, byte_level: bool) -> Vec<u8> {
    if byte_level {
        return alphabet::to_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec());
    }
    match alphabet::fallback_byte(token) {
        Some(byte) => vec![byte],
        None => token.strip_prefix("##").unwrap_or(token).replace('\u{2581}', " ").into_bytes(),
    }
}

/// The id of each byte, when the file decodes by GPT-2's alphabet and knows all of it.
fn byte_level_ids(file: &Value, vocab: &HashMap<String, u32>) -> Option<[u32; 256]> {
    if file["decoder"]["type"] != "ByteLevel" {
        return None;
    }
    let mut ids = [0; 256];
    for byte in 0..=255u8 {
        ids[byte as usize] = *vocab.get(&alphabet::char_of(byte).to_string())?;
    }
    Some(ids)
}

fn kind_of(
    file: &Value,
    library: tokenizers::Tokenizer,
    byte_level: Option<[u32; 256]>,
    vocab: &HashMap<String, u32>,
    special: &HashMap<u32, bool>,
) -> Kind {
    let unset = |key: &str| matches!(&file["model"][key], Value::Null | Value::Bool(false)) || file["model"][key] == "";
    let plain_bpe = file["model"]["type"] == "BPE"
        && file["normalizer"].is_null()
        && ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"].iter().all(|k| unset(k))
        && special.values().all(|&special| special);
    if let Some(byte_ids) = byte_level {
        let splitter = &file["pre_tokenizer"];
        let gpt2 =
            splitter["type"] == "ByteLevel" && splitter["add_prefix_space"] == false && splitter["use_regex"] != false;
        if plain_bpe
            && gpt2
            && unset("byte_fallback")
            && let ModelWrapper::BPE(bpe) = library.get_model()
        {
            return Kind::Gpt2(Box::new(gpt2::Gpt2::new(bpe.clone(), byte_ids)));
        }
        return Kind::Bytes(Box::new(library), Box::new(byte_ids));
    }
    let without_merges = file["model"]["merges"].as_array().is_some_and(Vec::is_empty);
    if plain_bpe && without_merges && file["pre_tokenizer"].is_null() {
        let ordinary = vocab.iter().filter(|(_, id)| !special.contains_key(id)).map(|(t, &id)| (t.as_str(), id));
        if let Some(chars) = chars::Chars::from_vocab(ordinary) {
            return Kind::Chars(Box::new(chars));
        }
    }
    let byte_ids = (0..=255).map(|b| vocab.get(&alphabet::fallback_token(b)).copied()).collect();
    Kind::Library(Box::new(library), byte_ids)
}

/// Encodes what is UTF-8 with the library and other bytes one by one.
fn by_library(
    library: &tokenizers::Tokenizer,
    bytes: &[u8],
    out: &mut Vec<u32>,
    byte_id: impl Fn(u8) -> Option<u32>,
) -> Result<(), DataError> {
    let failed = |reason: String| DataError::Tokenizer { operation: "encode with", reason };
    for chunk in bytes.utf8_chunks() {
        if !chunk.valid().is_empty() {
            let encoding = library.encode_fast(chunk.valid(), false).map_err(|e| failed(e.to_string()))?;
            out.extend_from_slice(encoding.get_ids());
        }
        for &byte in chunk.invalid() {
            out.push(byte_id(byte).ok_or_else(|| {
                failed(format!(
                    "byte 0x{byte:02X} is not UTF-8 and the tokenizer has no token for it; use data.tokenizer = \"bpe\""
                ))
            })?);
        }
    }
    Ok(())
}
