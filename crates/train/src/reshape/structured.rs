//! Structures taken out of a model: groups of heads, feed-forward units, layers, width. What remains is a smaller model of the same kind.
//!
//! Every layer loses as many, so that one shape describes them all. [`Importance`] says which: measured on text, or from weights alone, or made by the caller.

use std::collections::HashMap;
use std::path::Path;

use firebox_models::TokenBatch;
use firebox_models::transformer::{FeedForward, TransformerConfig};

use super::{ModelFolder, sides};
use crate::TrainError;
use crate::compress::layerwise::Layerwise;
use crate::model_io;

/// How many of each are taken out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removal {
    /// Key-value heads of each layer, with the query heads that use them.
    pub kv_heads: usize,
    /// Units of each feed-forward layer.
    pub units: usize,
    /// Layers.
    pub layers: usize,
    /// Channels of the residual stream.
    pub width: usize,
}

/// How much each structure counts; the least go first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Importance {
    /// Of each key-value head with its query heads, for each block: the norm of what it adds to the residual stream.
    pub kv_heads: Vec<Vec<f64>>,
    /// Of each feed-forward unit, for each block, likewise; empty with experts.
    pub units: Vec<Vec<f64>>,
    /// Block influence: one minus the mean cosine of the hidden states before and after each layer (ShortGPT, Men et al., arXiv:2403.03853, section 3.1); empty without text.
    pub layers: Vec<f64>,
    /// Of each channel of the residual stream: its mean absolute value after the norms (Minitron, Muralidharan et al., arXiv:2407.14679, section 2.2); without text, the norm of the embedding's column.
    pub width: Vec<f64>,
}

impl Importance {
    /// Measures the model in `input` on calibration text, stage by stage, or, without `batches`, by its weights.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub fn measure(input: &Path, batches: Vec<TokenBatch>) -> Result<Self, TrainError> {
        let model = ModelFolder::open(input)?;
        let config = model.config();
        let device = Default::default();
        // Of each matrix's inputs, the root mean square and the mean absolute value.
        let mut inputs: HashMap<String, [Vec<f32>; 2]> = HashMap::new();
        let mut importance = Self::default();
        if !batches.is_empty() {
            let mut walk = Layerwise::new(|| Ok(model_io::load(input, &device)?.model), batches);
            while let Some(stage) = walk.next(|_, _| Ok(()))? {
                importance.layers.extend(stage.cosine.map(|cosine| 1.0 - cosine));
                for (name, seen) in stage.inputs {
                    inputs.extend(seen.map(|seen| (name, [seen.rms(), seen.mean_abs])));
                }
            }
        }
        let rms = |path: &str| inputs.get(&format!("{path}.weight")).map(|[rms, _]| rms.as_slice());
        for block in 0..config.n_blocks() {
            let path = format!("blocks.{block}.attn.out");
            let rows = row_norms(&model, &path)?;
            let scores = scaled(&rows, rms(&path));
            let group = config.n_heads / config.n_kv_heads * config.head_dim;
            let squares = scores.chunks(group).map(|group| group.iter().map(|x| x * x).sum::<f64>().sqrt());
            importance.kv_heads.push(squares.collect());
            if config.experts.is_none() {
                let path = format!("blocks.{block}.mlp.output");
                importance.units.push(scaled(&row_norms(&model, &path)?, rms(&path)));
            }
        }
        importance.width = vec![0.0; config.d_model];
        for block in 0..config.n_blocks() {
            for path in ["attn.qkv", "mlp.input"] {
                let Some([_, mean_abs]) = inputs.get(&format!("blocks.{block}.{path}.weight")) else { continue };
                importance.width.iter_mut().zip(mean_abs).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        if inputs.is_empty() {
            let name = if config.reduction.embed_dim > 0 { "embed_proj.weight" } else { "embed.weight" };
            let mut squares = vec![0.0; config.d_model];
            for row in model.read(name)?.chunks_exact(config.d_model) {
                squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            }
            importance.width = squares.into_iter().map(f64::sqrt).collect();
        }
        Ok(importance)
    }
}

/// The norm of each row of a matrix.
fn row_norms(model: &ModelFolder, path: &str) -> Result<Vec<f64>, TrainError> {
    let name = format!("{path}.weight");
    let (_, columns) = sides(model.shape(&name)?);
    let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    Ok(model.read(&name)?.chunks_exact(columns.max(1)).map(norm).collect())
}

fn scaled(norms: &[f64], rms: Option<&[f32]>) -> Vec<f64> {
    match rms {
        Some(rms) => norms.iter().zip(rms).map(|(norm, rms)| norm * f64::from(*rms)).collect(),
        None => norms.to_vec(),
    }
}

/// What remains, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Key-value heads of each block.
    pub kv_heads: Vec<Vec<usize>>,
    /// Units of each block's feed-forward layer; empty with experts.
    pub units: Vec<Vec<usize>>,
    /// Layers.
    pub layers: Vec<usize>,
    /// Channels.
    pub width: Vec<usize>,
}

