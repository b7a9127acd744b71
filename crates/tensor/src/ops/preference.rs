//! The head of a language model and the loss of answers of which one is preferred.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{Tensor, TensorData, activation};
use firebox_parallel::Communicator;

use super::collective::assert_host;
use super::compute::{compute, multiply};
use super::cross_entropy::{CrossEntropy, LossConfig, check, row_losses};
use super::extension::FusedOps;
use super::softcap::soft_cap;
use crate::device::is_fused;

/// Pairs of texts of which the first is preferred, and what they are compared with.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// The logarithm of each text's probability under the reference model, the preferred one of each pair first.
    pub reference: Vec<f32>,
    /// How much a difference to the reference counts: the larger, the nearer the model stays to it.
    pub beta: f64,
    /// The share of pairs that are taken to be the wrong way round, in [0, 0.5) (Mitchell, 2023, "conservative DPO").
    pub label_smoothing: f64,
}

/// The loss of direct preference optimization (Rafailov et al., arXiv:2305.18290, equation 7), summed over pairs of texts, times `scale`: with `m` beta times the gain of the preferred text
/// over the reference, `log p - log p_reference`, minus that of the other, and e the label smoothing, `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`. The probability of a text is that of
/// its targets that are not negative; of each text there are as many rows, one behind the other.
///
/// With `group`, each rank has its part of the rows of a head of so many rows, as in [`vocab_cross_entropy`](super::vocab_cross_entropy).
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[V, D]` or this rank's part of it, `targets`: `N` values; output `[1]`
///
/// # Panics
/// As [`linear_cross_entropy`](super::linear_cross_entropy); if texts do not come in pairs, or N is no multiple of their number; with a group, if the device is no CPU backend or a rank
/// fails.
pub fn linear_preference(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Arc<[i32]>,
    scale: f64,
    softcap: f64,
    pairs: Arc<Preference>,
    group: Option<(usize, &Communicator)>,
) -> Tensor<1> {
    let vocab = group.map_or(weight.dims()[0], |(vocab, _)| vocab);
    check(&hidden, &targets, vocab, softcap, &LossConfig::default());
    pairs.check(targets.len());
    let device = hidden.device();
    if group.is_some() {
        assert_host(&device);
    }
    if is_fused(&device) {
        let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
        let shard = group.map(|(vocab, group)| (vocab, group.clone()));
        let loss = LossConfig::default();
        let op = CrossEntropy { targets, scale, softcap, loss, compute: compute(), shard, pairs: Some(pairs) };
        return Tensor::from_dispatch(Dispatch::fused_linear_cross_entropy(hidden, weight, op));
    }
    preference(soft_cap(multiply(hidden, weight.transpose()), softcap), &targets, scale, &pairs)
}

/// The loss of [`linear_preference`] from logits `[N, V]` that are there.
///
/// # Panics
/// As [`linear_preference`].
pub fn preference(logits: Tensor<2>, targets: &[i32], scale: f64, pairs: &Preference) -> Tensor<1> {
    pairs.check(targets.len());
    let (texts, device) = (pairs.reference.len(), logits.device());
    let (losses, kept) = row_losses(logits, targets, &LossConfig::default());
    let log_p = (losses * kept).reshape([texts, targets.len() / texts.max(1)]).sum_dim(1) * -1.0;
    let reference = Tensor::<2>::from_data(TensorData::new(pairs.reference.clone(), [texts, 1]), &device);
    let gains = (log_p - reference).reshape([texts / 2, 2]);
    let margin = (gains.clone().narrow(1, 0, 1) - gains.narrow(1, 1, 1)) * pairs.beta;
    let right = activation::log_sigmoid(margin.clone()).sum() * (1.0 - pairs.label_smoothing);
    let wrong = activation::log_sigmoid(margin * -1.0).sum() * pairs.label_smoothing;
    (right + wrong) * -scale
}

impl Preference {
    #[track_caller]
    fn check(&self, rows: usize) {
        let texts = self.reference.len();
        assert!(texts.is_multiple_of(2), "preference: texts come in pairs, got {texts}");
        assert!(texts > 0 && rows.is_multiple_of(texts), "preference: {rows} rows of {texts} texts");
        assert!(self.beta > 0.0 && self.beta.is_finite(), "preference: beta {} is not above 0", self.beta);
        assert!((0.0..0.5).contains(&self.label_smoothing), "preference: label smoothing is not in [0, 0.5)");
    }
}
