//! Which matrix gets how many bits.

use std::collections::BTreeMap;

use firebox_compress::ScalarFormat;
use firebox_compress::precision::{Candidate, choose};
use firebox_compress::quantize::{Ranges, nearest};

use super::layerwise::Layerwise;
use super::pipeline::{Pipeline, Source};
use super::prune::as_matrix;
use super::recipe::Budget;
use crate::TrainError;

impl Pipeline<'_> {
    /// For each of the blocks' matrices the format of `budget` at which all together change their outputs least, relative to the outputs' size, within its bits.
    /// A matrix whose inputs are not known gets the largest.
    pub(super) fn within(
        &self,
        budget: &Budget,
        source: &Source,
    ) -> Result<BTreeMap<String, ScalarFormat>, TrainError> {
        let formats = budget.scalars()?;
        let (mut names, mut candidates, mut weights) = (vec![], vec![], 0u64);
        let mut walk = Layerwise::new(|| source.model(&self.device), self.calibration(&source.config)?);
        while let Some(stage) = walk.next(|_, _| Ok(()))? {
            for (name, inputs) in stage.inputs {
                let (Some(inputs), parameter) = (inputs, &stage.parameters[&name]) else { continue };
                let weight = as_matrix(&name, &parameter.shape, parameter.values.clone())?;
                let mut nothing = weight.clone();
                nothing.values_mut().fill(0.0);
                let hessian = inputs.hessian()?;
                let size = hessian.output_error(&weight, &nothing)?.max(f64::MIN_POSITIVE);
                let candidate = |&format: &ScalarFormat| {
                    let rounded = nearest(&weight, format, Ranges::Mse)?.dequantize();
                    let loss = hessian.output_error(&weight, &rounded)? / size;
                    Ok::<_, TrainError>(Candidate {
                        bytes: format.bits(weight.rows(), weight.cols())?.div_ceil(8),
                        loss,
                    })
                };
                candidates.push(formats.iter().map(candidate).collect::<Result<Vec<_>, _>>()?);
                weights += (weight.rows() * weight.cols()) as u64;
                names.push(name);
            }
        }
        let bytes = (weights as f64 * budget.bits_per_weight / 8.0) as u64;
        let chosen = choose(&candidates, bytes)?;
        Ok(names.into_iter().zip(chosen).map(|(name, at)| (name, formats[at])).collect())
    }
}
