//! Parameters by name: what a module has, which of it decays, and how an update goes through it.
//!
//! The name of a parameter is its path in the module as burn's visitors give it, joined by dots:
//! `blocks.0.attn.qkv.weight`. It is the same in every process and after every restart, unlike burn's `ParamId`.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use firebox_tensor::ops::{is_bf16, to_bf16, to_f32};
use serde::{Deserialize, Serialize};

use crate::OptimError;

/// A float parameter of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamInfo {
    /// Path in the module.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether it requires gradients.
    pub trainable: bool,
}

impl ParamInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The float parameters of a module in the module's order.
///
/// # Errors
/// [`OptimError::DuplicateName`] if a path occurs twice.
pub fn parameters<M: Module>(module: &M) -> Result<Vec<ParamInfo>, OptimError> {
    Ok(located(module)?.into_iter().map(|(info, _)| info).collect())
}

/// The same, each with its device without gradients.
pub(crate) fn located<M: Module>(module: &M) -> Result<Vec<(ParamInfo, Device)>, OptimError> {
    let mut found = Vec::new();
    visit_floats(module, &mut |name: &str, param: FloatParam<'_>| {
        found.push((
            ParamInfo { name: name.to_owned(), shape: param.shape, trainable: param.trainable },
            param.device.clone().inner(),
        ));
    });
    let mut names = BTreeSet::new();
    for (info, _) in &found {
        if !names.insert(info.name.as_str()) {
            return Err(OptimError::DuplicateName { name: info.name.clone() });
        }
    }
    Ok(found)
}

/// What a parameter is to the model, by its name and shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParamKind {
    /// Two or more dimensions, and none of the following.
    Matrix,
    /// Fewer than two dimensions: a bias, the gain of a normalization.
    Vector,
    /// A table of rows: a part of its path is `embed`, `embedding`, `embeddings`, `positions`, `wte` or `wpe`. A tied head is its embedding.
    Embedding,
    /// The map to the vocabulary: a part of its path is `head` or `lm_head`.
    Head,
}

impl ParamKind {
    /// The kind of a parameter.
    pub fn of(name: &str, shape: &[usize]) -> Self {
        let has = |parts: &[&str]| name.split('.').any(|part| parts.contains(&part));
        match shape.len() {
            0 | 1 => Self::Vector,
            _ if has(&["embed", "embedding", "embeddings", "positions", "wte", "wpe"]) => Self::Embedding,
            _ if has(&["head", "lm_head"]) => Self::Head,
            _ => Self::Matrix,
        }
    }
}

/// The float parameters of a module with their values, flat and without gradients, in the module's order. The values share the parameters' memory, unless
/// those are in bfloat16.
pub fn values<M: Module>(module: &M) -> Vec<(ParamInfo, Tensor<1>)> {
    #[derive(Default)]
    struct Visitor {
        path: Vec<String>,
        found: Vec<(ParamInfo, Tensor<1>)>,
    }
    impl ModuleVisitor for Visitor {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let value = if value.device().is_autodiff() { value.inner() } else { value };
            let shape = value.dims().to_vec();
            let flat = to_f32(value).reshape([shape.iter().product::<usize>()]);
            self.found.push((ParamInfo { name: self.path.join("."), shape, trainable: param.is_require_grad() }, flat));
        }
    }
    let mut visitor = Visitor::default();
    module.visit(&mut visitor);
    visitor.found
}

/// Which parameters weight decay pulls towards zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayRule {
    /// Those of two or more dimensions: weights and embeddings, as in nanoGPT; not biases, not the gains of normalizations.
    #[default]
    Matrices,
    /// Every parameter, as PyTorch's optimizers do unless told otherwise.
    All,
    /// None.
    None,
}

impl DecayRule {
    /// Whether a parameter of `rank` dimensions decays.
    pub fn decays(self, rank: usize) -> bool {
        match self {
            DecayRule::Matrices => rank >= 2,
            DecayRule::All => true,
            DecayRule::None => false,
        }
    }
}

/// 13,800,000 as `13.8M`.
pub(crate) fn in_words(count: usize) -> String {
    let n = count as f64;
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.1}k", n / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", n / 1e6),
        _ => format!("{:.2}B", n / 1e9),
    }
}

/// What a visit sees of a float parameter of any rank.
pub(crate) struct FloatParam<'a> {
    pub shape: Vec<usize>,
    pub trainable: bool,
    pub device: &'a Device,
}

/// Whether a parameter requires gradients. Values that have not been made yet stay so.
pub fn is_trainable<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    if param.is_initialized() {
        return param.is_require_grad();
    }
    // The setting alone is not public: it is what a tensor gets that is loaded.
    let nothing = Tensor::zeros([0; D], &param.lazy_device());
    param.clone().transform_for_load(nothing, param.id).is_require_grad()
}

