//! The head of a student and its loss against a teacher, in one operation.

use std::sync::{Arc, Mutex};

use burn::backend::Dispatch;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, activation};
use firebox_parallel::Communicator;

use super::collective::{all_gather, assert_host, part};
use super::compute::{compute, multiply};
use super::cross_entropy::{LossConfig, apply_with, check, row_losses};
use super::extension::FusedOps;
use super::linear::Weight;
use super::softcap::{assert_cap, soft_cap};
use super::vjp::Tracked;
use crate::adapter::HostBackend;
use crate::device::is_fused;
use crate::kernels::cross_entropy::{Gradients, Loss, Shard};
use crate::kernels::distillation as kernel;
use crate::kernels::matmul::{Compute, Mat};

/// What a teacher predicts for each of N tokens.
#[derive(Clone, Debug)]
pub enum SoftTargets {
    /// Everything: its logits are made by chunks of rows, beside the student's.
    Head {
        /// Its hidden states after the final norm, `[N, D']`.
        hidden: Arc<[f32]>,
        /// Its head, `[V, D']`, on a device without gradients.
        weight: Tensor<2>,
        /// The soft-cap of its logits; 0: none.
        softcap: f64,
    },
    /// Its k most probable tokens. What is left of its probability is that of all others together, of which nothing more is known.
    TopK {
        /// How many.
        k: usize,
        /// The tokens, `[N, k]`.
        ids: Arc<[u32]>,
        /// Their probabilities at the loss's temperature, `[N, k]`.
        probabilities: Arc<[f32]>,
    },
}

/// A loss against a teacher, beside that of the targets.
#[derive(Clone, Debug)]
pub struct SoftLoss {
    /// What the teacher predicts.
    pub targets: SoftTargets,
    /// Share of the loss of the targets, in [0, 1]; the teacher's has the rest.
    pub alpha: f64,
    /// By what the logits of both are divided before softmax, above 0.
    pub temperature: f64,
    /// Hears of both losses.
    pub parts: LossParts,
}

/// Sums of the parts of a loss, without their weights, for someone to look at. What passes with gradients make is added up; clones add up in the same place.
#[derive(Clone, Debug, Default)]
pub struct LossParts(Arc<Mutex<[f64; 4]>>);

impl LossParts {
    /// The loss of the targets.
    pub const HARD: usize = 0;
    /// That of the teacher's predictions.
    pub const SOFT: usize = 1;
    /// That of its hidden states.
    pub const HIDDEN: usize = 2;
    /// That of its attention relations.
    pub const RELATIONS: usize = 3;

    /// Adds to a part.
    pub fn add(&self, part: usize, value: f64) {
        if let Ok(mut sums) = self.0.lock() {
            sums[part] += value;
        }
    }

    /// The sums until now, and starts again from 0.
    pub fn take(&self) -> [f64; 4] {
        self.0.lock().map(|mut sums| std::mem::take(&mut *sums)).unwrap_or_default()
    }
}

