//! Pipeline parallelism: each rank has some of the model's stages, and executes its list of a [`Plan`].
//!
//! A [`Pipeline`] cuts the model's stages into those of the plan, by what they cost. [`Engine::pipeline_gradients`](super::Engine::pipeline_gradients) executes the lists: what
//! [`Engine::gradients`](super::Engine::gradients) gives for all micro-batches of a step on one rank, each rank then has of its own parameters, to the bit: a stage's gradients are
//! added in the order of the micro-batches, and what two stages share (a tied embedding) is added where one rank would add it. What more than two share (a block of several layers) is added
//! within each stage of the plan first: the same sum, but for its last bits.

mod execute;
mod trace;
mod whole;

use std::collections::BTreeSet;
use std::ops::Range;

use burn::module::{ModuleMapper, Param};
use burn::tensor::Tensor;
use firebox_models::Staged;
use firebox_optim::parameters;
use firebox_parallel::pipeline::{self, Plan, Schedule};

use crate::TrainError;

pub use execute::Sink;
pub use trace::Event;

/// A model's stages on the ranks of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    plan: Plan,
    /// The model's stages that are each stage of the plan.
    cut: Vec<Range<usize>>,
}

/// What executing a step gives beside gradients.
#[derive(Debug, Clone)]
pub struct Executed {
    /// The sum of the losses of the micro-batches, the same on every rank.
    pub loss: f64,
    /// What this rank did, and when.
    pub events: Vec<Event>,
}

/// A parameter that several stages of the plan use.
#[derive(Debug)]
struct Shared {
    name: String,
    /// The stage that its gradient is complete in: the first that uses it.
    owner: usize,
    /// The other stages that use it, from the last on.
    users: Vec<usize>,
}

impl Pipeline {
    /// Writes a schedule out for a model on so many ranks, proves it, and cuts the model so that the dearest stage is as cheap as can be.
    ///
    /// # Errors
    /// [`TrainError::Input`]: numbers for which there is no such schedule, or more stages than the model has.
    pub fn new<M: Staged>(
        model: &M,
        schedule: Schedule,
        ranks: usize,
        micro_batches: usize,
    ) -> Result<Self, TrainError> {
        let what = "the pipeline";
        let wrong = |expected: &str, got: String| TrainError::Input { what, expected: expected.into(), got };
        let plan = schedule
            .plan(ranks, micro_batches)
            .map_err(|error| wrong("numbers for which its schedule is defined", error.to_string()))?;
        plan.check().map_err(|error| wrong("a plan that can be executed", error.to_string()))?;
        let costs: Vec<f64> = (0..model.n_stages()).map(|i| model.stage_flops(i)).collect();
        let cut = pipeline::cut(&costs, plan.stages()).map_err(|error| {
            let expected =
                format!("at most as many stages as the model, {}: fewer ranks, or fewer per rank", costs.len());
            wrong(&expected, error.to_string())
        })?;
        Ok(Self { plan, cut })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The model's stages that are each stage of the plan.
    pub fn cut(&self) -> &[Range<usize>] {
        &self.cut
    }

    /// The rank on which the gradient of a parameter is complete: that of the first stage that uses it. Over all ranks it is counted there and nowhere
    /// else, in a norm or a checkpoint.
    pub fn owner<M: Staged>(&self, model: &M, param: &str) -> usize {
        self.plan.placement[self.stage_of(model, param)]
    }

    /// Whether a rank uses a parameter.
    pub fn holds<M: Staged>(&self, model: &M, rank: usize, param: &str) -> bool {
        let of_rank = self.cut.iter().zip(&self.plan.placement).filter(|(_, r)| **r == rank);
        of_rank.flat_map(|(stages, _)| stages.clone()).any(|i| model.uses(i, param))
    }

    /// What a rank needs of the model: all other parameters are empty tensors without gradients. Parameters that have not been used yet are not even
    /// made.
    ///
    /// # Errors
    /// [`TrainError::Optim`] if two parameters have one path.
    pub fn part<M: Staged>(&self, model: M, rank: usize) -> Result<M, TrainError> {
        struct Empty {
            path: Vec<String>,
            held: BTreeSet<String>,
        }
        impl ModuleMapper for Empty {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.path.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.path.pop();
            }
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if self.held.contains(&self.path.join(".")) {
                    return param;
                }
                let empty = Tensor::zeros([0; D], &param.lazy_device());
                Param::initialized(param.id, empty.set_require_grad(false))
            }
        }
        // What stages use, a model says; mapping takes it apart.
        let held = parameters(&model)?.into_iter().map(|info| info.name);
        let held: BTreeSet<String> = held.filter(|name| self.holds(&model, rank, name)).collect();
        Ok(model.map(&mut Empty { path: vec![], held }))
    }

    /// The first stage of the plan that uses a parameter.
    pub(crate) fn stage_of<M: Staged>(&self, model: &M, param: &str) -> usize {
        let first = model.first_stage(param);
        // The ranges are contiguous and cover the model.
        self.cut.partition_point(|stages| stages.end <= first)
    }

    /// The trainable parameters that several stages use.
    fn shared<M: Staged>(&self, model: &M) -> Result<Vec<Shared>, TrainError> {
        let trainable = parameters(model)?.into_iter().filter(|info| info.trainable);
        let shared = trainable.filter_map(|info| {
            let owner = self.stage_of(model, &info.name);
            let uses = |stage: &usize| self.cut[*stage].clone().any(|i| model.uses(i, &info.name));
            let users: Vec<usize> = (owner + 1..self.cut.len()).rev().filter(uses).collect();
            (!users.is_empty()).then_some(Shared { name: info.name, owner, users })
        });
        Ok(shared.collect())
    }
}
