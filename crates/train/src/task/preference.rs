//! Preferences: of two answers, the better one becomes more probable than the worse, measured against the model that training starts from (direct preference optimization, Rafailov et al.,
//! arXiv:2305.18290).
//!
//! A sample is a pair: two rows of a batch, the better answer first. What the starting model thinks of each is computed once, before the first step, and lies in the run's folder.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use burn::module::Module as _;
use burn::tensor::Device;
use firebox_data::{Answered, ChatTemplate, Example, Order, Record, Tokenizer, hold_out, read_records};
use firebox_models::transformer::Transformer;
use firebox_models::{Extra, TokenBatch};
use firebox_tensor::ops::Preference;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::rows::{batch, places, room};
use super::{HeldOut, Task};
use crate::TrainError;
use crate::checkpoint::resolve;
use crate::distill::hash_model;
use crate::model_io::to_host;
use crate::recipe::{Recipe, RecipeError};
use crate::words::Words;

/// The file in the run's folder with what the starting model thinks.
const FILE: &str = "reference.json";

/// The recipe's `[task]` of kind `preference`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceRecipe {
    /// How much a difference to the starting model counts: the larger, the nearer the model stays to it.
    pub beta: f64,
    /// The share of pairs that are taken to be the wrong way round.
    pub label_smoothing: f64,
    /// How conversations become text, as [`ChatRecipe`](super::ChatRecipe)'s.
    pub template: String,
    /// Held-out rows, in place of a share (`data.val_fraction`) of those to train on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
}

impl Default for PreferenceRecipe {
    fn default() -> Self {
        Self { beta: 0.1, label_smoothing: 0.0, template: "model".into(), val: None }
    }
}

impl PreferenceRecipe {
    fn validate(&self, recipe: &Recipe) -> Result<(), TrainError> {
        let fail = |key, expected: &str, got: f64| {
            Err(RecipeError::Value { key, expected: expected.into(), got: got.to_string() }.into())
        };
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return fail("task.beta", "above 0", self.beta);
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            return fail("task.label_smoothing", "a share in [0, 0.5)", self.label_smoothing);
        }
        for (key, got) in
            [("train.label_smoothing", recipe.train.label_smoothing), ("train.z_loss", recipe.train.z_loss)]
        {
            if got != 0.0 {
                return fail(key, "0 with preferences, whose loss is another: task.label_smoothing is for them", got);
            }
        }
        Ok(())
    }
}

/// Pairs of answers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Preferences(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    words: Words,
    template: Option<ChatTemplate>,
    task: PreferenceRecipe,
    train: Pairs,
    held: Pairs,
    order: Order,
    longest: usize,
    micro_rows: usize,
}

/// Pairs of answers, and the logarithms of their probabilities under the reference.
#[derive(Debug)]
struct Pairs {
    texts: Vec<[Answered; 2]>,
    reference: Vec<[f32; 2]>,
}

/// What became of the rows of a file, to print at the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PairsRead {
    /// Pairs to train on, and held out.
    pub pairs: [usize; 2],
    /// Tokens of a text at most.
    pub room: usize,
    /// Pairs with a longer text.
    pub cut: usize,
    /// Pairs of which no answer is left, or no difference.
    pub dropped: usize,
}

impl fmt::Display for PairsRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pairs: [train, held], room, cut, dropped } = self;
        write!(f, "{train} pairs of answers, {held} held out")?;
        if *cut > 0 {
            write!(f, "; {cut} were cut at {room} tokens")?;
        }
        if *dropped > 0 {
            write!(f, "; {dropped} were left out, whose answers do not differ within these")?;
        }
        Ok(())
    }
}

impl PairsRead {
    /// The texts of a pair, as far as they fit into rows; none where that has nothing to prefer.
    fn keep(&mut self, mut pair: [Answered; 2]) -> Option<[Answered; 2]> {
        let longer = pair.iter().any(|text| places(text) > self.room);
        self.cut += usize::from(longer);
        pair.iter_mut().for_each(|text| text.cut(self.room + 1));
        if pair.iter().any(|text| text.answers() == 0) || pair[0] == pair[1] {
            self.dropped += 1;
            return None;
        }
        Some(pair)
    }
}

