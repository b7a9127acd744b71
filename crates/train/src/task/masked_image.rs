//! Masked autoencoding of images.

use firebox_models::TokenBatch;
use firebox_models::mae::{Mae, MaeConfig};
use firebox_models::transformer::hf::{Entry, Family};
use firebox_models::transformer::{EncoderConfig, FeedForward, Head, NormKind, Positions, TensorParallel, TrunkShape};
use firebox_parallel::Communicator;
use firebox_tensor::random::{Counter, Purpose};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::image_tokens::image_of;
use super::pictures::PictureRows;
use super::{HeldOut, Model, Task, device_of};
use crate::TrainError;
use crate::model_io::{MAE, entries, own_entries};
use crate::recipe::ModelRecipe;
use crate::trainer::cannot_divide;

/// What `task.kind = "masked_image"` has besides; `[model]` is the encoder, `model.image` the size of images and patches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskedImageRecipe {
    /// The share of patches that the encoder does not see.
    pub mask_ratio: f64,
    /// Whether a patch's values are to be given as they are apart from their mean and deviation.
    pub normalize: bool,
    /// Width of the decoder; 0: half of the encoder's.
    pub decoder_width: usize,
    /// Blocks of the decoder.
    pub decoder_layers: usize,
    /// Heads of the decoder.
    pub decoder_heads: usize,
}

impl Default for MaskedImageRecipe {
    fn default() -> Self {
        // arXiv:2111.06377, table 1; its decoder has 8 blocks, of which one does as well where the encoder is trained on.
        Self { mask_ratio: 0.75, normalize: true, decoder_width: 0, decoder_layers: 2, decoder_heads: 4 }
    }
}

impl MaskedImageRecipe {
    /// The shape of encoder and decoder.
    ///
    /// # Errors
    /// For a recipe without `model.image`, or an impossible shape.
    pub fn shape(&self, model: &ModelRecipe) -> Result<MaeConfig, TrainError> {
        // What `[model]` does not say is ViT's.
        let vit = ModelRecipe {
            encoder: model.encoder.or(Some(EncoderConfig::default())),
            norm: model.norm.or(Some(NormKind::LayerNorm)),
            norm_eps: model.norm_eps.or(Some(1e-12)),
            feed_forward: model.feed_forward.or(Some(FeedForward::GeluExact)),
            positions: model.positions.or(Some(Positions::Learned)),
            bias: model.bias.or(Some(true)),
            tied: Some(true),
            head: Some(Head::Hidden),
            ..model.clone()
        };
        let encoder = vit.resolve(1)?;
        image_of(encoder.image)?;
        let width = if self.decoder_width == 0 { encoder.d_model / 2 } else { self.decoder_width };
        let decoder = TrunkShape {
            d_model: width,
            n_layers: self.decoder_layers,
            n_heads: self.decoder_heads,
            d_ff: 4 * width,
            norm_eps: encoder.norm_eps,
            init_std: encoder.init_std,
        };
        let config = MaeConfig { encoder, decoder, mask_ratio: self.mask_ratio, normalize: self.normalize };
        config.validate()?;
        Ok(config)
    }
}

/// Images, of which each step masks patches.
#[derive(Debug, Clone)]
pub struct MaskedImage {
    rows: PictureRows,
    config: MaeConfig,
    seed: u64,
}

impl MaskedImage {
    /// Which patches are masked is a function of `seed` and of the number of the sample.
    pub fn new(rows: PictureRows, config: MaeConfig, seed: u64) -> Self {
        Self { rows, config, seed }
    }

    fn counter(&self, purpose: Purpose, n: u64) -> Counter {
        Counter::new(self.seed, purpose, n).fork("patches")
    }
}

impl Task<Mae> for MaskedImage {
    fn batches(&self, first: u64, rows: usize, micro_rows: usize) -> Result<Vec<TokenBatch>, TrainError> {
        let part = |part: Vec<(u64, usize)>| {
            let counters: Vec<Counter> = part.iter().map(|(n, _)| self.counter(Purpose::Masking, *n)).collect();
            Mae::batch(&self.config, self.rows.train.normalized(part.into_iter().map(|(_, row)| row)), &counters, rows)
        };
        Ok(self.rows.step(first, rows, micro_rows).into_iter().map(part).collect())
    }

    fn held_out(&self, rows: usize) -> Box<dyn Iterator<Item = HeldOut> + '_> {
        Box::new(self.rows.held.chunks(rows).map(|at| {
            let counters: Vec<Counter> = at.iter().map(|n| self.counter(Purpose::HeldOutMasking, *n as u64)).collect();
            let count = at.len();
            let batch = Mae::batch(&self.config, self.rows.held.normalized(at), &counters, count);
            HeldOut { batch, count: count as u64, bytes: 0 }
        }))
    }

    fn has_held_out(&self) -> bool {
        !self.rows.held.is_empty()
    }

    fn tokens_per_row(&self) -> usize {
        1 + self.config.seen()
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.rows.files()
    }
}

impl Model for Mae {
    fn describe(&self) -> String {
        let MaeConfig { encoder: e, decoder: d, mask_ratio, .. } = self.config();
        let image = self.config().image();
        format!(
            "masked autoencoder of images of {0} x {0} pixels in patches of {1} x {1}, {2} of which masked; encoder of {3} layers, width {4}, {5} heads, decoder of {6} layers, width {7}",
            image.size, image.patch, mask_ratio, e.n_layers, e.d_model, e.n_heads, d.n_layers, d.d_model
        )
    }

    fn flops_per_token(&self) -> f64 {
        use firebox_models::Staged;
        (0..self.n_stages()).map(|i| self.stage_flops(i)).sum()
    }

    /// The encoder's, under the names of an encoder alone, and the decoder's below `mae.`.
    fn entries(&self) -> Vec<Entry> {
        let of_encoder = entries(&self.vit).into_iter();
        let of_encoder = of_encoder.map(|entry| Entry { param: format!("vit.{}", entry.param), ..entry });
        let own = own_entries(self).into_iter().filter(|entry| !entry.param.starts_with("vit."));
        let own = own.map(|entry| Entry::whole(&entry.param, &entry.shape, &format!("{MAE}{}", entry.param)));
        of_encoder.chain(own).collect()
    }

    /// That of the encoder, as which the checkpoint loads; what else there is of the decoder is below `mae`.
    fn config_json(&self) -> Value {
        let MaeConfig { encoder, decoder, mask_ratio, normalize } = self.config();
        let mut json = Family::of(encoder).config_json(encoder);
        json["mae"] = json!({
            "decoder_hidden_size": decoder.d_model,
            "decoder_num_hidden_layers": decoder.n_layers,
            "decoder_num_attention_heads": decoder.n_heads,
            "decoder_intermediate_size": decoder.d_ff,
            "mask_ratio": mask_ratio,
            "norm_pix_loss": normalize,
        });
        json
    }

    fn empty(&self, seed: u64) -> Result<Self, TrainError> {
        Ok(Self::new(self.config(), seed, &device_of(self))?)
    }

    fn parallel(&self) -> Option<&TensorParallel> {
        self.vit.parallel()
    }

    /// Ranks divide the encoder; each has the decoder.
    fn sharded(&self, seed: u64, group: &Communicator, sequence_parallel: bool) -> Result<Self, TrainError> {
        let part = Self::sharded(self.config(), seed, &device_of(self), group, sequence_parallel);
        part.map_err(|error| cannot_divide("tp", error))
    }
}
