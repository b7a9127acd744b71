//! The modules of the masked autoencoder and its forward pass.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_parallel::Communicator;
use firebox_tensor::ops::{self, Pre, Sequence};
use firebox_tensor::random::{Counter, Purpose, uniform};

use super::config::MaeConfig;
use super::positions::positions;
use crate::placement::Placement;
use crate::stage::{Extra, Flow, Staged, TokenBatch};
use crate::transformer::{ConfigError, Linear, Parts, TensorParallelError, Transformer, Trunk};

/// Encoder and decoder.
#[derive(Module, Debug)]
pub struct Mae {
    /// The encoder, whose positions are fixed.
    pub vit: Transformer,
    /// From the encoder, `D -> W`.
    pub embed: Linear,
    /// What stands for a patch that is not seen, `[1, W]`.
    pub mask_token: Param<Tensor<2>>,
    /// Fixed, `[1 + T, W]`.
    pub positions: Param<Tensor<2>>,
    /// The decoder.
    pub decoder: Trunk,
    /// To a patch's values, `W -> P`.
    pub pixels: Linear,
    #[module(skip)]
    config: MaeConfig,
}

impl Mae {
    /// A model with initial parameters that are a pure function of (seed, name, index).
    ///
    /// # Errors
    /// [`ConfigError`] for an impossible shape.
    pub fn new(config: &MaeConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        Self::with_encoder(Transformer::new(&config.encoder, seed, device)?, config, seed, device)
    }

    /// The part of one rank of several that divide the encoder's matrices; each has the whole decoder.
    ///
    /// # Errors
    /// An impossible shape, or one that so many ranks cannot divide.
    pub fn sharded(
        config: &MaeConfig,
        seed: u64,
        device: &Device,
        group: &Communicator,
        sequence_parallel: bool,
    ) -> Result<Self, TensorParallelError> {
        config.validate()?;
        let vit = Transformer::sharded(&config.encoder, seed, device, group, sequence_parallel)?;
        Ok(Self::with_encoder(vit, config, seed, device)?)
    }

