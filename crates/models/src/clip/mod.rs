//! CLIP: two towers that see an image and a text, and learn which belong together (Radford et al., arXiv:2103.00020).
//!
//! A row is an image and a text. The image becomes the class token of an encoder of patches, the text the last token of a causal decoder; both are projected to one width and made of length 1.
//! In a batch each image is to find its text among all texts, and each text its image: the mean of the two cross-entropies of the products, which a learned factor scales.
//!
//! Shapes: `B` rows, `T` tokens of a text, `D` width of a tower, `P` width of what both are projected to.
//!
//! Both towers are one list of stages, the image's first. What it gives travels through the text's stages behind the tokens, as rows of their width, so that everything that works between stages
//! (recomputation, offloading, gathered parameters) sees hidden states. The loss compares the rows of all ranks with other data ([`Clip::with_ranks`]).

mod config;
pub mod hf;

use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_parallel::Communicator;
use firebox_tensor::ops::{self, LossConfig, Sequence, collective};
use firebox_tensor::random::{Counter, Purpose, normal};

pub use config::ClipConfig;

use crate::placement::Placement;
use crate::stage::{Flow, Staged, TokenBatch};
use crate::transformer::{ConfigError, TensorParallelError, Transformer};

/// The largest factor of the products in training (section 2.5 of the paper).
const MOST: f64 = 100.0;

/// Two towers. Batches have the tokens of the texts, each row's first segment being one, and pixels in [`Extra::pixels`](crate::Extra::pixels).
#[derive(Module, Debug)]
pub struct Clip {
    /// An encoder of patches.
    pub image: Transformer,
    /// A causal decoder.
    pub text: Transformer,
    /// `[D, P]`
    pub image_proj: Param<Tensor<2>>,
    /// `[D, P]`
    pub text_proj: Param<Tensor<2>>,
    /// The logarithm of the factor of the products, `[1]`.
    pub scale: Param<Tensor<1>>,
    #[module(skip)]
    context: Context,
}

#[derive(Clone, Debug)]
struct Context {
    config: ClipConfig,
    loss: LossConfig,
    /// The ranks whose rows are compared with these.
    ranks: Option<Communicator>,
}

/// What the seed of the image's tower differs by, so that towers of the same shape start with different values.
const OF_IMAGE: u64 = 0x1a6e;

impl Clip {
    /// A model with initial parameters that are a pure function of (seed, name, index).
    ///
    /// # Errors
    /// [`ConfigError`] for an impossible shape.
    pub fn new(config: &ClipConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let image = Transformer::new(&config.image, seed ^ OF_IMAGE, device)?;
        let text = Transformer::new(&config.text, seed, device)?;
        Ok(Self::of_towers(image, text, config, seed, device))
    }

    /// One rank's part of such a model: both towers' matrices are divided, the projections are not.
    ///
    /// # Errors
    /// [`TensorParallelError`].
    pub fn sharded(
        config: &ClipConfig,
        seed: u64,
        device: &Device,
        group: &Communicator,
        sequence_parallel: bool,
    ) -> Result<Self, TensorParallelError> {
        config.validate()?;
        let image = Transformer::sharded(&config.image, seed ^ OF_IMAGE, device, group, sequence_parallel)?;
        let text = Transformer::sharded(&config.text, seed, device, group, sequence_parallel)?;
        Ok(Self::of_towers(image, text, config, seed, device))
    }

    fn of_towers(image: Transformer, text: Transformer, config: &ClipConfig, seed: u64, device: &Device) -> Self {
        let projection = |name: &str, d: usize| {
            let (counter, width) = (Counter::new(seed, Purpose::Init, 0).fork(name), config.width);
            // As the paper: 1 / sqrt(D).
            let std = (d as f64).powf(-0.5);
            let init = move |device: &Device, require_grad: bool| {
                let values = (0..d * width).map(|i| (f64::from(normal(counter, i as u64)) * std) as f32);
                let data = TensorData::new(values.collect::<Vec<f32>>(), [d, width]);
                Tensor::from_data(data, device).set_require_grad(require_grad)
            };
            Param::uninitialized(ParamId::new(), init, device.clone(), true, [d, width].into())
        };
        let start = config.logit_scale as f32;
        let scale = move |device: &Device, require_grad: bool| {
            Tensor::from_data(TensorData::new(vec![start], [1]), device).set_require_grad(require_grad)
        };
        Self {
            image_proj: projection("image_proj", config.image.d_model),
            text_proj: projection("text_proj", config.text.d_model),
            scale: Param::uninitialized(ParamId::new(), scale, device.clone(), true, [1].into()),
            image,
            text,
            context: Context { config: config.clone(), loss: LossConfig::default(), ranks: None },
        }
    }

