//! Weights become integers of few bits.

use std::collections::BTreeMap;
use std::path::Path;

use firebox_compress::quantize::{self, Gptq, Ranges, awq, gptq, smooth_scales};
use firebox_models::Layered;
use firebox_models::transformer::Transformer;

use super::layerwise::{Inputs, Stage};
use super::pipeline::{Pipeline, Progress, Source};
use super::prune::{matrix, set_matrix};
use super::recipe::{Quantize, QuantizeMethod, is_matrix};
use super::rewrite::Formats;
use crate::TrainError;
use crate::model_io::later;
use crate::quantized::Weights;

impl Pipeline<'_> {
    pub(super) fn quantize(
        &self,
        step: &Quantize,
        source: &Source,
        into: &Path,
        on: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), TrainError> {
        let mut formats = formats(step, &source.model(&self.device)?)?;
        if let Some(budget) = &step.budget {
            formats.extend(self.within(budget, source)?);
        }
        let batches = if step.method.is_calibrated() { self.calibration(&source.config)? } else { vec![] };
        self.rewrite(source, into, &formats, batches, on, |model, stage| quantize_stage(model, stage, step, &formats))
    }
}

/// What becomes of which parameter: the blocks' matrices, embedding and head.
fn formats(step: &Quantize, model: &Transformer) -> Result<Formats, TrainError> {
    let format = step.scalar()?;
    let of = |name: &str, dims: usize| match name {
        "embed.weight" | "head.weight" => step.tables.format(),
        _ => is_matrix(name, dims).then_some(format),
    };
    let found = later(model).into_iter().map(|(info, _)| (of(&info.name, info.shape.len()), info.name));
    Ok(found.filter_map(|(format, name)| Some((name, format?))).collect())
}

/// Quantizes what `formats` names of a stage, and leaves in the stage what that computes with.
fn quantize_stage(
    model: &Transformer,
    stage: &mut Stage,
    step: &Quantize,
    formats: &Formats,
) -> Result<BTreeMap<String, Weights>, TrainError> {
    let mut made = BTreeMap::new();
    let mut inputs: BTreeMap<String, Inputs> =
        std::mem::take(&mut stage.inputs).into_iter().filter_map(|(name, found)| Some((name, found?))).collect();
    // From the last to the first: what scales the inputs of a later matrix goes into the outputs of an earlier one, which is not yet quantized then.
    let known: Vec<String> = model.matrices(stage.number).into_iter().rev().collect();
    let others = stage.parameters.keys().filter(|name| !known.contains(name)).cloned();
    let names: Vec<String> = known.iter().cloned().chain(others).filter(|name| formats.contains_key(name)).collect();
    for name in names {
        let format = formats[&name];
        let mut weight = matrix(&name, stage)?;
        let quantized = match (step.method, inputs.remove(&name)) {
            (QuantizeMethod::Gptq, Some(inputs)) => {
                let options = Gptq { act_order: step.act_order, ..Gptq::default() };
                gptq(&weight, &inputs.hessian()?, format, &options)?
            }
            (QuantizeMethod::Awq, Some(inputs)) if !model.scaled_before(&name).is_empty() => {
                let clip = format.group_len(weight.rows(), weight.cols())? < weight.cols();
                let mean_abs = inputs.mean_abs.clone();
                let mut found = awq(&[&weight], &mean_abs, &inputs.hessian()?, format, clip)?;
                divide_before(model, stage, &name, &found.scales);
                // PANIC: one for each weight that was given.
                found.quantized.pop().expect("one weight")
            }
            (QuantizeMethod::Smoothquant, Some(inputs)) if !model.scaled_before(&name).is_empty() => {
                let scales = smooth_scales(&inputs.max_abs, &[&weight], step.alpha)?;
                divide_before(model, stage, &name, &scales);
                weight = weight.scaled_columns(&scales)?;
                quantize::nearest(&weight, format, Ranges::Absmax)?
            }
            (QuantizeMethod::Mse | QuantizeMethod::Awq, _) => quantize::nearest(&weight, format, Ranges::Mse)?,
            _ => quantize::nearest(&weight, format, Ranges::Absmax)?,
        };
        set_matrix(&name, stage, quantized.dequantize());
        made.insert(name, Weights::Quantized(quantized));
    }
    Ok(made)
}

/// Divides what makes a matrix's inputs.
fn divide_before(model: &Transformer, stage: &mut Stage, matrix: &str, scales: &[f32]) {
    for scaled in model.scaled_before(matrix) {
        let Some(parameter) = stage.parameters.get_mut(&scaled.param) else { continue };
        let width = parameter.shape.last().copied().unwrap_or(1).max(1);
        for row in parameter.values.chunks_exact_mut(width) {
            row[scaled.columns.clone()].iter_mut().zip(scales).for_each(|(v, s)| *v /= s);
        }
    }
}
