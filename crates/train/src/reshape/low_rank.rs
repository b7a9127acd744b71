//! Matrices of low rank, from a model that has them whole.

use std::collections::HashMap;
use std::path::Path;

use firebox_models::decoder::{DecoderConfig, LowRank, Reduction};

use super::{ModelFolder, factor};
use crate::TrainError;

/// Writes the model in `input` to the folder `output` with matrices of these ranks, where they are not 0: the products of two that are closest, by singular vectors. `scales` says of a matrix, by path
/// (`blocks.0.attn.qkv.weight`), the root mean square of each of its inputs, where that is known: then what is small is the error of what the matrix makes of such inputs
/// (activation-aware SVD, Yuan et al., arXiv:2312.05821, section 3.2). Returns its shape.
///
/// # Errors
/// A model that is of low rank already, ranks that are too large or all 0, scales of another length, an `output` that is there, or a file that cannot be read or written.
pub fn low_rank(
    input: &Path,
    output: &Path,
    ranks: LowRank,
    scales: &HashMap<String, Vec<f32>>,
) -> Result<DecoderConfig, TrainError> {
    let model = ModelFolder::open(input)?;
    let of = model.config();
    let fail = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
    if ranks == LowRank::default() {
        return fail("the ranks", "at least one that is not 0", "none".into());
    }
    if of.reduction.low_rank != LowRank::default() {
        let got = format!("{:?}", of.reduction.low_rank);
        return fail("the model to factor", "one with whole matrices", got);
    }
    let config = DecoderConfig { reduction: Reduction { low_rank: ranks, ..of.reduction }, ..of.clone() };
    config.validate()?;
    let of_path = |path: &str| match path {
        _ if path.ends_with("attn.qkv") => ranks.qkv,
        _ if path.ends_with("attn.out") => ranks.out,
        _ if path.ends_with("mlp.input") => ranks.input,
        _ if path.ends_with("mlp.output") => ranks.output,
        _ => 0,
    };
    // Of two factors the first is asked for first, and the second is kept until it is.
    let mut second = vec![];
    model.write(output, &config, |param| {
        let Some((path, side @ ("weight" | "factor"))) = param.rsplit_once('.') else { return model.read(param) };
        let rank = of_path(path);
        if rank == 0 {
            return model.read(param);
        }
        if side == "factor" {
            return Ok(std::mem::take(&mut second));
        }
        let name = format!("{path}.weight");
        let (rows, columns) = super::sides(model.shape(&name)?);
        let scales = scales.get(&name).map(|scales| positive(scales));
        if let Some(scales) = scales.as_ref().filter(|scales| scales.len() != rows) {
            let (expected, got) = (format!("{rows} of {name}"), scales.len().to_string());
            return Err(TrainError::Input { what: "the scales", expected, got });
        }
        let [a, b] = factor::low_rank(&model.read(&name)?, [rows, columns], rank, scales.as_deref());
        second = b;
        Ok(a)
    })?;
    Ok(config)
}

/// Inputs that are never there count little, not nothing: a scale is divided by.
fn positive(scales: &[f32]) -> Vec<f32> {
    let largest = scales.iter().fold(0f32, |most, scale| most.max(*scale));
    let least = if largest > 0.0 && largest.is_finite() { largest * 1e-3 } else { 1.0 };
    scales.iter().map(|scale| scale.max(least)).collect()
}
