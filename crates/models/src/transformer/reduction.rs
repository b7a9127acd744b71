//! Fewer parameters than a matrix for every layer: layers that share a block, with or without differences of their own, and matrices of low rank.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use firebox_tensor::ops::{self, AttentionConfig, Pre};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, TransformerConfig};
use super::head::Head;
use super::model::{Block, Init, Linear, Norm, Transformer};
use super::tables::Projection;
use crate::placement::Placement;

/// How a decoder has fewer parameters than a matrix for every layer and token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reduction {
    /// How many layers, one after the other, use the parameters of one block; divides `n_layers`. 1: each has its own. `n_layers`: all have the same (ALBERT, Lan et al.,
    /// arXiv:1909.11942, section 3.1). 2: each block is used twice in a row (MobileLLM, Liu et al., arXiv:2402.14905, section 2.3).
    pub layers_per_block: usize,
    /// Rank of what each layer adds to each of its block's matrices (Relaxed Recursive Transformers, Bae et al., arXiv:2410.20672, section 2.3); 0: nothing.
    pub delta_rank: usize,
    /// Width of the rows of embedding and head, with a projection from it to D, and one back before the head (ALBERT's factorized embedding); 0: D, without projections.
    pub embed_dim: usize,
    /// Ranks of the blocks' matrices.
    pub low_rank: LowRank,
}

/// Ranks of the matrices of each block, which are then products of two; 0: a whole matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowRank {
    /// Of queries, keys and values, side by side.
    pub qkv: usize,
    /// Of attention's output.
    pub out: usize,
    /// Of the first feed-forward matrix, gate and up side by side.
    pub input: usize,
    /// Of the second.
    pub output: usize,
}

impl LowRank {
    fn ranks(self) -> [usize; 4] {
        [self.qkv, self.out, self.input, self.output]
    }
}

impl Default for Reduction {
    /// None.
    fn default() -> Self {
        Self { layers_per_block: 1, delta_rank: 0, embed_dim: 0, low_rank: LowRank::default() }
    }
}

impl Reduction {
    /// Whether every layer has whole matrices of its own, and tokens rows as wide as the model.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn validate(&self, config: &TransformerConfig) -> Result<(), ConfigError> {
        let fail = |field, got: usize, expected: String| Err(ConfigError { field, got: got.to_string(), expected });
        if self.layers_per_block == 0 || !config.n_layers.is_multiple_of(self.layers_per_block) {
            let expected = format!("must divide n_layers = {}", config.n_layers);
            return fail("layers_per_block", self.layers_per_block, expected);
        }
        if self.delta_rank > 0 && self.layers_per_block == 1 {
            let expected = "must be 0 where each layer has a block of its own: set layers_per_block to at least 2";
            return fail("delta_rank", self.delta_rank, expected.into());
        }
        if self.embed_dim > 0 && self.embed_dim >= config.d_model {
            let expected = format!("must be less than d_model = {}, or 0 for rows of that width", config.d_model);
            return fail("embed_dim", self.embed_dim, expected);
        }
        let names = ["low_rank.qkv", "low_rank.out", "low_rank.input", "low_rank.output"];
        for (matrix, name) in config.matrices().into_iter().zip(names) {
            let smaller = matrix.inputs.min(matrix.outputs);
            for (field, rank) in [(name, matrix.rank), ("delta_rank", self.delta_rank)] {
                if rank >= smaller {
                    let expected = format!(
                        "must be less than the smaller side of a matrix of {} by {}",
                        matrix.inputs, matrix.outputs
                    );
                    return fail(field, rank, expected);
                }
            }
        }
        if config.experts.is_some() {
            for (field, rank) in [
                ("delta_rank", self.delta_rank),
                ("low_rank.input", self.low_rank.input),
                ("low_rank.output", self.low_rank.output),
            ] {
                if rank > 0 {
                    return fail(field, rank, "must be 0 with n_experts, whose matrices are whole".into());
                }
            }
        }
        Ok(())
    }

    /// Why ranks cannot divide the matrices, if they cannot.
    pub(super) fn validate_parallel(&self) -> Result<(), ConfigError> {
        let [qkv, out, input, output] = self.low_rank.ranks();
        for (field, rank) in [
            ("delta_rank", self.delta_rank),
            ("low_rank.qkv", qkv),
            ("low_rank.out", out),
            ("low_rank.input", input),
            ("low_rank.output", output),
        ] {
            if rank > 0 {
                let expected = "must be 0 with tensor parallelism, which divides whole matrices";
                return Err(ConfigError { field, got: rank.to_string(), expected: expected.into() });
            }
        }
        Ok(())
    }
}

