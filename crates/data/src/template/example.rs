//! Rows that teach a model to answer: conversations, prompts with what follows them, and prompts with a better and a worse answer.

use crate::error::DataError;
use crate::records::{Record, kind};
use crate::template::{Chat, ChatTemplate};
use crate::tokenizer::Tokenizer;
use minijinja::value::Serde;
use serde_json::Value;

/// Who may speak in a conversation.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// What a row of instruction or preference data says.
#[derive(Debug, Clone)]
pub enum Example {
    /// A conversation, for a model's template.
    Chat {
        /// All of it.
        chat: Chat,
        /// How many of its answers, from the first on, belong to the prompt, so that there is nothing to learn from them.
        given: usize,
    },
    /// A text and what follows it, without a template.
    Texts {
        /// The text.
        prompt: String,
        /// What follows it.
        completion: String,
    },
}

/// The tokens of an [`Example`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answered {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether each token is of an answer that the model is to learn.
    pub answer: Vec<bool>,
}

impl Answered {
    /// The first `tokens` of it.
    pub fn cut(&mut self, tokens: usize) {
        self.ids.truncate(tokens);
        self.answer.truncate(tokens);
    }

    /// How many tokens of answers there are. The first token of all follows none and does not count.
    pub fn answers(&self) -> usize {
        self.answer.iter().skip(1).filter(|answer| **answer).count()
    }

    /// The tokens before the first answer: what a model is asked.
    pub fn prompt(&self) -> &[u32] {
        let n = self.answer.iter().position(|answer| *answer).unwrap_or(self.ids.len());
        &self.ids[..n]
    }
}

impl Example {
    /// Of a row with `messages`, each with a `role` and a `content` (and `tools`), or with `prompt` and `completion`, each a text or messages. Where there is no template, both are texts.
    ///
    /// # Errors
    /// [`DataError::BadRow`] for any other row, or one without an answer.
    pub fn of_record(record: &Record, with_template: bool) -> Result<Self, DataError> {
        let has = |name: &str| record.fields.get(name).is_some_and(|value| !value.is_null());
        if has("messages") {
            if !with_template {
                return Err(record.bad(
                    "`messages` need a chat template: task.template = \"none\" is for `prompt` and `completion`",
                ));
            }
            return conversation(record, messages(record, "messages", "user")?, 0);
        }
        if !has("prompt") && !has("completion") {
            let names: Vec<&str> = record.fields.keys().map(String::as_str).collect();
            let found = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(record.bad(format!("no field `messages`, nor `prompt` and `completion` (there are: {found})")));
        }
        Self::of_fields(record, "completion", with_template)
    }

    /// The better and the worse one of a row with `prompt`, `chosen` and `rejected`, each a text or messages; without `prompt`, the other two are conversations that begin with it.
    ///
    /// # Errors
    /// [`DataError::BadRow`] for any other row, or one whose answers are the same.
    pub fn pair_of_record(record: &Record, with_template: bool) -> Result<[Self; 2], DataError> {
        if record.field("chosen")? == record.field("rejected")? {
            return Err(record.bad("`chosen` and `rejected` are the same: there is nothing to prefer"));
        }
        let there = record.fields.get("prompt").is_some_and(|prompt| !prompt.is_null());
        if there || record.field("chosen")?.is_string() {
            return Ok([
                Self::of_fields(record, "chosen", with_template)?,
                Self::of_fields(record, "rejected", with_template)?,
            ]);
        }
        if !with_template {
            return Err(record.bad("conversations need a chat template: task.template = \"none\" is for texts"));
        }
        let [chosen, rejected] = ["chosen", "rejected"].map(|name| messages(record, name, "user"));
        let (chosen, rejected) = (chosen?, rejected?);
        let same = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        let given = chosen[..same].iter().filter(|message| is_answer(message)).count();
        Ok([conversation(record, chosen, given)?, conversation(record, rejected, given)?])
    }

    /// `prompt`, and the field `answer` after it.
    fn of_fields(record: &Record, answer: &str, with_template: bool) -> Result<Self, DataError> {
        if !with_template {
            let (prompt, completion) = (record.text("prompt")?.to_owned(), record.text(answer)?.to_owned());
            return Ok(Self::Texts { prompt, completion });
        }
        let mut all = messages(record, "prompt", "user")?;
        let given = all.iter().filter(|message| is_answer(message)).count();
        all.extend(messages(record, answer, "assistant")?);
        conversation(record, all, given)
    }

