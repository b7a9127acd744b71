//! The modules of the vector quantizer and its forward pass.
//!
//! Shapes: `B` images, `T` patches, `P` values of a patch, `D` width, `K` codes, `E` length of a code's vector.
//!
//! Deliberate differences from the papers: the codebook is trained by its gradient alone (equation 3 of arXiv:1711.00937), not by a running average, so that it is a parameter like any
//! other, to optimizers, ranks and checkpoints; the loss is of pixels, without adversary or perceptual network.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::ops::{self, Pre, Sequence};
use firebox_tensor::random::{Counter, Purpose};

use super::config::VqConfig;
use crate::stage::{Flow, Staged, TokenBatch};
use crate::transformer::{ConfigError, Linear, Parts, Trunk};

/// Encoder, codebook, decoder.
#[derive(Module, Debug)]
pub struct VqModel {
    /// From a patch's values, `P -> D`.
    pub patches: Linear,
    /// A vector for each place, `[T, D]`.
    pub positions: Param<Tensor<2>>,
    /// The encoder.
    pub encoder: Trunk,
    /// `D -> E`
    pub to_code: Linear,
    /// `[K, E]`; of its rows the direction alone counts.
    pub codebook: Param<Tensor<2>>,
    /// `E -> D`
    pub from_code: Linear,
    /// `[T, D]`
    pub decoder_positions: Param<Tensor<2>>,
    /// The decoder.
    pub decoder: Trunk,
    /// To a patch's values, `D -> P`.
    pub pixels: Linear,
    #[module(skip)]
    config: VqConfig,
}

/// Rows of length 1.
fn normalized(x: Tensor<2>) -> Tensor<2> {
    x.clone() / (x.clone() * x).sum_dim(1).sqrt().clamp_min(1e-12)
}

/// The values without a graph behind them.
fn plain<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.device().is_autodiff() { x.inner() } else { x }
}

fn host(x: Tensor<2>) -> Vec<f32> {
    // PANIC: Firebox's tensors are f32.
    plain(x).into_data().try_into_vec().expect("an f32 tensor")
}

