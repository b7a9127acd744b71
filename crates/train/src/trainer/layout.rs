//! A run as one rank of several.

use std::collections::{BTreeMap, HashMap};

use firebox_models::decoder::{Decoder, TensorParallelError};
use firebox_optim::{StateTensor, values};
use firebox_parallel::Communicator;

use super::Trainer;
use crate::TrainError;
use crate::fault;
use crate::model_io::{set_parameters, to_host};
use crate::ranks::{Layout, Ranks, Zero};
use crate::recipe::Recipe;
use crate::watch::OnSpike;

impl Trainer<'_> {
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
        let divided = layout.pp * layout.tp > 1 || layout.zero == Zero::States;
        if divided && self.optimizer.averages() {
            let got = format!("zero {}, pp {}, tp {}", u8::from(layout.zero), layout.pp, layout.tp);
            return fail(
                "ranks",
                "zero 0, pp 1 and tp 1 with schedule_free, whose averages are needed as a whole",
                got,
            );
        }
        if layout.pp * layout.tp > 1 {
            let whole = "pp 1 and tp 1: it needs the whole model on each rank";
            let got = format!("pp {}, tp {}", layout.pp, layout.tp);
            if average.is_some() {
                return fail("average", whole, got);
            }
            if watch.on_spike == OnSpike::Rollback {
                return fail("watch.on_spike = \"rollback\"", whole, got);
            }
            if self.optimizer.curvature_is_due(0) {
                return fail("optimizer.kind = \"sophia\"", whole, got);
            }
        }
        fault::check()?;
        let micro_batches = train.batch_rows.div_ceil(train.micro_rows());
        let Some(mut model) = self.model.take() else { return Ok(self) };
        let (axes, shapes) = (layout.axes(&world)?, self.optimizer.whole_state_shapes(&model)?);
        if layout.tp > 1 {
            model = self.divide_matrices(model, &axes.tp, layout.sequence_parallel)?;
        }
        let (ranks, model) = Ranks::new(world, axes, layout, model, &self.optimizer, (micro_batches, shapes))?;
        if layout.pp > 1 {
            self.optimizer.forget_others(&model)?;
        }
        if let Some(parts) = ranks.state_parts() {
            self.optimizer.shard(&model, parts)?;
        }
        self.model = Some(model);
        self.ranks = Some(ranks);
        Ok(self)
    }

    /// This rank's part of the model's matrices, and of the optimizer's state.
    fn divide_matrices(
        &mut self,
        model: Decoder,
        group: &Communicator,
        sequence_parallel: bool,
    ) -> Result<Decoder, TrainError> {
        if !self.optimizer.works_by_elements(&model)? {
            return Err(TrainError::Input {
                what: "tp",
                expected: "1 with optimizers and clippings of whole matrices; adamw, adam, sgd, lion and ademamix work on parts".into(),
                got: group.size().to_string(),
            });
        }
        let (config, device) = (model.config().clone(), model.embed.weight.val().device());
        let part = Decoder::sharded(&config, self.recipe.seed, &device, group, sequence_parallel);
        let part = part.map_err(|error| match error {
            TensorParallelError::Config(error) => TrainError::Model(error),
            TensorParallelError::Comm(error) => TrainError::Comm(error),
            other => TrainError::Input { what: "tp", expected: "1".into(), got: other.to_string() },
        })?;
        let (rank, size) = (group.rank(), group.size());
        let (mut parts, mut shapes) = (HashMap::new(), BTreeMap::new());
        for (info, whole) in values(&model) {
            let placement = config.placement(&info.name, size);
            parts.insert(info.name.clone(), placement.shard(&to_host(whole), &info.shape, rank, size));
            shapes.insert(info.name, info.shape);
        }
        drop(model);
        let part = set_parameters(part, parts).with_loss(self.recipe.train.loss());
        let cut = |tensor: StateTensor| {
            let (param, kind) = tensor.name.rsplit_once('.').unwrap_or((&tensor.name, ""));
            match shapes.get(param).filter(|_| kind != "steps") {
                None => tensor,
                Some(shape) => {
                    let placement = config.placement(param, size);
                    let values = placement.shard(&tensor.values, shape, rank, size);
                    StateTensor { shape: placement.shape(shape, rank, size), values, name: tensor.name }
                }
            }
        };
        let state: Vec<StateTensor> = self.optimizer.state().map(cut).collect();
        self.optimizer.load_state::<_, TrainError>(&part, state.into_iter().map(Ok))?;
        Ok(self.recipe.precision.hold(part))
    }
}
