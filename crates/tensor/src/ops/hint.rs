//! What a student learns inside, from its teacher's hidden states and attention relations. Each operation is the identity; in backward it adds the gradient of its loss, so
//! that no stage has to hand a loss on to the next.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

use super::distillation::LossParts;
use super::extension::FusedOps;
use super::linear::{Weight, or_none};
use super::sequence::Sequence;
use super::vjp::{Keep, Sink, Vjp, dims, kept};
use crate::adapter::HostBackend;
use crate::buffers::{buffer, recycle};
use crate::device::is_fused;
use crate::kernels::matmul::{Compute, Into, Mat, matmul};
use crate::kernels::relations as kernel;

/// How much a hint counts.
#[derive(Clone, Debug)]
pub struct HintLoss {
    /// Nothing is learned at tokens whose target is negative; N values.
    pub targets: Arc<[i32]>,
    /// What the summed loss is multiplied by, as that of the targets.
    pub scale: f64,
    /// Its weight beside that.
    pub weight: f64,
    /// Hears of the loss, without its weight.
    pub parts: LossParts,
}

/// `x` itself. In backward the gradient of `weight scale sum_i mean((x_i projection - teacher_i)^2)` is added, over the tokens whose target is not negative: the teacher's
/// hidden states as hints (FitNets, Romero et al., arXiv:1412.6550, section 2.2; TinyBERT, Jiao et al., arXiv:1909.10351, equation 8). Without gradients nothing happens.
///
/// # Shapes
/// - `x`: `[B, T, D]`, `projection`: `[D, D']`, or none where D' is D; `teacher`: `[B T, D']`
///
/// # Panics
/// If the shapes do not fit, or the device is no CPU backend.
pub fn hidden_hint(x: Tensor<3>, projection: Option<Tensor<2>>, teacher: Arc<[f32]>, loss: HintLoss) -> Tensor<3> {
    let ([b, t, d], device) = (x.dims(), x.device());
    let width = projection.as_ref().map_or(d, |projection| projection.dims()[1]);
    assert_eq!(projection.as_ref().map_or(d, |projection| projection.dims()[0]), d, "hint: a projection of width {d}");
    assert_eq!(teacher.len(), b * t * width, "hint: hidden states of [{b}, {t}, {width}]");
    assert_eq!(loss.targets.len(), b * t, "hint: targets of [{b}, {t}]");
    if !device.is_autodiff() {
        return x;
    }
    assert!(is_fused(&device), "hint: an operation of the CPU backends");
    let projection = or_none(projection, &device);
    let op = HiddenHint { teacher, loss };
    Tensor::from_dispatch(Dispatch::fused_hidden_hint(x.into_dispatch(), projection.into_dispatch(), op))
}

/// See [`hidden_hint`].
#[derive(Clone, Debug)]
pub(crate) struct HiddenHint {
    teacher: Arc<[f32]>,
    loss: HintLoss,
}

/// Of (x, projection).
impl Vjp<2> for HiddenHint {
    const KEEPS: [Keep; 2] = [Keep::Activation, Keep::Parameter];

    fn forward<B: HostBackend>(&self, [x, _]: [FloatTensor<B>; 2]) -> FloatTensor<B> {
        x
    }

    fn backward<B: HostBackend>(
        &self,
        [x, projection]: [Option<FloatTensor<B>>; 2],
        grad: FloatTensor<B>,
        [dx, dprojection]: [Sink<B>; 2],
    ) -> [Option<FloatTensor<B>>; 2] {
        let (x, projection) = (kept(x), kept(projection));
        let (shape, wide) = (dims::<B>(&x), dims::<B>(&projection));
        let (n, d) = (shape[0] * shape[1], shape[2]);
        let width = self.teacher.len() / n.max(1);
        let projected = wide[0] > 0;
        let (x, projection) = (B::values(x), Weight::<B>::new(projection));
        let mut apart = buffer(n * width);
        let rows = Mat::new(x.as_ref(), n, d, d);
        if projected {
            matmul(Compute::F32, rows, projection.mat(), &mut apart, width, Into::Write);
        } else {
            apart.copy_from_slice(x.as_ref());
        }
        let HintLoss { targets, scale, weight, parts } = &self.loss;
        let factor = 2.0 * weight * scale / width as f64;
        let mut squares = 0f64;
        let of_rows = apart.chunks_exact_mut(width).zip(self.teacher.chunks_exact(width)).zip(targets.iter());
        for ((apart, teacher), &target) in of_rows {
            if target < 0 {
                apart.fill(0.0);
                continue;
            }
            let mut of_row = 0f32;
            for (x, teacher) in apart.iter_mut().zip(teacher) {
                *x -= teacher;
                of_row += *x * *x;
                *x *= factor as f32;
            }
            squares += f64::from(of_row);
        }
        parts.add(LossParts::HIDDEN, squares * scale / width as f64);
        let mut g = B::into_vec(grad);
        let apart_rows = Mat::new(&apart, n, width, width);
        if projected {
            matmul(Compute::F32, apart_rows, projection.mat().t(), &mut g, d, Into::Add);
        } else {
            g.iter_mut().zip(&apart).for_each(|(g, x)| *g += x);
        }
        let dprojection = dprojection
            .fill(&wide, |out, into| matmul(Compute::F32, rows.t(), apart_rows, out, width, into))
            .filter(|_| projected);
        recycle(apart);
        [dx.hand_over(B::tensor(g, &shape)), dprojection]
    }
}

