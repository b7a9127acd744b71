//! A decoder as a teacher and as a student: what it shows of its inside, and what it learns there.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::ops::{self, HintLoss};
use firebox_tensor::random::{Counter, Purpose, normal};

use super::config::TransformerConfig;
use super::model::{Linear, Transformer};
use crate::lesson::Taught;
use crate::stage::{Flow, Staged, TokenBatch};

/// What a decoder shows of its inside.
#[derive(Debug)]
pub struct Observed {
    /// The outputs of the blocks that were asked for, in their order, `[B, T, D]`.
    pub blocks: Vec<Tensor<3>>,
    /// `[q | k | v]` of the block that was asked for, not yet rotated, `[B, T, (H + 2 K) E]`.
    pub qkv: Option<Tensor<3>>,
    /// What the head is multiplied with: after the final norm, and as wide as the head's rows, `[B, T, D]`.
    pub hidden: Tensor<3>,
    /// The head's weight, `[V, D]`.
    pub head: Tensor<2>,
}

impl TransformerConfig {
    /// The widths of all queries and of all keys of a block.
    pub fn qk_widths(&self) -> [usize; 2] {
        [self.n_heads, self.n_kv_heads].map(|heads| heads * self.head_dim)
    }
}

impl Transformer {
    /// The same decoder with a projection of each block's output to `width`, for a teacher of that width: parameters that are trained with the others and belong to
    /// no Hugging Face file. Their initial values are normal, with a deviation of one over the root of the decoder's width.
    pub fn with_projections(mut self, width: usize, seed: u64, device: &Device) -> Self {
        let d = self.config().d_model;
        let counter = Counter::new(seed, Purpose::Init, 0);
        let projection = |i: usize| {
            let counter = counter.fork(&format!("projections.{i}"));
            let init = move |device: &Device, require_grad: bool| {
                let values: Vec<f32> = (0..d * width).map(|k| normal(counter, k as u64) / (d as f32).sqrt()).collect();
                Tensor::from_data(TensorData::new(values, [d, width]), device).set_require_grad(require_grad)
            };
            let shape = [d, width].into();
            Linear::new(Param::uninitialized(ParamId::new(), init, device.clone(), true, shape), None)
        };
        self.projections = (0..self.config().n_layers).map(projection).collect();
        self
    }

    /// Runs a batch as in evaluation, and shows the outputs of some blocks (in rising order), and queries, keys and values of one.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden); if the matrices are divided among ranks.
    pub fn observe(&self, batch: &TokenBatch, blocks: &[usize], relations: Option<usize>) -> Observed {
        self.assert_whole();
        let (mut shown, mut qkv, mut flow) = (vec![], None, Flow::Start);
        for i in 0..self.n_stages() - 1 {
            if let (true, Flow::Hidden(x)) = (relations.is_some_and(|block| block + 1 == i), &flow) {
                qkv = self.layer(i - 1).map(|layer| layer.project(x.clone(), self.attention_config()));
            }
            flow = self.forward_stage(i, flow, batch, None);
            // One teacher's block may have several students.
            if let Flow::Hidden(x) = &flow {
                let times = blocks.iter().filter(|&&block| block + 1 == i).count();
                shown.extend(std::iter::repeat_n(x.clone(), times));
            }
        }
        let hidden = self.before_head(self.final_norm(flow.hidden()));
        Observed { blocks: shown, qkv, hidden, head: self.head_weight() }
    }

    /// A block's output, which learns from the teacher's where there is a lesson of it.
    pub(super) fn hinted(&self, block: usize, x: Tensor<3>, batch: &TokenBatch) -> Tensor<3> {
        let Some(taught) = of_blocks(batch) else { return x };
        let Some(hints) = taught.hidden.as_ref() else { return x };
        let projection = self.projections.get(block).map(|projection| projection.weight.val());
        let loss = loss(batch, hints.weight, taught);
        ops::hidden_hint(x, projection, hints.blocks[block].clone(), loss)
    }

    /// Queries, keys and values of the last block, which learn from the teacher's where there is a lesson of them.
    pub(super) fn related(&self, block: usize, qkv: Tensor<3>, batch: &TokenBatch) -> Tensor<3> {
        if block + 1 < self.config().n_layers {
            return qkv;
        }
        let Some(taught) = of_blocks(batch) else { return qkv };
        let Some((relations, weight)) = taught.relations.clone() else { return qkv };
        let loss = loss(batch, weight, taught);
        ops::relation_hint(qkv, self.config().qk_widths(), &batch.sequence, relations, loss)
    }
}

/// What blocks learn of a batch. A lesson of the last stage alone is not asked for before that runs.
fn of_blocks(batch: &TokenBatch) -> Option<&Taught> {
    batch.lesson.as_ref().filter(|lesson| lesson.is_of_blocks()).map(|lesson| lesson.taught())
}

fn loss(batch: &TokenBatch, weight: f64, taught: &Taught) -> HintLoss {
    HintLoss { targets: batch.targets.clone(), scale: batch.loss_scale, weight, parts: taught.parts.clone() }
}
