//! The tokenizer in a GGUF file as a `tokenizer.json`: byte-level BPE (`gpt2`) with the patterns that divide text into words, and SentencePiece's BPE (`llama`).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use firebox_compress::gguf::Value as Meta;
use serde_json::{Map, Value, json};

use super::gguf::Reader;
use crate::TrainError;
use crate::export::vocabulary::{CONTROL, PATTERNS, UNUSED, USER_DEFINED};

/// A token that stands for what no other stands for.
const UNKNOWN: i32 = 2;

/// What a file says of text.
pub struct Vocabulary {
    /// The `tokenizer.json`.
    pub tokenizer: Value,
    /// `tokenizer_config.json` and so on.
    pub sides: BTreeMap<&'static str, String>,
}

/// Tokens by id.
struct Tokens<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<i32>,
}

impl Tokens<'_> {
    /// What is found in text before anything else.
    fn added(&self) -> Vec<Value> {
        let added = |(id, (text, kind)): (usize, (&&str, &i32))| {
            let special = *kind == CONTROL || *kind == UNKNOWN;
            (special || *kind == USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special,
                })
            })
        };
        self.texts.iter().zip(&self.kinds).enumerate().filter_map(added).collect()
    }

    /// Ids of those that there are.
    fn vocab(&self) -> Map<String, Value> {
        let used = self.texts.iter().zip(&self.kinds).enumerate().filter(|(_, (_, kind))| **kind != UNUSED);
        // The first of two that are the same.
        used.rev().map(|(id, (text, _))| ((*text).to_owned(), json!(id))).collect()
    }

    fn text(&self, id: Option<u64>) -> Option<&str> {
        self.texts.get(usize::try_from(id?).ok()?).copied()
    }
}

/// The tokenizer, where the file has one.
pub fn read(reader: &Reader<'_>) -> Result<Option<Vocabulary>, TrainError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let texts = |name: &str| -> Result<Option<Vec<&str>>, TrainError> {
        let read = |value| Meta::as_array(value)?.iter().map(Meta::as_text).collect::<Option<Vec<_>>>();
        reader.optional(&key(name), "texts", read)
    };
    let flag = |name: &str| {
        reader.optional(&key(name), "true or false", |value| match value {
            Meta::Bool(yes) => Some(*yes),
            _ => None,
        })
    };
    let id = |name: &str| reader.optional(&key(&format!("{name}_token_id")), "a token", Meta::as_u64);
    let model = reader.optional(&key("model"), "a text", Meta::as_text)?;
    let (Some(model), Some(all)) = (model, texts("tokens")?) else { return Ok(None) };
    let kind = |value: &Meta| match value {
        Meta::I32(kind) => Some(*kind),
        other => other.as_u64().and_then(|kind| i32::try_from(kind).ok()),
    };
    let kinds = reader.optional(&key("token_type"), "integers", |value| {
        value.as_array()?.iter().map(kind).collect::<Option<Vec<i32>>>()
    })?;
    let kinds = kinds.unwrap_or_else(|| vec![1; all.len()]);
    if kinds.len() != all.len() {
        return Err(reader.wrong(&key("token_type"), format!("{} values", all.len()), kinds.len().to_string()));
    }
    let tokens = Tokens { texts: all, kinds };
    let mut tokenizer = match model {
        "gpt2" => {
            let pre = reader.optional(&key("pre"), "a text", Meta::as_text)?.unwrap_or("(none)");
            let Some(divided) = divided(pre) else {
                let known: Vec<&str> = KINDS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
                return Err(reader.wrong(&key("pre"), format!("one of {}", known.join(", ")), pre));
            };
            bpe(&tokens, &texts("merges")?.unwrap_or_default(), divided)
        }
        "llama" => {
            let scores = reader.optional(&key("scores"), "numbers", |value| {
                value.as_array()?.iter().map(Meta::as_f64).collect::<Option<Vec<f64>>>()
            })?;
            let scores = scores.unwrap_or_default();
            if scores.len() != tokens.texts.len() {
                let expected = format!("{} values", tokens.texts.len());
                return Err(reader.wrong(&key("scores"), expected, scores.len().to_string()));
            }
            let unknown = tokens.text(Some(id("unknown")?.unwrap_or(0)));
            sentence_piece(&tokens, &scores, unknown, flag("add_space_prefix")?.unwrap_or(true))
        }
        other => return Err(reader.wrong(&key("model"), "gpt2 or llama", other)),
    };
    // llama.cpp's defaults, where the file says nothing.
    let pre = reader.get(&key("pre")).and_then(Meta::as_text);
    let begins = flag("add_bos_token")?.unwrap_or(model == "llama" || pre == Some("llama-bpe"));
    let [bos, eos, unknown, padding] = [id("bos")?, id("eos")?, id("unknown")?, id("padding")?];
    if let (true, Some(id), Some(text)) = (begins, bos, tokens.text(bos)) {
        tokenizer["post_processor"] = begin(id, text);
    }
    let template = reader.optional("tokenizer.chat_template", "a text", Meta::as_text)?;
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "add_bos_token": begins,
    });
    let mut generation = json!({ "bos_token_id": bos, "eos_token_id": eos });
    for (name, id) in [("bos", bos), ("eos", eos), ("unk", unknown), ("pad", padding)] {
        if let Some(text) = tokens.text(id) {
            config[format!("{name}_token")] = text.into();
        }
    }
    if let Some(padding) = padding {
        generation["pad_token_id"] = padding.into();
    }
    let mut sides = BTreeMap::from([
        ("tokenizer_config.json", format!("{config:#}\n")),
        ("generation_config.json", format!("{generation:#}\n")),
    ]);
    if let Some(template) = template {
        sides.insert("chat_template.jinja", template.to_owned());
    }
    Ok(Some(Vocabulary { tokenizer, sides }))
}

