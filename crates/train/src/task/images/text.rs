//! Images and the texts that belong to them.

use std::fmt;
use std::sync::Arc;

use burn::tensor::Tensor;
use firebox_data::images::{ImageRow, Preprocess};
use firebox_data::{DataError, IGNORE_INDEX, Order, Tokenizer};
use firebox_models::clip::{Clip, ClipConfig};
use firebox_models::{Extra, TokenBatch};
use firebox_tensor::ops::Sequence;
use serde::{Deserialize, Serialize};

use super::{Images, check_rows, preprocessor_file};
use crate::TrainError;
use crate::metrics::recall_at;
use crate::model_io::to_host;
use crate::recipe::{ModelRecipe, Recipe};
use crate::task::{HeldOut, Task};

/// Images and texts that belong together: CLIP (Radford et al., arXiv:2103.00020). The recipe's `model` is the image's tower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageTextRecipe {
    /// Field of the caption, or of a list of captions, of which each epoch takes the next.
    pub caption: String,
    /// Files of held-out rows, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
    /// Width of what both towers are projected to.
    pub width: usize,
    /// The text's tower, a causal decoder: keys as those of `model`, where what is not given is that of the image's tower.
    #[serde(skip_serializing_if = "is_nothing")]
    pub text: ModelRecipe,
}

impl Default for ImageTextRecipe {
    fn default() -> Self {
        Self { caption: "caption".into(), val: None, width: 64, text: ModelRecipe::default() }
    }
}

fn is_nothing(model: &ModelRecipe) -> bool {
    *model == ModelRecipe::default()
}

impl ImageTextRecipe {
    /// The shape of the two towers, for a tokenizer.
    ///
    /// # Errors
    /// An impossible shape.
    pub fn towers(&self, recipe: &Recipe, tokenizer: &Tokenizer) -> Result<ClipConfig, TrainError> {
        let (tokens, end) = (tokenizer.vocab_size(), tokenizer.eot().unwrap_or(0) as usize);
        let image = recipe.model.resolve(tokens)?;
        let of_image = ModelRecipe {
            vocab_size: None,
            context: None,
            encoder: None,
            image: None,
            head: None,
            ..ModelRecipe::exactly(&image)
        };
        let text = self.text.or(&of_image).resolve(tokens)?;
        let config = ClipConfig::new(image, text, self.width, end);
        config.validate()?;
        Ok(config)
    }
}

/// The task `image_text`.
#[derive(Debug, Clone)]
pub struct ImageText(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    /// Tokens of a text at most.
    context: usize,
    train: Vec<Row>,
    held_out: Vec<Row>,
    order: Order,
    micro_rows: usize,
}

#[derive(Debug)]
struct Row {
    image: ImageRow,
    /// Its captions' tokens.
    texts: Vec<Vec<i32>>,
}

impl ImageText {
    /// Of images that were read for it, and texts of at most `context` tokens.
    ///
    /// # Errors
    /// [`TrainError::Data`] names the row at fault; [`TrainError::Input`] for nothing to train on, or micro-batches of different sizes.
    pub fn new(
        recipe: &Recipe,
        task: &ImageTextRecipe,
        context: usize,
        tokenizer: Tokenizer,
        images: Images,
    ) -> Result<Self, TrainError> {
        check_rows(&images)?;
        let (rows, micro_rows) = (recipe.train.batch_rows, recipe.train.micro_rows());
        if !rows.is_multiple_of(micro_rows) {
            let expected =
                format!("a divisor of train.batch_rows = {rows}: each row is compared with those of its micro-batch");
            return Err(TrainError::Input { what: "train.micro_batch_rows", expected, got: micro_rows.to_string() });
        }
        let context = recipe.train.row_tokens(context);
        let Images { preprocess, train, held_out } = images;
        let with_texts = |rows: Vec<ImageRow>| -> Result<Vec<Row>, TrainError> {
            let one = |image: ImageRow| {
                let texts = image.captions(&task.caption)?;
                let texts = texts.iter().map(|text| tokens(&tokenizer, text, context)).collect::<Result<_, _>>()?;
                Ok(Row { image, texts })
            };
            rows.into_iter().map(one).collect()
        };
        let (train, held_out) = (with_texts(train)?, with_texts(held_out)?);
        Ok(Self(Arc::new(Inner {
            order: Order::new(train.len(), recipe.seed),
            preprocess,
            tokenizer,
            context,
            train,
            held_out,
            micro_rows,
        })))
    }

