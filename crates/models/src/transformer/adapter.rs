//! Adapters: few parameters that are trained in place of a linear layer's own, which stay as they are.
//!
//! LoRA (Hu et al., arXiv:2106.09685) adds a product of low rank: `x W + s (x A) B`, with `s = alpha / rank`. DoRA (Liu et al., arXiv:2402.09353) scales the columns of
//! what comes out as well: with `V = W + s A B`, output column j is multiplied by `m_j / |V_j|`, whose norm takes part in no gradient (section 4.3).
//!
//! What other programs have as several layers is packed into one here: `[q | k | v]`, `[gate | up]`. The adapter of such a layer has an `A` and a `B` for each of the
//! chosen pieces: the `A`s side by side are one product, and each piece's part of it goes through its `B` into the piece's columns.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use firebox_tensor::ops::{self, Pre, to_f32, to_host};
use firebox_tensor::random::{Counter, Purpose};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, FeedForward, TransformerConfig};
use super::model::{Init, Linear, Transformer};
use crate::placement::Placement;

/// A kind of adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// A product of low rank.
    Lora,
    /// The same, and the norms of the columns.
    Dora,
}

/// Adapters in a transformer, whose other parameters are not trained then, but for those of a head that makes classes or values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Of what kind.
    pub kind: AdapterKind,
    /// R: inner width of the products.
    pub rank: usize,
    /// What the products are scaled by, times the rank.
    pub alpha: f64,
    /// Whether the scale is alpha over the root of the rank (rsLoRA, Kalajdzievski, arXiv:2312.03732).
    #[serde(default, skip_serializing_if = "is_false")]
    pub rslora: bool,
    /// Which layers have one.
    pub targets: Targets,
}

fn is_false(flag: &bool) -> bool {
    !*flag
}

impl AdapterConfig {
    /// What products are multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// A linear layer of a block as other programs have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Queries, keys and values as one layer, as in GPT-2.
    Packed,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Attention's output.
    Out,
    /// SwiGLU's gate.
    Gate,
    /// Into the feed-forward layer; of SwiGLU, what its gate multiplies.
    Up,
    /// Out of it.
    Down,
}

impl Target {
    /// All, in the order of their names.
    pub const ALL: [Self; 8] =
        [Self::Packed, Self::Query, Self::Key, Self::Value, Self::Out, Self::Gate, Self::Up, Self::Down];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Packed => "c_attn",
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Out => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }
}

/// Some of the layers of each block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Targets(u8);

impl Targets {
    /// These.
    pub fn new(targets: impl IntoIterator<Item = Target>) -> Self {
        Self(targets.into_iter().fold(0, |set, target| set | 1 << target as u8))
    }

    /// Every linear layer of a transformer of this shape: queries, keys and values as one, where its class has them so.
    pub fn all(config: &TransformerConfig, packed: bool) -> Self {
        let gated = config.feed_forward == FeedForward::SwiGlu;
        Self::new(Target::ALL.into_iter().filter(|target| match target {
            Target::Packed => packed,
            Target::Query | Target::Key | Target::Value => !packed,
            Target::Gate => gated && config.experts.is_none(),
            Target::Up | Target::Down => config.experts.is_none(),
            Target::Out => true,
        }))
    }

    /// Whether it is one of them.
    pub fn has(self, target: Target) -> bool {
        self.0 & 1 << target as u8 != 0
    }

    /// They, in the order of [`Target::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Target> {
        Target::ALL.into_iter().filter(move |target| self.has(*target))
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A name that is no layer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no linear layer of a block: they are c_attn (queries, keys and values as one), q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
)]
pub struct UnknownTarget(String);

impl FromStr for Target {
    type Err = UnknownTarget;

    fn from_str(name: &str) -> Result<Self, UnknownTarget> {
        Self::ALL.into_iter().find(|target| target.name() == name).ok_or_else(|| UnknownTarget(name.into()))
    }
}

