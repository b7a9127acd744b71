//! Mixture of experts: in place of a block's feed-forward layer, many of them, of which a router chooses a few for each token.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_parallel::Communicator;
use firebox_tensor::device::is_fused;
use firebox_tensor::ops::experts::{Exchange, Group, Routing, combine, dispatch, grouped_linear, router_weights};
use firebox_tensor::ops::{Compute, Pre, with_compute};
use serde::{Deserialize, Serialize};

use super::config::{ConfigError, FeedForward, TransformerConfig};
use super::model::{Init, Linear, Transformer};
use super::parallel::TensorParallelError;
use crate::placement::{Placement, Segment};

/// The shape of a mixture of experts; each expert is a SwiGLU layer of the decoder's `d_ff`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// Experts of each block.
    pub n_experts: usize,
    /// How many of them each token goes through. The router's softmax is over all experts; the weights of several chosen ones are then made to sum to 1, as in Mixtral
    /// (arXiv:2401.04088) and Qwen 3; that of a single one stays as it is, as in Switch (Fedus et al., arXiv:2101.03961).
    pub experts_per_token: usize,
    /// Coefficient of the load-balancing loss (Fedus et al., equation 4), summed over the blocks; 0: none. See [`router_weights`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub router_aux_loss: f64,
    /// Balancing without a loss (Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2): after each step a bias of each expert goes up or
    /// down by so much, as fewer or more tokens than the mean chose it. It counts in the choice alone. 0: no biases.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub router_bias_rate: f64,
    /// In training an expert takes at most so many times its even share of a micro-batch's choices, and the rest pass it by in the residual stream; 0: as many as
    /// come. Evaluation drops none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub capacity_factor: f64,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

impl Default for ExpertsConfig {
    /// Two of eight, balanced by a loss of Switch's coefficient.
    fn default() -> Self {
        Self { n_experts: 8, experts_per_token: 2, router_aux_loss: 1e-2, router_bias_rate: 0.0, capacity_factor: 0.0 }
    }
}

impl ExpertsConfig {
    /// Checks that a decoder can have such experts.
    pub(super) fn validate(&self, decoder: &TransformerConfig) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: String| Err(ConfigError { field, got, expected });
        if !(2..=65_536).contains(&self.n_experts) {
            return fail("n_experts", self.n_experts.to_string(), "must be 2 to 65536".into());
        }
        if !(1..=self.n_experts).contains(&self.experts_per_token) {
            let expected = format!("must be 1 to n_experts = {}", self.n_experts);
            return fail("experts_per_token", self.experts_per_token.to_string(), expected);
        }
        for (field, value) in [
            ("router_aux_loss", self.router_aux_loss),
            ("router_bias_rate", self.router_bias_rate),
            ("capacity_factor", self.capacity_factor),
        ] {
            if !(0.0..=1e6).contains(&value) {
                return fail(field, value.to_string(), "must be 0 (none) or positive".into());
            }
        }
        if decoder.feed_forward != FeedForward::SwiGlu {
            let got = format!("{:?}", decoder.feed_forward);
            return fail("feed_forward", got, "must be swi_glu with n_experts".into());
        }
        if decoder.bias {
            return fail("bias", "true".into(), "must be false with n_experts".into());
        }
        Ok(())
    }

    /// Parameters of a block's experts of `each` parameters and their router.
    pub(super) fn num_params(&self, d_model: usize, each: usize) -> usize {
        let bias = if self.router_bias_rate > 0.0 { self.n_experts } else { 0 };
        self.n_experts * (each + d_model) + bias
    }

    /// The rows that an expert takes of `tokens` tokens in training.
    fn capacity(&self, tokens: usize) -> Option<usize> {
        let even = (tokens * self.experts_per_token) as f64 / self.n_experts as f64;
        (self.capacity_factor > 0.0).then(|| (self.capacity_factor * even).ceil() as usize)
    }
}