/// The shape of a kind of matrix, the same in every block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub inputs: usize,
    pub outputs: usize,
    /// 0: full.
    pub rank: usize,
}

impl Shape {
    pub fn num_params(self) -> usize {
        if self.rank == 0 { self.inputs * self.outputs } else { self.factors(self.rank) }
    }

    /// Parameters of two factors of a matrix of this shape.
    pub fn factors(self, rank: usize) -> usize {
        rank * (self.inputs + self.outputs)
    }
}

/// The matrices of a block, by the names under which a layer's differences are.
const NAMES: [&str; 4] = ["qkv", "out", "input", "output"];
/// Where they are in a block.
const PATHS: [&str; 4] = ["attn.qkv", "attn.out", "mlp.input", "mlp.output"];

impl TransformerConfig {
    /// How many blocks have parameters of their own.
    pub fn n_blocks(&self) -> usize {
        self.n_layers / self.reduction.layers_per_block.max(1)
    }

    /// The block whose parameters layer `layer` uses.
    pub fn block_of(&self, layer: usize) -> usize {
        layer / self.reduction.layers_per_block.max(1)
    }

    /// Width of the rows of embedding and head.
    pub fn embed_width(&self) -> usize {
        if self.reduction.embed_dim == 0 { self.d_model } else { self.reduction.embed_dim }
    }

    /// Queries, keys and values; attention's output; the feed-forward layer's (or an expert's) two.
    pub(super) fn matrices(&self) -> [Shape; 4] {
        let (d, ranks) = (self.d_model, self.reduction.low_rank.ranks());
        let heads = self.n_heads * self.head_dim;
        let sides = [(d, self.qkv_width()), (heads, d), (d, self.ff_in_width()), (self.d_ff, d)];
        std::array::from_fn(|i| Shape { inputs: sides[i].0, outputs: sides[i].1, rank: ranks[i] })
    }

    /// Parameters of the embedding, the projection after it, the head and the projection before it.
    pub(super) fn tables(&self) -> [usize; 4] {
        let (e, d) = (self.embed_width(), self.d_model);
        let (table, projection) = (self.vocab_size * e, if e < d { e * d } else { 0 });
        let bias = if self.embed_proj_bias() { d } else { 0 };
        let head = if self.head.has_table() { table } else { 0 };
        [table, projection + bias, head, if self.head_projects() { projection } else { 0 }]
    }

    /// Whether the projection after the embedding has a bias, as ALBERT's.
    pub(super) fn embed_proj_bias(&self) -> bool {
        self.encoder.is_some() && self.bias && self.embed_width() < self.d_model
    }

    /// Whether the head's rows are narrower than the model and a projection leads to them; that of a masked language model is part of its transform.
    pub(super) fn head_projects(&self) -> bool {
        self.head == Head::Language && self.embed_width() < self.d_model
    }

    /// Names and shapes of what layers add to their blocks' matrices.
    pub(super) fn delta_shapes(&self) -> Vec<(String, [usize; 2])> {
        let r = self.reduction.delta_rank;
        let layers = if r == 0 { 0 } else { self.n_layers };
        let of_layer = |layer: usize| {
            self.matrices().into_iter().zip(NAMES).flat_map(move |(matrix, name)| {
                let path = |factor: &str| format!("deltas.{layer}.{name}.{factor}");
                [(path("down"), [matrix.inputs, r]), (path("up"), [r, matrix.outputs])]
            })
        };
        (0..layers).flat_map(of_layer).collect()
    }

    /// The shape of the decoder that computes the same with a whole matrix for every layer and rows of width D: what other programs can load.
    pub fn expanded(&self) -> Self {
        let tied = self.tied && self.reduction.embed_dim == 0;
        Self { reduction: Reduction::default(), tied, ..self.clone() }
    }

