//! The engine that drives a model's stages: which graphs are kept, which stages are computed again in backward, where their inputs wait.
//!
//! The graph of autodiff is cut at every boundary between stages. A stage whose graph is *kept* runs once. One that is *recomputed* (activation
//! checkpointing, Chen et al., arXiv:1604.06174) runs without gradients in forward, where only its input is saved, and again with gradients in
//! backward. Either way backward goes through one stage at a time, from the last to the first, and gives the gradients of a stage's parameters as
//! soon as they are complete: they can be added up, or used and dropped. No choice changes a bit of the results.

pub mod pipeline;
mod recipe;
mod spill;
mod stages;

use std::ops::Range;
use std::path::PathBuf;

use burn::tensor::Tensor;
use firebox_models::{Flow, Staged, TokenBatch};
use firebox_optim::{NamedGrads, parameters};
use firebox_tensor::ops::{self, Compute, with_compute};

use crate::TrainError;
use crate::model_io::to_host;

pub use recipe::{MemoryRecipe, Offload, Recompute};
use spill::Spill;
pub(crate) use stages::{StageSource, losses_by_stage};

/// How forward and backward use memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Engine {
    /// Which stages are computed again in backward.
    pub recompute: Recompute,
    /// The folder with the file in which the inputs of recomputed stages wait, instead of memory. The file has no name: it is gone when the pass
    /// is, or the process, however that ends.
    pub offload: Option<PathBuf>,
    /// In what linear layers and the head multiply, and what backward needs of them waits.
    pub compute: Compute,
}

impl Engine {
    /// Adds the gradients of a batch in training step `step` to `total`; returns the loss.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn gradients<M: Staged>(
        &self,
        model: &M,
        batch: &TokenBatch,
        step: u64,
        total: &mut NamedGrads,
    ) -> Result<f64, TrainError> {
        let mut pass = self.forward(model, batch, step)?;
        while let Some(grads) = pass.backward(model)? {
            total.add(grads);
        }
        Ok(pass.loss())
    }

    /// Runs a batch forward; the result has the loss and goes backward.
    ///
    /// # Errors
    /// [`TrainError::Offload`] where the inputs of stages cannot be written: a full disk.
    ///
    /// # Panics
    /// If parameters that want gradients are not on an autodiff device.
    pub fn forward<'a, M: Staged>(&self, model: &M, batch: &'a TokenBatch, step: u64) -> Result<Pass<'a>, TrainError> {
        let (mut pass, output) = self.forward_part(model, 0..model.n_stages(), Flow::Start, batch, step)?;
        pass.loss = Some(output.loss());
        Ok(pass)
    }

    /// Runs a batch through some of the stages. Returns their output too, and no loss in the pass. Unless the first stage is among them, backward
    /// gives the gradient of their input.
    fn forward_part<'a, M: Staged>(
        &self,
        model: &M,
        stages: Range<usize>,
        input: Flow,
        batch: &'a TokenBatch,
        step: u64,
    ) -> Result<(Pass<'a>, Flow), TrainError> {
        let n = model.n_stages();
        let inside = stages.start > 0;
        let first = if inside { stages.start } else { first_stage(model)? };
        let mut pass = self.start(first, inside, batch, step)?;
        // Shares the parameters' memory, for as long as this function runs.
        let mut plain = None;
        let mut flow = input;
        for i in stages {
            flow = if i >= first && self.recompute.keeps(i, n) {
                pass.keep(model, i, flow)
            } else {
                pass.run(plain.get_or_insert_with(|| model.valid()), i, flow)?
            };
        }
        Ok((pass, flow))
    }

    /// A pass that has run no stage yet.
    fn start<'a>(&self, first: usize, inside: bool, batch: &'a TokenBatch, step: u64) -> Result<Pass<'a>, TrainError> {
        Ok(Pass {
            batch,
            step,
            compute: self.compute,
            first,
            inside,
            saved: vec![],
            spill: self.offload.as_deref().map(Spill::create).transpose()?,
            loss: None,
            upstream: None,
            pending: NamedGrads::new(),
        })
    }
}

/// The first stage with a parameter that is trained: those before it get no gradients.
fn first_stage<M: Staged>(model: &M) -> Result<usize, TrainError> {
    let trainable = parameters(model)?.into_iter().filter(|info| info.trainable);
    Ok(trainable.map(|info| model.first_stage(&info.name)).min().unwrap_or(model.n_stages()))
}

