//! A run as one rank of several.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use firebox_models::Placement;
use firebox_models::transformer::{ContextParallel, TensorParallelError, Transformer};
use firebox_optim::{ParamInfo, StateTensor, parameters};
use firebox_parallel::Communicator;
use firebox_tensor::device::is_fused;

use super::Trainer;
use super::distill::project;
use crate::TrainError;
use crate::distill::Teacher;
use crate::engine::Recompute;
use crate::fault;
use crate::model_io::{Later, later, set_later};
use crate::ranks::{Layout, Ranks, Shards, Zero};
use crate::recipe::Recipe;
use crate::task::{Model, TaskRecipe, device_of};
use crate::watch::OnSpike;

impl<M: Model> Trainer<'_, M> {
    /// The same run as one of the ranks of `world`, each of which has made the same trainer, divided as `layout` says. The parameters are those of one rank, bit for
    /// bit; where the optimizer's state or the model is divided, but for the last digit of the gradients' norm.
    ///
    /// # Errors
    /// [`TrainError::Input`] for what ranks cannot do together.
    pub fn with_ranks(mut self, world: Communicator, layout: Layout) -> Result<Self, TrainError> {
        let fail = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
        let Recipe { memory, watch, train, average, .. } = &self.recipe;
        if memory.optimizer_in_backward {
            return fail("memory.optimizer_in_backward", "false with several ranks", "true".into());
        }
        if watch.noise_scale_every > 0 {
            return fail("watch.noise_scale_every", "0 with several ranks", watch.noise_scale_every.to_string());
        }
        let divided = layout.pp * layout.tp * layout.ep > 1 || layout.zero.divides();
        if divided && self.optimizer.averages() {
            let Layout { zero, pp, tp, ep, .. } = layout;
            let got = format!("zero {}, pp {pp}, tp {tp}, ep {ep}", u8::from(zero));
            return fail(
                "ranks",
                "zero 0, pp 1, tp 1 and ep 1 with schedule_free, whose averages are needed as a whole",
                got,
            );
        }
        if layout.cp > 1 && self.optimizer.curvature_is_due(0) {
            return fail(
                "optimizer.kind = \"sophia\"",
                "cp 1: it draws targets from whole rows",
                format!("cp {}", layout.cp),
            );
        }
        if layout.cp > 1 && matches!(self.recipe.task, TaskRecipe::Preference(_)) {
            return fail("cp", "1 with preferences: each rank needs whole rows", layout.cp.to_string());
        }
        if layout.pp > 1 && layout.zero == Zero::Parameters {
            let expected = "0, 1 or 2 with pp: a pipeline uses its stages for one micro-batch after the other, and would bring each together for \
                            every one of them";
            return fail("zero", expected, "3".into());
        }
        super::pruning::check_layout(&self.recipe, &layout)?;
        if let Some(qat) = &self.recipe.qat {
            qat.check_layout(&layout)?;
        }
        if let Some(adapter) = &self.recipe.adapter {
            adapter.check_layout(&layout)?;
        }
        let model = self.model();
        if let Some(transformer) = model.transformer() {
            super::experts::check_layout(transformer.config(), &layout, train.batch_warmup.is_some())?;
        }
        for (what, degree) in [("cp", layout.cp), ("ep", layout.ep)] {
            if degree > 1 && model.transformer().is_none() {
                let expected = "1 with this model, which is not one transformer";
                return fail(what, expected, degree.to_string());
            }
        }
        if layout.pp * layout.tp * layout.ep > 1 || layout.zero == Zero::Parameters {
            let whole = "pp 1, tp 1, ep 1 and zero 0, 1 or 2: it needs the whole model on each rank";
            let Layout { zero, pp, tp, ep, .. } = layout;
            let got = format!("pp {pp}, tp {tp}, ep {ep}, zero {}", u8::from(zero));
            if average.is_some() && layout.pp * layout.tp * layout.ep > 1 {
                return fail("average", whole, got);
            }
            if watch.on_spike == OnSpike::Rollback {
                return fail("watch.on_spike = \"rollback\"", whole, got);
            }
            if self.optimizer.curvature_is_due(0) {
                return fail("optimizer.kind = \"sophia\"", whole, got);
            }
        }
        if model.couples_rows() && layout.pp > 1 {
            let expected = "1 with a loss that compares the rows of ranks, which a pipeline has at different times";
            return fail("pp", expected, layout.pp.to_string());
        }
        fault::check()?;
        let micro_batches = train.batch_rows.div_ceil(train.micro_rows());
        let copies = world.size() / (layout.pp * layout.tp * layout.cp);
        let uneven = !micro_batches.is_multiple_of(copies) || !train.batch_rows.is_multiple_of(train.micro_rows());
        if model.couples_rows() && copies > 1 && (uneven || train.batch_warmup.is_some()) {
            let expected = format!(
                "micro-batches in multiples of the {copies} ranks with data of their own, whose rows the loss compares: set train.batch_rows higher or \
                 train.micro_batch_rows lower, without train.batch_warmup"
            );
            return fail("ranks", &expected, format!("{micro_batches} micro-batches"));
        }
        let Some(mut model) = self.model.take() else { return Ok(self) };
        let (axes, shapes) = (layout.axes(&world)?, self.optimizer.whole_state_shapes(&model)?);
        self.teacher = self.teacher.take().map(|teacher| teacher.with_ranks(&axes.cp, &layout)).transpose()?;
        if layout.tp > 1 {
            model = self.divide_matrices(model, &axes.tp, layout.sequence_parallel)?;
        }
        if layout.cp > 1 {
            Self::check_rows(&model, &layout)?;
            let rows = ContextParallel { group: axes.cp.clone(), kind: layout.context };
            model = model.map_transformer(|model| model.with_context(Some(rows)));
        }
        if layout.ep > 1 {
            model = self.divide_experts(model, &axes.ep)?;
        }
        model = model.with_data_ranks(&axes.dp);
        let (ranks, model) = Ranks::new(world, axes, layout, model, &self.optimizer, (micro_batches, shapes))?;
        if layout.pp > 1 {
            self.optimizer.forget_others(&model)?;
        }
        if let Some(parts) = ranks.state_parts() {
            self.optimizer.shard(&model, parts)?;
        }
        self.model = Some(if layout.zero == Zero::Parameters {
            self.engine.recompute = Recompute::Blocks;
            let parts = ranks.state_parts().unwrap_or_default();
            let shards = Shards::take(model, &parts, &self.recipe.precision)?;
            if let Some(average) = &mut self.average {
                average.shard(parts);
            }
            self.shards.insert(shards).shapes().clone()
        } else {
            model
        });
        self.ranks = Some(ranks);
        Ok(self)
    }

    /// What of a whole tensor of the optimizer's state is for this rank: none of parameters that it does not have, and the part of matrices that are divided.
    /// Parts of parameters are for the optimizer to take.
    pub(super) fn of_this_rank(&self) -> Result<impl Fn(StateTensor) -> Option<StateTensor> + use<M>, TrainError> {
        let (model, divided) = (self.model(), self.ranks.as_ref().and_then(Ranks::divided_state));
        let grid = Grid::of(model)?;
        let here = parameters(model)?.into_iter().filter(|info| info.trainable);
        let whole = |info: ParamInfo| {
            let placement = grid.as_ref().map_or_else(Placement::replicated, |grid| grid.placement(&info.name));
            (info.name, placement.full_shape(&info.shape))
        };
        let shapes: BTreeMap<String, Vec<usize>> = here.map(whole).collect();
        let all: BTreeSet<String> = divided.into_iter().flatten().map(|(name, _)| name.clone()).collect();
        Ok(move |tensor: StateTensor| {
            let param = tensor.name.rsplit_once('.').map_or("", |(param, _)| param);
            let elsewhere = all.contains(&tensor.name) && !shapes.contains_key(param);
            (!elsewhere).then(|| match &grid {
                Some(grid) => grid.cut(&shapes, tensor),
                None => tensor,
            })
        })
    }

    /// Whether ranks can divide the rows of this model.
    fn check_rows(model: &M, layout: &Layout) -> Result<(), TrainError> {
        let device = device_of(model);
        if !is_fused(&device) {
            let expected = "1, or a CPU backend (ndarray, flex): ranks talk through its memory".into();
            return Err(TrainError::Input { what: "cp", expected, got: format!("{} on {device:?}", layout.cp) });
        }
        if let Some(transformer) = model.transformer() {
            transformer.config().validate_context(layout.context, layout.cp, layout.tp)?;
        }
        Ok(())
    }

    /// This rank's part of the model's matrices, and of the optimizer's state.
    fn divide_matrices(&mut self, model: M, group: &Communicator, sequence_parallel: bool) -> Result<M, TrainError> {
        self.check_works_by_elements("tp", &model, group)?;
        let part = model.sharded(self.recipe.seed, group, sequence_parallel)?;
        self.divide(model, part)
    }

    /// This rank's experts, and what the optimizer remembers of them.
    fn divide_experts(&mut self, model: M, group: &Communicator) -> Result<M, TrainError> {
        self.check_works_by_elements("ep", &model, group)?;
        let Some(transformer) = model.transformer() else { return Ok(model) };
        let (config, device) = (transformer.config().clone(), device_of(&model));
        let part = Transformer::with_divided_experts(&config, self.recipe.seed, &device, group);
        let part = part.map_err(|error| cannot_divide("ep", error))?;
        let part = model.clone().map_transformer(|_| part);
        self.divide(model, part)
    }

    fn check_works_by_elements(&self, what: &'static str, model: &M, group: &Communicator) -> Result<(), TrainError> {
        if self.optimizer.works_by_elements(model)? {
            return Ok(());
        }
        Err(TrainError::Input {
            what,
            expected:
                "1 with optimizers and clippings of whole matrices; adamw, adam, sgd, lion and ademamix work on parts"
                    .into(),
            got: group.size().to_string(),
        })
    }

    /// Gives `part`, made for it, this rank's part of the values of `model`, and the optimizer that of its state.
    fn divide(&mut self, model: M, part: M) -> Result<M, TrainError> {
        let projected = self.teacher.as_ref().and_then(Teacher::projected);
        let (seed, device) = (self.recipe.seed, device_of(&model));
        let part = part.map_transformer(|part| project(part, projected, seed, &device));
        let Some(grid) = Grid::of(&part)? else { return Ok(model) };
        let (mut parts, mut shapes) = (HashMap::new(), BTreeMap::new());
        let (rank, size) = (grid.rank, grid.size);
        for (info, whole) in later(&model) {
            let (placement, shape) = (grid.placement(&info.name), info.shape.clone());
            let part: Later = Box::new(move || placement.shard(&whole(), &shape, rank, size));
            parts.insert(info.name.clone(), part);
            shapes.insert(info.name, info.shape);
        }
        drop(model);
        let part = self.recipe.prepared(set_later(part, parts))?;
        let cut = |tensor| grid.cut(&shapes, tensor);
        let state: Vec<StateTensor> = self.optimizer.state().map(cut).collect();
        self.optimizer.load_state::<_, TrainError>(&part, state.into_iter().map(Ok))?;
        Ok(part)
    }
}

