//! What a model needs besides itself to read and write text: its tokenizer, its chat template, the tokens that end what it writes.

use std::collections::BTreeMap;
use std::path::Path;

use firebox_data::{ChatTemplate, Tokenizer};
use serde_json::Value;

use crate::TrainError;
use crate::model_io::Folder;
use crate::recipe::Recipe;

/// Tokenizer and small files of a model.
#[derive(Debug)]
pub struct Words {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Files beside the model by name, of the names that [`SIDES`](crate::model_io::SIDES) has.
    sides: BTreeMap<&'static str, String>,
    /// Where they are from, for errors.
    origin: String,
    /// Tokens that end what the model writes.
    ends: Vec<u32>,
}

impl Words {
    /// Those of the model in `path`: what [`load`](crate::model_io::load) loads.
    ///
    /// # Errors
    /// As [`load`](crate::model_io::load); [`TrainError::Input`] for a model without a tokenizer.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let folder = Folder::open(path)?;
        let tokenizer = folder.tokenizer.ok_or_else(|| Self::missing(path))?;
        Ok(Self::new(tokenizer, folder.sides, &folder.config, path.display().to_string()))
    }

    /// Those of the model that a run starts from; of one that starts from nothing, the tokenizer that `data.tokenizer` names.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_recipe(recipe: &Recipe) -> Result<Self, TrainError> {
        if let Some(model) = &recipe.init {
            return Self::open(model);
        }
        let path = Path::new(&recipe.data.tokenizer);
        if !path.is_file() {
            return Err(TrainError::Input {
                what: "data.tokenizer",
                expected: "a tokenizer.json, where a run with this task starts from no model (--from)".into(),
                got: recipe.data.tokenizer.clone(),
            });
        }
        Ok(Self::new(Tokenizer::load(path)?, BTreeMap::new(), &Value::Null, path.display().to_string()))
    }

    pub(crate) fn missing(path: &Path) -> TrainError {
        let (expected, got) = ("a tokenizer.json beside it".into(), format!("none in {}", path.display()));
        TrainError::Input { what: "model", expected, got }
    }

    pub(crate) fn new(
        tokenizer: Tokenizer,
        sides: BTreeMap<&'static str, String>,
        config: &Value,
        origin: String,
    ) -> Self {
        let generation = sides.get("generation_config.json").and_then(|text| serde_json::from_str::<Value>(text).ok());
        let ids = |json: &Value| match &json["eos_token_id"] {
            Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
            id => id.as_u64().into_iter().collect::<Vec<u64>>(),
        };
        let mut ends = generation.as_ref().map(ids).unwrap_or_default();
        if ends.is_empty() {
            ends = ids(config);
        }
        let ends = ends.into_iter().filter_map(|id| u32::try_from(id).ok()).chain(tokenizer.eot());
        Self { ends: ends.collect(), tokenizer, sides, origin }
    }

    /// The model's chat template, or ChatML where it has none.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn template(&self) -> Result<ChatTemplate, TrainError> {
        let side = |name: &str| self.sides.get(name).map(String::as_str);
        // The name that some processors give it.
        let named = side("chat_template.json").and_then(|text| serde_json::from_str::<Value>(text).ok());
        let named = named.as_ref().and_then(|json| json["chat_template"].as_str());
        let template = side("chat_template.jinja").or(named);
        Ok(ChatTemplate::of_files(side("tokenizer_config.json"), template, &self.origin)?)
    }

    /// The template that a task's `template` names: `model` its own, `none` none, anything else a file.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn template_named(&self, name: &str) -> Result<Option<ChatTemplate>, TrainError> {
        match name {
            "none" => Ok(None),
            "model" => self.template().map(Some),
            path => {
                let config = self.sides.get("tokenizer_config.json").map(String::as_str);
                Ok(Some(ChatTemplate::load_file(Path::new(path), config)?))
            }
        }
    }

    /// How answers end that follow this template.
    ///
    /// # Errors
    /// A template that objects to a short conversation.
    pub fn ends(&self, template: Option<&ChatTemplate>) -> Result<Ends, TrainError> {
        let (mut ids, mut text) = (self.ends.clone(), String::new());
        if let Some(template) = template {
            let end = template.end_of_answer()?;
            match self.tokenizer.token_id(&end) {
                Some(id) => ids.push(id),
                None => text = end,
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(Ends { ids, text })
    }

    /// The files that go with a model that was trained to follow this template.
    pub fn files(&self, template: Option<&ChatTemplate>) -> Vec<(String, Vec<u8>)> {
        let is_template = |name: &str| name.starts_with("chat_template.");
        let kept = self.sides.iter().filter(|(name, _)| template.is_none() || !is_template(name));
        let mut files: Vec<_> = kept.map(|(name, text)| ((*name).to_owned(), text.clone().into_bytes())).collect();
        files.extend(template.map(|template| ("chat_template.jinja".to_owned(), template.source().into())));
        files
    }
}

/// How a model's answers end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// By one of these tokens.
    pub ids: Vec<u32>,
    /// Or by this text, which is no token of its own; empty where there is none.
    pub text: String,
}

/// The text of an answer as it grows, of which only what surely belongs to it is seen.
#[derive(Debug)]
pub(crate) struct Growing<'a> {
    tokenizer: &'a Tokenizer,
    ends: &'a Ends,
    ids: Vec<u32>,
    shown: usize,
}

impl<'a> Growing<'a> {
    pub fn new(tokenizer: &'a Tokenizer, ends: &'a Ends) -> Self {
        Self { tokenizer, ends, ids: vec![], shown: 0 }
    }

    /// Takes the next token; the bytes that are certain now, or none if the answer has ended.
    pub fn push(&mut self, id: i32) -> Option<Vec<u8>> {
        if self.ends.ids.contains(&(id as u32)) {
            return None;
        }
        self.ids.push(id as u32);
        let text = self.tokenizer.decode(&self.ids);
        let end = self.ends.text.as_bytes();
        if !end.is_empty() && text.windows(end.len()).any(|part| part == end) {
            return None;
        }
        // What may be the beginning of the end, or of a character.
        let waits = (1..end.len().min(text.len() + 1)).rev().find(|&n| text.ends_with(&end[..n])).unwrap_or(0);
        let waits = if text.ends_with("\u{fffd}".as_bytes()) { waits.max(3) } else { waits };
        let certain = (text.len() - waits).max(self.shown);
        let fresh = text[self.shown..certain].to_vec();
        self.shown = certain;
        Some(fresh)
    }

    /// All of the answer, and what of it has not been seen yet.
    pub fn finish(self) -> (String, Vec<u8>) {
        let mut text = self.tokenizer.decode(&self.ids);
        let end = self.ends.text.as_bytes();
        if !end.is_empty()
            && let Some(at) = text.windows(end.len()).position(|part| part == end)
        {
            text.truncate(at);
        }
        let rest = text.get(self.shown..).unwrap_or_default().to_vec();
        (String::from_utf8_lossy(&text).into_owned(), rest)
    }
}