impl TryFrom<Vec<String>> for Targets {
    type Error = UnknownTarget;

    fn try_from(names: Vec<String>) -> Result<Self, UnknownTarget> {
        Ok(Self::new(names.iter().map(|name| name.parse()).collect::<Result<Vec<Target>, _>>()?))
    }
}

impl From<Targets> for Vec<String> {
    fn from(targets: Targets) -> Self {
        targets.iter().map(|target| target.name().to_owned()).collect()
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Vec::from(*self).join(", "))
    }
}

/// The adapter of a layer, without its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapted {
    /// Its pieces, as columns of the layer.
    pub pieces: Vec<Range<usize>>,
    /// Names (paths in the module) and shapes of its parameters.
    pub shapes: Vec<(String, Vec<usize>)>,
}

/// The matrices of a block, by their names in it, with those of the layers that are packed in each, in the order of its columns.
const MATRICES: [(&str, &[Target]); 4] = [
    ("attn.qkv", &[Target::Query, Target::Key, Target::Value]),
    ("attn.out", &[Target::Out]),
    ("mlp.input", &[Target::Gate, Target::Up]),
    ("mlp.output", &[Target::Down]),
];

/// A parameter of an adapter: `blocks.0.attn.qkv.adapter.down` is `down` of `blocks.0.attn.qkv`.
pub(super) fn of_adapter(param: &str) -> Option<(&str, &str)> {
    param.rsplit_once(".adapter.")
}

/// The matrix of a block, by its number in [`MATRICES`], that a layer is: `blocks.0.attn.qkv`.
fn matrix_of(layer: &str) -> Option<usize> {
    MATRICES.iter().position(|(name, _)| layer.ends_with(name))
}

impl TransformerConfig {
    pub(super) fn validate_adapter(&self) -> Result<(), ConfigError> {
        let Some(adapter) = &self.adapter else { return Ok(()) };
        let fail = |field, got: String, expected: String| Err(ConfigError { field, got, expected });
        let smallest = self.matrices().iter().map(|matrix| matrix.inputs.min(matrix.outputs)).min().unwrap_or(0);
        if adapter.rank == 0 || adapter.rank > smallest {
            let expected = format!("must be from 1 to {smallest}, the smallest side of a matrix");
            return fail("adapter.rank", adapter.rank.to_string(), expected);
        }
        if !(adapter.alpha > 0.0 && adapter.alpha.is_finite()) {
            return fail("adapter.alpha", adapter.alpha.to_string(), "must be positive".into());
        }
        let targets = adapter.targets;
        if targets.is_empty() {
            return fail("adapter.targets", "none".into(), "must name at least one layer".into());
        }
        let one_of_three = [Target::Query, Target::Key, Target::Value].into_iter().find(|target| targets.has(*target));
        if let (true, Some(target)) = (targets.has(Target::Packed), one_of_three) {
            let expected = "must have c_attn, which is all three, or some of q_proj, k_proj and v_proj";
            return fail("adapter.targets", format!("c_attn and {}", target.name()), expected.into());
        }
        if targets.has(Target::Gate) && self.feed_forward != FeedForward::SwiGlu {
            let expected = "must be without it: this feed-forward layer has no gate";
            return fail("adapter.targets", "gate_proj".into(), expected.into());
        }
        let of_experts = [Target::Gate, Target::Up, Target::Down].into_iter().find(|target| targets.has(*target));
        if let (Some(_), Some(target)) = (&self.experts, of_experts) {
            let expected = "must be layers of attention with n_experts";
            return fail("adapter.targets", target.name().into(), expected.into());
        }
        if self.matrices().iter().any(|matrix| matrix.rank > 0) || self.reduction.delta_rank > 0 {
            let expected = "must not be there beside matrices of low rank or layers' own deltas";
            return fail("adapter", "one".into(), expected.into());
        }
        Ok(())
    }

