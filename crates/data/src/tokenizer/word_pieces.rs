//! BERT's tokenizer from the list of its tokens, which is all that old models have.

use serde_json::{Map, Value, json};

use super::Tokenizer;
use crate::error::DataError;

/// Its special tokens.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

impl Tokenizer {
    /// The tokenizer of BERT whose tokens are these lines, a `vocab.txt` (Wu et al., arXiv:1609.08144; Devlin et al., arXiv:1810.04805): text is divided at spaces and punctuation, and words into the longest
    /// pieces that there are. Without `strip_accents`, accents go where letters become small.
    ///
    /// # Errors
    /// If `[UNK]`, `[CLS]` or `[SEP]` is not among the lines.
    pub fn from_word_pieces(lines: &str, lowercase: bool, strip_accents: Option<bool>) -> Result<Self, DataError> {
        let vocab: Map<String, Value> =
            lines.lines().zip(0u32..).map(|(token, id)| (token.into(), id.into())).collect();
        let id = |name: &str| vocab.get(name).and_then(Value::as_u64);
        for name in ["[UNK]", "[CLS]", "[SEP]"] {
            if id(name).is_none() {
                let reason = format!("vocab.txt: expected {name} among its {} lines", vocab.len());
                return Err(DataError::Tokenizer { operation: "load", reason });
            }
        }
        let added = SPECIAL.iter().filter_map(|name| {
            Some(json!({
                "id": id(name)?, "content": name, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            }))
        });
        let special = |name: &str, kind: u32| json!({ "SpecialToken": { "id": name, "type_id": kind } });
        let text = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
        let first = vec![special("[CLS]", 0), text("A", 0), special("[SEP]", 0)];
        let both = [first.clone(), vec![text("B", 1), special("[SEP]", 1)]].concat();
        let used = |name: &str| json!({ "id": name, "ids": [id(name)], "tokens": [name] });
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": strip_accents, "lowercase": lowercase,
            },
            "pre_tokenizer": { "type": "BertPreTokenizer" },
            "post_processor": {
                "type": "TemplateProcessing", "single": first, "pair": both,
                "special_tokens": { "[CLS]": used("[CLS]"), "[SEP]": used("[SEP]") },
            },
            "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
            "model": {
                "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab,
            },
        });
        Self::from_json(file.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LINES: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##believ\n##able\n,\nhello\nÉté\n##s\nete";

    #[test]
    fn words_are_divided_into_the_longest_pieces() {
        let tokenizer = Tokenizer::from_word_pieces(LINES, true, None).unwrap();
        let encoded = tokenizer.encode_whole("Hello, unbelievable Étés x", Some("hello")).unwrap();
        assert_eq!(encoded.ids, [2, 9, 8, 5, 6, 7, 12, 11, 1, 3, 9, 3]);
        assert_eq!(encoded.types, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        let words = tokenizer.encode_words(&["unbelievable".into(), "hello".into()]).unwrap();
        assert_eq!(words.words, [None, Some(0), Some(0), Some(0), Some(1), None]);
        assert_eq!(tokenizer.token_id("[MASK]"), Some(4));
        // Letters and accents as they are.
        let cased = Tokenizer::from_word_pieces(LINES, false, Some(false)).unwrap();
        assert_eq!(cased.encode_whole("Étés Hello", None).unwrap().ids, [2, 10, 11, 1, 3]);
        let error = Tokenizer::from_word_pieces("[UNK]\n[CLS]\na", true, None).unwrap_err().to_string();
        assert!(error.contains("[SEP]"), "{error}");
    }
}
