//! What a linear layer computes: with its weight as it is, packed, rounded, of low rank, or with an adapter beside it.

use burn::module::Param;
use burn::tensor::Tensor;
use firebox_tensor::ops::{self, Pre};

use super::model::Linear;

impl Linear {
    /// A layer that computes with its weight as it is.
    pub(super) fn new(weight: Param<Tensor<2>>, bias: Option<Param<Tensor<1>>>) -> Self {
        Self { weight, factor: None, bias, packed: None, quantizer: None, adapter: None }
    }

    /// `pre(x) weight + bias + residual`; `[.., in] -> [.., out]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>, pre: Pre, residual: Option<Tensor<D>>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(Param::val);
        let Some(adapter) = &self.adapter else { return self.own(x, pre, bias, residual) };
        let low = adapter.down(x.clone(), pre.clone(), adapter.down.val());
        match &adapter.magnitude {
            None => adapter.add(self.own(x, pre, bias, residual), low, adapter.up.val()),
            Some(magnitude) => {
                let y = adapter.add(self.own(x, pre, None, None), low, adapter.up.val());
                adapter.resize(y, magnitude.val(), adapter.squares(self.plain_weight()), bias, residual)
            }
        }
    }

    /// The same without an adapter.
    fn own<const D: usize>(
        &self,
        x: Tensor<D>,
        pre: Pre,
        bias: Option<Tensor<1>>,
        residual: Option<Tensor<D>>,
    ) -> Tensor<D> {
        let first = |x, pre, bias, residual| match &self.packed {
            Some(packed) => ops::packed_linear(x, pre, packed.clone(), bias, residual),
            None => ops::fused_linear(x, pre, self.values().0, bias, residual),
        };
        match &self.factor {
            None => first(x, pre, bias, residual),
            Some(factor) => ops::fused_linear(first(x, pre, None, None), Pre::Nothing, factor.val(), bias, residual),
        }
    }

    /// Weight and bias, as the layer computes with them.
    pub(super) fn values(&self) -> (Tensor<2>, Option<Tensor<1>>) {
        let weight = match &self.quantizer {
            Some(quantizer) => quantizer.apply(self.weight.val()),
            None => self.weight.val(),
        };
        (weight, self.bias.as_ref().map(Param::val))
    }
}