/// What makes a model one that ranks cannot divide.
pub(crate) fn cannot_divide(what: &'static str, error: TensorParallelError) -> TrainError {
    match error {
        TensorParallelError::Config(error) => TrainError::Model(error),
        TensorParallelError::Comm(error) => TrainError::Comm(error),
        other => TrainError::Input { what, expected: "1".into(), got: other.to_string() },
    }
}

/// How ranks divide the parameters of a model: by matrices, or by experts.
struct Grid {
    /// By name.
    placements: BTreeMap<String, Placement>,
    rank: usize,
    size: usize,
}

impl Grid {
    /// As the parameters of `model` are divided, if they are.
    fn of<M: Model>(model: &M) -> Result<Option<Self>, TrainError> {
        let experts = model.transformer().and_then(|model| Some((model.config(), model.expert_group()?)));
        let (group, config) = match (model.parallel(), experts) {
            (Some(parallel), _) => (parallel.group(), None),
            (None, Some((config, group))) => (group, Some(config)),
            (None, None) => return Ok(None),
        };
        let placement = |name: &str| match config {
            Some(config) => config.expert_placement(name),
            None => model.placement(name),
        };
        let placements = parameters(model)?.into_iter().map(|info| (placement(&info.name), info.name));
        let placements = placements.map(|(placement, name)| (name, placement)).collect();
        Ok(Some(Self { placements, rank: group.rank(), size: group.size() }))
    }

    fn placement(&self, param: &str) -> Placement {
        self.placements.get(param).cloned().unwrap_or_else(Placement::replicated)
    }

    /// This rank's part of a whole tensor of the optimizer's state, where `shapes` are those of whole parameters. One that does not fit comes back as it is.
    fn cut(&self, shapes: &BTreeMap<String, Vec<usize>>, tensor: StateTensor) -> StateTensor {
        let (param, kind) = tensor.name.rsplit_once('.').unwrap_or((&tensor.name, ""));
        match shapes.get(param).filter(|shape| kind != "steps" && **shape == tensor.shape) {
            None => tensor,
            Some(shape) => {
                let placement = self.placement(param);
                let values = placement.shard(&tensor.values, shape, self.rank, self.size);
                StateTensor { shape: placement.shape(shape, self.rank, self.size), values, name: tensor.name }
            }
        }
    }
}
