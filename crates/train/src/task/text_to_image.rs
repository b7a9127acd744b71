//! Images from text, as one row of tokens: a caption and then the codes of its image, which a causal decoder learns to go on with (Ramesh et al., arXiv:2102.12092).

use std::path::PathBuf;
use std::sync::Arc;

use firebox_data::images::ImageRow;
use firebox_data::{DataError, Order, Tokenizer, hold_out};
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use serde::{Deserialize, Serialize};

use super::pictures::Pictures;
use super::{HeldOut, Task};
use crate::TrainError;
use crate::draw::Painter;
use crate::generate::Sampling;
use crate::image_tokenizer::ImageTokenizer;

/// What `task.kind = "text_to_image"` has besides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextToImageRecipe {
    /// The quantizer of images: a run of `task.kind = "image_tokens"`, or one of its checkpoints.
    pub image_tokens: PathBuf,
    /// The field with the caption, or captions.
    pub caption: String,
    /// Tokens of a caption, with one that ends it.
    pub text_tokens: usize,
    /// Whether the words of captions are learned as well as the codes of images.
    pub text_loss: bool,
}

impl Default for TextToImageRecipe {
    fn default() -> Self {
        Self { image_tokens: PathBuf::new(), caption: "caption".into(), text_tokens: 32, text_loss: false }
    }
}

/// Which tokens are which: those of text come first, then the codes, then the one that fills captions up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionLayout {
    /// Tokens of the text's tokenizer.
    pub text_vocab: usize,
    /// Codes of the quantizer.
    pub codes: usize,
    /// Tokens of a caption, with at least one that ends it: captions are filled up to as many, so that each place of the image has its position.
    pub text_tokens: usize,
    /// Codes of an image.
    pub image_tokens: usize,
}

impl CaptionLayout {
    /// The token that ends captions and fills them up.
    pub fn end(&self) -> i32 {
        (self.text_vocab + self.codes) as i32
    }

    /// V
    pub fn vocab_size(&self) -> usize {
        self.text_vocab + self.codes + 1
    }

    /// What a row's last token is predicted from, and all before it: the context that a model needs.
    pub fn context(&self) -> usize {
        self.text_tokens + self.image_tokens - 1
    }

    /// A caption, filled up.
    ///
    /// # Errors
    /// How many tokens it has, where it is too long.
    pub fn caption(&self, tokens: &[u32]) -> Result<Vec<i32>, String> {
        let (n, most) = (tokens.len(), self.text_tokens - 1);
        if n > most {
            return Err(format!(
                "the caption has {n} tokens: expected at most {most}; set task.text_tokens = {}",
                n + 1
            ));
        }
        let mut row: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
        row.resize(self.text_tokens, self.end());
        Ok(row)
    }
}

/// A row: its captions, filled up, and its image's codes.
#[derive(Debug)]
struct Row {
    captions: Vec<Vec<i32>>,
    codes: Vec<i32>,
}

/// Captions with images, whose codes have been computed.
#[derive(Debug, Clone)]
pub struct TextToImage {
    train: Arc<[Row]>,
    held: Arc<[Row]>,
    order: Order,
    text: Arc<Tokenizer>,
    images: Arc<ImageTokenizer>,
    layout: CaptionLayout,
    text_loss: bool,
    sampled: Option<(String, u64)>,
}

/// In a checkpoint, the [`CaptionLayout`], and the folder with the quantizer.
pub(crate) const LAYOUT: &str = "text_to_image.json";
pub(crate) const IMAGE_TOKENS: &str = "image_tokens";

/// Images that are encoded at once.
const AT_ONCE: usize = 32;

impl TextToImage {
    /// Computes the codes of all images. A share of the rows is held out; the others are read in the order of `seed`.
    ///
    /// # Errors
    /// A row without a caption, or with one that the tokenizer cannot encode or that is too long.
    pub fn new(
        rows: &[ImageRow],
        text: Tokenizer,
        images: ImageTokenizer,
        recipe: &TextToImageRecipe,
        (held_out, seed): (f64, u64),
    ) -> Result<Self, TrainError> {
        if !(2..=1 << 16).contains(&recipe.text_tokens) {
            let expected = "from 2 to 65536".into();
            let got = recipe.text_tokens.to_string();
            return Err(TrainError::Input { what: "task.text_tokens", expected, got });
        }
        let config = images.model.config();
        let layout = CaptionLayout {
            text_vocab: text.vocab_size(),
            codes: config.codes,
            text_tokens: recipe.text_tokens,
            image_tokens: config.image.patches(),
        };
        let captions = |row: &ImageRow| -> Result<Vec<Vec<i32>>, TrainError> {
            let of = |caption: String| -> Result<Vec<i32>, DataError> {
                layout.caption(&text.encode(caption.as_bytes())?).map_err(|reason| row.bad(reason))
            };
            Ok(row.captions(&recipe.caption)?.into_iter().map(of).collect::<Result<_, _>>()?)
        };
        let captions = rows.iter().map(captions).collect::<Result<Vec<_>, _>>()?;
        let pictures = Pictures::new(rows.iter().map(|row| row.pixels.clone()).collect(), images.preprocess.clone());
        let encode = |at: Vec<usize>| images.model.encode(&pictures.normalized(at));
        let codes: Vec<i32> = pictures.chunks(AT_ONCE).flat_map(encode).collect();
        let codes = codes.chunks_exact(layout.image_tokens).map(<[i32]>::to_vec);
        let rows = captions.into_iter().zip(codes).map(|(captions, codes)| Row { captions, codes }).collect();
        let (train, held) = hold_out(rows, held_out);
        if train.is_empty() {
            return Err(TrainError::Input {
                what: "data",
                expected: "images with captions".into(),
                got: "none".into(),
            });
        }
        Ok(Self {
            order: Order::new(train.len(), seed),
            train: train.into(),
            held: held.into(),
            text: text.into(),
            images: images.into(),
            layout,
            text_loss: recipe.text_loss,
            sampled: None,
        })
    }