    /// Whether a layer of a matrix has an adapter, for each stretch of its columns.
    fn adapted(&self, matrix: usize) -> Vec<bool> {
        let stretches = self.stretches(matrix, 1).len();
        let Some(adapter) = &self.adapter else { return vec![false; stretches] };
        let packed = matrix == 0 && adapter.targets.has(Target::Packed);
        // A feed-forward layer without a gate has the last of the two.
        let layers = MATRICES[matrix].1;
        layers[layers.len() - stretches..].iter().map(|layer| packed || adapter.targets.has(*layer)).collect()
    }

    /// The pieces of a matrix's adapter, as columns of the part that rank `rank` of `size` has.
    fn pieces(&self, matrix: usize, rank: usize, size: usize) -> Vec<Range<usize>> {
        let stretches = self.stretches(matrix, size).into_iter();
        let widths = stretches.map(|stretch| {
            let whole = [stretch.units * stretch.width];
            let divided = matrix.is_multiple_of(2);
            if divided { Placement::split(0, [stretch]).shape(&whole, rank, size)[0] } else { whole[0] }
        });
        let ends = widths.scan(0, |end, width| {
            *end += width;
            Some(*end - width..*end)
        });
        let pieces: Vec<Range<usize>> =
            ends.zip(self.adapted(matrix)).filter_map(|(piece, adapted)| adapted.then_some(piece)).collect();
        match &self.adapter {
            Some(adapter) if matrix == 0 && adapter.targets.has(Target::Packed) => {
                pieces.last().map(|last| 0..last.end).into_iter().collect()
            }
            _ => pieces,
        }
    }

    /// Names and shapes of the parameters of the adapter of a matrix of block `block`.
    fn adapter_shapes(&self, block: usize, matrix: usize) -> Vec<(String, Vec<usize>)> {
        let (pieces, Some(adapter)) = (self.pieces(matrix, 0, 1), &self.adapter) else { return vec![] };
        if pieces.is_empty() || matrix >= 2 && self.experts.is_some() {
            return vec![];
        }
        let (columns, inputs) = (pieces.iter().map(Range::len).sum(), self.matrices()[matrix].inputs);
        let name = |field: &str| format!("blocks.{block}.{}.adapter.{field}", MATRICES[matrix].0);
        let mut shapes =
            vec![(name("down"), vec![inputs, pieces.len() * adapter.rank]), (name("up"), vec![adapter.rank, columns])];
        if adapter.kind == AdapterKind::Dora {
            shapes.push((name("magnitude"), vec![columns]));
        }
        shapes
    }

    /// Parameters of all adapters.
    pub(super) fn adapter_params(&self) -> usize {
        let of_block: usize = (0..4)
            .flat_map(|matrix| self.adapter_shapes(0, matrix))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        self.n_blocks() * of_block
    }

    /// Of the adapter of a layer (`blocks.0.attn.qkv`), if it has one.
    pub fn adapter_of(&self, layer: &str) -> Option<Adapted> {
        let block = layer.strip_prefix("blocks.")?.split('.').next()?.parse().ok()?;
        let matrix = matrix_of(layer)?;
        let shapes = self.adapter_shapes(block, matrix);
        (!shapes.is_empty()).then(|| Adapted { pieces: self.pieces(matrix, 0, 1), shapes })
    }

    /// How ranks divide a parameter of the adapter of a layer: what multiplies their inputs, or what makes their columns.
    pub(super) fn adapter_placement(&self, layer: &str, field: &str, size: usize) -> Placement {
        let Some(matrix) = matrix_of(layer) else { return Placement::replicated() };
        if !matrix.is_multiple_of(2) {
            return match field {
                "down" => self.placement(&format!("{layer}.weight"), size),
                _ => Placement::replicated(),
            };
        }
        let stretches = self.stretches(matrix, size).into_iter().zip(self.adapted(matrix));
        let chosen: Vec<_> = stretches.filter_map(|(stretch, adapted)| adapted.then_some(stretch)).collect();
        match field {
            "up" => Placement::split(1, chosen),
            "magnitude" => Placement::split(0, chosen),
            _ => Placement::replicated(),
        }
    }
}

