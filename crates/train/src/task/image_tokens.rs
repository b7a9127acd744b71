//! A vector quantizer that learns to give images back.

use firebox_models::TokenBatch;
use firebox_models::transformer::hf::Entry;
use firebox_models::transformer::{ImageConfig, TransformerConfig};
use firebox_models::vq::{VqConfig, VqModel};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pictures::PictureRows;
use super::{HeldOut, Model, Task, device_of};
use crate::TrainError;
use crate::model_io::own_entries;
use crate::recipe::{ModelRecipe, RecipeError};

/// The `model_type` of a quantizer's `config.json`.
pub(crate) const MODEL_TYPE: &str = "firebox_vq";

/// What `task.kind = "image_tokens"` has besides; `[model]` says the rest, `model.image` the size of images and patches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageTokensRecipe {
    /// Codes of the codebook.
    pub codes: usize,
    /// Length of a code's vector.
    pub code_dim: usize,
    /// What the commitment loss weighs.
    pub commitment: f64,
}

impl Default for ImageTokensRecipe {
    fn default() -> Self {
        // The weight is that of arXiv:1711.00937, section 3.2.
        Self { codes: 256, code_dim: 8, commitment: 0.25 }
    }
}

impl ImageTokensRecipe {
    /// The quantizer's shape.
    ///
    /// # Errors
    /// For a recipe without `model.image`, or an impossible shape.
    pub fn shape(&self, model: &ModelRecipe) -> Result<VqConfig, TrainError> {
        let TransformerConfig { image, d_model, n_layers, n_heads, d_ff, norm_eps, init_std, .. } = model.resolve(1)?;
        let config = VqConfig {
            image: image_of(image)?,
            d_model,
            n_layers,
            n_heads,
            d_ff,
            codes: self.codes,
            code_dim: self.code_dim,
            commitment: self.commitment,
            norm_eps,
            init_std,
        };
        config.validate()?;
        Ok(config)
    }
}

/// The images of a recipe for tasks that need some.
pub(super) fn image_of(image: Option<ImageConfig>) -> Result<ImageConfig, TrainError> {
    let none = || RecipeError::Value {
        key: "model.image",
        expected: "the size of images and patches, such as { size = 32, patch = 4, channels = 3 }".into(),
        got: "nothing".into(),
    };
    Ok(image.ok_or_else(none)?)
}

/// Images, to be given back from their codes.
#[derive(Debug, Clone)]
pub struct ImageTokens {
    rows: PictureRows,
    tokens: usize,
}

impl ImageTokens {
    /// Of images in `tokens` patches each.
    pub fn new(rows: PictureRows, tokens: usize) -> Self {
        Self { rows, tokens }
    }
}

/// Images that metrics encode at once.
const AT_ONCE: usize = 32;

impl Task<VqModel> for ImageTokens {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        Ok(self.rows.batches(first, rows, micro_rows, self.tokens))
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.rows.held_out(rows, self.tokens))
    }

    fn has_held_out(&self) -> bool {
        !self.rows.held.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        self.tokens
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.rows.files()
    }

    /// `mse`: the mean squared error of pixels, of values in 0..1; `psnr`: the same in decibels; `perplexity` of the codes of all patches: how many it would be if all were used as often;
    /// `codes_used`: the share of the codebook that occurs at all.
    fn metrics(&self, model: &VqModel, limit: Option<u64>) -> Result<Vec<(String, f64)>, TrainError> {
        let held = &self.rows.held;
        let (mut error, mut values) = (0.0, 0u64);
        let mut counts = vec![0u64; model.config().codes];
        for at in held.chunks(AT_ONCE).take(limit.map_or(usize::MAX, |n| n as usize)) {
            let images = held.normalized(at.iter().copied());
            let codes = model.encode(&images);
            codes.iter().for_each(|&code| counts[code as usize] += 1);
            let plane = images.len() / (at.len() * held.preprocess().channels);
            let std = held.preprocess().std.iter().cycle();
            let made = model.decode(&codes);
            for ((x, y), std) in images.chunks_exact(plane).zip(made.chunks_exact(plane)).zip(std) {
                error += x.iter().zip(y).map(|(x, y)| f64::from((x - y) * std).powi(2)).sum::<f64>();
            }
            values += images.len() as u64;
        }
        let all = counts.iter().sum::<u64>().max(1) as f64;
        let shares = counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / all);
        let entropy: f64 = shares.clone().map(|p| -p * p.ln()).sum();
        let mse = error / values.max(1) as f64;
        Ok(vec![
            ("mse".into(), mse),
            ("psnr".into(), -10.0 * mse.max(1e-12).log10()),
            ("perplexity".into(), entropy.exp()),
            ("codes_used".into(), shares.count() as f64 / counts.len() as f64),
        ])
    }

    fn has_metrics(&self) -> bool {
        true
    }
}

impl Model for VqModel {
    fn describe(&self) -> String {
        let VqConfig { image, d_model, n_layers, n_heads, codes, code_dim, .. } = self.config();
        format!(
            "vector quantizer of images of {0} x {0} pixels in patches of {1} x {1}, {codes} codes of {code_dim}, {n_layers} layers before and after, width {d_model}, {n_heads} heads",
            image.size, image.patch
        )
    }

    fn flops_per_token(&self) -> f64 {
        use firebox_models::Staged;
        (0..self.n_stages()).map(|i| self.stage_flops(i)).sum()
    }

    fn entries(&self) -> Vec<Entry> {
        own_entries(self)
    }

    fn config_json(&self) -> Value {
        let mut json = json!(self.config());
        json["model_type"] = MODEL_TYPE.into();
        json
    }

    fn empty(&self, seed: u64) -> Result<Self, TrainError> {
        Ok(Self::new(self.config(), seed, &device_of(self))?)
    }
}
