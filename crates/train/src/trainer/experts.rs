//! How the experts of a mixture are kept busy.

use burn::tensor::Device;
use firebox_models::transformer::{Transformer, TransformerConfig};
use firebox_tensor::device::is_fused;

use super::Trainer;
use crate::TrainError;
use crate::ranks::{Layout, Zero};
use crate::task::Model;

/// The balancing loss is an operation of the CPU backends.
pub(super) fn check_device(config: &TransformerConfig, device: &Device) -> Result<(), TrainError> {
    let aux = config.experts.map_or(0.0, |experts| experts.router_aux_loss);
    if aux > 0.0 && !is_fused(device) {
        let expected = "0 on this backend: model.router_bias_rate balances without a loss".into();
        return Err(TrainError::Input { what: "model.router_aux_loss", expected, got: aux.to_string() });
    }
    Ok(())
}

/// What ranks cannot do with experts.
pub(super) fn check_layout(config: &TransformerConfig, layout: &Layout, batch_grows: bool) -> Result<(), TrainError> {
    let fail = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
    if layout.ep > 1 && batch_grows {
        let expected = "none with ep: the ranks that divide the experts need as many micro-batches each in every step";
        return fail("train.batch_warmup", expected, "one".into());
    }
    let Some(experts) = &config.experts else { return Ok(()) };
    let of_whole_rows = experts.router_aux_loss > 0.0 || experts.capacity_factor > 0.0;
    if layout.cp > 1 && of_whole_rows {
        let expected = "1 with a balancing loss or a capacity of experts, which are of all tokens of a micro-batch; \
                        model.router_bias_rate balances without";
        return fail("cp", expected, layout.cp.to_string());
    }
    if layout.zero == Zero::Parameters && experts.router_bias_rate > 0.0 {
        let expected = "0, 1 or 2 with model.router_bias_rate: biases are on every rank";
        return fail("zero", expected, "3".into());
    }
    Ok(())
}

impl<M: Model> Trainer<'_, M> {
    /// How many tokens of the step chose each expert, on all ranks; empty without experts.
    pub(super) fn expert_load(&self) -> Result<Vec<u64>, TrainError> {
        let load = self.model().transformer().map(Transformer::take_expert_load).unwrap_or_default();
        match &self.ranks {
            Some(ranks) if !load.is_empty() => Ok(ranks.sum_counts(&load)?),
            _ => Ok(load),
        }
    }

    /// Moves the experts' biases after a step, where there are such. The load of the busiest expert over the mean of its block, in the worst block.
    pub(super) fn balance_experts(&mut self, load: &[u64]) -> Option<f64> {
        let model = self.model.take()?;
        let n = model.transformer().and_then(|model| model.config().experts).map_or(0, |experts| experts.n_experts);
        self.model = Some(model.map_transformer(|model| model.balance_experts(load)));
        let uneven = |load: &[u64]| {
            let total: u64 = load.iter().sum();
            let most = load.iter().max().copied().unwrap_or(0);
            (total > 0).then(|| most as f64 * load.len() as f64 / total as f64)
        };
        if n == 0 { None } else { load.chunks(n).filter_map(uneven).reduce(f64::max) }
    }
}