/// How text is divided into words.
#[derive(Clone, Copy)]
enum Divided {
    /// By one of [`PATTERNS`].
    Pattern(&'static str),
    /// By GPT-2's, with each digit by itself.
    Digits,
}

/// llama.cpp's names for them.
const KINDS: [(&[&str], Divided); 4] = [
    (&["gpt-2", "gpt2", "olmo"], Divided::Pattern("gpt-2")),
    (&["smollm", "starcoder", "refact", "command-r", "codeshell"], Divided::Digits),
    (&["llama-bpe", "llama3", "llama-v3", "smaug-bpe"], Divided::Pattern("llama-bpe")),
    (&["qwen2", "deepseek-r1-qwen"], Divided::Pattern("qwen2")),
];

fn divided(pre: &str) -> Option<Divided> {
    KINDS.iter().find(|(names, _)| names.contains(&pre)).map(|(_, divided)| *divided)
}

/// A text begins with a token, where it is asked for special ones.
fn begin(id: u64, text: &str) -> Value {
    let special = |sequence: u8| json!({ "SpecialToken": { "id": text, "type_id": sequence } });
    let part = |name: &str, sequence: u8| json!({ "Sequence": { "id": name, "type_id": sequence } });
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), part("A", 0)],
        "pair": [special(0), part("A", 0), special(1), part("B", 1)],
        "special_tokens": { text: { "id": text, "ids": [id], "tokens": [text] } },
    })
}

fn bpe(tokens: &Tokens<'_>, merges: &[&str], divided: Divided) -> Value {
    let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let pattern = |name: &str| PATTERNS.iter().find(|(_, known)| *known == name).map_or("", |(pattern, _)| *pattern);
    let (normalizer, pre_tokenizer, whole_words) = match divided {
        Divided::Digits => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            (Value::Null, json!({ "type": "Sequence", "pretokenizers": [digits, byte_level(true)] }), false)
        }
        Divided::Pattern("gpt-2") => (Value::Null, byte_level(true), false),
        Divided::Pattern(name) => {
            let split = json!({ "type": "Split", "pattern": { "Regex": pattern(name) }, "behavior": "Isolated", "invert": false });
            let pre = json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] });
            (if name == "qwen2" { json!({ "type": "NFC" }) } else { Value::Null }, pre, name == "llama-bpe")
        }
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": whole_words,
            "vocab": tokens.vocab(),
            "merges": merges,
        },
    })
}