/// The loss of a student (Hinton et al., arXiv:1503.02531, section 2), summed over the rows whose target is not negative, times `scale`: `alpha` times what
/// [`linear_cross_entropy`](super::linear_cross_entropy) gives, plus `(1 - alpha) t^2 KL(q | p)` with p the student's and q the teacher's probabilities at temperature t.
/// The factor t^2 keeps the gradient's size, which falls with it.
///
/// Of a teacher of whom only the k most probable tokens are known, all others are one outcome: `sum_k q ln(q / p) + r ln(r / s)`, with r and s what teacher and student give
/// them together.
///
/// With `group`, each rank has its [`part`] of the rows of a head of so many rows, as in [`vocab_cross_entropy`](super::vocab_cross_entropy); of the teacher it has all.
///
/// # Shapes
/// - `hidden`: `[N, D]`, `weight`: `[V, D]` or this rank's part of it, `targets`: N values; output `[1]`
///
/// # Panics
/// As [`linear_cross_entropy`](super::linear_cross_entropy); if `soft` has not N rows or another vocabulary, or `alpha` or the temperature is out of range; with a group, if the
/// device is no CPU backend or a rank fails.
#[allow(clippy::too_many_arguments)]
pub fn linear_distillation(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Arc<[i32]>,
    scale: f64,
    softcap: f64,
    loss: &LossConfig,
    soft: &SoftLoss,
    group: Option<(usize, &Communicator)>,
) -> Tensor<1> {
    let rows = weight.dims()[0];
    let vocab = group.map_or(rows, |(vocab, _)| vocab);
    check(&hidden, &targets, vocab, softcap, loss);
    soft.check(targets.len(), vocab);
    let device = hidden.device();
    if is_fused(&device) {
        let mut teacher = match &soft.targets {
            SoftTargets::Head { weight, .. } => weight.clone(),
            SoftTargets::TopK { .. } => Tensor::empty([0, 0], &device.clone().inner()),
        };
        if let (Some((_, group)), SoftTargets::Head { .. }) = (group, &soft.targets) {
            let mine = part(vocab, group.rank(), group.size());
            assert_eq!(rows, mine.len(), "distillation: this rank's part of a vocabulary of {vocab}");
            teacher = teacher.slice([mine]);
        }
        let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
        let teacher = if device.is_autodiff() { Tensor::from_inner(teacher) } else { teacher };
        let shard = group.map(|(vocab, group)| (vocab, group.clone()));
        let (loss, soft) = (*loss, soft.clone());
        let op = Distillation { targets, scale, softcap, loss, soft, compute: compute(), shard };
        return Tensor::from_dispatch(Dispatch::fused_linear_distillation(hidden, weight, teacher.into_dispatch(), op));
    }
    if group.is_some() {
        assert_host(&device);
    }
    composed(hidden, weight, &targets, scale, softcap, loss, soft)
}

fn composed(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: &[i32],
    scale: f64,
    softcap: f64,
    loss: &LossConfig,
    soft: &SoftLoss,
) -> Tensor<1> {
    let (device, n, t) = (hidden.device(), targets.len(), soft.temperature);
    let logits = soft_cap(multiply(hidden, weight.transpose()), softcap);
    let log_p = activation::log_softmax(logits.clone() / t, 1);
    let kl = match &soft.targets {
        SoftTargets::Head { hidden, weight, softcap } => {
            let d = weight.dims()[1];
            let weight = if device.is_autodiff() { Tensor::from_inner(weight.clone()) } else { weight.clone() };
            let hidden = Tensor::<2>::from_data(TensorData::new(hidden.to_vec(), [n, d]), &device);
            let log_q = activation::log_softmax(soft_cap(multiply(hidden, weight.transpose()), *softcap) / t, 1);
            (log_q.clone().exp() * (log_q - log_p)).sum_dim(1)
        }
        SoftTargets::TopK { k, ids, probabilities } => {
            let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, *k]), &device);
            let q = Tensor::<2>::from_data(TensorData::new(probabilities.to_vec(), [n, *k]), &device);
            let log_p = log_p.gather(1, ids);
            let tiny = f64::from(f32::MIN_POSITIVE);
            let rest = (q.clone().sum_dim(1) * -1.0 + 1.0).clamp_min(tiny);
            let others = (log_p.clone().exp().sum_dim(1) * -1.0 + 1.0).clamp_min(tiny);
            (q.clone() * (q.clamp_min(tiny).log() - log_p)).sum_dim(1) + rest.clone() * (rest.log() - others.log())
        }
    };
    let (hard, kept) = row_losses(logits, targets, loss);
    let [hard, kl] = [hard, kl * t.powi(2)].map(|losses| (losses * kept.clone()).sum() * scale);
    if device.is_autodiff() {
        soft.parts.add(LossParts::HARD, f64::from(hard.clone().into_scalar::<f32>()));
        soft.parts.add(LossParts::SOFT, f64::from(kl.clone().into_scalar::<f32>()));
    }
    hard * soft.alpha + kl * (1.0 - soft.alpha)
}