    /// The captions of images, for a tokenizer to be made of.
    ///
    /// # Errors
    /// A row without one.
    pub fn captions(task: &ImageTextRecipe, images: &Images) -> Result<Vec<String>, DataError> {
        let captions = images.train.iter().map(|image| image.captions(&task.caption));
        Ok(captions.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// How well each held-out image finds its first caption among those of all, and the reverse: at most `limit` batches of them. Whatever has the same caption counts as found.
    pub fn evaluate(&self, model: &Clip, limit: usize) -> Vec<(String, f64)> {
        let inner = &*self.0;
        let (mut images, mut texts, mut captions): (Vec<Tensor<2>>, Vec<Tensor<2>>, Vec<&[i32]>) =
            (vec![], vec![], vec![]);
        for rows in inner.held_out.chunks(inner.micro_rows.max(1)).take(limit) {
            let rows: Vec<_> = rows.iter().map(|row| (row, 0)).collect();
            let batch = inner.batch(&rows, rows.len());
            images.push(model.image_embeds(&batch));
            texts.push(model.text_embeds(&batch));
            captions.extend(rows.iter().map(|(row, _)| &row.texts[0][..]));
        }
        if captions.is_empty() {
            return vec![];
        }
        let mut metrics = vec![];
        let all = [Tensor::cat(images.clone(), 0).transpose(), Tensor::cat(texts.clone(), 0).transpose()];
        for (name, from, to) in [("text", images, &all[1]), ("image", texts, &all[0])] {
            let mut ranks = vec![];
            for from in from {
                let scores = to_host(from.matmul(to.clone()));
                for row in scores.chunks_exact(captions.len()) {
                    ranks.push(rank(row, captions[ranks.len()], &captions));
                }
            }
            for k in [1, 5] {
                metrics.push((format!("{name}_recall_at_{k}"), recall_at(&ranks, k)));
            }
        }
        metrics
    }
}

/// The rank (from 0) of the best of those with this caption: how many with another one score higher, or as high and stand before it.
fn rank(scores: &[f32], caption: &[i32], captions: &[&[i32]]) -> usize {
    let same = |i: usize| captions[i] == caption;
    let mine = (0..scores.len()).filter(|&i| same(i));
    let Some(best) = mine.reduce(|a, b| if scores[b] > scores[a] { b } else { a }) else { return scores.len() };
    let before = |&i: &usize| !same(i) && (scores[i] > scores[best] || scores[i] == scores[best] && i < best);
    (0..scores.len()).filter(before).count()
}

/// A text with what the tokenizer puts around it, and the end of text at its end, where there is one: what CLIP takes for the whole.
fn tokens(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<Vec<i32>, DataError> {
    let mut ids = if tokenizer.kind_name() == "characters" {
        tokenizer.encode(text.as_bytes())?
    } else {
        tokenizer.encode_whole(text, None)?.ids
    };
    let end = tokenizer.eot();
    if let Some(end) = end.filter(|end| ids.last() != Some(end)) {
        ids.push(end);
    }
    if ids.len() > context {
        ids.truncate(context);
        if let (Some(last), Some(end)) = (ids.last_mut(), end) {
            *last = end;
        }
    }
    if ids.is_empty() {
        let reason = "a caption has no tokens, and the tokenizer no end of text".to_owned();
        return Err(DataError::Tokenizer { operation: "encode with", reason });
    }
    Ok(ids.into_iter().map(|id| id as i32).collect())
}

impl Inner {
    /// Rows with the caption of this number; the loss is a mean over `count`.
    fn batch(&self, rows: &[(&Row, usize)], count: usize) -> TokenBatch {
        let texts: Vec<&[i32]> = rows.iter().map(|(row, n)| &row.texts[n % row.texts.len()][..]).collect();
        let lengths: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        let (b, t) = (rows.len(), lengths.iter().copied().max().unwrap_or(1));
        let (mut inputs, mut pixels) = (Vec::with_capacity(b * t), Vec::with_capacity(b * self.preprocess.values()));
        for ((row, _), text) in rows.iter().zip(&texts) {
            inputs.extend_from_slice(text);
            inputs.resize(inputs.len() + t - text.len(), self.tokenizer.eot().unwrap_or(0) as i32);
            self.preprocess.normalize(&row.image.pixels, &mut pixels);
        }
        let segments: Vec<i32> = lengths.iter().flat_map(|&n| (0..t).map(move |i| i32::from(i >= n))).collect();
        let positions = (0..b).flat_map(|_| 0..t as i32).collect();
        let targets = vec![IGNORE_INDEX; b * t];
        let mut batch = TokenBatch::new(inputs, targets, Sequence::new(b, t, positions, &segments));
        batch.loss_scale = 1.0 / count.max(1) as f64;
        batch.extra = Some(Arc::new(Extra { pixels, ..Extra::default() }));
        batch
    }
}

impl Task<Clip> for ImageText {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let Inner { order, train, .. } = &*self.0;
        let row = |sample: u64| (&train[order.row(sample)], (sample / train.len() as u64) as usize);
        let all: Vec<_> = (first..first + rows as u64).map(row).collect();
        Ok(all.chunks(micro_rows).map(|part| self.0.batch(part, rows)).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.0.held_out.chunks(rows.max(1)).map(|rows| {
            let rows: Vec<_> = rows.iter().map(|row| (row, 0)).collect();
            HeldOut { batch: self.0.batch(&rows, rows.len()), count: rows.len() as u64, bytes: 0 }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.held_out.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.0.context
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        Some(&self.0.tokenizer)
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        vec![preprocessor_file(&self.0.preprocess)]
    }

    fn metrics(&self, model: &Clip, limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        Ok(self.evaluate(model, limit.map_or(usize::MAX, |n| n as usize)))
    }

    fn has_metrics(&self) -> bool {
        true
    }
}

/// What it is made of, in a few words.
impl fmt::Display for ImageText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} images with captions, {} held out", self.0.train.len(), self.0.held_out.len())
    }
}
