//! Text as models that were pretrained elsewhere see it: with the special tokens that a template or the tokenizer itself puts in.

use super::Tokenizer;
use crate::error::DataError;
use serde_json::Value;
use std::ops::Range;
use std::sync::OnceLock;
use tokenizers::EncodeInput;

pub(super) type Special = OnceLock<Box<tokenizers::Tokenizer>>;

/// Tokens, with what is known of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Types of tokens: 1 for those of a second text.
    pub types: Vec<u32>,
    /// Where in the text each token is from, in bytes; empty for tokens that the tokenizer adds.
    pub offsets: Vec<Range<usize>>,
    /// The number of the word of each token; none for tokens that the tokenizer adds.
    pub words: Vec<Option<u32>>,
}

impl Encoded {
    /// At most `most` tokens: those that the tokenizer added stay, and of one text the end goes. Of two the longer one is cut first, as `longest_first` of Hugging Face's tokenizers does.
    pub fn truncated(self, most: usize) -> Self {
        if self.ids.len() <= most {
            return self;
        }
        // Runs of text, between tokens that were added.
        let mut texts: Vec<Range<usize>> = vec![];
        for (i, word) in self.words.iter().enumerate() {
            match texts.last_mut() {
                _ if word.is_none() => {}
                Some(text) if text.end == i => text.end += 1,
                _ => texts.push(i..i + 1),
            }
        }
        let added = self.ids.len() - texts.iter().map(Range::len).sum::<usize>();
        let room = most.saturating_sub(added);
        let mut keep: Vec<usize> = texts.iter().map(Range::len).collect();
        match &mut keep[..] {
            [first, second] => {
                let (short, long) = if first <= second { (first, second) } else { (second, first) };
                *long = if *short > room { *short } else { (*short).max(room - *short) };
                if *short + *long > room {
                    (*short, *long) = (room / 2, room / 2 + room % 2);
                }
            }
            all => {
                let mut left = room;
                for n in all {
                    *n = left.min(*n);
                    left -= *n;
                }
            }
        }
        let mut stays = vec![true; self.ids.len()];
        texts.iter().zip(&keep).for_each(|(text, keep)| stays[text.start + keep..text.end].fill(false));
        // Of a row that has no room even for what was added, that goes, too.
        let kept: Vec<usize> = (0..self.ids.len()).filter(|&i| stays[i]).take(most).collect();
        Self {
            ids: kept.iter().map(|&i| self.ids[i]).collect(),
            types: kept.iter().map(|&i| self.types[i]).collect(),
            offsets: kept.iter().map(|&i| self.offsets[i].clone()).collect(),
            words: kept.iter().map(|&i| self.words[i]).collect(),
        }
    }
}

impl Tokenizer {
    /// The tokens of a text in which the names of special tokens stand for these tokens, as those of a rendered chat template do. Nothing is added.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode_special(&self, text: &str) -> Result<Encoded, DataError> {
        self.encode_by_library(text.into(), false)
    }

    /// The tokens of a text, or of two, with the special tokens that the model expects around them (`[CLS] a [SEP] b [SEP]`).
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode_whole(&self, text: &str, second: Option<&str>) -> Result<Encoded, DataError> {
        let input: EncodeInput<'_> = match second {
            Some(second) => (text, second).into(),
            None => text.into(),
        };
        self.encode_by_library(input, true)
    }

    /// The same of a text that is divided into words: [`Encoded::words`] says of which one each token is a piece.
    ///
    /// # Errors
    /// When the tokenizer cannot encode it.
    pub fn encode_words(&self, words: &[String]) -> Result<Encoded, DataError> {
        self.encode_by_library(words.into(), true)
    }

    /// The token of a name such as `<|im_end|>`, if there is one.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.library().ok()?.token_to_id(name)
    }

    /// The name of a token, if there is one of that id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.library().ok()?.id_to_token(id)
    }

    pub(super) fn library(&self) -> Result<&tokenizers::Tokenizer, DataError> {
        if let Some(library) = self.special.get() {
            return Ok(library);
        }
        let failed = |reason: String| DataError::Tokenizer { operation: "load", reason };
        let mut json: Value = serde_json::from_str(&self.json).map_err(|e| failed(e.to_string()))?;
        json.get_mut("post_processor").map(keep_offsets);
        let mut library = tokenizers::Tokenizer::from_bytes(json.to_string()).map_err(|e| failed(e.to_string()))?;
        // How long a row may be is the caller's to say.
        library.with_truncation(None).map_err(|e| failed(e.to_string()))?;
        library.with_padding(None);
        Ok(self.special.get_or_init(|| Box::new(library)))
    }

    fn encode_by_library(&self, input: EncodeInput<'_>, add: bool) -> Result<Encoded, DataError> {
        let failed = |reason: String| DataError::Tokenizer { operation: "encode with", reason };
        let encoding = self.library()?.encode(input, add).map_err(|e| failed(e.to_string()))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
            offsets: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect(),
            words: encoding.get_word_ids().to_vec(),
        })
    }
}

/// A post-processor of byte-level tokens may take the spaces out of their offsets: without that, tokens tile the text.
fn keep_offsets(processor: &mut Value) {
    if processor["type"] == "ByteLevel"
        && let Some(trim) = processor.get_mut("trim_offsets")
    {
        *trim = false.into();
    }
    for part in processor.get_mut("processors").and_then(Value::as_array_mut).into_iter().flatten() {
        keep_offsets(part);
    }
}