/// The experts of a block and their router.
#[derive(Module, Debug)]
pub struct Experts {
    /// `D -> n_experts`
    pub router: Linear,
    /// What is added to the experts' probabilities when they are chosen, `[n_experts]`, where they are balanced so. It has no gradient; see
    /// [`Transformer::balance_experts`].
    pub bias: Option<Param<Tensor<1>>>,
    /// `D -> 2 F` with columns `[gate | up]` of each expert.
    pub input: ExpertWeights,
    /// `F -> D` of each expert.
    pub output: ExpertWeights,
    #[module(skip)]
    config: ExpertsConfig,
    /// How many tokens of training chose each, since somebody asked.
    #[module(skip)]
    load: Arc<[AtomicU64]>,
    /// The ranks that divide them, if there are such: this one has its part.
    #[module(skip)]
    group: Option<Communicator>,
}

/// A matrix of each expert.
#[derive(Module, Debug)]
pub struct ExpertWeights {
    /// `[n_experts, in, out]`
    pub weight: Param<Tensor<3>>,
}

impl Experts {
    pub(super) fn new(
        config: ExpertsConfig,
        init: &Init<'_>,
        name: &str,
        decoder: &TransformerConfig,
        residual_std: f64,
    ) -> Self {
        let (n, d, f, std) = (config.n_experts, decoder.d_model, decoder.d_ff, decoder.init_std);
        let zeros = || {
            Param::uninitialized(
                ParamId::new(),
                move |d, _| Tensor::zeros([n], d),
                init.device.clone(),
                false,
                [n].into(),
            )
        };
        let group = init.experts.cloned();
        let place = group.as_ref().map_or((0, 1), |group| (group.rank(), group.size()));
        let weights = |part: &str, shape: [usize; 3], std| ExpertWeights {
            weight: init.placed(&format!("{name}.{part}"), shape, std, placement(n), place),
        };
        Self {
            router: init.linear(&format!("{name}.router"), [d, n], std, false),
            bias: (config.router_bias_rate > 0.0).then(zeros),
            input: weights("input", [n, d, 2 * f], std),
            output: weights("output", [n, f, d], residual_std),
            config,
            load: (0..n).map(|_| AtomicU64::new(0)).collect(),
            group,
        }
    }

    /// `experts(x) + residual`; `[B, T, D] -> [B, T, D]`. In training, `share` is that of the batch in its step's loss: the balancing loss has it, too.
    pub(super) fn forward(&self, x: Tensor<3>, residual: Option<Tensor<3>>, share: Option<f64>) -> Tensor<3> {
        let shape = x.dims();
        let [batch, tokens, d] = shape;
        let n = batch * tokens;
        let x = x.reshape([n, d]);
        // The router's part is small, and a choice that rounding changes is another model.
        let (weights, routing) = with_compute(Compute::F32, || {
            let logits = self.router.forward(x.clone(), Pre::Nothing, None);
            let routing = self.route(&logits, share.and_then(|_| self.config.capacity(n)));
            let aux = share.map_or(0.0, |share| self.config.router_aux_loss * share);
            (router_weights(logits, &routing, aux as f32), routing)
        });
        // With gradients a batch goes through each stage once, whatever is computed again.
        if share.is_some() && x.device().is_autodiff() {
            for (sum, &load) in self.load.iter().zip(routing.load()) {
                sum.fetch_add(u64::from(load), Ordering::Relaxed);
            }
        }
        let rows = dispatch(x, &routing);
        let y = match &self.group {
            None => self.products(rows, routing.groups()),
            Some(group) => {
                let exchange = Exchange::new(&routing, group);
                exchange.back(self.products(exchange.there(rows), exchange.groups()))
            }
        };
        combine(y, weights, residual.map(|x| x.reshape([n, d])), &routing).reshape(shape)
    }

    /// What the experts make of rows that are sorted into groups.
    fn products(&self, rows: Tensor<2>, groups: &Arc<[Group]>) -> Tensor<2> {
        let h = grouped_linear(rows, false, self.input.weight.val(), groups);
        grouped_linear(h, true, self.output.weight.val(), groups)
    }