impl Kept {
    /// All but the least important.
    ///
    /// # Errors
    /// [`TrainError::Input`]: more to be taken out than there is (at least one of each remains), layers without their influence or of blocks that are shared, units of experts, importances of another model, or of them one
    /// that is no number.
    pub fn of(config: &TransformerConfig, removal: Removal, importance: &Importance) -> Result<Self, TrainError> {
        let fail = |what, expected: String, got: String| Err(TrainError::Input { what, expected, got });
        let Removal { kv_heads, units, layers, width } = removal;
        for (what, remove, there) in [
            ("key-value heads to remove", kv_heads, config.n_kv_heads),
            ("feed-forward units to remove", units, config.d_ff),
            ("layers to remove", layers, config.n_layers),
            ("channels to remove", width, config.d_model),
        ] {
            if remove >= there {
                return fail(what, format!("fewer than the model's {there}"), remove.to_string());
            }
        }
        if layers > 0 && config.reduction.layers_per_block > 1 {
            let got = format!("{} layers per block", config.reduction.layers_per_block);
            return fail("layers to remove", "0 from a model whose layers share blocks".into(), got);
        }
        if layers > 0 && importance.layers.is_empty() {
            let expected = "calibration text, on which the influence of layers is measured".into();
            return fail("layers to remove", expected, "none".into());
        }
        if units > 0 && config.experts.is_some() {
            let expected = "0 from a model with experts, of which each sees other tokens".into();
            return fail("feed-forward units to remove", expected, units.to_string());
        }
        if width > 0 && config.reduction.embed_dim > 0 && config.d_model - width <= config.reduction.embed_dim {
            let expected = format!("a width that stays above embed_dim = {}", config.reduction.embed_dim);
            return fail("channels to remove", expected, width.to_string());
        }
        let keep = |what, there: usize, remove: usize, scores: Option<&Vec<f64>>| match scores {
            // Nothing is chosen.
            _ if remove == 0 => Ok((0..there).collect()),
            Some(scores) if scores.len() == there && scores.iter().all(|score| score.is_finite()) => {
                let mut order: Vec<usize> = (0..there).collect();
                // Of equals the first stay.
                order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
                order.truncate(there - remove);
                order.sort_unstable();
                Ok(order)
            }
            scores => {
                let got = scores.map_or(0, |scores| scores.iter().filter(|score| score.is_finite()).count());
                Err(TrainError::Input { what, expected: format!("{there} finite numbers"), got: got.to_string() })
            }
        };
        let blocks = 0..config.n_blocks();
        let heads = |b| keep("importance of heads", config.n_kv_heads, kv_heads, importance.kv_heads.get(b));
        let inner = |b| keep("importance of units", config.d_ff, units, importance.units.get(b));
        Ok(Self {
            kv_heads: blocks.clone().map(heads).collect::<Result<_, _>>()?,
            units: if config.experts.is_some() { vec![] } else { blocks.map(inner).collect::<Result<_, _>>()? },
            layers: keep("importance of layers", config.n_layers, layers, Some(&importance.layers))?,
            width: keep("importance of channels", config.d_model, width, Some(&importance.width))?,
        })
    }
}

/// What the indices along a dimension of a parameter are.
#[derive(Clone, Copy)]
enum Axis {
    Channels,
    /// `[q | k | v]`
    Qkv,
    /// Query heads.
    Heads,
    /// Units, twice for SwiGLU.
    Inner,
    Units,
    Other,
}

/// The axes of a matrix of a block by its name, inputs and outputs.
fn axes(matrix: &str) -> [Axis; 2] {
    match matrix {
        "qkv" => [Axis::Channels, Axis::Qkv],
        "out" => [Axis::Heads, Axis::Channels],
        "input" => [Axis::Channels, Axis::Inner],
        "output" => [Axis::Units, Axis::Channels],
        _ => [Axis::Other; 2],
    }
}

/// The axes of a parameter.
fn axes_of(param: &str, config: &TransformerConfig) -> Vec<Axis> {
    use Axis::{Channels, Inner, Other, Units};
    let narrow = config.reduction.embed_dim > 0;
    let low = config.reduction.low_rank;
    match param.split('.').collect::<Vec<_>>()[..] {
        ["embed" | "head", _] => vec![Other, if narrow { Other } else { Channels }],
        ["embed_proj" | "positions", _] => vec![Other, Channels],
        ["head_proj", _] => vec![Channels, Other],
        ["norm", _] | ["blocks", _, "attn_norm" | "mlp_norm", _] => vec![Channels],
        ["blocks", _, "experts", "router", _] => vec![Channels, Other],
        ["blocks", _, "experts", "input", _] => vec![Other, Channels, Inner],
        ["blocks", _, "experts", "output", _] => vec![Other, Units, Channels],
        ["blocks", _, "attn" | "mlp", matrix @ ("qkv" | "out" | "input" | "output"), part] => {
            let [inputs, outputs] = axes(matrix);
            let rank = match matrix {
                "qkv" => low.qkv,
                "out" => low.out,
                "input" => low.input,
                _ => low.output,
            };
            match part {
                "bias" => vec![outputs],
                "factor" => vec![Other, outputs],
                _ if rank > 0 => vec![inputs, Other],
                _ => vec![inputs, outputs],
            }
        }
        ["deltas", _, matrix, "down"] => vec![axes(matrix)[0], Other],
        ["deltas", _, matrix, "up"] => vec![Other, axes(matrix)[1]],
        // Norms of heads, and the experts' biases.
        _ => vec![Other],
    }
}