/// A batch on its way: after the forward pass, and through the backward pass stage by stage.
#[derive(Debug)]
pub struct Pass<'a> {
    batch: &'a TokenBatch,
    step: u64,
    compute: Compute,
    /// The first stage that gets gradients.
    first: usize,
    /// Whether it is in the middle of the model, and the gradient of its input is wanted.
    inside: bool,
    /// What backward needs of the stages from `first` on that it has not reached.
    saved: Vec<Saved>,
    spill: Option<Spill>,
    loss: Option<Tensor<1>>,
    /// The gradient of the output of the last of these.
    upstream: Option<Tensor<3>>,
    /// Gradients of parameters that an earlier stage uses too.
    pending: NamedGrads,
}

// One for each stage: nothing to save on.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Saved {
    Graph(Recorded),
    Input(Flow),
    Spilled,
}

/// A stage that ran with gradients.
#[derive(Debug)]
struct Recorded {
    /// The leaf, where its gradient is wanted.
    input: Option<Tensor<3>>,
    output: Flow,
}

impl Pass<'_> {
    /// Runs the next stage forward and keeps its graph.
    fn keep<M: Staged>(&mut self, model: &M, i: usize, flow: Flow) -> Flow {
        let stage = self.record(model, i, flow);
        let output = match &stage.output {
            Flow::Hidden(y) => Flow::Hidden(y.clone().inner()),
            Flow::Loss(loss) => Flow::Loss(loss.clone().inner()),
            Flow::Start => Flow::Start,
        };
        self.saved.push(Saved::Graph(stage));
        output
    }

    /// Runs the next stage forward, with parameters without gradients, and keeps its input if it will go backward.
    fn run<M: Staged>(&mut self, plain: &M, i: usize, flow: Flow) -> Result<Flow, TrainError> {
        let saved = match (&flow, &mut self.spill) {
            _ if i < self.first => None,
            (Flow::Hidden(x), Some(spill)) => {
                spill.push(x)?;
                Some(Saved::Spilled)
            }
            _ => Some(Saved::Input(flow.clone())),
        };
        self.saved.extend(saved);
        Ok(with_compute(self.compute, || plain.forward_stage(i, flow, self.batch, Some(self.step))))
    }

    /// The loss. Waits for the device.
    pub fn loss(&self) -> f64 {
        self.loss.as_ref().map_or(0.0, |loss| f64::from(to_host(loss.clone())[0]))
    }

    /// Goes backward through the next stage, from the last to the first. Returns the gradients that are now complete: those of parameters that no
    /// earlier stage uses. `None` when all stages are done.
    ///
    /// Between two calls the parameters whose gradients were returned may change, and no others.
    ///
    /// # Errors
    /// [`TrainError::Offload`] where the input of the stage cannot be read back.
    pub fn backward<M: Staged>(&mut self, model: &M) -> Result<Option<NamedGrads>, TrainError> {
        let Some(saved) = self.saved.pop() else { return Ok(None) };
        let i = self.first + self.saved.len();
        let Recorded { input, output } = match saved {
            Saved::Graph(stage) => stage,
            Saved::Input(flow) => self.record(model, i, flow),
            Saved::Spilled => {
                let x = self.spill.as_mut().map(Spill::pop).transpose()?;
                self.record(model, i, x.map_or(Flow::Start, Flow::Hidden))
            }
        };
        let loss = match self.upstream.take() {
            Some(upstream) => ops::seed(output.hidden(), upstream),
            None => output.loss(),
        };
        let carried = self.pending.extract(|name| model.first_stage(name) == i);
        let (mut complete, mut grads) = NamedGrads::backward_onto(model, loss, carried);
        self.upstream = input.and_then(|x| x.grad_remove(&mut grads));
        self.pending.add(complete.extract(|name| model.first_stage(name) != i));
        Ok(Some(complete))
    }

    /// Runs a stage with gradients.
    fn record<M: Staged>(&self, model: &M, i: usize, flow: Flow) -> Recorded {
        let (input, flow) = match flow {
            Flow::Hidden(x) if i > self.first || self.inside => {
                let x = Tensor::from_inner(x).require_grad();
                (Some(x.clone()), Flow::Hidden(ops::enter(x)))
            }
            Flow::Hidden(x) => (None, Flow::Hidden(Tensor::from_inner(x))),
            other => (None, other),
        };
        let output = with_compute(self.compute, || model.forward_stage(i, flow, self.batch, Some(self.step)));
        Recorded { input, output }
    }
}
