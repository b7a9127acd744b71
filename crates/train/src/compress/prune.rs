//! Weights become zero.

use std::collections::BTreeMap;
use std::path::Path;

use firebox_compress::Matrix;
use firebox_compress::prune::{Mask, SparseGpt, Sparsity, magnitude, magnitude_global, sparsegpt, wanda};
use firebox_models::transformer::packed::{from_matrix, to_matrix};

use super::layerwise::{Inputs, Stage, Values};
use super::pipeline::{Pipeline, Progress, Source};
use super::recipe::{Prune, PruneMethod, is_matrix};
use super::rewrite::Formats;
use crate::TrainError;
use crate::model_io::later;

impl Pipeline<'_> {
    pub(super) fn prune(
        &self,
        step: &Prune,
        source: &Source,
        into: &Path,
        on: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), TrainError> {
        let batches = if step.method.is_calibrated() { self.calibration(&source.config)? } else { vec![] };
        let mut masks = match step.method {
            PruneMethod::GlobalMagnitude => global(source, &self.device, step.sparsity)?,
            _ => BTreeMap::new(),
        };
        self.rewrite(source, into, &Formats::new(), batches, on, |_, stage| {
            let inputs = std::mem::take(&mut stage.inputs).into_iter();
            let mut inputs: BTreeMap<String, Inputs> =
                inputs.filter_map(|(name, found)| Some((name, found?))).collect();
            let names = stage.parameters.iter().filter(|(name, p)| is_matrix(name, p.shape.len()));
            for name in names.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
                let mut weight = matrix(&name, stage)?;
                match (step.method, inputs.remove(&name)) {
                    (PruneMethod::GlobalMagnitude, _) => {
                        // PANIC: there is one of every matrix.
                        masks.remove(&name).expect("a mask").apply(&mut weight)?;
                    }
                    (PruneMethod::Wanda, Some(inputs)) => {
                        wanda(&weight, &inputs.norms(), step.sparsity)?.apply(&mut weight)?;
                    }
                    (PruneMethod::SparseGpt, Some(inputs)) => {
                        weight = sparsegpt(&weight, &inputs.hessian()?, step.sparsity, &SparseGpt::default())?;
                    }
                    // Experts, whose inputs nobody has seen, too.
                    _ => magnitude(&weight, step.sparsity)?.apply(&mut weight)?,
                }
                set_matrix(&name, stage, weight);
            }
            Ok(BTreeMap::new())
        })
    }
}

/// The masks of all matrices, which are all in memory for it.
fn global(
    source: &Source,
    device: &burn::tensor::Device,
    sparsity: Sparsity,
) -> Result<BTreeMap<String, Mask>, TrainError> {
    let mut weights = vec![];
    for (info, values) in later(&source.model(device)?) {
        if is_matrix(&info.name, info.shape.len()) {
            weights.push((as_matrix(&info.name, &info.shape, values())?, info.name));
        }
    }
    let masks = magnitude_global(&weights.iter().map(|(weight, _)| weight).collect::<Vec<_>>(), sparsity)?;
    Ok(weights.into_iter().map(|(_, name)| name).zip(masks).collect())
}

/// Values of a parameter as `[out, in]`.
pub(super) fn as_matrix(name: &str, shape: &[usize], values: Vec<f32>) -> Result<Matrix, TrainError> {
    // Tables have a row for each token.
    let cols = if name.starts_with("blocks.") { shape[shape.len() - 2] } else { shape[shape.len() - 1] };
    Ok(Matrix::new(values.len() / cols.max(1), cols, to_matrix(name, shape, values))?)
}

/// A parameter of a stage as `[out, in]`.
pub(super) fn matrix(name: &str, stage: &Stage) -> Result<Matrix, TrainError> {
    let Values { shape, values } = &stage.parameters[name];
    as_matrix(name, shape, values.clone())
}

/// Puts it back.
pub(super) fn set_matrix(name: &str, stage: &mut Stage, weight: Matrix) {
    if let Some(parameter) = stage.parameters.get_mut(name) {
        parameter.values = from_matrix(name, &parameter.shape, weight.into_values());
    }
}
