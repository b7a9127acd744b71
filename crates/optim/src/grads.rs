//! Gradients by parameter name: accumulation, global norm, clipping.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};
use firebox_tensor::ops::{Deferred, add, carry_gradient, sum_of_squares};

use crate::clip::factor;

/// Flat gradients (`[elements]`, without autodiff) by the name of their parameter, in the order of names.
///
/// A parameter that took no part in the loss has no entry. In a sum it counts as zero; the optimizer leaves it alone.
#[derive(Debug, Clone, Default)]
pub struct NamedGrads {
    map: BTreeMap<String, Tensor<1>>,
}

impl NamedGrads {
    /// No gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the gradients of the parameters of `module` out of what `backward` returned.
    pub fn from_backward<M: Module>(module: &M, grads: &mut Gradients) -> Self {
        struct Collector<'a> {
            path: Vec<String>,
            grads: &'a mut Gradients,
            map: BTreeMap<String, Tensor<1>>,
        }
        impl ModuleVisitor for Collector<'_> {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.path.push(name.to_owned());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.path.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                // Values that were never made took no part.
                if param.is_initialized()
                    && param.is_require_grad()
                    && let Some(grad) = param.grad_remove(self.grads)
                {
                    let elements = grad.shape().num_elements();
                    self.map.insert(self.path.join("."), grad.reshape([elements]));
                }
            }
        }
        let mut collector = Collector { path: vec![], grads, map: BTreeMap::new() };
        module.visit(&mut collector);
        Self { map: collector.map }
    }

    /// Runs backward from `loss` `[1]`. Returns the gradients of the parameters of `module`, each added to its one in `carried`, and the rest of what
    /// backward returned.
    ///
    /// On the CPU backends an operation adds to the carried gradient in place, instead of making a second one to be added up: what two stages
    /// share, such as a tied embedding, has one gradient at any time.
    pub fn backward_onto<M: Module>(module: &M, loss: Tensor<1>, carried: NamedGrads) -> (Self, Gradients) {
        let empty = Tensor::zeros([0], &loss.device().inner());
        let mut lent: Vec<String> = carried.map.keys().cloned().collect();
        let returned = carried.exchange(module);
        lent.retain(|name| !returned.map.contains_key(name));
        let mut grads = loss.backward();
        let mut named = Self::from_backward(module, &mut grads);
        named.add(returned);
        let asked: Self = lent.into_iter().map(|name| (name, empty.clone())).collect();
        named.add(asked.exchange(module));
        (named, grads)
    }

    /// Computes what backward passes have left for later, of the parameters of `module` whose name is `wanted`.
    pub fn from_deferred<M: Module>(module: &M, deferred: &mut Deferred, wanted: impl Fn(&str) -> bool) -> Self {
        struct Collector<'a, F> {
            path: Vec<String>,
            wanted: F,
            deferred: &'a mut Deferred,
            grads: NamedGrads,
        }
        impl<F: Fn(&str) -> bool> ModuleVisitor for Collector<'_, F> {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.path.push(name.to_owned());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.path.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if self.deferred.is_empty() || !param.is_initialized() || !param.is_require_grad() {
                    return;
                }
                let name = self.path.join(".");
                if (self.wanted)(&name)
                    && let Some(grad) = self.deferred.compute(param.val())
                {
                    self.grads.insert(name, grad);
                }
            }
        }
        let mut collector = Collector { path: vec![], wanted, deferred, grads: Self::new() };
        module.visit(&mut collector);
        collector.grads
    }

    /// Leaves each gradient for the next backward pass; returns what comes back, see [`carry_gradient`].
    fn exchange<M: Module>(self, module: &M) -> Self {
        struct Exchange {
            path: Vec<String>,
            given: NamedGrads,
            returned: NamedGrads,
        }
        impl ModuleVisitor for Exchange {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.path.push(name.to_owned());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.path.pop();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let name = self.path.join(".");
                if let Some(grad) = self.given.remove(&name)
                    && let Some(returned) = carry_gradient(param.val(), grad)
                {
                    self.returned.insert(name, returned);
                }
            }
        }
        if self.is_empty() {
            return self;
        }
        let mut exchange = Exchange { path: vec![], given: self, returned: Self::new() };
        module.visit(&mut exchange);
        // Those of another module.
        exchange.returned.add(exchange.given);
        exchange.returned
    }

    /// Sets the gradient of a parameter; returns the one it had.
    pub fn insert(&mut self, name: impl Into<String>, grad: Tensor<1>) -> Option<Tensor<1>> {
        self.map.insert(name.into(), grad)
    }

    /// Takes the gradient of a parameter out.
    pub fn remove(&mut self, name: &str) -> Option<Tensor<1>> {
        self.map.remove(name)
    }

    /// Takes those out whose name satisfies `wanted`.
    pub fn extract(&mut self, mut wanted: impl FnMut(&str) -> bool) -> Self {
        Self { map: self.map.extract_if(.., |name, _| wanted(name)).collect() }
    }

    /// The gradient of a parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor<1>> {
        self.map.get(name)
    }

    /// Names and gradients, in the order of names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor<1>)> {
        self.map.iter().map(|(name, grad)| (name.as_str(), grad))
    }

    /// How many parameters have a gradient.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether none has.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Adds other gradients, name by name, in place where nothing else holds them.
    ///
    /// # Panics
    /// If two gradients of one name differ in length: they came from different modules.
    pub fn add(&mut self, other: NamedGrads) {
        for (name, grad) in other.map {
            let sum = match self.map.remove(&name) {
                Some(sum) => {
                    assert_eq!(sum.dims(), grad.dims(), "gradients of `{name}` differ in length");
                    add(sum, grad)
                }
                None => grad,
            };
            self.map.insert(name, sum);
        }
    }

    /// Replaces every gradient by `f(name, gradient)`, in the order of names: scaling, reduction over ranks.
    pub fn map(&mut self, mut f: impl FnMut(&str, Tensor<1>) -> Tensor<1>) {
        self.map = std::mem::take(&mut self.map)
            .into_iter()
            .map(|(name, grad)| {
                let grad = f(&name, grad);
                (name, grad)
            })
            .collect();
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f64) {
        self.map(|_, grad| grad * factor);
    }

    /// The Euclidean norm of all gradients as one vector; NaN or infinite if any element is, or if a square overflows f32 (an
    /// element beyond 1.8e19).
    ///
    /// The order of sums is fixed: the same gradients give the same bits. Reads one number per gradient back from the device, in
    /// one transfer.
    pub fn global_norm(&self) -> f64 {
        self.sum_of_squares().sqrt()
    }

    /// The square of [`global_norm`](Self::global_norm).
    pub fn sum_of_squares(&self) -> f64 {
        self.squares().iter().sum()
    }

    /// The sum of squares of each gradient, in the order of names; one transfer from the device.
    pub(crate) fn squares(&self) -> Vec<f64> {
        self.reduce(sum_of_squares)
    }

    /// Whether every element is finite. [`global_norm`](Self::global_norm) says nearly the same for free where it is computed anyway.
    pub fn all_finite(&self) -> bool {
        // Zero times a finite number is zero, times anything else NaN.
        self.reduce(|grad| (grad * 0.0).sum()).into_iter().all(|zero| zero == 0.0)
    }

    /// Scales all gradients by `max_norm / (norm + 1e-6)` if that is below one, as PyTorch's `clip_grad_norm_`; returns the norm
    /// before. Gradients whose norm is not finite are left as they are, for the caller to skip the step.
    pub fn clip_(&mut self, max_norm: f64) -> f64 {
        let (norm, factor) = self.clip_factor(max_norm);
        if factor < 1.0 {
            self.scale(factor);
        }
        norm
    }

    /// The norm, and the factor by which [`clip_`](Self::clip_) would scale: 1 where nothing is to be clipped.
    pub fn clip_factor(&self, max_norm: f64) -> (f64, f64) {
        let norm = self.global_norm();
        (norm, factor(max_norm, norm))
    }

    /// `f(gradient)` (`[1]` each) of every gradient, in the order of names; one transfer from the device.
    fn reduce(&self, f: impl Fn(Tensor<1>) -> Tensor<1>) -> Vec<f64> {
        if self.map.is_empty() {
            return vec![];
        }
        let parts = self.map.values().map(|grad| f(grad.clone())).collect();
        Tensor::cat(parts, 0).into_data().iter::<f32>().map(f64::from).collect()
    }
}