impl VqModel {
    /// A model with initial parameters that are a pure function of (seed, name, index).
    ///
    /// # Errors
    /// [`ConfigError`] for an impossible shape.
    pub fn new(config: &VqConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let counter = Counter::new(seed, Purpose::Init, 0);
        let parts = Parts { counter, device, std: config.init_std };
        let (t, p, d, e) = (config.image.patches(), config.image.patch_values(), config.d_model, config.code_dim);
        Ok(Self {
            patches: parts.linear("patches", [p, d]),
            positions: parts.matrix("positions", [t, d]),
            encoder: Trunk::new(&config.trunk(), counter.fork("encoder"), device)?,
            to_code: parts.linear("to_code", [d, e]),
            codebook: Parts { std: 1.0, ..parts }.matrix("codebook", [config.codes, e]),
            from_code: Parts { std: 1.0, ..parts }.linear("from_code", [e, d]),
            decoder_positions: parts.matrix("decoder_positions", [t, d]),
            decoder: Trunk::new(&config.trunk(), counter.fork("decoder"), device)?,
            pixels: parts.linear("pixels", [d, p]),
            config: config.clone(),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &VqConfig {
        &self.config
    }

    fn device(&self) -> Device {
        self.positions.lazy_device()
    }

    /// `[B, C, S, S] -> [B, T, P]`
    fn patches_of(&self, images: &[f32]) -> Tensor<3> {
        let image = self.config.image;
        let (t, p) = (image.patches(), image.patch_values());
        let patches = image.to_patches(images);
        let b = patches.len() / (t * p);
        Tensor::from_data(TensorData::new(patches, [b, t, p]), &self.device())
    }

    /// The first stage.
    fn embed(&self, patches: Tensor<3>) -> Tensor<3> {
        self.patches.forward(patches, Pre::Nothing, None) + self.positions.val().unsqueeze::<3>()
    }

    /// The vectors of the encoder's rows, of length 1: `[B, T, D] -> [B T, E]`.
    fn vectors(&self, x: Tensor<3>) -> Tensor<2> {
        let [b, t, d] = x.dims();
        normalized(self.to_code.forward(x.reshape([b * t, d]), self.encoder.norm.before(), None))
    }

    /// The code next to each vector: of those at the same distance, the first.
    fn nearest(&self, vectors: Tensor<2>, codes: Tensor<2>) -> Vec<i32> {
        let near = host(plain(vectors).matmul(plain(codes).transpose()));
        let best = |row: &[f32]| (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        near.chunks_exact(self.config.codes).map(|row| best(row) as i32).collect()
    }

    /// From the codes' vectors to patches: `[B T, E] -> [B, T, P]`.
    fn pictured(&self, vectors: Tensor<2>, sequence: &Sequence) -> Tensor<3> {
        let (b, t, d) = (sequence.batch(), sequence.tokens(), self.config.d_model);
        let x = self.from_code.forward(vectors, Pre::Nothing, None).reshape([b, t, d]);
        let x = x + self.decoder_positions.val().unsqueeze::<3>();
        let x = (0..self.decoder.blocks.len()).fold(x, |x, i| self.decoder.block(i, x, sequence));
        self.pixels.forward(x, self.decoder.norm.before(), None)
    }

    /// Quantizer, decoder, loss: the mean over a row's pixels of the squared error, and over its patches of the squared distances between vectors and codes.
    fn last_stage(&self, x: Tensor<3>, batch: &TokenBatch) -> Tensor<1> {
        let images = batch.extra.as_ref().map_or(&[][..], |extra| &extra.pixels);
        let want = self.patches_of(images);
        let [_, t, p] = want.dims();
        let (z, codes) = (self.vectors(x), normalized(self.codebook.val()));
        let ids = self.nearest(z.clone(), codes.clone());
        let n = ids.len();
        let q = ops::embedding(codes, ids.into(), 1, n).squeeze_dim::<2>(0);
        let squared = |x: Tensor<2>| (x.clone() * x).sum();
        let codebook = squared(q.clone() - z.clone().detach());
        let commitment = squared(z.clone() - q.clone().detach());
        // Straight through: the value of the code with the gradient of the vector.
        let through = z.clone() + (q - z).detach();
        let off = self.pictured(through, &batch.sequence) - want;
        let error = (off.clone() * off).sum() / (t * p) as f64;
        (error + (codebook + commitment * self.config.commitment) / t as f64) * batch.loss_scale
    }

    /// The codes of images, in raster order: `[B, C, S, S] -> [B, T]`.
    ///
    /// # Panics
    /// If these are no whole images.
    pub fn encode(&self, images: &[f32]) -> Vec<i32> {
        let patches = self.patches_of(images);
        let [b, t, _] = patches.dims();
        let sequence = Sequence::padded(t, &vec![t; b]);
        let x = self.embed(patches);
        let x = (0..self.encoder.blocks.len()).fold(x, |x, i| self.encoder.block(i, x, &sequence));
        self.nearest(self.vectors(x), normalized(self.codebook.val()))
    }

    /// Images of codes: `[B, T] -> [B, C, S, S]`.
    ///
    /// # Panics
    /// If a code is none, or they are no whole images'.
    pub fn decode(&self, codes: &[i32]) -> Vec<f32> {
        let t = self.config.image.patches();
        assert!(codes.len().is_multiple_of(t), "decode: {} codes for images of {t}", codes.len());
        let sequence = Sequence::padded(t, &vec![t; codes.len() / t]);
        let vectors = ops::embedding(normalized(self.codebook.val()), codes.into(), 1, codes.len()).squeeze_dim(0);
        let patches = self.pictured(vectors, &sequence);
        let [b, t, p] = patches.dims();
        self.config.image.to_images(&host(patches.reshape([b * t, p])))
    }
}

impl Staged for VqModel {
    /// Embedding, one per block of the encoder, and the rest.
    fn n_stages(&self) -> usize {
        self.config.n_layers + 2
    }

    fn first_stage(&self, param: &str) -> usize {
        let block = || param.strip_prefix("encoder.blocks.")?.split('.').next()?.parse::<usize>().ok();
        match block() {
            Some(block) => block + 1,
            None if param.starts_with("patches.") || param == "positions" => 0,
            None => self.config.n_layers + 1,
        }
    }

    fn stage_flops(&self, i: usize) -> f64 {
        let VqConfig { image, d_model, n_layers, codes, code_dim, .. } = &self.config;
        let (blocks, patch) = (self.config.trunk().flops_per_token(image.patches()), (6 * image.patch_values()) as f64);
        match i {
            0 => patch * *d_model as f64,
            _ if i <= *n_layers => blocks / *n_layers as f64,
            // The search for codes has no backward pass.
            _ => blocks + (patch + (12 * code_dim) as f64) * *d_model as f64 + (2 * codes * code_dim) as f64,
        }
    }

    fn forward_stage(&self, i: usize, flow: Flow, batch: &TokenBatch, _step: Option<u64>) -> Flow {
        if i == 0 {
            let images = batch.extra.as_ref().map_or(&[][..], |extra| &extra.pixels);
            return Flow::Hidden(self.embed(self.patches_of(images)));
        }
        let x = flow.hidden();
        match i <= self.encoder.blocks.len() {
            true => Flow::Hidden(self.encoder.block(i - 1, x, &batch.sequence)),
            false => Flow::Loss(self.last_stage(x, batch)),
        }
    }
}
