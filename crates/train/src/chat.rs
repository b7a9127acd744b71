//! Conversations with a model.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::{Chat, ChatTemplate};
use firebox_models::transformer::{KvCache, Transformer};

use crate::TrainError;
use crate::generate::{Sampling, check_ids};
use crate::model_io::{load_with_words, to_host};
use crate::words::{Ends, Growing, Words};

/// Tokens of a prompt that the model reads at once: between two lots, someone may stop it.
const AT_ONCE: usize = 256;

/// A model and what has been said.
///
/// What the model has read stays in its cache: of the next turn it reads only what is new.
#[derive(Debug)]
pub struct Session {
    model: Transformer,
    words: Words,
    template: ChatTemplate,
    ends: Ends,
    system: Option<String>,
    /// Turns of the user and the model, in turns.
    said: Vec<(&'static str, String)>,
    /// What the cache has read.
    read: Vec<i32>,
    cache: KvCache,
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Why the answer ended.
    pub end: End,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Tokens of the prompt that the model had not read before.
    pub fresh: usize,
    /// How many earlier questions were forgotten, with their answers, because the context is full.
    pub forgotten: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Said,
    /// It has as many tokens as were allowed, or the context is full.
    Full,
    /// Whoever heard it had enough.
    Stopped,
}

impl Session {
    /// With the model in `path`: what [`load`](crate::model_io::load) loads, with a tokenizer.
    ///
    /// # Errors
    /// As [`load`](crate::model_io::load); a template that does not parse, or objects to a short conversation.
    pub fn load(path: &Path, system: Option<String>, device: &Device) -> Result<Self, TrainError> {
        let (model, words) = load_with_words(path, device)?;
        Self::new(model, words, system)
    }

    /// With a model that is there, on a device without gradients.
    ///
    /// # Errors
    /// A template that does not parse, or objects to a short conversation; [`TrainError::Input`] for a model that predicts no next token.
    pub fn new(model: Transformer, words: Words, system: Option<String>) -> Result<Self, TrainError> {
        let config = model.config();
        if config.encoder.is_some() || config.head != Default::default() {
            let expected = "a causal language model".into();
            return Err(TrainError::Input { what: "chat", expected, got: crate::task::Model::describe(&model) });
        }
        let template = words.template()?;
        let (ends, cache) = (words.ends(Some(&template))?, KvCache::new(&model));
        Ok(Self { model, words, template, ends, system, said: vec![], read: vec![], cache })
    }

    /// Whether the model has no template of its own, so that ChatML stands in, which it has never seen.
    pub fn without_template(&self) -> bool {
        self.template.is_default()
    }

    /// Forgets everything but the system's message.
    pub fn reset(&mut self) {
        self.said.clear();
    }

    /// The model's answer to a message, of at most `max_tokens` tokens. `hear` is given its text, bytes of whole characters but at the end, as it comes, and empty text while the model reads; it
    /// returns false to end the answer. What was said until then is remembered.
    ///
    /// # Errors
    /// [`TrainError::Input`] for a message that leaves no room for an answer, or impossible sampling; a template that objects. The conversation is then what it was before.
    pub fn answer(
        &mut self,
        message: &str,
        max_tokens: usize,
        sampling: &Sampling,
        mut hear: impl FnMut(&[u8]) -> bool,
    ) -> Result<Turn, TrainError> {
        sampling.validate()?;
        let before = self.said.clone();
        self.said.push(("user", message.to_owned()));
        let prompt = self.prompt(max_tokens);
        let (prompt, forgotten) = match prompt {
            Ok(prompt) => prompt,
            Err(error) => {
                self.said = before;
                return Err(error);
            }
        };
        let mut ids = prompt;
        let fresh = self.go_back(&ids);
        let n = ids.len();
        let mut growing = Growing::new(&self.words.tokenizer, &self.ends);
        let (mut logits, mut end, mut tokens) = (vec![], End::Full, 0);
        for part in ids[n - fresh..].chunks(AT_ONCE) {
            if !hear(&[]) {
                end = End::Stopped;
                break;
            }
            logits = to_host(self.model.forward_cached(part, &mut self.cache));
            self.read.extend_from_slice(part);
        }
        while end != End::Stopped && tokens < max_tokens {
            let id = sampling.choose(&logits, &ids);
            let Some(text) = growing.push(id) else {
                end = End::Said;
                break;
            };
            ids.push(id);
            tokens += 1;
            if !hear(&text) {
                end = End::Stopped;
                break;
            }
            if self.cache.len() == self.model.config().context || tokens == max_tokens {
                break;
            }
            logits = to_host(self.model.forward_cached(&[id], &mut self.cache));
            self.read.push(id);
        }
        let (answer, rest) = growing.finish();
        if !rest.is_empty() && end != End::Stopped {
            hear(&rest);
        }
        self.said.push(("assistant", answer));
        Ok(Turn { end, tokens, fresh, forgotten })
    }

    /// The tokens of the conversation, without its oldest turns where there would be no room for an answer, and how many turns were forgotten.
    fn prompt(&mut self, max_tokens: usize) -> Result<(Vec<i32>, usize), TrainError> {
        let context = self.model.config().context;
        // Room for a whole answer, if that is not most of the context.
        let room = context - max_tokens.clamp(1, context.div_ceil(4));
        let mut forgotten = 0;
        loop {
            let system = self.system.iter().map(|text| ("system", text.as_str()));
            let chat = Chat::new(system.chain(self.said.iter().map(|(role, text)| (*role, text.as_str()))));
            let text = self.template.render(&chat, true)?;
            let ids: Vec<i32> = self.words.tokenizer.encode_special(&text)?.ids.iter().map(|&id| id as i32).collect();
            if ids.len() <= room {
                check_ids(&self.model, &ids)?;
                return Ok((ids, forgotten));
            }
            if self.said.len() < 3 {
                let expected = format!("at most {room} tokens with the system's, in a context of {context}");
                return Err(TrainError::Input { what: "message", expected, got: ids.len().to_string() });
            }
            self.said.drain(..2);
            forgotten += 1;
        }
    }

    /// Goes back in the cache to where it has read what `ids` begin with; how many of them are left to read, at least one.
    fn go_back(&mut self, ids: &[i32]) -> usize {
        let same = ids.iter().zip(&self.read).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
        let kept = if self.cache.truncate(same) { same } else { 0 };
        if kept == 0 {
            self.cache = KvCache::new(&self.model);
        }
        self.read.truncate(kept);
        ids.len() - kept
    }
}