/// Calls `f` with the path and a description of every float parameter.
pub(crate) fn visit_floats<M: Module>(module: &M, f: &mut dyn FnMut(&str, FloatParam<'_>)) {
    struct Visitor<'a> {
        path: Vec<String>,
        f: &'a mut dyn FnMut(&str, FloatParam<'_>),
    }
    impl ModuleVisitor for Visitor<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let shape = param.lazy_shape().to_vec();
            (self.f)(
                &self.path.join("."),
                FloatParam { shape, trainable: is_trainable(param), device: &param.lazy_device() },
            );
        }
    }
    module.visit(&mut Visitor { path: vec![], f });
}

/// New values of a parameter, flat.
pub(crate) struct New {
    pub values: Tensor<1>,
    /// By what they are rounded to bfloat16, if that is what the parameter is in. Without one they stay in f32.
    pub seed: Option<u32>,
}

impl From<Tensor<1>> for New {
    fn from(values: Tensor<1>) -> Self {
        Self { values, seed: None }
    }
}

/// Replaces every trainable float parameter whose name is `wanted` by `f(name, rank, flat values without gradients)`. The others are left alone,
/// graphs that hold them included.
///
/// A parameter is taken out of the module before `f` gets it, so that nothing else holds its memory and `f` may work in place. The
/// result requires gradients again, as a new leaf, with the parameter's identity and checkpointing strategy. Where a parameter is in bfloat16, `f` gets its
/// values in f32; they are rounded again with the seed of [`New`].
pub(crate) fn map_trainable<M: Module>(
    module: M,
    wanted: &dyn Fn(&str) -> bool,
    f: &mut dyn FnMut(&str, usize, Tensor<1>) -> New,
) -> M {
    struct Mapper<'a> {
        path: Vec<String>,
        wanted: &'a dyn Fn(&str) -> bool,
        f: &'a mut dyn FnMut(&str, usize, Tensor<1>) -> New,
    }
    impl ModuleMapper for Mapper<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let name = self.path.join(".");
            if !(self.wanted)(&name) || !is_trainable(&param) {
                return param;
            }
            let (id, tensor, mapper) = param.consume();
            let strategy = tensor.gradient_checkpointing_strategy();
            let tensor = tensor.inner();
            let (shape, half) = (tensor.dims(), is_bf16(&tensor));
            let flat = to_f32(tensor).reshape([shape.iter().product::<usize>()]);
            let New { values, seed } = (self.f)(&name, D, flat);
            let values = values.reshape(shape);
            let mut tensor = Tensor::from_inner(match seed {
                Some(seed) if half => to_bf16(values, Some(seed)),
                _ => values,
            });
            if let Some(strategy) = strategy {
                tensor = tensor.with_gradient_checkpointing_strategy(strategy);
            }
            Param::from_mapped_value(id, tensor.require_grad(), mapper)
        }
    }
    module.map(&mut Mapper { path: vec![], wanted, f })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[derive(Module, Debug)]
    struct Part {
        weight: Param<Tensor<2>>,
        bias: Option<Param<Tensor<1>>>,
    }

    #[derive(Module, Debug)]
    struct Net {
        table: Param<Tensor<3>>,
        parts: Vec<Part>,
        gain: Param<Tensor<1>>,
    }

    fn net() -> Net {
        let device = Device::default().autodiff();
        let part = |bias: bool| Part {
            weight: Param::from_tensor(Tensor::ones([3, 5], &device)),
            bias: bias.then(|| Param::from_tensor(Tensor::ones([5], &device))),
        };
        Net {
            table: Param::from_tensor(Tensor::ones([2, 3, 4], &device)),
            parts: vec![part(true), part(false)],
            gain: Param::from_tensor(Tensor::ones([7], &device)),
        }
    }

    #[test]
    fn names_are_paths() {
        let names: Vec<String> = parameters(&net()).unwrap().into_iter().map(|p| p.name).collect();
        assert_eq!(names, ["table", "parts.0.weight", "parts.0.bias", "parts.1.weight", "gain"]);
    }

    #[test]
    fn counts_in_words() {
        assert_eq!([999, 21_888, 13_800_000, 70_554_000_000].map(in_words), ["999", "21.9k", "13.8M", "70.55B"]);
    }

    #[test]
    fn updates_keep_identity_rank_and_gradients() {
        let mut net = net();
        net.gain = net.gain.set_require_grad(false);
        let id = net.table.id;
        let mut seen = vec![];
        let net = map_trainable(net, &|_| true, &mut |name, rank, flat| {
            assert!(!flat.is_autodiff());
            seen.push((name.to_owned(), rank, flat.dims()[0]));
            (flat * 2.0).into()
        });
        let expected = [("table", 3, 24), ("parts.0.weight", 2, 15), ("parts.0.bias", 1, 5), ("parts.1.weight", 2, 15)];
        assert_eq!(seen, expected.map(|(n, r, e)| (n.to_owned(), r, e)));
        assert_eq!((net.table.id, net.table.dims()), (id, [2, 3, 4]));
        assert!(net.table.is_require_grad() && !net.gain.is_require_grad());
        assert_eq!(net.table.val().inner().sum().into_scalar::<f32>(), 48.0);
        // It is a leaf that takes part in the next backward pass.
        let grads = (net.table.val() * 3.0).sum().backward();
        assert_eq!(net.table.val().grad(&grads).unwrap().sum().into_scalar::<f32>(), 72.0);
    }
}
