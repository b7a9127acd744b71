//! How likely a model takes texts to be after others.

use std::path::Path;

use burn::tensor::Device;
use firebox_data::Tokenizer;
use firebox_models::TokenBatch;
use firebox_models::transformer::{Head, Transformer};
use firebox_tensor::ops::Sequence;
use rayon::prelude::*;
use serde_json::Value;

use crate::TrainError;
use crate::model_io::{Folder, from_file, to_host};

/// Tokens that go through the model at once: enough that its weights are read seldom, and few enough that what flows between the layers stays small.
const TOKENS: usize = 2048;

/// Rows of logits that exist at once: 50 MB of a vocabulary of 50,000.
const ROWS: usize = 256;

/// A language model with what is needed to ask it for probabilities of text.
#[derive(Debug)]
pub struct Scorer {
    model: Transformer,
    tokenizer: Tokenizer,
    /// What texts begin with that come after nothing.
    first: Option<u32>,
}

/// Tokens whose probability is asked for, after others.
struct Request {
    context: Vec<u32>,
    continuation: Vec<u32>,
}

impl Scorer {
    /// From what [`load`](crate::model_io::load) opens.
    ///
    /// # Errors
    /// [`TrainError`], as it gives; and [`TrainError::Input`] of a model without a tokenizer, or without a language model's head.
    pub fn open(path: &Path, device: &Device) -> Result<Self, TrainError> {
        let folder = Folder::open(path)?;
        let missing = || TrainError::Input {
            what: "checkpoint",
            expected: "a tokenizer.json beside the model".into(),
            got: format!("none in {}", path.display()),
        };
        let tokenizer = folder.tokenizer.ok_or_else(missing)?;
        let side = |name: &str| serde_json::from_str::<Value>(folder.sides.get(name)?).ok();
        let named = |key: &str| {
            let config = side("tokenizer_config.json")?;
            let token = &config[key];
            tokenizer.token_id(token.as_str().or_else(|| token["content"].as_str())?)
        };
        let numbered = |key: &str| {
            let id = &folder.config[key];
            u32::try_from(id.as_u64().or_else(|| id[0].as_u64())?).ok()
        };
        let first = named("bos_token").or_else(|| numbered("bos_token_id"));
        let first = first.or_else(|| named("eos_token")).or_else(|| numbered("eos_token_id")).or(tokenizer.eot());
        Self::new(from_file(&folder.config, folder.file, device)?, tokenizer, first)
    }

    /// A model on a device without gradients, its tokenizer, and the token that texts begin with that come after nothing.
    ///
    /// # Errors
    /// [`TrainError::Input`] of a model without a language model's head.
    pub fn new(model: Transformer, tokenizer: Tokenizer, first: Option<u32>) -> Result<Self, TrainError> {
        if model.config().head != Head::Language {
            let expected = "a model that predicts the next token".into();
            let got = format!("one with another head: {:?}", model.config().head);
            return Err(TrainError::Input { what: "checkpoint", expected, got });
        }
        Ok(Self { model, tokenizer, first })
    }

    /// The model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The tokens of a text as the model was trained to see it: with what its tokenizer puts before it, unless that stands there already.
    fn encode(&self, text: &str, begins: bool) -> Result<Vec<u32>, TrainError> {
        // The library passes over characters that it does not know; here they are errors.
        if self.tokenizer.kind_name() == "characters" {
            return Ok(self.tokenizer.encode(text.as_bytes())?);
        }
        let first = self.first.and_then(|id| self.tokenizer.token(id));
        let encoded = if begins && !first.is_some_and(|first| text.starts_with(&first)) {
            self.tokenizer.encode_whole(text, None)?
        } else {
            self.tokenizer.encode_special(text)?
        };
        Ok(encoded.ids)
    }

    /// As lm-evaluation-harness divides them (`TemplateLM._encode_pair`): spaces at the end of the context belong to what follows, and what follows are the tokens of both together
    /// without as many as the context has.
    fn request(&self, context: &str, continuation: &str) -> Result<Request, TrainError> {
        let whole = format!("{context}{continuation}");
        let before = self.encode(stripped_end(context), true)?;
        if !context.trim().is_empty() && !before.is_empty() {
            let mut whole = self.encode(&whole, true)?;
            return Ok(Request { continuation: whole.split_off(before.len().min(whole.len())), context: before });
        }
        let missing = || TrainError::Input {
            what: "context",
            expected: "text, or a tokenizer with a token that begins texts".into(),
            got: "neither".into(),
        };
        let first = self.first.ok_or_else(missing)?;
        let mut continuation = self.encode(&whole, false)?;
        // A text that has it is not given another.
        if continuation.first() == Some(&first) {
            continuation.remove(0);
        }
        Ok(Request { context: vec![first], continuation })
    }