/// SentencePiece's BPE, as transformers converts it: two tokens become one in the order of its score.
fn sentence_piece(tokens: &Tokens<'_>, scores: &[f64], unknown: Option<&str>, space_before: bool) -> Value {
    const SPACE: &str = "\u{2581}";
    let mut ids: BTreeMap<&str, usize> = BTreeMap::new();
    for (id, text) in tokens.texts.iter().enumerate() {
        if let Entry::Vacant(free) = ids.entry(text) {
            free.insert(id);
        }
    }
    let mut merges: Vec<(f64, [usize; 2], [&str; 2])> = vec![];
    for (id, text) in tokens.texts.iter().enumerate() {
        let mut parts: Vec<([usize; 2], [&str; 2])> = vec![];
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                parts.push(([*l, *r], [left, right]));
            }
        }
        parts.sort_unstable_by_key(|(ids, _)| *ids);
        let lengths = |[left, right]: [&str; 2]| [left.chars().count(), right.chars().count()];
        merges.extend(parts.into_iter().map(|(_, parts)| (scores[id], lengths(parts), parts)));
    }
    // Stable, so that equals stay in the order of the tokens that they make.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    let merges: Vec<Value> = merges.into_iter().map(|(_, _, parts)| json!(parts)).collect();
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_before {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false,
            "vocab": tokens.vocab(),
            "merges": merges,
        },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use firebox_data::Tokenizer;

    use super::*;

    fn tokens<'a>(texts: &[&'a str], kinds: &[i32]) -> Tokens<'a> {
        Tokens { texts: texts.to_vec(), kinds: kinds.to_vec() }
    }

    fn tokenizer(json: &Value) -> Tokenizer {
        Tokenizer::from_json(json.to_string()).unwrap()
    }

    #[test]
    fn pieces_are_merged_by_their_scores() {
        let texts = ["<unk>", "<s>", "\u{2581}", "a", "b", "c", "ab", "bc", "\u{2581}a", "abc"];
        let kinds = [2, 3, 1, 1, 1, 1, 1, 1, 1, 1];
        let scores = |ab: f64, bc: f64| [0.0, 0.0, -9.0, -9.0, -9.0, -9.0, ab, bc, -4.0, -5.0];
        let ids = |ab, bc, before, text: &str| {
            let json = sentence_piece(&tokens(&texts, &kinds), &scores(ab, bc), Some("<unk>"), before);
            tokenizer(&json).encode(text.as_bytes()).unwrap()
        };
        assert_eq!(ids(-1.0, -2.0, false, "abc"), [9], "a b c, ab c, abc");
        assert_eq!(ids(-2.0, -1.0, true, "abc"), [8, 7], "_ a b c, _ a bc, _a bc");
        assert_eq!(ids(-1.0, -2.0, true, "abc"), [2, 9]);
    }

    #[test]
    fn digits_are_by_themselves_where_the_name_says_so() {
        let bytes: Vec<String> = (0..=255).map(|byte| Tokenizer::bytes_as_text(&[byte])).collect();
        let mut texts: Vec<&str> = bytes.iter().map(String::as_str).collect();
        texts.extend(["12", "<|end|>", "[PAD258]"]);
        let kinds: Vec<i32> = (0..texts.len()).map(|id| [1, 3, 5][id.saturating_sub(256)]).collect();
        let ids = |pre: &str| {
            let json = bpe(&tokens(&texts, &kinds), &["1 2"], divided(pre).unwrap());
            tokenizer(&json).encode(b"12").unwrap()
        };
        assert_eq!(ids("gpt-2"), [256]);
        assert_eq!(ids("llama-bpe"), [256]);
        assert_eq!(ids("qwen2"), [49, 50]);
        assert_eq!(ids("smollm"), [49, 50]);
        let json = bpe(&tokens(&texts, &kinds), &["1 2"], Divided::Digits);
        assert_eq!(json["added_tokens"].as_array().unwrap().len(), 1);
        assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), 258, "there is no token 258");
    }
}
