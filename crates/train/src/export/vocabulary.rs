//! A `tokenizer.json` as llama.cpp's byte-level BPE: tokens with their types, merges, and the name of the pattern that divides text into words.

use std::collections::BTreeMap;

use firebox_compress::gguf::Value as Meta;
use firebox_data::Tokenizer;
use serde_json::Value;

use super::ExportError;
use super::source::Vocabulary;

/// An ordinary token.
const NORMAL: i32 = 1;
/// One that no text becomes.
pub(crate) const CONTROL: i32 = 3;
/// One that is found in text before anything else.
pub(crate) const USER_DEFINED: i32 = 4;
/// One that there is not: ids between others.
pub(crate) const UNUSED: i32 = 5;

/// Patterns that llama.cpp knows, by the name that it has for them. Those of Llama 3 and Qwen 2 as their files have them.
pub(crate) const PATTERNS: [(&str, &str); 3] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
];

/// The tokenizer's metadata, for a model of `vocab_size` tokens.
pub fn metadata(vocabulary: &Vocabulary, vocab_size: usize) -> Result<Vec<(String, Meta)>, ExportError> {
    let refuse = |expected: &str, got: String| {
        Err(ExportError::Tokenizer { format: "GGUF", expected: expected.to_owned(), got })
    };
    let json = &vocabulary.json;
    if json["model"]["type"] != "BPE" {
        return refuse("byte-level BPE or characters", format!("{}", json["model"]["type"]));
    }
    let characters = json["pre_tokenizer"].is_null() && json["model"]["merges"].as_array().is_some_and(Vec::is_empty);
    let pattern = match characters {
        true => "gpt-2",
        false => match pattern(&json["pre_tokenizer"]) {
            Ok(pattern) => pattern,
            Err(got) => return refuse("text divided as GPT-2, Llama 3 or Qwen 2 do", got),
        },
    };
    // llama.cpp normalizes nothing; what NFC leaves as it is, is nearly all text.
    let normalizer = &json["normalizer"];
    if !(normalizer.is_null() || normalizer["type"] == "NFC") {
        return refuse("no normalizer", format!("{}", normalizer["type"]));
    }
    let mut tokens: BTreeMap<usize, (String, i32)> = BTreeMap::new();
    let mut merges = vec![];
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let text = match characters {
            true => {
                let bytes = character_bytes(token);
                merges.extend(merges_of(&bytes));
                Tokenizer::bytes_as_text(&bytes)
            }
            false => token.clone(),
        };
        tokens.insert(id.as_u64().unwrap_or(u64::MAX) as usize, (text, NORMAL));
    }
    merges.extend(json["model"]["merges"].as_array().into_iter().flatten().filter_map(merge));
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        if let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str()) {
            let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
            tokens.insert(id as usize, (text.to_owned(), kind));
        }
    }
    if let Some((last, _)) = tokens.last_key_value().filter(|(last, _)| **last >= vocab_size) {
        return refuse(&format!("ids below the model's {vocab_size}"), format!("a token {last}"));
    }
    let all = (0..vocab_size).map(|id| tokens.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)));
    let (texts, kinds): (Vec<String>, Vec<i32>) = all.unzip();
    let mut metadata = vec![
        ("model".to_owned(), Meta::Text("gpt2".into())),
        ("pre".to_owned(), Meta::Text(pattern.into())),
        ("tokens".to_owned(), Meta::texts(texts)),
        ("token_type".to_owned(), Meta::i32s(kinds)),
        ("merges".to_owned(), Meta::texts(merges)),
        ("add_space_prefix".to_owned(), Meta::Bool(false)),
        // A text begins as documents do in training, where there is a token for that.
        ("add_bos_token".to_owned(), Meta::Bool(vocabulary.separator.is_some())),
    ];
    if let Some(separator) = vocabulary.separator {
        for key in ["bos_token_id", "eos_token_id"] {
            metadata.push((key.to_owned(), Meta::U32(separator)));
        }
    }
    metadata.iter_mut().for_each(|(key, _)| key.insert_str(0, "tokenizer.ggml."));
    Ok(metadata)
}

/// llama.cpp's name of the pattern, or what there is.
fn pattern(pre_tokenizer: &Value) -> Result<&'static str, String> {
    let byte_level = |part: &Value, regex: bool| {
        part["type"] == "ByteLevel" && part["add_prefix_space"] != true && (part["use_regex"] != false) == regex
    };
    if byte_level(pre_tokenizer, true) {
        return Ok("gpt-2");
    }
    let parts = pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice);
    if let [split, bytes] = parts
        && split["type"] == "Split"
        && split["behavior"] == "Isolated"
        && split["invert"] != true
        && byte_level(bytes, false)
    {
        let regex = split["pattern"]["Regex"].as_str().unwrap_or_default();
        return match PATTERNS.iter().find(|(pattern, _)| *pattern == regex) {
            Some((_, name)) => Ok(name),
            None => Err(format!("the pattern {regex}")),
        };
    }
    Err(format!("{pre_tokenizer}"))
}

/// A merge as one text: a pair in newer files.
fn merge(merge: &Value) -> Option<String> {
    match merge {
        Value::String(text) => Some(text.clone()),
        pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
    }
}

/// The bytes of a token of one character, or of a byte that is not UTF-8, `<0xNN>`.
fn character_bytes(token: &str) -> Vec<u8> {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|digits| digits.len() == 2);
    match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.as_bytes().to_vec(),
    }
}

/// What puts the bytes of a character together, from the first to the last.
fn merges_of(bytes: &[u8]) -> Vec<String> {
    (1..bytes.len()).map(|n| [&bytes[..n], &bytes[n..=n]].map(Tokenizer::bytes_as_text).join(" ")).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(tokenizer: &Tokenizer) -> Vocabulary {
        let text = tokenizer.json().to_owned();
        let json = serde_json::from_str(&text).unwrap();
        Vocabulary { text, json, separator: tokenizer.eot(), separator_text: None }
    }

    fn texts(metadata: &[(String, Meta)], key: &str) -> Vec<String> {
        let (_, value) = metadata.iter().find(|(name, _)| name.ends_with(key)).unwrap();
        value.as_array().unwrap().iter().map(|text| text.as_text().unwrap().to_owned()).collect()
    }

    #[test]
    fn characters_are_merged_from_their_bytes() {
        let found = metadata(&of(&Tokenizer::from_chars_of("a é中".as_bytes()).unwrap()), 5).unwrap();
        assert_eq!(texts(&found, ".tokens"), ["Ġ", "a", "Ã©", "ä¸Ń", "[PAD4]"]);
        let mut merges = texts(&found, ".merges");
        merges.sort();
        assert_eq!(merges, ["Ã ©", "ä ¸", "ä¸ Ń"]);
    }

    #[test]
    fn what_llama_cpp_cannot_read_is_named() {
        let tokenizer = Tokenizer::train_bpe(&["some text, some more text"], 260).unwrap();
        let mut vocabulary = of(&tokenizer);
        let error = |vocabulary: &Vocabulary, size| metadata(vocabulary, size).unwrap_err().to_string();
        assert!(metadata(&vocabulary, 260).is_ok());
        assert!(error(&vocabulary, 258).contains("ids below the model's 258"));
        vocabulary.json["pre_tokenizer"] = serde_json::json!({ "type": "Whitespace" });
        assert!(error(&vocabulary, 260).contains("Whitespace"));
        vocabulary.json["model"]["type"] = "WordPiece".into();
        assert!(error(&vocabulary, 260).contains("WordPiece"));
    }
}