    /// Its shape.
    pub fn config(&self) -> &ClipConfig {
        &self.context.config
    }

    /// The same parameters with another loss in training.
    pub fn with_loss(mut self, loss: LossConfig) -> Self {
        self.context.loss = loss;
        self
    }

    /// The same parameters with the seed of dropout's masks.
    ///
    /// # Errors
    /// [`ConfigError`] for a probability outside [0, 1).
    pub fn for_training(mut self, seed: u64) -> Result<Self, ConfigError> {
        let [image, text] = [&self.context.config.image, &self.context.config.text].map(|config| config.dropout);
        self.image = self.image.for_training(seed ^ OF_IMAGE, image)?;
        self.text = self.text.for_training(seed, text)?;
        Ok(self)
    }

    /// The same parameters on one of the ranks whose rows the loss compares in training. All must be asked, and compute as many rows at the same time.
    ///
    /// # Panics
    /// With the error's message where a rank fails.
    pub fn with_ranks(mut self, group: &Communicator) -> Self {
        // Messages of their own: gradients are on their way between the same ranks.
        self.context.ranks = match group.split(Some(0), group.rank() as i32) {
            Ok(own) => own.filter(|own| own.size() > 1),
            Err(error) => panic!("{error}"),
        };
        self
    }

    /// What the image's tower sees of a batch.
    fn images(&self, batch: &TokenBatch) -> TokenBatch {
        let (rows, tokens) = (batch.sequence.batch(), self.config().image.context);
        let nothing: Arc<[i32]> = vec![].into();
        TokenBatch {
            inputs: nothing.clone(),
            targets: nothing,
            sequence: Sequence::padded(tokens, &vec![tokens; rows]),
            lesson: None,
            ..batch.clone()
        }
    }

    /// The class tokens projected, `[B, P]`, from what the image's tower gives.
    fn project_images(&self, x: Tensor<3>) -> Tensor<2> {
        let [b, _, d] = x.dims();
        ops::linear(x.narrow(1, 0, 1).reshape([b, d]), self.image_proj.val(), None)
    }

    /// The texts' last tokens projected, `[B, P]`, from what the text's tower gives.
    fn project_texts(&self, x: Tensor<3>, sequence: &Sequence) -> Tensor<2> {
        let [b, t, d] = x.dims();
        let last = sequence.lengths().iter().enumerate().map(|(row, n)| (row * t + n - 1) as i32).collect();
        let x = ops::embedding(x.reshape([b * t, d]), last, 1, b).reshape([b, d]);
        ops::linear(x, self.text_proj.val(), None)
    }

    /// The images of a batch as vectors of length 1, `[B, P]`. As in evaluation.
    ///
    /// # Panics
    /// If the batch has not the pixels of its rows.
    pub fn image_embeds(&self, batch: &TokenBatch) -> Tensor<2> {
        unit(self.project_images(self.image.hidden(&self.images(batch))))
    }

    /// The texts of a batch as vectors of length 1, `[B, P]`. As in evaluation.
    ///
    /// # Panics
    /// As [`Transformer::hidden`].
    pub fn text_embeds(&self, batch: &TokenBatch) -> Tensor<2> {
        unit(self.project_texts(self.text.hidden(batch), &batch.sequence))
    }

    /// What products of vectors are multiplied by to become logits, `[1]`.
    pub fn factor(&self) -> Tensor<1> {
        self.scale.val().exp()
    }

    /// The loss of images and texts `[B, P]` that belong together row by row.
    fn compare(&self, image: Tensor<2>, text: Tensor<2>, batch: &TokenBatch, step: Option<u64>) -> Tensor<1> {
        let (image, text) = (unit(image), unit(text));
        let [rows, _] = image.dims();
        let (factor, loss) = match step {
            Some(_) => (self.factor().clamp_max(MOST), self.context.loss),
            None => (self.factor(), LossConfig::default()),
        };
        let ranks = self.context.ranks.as_ref().filter(|_| step.is_some());
        let first = ranks.map_or(0, |ranks| ranks.rank() * rows);
        let own: Vec<i32> = (first..first + rows).map(|row| row as i32).collect();
        let half = |x: Tensor<2>, others: Tensor<2>| {
            let others = match ranks {
                Some(ranks) => all_rows(others, ranks),
                None => others,
            };
            let logits = x.matmul(others.transpose()) * factor.clone().unsqueeze::<2>();
            ops::cross_entropy(logits, &own, batch.loss_scale / 2.0, &loss)
        };
        half(image.clone(), text.clone()) + half(text, image)
    }
}