impl IntoIterator for NamedGrads {
    type Item = (String, Tensor<1>);
    type IntoIter = std::collections::btree_map::IntoIter<String, Tensor<1>>;

    fn into_iter(self) -> Self::IntoIter {
        self.map.into_iter()
    }
}

impl FromIterator<(String, Tensor<1>)> for NamedGrads {
    fn from_iter<I: IntoIterator<Item = (String, Tensor<1>)>>(iter: I) -> Self {
        Self { map: iter.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;

    fn grads(values: &[(&str, Vec<f32>)]) -> NamedGrads {
        let device = Device::default();
        values.iter().map(|(name, v)| (name.to_string(), Tensor::from_floats(v.as_slice(), &device))).collect()
    }

    #[test]
    fn norm_is_accurate_over_many_elements() {
        for n in [1, 4095, 4096, 4097, 8191, 8192, 1_000_003] {
            let values: Vec<f32> = (0..n).map(|i| 1.0 + (i % 7) as f32 * 0.25).collect();
            let expected = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let norm = grads(&[("a", values.clone()), ("b", values)]).global_norm();
            assert!((norm / (expected * 2f64.sqrt()) - 1.0).abs() < 3e-7, "{n}: {norm}");
        }
        assert_eq!(NamedGrads::new().global_norm(), 0.0);
    }

    #[test]
    fn sees_what_is_not_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5; 5000];
            values[4321] = bad;
            let mut found = grads(&[("a", vec![1.0]), ("b", values)]);
            assert!(!found.all_finite() && !found.global_norm().is_finite(), "{bad}");
            assert!(!found.clip_(1.0).is_finite());
            assert_eq!(found.get("a").unwrap().to_data().iter::<f32>().next(), Some(1.0), "left as it was");
        }
        assert!(grads(&[("a", vec![f32::MAX, -1e-38, 0.0])]).all_finite());
    }

    #[derive(Module, Debug)]
    struct Pair {
        table: Param<Tensor<2>>,
        gain: Param<Tensor<1>>,
    }

    #[test]
    fn carried_gradients_are_added_whether_an_operation_takes_them_or_not() {
        let device = Device::default().autodiff();
        let pair = Pair {
            table: Param::from_tensor(Tensor::ones([3, 2], &device)),
            gain: Param::from_tensor(Tensor::ones([2], &device)),
        };
        let carried =
            grads(&[("table", vec![10.0, 20.0, 30.0, 40.0, 50.0, 60.0]), ("gain", vec![5.0, 6.0]), ("x", vec![7.0])]);
        // A fused operation adds to the table's gradient; none reaches the gain, and the module has no x.
        let rows = firebox_tensor::ops::embedding(pair.table.val(), [2, 0, 2].into(), 1, 3);
        let (sum, _) = NamedGrads::backward_onto(&pair, rows.sum(), carried);
        let values = |name: &str| sum.get(name).unwrap().to_data().iter::<f32>().collect::<Vec<_>>();
        assert_eq!(values("table"), [11.0, 21.0, 30.0, 40.0, 52.0, 62.0]);
        assert_eq!((values("gain"), values("x")), (vec![5.0, 6.0], vec![7.0]));
        assert_eq!(sum.len(), 3);
    }

    #[test]
    fn adds_by_name() {
        let mut sum = grads(&[("a", vec![1.0, 2.0]), ("b", vec![3.0])]);
        sum.add(grads(&[("a", vec![10.0, 20.0]), ("c", vec![7.0])]));
        sum.scale(0.5);
        let read: Vec<(String, Vec<f32>)> =
            sum.iter().map(|(n, g)| (n.to_owned(), g.to_data().iter().collect())).collect();
        assert_eq!(read, [("a".into(), vec![5.5, 11.0]), ("b".into(), vec![1.5]), ("c".into(), vec![3.5])]);
    }
}
