//! Probabilities of texts, and the loss of pairs of which one is preferred.

use std::sync::Arc;

use burn::tensor::Tensor;
use firebox_tensor::ops::{self, LossConfig, Preference};

use super::head::Head;
use super::model::Transformer;
use crate::stage::TokenBatch;

impl Transformer {
    /// From what the head multiplies, `[B T, W]`.
    pub(super) fn preference_loss(&self, x: Tensor<2>, batch: &TokenBatch, pairs: &Arc<Preference>) -> Tensor<1> {
        let (scale, cap) = (batch.loss_scale, self.config().logit_softcap);
        let table = self.head_table();
        if table.packed.is_some() {
            let logits = ops::soft_cap(table.products(x.unsqueeze_dim::<3>(0)), cap);
            return ops::preference(logits.squeeze_dim(0), &batch.targets, scale, pairs);
        }
        ops::linear_preference(x, self.head_weight(), batch.targets.clone(), scale, cap, pairs.clone(), None)
    }

    /// The logarithm of the probability of each row's targets, `[B]`: the sum over those that are not negative. As in evaluation: without dropout.
    ///
    /// # Panics
    /// As [`logits`](Self::logits).
    pub fn log_probabilities(&self, batch: &TokenBatch) -> Tensor<1> {
        self.assert_whole();
        assert_eq!(self.config().head, Head::Language, "log_probabilities: of tokens that follow others");
        let x = self.before_head(self.hidden(batch));
        let ([_, t, w], cap, none) = (x.dims(), self.config().logit_softcap, LossConfig::default());
        let row = |(i, targets): (usize, &[i32])| {
            let (x, targets): (_, Arc<[i32]>) = (x.clone().narrow(0, i, 1).reshape([t, w]), targets.into());
            match &self.head_table().packed {
                Some(head) => ops::packed_cross_entropy(x, head, &targets, -1.0, cap),
                None => ops::linear_cross_entropy(x, self.head_weight(), targets, -1.0, cap, &none),
            }
        };
        Tensor::cat(batch.targets.chunks_exact(t).enumerate().map(row).collect(), 0)
    }
}
