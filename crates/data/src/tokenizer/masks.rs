//! What objectives that hide parts of a text need of a tokenizer: tokens that stand for what is hidden, and where words begin.

use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

use super::{Table, Tokenizer};
use crate::error::DataError;

/// The tokens of masked language models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskTokens {
    /// Before a row.
    pub first: u32,
    /// Behind it.
    pub last: u32,
    /// In place of what is hidden.
    pub mask: u32,
}

const FIRST: [&str; 3] = ["[CLS]", "<s>", "<cls>"];
const LAST: [&str; 3] = ["[SEP]", "</s>", "<sep>"];
const MASK: [&str; 2] = ["[MASK]", "<mask>"];

/// Where words begin among tokens.
#[derive(Debug, Clone)]
pub struct Words {
    edges: Vec<Edges>,
}

#[derive(Debug, Clone, Copy)]
enum Edges {
    /// A word begins with it, or goes on with it, whatever stands before.
    Always { begins: bool },
    /// Whether its first character may go on with a word, and whether its last may be gone on with.
    Of { first: bool, last: bool },
}

impl Words {
    /// Whether a word begins with `token`, before which `previous` stands.
    pub fn begins(&self, previous: Option<u32>, token: u32) -> bool {
        let edges = |id: u32| self.edges.get(id as usize).copied().unwrap_or(Edges::Always { begins: true });
        match (previous.map(edges), edges(token)) {
            (_, Edges::Always { begins }) => begins,
            (Some(Edges::Of { last, .. }), Edges::Of { first, .. }) => !(first && last),
            _ => true,
        }
    }
}

impl Tokenizer {
    /// The tokens of a masked language model, if it has them: BERT's, RoBERTa's or those of [`with_mask_tokens`](Self::with_mask_tokens).
    pub fn mask_tokens(&self) -> Option<MaskTokens> {
        let id = |names: &[&str]| names.iter().find_map(|name| self.token_id(name));
        Some(MaskTokens { first: id(&FIRST)?, last: id(&LAST)?, mask: id(&MASK)? })
    }

    /// The same tokenizer with `[PAD]`, `[CLS]`, `[SEP]` and `[MASK]` behind its other tokens, and with the second and third around every text, as BERT has them. Texts have the
    /// same tokens as before.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn with_mask_tokens(&self) -> Result<Self, DataError> {
        let failed = |reason: String| DataError::Tokenizer { operation: "add special tokens to", reason };
        let mut library = self.with_special(&["[PAD]", FIRST[0], LAST[0], MASK[0]].map(String::from))?;
        let ids = [FIRST[0], LAST[0]].map(|name| (name.to_owned(), library.token_to_id(name).unwrap_or_default()));
        let template = TemplateProcessing::builder()
            .try_single("[CLS] $A [SEP]")
            .map_err(failed)?
            .try_pair("[CLS] $A [SEP] $B:1 [SEP]:1")
            .map_err(failed)?
            .special_tokens(ids.to_vec())
            .build()
            .map_err(|e| failed(e.to_string()))?;
        library.with_post_processor(Some(template));
        Self::from_json(library.to_string(true).map_err(|e| failed(e.to_string()))?)
    }

    /// The same tokenizer with `n` sentinels behind its other tokens, `<extra_id_0>` and so on, as T5 has them; and their ids. Those that it has are left as they are.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn with_sentinels(&self, n: usize) -> Result<(Self, Vec<u32>), DataError> {
        let failed = |reason: String| DataError::Tokenizer { operation: "add special tokens to", reason };
        let names: Vec<String> = (0..n).map(|i| format!("<extra_id_{i}>")).collect();
        let json = self.with_special(&names)?.to_string(true).map_err(|e| failed(e.to_string()))?;
        let made = Self::from_json(json)?;
        let ids = names.iter().map(|name| made.token_id(name).ok_or_else(|| failed(format!("{name} is missing"))));
        let ids = ids.collect::<Result<_, _>>()?;
        Ok((made, ids))
    }

    fn with_special(&self, names: &[String]) -> Result<tokenizers::Tokenizer, DataError> {
        let failed = |reason: String| DataError::Tokenizer { operation: "add special tokens to", reason };
        let mut library = tokenizers::Tokenizer::from_bytes(self.json.as_bytes()).map_err(|e| failed(e.to_string()))?;
        let tokens = names.iter().map(|name| AddedToken::from(name.as_str(), true));
        library.add_special_tokens(tokens).map_err(|e| failed(e.to_string()))?;
        Ok(library)
    }

    /// Where words begin among its tokens: as WordPiece marks it, or else where no letter or digit follows another.
    ///
    /// # Errors
    /// When the tokenizer cannot be loaded.
    pub fn words(&self) -> Result<Words, DataError> {
        let vocab = self.library()?.get_vocab(true);
        let pieces = vocab.keys().filter(|token| token.starts_with("##")).count() > 1;
        let mut edges: Vec<Edges> = (0..self.vocab_size as u32).map(|id| of_bytes(&self.table, id)).collect();
        if pieces {
            for (token, &id) in &vocab {
                edges[id as usize] = Edges::Always { begins: !token.starts_with("##") };
            }
        }
        Ok(Words { edges })
    }
}

fn of_bytes(table: &Table, id: u32) -> Edges {
    // Bytes from 0x80 on are parts of letters that are not ASCII.
    let in_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte >= 0x80;
    match table.get(id) {
        [] => Edges::Always { begins: true },
        bytes => Edges::Of { first: bytes.first().is_some_and(in_word), last: bytes.last().is_some_and(in_word) },
    }
}