    /// The logarithm of the probability of each pair's second text after its first, in nats.
    ///
    /// Texts are put behind each other in rows of a few thousand tokens, in which none sees another; logits exist of tokens of second texts alone, and of a few hundred of these at once.
    /// First texts that do not fit into the model's context lose their beginning.
    ///
    /// # Errors
    /// [`TrainError::Input`]: a second text without tokens, or with more than the model's context; characters that the tokenizer does not have.
    pub fn log_likelihoods(&self, pairs: &[(&str, String)]) -> Result<Vec<f64>, TrainError> {
        let most = self.model.config().context;
        let checked = |(context, continuation): &(&str, String)| {
            let mut request = self.request(context, continuation)?;
            let n = request.continuation.len();
            if n == 0 || n > most {
                let short: String = continuation.trim().chars().take(40).collect();
                let (expected, got) = (format!("1 to {most} tokens"), format!("{n} of {short:?}"));
                return Err(TrainError::Input { what: "choice", expected, got });
            }
            let left = request.context.len().min(most + 1 - n);
            request.context.drain(..request.context.len() - left);
            Ok(request)
        };
        let requests: Vec<Request> = pairs.iter().map(checked).collect::<Result<_, TrainError>>()?;
        for request in &requests {
            let ids: Vec<i32> = request.context.iter().chain(&request.continuation).map(|&id| id as i32).collect();
            crate::generate::check_ids(&self.model, &ids)?;
        }
        let mut found = Vec::with_capacity(requests.len());
        let mut rest = &requests[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |request: &&Request| {
                tokens += request.inputs();
                tokens <= TOKENS
            };
            let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            found.extend(self.together(now));
            rest = later;
        }
        Ok(found)
    }

    /// Of requests that go through the model as one row.
    fn together(&self, requests: &[Request]) -> Vec<f64> {
        let (mut inputs, mut targets, mut positions, mut segments) = (vec![], vec![], vec![], vec![]);
        for (number, request) in (0..).zip(requests) {
            let all: Vec<i32> = request.context.iter().chain(&request.continuation).map(|&id| id as i32).collect();
            let n = request.inputs() as i32;
            inputs.extend(&all[..all.len() - 1]);
            targets.extend(std::iter::repeat_n(-1, request.context.len() - 1));
            targets.extend(request.continuation.iter().map(|&id| id as i32));
            positions.extend(0..n);
            segments.extend(std::iter::repeat_n(number, n as usize));
        }
        let wanted: Vec<usize> = targets.iter().filter(|&&target| target >= 0).map(|&target| target as usize).collect();
        let sequence = Sequence::new(1, inputs.len(), positions, &segments);
        let batch = TokenBatch::new(inputs, targets, sequence);
        let v = self.model.config().vocab_size;
        let parts = self.model.target_logits(&batch, ROWS).zip(wanted.chunks(ROWS));
        let of_tokens = parts.flat_map(|(logits, wanted)| {
            let logits = to_host(logits);
            logits.par_chunks_exact(v).zip(wanted).map(|(row, &at)| log_probability(row, at)).collect::<Vec<f64>>()
        });
        let of_tokens: Vec<f64> = of_tokens.collect();
        let mut rest = &of_tokens[..];
        let sum = |request: &Request| {
            let (mine, others) = rest.split_at(request.continuation.len());
            rest = others;
            mine.iter().sum()
        };
        requests.iter().map(sum).collect()
    }
}

impl Request {
    /// Tokens that the model sees: of the last one nothing follows.
    fn inputs(&self) -> usize {
        self.context.len() + self.continuation.len() - 1
    }
}

/// Whether Python's `strip` takes it: white space, and the separators of files, groups, records and units.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn stripped_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Of one token under logits.
fn log_probability(logits: &[f32], at: usize) -> f64 {
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, x| top.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from((x - top).exp())).sum();
    f64::from(logits[at]) - f64::from(top) - sum.ln()
}