    /// What the parameter of this name (its path in the module) of the [expanded](Self::expanded) decoder is made of.
    pub fn source(&self, param: &str) -> Source {
        let whole = |name: String| Source { whole: Some(name), products: vec![] };
        let reduction = &self.reduction;
        match param {
            "embed.weight" if reduction.embed_dim > 0 => {
                let factors = ["embed.weight", "embed_proj.weight"].map(String::from);
                return Source { whole: None, products: vec![Product { factors, transposed: false }] };
            }
            // [V, E] times the transposed [D, E].
            "head.weight" if reduction.embed_dim > 0 => {
                let table = if self.tied { "embed.weight" } else { "head.weight" };
                let factors = [table, "head_proj.weight"].map(String::from);
                return Source { whole: None, products: vec![Product { factors, transposed: true }] };
            }
            _ => {}
        }
        let Some((layer, path)) = param.strip_prefix("blocks.").and_then(|rest| {
            let (layer, path) = rest.split_once('.')?;
            Some((layer.parse::<usize>().ok()?, path))
        }) else {
            return whole(param.into());
        };
        let block = format!("blocks.{}", self.block_of(layer));
        let matrix = path.strip_suffix(".weight").and_then(|path| PATHS.iter().position(|known| *known == path));
        let Some(i) = matrix else { return whole(format!("{block}.{path}")) };
        let product = |factors| Product { factors, transposed: false };
        let mut products = vec![];
        if reduction.low_rank.ranks()[i] > 0 {
            products.push(product([format!("{block}.{path}"), format!("{block}.{}.factor", PATHS[i])]));
        }
        if reduction.delta_rank > 0 {
            products.push(product(["down", "up"].map(|factor| format!("deltas.{layer}.{}.{factor}", NAMES[i]))));
        }
        let full = reduction.low_rank.ranks()[i] == 0;
        Source { whole: full.then(|| format!("{block}.{path}")), products }
    }
}

/// What a parameter of an expanded decoder is made of: the sum of a parameter and of products of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A parameter as it is.
    pub whole: Option<String>,
    /// What is added to it.
    pub products: Vec<Product>,
}

/// The product of two parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// Their names.
    pub factors: [String; 2],
    /// Whether the second is transposed first.
    pub transposed: bool,
}

/// What one layer adds to the matrices of the block that it shares.
#[derive(Module, Debug)]
pub struct LayerDeltas {
    /// To queries, keys and values.
    pub qkv: Delta,
    /// To attention's output.
    pub out: Delta,
    /// To the first feed-forward matrix.
    pub input: Delta,
    /// To the second.
    pub output: Delta,
}

/// A matrix of low rank that is added to another.
#[derive(Module, Debug)]
pub struct Delta {
    /// `[in, rank]`
    pub down: Param<Tensor<2>>,
    /// `[rank, out]`
    pub up: Param<Tensor<2>>,
}

impl Delta {
    /// `pre(x) down up + residual`
    fn forward<const D: usize>(&self, x: Tensor<D>, pre: Pre, residual: Option<Tensor<D>>) -> Tensor<D> {
        let x = ops::fused_linear(x, pre, self.down.val(), None, None);
        ops::fused_linear(x, Pre::Nothing, self.up.val(), None, residual)
    }
}

/// Initial values.
impl Init<'_> {
    /// One of a block's matrices. The product of two factors has the standard deviation of a whole matrix.
    pub(super) fn low_rank(&self, name: &str, shape: Shape, std: f64, bias: bool) -> Linear {
        let Shape { inputs, outputs, rank } = shape;
        if rank == 0 {
            return self.linear(name, [inputs, outputs], std, bias);
        }
        let std = (std / (rank as f64).sqrt()).sqrt();
        let factor = Some(self.replicated(&format!("{name}.factor"), [rank, outputs], std));
        let weight = self.replicated(name, [inputs, rank], std);
        Linear { factor, ..Linear::new(weight, bias.then(|| self.constant(outputs, 0.0))) }
    }

    pub(super) fn replicated(&self, name: &str, shape: [usize; 2], std: f64) -> Param<Tensor<2>> {
        self.placed(name, shape, std, Placement::replicated(), (0, 1))
    }

    pub(super) fn projection(&self, name: &str, shape: [usize; 2], bias: bool) -> Projection {
        let weight = self.replicated(name, shape, self.config.init_std);
        Projection { weight, bias: bias.then(|| self.constant(shape[1], 0.0)) }
    }

    /// As in LoRA, nothing is added at first.
    pub(super) fn deltas(&self, layer: usize) -> LayerDeltas {
        let (rank, std) = (self.config.reduction.delta_rank, self.config.init_std);
        let [qkv, out, input, output] = self.config.matrices();
        let delta = |name: &str, shape: Shape| Delta {
            down: self.replicated(&format!("deltas.{layer}.{name}.down"), [shape.inputs, rank], std),
            up: self.param([rank, shape.outputs], move |device| Tensor::zeros([rank, shape.outputs], device)),
        };
        LayerDeltas {
            qkv: delta("qkv", qkv),
            out: delta("out", out),
            input: delta("input", input),
            output: delta("output", output),
        }
    }
}