    /// Its tokens: those of the template's text, or, without one, of both texts between the tokens that separate documents.
    ///
    /// # Errors
    /// [`DataError`]: a template that objects, or a tokenizer that does not have a character. The caller says of which row.
    pub fn tokens(&self, template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Result<Answered, DataError> {
        match (self, template) {
            (Self::Chat { chat, given }, Some(template)) => {
                let (text, ranges) = template.answers(chat)?;
                let encoded = tokenizer.encode_special(&text)?;
                let mut ranges = ranges.into_iter().skip(*given).peekable();
                let answer = encoded.offsets.iter().map(|token| {
                    while ranges.next_if(|range| range.end <= token.start).is_some() {}
                    ranges.peek().is_some_and(|range| range.start < token.end.max(token.start + 1))
                });
                Ok(Answered { answer: answer.collect(), ids: encoded.ids })
            }
            (Self::Texts { prompt, completion }, _) => {
                let mut ids: Vec<u32> = tokenizer.eot().into_iter().collect();
                tokenizer.encode_into(prompt.as_bytes(), &mut ids)?;
                let n = ids.len();
                tokenizer.encode_into(completion.as_bytes(), &mut ids)?;
                ids.extend(tokenizer.eot());
                let answer = (0..ids.len()).map(|i| i >= n).collect();
                Ok(Answered { ids, answer })
            }
            // As ChatML, which no model has in mind: for callers that have no template.
            (Self::Chat { .. }, None) => self.tokens(Some(&ChatTemplate::chatml()?), tokenizer),
        }
    }
}

fn is_answer(message: &Value) -> bool {
    message["role"] == "assistant"
}

/// The messages of a field: a list of them, or a text that is one of `role`.
fn messages(record: &Record, name: &str, role: &str) -> Result<Vec<Value>, DataError> {
    let value = record.field(name)?;
    if let Value::String(text) = value {
        return Ok(vec![serde_json::json!({ "role": role, "content": text })]);
    }
    let Some(list) = value.as_array() else {
        return Err(record.bad(format!("`{name}`: expected text or a list of messages, got {}", kind(value))));
    };
    for (i, message) in list.iter().enumerate() {
        check(message).map_err(|reason| record.bad(format!("`{name}`, message {}: {reason}", i + 1)))?;
    }
    Ok(list.clone())
}

/// What is wrong with a message.
fn check(message: &Value) -> Result<(), String> {
    if !message.is_object() {
        return Err(format!("expected an object with `role` and `content`, got {}", kind(message)));
    }
    match &message["role"] {
        Value::String(role) if ROLES.contains(&role.as_str()) => {}
        Value::String(role) => return Err(format!("role: expected one of {}, got {role:?}", ROLES.join(", "))),
        other => return Err(format!("role: expected one of {}, got {}", ROLES.join(", "), kind(other))),
    }
    match &message["content"] {
        Value::String(_) | Value::Array(_) => Ok(()),
        Value::Null if is_answer(message) && message["tool_calls"].is_array() => Ok(()),
        other => Err(format!("content: expected text, got {}", kind(other))),
    }
}

fn conversation(record: &Record, messages: Vec<Value>, given: usize) -> Result<Example, DataError> {
    let answers = messages.iter().filter(|message| is_answer(message)).count();
    if answers <= given {
        return Err(record.bad("no message of the assistant after the prompt: there is nothing to learn from it"));
    }
    let chat = Chat::of_values(messages.iter().map(as_value).collect());
    let chat = match record.fields.get("tools") {
        Some(Value::Array(tools)) => chat.with_tools(Serde(tools).into()),
        None | Some(Value::Null) => chat,
        Some(other) => return Err(record.bad(format!("`tools`: expected a list, got {}", kind(other)))),
    };
    Ok(Example::Chat { chat, given })
}

fn as_value(message: &Value) -> minijinja::Value {
    Serde(message).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::records::read_records;
    use crate::tokenizer::END_OF_TEXT;

    fn rows(lines: &str) -> Vec<Record> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, lines).unwrap();
        read_records(&[path.display().to_string()]).unwrap()
    }

    /// A byte-level tokenizer with a few merges and ChatML's tokens.
    fn tokenizer() -> Tokenizer {
        let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
        for (id, byte) in (0..=255u8).enumerate() {
            vocab.insert(Tokenizer::bytes_as_text(&[byte]), id.into());
        }
        for (i, token) in ["as", "us", "er", "user"].iter().enumerate() {
            vocab.insert((*token).into(), (256 + i).into());
        }
        let special = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"].iter().enumerate().map(|(i, name)| {
            serde_json::json!({"id": 260 + i, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        });
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": special.collect::<Vec<_>>(), "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "s"], ["u", "s"], ["e", "r"], ["us", "er"]]}
        });
        Tokenizer::from_json(json.to_string()).unwrap()
    }

    fn learned(example: &Example, template: Option<&ChatTemplate>) -> String {
        let tokenizer = tokenizer();
        let answered = example.tokens(template, &tokenizer).unwrap();
        let bytes = |id: u32| match id {
            260 => b"<eot>".to_vec(),
            261 => b"<start>".to_vec(),
            262 => b"<end>".to_vec(),
            id => tokenizer.decode(&[id]),
        };
        let learned = answered.ids.iter().zip(&answered.answer).filter(|(_, answer)| **answer);
        // A character may be several tokens.
        String::from_utf8(learned.flat_map(|(id, _)| bytes(*id)).collect()).unwrap()
    }

    #[test]
    fn answers_alone_are_learned_with_the_token_that_ends_them() {
        let template = ChatTemplate::chatml().unwrap();
        let lines = r#"
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "assist user"}, {"role": "assistant", "content": " \n Hi, user"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "Ünï 🙂 "}]}
            {"prompt": "2+2?", "completion": "4"}
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]}
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": []}, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "b"}], "tools": []}"#;
        let rows = rows(lines);
        let example = |i: usize| Example::of_record(&rows[i], true).unwrap();
        assert_eq!(learned(&example(0), Some(&template)), " \n Hi, user<end>Ünï 🙂 <end>");
        assert_eq!(learned(&example(1), Some(&template)), "4<end>");
        assert_eq!(learned(&example(2), Some(&template)), "d<end>");
        assert_eq!(learned(&Example::of_record(&rows[1], false).unwrap(), None), "4<eot>");
        let answered = Example::of_record(&rows[1], false).unwrap().tokens(None, &tokenizer()).unwrap();
        assert_eq!(answered.prompt(), [260, 50, 43, 50, 63]);
        assert_eq!(answered.answers(), 2);
    }

    #[test]
    fn pairs_share_their_prompt() {
        let template = ChatTemplate::chatml().unwrap();
        let lines = r#"
            {"prompt": "a", "chosen": "good", "rejected": "bad"}
            {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "good"}], "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "bad"}]}"#;
        for row in rows(lines) {
            let pair = Example::pair_of_record(&row, true).unwrap();
            assert_eq!(pair.map(|example| learned(&example, Some(&template))), ["good<end>", "bad<end>"]);
        }
    }

    #[test]
    fn what_is_no_conversation_is_said_with_its_line() {
        for (row, says) in [
            (r#"{"text": "x"}"#, "no field `messages`, nor `prompt` and `completion` (there are: text)"),
            (r#"{"messages": []}"#, "no message of the assistant"),
            (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "no message of the assistant"),
            (r#"{"messages": "x"}"#, "no message of the assistant"),
            (r#"{"messages": 3}"#, "expected text or a list of messages, got a number"),
            (r#"{"messages": [3]}"#, "message 1: expected an object"),
            (r#"{"messages": [{"role": "gpt", "content": "x"}]}"#, "got \"gpt\""),
            (r#"{"messages": [{"content": "x"}]}"#, "role: expected one of"),
            (r#"{"messages": [{"role": "assistant"}]}"#, "content: expected text, got null"),
            (r#"{"prompt": "x"}"#, "no field `completion`"),
            (r#"{"prompt": "x", "completion": "y", "tools": 1}"#, "`tools`: expected a list"),
        ] {
            let error = Example::of_record(&rows(row)[0], true).unwrap_err().to_string();
            assert!(error.contains(":1: ") && error.contains(says), "{row}: {error}");
        }
        for (row, says) in [
            (r#"{"prompt": "x", "chosen": "y"}"#, "no field `rejected`"),
            (r#"{"prompt": "x", "chosen": "y", "rejected": "y"}"#, "the same"),
            (r#"{"chosen": "x", "rejected": "y"}"#, "no field `prompt`"),
        ] {
            let error = Example::pair_of_record(&rows(row)[0], true).unwrap_err().to_string();
            assert!(error.contains(":1: ") && error.contains(says), "{row}: {error}");
        }
    }
}