/// The rows of all ranks, `[B, P]` of each.
fn all_rows(x: Tensor<2>, ranks: &Communicator) -> Tensor<2> {
    let [rows, p] = x.dims();
    let all = rows * ranks.size();
    collective::gather_tokens(x.unsqueeze_dim(0), [all, 1], ranks).reshape([all, p])
}

/// Rows of length 1.
fn unit(x: Tensor<2>) -> Tensor<2> {
    x.clone() / (x.clone() * x).sum_dim(1).sqrt().clamp_min(1e-12)
}

/// Vectors `[B, P]` behind the tokens of `x`, `[B, T, D]`, as rows of that width.
fn with_passenger(x: Tensor<3>, passenger: Tensor<2>) -> Tensor<3> {
    let ([b, _, d], [_, p], device) = (x.dims(), passenger.dims(), x.device());
    let rows = p.div_ceil(d);
    let rest = Tensor::zeros([b, rows * d - p], &device);
    let passenger = if rows * d == p { passenger } else { Tensor::cat(vec![passenger, rest], 1) };
    Tensor::cat(vec![x, passenger.reshape([b, rows, d])], 1)
}

/// Tokens and vectors apart again.
fn without_passenger(x: Tensor<3>, tokens: usize, p: usize) -> (Tensor<3>, Tensor<2>) {
    let [b, all, d] = x.dims();
    let rows = all - tokens;
    let passenger = x.clone().narrow(1, tokens, rows).reshape([b, rows * d]).narrow(1, 0, p);
    (x.narrow(1, 0, tokens), passenger)
}

impl Staged for Clip {
    /// Those of the image's tower, then those of the text's.
    fn n_stages(&self) -> usize {
        self.image.n_stages() + self.text.n_stages()
    }

    fn forward_stage(&self, i: usize, flow: Flow, batch: &TokenBatch, step: Option<u64>) -> Flow {
        let (of_image, of_text) = (self.image.n_stages(), self.text.n_stages());
        if i < of_image {
            let x = self.image.forward_stage(i, flow, &self.images(batch), step);
            return if i + 1 < of_image { x } else { Flow::Hidden(self.project_images(x.hidden()).unsqueeze_dim(1)) };
        }
        let (width, tokens) = (self.config().width, batch.sequence.tokens());
        let (flow, image) = if i == of_image {
            let [b, ..] = flow_dims(&flow);
            (Flow::Start, flow.hidden().reshape([b, width]))
        } else {
            let (x, image) = without_passenger(flow.hidden(), tokens, width);
            (Flow::Hidden(x), image)
        };
        let x = self.text.forward_stage(i - of_image, flow, batch, step).hidden();
        if i + 1 < of_image + of_text {
            return Flow::Hidden(with_passenger(x, image));
        }
        Flow::Loss(self.compare(image, self.project_texts(x, &batch.sequence), batch, step))
    }

    fn first_stage(&self, param: &str) -> usize {
        let of_image = self.image.n_stages();
        match (param.strip_prefix("image."), param.strip_prefix("text.")) {
            (Some(param), _) => self.image.first_stage(param),
            (_, Some(param)) => of_image + self.text.first_stage(param),
            _ if param.starts_with("image_proj") => of_image - 1,
            _ => self.n_stages() - 1,
        }
    }

    fn uses(&self, i: usize, param: &str) -> bool {
        let of_image = self.image.n_stages();
        match (param.strip_prefix("image."), param.strip_prefix("text.")) {
            (Some(param), _) => i < of_image && self.image.uses(i, param),
            (_, Some(param)) => i >= of_image && self.text.uses(i - of_image, param),
            _ => self.first_stage(param) == i,
        }
    }

    fn placement(&self, param: &str) -> Placement {
        match (param.strip_prefix("image."), param.strip_prefix("text.")) {
            (Some(param), _) => self.image.placement(param),
            (_, Some(param)) => self.text.placement(param),
            _ => Placement::replicated(),
        }
    }
}

/// B, T and D of hidden states.
fn flow_dims(flow: &Flow) -> [usize; 3] {
    match flow {
        Flow::Hidden(x) => x.dims(),
        other => panic!("expected what the image's tower gives, got {other:?}: run the stages in order"),
    }
}