/// One layer: a block, and what the layer adds to its matrices.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its parameters, which other layers may use as well.
    pub block: &'a Block,
    pub(super) deltas: Option<&'a LayerDeltas>,
    pub(super) norm_after: bool,
}

impl Transformer {
    /// Layer `i`; none if there are fewer.
    pub fn layer(&self, i: usize) -> Option<Layer<'_>> {
        let block = self.blocks.get(self.config().block_of(i))?;
        Some(Layer { block, deltas: self.deltas.get(i), norm_after: self.config().norm_after() })
    }
}

fn apply<const D: usize>(
    linear: &Linear,
    delta: Option<&Delta>,
    x: Tensor<D>,
    pre: &dyn Fn() -> Pre,
    residual: Option<Tensor<D>>,
) -> Tensor<D> {
    match delta {
        None => linear.forward(x, pre(), residual),
        Some(delta) => {
            let own = delta.forward(x.clone(), pre(), residual);
            linear.forward(x, pre(), Some(own))
        }
    }
}

impl Layer<'_> {
    /// What comes before attention or the feed-forward layer, of which this is the norm: nothing where norms come after.
    pub(super) fn before(&self, norm: &Norm) -> Pre {
        if self.norm_after { Pre::Nothing } else { norm.before() }
    }

    /// The input of attention or the feed-forward layer, of which this is the norm.
    pub(super) fn input(&self, norm: &Norm, x: Tensor<3>) -> Tensor<3> {
        if self.norm_after { x } else { norm.forward(x) }
    }

    /// `[q | k | v]` of attention, not yet rotated; `[B, T, D] -> [B, T, (H + 2 K) E]`
    pub(crate) fn project(&self, x: Tensor<3>, config: &AttentionConfig) -> Tensor<3> {
        let Block { attn, attn_norm, .. } = self.block;
        let delta = self.deltas.map(|deltas| &deltas.qkv);
        attn.normed(apply(&attn.qkv, delta, x, &|| self.before(attn_norm), None), config)
    }

    /// Attention's output from its heads, and the residual; `[B, T, H E] -> [B, T, D]`
    pub(crate) fn attention_output(&self, y: Tensor<3>, residual: Option<Tensor<3>>) -> Tensor<3> {
        let delta = self.deltas.map(|deltas| &deltas.out);
        apply(&self.block.attn.out, delta, y, &|| Pre::Nothing, residual)
    }

    /// The feed-forward layer before its activation, `[B, T, D] -> [B, T, F]`, or twice as wide for SwiGLU; none where there are experts.
    pub(crate) fn inner(&self, x: Tensor<3>) -> Option<Tensor<3>> {
        let Block { mlp, mlp_norm, .. } = self.block;
        let delta = self.deltas.map(|deltas| &deltas.input);
        mlp.as_ref().map(|mlp| apply(&mlp.input, delta, x, &|| self.before(mlp_norm), None))
    }

    /// What follows [`inner`](Self::inner), and the residual.
    pub(crate) fn outer(&self, y: Tensor<3>, residual: Option<Tensor<3>>) -> Option<Tensor<3>> {
        let delta = self.deltas.map(|deltas| &deltas.output);
        let mlp = self.block.mlp.as_ref();
        mlp.map(|mlp| apply(&mlp.output, delta, y, &|| mlp.activation(), residual))
    }

    /// `x`'s feed-forward layer or experts, and the residual; `[B, T, D] -> [B, T, D]`. `share` is that of the batch in its step, in training.
    pub(crate) fn feed_forward(&self, x: Tensor<3>, residual: Option<Tensor<3>>, share: Option<f64>) -> Tensor<3> {
        if let Some(experts) = &self.block.experts {
            return experts.forward(self.block.mlp_norm.forward(x), residual, share);
        }
        let y = self.inner(x).and_then(|y| self.outer(y, residual));
        // PANIC: `Init::block` makes experts or a dense layer.
        y.expect("a block with a feed-forward layer")
    }
}
