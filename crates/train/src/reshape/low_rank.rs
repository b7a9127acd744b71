//! Matrices of low rank, from a model that has them whole.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Device;
use firebox_models::TokenBatch;
use firebox_models::transformer::{LowRank, Reduction, TransformerConfig};

use super::{ModelFolder, factor};
use crate::TrainError;
use crate::compress::layerwise::{Inputs, Layerwise, Stage};
use crate::model_io;

/// Writes the model in `input` to the folder `output` with matrices of these ranks, where they are not 0: each the product of two. Without `batches`, it is the one that is
/// closest to the matrix, by its first singular vectors; with calibration text, the one whose outputs are closest on the inputs that the stages before, factored already, give it
/// (activation-aware SVD, as in SVD-LLM, Wang et al., arXiv:2403.07378, section 3.1). Returns its shape.
///
/// # Errors
/// A model that shares layers or is of low rank already, ranks that are too large or all 0, an `output` that is there, or a file that cannot be read or written.
pub fn low_rank(
    input: &Path,
    output: &Path,
    ranks: LowRank,
    batches: Vec<TokenBatch>,
) -> Result<TransformerConfig, TrainError> {
    let model = ModelFolder::open(input)?;
    let of = model.config();
    let fail = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
    if ranks == LowRank::default() {
        return fail("the ranks", "at least one that is not 0", "none".into());
    }
    if of.reduction != (Reduction { embed_dim: of.reduction.embed_dim, ..Reduction::default() }) {
        let got = format!("{:?}", of.reduction);
        return fail("the model to factor", "one whose layers have whole matrices of their own", got);
    }
    let config = TransformerConfig { reduction: Reduction { low_rank: ranks, ..of.reduction }, ..of.clone() };
    config.validate()?;
    let device = Device::default();
    let mut walk = Layerwise::new(|| Ok(model_io::load(input, &device)?.model), batches);
    // Those of one stage.
    let mut factors: HashMap<String, [Vec<f32>; 2]> = HashMap::new();
    model.write(output, &config, |param| {
        let Some((path, side @ ("weight" | "factor"))) = param.rsplit_once('.') else { return model.read(param) };
        if rank_of(ranks, path) == 0 {
            return model.read(param);
        }
        while side == "weight" && !factors.contains_key(path) {
            if walk.next(|_, stage| factor_stage(stage, ranks, &mut factors))?.is_none() {
                break;
            }
        }
        let found = factors.get_mut(path).map(|[a, b]| std::mem::take(if side == "weight" { a } else { b }));
        if side == "factor" {
            factors.remove(path);
        }
        Ok(found.unwrap_or_default())
    })?;
    Ok(config)
}

fn rank_of(ranks: LowRank, path: &str) -> usize {
    match path {
        _ if path.ends_with("attn.qkv") => ranks.qkv,
        _ if path.ends_with("attn.out") => ranks.out,
        _ if path.ends_with("mlp.input") => ranks.input,
        _ if path.ends_with("mlp.output") => ranks.output,
        _ => 0,
    }
}

/// Puts the products in the place of the matrices, for the stages after this one to see.
fn factor_stage(
    stage: &mut Stage,
    ranks: LowRank,
    factors: &mut HashMap<String, [Vec<f32>; 2]>,
) -> Result<(), TrainError> {
    for (name, inputs) in &stage.inputs {
        let path = name.trim_end_matches(".weight");
        let rank = rank_of(ranks, path);
        let Some(weight) = stage.parameters.get_mut(name).filter(|_| rank > 0) else { continue };
        let (rows, columns) = super::sides(&weight.shape);
        let moments = inputs.clone().map(Inputs::hessian).transpose()?;
        let [a, b] = factor::low_rank(&weight.values, [rows, columns], rank, moments.as_ref())?;
        weight.values = factor::product(&a, &b, [rows, rank, columns]);
        factors.insert(path.to_owned(), [a, b]);
    }
    Ok(())
}