/// Queries, keys and values of a teacher's block, and how they are compared with a student's.
#[derive(Clone, Debug)]
pub struct Relations {
    /// `[q | k | v]`, `[B T, ..]`.
    pub teacher: Arc<[f32]>,
    /// The widths of all its queries, and of all its keys; values have that of keys.
    pub widths: [usize; 2],
    /// In how many parts each of them is cut.
    pub heads: usize,
}

/// `qkv` itself. In backward the gradient of `weight scale / heads` times a sum over queries, keys and values, their parts, and the tokens whose target is not negative is
/// added, of `KL(teacher | student)` of the token's relations: softmax of its scaled dot products with the tokens that it sees (MiniLM, Wang et al., arXiv:2002.10957,
/// section 3.2; with relation heads, so that widths and heads may differ, MiniLMv2, arXiv:2012.15828, section 3.1). Without gradients nothing happens.
///
/// # Shapes
/// - `qkv`: `[B, T, queries + 2 keys]` with `widths` = [queries, keys]
///
/// # Panics
/// If the shapes do not fit, the widths of either model are not multiples of the heads, the rows are divided among ranks, or the device is no CPU backend.
pub fn relation_hint(
    qkv: Tensor<3>,
    widths: [usize; 2],
    sequence: &Sequence,
    relations: Relations,
    loss: HintLoss,
) -> Tensor<3> {
    let ([b, t, width], device) = (qkv.dims(), qkv.device());
    let whole = |[queries, keys]: [usize; 2]| queries + 2 * keys;
    assert_eq!(width, whole(widths), "relations: queries, keys and values of {widths:?}");
    assert_eq!(relations.teacher.len(), b * t * whole(relations.widths), "relations: the teacher's of [{b}, {t}]");
    assert_eq!(loss.targets.len(), b * t, "relations: targets of [{b}, {t}]");
    let fit = widths.iter().chain(&relations.widths).all(|width| width.is_multiple_of(relations.heads.max(1)));
    assert!(fit && relations.heads > 0, "relations: {} heads of {widths:?}, {:?}", relations.heads, relations.widths);
    assert_eq!(sequence.divided().1, 1, "relations: of whole rows");
    if !device.is_autodiff() {
        return qkv;
    }
    assert!(is_fused(&device), "relations: an operation of the CPU backends");
    let op = RelationHint { widths, sequence: sequence.clone(), relations, loss };
    Tensor::from_dispatch(Dispatch::fused_relation_hint(qkv.into_dispatch(), op))
}

/// See [`relation_hint`].
#[derive(Clone, Debug)]
pub(crate) struct RelationHint {
    widths: [usize; 2],
    sequence: Sequence,
    relations: Relations,
    loss: HintLoss,
}

impl Vjp<1> for RelationHint {
    const KEEPS: [Keep; 1] = [Keep::Activation];

    fn forward<B: HostBackend>(&self, [x]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        x
    }

    fn backward<B: HostBackend>(
        &self,
        [x]: [Option<FloatTensor<B>>; 1],
        grad: FloatTensor<B>,
        [dx]: [Sink<B>; 1],
    ) -> [Option<FloatTensor<B>>; 1] {
        let x = kept(x);
        let shape = dims::<B>(&x);
        let (x, mut g) = (B::values(x), B::into_vec(grad));
        let HintLoss { targets, scale, weight, parts } = &self.loss;
        let keys = self.sequence.keys(None);
        let (student, teacher) = (
            kernel::Side { values: x.as_ref(), widths: self.widths },
            kernel::Side { values: &self.relations.teacher, widths: self.relations.widths },
        );
        let rows = kernel::Rows { tokens: shape[1], heads: self.relations.heads, seen: &keys[0].seen, targets };
        let scale = scale / self.relations.heads as f64;
        let sum = kernel::relations(student, teacher, rows, (weight * scale) as f32, &mut g);
        parts.add(LossParts::RELATIONS, sum * scale);
        [dx.hand_over(B::tensor(g, &shape))]
    }
}