/// What is trained in place of a linear layer's weight.
#[derive(Module, Debug)]
pub struct Adapter {
    /// A of each piece side by side, `[in, P R]`
    pub down: Param<Tensor<2>>,
    /// B of each piece side by side, `[R, columns of the pieces]`
    pub up: Param<Tensor<2>>,
    /// The length of each column, of DoRA; `[columns of the pieces]`
    pub magnitude: Option<Param<Tensor<1>>>,
    /// The columns of each piece.
    #[module(skip)]
    pieces: Arc<[Range<usize>]>,
    #[module(skip)]
    scale: f64,
}

impl Adapter {
    /// `x A`, of each piece; `[.., in] -> [.., P R]`
    pub(super) fn down<const D: usize>(&self, x: Tensor<D>, pre: Pre, down: Tensor<2>) -> Tensor<D> {
        ops::fused_linear(x, pre, down, None, None)
    }

    /// How many columns of the pieces are before this one of the layer.
    pub(super) fn columns_before(&self, column: usize) -> usize {
        self.pieces.iter().map(|piece| piece.len().min(column.saturating_sub(piece.start))).sum()
    }

    /// `y` with what `low`, which [`down`](Self::down) made, adds to it.
    pub(super) fn add<const D: usize>(&self, y: Tensor<D>, low: Tensor<D>, up: Tensor<2>) -> Tensor<D> {
        ops::add_low_rank(y, low, up, &self.pieces, self.scale)
    }

    /// Of each column of the pieces the sum of the squares of `weight + s A B`, `[columns of the pieces]`; takes part in no gradient.
    pub(super) fn squares(&self, weight: Tensor<2>) -> Tensor<1> {
        let (down, up) = (self.down.val().detach(), self.up.val().detach());
        let (rank, mut first) = (up.dims()[0], 0);
        let of_piece = |(i, piece): (usize, &Range<usize>)| {
            let a = down.clone().narrow(1, i * rank, rank);
            let b = up.clone().narrow(1, first, piece.len());
            first += piece.len();
            let whole = weight.clone().narrow(1, piece.start, piece.len()) + a.matmul(b) * self.scale;
            (whole.clone() * whole).sum_dim(0)
        };
        let squares: Vec<Tensor<2>> = self.pieces.iter().enumerate().map(of_piece).collect();
        let squares = Tensor::cat(squares, 1);
        let n = squares.dims()[1];
        squares.reshape([n])
    }

    /// `y`, of which each column of the pieces is made as long as `magnitude` says, where `squares` are those of its weight; plus bias and residual.
    pub(super) fn resize<const D: usize>(
        &self,
        y: Tensor<D>,
        magnitude: Tensor<1>,
        squares: Tensor<1>,
        bias: Option<Tensor<1>>,
        residual: Option<Tensor<D>>,
    ) -> Tensor<D> {
        let (gains, width, device) = (magnitude / squares.sqrt(), y.dims()[D - 1], y.device());
        let ones = |n: usize| Tensor::<1>::ones([n], &device);
        let (mut parts, mut at, mut first) = (vec![], 0, 0);
        for piece in self.pieces.iter() {
            if at < piece.start {
                parts.push(ones(piece.start - at));
            }
            parts.push(gains.clone().narrow(0, first, piece.len()));
            (at, first) = (piece.end, first + piece.len());
        }
        if at < width {
            parts.push(ones(width - at));
        }
        let y = y * Tensor::cat(parts, 0).unsqueeze::<D>();
        let y = match bias {
            Some(bias) => y + bias.unsqueeze::<D>(),
            None => y,
        };
        match residual {
            Some(residual) => y + residual,
            None => y,
        }
    }
}

