//! Chat templates: from a conversation to the text that a model has learned to go on from.
//!
//! A template is a Jinja program in a model's folder, written for `transformers`, whose dialect this is: blocks are trimmed, Python's methods of texts, lists and
//! dictionaries work, and so do `raise_exception`, `strftime_now`, `tojson` as Python writes JSON, `break` and `continue`, and `{% generation %}`, which marks what the
//! model says itself.

mod dialect;
mod example;

use crate::error::DataError;
use minijinja::{Environment, Value, context};
use std::ops::Range;
use std::path::Path;

pub use example::{Answered, Example};

/// The template where a model has none: ChatML, as OpenAI wrote it down.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A conversation.
#[derive(Debug, Clone)]
pub struct Chat {
    messages: Vec<Value>,
    tools: Value,
    documents: Value,
}

impl Chat {
    /// Of messages, each a role (`system`, `user`, `assistant`) and what it says.
    pub fn new<'a>(messages: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let message = |(role, content): (&str, &str)| context! { role, content };
        Self::of_values(messages.into_iter().map(message).collect())
    }

    /// Of messages with whatever else a template may ask for.
    pub(crate) fn of_values(messages: Vec<Value>) -> Self {
        Self { messages, tools: Value::from(()), documents: Value::from(()) }
    }

    /// With descriptions of functions that the model may call.
    pub fn with_tools(self, tools: Value) -> Self {
        Self { tools, ..self }
    }

    fn is_answer(message: &Value) -> bool {
        message.get_attr("role").is_ok_and(|role| role.as_str() == Some("assistant"))
    }

    /// Its first messages.
    fn first(&self, n: usize) -> Self {
        Self { messages: self.messages[..n].to_vec(), ..self.clone() }
    }
}

/// A template that is ready to be used.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    origin: String,
    /// Names of special tokens (`bos_token`) and their texts.
    special: Vec<(String, String)>,
    /// Whether it says itself what the model says.
    marks_answers: bool,
    is_default: bool,
}

/// Where a marked answer begins and ends: two code points that are no characters.
const MARKS: [char; 2] = ['\u{10FFFE}', '\u{10FFFF}'];

impl ChatTemplate {
    /// From a template's text; `origin` says in errors where it is from, `special` names special tokens (`bos_token`, `eos_token`) and their texts.
    ///
    /// # Errors
    /// [`DataError::Template`] when it does not parse.
    pub fn new(source: &str, origin: &str, special: Vec<(String, String)>) -> Result<Self, DataError> {
        let mut environment = dialect::environment();
        let marked = dialect::with_marks(source);
        let marks_answers = marked.contains(dialect::MARK);
        environment.add_template_owned("chat", marked).map_err(|e| failed(origin, &e))?;
        let (source, origin) = (source.to_owned(), origin.to_owned());
        Ok(Self { environment, source, origin, special, marks_answers, is_default: false })
    }

    /// [`CHATML`].
    ///
    /// # Errors
    /// None in fact: it parses.
    pub fn chatml() -> Result<Self, DataError> {
        Ok(Self { is_default: true, ..Self::new(CHATML, "ChatML", vec![])? })
    }