impl Preferences {
    /// Those of the rows in `paths`; [`with_reference`](Self::with_reference) makes them ready.
    ///
    /// # Errors
    /// [`TrainError`]: a file that cannot be read, a row without two answers, a template that objects, an option out of range.
    pub fn read(recipe: &Recipe, task: &PreferenceRecipe, paths: &[String]) -> Result<(Self, PairsRead), TrainError> {
        task.validate(recipe)?;
        let words = Words::of_recipe(recipe)?;
        let template = words.template_named(&task.template)?;
        let (room, _) = room(recipe, words.tokenizer.vocab_size())?;
        let mut read = PairsRead { room, ..PairsRead::default() };
        let mut tokens = |records: Vec<Record>| -> Result<Vec<[Answered; 2]>, TrainError> {
            let mut pairs = vec![];
            for record in records {
                let [better, worse] = Example::pair_of_record(&record, template.is_some())?
                    .map(|example| example.tokens(template.as_ref(), &words.tokenizer));
                let bad = |error: firebox_data::DataError| record.bad(error.to_string());
                pairs.extend(read.keep([better.map_err(bad)?, worse.map_err(bad)?]));
            }
            Ok(pairs)
        };
        let records = read_records(paths)?;
        let (train, held) = match &task.val {
            Some(path) => (tokens(records)?, tokens(read_records(&[path])?)?),
            None => hold_out(tokens(records)?, recipe.data.val_fraction),
        };
        if train.is_empty() {
            let expected = format!("pairs of answers that differ within train.row_tokens = {room} tokens");
            return Err(TrainError::Input { what: "data", expected, got: format!("none in {}", paths.join(", ")) });
        }
        read.pairs = [train.len(), held.len()];
        let longest = train.iter().flatten().map(places).max().unwrap_or(1);
        let inner = Inner {
            words,
            template,
            task: task.clone(),
            order: Order::new(train.len(), recipe.seed),
            train: Pairs { texts: train, reference: vec![] },
            held: Pairs { texts: held, reference: vec![] },
            longest,
            micro_rows: recipe.train.micro_rows(),
        };
        Ok((Self(Arc::new(inner)), read))
    }

    /// The same with what the model that the recipe starts from thinks of all answers, on `device`: from the run's folder `dir` where it lies there already, or else computed now, and written.
    ///
    /// # Errors
    /// As [`Recipe::first_model`]; [`TrainError::Resume`] for a file of another model or other answers; [`TrainError::Io`].
    pub fn with_reference(self, recipe: &Recipe, dir: &Path, device: &Device) -> Result<Self, TrainError> {
        let mut inner = Arc::into_inner(self.0).ok_or_else(|| TrainError::Input {
            what: "reference",
            expected: "pairs that nobody else has yet".into(),
            got: "a clone".into(),
        })?;
        let (path, of) = (dir.join(FILE), inner.fingerprint(recipe)?);
        let n = [inner.train.texts.len(), inner.held.texts.len()];
        let [train, held] = match Reference::load(&path)? {
            Some(found) => found.checked(&path, &of, n)?,
            None => {
                let model = recipe.first_model(inner.words.tokenizer.vocab_size(), device)?;
                let model = model.valid();
                let values = [&inner.train, &inner.held].map(|pairs| pairs.log_probabilities(&model, inner.micro_rows));
                let found = Reference { of, log_probabilities: values };
                found.save(dir)?;
                found.log_probabilities
            }
        };
        inner.train.reference = train;
        inner.held.reference = held;
        Ok(Self(Arc::new(inner)))
    }
}

impl Inner {
    /// What the reference is of: the starting model and all tokens.
    fn fingerprint(&self, recipe: &Recipe) -> Result<String, TrainError> {
        let mut hash = Sha256::new();
        match &recipe.init {
            Some(model) if model.is_file() || model.join("config.json").is_file() => hash.update(hash_model(model)?),
            Some(run) => hash.update(hash_model(resolve(run)?.checkpoint.path())?),
            None => hash.update(format!("seed {}", recipe.seed)),
        }
        for text in self.train.texts.iter().chain(&self.held.texts).flatten() {
            hash.update((text.ids.len() as u64).to_le_bytes());
            for (id, answer) in text.ids.iter().zip(&text.answer) {
                hash.update(id.to_le_bytes());
                hash.update([u8::from(*answer)]);
            }
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The rows of some pairs, with their reference. The loss is the mean over the pairs.
    fn batch(&self, of: &Pairs, pairs: &[usize]) -> TokenBatch {
        let rows: Vec<Vec<&Answered>> = pairs.iter().flat_map(|&i| &of.texts[i]).map(|text| vec![text]).collect();
        let PreferenceRecipe { beta, label_smoothing, .. } = self.task;
        let reference = pairs.iter().flat_map(|&i| of.reference[i]).collect();
        let preference = Some(Arc::new(Preference { reference, beta, label_smoothing }));
        let extra = Some(Arc::new(Extra { preference, ..Extra::default() }));
        TokenBatch { loss_scale: 1.0 / pairs.len().max(1) as f64, extra, ..batch(&rows, true) }
    }
}

impl Pairs {
    /// The logarithms of the probabilities of all answers, a few pairs at a time.
    fn log_probabilities(&self, model: &Transformer, at_once: usize) -> Vec<[f32; 2]> {
        let of_pairs = |pairs: &[[Answered; 2]]| {
            let rows: Vec<Vec<&Answered>> = pairs.iter().flatten().map(|text| vec![text]).collect();
            to_host(model.log_probabilities(&batch(&rows, true))).as_chunks::<2>().0.to_vec()
        };
        self.texts.chunks(at_once.max(1)).flat_map(of_pairs).collect()
    }
}

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    /// SHA-256 of the model's files and all tokens.
    of: String,
    /// Those of the pairs to train on, and of those held out.
    log_probabilities: [Vec<[f32; 2]>; 2],
}

impl Reference {
    fn load(path: &Path) -> Result<Option<Self>, TrainError> {
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read(path).map_err(TrainError::io("read", path))?;
        serde_json::from_slice(&text).map(Some).map_err(|error| TrainError::Resume {
            path: path.into(),
            expected: "what the starting model thinks of the answers; remove the file, and it is made again".into(),
            got: error.to_string(),
        })
    }