/// Puts an adapter into the weight of its layer, `[in, out]`: afterwards the layer computes the same alone. `values` are those of its parameters, in the order of
/// [`Adapted::shapes`].
///
/// # Panics
/// If a length does not fit.
pub fn merge(weight: &mut [f32], adapted: &Adapted, values: &[Vec<f32>], scale: f64) {
    let ([(_, of_down), (_, of_up), ..], [down, up, magnitude @ ..]) = (&adapted.shapes[..], values) else {
        panic!("an adapter has two products")
    };
    let (width, rank, columns) = (of_down[1], of_up[0], of_up[1]);
    assert_eq!((down.len(), up.len()), (of_down[0] * width, rank * columns), "adapter: values of another shape");
    let (inputs, scale) = (of_down[0], scale as f32);
    assert!(weight.len().is_multiple_of(inputs), "adapter: a weight of {} values for {inputs} inputs", weight.len());
    let outputs = weight.len() / inputs;
    let mut first = 0;
    for (i, piece) in adapted.pieces.iter().enumerate() {
        weight.chunks_exact_mut(outputs).zip(down.chunks_exact(width)).for_each(|(row, a)| {
            let row = &mut row[piece.clone()];
            for (r, a) in a[i * rank..(i + 1) * rank].iter().enumerate() {
                let b = &up[r * columns + first..][..row.len()];
                row.iter_mut().zip(b).for_each(|(w, b)| *w += scale * a * b);
            }
        });
        if let [magnitude] = magnitude {
            let mut squares = vec![0f64; piece.len()];
            for row in weight.chunks_exact(outputs) {
                squares.iter_mut().zip(&row[piece.clone()]).for_each(|(sum, w)| *sum += f64::from(*w) * f64::from(*w));
            }
            let lengths = squares.iter().zip(&magnitude[first..]);
            let gains: Vec<f32> = lengths.map(|(sum, m)| (f64::from(*m) / sum.sqrt()) as f32).collect();
            weight.chunks_exact_mut(outputs).for_each(|row| {
                row[piece.clone()].iter_mut().zip(&gains).for_each(|(w, gain)| *w *= gain);
            });
        }
        first += piece.len();
    }
}

impl Linear {
    /// Its weight as it is, in f32, without a gradient.
    pub(super) fn plain_weight(&self) -> Tensor<2> {
        let Some(packed) = &self.packed else { return plain(&self.weight) };
        let [outputs, inputs] = packed.shape();
        let values = TensorData::new(packed.dequantized(), [outputs, inputs]);
        Tensor::<2>::from_data(values, &self.weight.lazy_device()).transpose()
    }
}

fn plain(weight: &Param<Tensor<2>>) -> Tensor<2> {
    let weight = weight.val();
    match weight.device().is_autodiff() {
        true => Tensor::from_inner(to_f32(weight.inner())),
        false => to_f32(weight),
    }
}

impl Init<'_> {
    /// The adapter of a linear layer of a block, if it has one. A has the variance of PEFT's first values (uniform up to the root of one over the inputs), B is zero: so that
    /// nothing is added at first, and no column of DoRA changes its length.
    pub(super) fn adapter(&self, layer: &str, linear: &Linear) -> Option<Adapter> {
        let (config, (rank, size)) = (self.config, self.place());
        let Adapted { shapes, .. } = config.adapter_of(layer)?;
        let pieces: Arc<[Range<usize>]> = config.pieces(matrix_of(layer)?, rank, size).into();
        let placed = |i: usize| {
            let (name, shape) = &shapes[i];
            (name, [shape[0], shape[1]], config.placement(name, size))
        };
        let (name, shape, placement) = placed(0);
        let down = self.placed(name, shape, 1.0 / (3.0 * shape[0] as f64).sqrt(), placement, (rank, size));
        let (_, shape, placement) = placed(1);
        let part = placement.shape(&shape, rank, size);
        let part = [part[0], part[1]];
        let up = self.param(part, move |device| Tensor::zeros(part, device));
        let magnitude = (shapes.len() > 2).then(|| {
            let (weight, pieces) = (linear.weight.clone(), pieces.clone());
            let n = pieces.iter().map(Range::len).sum();
            self.param([n], move |device| {
                let weight = plain(&weight).detach();
                let lengths = |piece: &Range<usize>| {
                    let columns = weight.clone().narrow(1, piece.start, piece.len());
                    (columns.clone() * columns).sum_dim(0).sqrt()
                };
                let lengths: Vec<Tensor<2>> = pieces.iter().map(lengths).collect();
                let values = to_host(Tensor::cat(lengths, 1));
                Tensor::from_data(TensorData::new(values, [n]), device)
            })
        });
        let scale = config.adapter.map_or(0.0, |adapter| adapter.scale());
        Some(Adapter { down, up, magnitude, pieces, scale })
    }
}

