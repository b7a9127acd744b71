//! How the experts of a mixture are kept busy.

use burn::tensor::Device;
use firebox_models::decoder::DecoderConfig;
use firebox_tensor::device::is_fused;

use super::Trainer;
use crate::TrainError;
use crate::ranks::{Layout, Zero};

/// The balancing loss is an operation of the CPU backends.
pub(super) fn check_device(config: &DecoderConfig, device: &Device) -> Result<(), TrainError> {
    let aux = config.experts.map_or(0.0, |experts| experts.router_aux_loss);
    if aux > 0.0 && !is_fused(device) {
        let expected = "0 on this backend: model.router_bias_rate balances without a loss".into();
        return Err(TrainError::Input { what: "model.router_aux_loss", expected, got: aux.to_string() });
    }
    Ok(())
}

impl Trainer<'_> {
    /// What ranks cannot do with a mixture of experts.
    pub(super) fn check_experts(&self, layout: &Layout) -> Result<(), TrainError> {
        let Some(experts) = self.model.as_ref().and_then(|model| model.config().experts) else { return Ok(()) };
        let Layout { zero, dp_replicate, cp, ep, .. } = *layout;
        let fail = |what, expected: &str, got: usize| {
            Err(TrainError::Input { what, expected: expected.into(), got: got.to_string() })
        };
        if cp > 1 {
            return fail("cp", "1 with experts, whose load is balanced over all tokens of a micro-batch", cp);
        }
        if zero == Zero::Parameters && ep > 1 {
            return fail("zero", "0, 1 or 2 with ep, which divides most parameters already", 3);
        }
        if zero == Zero::Parameters && experts.router_bias_rate > 0.0 {
            let expected =
                "0, 1 or 2 with model.router_bias_rate, whose biases each rank keeps; or model.router_aux_loss";
            return fail("zero", expected, 3);
        }
        if dp_replicate > 1 && ep > 1 {
            return fail(
                "dp-replicate",
                "1 with ep, whose ranks divide what zero says among all with the same experts",
                dp_replicate,
            );
        }
        Ok(())
    }

    /// How many tokens of the step chose each expert, on all ranks; empty without experts.
    pub(super) fn expert_load(&self) -> Result<Vec<u64>, TrainError> {
        let load = self.model().take_expert_load();
        match &self.ranks {
            Some(ranks) if !load.is_empty() => Ok(ranks.sum_counts(&load)?),
            _ => Ok(load),
        }
    }

    /// Moves the experts' biases after a step, where there are such. The load of the busiest expert over the mean of its block, in the worst block.
    pub(super) fn balance_experts(&mut self, load: &[u64]) -> Option<f64> {
        let model = self.model.take()?;
        let n = model.config().experts.map_or(0, |experts| experts.n_experts);
        self.model = Some(model.balance_experts(load));
        let uneven = |load: &[u64]| {
            let total: u64 = load.iter().sum();
            let most = load.iter().max().copied().unwrap_or(0);
            (total > 0).then(|| most as f64 * load.len() as f64 / total as f64)
        };
        if n == 0 { None } else { load.chunks(n).filter_map(uneven).reduce(f64::max) }
    }
}