    /// The same with a picture of this prompt at each evaluation; without words, of the first caption.
    ///
    /// # Errors
    /// A prompt that the tokenizer cannot encode or that is too long.
    pub fn with_samples(self, prompt: &str, seed: u64) -> Result<Self, TrainError> {
        let prompt = match prompt {
            "" => {
                let words: Vec<u32> = self.train[0].captions[0].iter().map(|id| *id as u32).collect();
                String::from_utf8_lossy(&self.text.decode(&words)).into_owned()
            }
            given => given.to_owned(),
        };
        let fits = self.layout.caption(&self.text.encode(prompt.as_bytes())?);
        fits.map_err(|got| TrainError::Input { what: "eval.prompt", expected: "a caption".into(), got })?;
        Ok(Self { sampled: Some((prompt, seed)), ..self })
    }

    /// Which tokens are which.
    pub fn layout(&self) -> &CaptionLayout {
        &self.layout
    }

    /// Rows, of each one of its captions, in turns with `turn`; the loss is a mean over the targets of `of` rows.
    fn batch<'a>(&self, rows: impl IntoIterator<Item = (&'a Row, u64)>, of: usize) -> TokenBatch {
        let (first, code, t) = (self.layout.text_tokens, self.layout.text_vocab as i32, self.layout.context());
        let (mut inputs, mut targets, mut n) = (vec![], vec![], 0);
        for (row, turn) in rows {
            let caption = &row.captions[(turn % row.captions.len() as u64) as usize];
            let tokens: Vec<i32> = caption.iter().copied().chain(row.codes.iter().map(|id| code + id)).collect();
            inputs.extend_from_slice(&tokens[..t]);
            // A caption's first end is a target as its words are; those that fill it up are none.
            let words = caption.iter().take_while(|id| **id != self.layout.end()).count();
            let learned = |i: usize| i >= first || self.text_loss && i <= words;
            targets.extend(tokens.iter().enumerate().skip(1).map(|(i, id)| if learned(i) { *id } else { -100 }));
            n += 1;
        }
        let mut batch = TokenBatch::plain(n, t, inputs, targets);
        // Of rows of different lengths, each image's codes count the same.
        batch.loss_scale = 1.0 / (of.max(1) * self.layout.image_tokens) as f64;
        batch
    }
}

impl Task<Transformer> for TextToImage {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let row = |sample: u64| (&self.train[self.order.row(sample)], sample / self.train.len() as u64);
        let samples: Vec<u64> = (first..first + rows as u64).collect();
        Ok(samples.chunks(micro_rows.max(1)).map(|part| self.batch(part.iter().map(|s| row(*s)), rows)).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.held.chunks(rows.max(1)).map(|part| HeldOut {
            batch: self.batch(part.iter().map(|row| (row, 0)), part.len()),
            count: (part.len() * self.layout.image_tokens) as u64,
            bytes: 0,
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.held.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.layout.context()
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.text)
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let layout = serde_json::to_vec_pretty(&self.layout).unwrap_or_default();
        let layout = [(LAYOUT.to_owned(), layout)];
        layout.into_iter().chain(self.images.files()).collect()
    }

    fn picture(&self, model: &Transformer) -> Result<Option<Vec<u8>>, TrainError> {
        let Some((prompt, seed)) = &self.sampled else { return Ok(None) };
        let sampling = Sampling { seed: *seed, ..Painter::sampling() };
        let painter = Painter::new(model, &self.text, &self.images, self.layout);
        Ok(Some(painter.draw(prompt, &sampling)?.png()))
    }

    fn has_pictures(&self) -> bool {
        self.sampled.is_some()
    }
}
