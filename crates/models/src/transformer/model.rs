//! The decoder's modules and its forward pass, for one device or one rank of several.
//!
//! Shapes: `B` batch rows, `T` tokens, `D` model width, `H` heads, `K` key-value heads, `E` head width, `F` feed-forward width, `V` vocabulary.
//!
//! Deliberate differences from the reference implementations: q, k and v are one packed projection, and so are gate and up of SwiGLU (one product
//! instead of three or two); linear weights are `[in, out]` as in GPT-2's files; residual dropout alone, none on attention probabilities.

use std::sync::Arc;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_parallel::Communicator;
use firebox_tensor::ops::{self, AttentionConfig, LossConfig, PackedMatrix, Pre, RopeTable, Sequence};
use firebox_tensor::random::{Counter, Purpose, normal};

use super::adapter::Adapter;
use super::config::{ConfigError, FeedForward, NormKind, TransformerConfig};
use super::context::ContextParallel;
use super::experts::Experts;
use super::fake_quant::Quantizer;
use super::head::TaskHead;
use super::image::Patches;
use super::parallel::TensorParallel;
use super::reduction::LayerDeltas;
use super::tables::{Embedding, Projection};
use crate::placement::Placement;
use crate::stage::{Flow, Staged, TokenBatch};

/// The decoder: embedding, blocks, final norm, head.
#[derive(Module, Debug)]
pub struct Transformer {
    /// Token embedding, `[V, D]`; also the head where it is tied. Where it is factorized, its rows are narrower.
    pub embed: Embedding,
    /// From the embedding's rows to width D, where they are narrower.
    pub embed_proj: Option<Projection>,
    /// Position embedding, `[context, D]`, unless positions are rotary. An encoder's is as wide as its embedding.
    pub positions: Option<Embedding>,
    /// What images have besides the embedding, whose rows are then the values of a patch.
    pub patches: Option<Patches>,
    /// Token types, `[types, D]`, of an encoder that has such.
    pub token_types: Option<Embedding>,
    /// Norm after the embedding, of an encoder that has one.
    pub embed_norm: Option<Norm>,
    /// The blocks; of those that several layers use, one. [`layer`](Self::layer) has them in the order of their use.
    pub blocks: Vec<Block>,
    /// What each layer adds to the matrices of its block; empty where they add nothing.
    pub deltas: Vec<LayerDeltas>,
    /// Final norm, unless norms follow each addition.
    pub norm: Option<Norm>,
    /// From width D to that of the head's rows, where they are narrower.
    pub head_proj: Option<Projection>,
    /// Head, `[V, D]`, or as wide as the embedding, unless it is tied.
    pub head: Option<Embedding>,
    /// What a head has besides a table, or in its place.
    pub task_head: Option<TaskHead>,
    /// Of a student, a projection of each block's output to its teacher's width: see [`with_projections`](Self::with_projections).
    pub projections: Vec<Linear>,
    #[module(skip)]
    pub(super) context: Context,
}

/// The parameters of the first stage.
const FIRST: [&str; 6] = ["embed.", "embed_proj.", "embed_norm.", "patches.", "positions.", "token_types."];

/// What every stage needs besides parameters.
#[derive(Clone, Debug)]
pub(super) struct Context {
    config: TransformerConfig,
    attention: AttentionConfig,
    pub(super) seed: u64,
    pub(super) loss: LossConfig,
    /// The ranks among which the matrices are divided.
    parallel: Option<TensorParallel>,
    /// The ranks among which the tokens of each row are divided.
    rows: Option<ContextParallel>,
    /// Those that compute other rows at the same time, where a loss compares rows.
    pub(super) data: Option<Communicator>,
}