    /// The template of a model's folder: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`, or else [`CHATML`].
    ///
    /// # Errors
    /// [`DataError`] when a file cannot be read or the template does not parse.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let read = |name: &str| {
            let path = folder.join(name);
            let text = || std::fs::read_to_string(&path).map_err(DataError::io("open", &path));
            path.is_file().then(text).transpose()
        };
        let (config, template) = (read("tokenizer_config.json")?, read("chat_template.jinja")?);
        Self::of_files(config.as_deref(), template.as_deref(), &folder.display().to_string())
    }

    /// The same of the texts of `tokenizer_config.json` and `chat_template.jinja`, as far as they are there, of what `origin` names.
    ///
    /// # Errors
    /// [`DataError::Template`] where one does not parse.
    pub fn of_files(config: Option<&str>, template: Option<&str>, origin: &str) -> Result<Self, DataError> {
        let of_config = format!("{origin}/tokenizer_config.json");
        let wrong =
            |e: serde_json::Error| DataError::Template { origin: of_config.clone(), reason: format!("not JSON: {e}") };
        let settings: serde_json::Value =
            config.map_or(Ok(serde_json::Value::Null), serde_json::from_str).map_err(wrong)?;
        let special = special_tokens(&settings);
        match (template, in_settings(&settings["chat_template"])) {
            (Some(source), _) => Self::new(source, &format!("{origin}/chat_template.jinja"), special),
            (None, Some(source)) => Self::new(source, &of_config, special),
            (None, None) => Ok(Self { special, ..Self::chatml()? }),
        }
    }

    /// A template's own file; special tokens are those of `tokenizer_config.json`'s text, where there is one.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_file(path: &Path, config: Option<&str>) -> Result<Self, DataError> {
        let source = std::fs::read_to_string(path).map_err(DataError::io("open", path))?;
        let special = Self::of_files(config, None, &path.display().to_string())?.special;
        Self::new(&source, &path.display().to_string(), special)
    }

    /// Its text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What follows the words of an answer: the names of the tokens that end it, mostly one; none where nothing does.
    ///
    /// # Errors
    /// As [`answers`](Self::answers).
    pub fn end_of_answer(&self) -> Result<String, DataError> {
        const WORD: &str = "word";
        let (text, answers) = self.answers(&Chat::new([("user", WORD), ("assistant", WORD)]))?;
        let answer = answers.first().map_or("", |range| &text[range.clone()]);
        Ok(answer.rfind(WORD).map_or("", |at| &answer[at + WORD.len()..]).trim().to_owned())
    }

    /// The same with what `strftime_now` gives: Unix seconds, so that what a run is trained on does not depend on when that was.
    pub fn at(mut self, seconds: i64) -> Self {
        dialect::set_clock(&mut self.environment, seconds);
        self
    }

    /// Where it is from, for the log.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether the model has none of its own.
    pub fn is_default(&self) -> bool {
        self.is_default
    }

    /// The text of a conversation; with `prompt`, it ends where the model's next answer begins.
    ///
    /// # Errors
    /// [`DataError::Template`] with what the template objects to, on one line.
    pub fn render(&self, chat: &Chat, prompt: bool) -> Result<String, DataError> {
        self.render_with_marks(chat, prompt).map(|text| text.replace(MARKS, ""))
    }

    fn render_with_marks(&self, chat: &Chat, prompt: bool) -> Result<String, DataError> {
        let Chat { messages, tools, documents } = chat.clone();
        let special = Value::from_pairs(self.special.iter().map(|(name, text)| (name.as_str(), text.as_str())));
        let context = context! { messages, tools, documents, add_generation_prompt => prompt, ..special };
        let template = self.environment.get_template("chat").map_err(|e| failed(&self.origin, &e))?;
        template.render(context).map_err(|e| failed(&self.origin, &e))
    }

    /// The text of a conversation, and where in it (bytes) the model's own words stand, the token that ends each answer included and the line break after it not.
    ///
    /// A template with `{% generation %}` says so itself. With any other, an answer is what a conversation up to it has more than the prompt before it.
    ///
    /// # Errors
    /// [`DataError::Template`]: as [`render`](Self::render), or the beginning of a conversation does not read as the beginning of the whole.
    pub fn answers(&self, chat: &Chat) -> Result<(String, Vec<Range<usize>>), DataError> {
        let wrong = |reason: &str| DataError::Template { origin: self.origin.clone(), reason: reason.into() };
        if self.marks_answers {
            let marked = self.render_with_marks(chat, false)?;
            return marked_ranges(&marked).ok_or_else(|| wrong("nested or torn {% generation %} blocks"));
        }
        let text = self.render(chat, false)?;
        let mut answers = vec![];
        for (i, _) in chat.messages.iter().enumerate().filter(|(_, message)| Chat::is_answer(message)) {
            let before = self.render(&chat.first(i), true)?;
            let until = self.render(&chat.first(i + 1), false)?;
            if !(text.starts_with(&until) && until.starts_with(&before)) {
                let reason = "it writes the beginning of a conversation in another way than the whole, so that where answers stand is not known: \
                              mark them in it with {% generation %} and {% endgeneration %}, or set task.train_on = \"all\"";
                return Err(wrong(reason));
            }
            let end = before.len() + until[before.len()..].trim_end().len();
            answers.push(before.len()..end);
        }
        Ok((text, answers))
    }
}