    fn with_encoder(vit: Transformer, config: &MaeConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        let (image, w) = (config.image(), config.decoder.d_model);
        let counter = Counter::new(seed, Purpose::Init, 0).fork("mae");
        let parts = Parts { counter, device, std: config.decoder.init_std };
        let (grid, d) = (image.grid(), config.encoder.d_model);
        Ok(Self {
            vit: vit.with_fixed_positions(positions(grid, d)),
            embed: parts.linear("embed", [d, w]),
            mask_token: parts.matrix("mask_token", [1, w]),
            positions: parts.fixed([1 + image.patches(), w], positions(grid, w)),
            decoder: Trunk::new(&config.decoder, counter.fork("decoder"), device)?,
            pixels: parts.linear("pixels", [w, image.patch_values()]),
            config: config.clone(),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &MaeConfig {
        &self.config
    }

    /// Rows of images `[B, C, S, S]`, of each of which `counters` choose the patches that are seen; the loss is a mean over `of` rows.
    pub fn batch(config: &MaeConfig, pixels: Vec<f32>, counters: &[Counter], of: usize) -> TokenBatch {
        let t = config.image().patches();
        let seen = counters.iter().map(|counter| {
            let noise: Vec<f32> = (0..t as u64).map(|i| uniform(*counter, i)).collect();
            let mut order: Vec<usize> = (0..t).collect();
            order.sort_by(|&a, &b| noise[a].total_cmp(&noise[b]).then(a.cmp(&b)));
            order.truncate(config.seen());
            order.sort_unstable();
            order
        });
        Self::batch_of(seen.collect(), pixels, of)
    }

    /// Rows of which these patches are seen, of all as many; the loss is a mean over `of` rows.
    ///
    /// # Panics
    /// If rows have not the same number of patches.
    pub fn batch_of(seen: Vec<Vec<usize>>, pixels: Vec<f32>, of: usize) -> TokenBatch {
        let (b, tokens) = (seen.len(), 1 + seen.first().map_or(0, Vec::len));
        let positions: Vec<i32> =
            seen.iter().flat_map(|row| std::iter::once(0).chain(row.iter().map(|&patch| 1 + patch as i32))).collect();
        let sequence = Sequence::bidirectional(b, tokens, positions, &vec![0; b * tokens]);
        TokenBatch {
            loss_scale: 1.0 / of.max(1) as f64,
            extra: Some(Arc::new(Extra { pixels, ..Extra::default() })),
            ..TokenBatch::new(vec![0; b * tokens], vec![-100; b * tokens], sequence)
        }
    }

    /// What the decoder is to make, `[B T, P]`.
    fn wanted(&self, batch: &TokenBatch) -> Vec<f32> {
        let image = self.config.image();
        let pixels = batch.extra.as_ref().map_or(&[][..], |extra| &extra.pixels);
        let mut patches = image.to_patches(pixels);
        if self.config.normalize {
            let p = image.patch_values();
            for patch in patches.chunks_exact_mut(p) {
                let mean = patch.iter().map(|v| f64::from(*v)).sum::<f64>() / p as f64;
                // The deviation of a sample, as PyTorch's `var` is by default.
                let variance = patch.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / (p - 1) as f64;
                let scale = 1.0 / (variance + 1e-6).sqrt();
                patch.iter_mut().for_each(|v| *v = ((f64::from(*v) - mean) * scale) as f32);
            }
        }
        patches
    }

    /// Decoder and loss: the mean, over the patches of each row that were not seen, of the squared error.
    fn last_stage(&self, x: Tensor<3>, batch: &TokenBatch) -> Tensor<1> {
        let ([b, tokens, _], image, w) = (x.dims(), self.config.image(), self.config.decoder.d_model);
        let (n, p) = (image.patches(), image.patch_values());
        let x = self.embed.forward(x, Pre::Nothing, None).reshape([b * tokens, w]);
        // Each row has its class token, and of each patch what the encoder says or the token of masked ones, which comes last.
        let mut at = vec![(b * tokens) as i32; b * (n + 1)];
        for (i, position) in batch.sequence.positions().iter().enumerate() {
            at[i / tokens * (n + 1) + *position as usize] = i as i32;
        }
        let masked: Vec<usize> = (0..at.len()).filter(|&i| at[i] as usize == b * tokens).collect();
        let table = Tensor::cat(vec![x, self.mask_token.val()], 0);
        let x = ops::embedding(table, at.into(), b, n + 1) + self.positions.val().unsqueeze::<3>();
        let sequence = Sequence::padded(n + 1, &vec![n + 1; b]);
        let x = (0..self.decoder.blocks.len()).fold(x, |x, i| self.decoder.block(i, x, &sequence));
        let m = masked.len();
        let places: Vec<i32> = masked.iter().map(|&i| i as i32).collect();
        let x = ops::embedding(x.reshape([b * (n + 1), w]), places.into(), 1, m).reshape([m, w]);
        let made = self.pixels.forward(x, self.decoder.norm.before(), None);
        let patches = self.wanted(batch);
        let wanted = masked.iter().flat_map(|i| {
            let patch = i / (n + 1) * n + i % (n + 1) - 1;
            patches[patch * p..][..p].iter().copied()
        });
        let off =
            made.clone() - Tensor::from_data(TensorData::new(wanted.collect::<Vec<f32>>(), [m, p]), &made.device());
        (off.clone() * off).sum() * (batch.loss_scale * b as f64 / (m * p).max(1) as f64)
    }
}

impl Staged for Mae {
    /// Those of the encoder, of which the last has the decoder with it.
    fn n_stages(&self) -> usize {
        self.vit.n_stages()
    }

    fn first_stage(&self, param: &str) -> usize {
        param.strip_prefix("vit.").map_or(self.n_stages() - 1, |param| self.vit.first_stage(param))
    }

    fn uses(&self, i: usize, param: &str) -> bool {
        match param.strip_prefix("vit.") {
            Some(param) => self.vit.uses(i, param),
            None => i + 1 == self.n_stages(),
        }
    }

    fn hidden_tokens(&self, batch: &TokenBatch) -> [usize; 2] {
        self.vit.hidden_tokens(batch)
    }

    fn placement(&self, param: &str) -> Placement {
        param.strip_prefix("vit.").map_or_else(Placement::replicated, |param| self.vit.placement(param))
    }

    fn stage_flops(&self, i: usize) -> f64 {
        let decoder = || {
            let (image, w) = (self.config.image(), self.config.decoder.d_model);
            let all = self.config.decoder.flops_per_token(1 + image.patches()) + (6 * image.patch_values() * w) as f64;
            all * (1 + image.patches()) as f64 / (1 + self.config.seen()) as f64
        };
        self.vit.stage_flops(i) + if i + 1 == self.n_stages() { decoder() } else { 0.0 }
    }

    fn forward_stage(&self, i: usize, flow: Flow, batch: &TokenBatch, step: Option<u64>) -> Flow {
        let flow = self.vit.forward_stage(i, flow, batch, step);
        if i + 1 < self.n_stages() { flow } else { Flow::Loss(self.last_stage(flow.hidden(), batch)) }
    }
}