/// Parameters that are trained beside adapters: those of a head that the model did not have before.
fn is_trained_head(param: &str) -> bool {
    param.starts_with("task_head.")
}

impl Transformer {
    /// The same transformer with adapters, and its own parameters as they are, not to be trained.
    ///
    /// # Errors
    /// [`ConfigError`] for a rank or layers that it cannot have.
    pub fn with_adapters(mut self, adapter: AdapterConfig, seed: u64) -> Result<Self, ConfigError> {
        self.assert_whole();
        let config = TransformerConfig { adapter: Some(adapter), ..self.config().clone() };
        config.validate()?;
        let device = self.embed.weight.lazy_device();
        self.set_config(config.clone());
        let init = Init::new(&config, Counter::new(seed, Purpose::Init, 0), &device, (0, 1), None);
        Ok(self.adapted(&init))
    }

    /// The same, made with a model.
    pub(super) fn adapted(self, init: &Init<'_>) -> Self {
        if init.config.adapter.is_none() {
            return self;
        }
        let keep = init.config.head.outputs().is_some();
        let mut model = freeze(self, &|name| !(keep && is_trained_head(name)));
        model.linear_layers().for_each(|(name, linear)| linear.adapter = init.adapter(&name, linear));
        model
    }

    /// The plain transformer that computes the same: its adapters are in its weights.
    pub fn merged(mut self) -> Self {
        if self.config().adapter.is_none() {
            return self;
        }
        let config = TransformerConfig { adapter: None, ..self.config().clone() };
        let of_adapter = self.config().clone();
        let scale = of_adapter.adapter.map_or(0.0, |adapter| adapter.scale());
        self.linear_layers().for_each(|(name, linear)| {
            let Some((adapter, adapted)) = linear.adapter.take().zip(of_adapter.adapter_of(&name)) else { return };
            let magnitude = adapter.magnitude.map(|m| to_host(m.val()));
            let values: Vec<Vec<f32>> =
                [to_host(adapter.down.val()), to_host(adapter.up.val())].into_iter().chain(magnitude).collect();
            let weight = linear.plain_weight();
            let (shape, device) = (weight.dims(), weight.device());
            let mut whole = to_host(weight);
            merge(&mut whole, &adapted, &values, scale);
            let weight = Tensor::from_data(TensorData::new(whole, shape), &device);
            linear.packed = None;
            linear.weight = Param::initialized(linear.weight.id, weight.set_require_grad(device.is_autodiff()));
        });
        self.set_config(config);
        self
    }
}

/// The module, in which the parameters whose name (the path in the module) is `frozen` are not trained.
pub fn freeze<M: Module>(module: M, frozen: &dyn Fn(&str) -> bool) -> M {
    struct Freeze<'a> {
        path: Vec<String>,
        frozen: &'a dyn Fn(&str) -> bool,
    }
    impl burn::module::ModuleMapper for Freeze<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if (self.frozen)(&self.path.join(".")) { param.set_require_grad(false) } else { param }
        }
    }
    module.map(&mut Freeze { path: vec![], frozen })
}

#[cfg(test)]
mod tests;