/// Takes the marks out of a text.
fn marked_ranges(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let (mut text, mut ranges, mut start) = (String::with_capacity(marked.len()), vec![], None);
    for part in marked.split_inclusive(MARKS) {
        match (part.strip_suffix(MARKS[0]), part.strip_suffix(MARKS[1])) {
            (Some(part), _) => {
                text.push_str(part);
                if start.replace(text.len()).is_some() {
                    return None;
                }
            }
            (_, Some(part)) => {
                text.push_str(part);
                ranges.push(start.take()?..text.len());
            }
            _ => text.push_str(part),
        }
    }
    start.is_none().then_some((text, ranges))
}

/// One line of an error and what caused it.
fn failed(origin: &str, error: &minijinja::Error) -> DataError {
    let mut reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        reason = format!("{reason}: {inner}");
        cause = inner.source();
    }
    if let Some(line) = error.line().filter(|_| error.kind() == minijinja::ErrorKind::SyntaxError) {
        reason = format!("line {line}: {reason}");
    }
    DataError::Template { origin: origin.to_owned(), reason: reason.split_whitespace().collect::<Vec<_>>().join(" ") }
}

/// A template is one text, or a list of named ones.
fn in_settings(value: &serde_json::Value) -> Option<&str> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named)
}

/// The entries `NAME_token`, each a text or an object with its content.
fn special_tokens(settings: &serde_json::Value) -> Vec<(String, String)> {
    let entries = settings.as_object().into_iter().flatten();
    let token = |(name, value): (&String, &serde_json::Value)| {
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        name.ends_with("_token").then(|| (name.clone(), text.to_owned()))
    };
    entries.filter_map(token).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn chat() -> Chat {
        Chat::new([
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hello!"),
            ("user", "2+2?"),
            ("assistant", "4"),
        ])
    }

    fn said(template: &ChatTemplate) -> Vec<String> {
        let (text, ranges) = template.answers(&chat()).unwrap();
        assert_eq!(text, template.render(&chat(), false).unwrap());
        ranges.into_iter().map(|range| text[range].to_owned()).collect()
    }

    #[test]
    fn answers_by_prefixes_and_by_marks() {
        let template = ChatTemplate::chatml().unwrap();
        let text = template.render(&chat().first(2), true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(template.end_of_answer().unwrap(), "<|im_end|>");
        assert_eq!(said(&template), ["Hello!<|im_end|>", "4<|im_end|>"]);
        let marked = "{%- for m in messages -%}{%- if m.role == 'assistant' -%}A: {% generation -%} {{ m.content }}</s> {%- endgeneration %}\n{% else %}{{ m.role }}: {{ m.content }}\n\
                      {% endif %}{%- endfor -%}";
        let template = ChatTemplate::new(marked, "test", vec![]).unwrap();
        assert_eq!(said(&template), ["Hello!</s>", "4</s>"]);
    }

    #[test]
    fn what_a_template_objects_to_is_one_line() {
        let error = |source: &str, says: &str| {
            let made = ChatTemplate::new(source, "here.jinja", vec![]).and_then(|t| t.answers(&chat()).map(|_| ()));
            let error = made.unwrap_err().to_string();
            assert!(error.contains("here.jinja") && error.contains(says) && !error.contains('\n'), "{source}: {error}");
        };
        error("{{ raise_exception('roles must\n alternate') }}", "roles must alternate");
        error("{% if %}", "line 1");
        error("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "fuel");
        error("{{ messages[0].content[999].x.y }}", "undefined");
        error("{% for m in messages %}{{ loop.last }} {{ m.content }}{% endfor %}", "generation");
    }

    #[test]
    fn of_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap().is_default());
        let config = dir.path().join("tokenizer_config.json");
        let text = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ strftime_now('%d %b %Y') }}"}]}"#;
        std::fs::write(&config, text).unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap().at(1_721_952_000);
        assert_eq!(template.render(&chat(), false).unwrap(), "<s>Be brief.</s>26 Jul 2024");
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ {'b': [1, 1.5, none, '<é>'], 'a': {}} | tojson }}")
            .unwrap();
        let template = ChatTemplate::load(dir.path()).unwrap();
        assert_eq!(template.render(&chat(), false).unwrap(), r#"{"b": [1, 1.5, null, "<é>"], "a": {}}"#);
        std::fs::write(&config, "{").unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap_err().to_string().contains("not JSON"));
    }
}