    fn checked(self, path: &Path, of: &str, n: [usize; 2]) -> Result<[Vec<[f32; 2]>; 2], TrainError> {
        let there = self.log_probabilities.each_ref().map(Vec::len);
        if self.of != of || there != n {
            let expected = "the starting model and the answers that this file is of; remove it, or choose another folder with --out";
            let got = if there == n { "others".to_owned() } else { format!("{n:?} pairs, in the file {there:?}") };
            return Err(TrainError::Resume { path: path.into(), expected: expected.into(), got });
        }
        Ok(self.log_probabilities)
    }

    /// Aside, and renamed: several processes write the same.
    fn save(&self, dir: &Path) -> Result<(), TrainError> {
        fs::create_dir_all(dir).map_err(TrainError::io("create", dir))?;
        let (path, aside) = (dir.join(FILE), dir.join(format!("{FILE}.{}", std::process::id())));
        let text = serde_json::to_vec(self).map_err(std::io::Error::from).map_err(TrainError::io("write", &path))?;
        fs::write(&aside, text).map_err(TrainError::io("write", &aside))?;
        fs::rename(&aside, &path).map_err(TrainError::io("rename to", &path))
    }
}

impl Task<Transformer> for Preferences {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let inner = &self.0;
        let pairs: Vec<usize> = (first..first + rows as u64).map(|i| inner.order.row(i)).collect();
        let mut parts: Vec<_> = pairs.chunks(micro_rows.max(1)).map(|pairs| inner.batch(&inner.train, pairs)).collect();
        parts.iter_mut().for_each(|part| part.loss_scale = 1.0 / rows.max(1) as f64);
        Ok(parts)
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        let (inner, rows) = (&self.0, rows.max(1));
        let n = inner.held.texts.len();
        Box::new((0..n).step_by(rows).map(move |first| {
            let pairs: Vec<usize> = (first..(first + rows).min(n)).collect();
            HeldOut { count: pairs.len() as u64, bytes: 0, batch: inner.batch(&inner.held, &pairs) }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.held.texts.is_empty()
    }

    /// Of a pair: two rows.
    fn tokens_per_row(&self) -> usize {
        2 * self.0.longest
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.0.words.tokenizer)
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.0.words.files(self.0.template.as_ref())
    }

    /// How often the better answer has gained more on the reference than the worse (`accuracy`), and by how much in the mean (`margin`), with what both have gained, times beta.
    fn metrics(&self, model: &Transformer, limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        let beta = self.0.task.beta;
        let (mut n, mut right, mut gains) = (0, 0, [0f64; 2]);
        for held in self.held_out(self.0.micro_rows).take(limit.map_or(usize::MAX, |n| n as usize)) {
            let ours = to_host(model.log_probabilities(&held.batch));
            let Some(pairs) = held.batch.preference() else { continue };
            for (ours, theirs) in ours.as_chunks::<2>().0.iter().zip(pairs.reference.as_chunks::<2>().0) {
                let [better, worse] = [0, 1].map(|i| beta * (f64::from(ours[i]) - f64::from(theirs[i])));
                (n, right) = (n + 1, right + usize::from(better > worse));
                gains = [gains[0] + better, gains[1] + worse];
            }
        }
        let mean = |sum: f64| sum / f64::from(n.max(1));
        let [better, worse] = gains.map(mean);
        let named = [
            ("accuracy", mean(right as f64)),
            ("margin", better - worse),
            ("reward_chosen", better),
            ("reward_rejected", worse),
        ];
        Ok(named.map(|(name, value)| (name.to_owned(), value)).to_vec())
    }

    fn has_metrics(&self) -> bool {
        self.has_held_out()
    }
}