    fn route(&self, logits: &Tensor<2>, capacity: Option<usize>) -> Routing {
        // PANIC: Firebox's tensors are f32.
        let host = |values: TensorData| values.try_into_vec::<f32>().expect("an f32 tensor");
        let bias = self.bias.as_ref().map(|bias| host(bias.val().into_data()));
        let ExpertsConfig { n_experts, experts_per_token, .. } = self.config;
        Routing::new(&host(logits.clone().into_data()), bias.as_deref(), n_experts, experts_per_token, capacity)
    }
}

/// How the matrices of `n` experts are divided among the ranks that share them.
fn placement(n: usize) -> Placement {
    Placement::split(0, [Segment { units: n, width: 1 }])
}

impl TransformerConfig {
    /// How ranks that divide the experts divide the parameter of this name (its path in the module).
    pub fn expert_placement(&self, param: &str) -> Placement {
        let is_matrix = param.contains(".experts.input.") || param.contains(".experts.output.");
        self.experts.filter(|_| is_matrix).map_or_else(Placement::replicated, |experts| placement(experts.n_experts))
    }
}

impl Transformer {
    /// This rank's part of the decoder that [`new`](Self::new) makes of the same seed, whose experts are divided among the ranks of `group`. Each rank has a batch
    /// of its own; all must run the same stages at the same time, with as many tokens or none as they like.
    ///
    /// # Errors
    /// An impossible shape, fewer experts than ranks, or a device that is no CPU backend.
    pub fn with_divided_experts(
        config: &TransformerConfig,
        seed: u64,
        device: &Device,
        group: &Communicator,
    ) -> Result<Self, TensorParallelError> {
        let n = config.experts.map_or(0, |experts| experts.n_experts);
        if n < group.size() {
            let expected = format!("must be at least the {} ranks that divide the experts", group.size());
            return Err(ConfigError { field: "n_experts", got: n.to_string(), expected }.into());
        }
        if !is_fused(device) {
            return Err(TensorParallelError::Device(format!("{device:?}")));
        }
        Ok(Self::make(config, seed, device, None, Some(group))?)
    }

    /// The ranks among which its experts are divided, if they are.
    pub fn expert_group(&self) -> Option<&Communicator> {
        self.blocks.first()?.experts.as_ref()?.group.as_ref()
    }

    /// How many tokens of the training passes since the last call chose each expert: those of the first block, then of the next, dropped or not. Empty without
    /// experts. Ranks that share a batch add theirs up.
    pub fn take_expert_load(&self) -> Vec<u64> {
        let experts = self.blocks.iter().filter_map(|block| block.experts.as_ref());
        experts.flat_map(|experts| experts.load.iter().map(|load| load.swap(0, Ordering::Relaxed))).collect()
    }

    /// Moves the bias of each expert by `router_bias_rate`, up where fewer tokens than the mean of its block chose it in a step, down where more: `load` is that of all the
    /// step's tokens. Whole numbers decide, so that it is the same however the tokens were divided.
    pub fn balance_experts(mut self, load: &[u64]) -> Self {
        let mut rest = load;
        for experts in self.blocks.iter_mut().filter_map(|block| block.experts.as_mut()) {
            let Some(load) = rest.split_off(..experts.load.len()) else { break };
            // What other stages have is empty.
            let Some(bias) = experts.bias.take_if(|bias| bias.lazy_shape().num_elements() > 0) else { continue };
            let (total, rate) = (load.iter().sum::<u64>(), experts.config.router_bias_rate as f32);
            let (id, tensor, mapper) = bias.consume();
            let step: Vec<f32> = (load.iter())
                .map(|&of_expert| match (of_expert * load.len() as u64).cmp(&total) {
                    std::cmp::Ordering::Less => rate,
                    std::cmp::Ordering::Equal => 0.0,
                    std::cmp::Ordering::Greater => -rate,
                })
                .collect();
            let step = Tensor::from_data(TensorData::new(step, [load.len()]), &tensor.device());
            experts.bias = Some(Param::from_mapped_value(id, tensor + step, mapper));
        }
        self
    }
}
