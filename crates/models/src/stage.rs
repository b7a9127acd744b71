//! A model as a list of stages.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use firebox_tensor::ops::{Preference, Sequence, zigzag_part};

use crate::lesson::Lesson;
use crate::placement::Placement;

/// A batch of token rows `[B, T]` as models take it.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// Token ids, `[B, T]`.
    pub inputs: Arc<[i32]>,
    /// What follows each token, `[B, T]`; negative where nothing is to be predicted.
    pub targets: Arc<[i32]>,
    /// Positions and segments.
    pub sequence: Sequence,
    /// What the summed loss is multiplied by: one over the number of targets of the whole batch of which this is a part.
    pub loss_scale: f64,
    /// What a teacher says of these tokens, where a student learns from one. It is for training: without it, the loss is that of the targets alone.
    pub lesson: Option<Lesson>,
    /// What its rows have besides tokens.
    pub extra: Option<Arc<Extra>>,
}

/// What rows of a batch have besides tokens; what a model does not ask for is empty.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// The class of each row, `[B]`; negative where it has none. Of embeddings, which candidate belongs to an anchor, where the rows with negative labels are the candidates in their order.
    pub labels: Vec<i32>,
    /// The numbers that each row is to give, `[B, N]`.
    pub values: Vec<f32>,
    /// The type of each token, `[B, T]`.
    pub token_types: Vec<i32>,
    /// Normalized pixels of each row's image, `[B, C, size, size]`. Which of its patches a row has, its positions say: 0 is the class token, which comes first, and 1 + i patch i.
    pub pixels: Vec<f32>,
    /// Rows come in pairs, the preferred one first: what the model's probabilities of their targets are compared with.
    pub preference: Option<Arc<Preference>>,
}

impl TokenBatch {
    /// A batch whose loss is the mean over its own targets.
    pub fn new(inputs: Vec<i32>, targets: Vec<i32>, sequence: Sequence) -> Self {
        let count = targets.iter().filter(|&&t| t >= 0).count();
        let loss_scale = 1.0 / count.max(1) as f64;
        Self { inputs: inputs.into(), targets: targets.into(), sequence, loss_scale, lesson: None, extra: None }
    }

    /// This batch's share of the targets of the batch of which it is a part, times whatever else scales the loss. Where rows have labels, these are the targets, and where they come in pairs,
    /// the pairs.
    pub fn share(&self) -> f64 {
        if let Some(pairs) = self.preference() {
            return (pairs.reference.len() / 2) as f64 * self.loss_scale;
        }
        let labels = self.extra.as_ref().map_or(&[][..], |extra| &extra.labels);
        let targets = if labels.is_empty() { &self.targets } else { labels };
        targets.iter().filter(|&&target| target >= 0).count() as f64 * self.loss_scale
    }

    /// What its pairs of rows are compared with, if they are pairs.
    pub fn preference(&self) -> Option<&Arc<Preference>> {
        self.extra.as_ref()?.preference.as_ref()
    }

    /// Rows of one segment each, at positions `0..tokens`.
    pub fn plain(batch: usize, tokens: usize, inputs: Vec<i32>, targets: Vec<i32>) -> Self {
        Self::new(inputs, targets, Sequence::plain(batch, tokens))
    }

    /// The tokens of each row that rank `rank` of `size` has where ranks divide the rows ([`zigzag`](firebox_tensor::ops::zigzag)), with the loss scale of the whole
    /// and without its lesson.
    pub fn part(&self, rank: usize, size: usize) -> Self {
        let tokens = self.sequence.tokens();
        let mine = |values: &[i32]| zigzag_part(values, tokens, rank, size).into();
        Self {
            inputs: mine(&self.inputs),
            targets: mine(&self.targets),
            sequence: self.sequence.part(rank, size),
            loss_scale: self.loss_scale,
            lesson: None,
            // Per row, or of tokens that no rank divides.
            extra: self.extra.clone(),
        }
    }
}

/// What flows from stage to stage.
#[derive(Clone, Debug)]
pub enum Flow {
    /// Nothing yet: the first stage reads the batch.
    Start,
    /// Hidden states, `[B, T, D]`.
    Hidden(Tensor<3>),
    /// The loss, `[1]`: the last stage's output, unless the model has no head.
    Loss(Tensor<1>),
}

impl Flow {
    /// The hidden states.
    ///
    /// # Panics
    /// If this is something else: stages were run out of order.
    #[track_caller]
    pub fn hidden(self) -> Tensor<3> {
        match self {
            Flow::Hidden(x) => x,
            other => panic!("expected hidden states, got {other:?}: run the stages in order"),
        }
    }

    /// The loss.
    ///
    /// # Panics
    /// If this is something else: the last stage has not been run.
    #[track_caller]
    pub fn loss(self) -> Tensor<1> {
        match self {
            Flow::Loss(loss) => loss,
            other => panic!("expected the loss, got {other:?}: it is the last stage that gives it"),
        }
    }
}

/// A model that runs as a list of stages: embedding, blocks, head with loss. Whoever drives it owns every decision on memory and parallelism.
pub trait Staged: Module {
    /// Number of stages.
    fn n_stages(&self) -> usize;

    /// Runs stage `i`: of training step `step`, which counts dropout's randomness, or, for `None`, as in evaluation, without dropout. Whether
    /// gradients are recorded is another question, which the device of the parameters answers.
    ///
    /// # Panics
    /// If `flow` is not what the stage before it returns.
    fn forward_stage(&self, i: usize, flow: Flow, batch: &TokenBatch, step: Option<u64>) -> Flow;

    /// The first stage that uses the parameter of this name (its path in the module): in backward its gradient is complete once that stage is
    /// done.
    fn first_stage(&self, param: &str) -> usize;

    /// Whether stage `i` uses the parameter of this name. Unless a model says otherwise, each is used by one stage alone.
    fn uses(&self, i: usize, param: &str) -> bool {
        self.first_stage(param) == i
    }

    /// What a token costs in stage `i`, in floating-point operations of forward and backward: by it a pipeline is cut. Unless a model says otherwise,
    /// stages cost the same.
    fn stage_flops(&self, _i: usize) -> f64 {
        1.0
    }

    /// The first two dimensions of the hidden states between stages: B and T of the batch, unless ranks divide its tokens further.
    fn hidden_tokens(&self, batch: &TokenBatch) -> [usize; 2] {
        [batch.sequence.batch(), batch.sequence.tokens()]
    }

    /// How the parameter of this name is divided among the ranks that share the model's matrices, where there are such.
    fn placement(&self, _param: &str) -> Placement {
        Placement::replicated()
    }

    /// Whether the parameter of this name is one of experts that ranks with other batches have divided: its gradient is then of the batches of all of these.
    fn is_divided_expert(&self, _param: &str) -> bool {
        false
    }

    /// The loss `[1]` of a batch: all stages in order.
    fn loss(&self, batch: &TokenBatch, step: Option<u64>) -> Tensor<1> {
        (0..self.n_stages()).fold(Flow::Start, |flow, i| self.forward_stage(i, flow, batch, step)).loss()
    }
}
