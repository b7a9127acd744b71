//! What a run trains, and on what: any [`Model`] that is a list of stages, on any [`Task`] that makes batches for it.
//!
//! The [`Trainer`](crate::Trainer) knows no more of either than these two traits say. So masked, contrastive and preference losses, images and labels have its layouts,
//! checkpoints, memory options, observers and exact resume.

mod chat;
mod clip;
pub mod hidden;
mod image_tokens;
pub mod images;
pub mod labelled;
mod language;
mod masked_image;
mod model;
mod pictures;
mod preference;
mod recipe;
mod rows;
mod text_to_image;

use firebox_data::{Dataset, Loader, Tokenizer};
use firebox_models::TokenBatch;

use crate::TrainError;
pub use chat::{ChatRecipe, Conversations, Read, TrainOn};
pub use clip::{LoadedClip, is_clip, load_clip};
pub use hidden::Hidden;
pub(crate) use image_tokens::MODEL_TYPE;
pub use image_tokens::{ImageTokens, ImageTokensRecipe};
pub use labelled::Labelled;
pub use language::Language;
pub use masked_image::{MaskedImage, MaskedImageRecipe};
pub use model::Model;
pub(crate) use model::device_of;
pub use pictures::{PictureRows, Pictures};
pub use preference::{PairsRead, PreferenceRecipe, Preferences};
pub use recipe::TaskRecipe;
pub use text_to_image::{CaptionLayout, TextToImage, TextToImageRecipe};
pub(crate) use text_to_image::{IMAGE_TOKENS, LAYOUT};

/// What a model of type `M` is trained on.
///
/// Batches are a pure function of the number of their first sample and of what the task was made of, so that a resumed run reads what one reads that was never
/// interrupted, and each rank of several can ask for the same.
pub trait Task<M>: Send + Sync {
    /// The micro-batches of a step: `rows` samples from `first` on, at most `micro_rows` in each. The losses of all add up to that of the step: `loss_scale` of each is one over
    /// what the whole step's loss is a mean over.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError>;

    /// Held-out batches of at most `rows` rows, in order; none where nothing is held out.
    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_>;

    /// Whether anything is held out.
    fn has_held_out(&self) -> bool;

    /// Tokens of a row, for speed and counts: of rows of different lengths, of the longest.
    fn tokens_per_row(&self) -> usize;

    /// The tokenizer that goes into checkpoints, where there is one.
    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }

    /// Other small files that go into checkpoints: name and contents (`preprocessor_config.json`, a chat template).
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        vec![]
    }

    /// What an evaluation says besides the loss, by name: accuracy, recall. `limit` is how many held-out batches it may look at, all if `None`. The model is whole, and on a device
    /// without gradients; of several ranks one asks.
    ///
    /// # Errors
    /// Data that cannot be read.
    fn metrics(&self, _model: &M, _limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        Ok(vec![])
    }

    /// Whether [`metrics`](Self::metrics) are more than none.
    fn has_metrics(&self) -> bool {
        false
    }

    /// What the model makes up after an evaluation, to be shown; called where [`metrics`](Self::metrics) is.
    ///
    /// # Errors
    /// [`TrainError`].
    fn sample(&self, _model: &M) -> Result<Option<String>, TrainError> {
        Ok(None)
    }

    /// Whether [`sample`](Self::sample) gives anything.
    fn has_samples(&self) -> bool {
        false
    }

    /// A picture, as a PNG file, that the model makes after an evaluation, to be shown; called where [`metrics`](Self::metrics) is.
    ///
    /// # Errors
    /// [`TrainError`].
    fn picture(&self, _model: &M) -> Result<Option<Vec<u8>>, TrainError> {
        Ok(None)
    }

    /// Whether [`picture`](Self::picture) gives anything.
    fn has_pictures(&self) -> bool {
        false
    }

    /// Corpus and loader of language modelling, which some methods need (distillation, and Sophia's estimate of the curvature).
    fn language(&self) -> Option<(&Dataset, &Loader)> {
        None
    }
}

/// A held-out batch.
#[derive(Debug, Clone)]
pub struct HeldOut {
    /// Its loss is a mean over `count`.
    pub batch: TokenBatch,
    /// What the batch weighs: tokens predicted, or rows.
    pub count: u64,
    /// Bytes of text predicted; 0 where bits per byte say nothing.
    pub bytes: u64,
}
