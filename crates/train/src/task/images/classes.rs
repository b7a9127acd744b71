//! A class per image.

use std::fmt;
use std::sync::Arc;

use firebox_data::Order;
use firebox_data::images::{Classes, ImageRow, Preprocess, classes_of};
use firebox_models::transformer::{Head, ImageConfig, Pooler, Transformer};
use firebox_models::{Extra, TokenBatch};
use firebox_tensor::ops::Sequence;
use serde::{Deserialize, Serialize};

use super::{Images, check_rows, preprocessor_file};
use crate::TrainError;
use crate::metrics::Confusion;
use crate::model_io::to_host;
use crate::recipe::Recipe;
use crate::task::labelled::largest;
use crate::task::{HeldOut, Task};

/// A class per image: supervised classification, as ViT's (Dosovitskiy et al., arXiv:2010.11929).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageClassesRecipe {
    /// Field of the label, in rows: a name or a whole number. Of folders, the name of the folder is the label.
    pub label: String,
    /// Names of the classes, in order. By default the labels that are there, sorted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Files or folder of held-out images, in place of a share of the others (`data.val_fraction`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val: Option<String>,
}

impl Default for ImageClassesRecipe {
    fn default() -> Self {
        Self { label: "label".into(), labels: vec![], val: None }
    }
}

/// The task `image_classes`.
#[derive(Debug, Clone)]
pub struct ImageClasses(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    preprocess: Preprocess,
    classes: Classes,
    /// Tokens of a row.
    tokens: usize,
    train: Vec<(ImageRow, i32)>,
    held_out: Vec<(ImageRow, i32)>,
    order: Order,
    micro_rows: usize,
}

impl ImageClasses {
    /// Of images that were read for it.
    ///
    /// # Errors
    /// [`TrainError::Data`] names the image at fault; [`TrainError::Input`] for nothing to train on.
    pub fn new(
        recipe: &Recipe,
        task: &ImageClassesRecipe,
        image: &ImageConfig,
        images: Images,
    ) -> Result<Self, TrainError> {
        check_rows(&images)?;
        let Images { preprocess, train, held_out } = images;
        let classes = match task.labels.is_empty() {
            true => classes_of(&train, &task.label)?,
            false => Classes::new(task.labels.clone()),
        };
        if classes.names().len() < 2 {
            let expected = "at least two labels".to_owned();
            return Err(TrainError::Input { what: "task.labels", expected, got: classes.names().join(", ") });
        }
        let labelled = |rows: Vec<ImageRow>| -> Result<Vec<(ImageRow, i32)>, TrainError> {
            let one = |row: ImageRow| Ok((classes.of(&row, &task.label)?, row)).map(|(class, row)| (row, class));
            rows.into_iter().map(one).collect()
        };
        let (train, held_out) = (labelled(train)?, labelled(held_out)?);
        Ok(Self(Arc::new(Inner {
            order: Order::new(train.len(), recipe.seed),
            preprocess,
            classes,
            tokens: image.tokens(),
            train,
            held_out,
            micro_rows: recipe.train.micro_rows(),
        })))
    }

    /// The head that a model needs for it.
    pub fn head(&self) -> Head {
        Head::Classes { n: self.0.classes.names().len(), pooler: Pooler::First }
    }

    /// The classes, in order.
    pub fn classes(&self) -> &[String] {
        self.0.classes.names()
    }

    /// What the model's answers on the held-out images are worth: at most `limit` batches of them.
    pub fn evaluate(&self, model: &Transformer, limit: usize) -> Vec<(String, f64)> {
        let inner = &*self.0;
        let n = inner.classes.names().len();
        let mut all = Confusion::new(n);
        for rows in inner.held_out.chunks(inner.micro_rows.max(1)).take(limit) {
            let rows: Vec<_> = rows.iter().collect();
            let said = largest(&to_host(model.row_logits(&inner.batch(&rows, rows.len()))), n);
            rows.iter().zip(said).for_each(|((_, class), said)| all.add(*class as usize, said));
        }
        vec![("accuracy".into(), all.accuracy()), ("macro_f1".into(), all.macro_f1())]
    }
}

impl Inner {
    /// The loss is a mean over `count` images.
    fn batch(&self, rows: &[&(ImageRow, i32)], count: usize) -> TokenBatch {
        let (b, t) = (rows.len(), self.tokens);
        let mut pixels = Vec::with_capacity(b * self.preprocess.values());
        rows.iter().for_each(|(row, _)| self.preprocess.normalize(&row.pixels, &mut pixels));
        let labels = rows.iter().map(|(_, class)| *class).collect();
        let mut batch = TokenBatch::new(vec![0; b * t], vec![-1; b * t], Sequence::padded(t, &vec![t; b]));
        batch.loss_scale = 1.0 / count.max(1) as f64;
        batch.extra = Some(Arc::new(Extra { labels, pixels, ..Extra::default() }));
        batch
    }
}

impl Task<Transformer> for ImageClasses {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let Inner { order, train, .. } = &*self.0;
        let all: Vec<_> = (first..first + rows as u64).map(|sample| &train[order.row(sample)]).collect();
        Ok(all.chunks(micro_rows).map(|part| self.0.batch(part, rows)).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.0.held_out.chunks(rows.max(1)).map(|rows| {
            let rows: Vec<_> = rows.iter().collect();
            HeldOut { batch: self.0.batch(&rows, rows.len()), count: rows.len() as u64, bytes: 0 }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.0.held_out.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.0.tokens
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        vec![preprocessor_file(&self.0.preprocess)]
    }

    fn metrics(&self, model: &Transformer, limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        Ok(self.evaluate(model, limit.map_or(usize::MAX, |n| n as usize)))
    }

    fn has_metrics(&self) -> bool {
        true
    }
}

/// What it is made of, in a few words.
impl fmt::Display for ImageClasses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { train, held_out, classes, .. } = &*self.0;
        write!(f, "{} images, {} held out, {} classes", train.len(), held_out.len(), classes.names().len())
    }
}