impl SoftLoss {
    #[track_caller]
    fn check(&self, n: usize, vocab: usize) {
        let Self { alpha, temperature, .. } = *self;
        assert!((0.0..=1.0).contains(&alpha), "distillation: alpha {alpha} is not in [0, 1]");
        assert!(temperature > 0.0 && temperature.is_finite(), "distillation: temperature {temperature} is not above 0");
        match &self.targets {
            SoftTargets::Head { hidden, weight, softcap } => {
                let [v, d] = weight.dims();
                assert_eq!(v, vocab, "distillation: a teacher of {v} tokens for a student of {vocab}");
                assert_eq!(hidden.len(), n * d, "distillation: the teacher's hidden states are not [{n}, {d}]");
                assert_cap(*softcap);
            }
            SoftTargets::TopK { k, ids, probabilities } => {
                let expected = (n * k, n * k);
                assert_eq!((ids.len(), probabilities.len()), expected, "distillation: {k} tokens for each of {n} rows");
                let bad = ids.iter().find(|&&id| id as usize >= vocab);
                assert!(bad.is_none(), "distillation: token {bad:?} is not in the vocabulary of {vocab}");
            }
        }
    }
}

/// See [`linear_distillation`].
#[derive(Clone, Debug)]
pub(crate) struct Distillation {
    targets: Arc<[i32]>,
    scale: f64,
    softcap: f64,
    loss: LossConfig,
    soft: SoftLoss,
    compute: Compute,
    /// The whole vocabulary, and the ranks among which it is divided.
    shard: Option<(usize, Communicator)>,
}

impl Distillation {
    fn run(&self, hidden: &[f32], weight: Mat<'_>, teacher: Mat<'_>, gradients: Option<Gradients<'_>>) -> f32 {
        let loss = Loss {
            scale: self.scale as f32,
            label_smoothing: self.loss.label_smoothing as f32,
            z_loss: self.loss.z_loss as f32,
            compute: self.compute,
            softcap: self.softcap as f32,
        };
        let teacher = match &self.soft.targets {
            SoftTargets::Head { hidden, softcap, .. } => {
                kernel::Teacher::Head { hidden, weight: teacher, softcap: *softcap as f32 }
            }
            SoftTargets::TopK { k, ids, probabilities } => kernel::Teacher::TopK { k: *k, ids, probabilities },
        };
        let (alpha, temperature) = (self.soft.alpha as f32, self.soft.temperature as f32);
        let soft = kernel::Soft { teacher, alpha, temperature };
        let rows = weight.rows();
        let shard = match &self.shard {
            None => Shard { first: 0, vocab: rows, largest: rows, exchange: &|mine| mine.to_vec() },
            Some((vocab, group)) => Shard {
                first: part(*vocab, group.rank(), group.size()).start,
                vocab: *vocab,
                largest: vocab.div_ceil(group.size()),
                exchange: &|mine| all_gather(group, mine, group.size(), mine.len()),
            },
        };
        let recorded = gradients.is_some();
        let (sum, [hard, kl]) =
            kernel::linear_distillation(hidden, weight, &self.targets, loss, soft, &shard, gradients);
        if recorded {
            self.soft.parts.add(LossParts::HARD, hard);
            self.soft.parts.add(LossParts::SOFT, kl);
        }
        sum
    }
}

pub(crate) fn forward<B: HostBackend>(
    hidden: FloatTensor<B>,
    weight: FloatTensor<B>,
    teacher: FloatTensor<B>,
    op: &Distillation,
) -> FloatTensor<B> {
    let (hidden, weight, teacher) = (B::values(hidden), Weight::<B>::new(weight), Weight::<B>::new(teacher));
    B::tensor(vec![op.run(hidden.as_ref(), weight.mat(), teacher.mat(), None)], &[1])
}

pub(crate) fn apply<B: HostBackend + FusedOps, C: CheckpointStrategy>(
    hidden: Tracked<B, C>,
    weight: Tracked<B, C>,
    teacher: Tracked<B, C>,
    op: &Distillation,
) -> Tracked<B, C> {
    let teacher = Weight::<B>::new(teacher.into_primitive());
    apply_with::<B, C>(hidden, weight, |hidden, weight, gradients| op.run(hidden, weight, teacher.mat(), gradients))
}