/// `x weight + bias`, or of low rank `x weight factor + bias`
#[derive(Module, Debug)]
pub struct Linear {
    /// `[in, out]`, or `[in, rank]`
    pub weight: Param<Tensor<2>>,
    /// `[rank, out]`, of a matrix of low rank.
    pub factor: Option<Param<Tensor<2>>>,
    /// `[out]`
    pub bias: Option<Param<Tensor<1>>>,
    /// What is used in place of the weight, see [`Transformer::with_packed`]; `[out, in]`.
    #[module(skip)]
    pub(super) packed: Option<Arc<PackedMatrix>>,
    /// How the weight is rounded, where it is trained for few bits.
    pub quantizer: Option<Quantizer>,
    /// What is trained in place of the weight, see [`Transformer::with_adapters`].
    pub adapter: Option<Adapter>,
}

/// LayerNorm or RMSNorm.
#[derive(Module, Debug)]
pub struct Norm {
    /// `[D]`, or `[E]` per head
    pub weight: Param<Tensor<1>>,
    /// `[D]`
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    kind: NormKind,
    #[module(skip)]
    eps: f64,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`; where norms follow, `norm(x + attention(x))`, then `norm(x + mlp(x))`.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before attention, or after it.
    pub attn_norm: Norm,
    /// Attention.
    pub attn: Attention,
    /// Norm before the feed-forward layer, or after it.
    pub mlp_norm: Norm,
    /// Feed-forward layer, unless there are experts.
    pub mlp: Option<Mlp>,
    /// The experts in its place.
    pub experts: Option<Experts>,
}

/// Projections around attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `D -> (H + 2 K) E`, columns `[q | k | v]`.
    pub qkv: Linear,
    /// RMSNorm of every query head, where queries and keys are normalized.
    pub q_norm: Option<Norm>,
    /// The same of every key head.
    pub k_norm: Option<Norm>,
    /// `H E -> D`
    pub out: Linear,
}

/// Projections around the activation.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `D -> F`, or `D -> 2 F` with columns `[gate | up]`.
    pub input: Linear,
    /// `F -> D`
    pub output: Linear,
    #[module(skip)]
    kind: FeedForward,
}

/// Makes initial parameters: counted normals keyed by the parameter's name and index, so that they depend on nothing else: a rank makes its part of the
/// whole alone.
pub(super) struct Init<'a> {
    counter: Counter,
    pub(super) device: &'a Device,
    pub(super) config: &'a TransformerConfig,
    rank: usize,
    size: usize,
    /// The ranks that divide the experts.
    pub(super) experts: Option<&'a Communicator>,
}

impl<'a> Init<'a> {
    /// For the part of rank `rank` of `size`.
    pub(super) fn new(
        config: &'a TransformerConfig,
        counter: Counter,
        device: &'a Device,
        (rank, size): (usize, usize),
        experts: Option<&'a Communicator>,
    ) -> Self {
        Self { counter, device, config, rank, size, experts }
    }

    /// The rank whose part is made, and how many there are.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.rank, self.size)
    }

    /// A parameter whose values are made when they are first used: never, where a checkpoint replaces them.
    pub(super) fn param<const D: usize>(
        &self,
        shape: [usize; D],
        values: impl FnOnce(&Device) -> Tensor<D> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        let init = move |device: &Device, require_grad| values(device).set_require_grad(require_grad);
        Param::uninitialized(ParamId::new(), init, self.device.clone(), true, shape.into())
    }

    fn matrix(&self, name: &str, shape: [usize; 2], std: f64) -> Param<Tensor<2>> {
        let placement = self.config.placement(&format!("{name}.weight"), self.size);
        self.placed(name, shape, std, placement, (self.rank, self.size))
    }

    /// A rank's part of a matrix, or of several.
    pub(super) fn placed<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        std: f64,
        placement: Placement,
        (rank, size): (usize, usize),
    ) -> Param<Tensor<D>> {
        let counter = self.counter.fork(name);
        let mut part = shape;
        part.copy_from_slice(&placement.shape(&shape, rank, size));
        self.param(part, move |device| {
            let indices = placement.runs(&shape, rank, size).into_iter().flatten();
            let values: Vec<f32> = indices.map(|i| (f64::from(normal(counter, i as u64)) * std) as f32).collect();
            Tensor::from_data(TensorData::new(values, part), device)
        })
    }

    /// A vector of random values that every rank has.
    pub(super) fn vector(&self, name: &str, n: usize, std: f64) -> Param<Tensor<1>> {
        self.placed(name, [n], std, Placement::replicated(), (0, 1))
    }

    /// A vector of zeros of which this rank may have a part.
    pub(super) fn divided(&self, name: &str, n: usize) -> Param<Tensor<1>> {
        self.constant(self.config.placement(name, self.size).shape(&[n], self.rank, self.size)[0], 0.0)
    }

    pub(super) fn constant(&self, n: usize, value: f32) -> Param<Tensor<1>> {
        self.param([n], move |device| Tensor::full([n], value, device))
    }

    fn embedding(&self, name: &str, shape: [usize; 2], std: f64) -> Embedding {
        Embedding { weight: self.matrix(name, shape, std), packed: None }
    }

    pub(super) fn linear(&self, name: &str, shape: [usize; 2], std: f64, bias: bool) -> Linear {
        let placement = self.config.placement(&format!("{name}.bias"), self.size);
        let width = placement.shape(&shape[1..], self.rank, self.size)[0];
        Linear::new(self.matrix(name, shape, std), bias.then(|| self.constant(width, 0.0)))
    }

    pub(super) fn norm(&self, width: usize) -> Norm {
        let config = self.config;
        let bias = config.bias && config.norm == NormKind::LayerNorm;
        Norm {
            weight: self.constant(width, 1.0),
            bias: bias.then(|| self.constant(width, 0.0)),
            kind: config.norm,
            eps: config.norm_eps,
        }
    }

    /// Of one head's queries or keys.
    fn head_norm(&self, config: &TransformerConfig) -> Norm {
        Norm { weight: self.constant(config.head_dim, 1.0), bias: None, kind: NormKind::RmsNorm, eps: config.norm_eps }
    }

    pub(super) fn block(&self, i: usize, config: &TransformerConfig) -> Block {
        let TransformerConfig { init_std: std, bias, .. } = *config;
        let residual_std = std / (2.0 * config.n_layers as f64).sqrt();
        let name = |part: &str| format!("blocks.{i}.{part}");
        let [qkv, out, input, output] = config.matrices();
        Block {
            attn_norm: self.norm(config.d_model),
            attn: Attention {
                qkv: self.low_rank(&name("attn.qkv"), qkv, std, config.has_qkv_bias()),
                q_norm: config.qk_norm.then(|| self.head_norm(config)),
                k_norm: config.qk_norm.then(|| self.head_norm(config)),
                out: self.low_rank(&name("attn.out"), out, residual_std, bias),
            },
            mlp_norm: self.norm(config.d_model),
            mlp: config.experts.is_none().then(|| Mlp {
                input: self.low_rank(&name("mlp.input"), input, std, bias),
                output: self.low_rank(&name("mlp.output"), output, residual_std, bias),
                kind: config.feed_forward,
            }),
            experts: config.experts.map(|experts| Experts::new(experts, self, &name("experts"), config, residual_std)),
        }
    }
}

impl Transformer {
    /// A model with initial parameters that are a pure function of (seed, name, index), the same on every backend.
    ///
    /// # Errors
    /// [`ConfigError`] for an impossible shape.
    pub fn new(config: &TransformerConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        Self::make(config, seed, device, None, None)
    }

    /// The part of one rank where there are several.
    pub(super) fn make(
        config: &TransformerConfig,
        seed: u64,
        device: &Device,
        parallel: Option<TensorParallel>,
        experts: Option<&Communicator>,
    ) -> Result<Self, ConfigError> {
        config.validate()?;
        let (rank, size) = parallel.as_ref().map_or((0, 1), |parallel| (parallel.rank(), parallel.size()));
        let init = Init::new(config, Counter::new(seed, Purpose::Init, 0), device, (rank, size), experts);
        let [n_heads, n_kv_heads] = config.heads(rank, size);
        let (v, d, std) = (config.vocab_size, config.d_model, config.init_std);
        let (e, types) = (config.embed_width(), config.token_types());
        let delta_layers = if config.reduction.delta_rank == 0 { 0 } else { config.n_layers };
        let rope = config.rope_frequencies().map(|turns| Arc::new(RopeTable::of_frequencies(&turns, config.context)));
        let model = Self {
            embed: init.embedding("embed", [v, e], std),
            embed_proj: (e < d).then(|| init.projection("embed_proj", [e, d], config.embed_proj_bias())),
            positions: rope.is_none().then(|| init.embedding("positions", config.positions_shape(), std)),
            patches: config.image.map(|image| init.patches(&image)),
            token_types: (types > 0).then(|| init.embedding("token_types", [types, e], std)),
            embed_norm: config.encoder.is_some_and(|encoder| encoder.embed_norm).then(|| init.norm(e)),
            blocks: (0..config.n_blocks()).map(|i| init.block(i, config)).collect(),
            deltas: (0..delta_layers).map(|i| init.deltas(i)).collect(),
            norm: (!config.norm_after()).then(|| init.norm(d)),
            head_proj: config.head_projects().then(|| init.projection("head_proj", [d, e], false)),
            head: (config.head.has_table() && !config.tied).then(|| init.embedding("head", [v, e], std)),
            task_head: init.task_head(),
            projections: vec![],
            context: Context {
                config: config.clone(),
                attention: AttentionConfig {
                    n_heads,
                    n_kv_heads,
                    head_dim: config.head_dim,
                    window: config.window,
                    softcap: config.attention_softcap,
                    rope,
                },
                seed,
                loss: LossConfig::default(),
                parallel,
                rows: None,
                data: None,
            },
        };
        Ok(model.adapted(&init))
    }

    pub(super) fn set_config(&mut self, config: TransformerConfig) {
        self.context.config = config;
    }

    /// The same parameters with what no checkpoint holds and training needs: the seed of dropout's masks, and its probability.
    ///
    /// # Errors
    /// [`ConfigError`] for a probability outside [0, 1).
    pub fn for_training(mut self, seed: u64, dropout: f64) -> Result<Self, ConfigError> {
        self.context.seed = seed;
        self.context.config.dropout = dropout;
        self.context.config.validate()?;
        Ok(self)
    }

    /// The same parameters with another loss in training; in evaluation it is the cross-entropy alone.
    pub fn with_loss(mut self, loss: LossConfig) -> Self {
        self.context.loss = loss;
        self
    }

    /// The same parameters on rows whose tokens some ranks have divided; on whole rows with `None`. The batches are then this rank's
    /// [parts](TokenBatch::part).
    pub fn with_context(mut self, rows: Option<ContextParallel>) -> Self {
        self.context.rows = rows;
        self
    }

    /// The same parameters as one of the ranks that compute other rows at the same time: an embedding's loss in training compares with the rows of all, of which each must have as many.
    pub fn with_data_ranks(mut self, ranks: Communicator) -> Self {
        self.context.data = Some(ranks);
        self
    }

    /// Its shape.
    pub fn config(&self) -> &TransformerConfig {
        &self.context.config
    }

    /// The ranks among which its matrices are divided, if they are.
    pub fn parallel(&self) -> Option<&TensorParallel> {
        self.context.parallel.as_ref()
    }

    /// The ranks among which the tokens of each row are divided, if they are.
    pub fn context_parallel(&self) -> Option<&ContextParallel> {
        self.context.rows.as_ref()
    }

    /// What only a whole model can do.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        let whole = self.parallel().is_none() && self.expert_group().is_none();
        assert!(whole, "this rank has a part of the model: put the parts together first");
    }

    pub(crate) fn attention_config(&self) -> &AttentionConfig {
        &self.context.attention
    }

    /// Attention of this rank's heads and tokens, `[B, T, H E]`.
    fn attend(&self, qkv: Tensor<3>, sequence: &Sequence) -> Tensor<3> {
        match self.context_parallel() {
            Some(rows) => rows.attention(qkv, &self.context.attention, sequence),
            None => ops::attention(qkv, &self.context.attention, sequence),
        }
    }

    /// Dropout of (step, place); none in evaluation.
    pub(super) fn drop(&self, x: Tensor<3>, sequence: &Sequence, step: Option<u64>, place: &str) -> Tensor<3> {
        match step {
            Some(step) if self.context.config.dropout > 0.0 => {
                let counter = Counter::new(self.context.seed, Purpose::Dropout, step).fork(place);
                let (first, [b, t, d]) =
                    (self.parallel().map_or(0, |parallel| parallel.first_token(sequence)), x.dims());
                let mut runs = sequence.runs(first..first + b * t);
                runs.iter_mut().for_each(|run| *run = run.start * d..run.end * d);
                ops::dropout_of(x, self.context.config.dropout, counter, &runs)
            }
            _ => x,
        }
    }
}

impl Staged for Transformer {
    /// Embedding, one per layer, head.
    fn n_stages(&self) -> usize {
        self.config().n_layers + 2
    }

    fn first_stage(&self, param: &str) -> usize {
        let number = |list: &str| param.strip_prefix(list)?.split('.').next()?.parse::<usize>().ok();
        match (number("blocks."), number("deltas.").or_else(|| number("projections."))) {
            (Some(block), _) => block * self.config().reduction.layers_per_block + 1,
            (None, Some(layer)) => layer + 1,
            _ if FIRST.iter().any(|table| param.starts_with(table)) => 0,
            _ => self.config().n_layers + 1,
        }
    }

    fn uses(&self, i: usize, param: &str) -> bool {
        let first = self.first_stage(param);
        let layers = if param.starts_with("blocks.") { self.config().reduction.layers_per_block } else { 1 };
        let tied = self.config().head.has_table() && self.head.is_none() && param.starts_with("embed.");
        (first..first + layers).contains(&i) || tied && i == self.config().n_layers + 1
    }

    fn stage_flops(&self, i: usize) -> f64 {
        let config = &self.context.config;
        match i {
            // Rows are copied, and their gradients added: a few operations per value.
            0 => (6 * (config.d_model + config.tables()[1])) as f64,
            _ if i <= config.n_layers => config.block_flops_per_token(),
            _ => (6 * (config.tables()[2] + config.tables()[3])) as f64,
        }
    }

    fn hidden_tokens(&self, batch: &TokenBatch) -> [usize; 2] {
        match self.parallel() {
            Some(parallel) => parallel.hidden_tokens(&batch.sequence),
            None => [batch.sequence.batch(), batch.sequence.tokens()],
        }
    }

    fn is_divided_expert(&self, param: &str) -> bool {
        self.expert_group().is_some() && !self.config().expert_placement(param).is_replicated()
    }

    fn placement(&self, param: &str) -> Placement {
        self.config().placement(param, self.parallel().map_or(1, TensorParallel::size))
    }

    fn forward_stage(&self, i: usize, flow: Flow, batch: &TokenBatch, step: Option<u64>) -> Flow {
        let sequence = &batch.sequence;
        if i == 0 {
            return Flow::Hidden(self.drop(self.embed_batch(batch), sequence, step, "embed"));
        }
        let x = flow.hidden();
        let Some(layer) = self.layer(i - 1) else { return self.last_stage(x, batch, step) };
        // A residual is added inside the product before it, unless dropout comes between.
        let fused = step.is_none() || self.context.config.dropout == 0.0;
        let residual = |x: &Tensor<3>| fused.then(|| x.clone());
        let join = |x: Tensor<3>, y: Tensor<3>, place: &str| {
            if fused { y } else { x + self.drop(y, sequence, step, &format!("{place}.{i}")) }
        };
        let (heads, Block { attn, attn_norm, mlp, mlp_norm, .. }) = (&self.context.attention, layer.block);
        let Some(parallel) = self.parallel() else {
            let qkv = self.related(i - 1, layer.project(x.clone(), heads), batch);
            let y = self.attend(qkv, sequence);
            let y = layer.attention_output(y, residual(&x));
            let x = self.after(attn_norm, join(x, y, "attn"));
            let y = layer.feed_forward(x.clone(), residual(&x), step.map(|_| batch.share()));
            return Flow::Hidden(self.hinted(i - 1, self.after(mlp_norm, join(x, y, "mlp")), batch));
        };
        let qkv = parallel.qkv(attn, x.clone(), layer.before(attn_norm), heads, sequence);
        let y = self.attend(qkv, sequence);
        let y = parallel.row(&attn.out, y, Pre::Nothing, residual(&x), sequence);
        let x = self.after(attn_norm, join(x, y, "attn"));
        // PANIC: no model with experts has divided matrices (`TransformerConfig::validate_parallel`).
        let mlp = mlp.as_ref().expect("a dense layer");
        let y = parallel.column(&mlp.input, x.clone(), layer.before(mlp_norm), sequence);
        let y = parallel.row(&mlp.output, y, mlp.activation(), residual(&x), sequence);
        Flow::Hidden(self.hinted(i - 1, self.after(mlp_norm, join(x, y, "mlp")), batch))
    }
}

impl Attention {
    /// `[q | k | v]` with the norms of queries and keys, where there are such.
    pub(super) fn normed(&self, qkv: Tensor<3>, config: &AttentionConfig) -> Tensor<3> {
        match (&self.q_norm, &self.k_norm) {
            (Some(q), Some(k)) => {
                let heads = [config.n_heads, config.n_kv_heads];
                ops::qk_norm(qkv, [q.weight.val(), k.weight.val()], heads, q.eps)
            }
            _ => qkv,
        }
    }
}

impl Norm {
    /// `[.., D] -> [.., D]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.forward_with(x, |param| param)
    }

    /// The same with parameters that first go through `way`.
    pub(super) fn forward_with<const D: usize>(&self, x: Tensor<D>, way: impl Fn(Tensor<1>) -> Tensor<1>) -> Tensor<D> {
        let (weight, bias) = (way(self.weight.val()), self.bias.as_ref().map(|bias| way(bias.val())));
        match self.kind {
            NormKind::LayerNorm => ops::layer_norm(x, weight, bias, self.eps),
            NormKind::RmsNorm => ops::rms_norm(x, weight, self.eps),
        }
    }

    pub(super) fn eps(&self) -> f64 {
        self.eps
    }

    /// As the first part of a linear layer.
    pub fn before(&self) -> Pre {
        let weight = self.weight.val();
        match self.kind {
            NormKind::LayerNorm => Pre::LayerNorm { weight, bias: self.bias.as_ref().map(Param::val), eps: self.eps },
            NormKind::RmsNorm => Pre::RmsNorm { weight, eps: self.eps },
        }
    }
}

impl Mlp {
    pub(super) fn activation(&self) -> Pre {
        match self.kind {
            FeedForward::Gelu => Pre::Gelu,
            FeedForward::GeluExact => Pre::GeluExact,
            FeedForward::QuickGelu => Pre::QuickGelu,
            FeedForward::SwiGlu => Pre::SwiGlu,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::transformer::presets;

    #[test]
    fn another_loss_is_for_training_alone() {
        let device = Backend::NdArray.device().unwrap();
        let config = TransformerConfig { context: 8, ..presets::depth(1, 31) };
        let batch = TokenBatch::plain(1, 4, vec![1, 2, 3, 4], vec![2, 3, 4, 5]);
        let loss = |step: Option<u64>, loss: LossConfig| -> f32 {
            Transformer::new(&config, 3, &device).unwrap().with_loss(loss).loss(&batch, step).into_scalar()
        };
        let smoothed = LossConfig { label_smoothing: 0.5, z_loss: 0.1 };
        let plain = loss(None, LossConfig::default());
        assert_eq!(plain, loss(None, smoothed));
        assert_eq!(plain, loss(Some(0), LossConfig::default()));
        assert!(loss(Some(0), smoothed) > plain + 0.5, "z-loss adds 0.1 log(31)^2");
    }
}