/// Writes the model in `input` without what [`Kept`] leaves out to the folder `output`. Returns its shape.
///
/// Norms take the mean over fewer channels: their gains are scaled so that channels that were zero can go without a change (for RMSNorm exactly; LayerNorm's mean is over fewer, too).
///
/// # Errors
/// A model that cannot be read, ranks that are too large for what remains, an `output` that is there, or a full disk.
pub fn remove(input: &Path, output: &Path, kept: &Kept) -> Result<TransformerConfig, TrainError> {
    let model = ModelFolder::open(input)?;
    let old = model.config();
    let heads = old.n_heads / old.n_kv_heads;
    let n_kv_heads = kept.kv_heads.first().map_or(old.n_kv_heads, Vec::len);
    let config = TransformerConfig {
        d_model: kept.width.len(),
        n_layers: kept.layers.len(),
        n_heads: n_kv_heads * heads,
        n_kv_heads,
        d_ff: kept.units.first().map_or(old.d_ff, Vec::len),
        ..old.clone()
    };
    let gain = (old.d_model as f64 / config.d_model as f64).sqrt();
    model.write(output, &config, |param| {
        // The layers that remain are numbered anew; blocks that several share all remain.
        let mut path: Vec<String> = param.split('.').map(str::to_owned).collect();
        let mut block = 0;
        if let [list, number, ..] = &mut path[..]
            && (list == "blocks" || list == "deltas")
        {
            let new: usize = number.parse().unwrap_or(0);
            let alone = old.reduction.layers_per_block == 1;
            let from = if alone { kept.layers.get(new).copied().unwrap_or(new) } else { new };
            block = if list == "deltas" { old.block_of(from) } else { from };
            *number = from.to_string();
        }
        let from = path.join(".");
        let width = |indices: &[usize], first: usize| indices.iter().map(|i| first + i).collect::<Vec<_>>();
        let of_heads = |heads: usize, first: usize| -> Vec<usize> {
            let each = heads * old.head_dim;
            let kept = kept.kv_heads.get(block).into_iter().flatten();
            kept.flat_map(|group| first + group * each..first + (group + 1) * each).collect()
        };
        let units = || kept.units.get(block).cloned().unwrap_or_else(|| (0..old.d_ff).collect());
        let indices = |axis: Axis| match axis {
            Axis::Channels => Some(kept.width.clone()),
            Axis::Heads => Some(of_heads(heads, 0)),
            Axis::Qkv => {
                let (queries, keys) = (old.n_heads * old.head_dim, old.n_kv_heads * old.head_dim);
                Some([of_heads(heads, 0), of_heads(1, queries), of_heads(1, queries + keys)].concat())
            }
            Axis::Units => Some(units()),
            Axis::Inner if old.feed_forward == FeedForward::SwiGlu => {
                Some([units(), width(&units(), old.d_ff)].concat())
            }
            Axis::Inner => Some(units()),
            Axis::Other => None,
        };
        let (shape, mut values) = (model.shape(&from)?, model.read(&from)?);
        let mut dims = shape.to_vec();
        for (dim, axis) in axes_of(&from, old).into_iter().enumerate() {
            let Some(indices) = indices(axis) else { continue };
            values = take(&values, &dims, dim, &indices);
            dims[dim] = indices.len();
        }
        let is_gain = path.iter().any(|part| ["norm", "attn_norm", "mlp_norm"].contains(&part.as_str()));
        if is_gain && from.ends_with(".weight") {
            values.iter_mut().for_each(|value| *value = (f64::from(*value) * gain) as f32);
        }
        Ok(values)
    })?;
    Ok(config)
}

/// These indices of one dimension.
fn take(values: &[f32], shape: &[usize], dim: usize, indices: &[usize]) -> Vec<f32> {
    let inner: usize = shape[dim + 1..].iter().product();
    let outer: usize = shape[..dim].iter().product();
    let at = |o: usize, i: usize| (o * shape[dim] + i) * inner;
    (0..outer).flat_map(|o| indices.iter().flat_map(move |&i| at(o, i)..at(o, i) + inner)).map(|i| values[i]).collect()
}
