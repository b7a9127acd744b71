//! Layers that share blocks, from a model whose layers have their own.

use std::path::Path;

use firebox_models::transformer::{Reduction, TransformerConfig};

use super::{ModelFolder, factor};
use crate::TrainError;

/// Writes the model in `input` to the folder `output` with one block for every `layers_per_block` layers, one after the other: the mean of theirs. With a `delta_rank`, each layer adds to each matrix its
/// difference from the mean, as well as that rank can (Relaxed Recursive Transformers, Bae et al., arXiv:2410.20672, section 2.3). Returns its shape; it is there to be
/// trained on.
///
/// # Errors
/// A model whose layers share already or are of low rank, numbers that do not divide, a rank that saves nothing, an `output` that is there, or a file that cannot be read or
/// written.
pub fn share(
    input: &Path,
    output: &Path,
    layers_per_block: usize,
    delta_rank: usize,
) -> Result<TransformerConfig, TrainError> {
    let model = ModelFolder::open(input)?;
    let of = model.config();
    let reduction = of.reduction;
    if reduction != (Reduction { embed_dim: reduction.embed_dim, ..Reduction::default() }) {
        let expected = "a model whose layers have whole matrices of their own".into();
        return Err(TrainError::Input { what: "the model to share", expected, got: format!("{reduction:?}") });
    }
    let config = TransformerConfig { reduction: Reduction { layers_per_block, delta_rank, ..reduction }, ..of.clone() };
    config.validate()?;
    // Of two factors the first is asked for first, and the second is kept until it is.
    let mut second = vec![];
    model.write(output, &config, |param| match param.split('.').collect::<Vec<_>>()[..] {
        ["blocks", block, ..] => mean(&model, param, block, layers_per_block),
        ["deltas", _, _, "up"] => Ok(std::mem::take(&mut second)),
        ["deltas", layer, matrix, _] => {
            let layer: usize = layer.parse().unwrap_or(0);
            let path = match matrix {
                "qkv" => "attn.qkv",
                "out" => "attn.out",
                "input" => "mlp.input",
                _ => "mlp.output",
            };
            let block = (layer / layers_per_block).to_string();
            let shared = mean(&model, &format!("blocks.{block}.{path}.weight"), &block, layers_per_block)?;
            let name = format!("blocks.{layer}.{path}.weight");
            let own = model.read(&name)?;
            let difference: Vec<f32> = own.iter().zip(shared).map(|(own, shared)| own - shared).collect();
            let (rows, columns) = super::sides(model.shape(&name)?);
            let [down, up] = factor::low_rank(&difference, [rows, columns], delta_rank, None)?;
            second = up;
            Ok(down)
        }
        _ => model.read(param),
    })?;
    Ok(config)
}

/// The mean of a parameter over the layers of a block.
fn mean(model: &ModelFolder, param: &str, block: &str, layers: usize) -> Result<Vec<f32>, TrainError> {
    let path = param.splitn(3, '.').nth(2).unwrap_or_default();
    let first = block.parse::<usize>().unwrap_or(0) * layers;
    let mut sum: Vec<f64> = vec![];
    for layer in first..first + layers {
        let values = model.read(&format!("blocks.{layer}.{path}"))?;
        sum.resize(values.len(), 0.0);
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
    }
    Ok(sum.into_iter().map(|sum| (sum / layers as f64) as f32).collect())
}
