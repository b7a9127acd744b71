//! Data parallelism: several ranks train the same model, each on its share of a batch's micro-batches, and ZeRO's division of gradients and optimizer state
//! among them (Rajbhandari et al., arXiv:1910.02054).
//!
//! Micro-batch `i` of a step is computed by rank `i mod n`. As soon as backward has the gradients of a stage, in the background each rank sends every other the
//! part of them that is that rank's; it adds what it gets to its part of the sum in the order of the micro-batches. So the sum has the same bits as on one rank,
//! which goes through the micro-batches in this order, whatever the number of ranks; and nobody holds a sum of all gradients.

mod collect;
mod division;
mod exchange;
mod layout;
mod shards;
mod traffic;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use firebox_models::{Staged, TokenBatch};
use firebox_optim::{NamedGrads, Optimizer, ParamInfo, Parts, values};
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{CommError, Communicator, ReduceOp};

use crate::TrainError;
use crate::engine::pipeline::Pipeline;
use crate::model_io::{set_parameters, to_host};
pub use collect::{Collect, Parted};
use division::Divisions;
pub use exchange::Exchange;
pub use layout::{Axes, Layout, Zero};
pub use shards::{Shards, bytes};

/// Names and shapes of tensors.
pub type Shapes = Vec<(String, Vec<usize>)>;

/// Elements of parameters that are gathered at once.
const BUCKET: usize = 4 << 20;

/// This rank among those that train together.
#[derive(Debug)]
pub struct Ranks {
    world: Communicator,
    /// Those that have the same stages, and other data.
    data: Communicator,
    /// Those that have the same stages, and other tokens of the same rows.
    context: Communicator,
    layout: Layout,
    /// Those that have the other stages, where they are divided.
    pipe: Option<Pipe>,
    /// Those that have the other parts of the matrices.
    tp: Communicator,
    /// Names and shapes of the state of the whole model.
    state_shapes: Shapes,
    collect: Arc<Collect>,
    /// Who adds up which gradients, and has which parts.
    divisions: Divisions,
    /// Trainable parameters by the stage whose backward completes their gradients: those whose gradients are completed here.
    stages: Vec<Vec<String>>,
    /// The shapes of these.
    shapes: BTreeMap<String, Vec<usize>>,
}

/// This rank's place in a pipeline.
#[derive(Debug)]
pub struct Pipe {
    /// The ranks of the pipeline.
    pub group: Communicator,
    /// For the usual number of micro-batches.
    pipeline: Pipeline,
    schedule: Schedule,
}

impl Pipe {
    /// The pipeline for the usual number of micro-batches.
    pub fn usual(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The pipeline for so many micro-batches.
    ///
    /// # Errors
    /// As [`Pipeline::new`].
    pub fn pipeline<M: Staged>(&self, model: &M, micro_batches: usize) -> Result<Cow<'_, Pipeline>, TrainError> {
        if self.pipeline.plan().micro_batches == micro_batches {
            return Ok(Cow::Borrowed(&self.pipeline));
        }
        Ok(Cow::Owned(Pipeline::new(model, self.schedule, self.group.size(), micro_batches)?))
    }
}

impl Ranks {
    /// For the ranks of `world`, each of which has the same model or a part of its matrices, for so many micro-batches in a step; and what of the model is
    /// this rank's. `state_shapes` are those of the whole model.
    ///
    /// # Errors
    /// [`TrainError::Input`] for what cannot be divided so; [`TrainError::Comm`].
    pub fn new<M: Staged>(
        world: Communicator,
        axes: Axes,
        layout: Layout,
        model: M,
        optimizer: &Optimizer,
        (micro_batches, state_shapes): (usize, Shapes),
    ) -> Result<(Self, M), TrainError> {
        let fail = |what, expected: String, got: String| Err(TrainError::Input { what, expected, got });
        let Layout { zero, pp, schedule, .. } = layout;
        let (n, copies) = (world.size(), axes.dp.size());
        let even = pp * layout.ep == 1 || micro_batches.is_multiple_of(copies);
        if micro_batches < copies || !even {
            let expected = match pp {
                1 if layout.ep == 1 => "at least as many micro-batches in a step as ranks".to_owned(),
                1 => format!(
                    "micro-batches in multiples of the {copies} ranks that divide experts and have data of their own"
                ),
                _ => format!("micro-batches in multiples of the {copies} pipelines"),
            };
            let expected = format!("{expected}: set train.batch_rows higher or train.micro_batch_rows lower");
            return fail("ranks", expected, format!("{n} ranks, {micro_batches} micro-batches"));
        }
        let infos: Vec<ParamInfo> =
            firebox_optim::parameters(&model)?.into_iter().filter(|info| info.trainable).collect();
        let (pipe, model) = if pp == 1 {
            (None, model)
        } else {
            let pipeline = Pipeline::new(&model, schedule, pp, micro_batches / copies)?;
            let shared =
                infos.iter().find(|info| (0..pp).filter(|&rank| pipeline.holds(&model, rank, &info.name)).count() > 1);
            if let (true, Some(info)) = (zero.divides(), shared) {
                let got = format!("{}, which stages on several ranks use", info.name);
                let expected = "0 with a pipeline of tied embeddings or shared blocks, or model.tied = false and \
                                model.layers_per_block = 1";
                return fail("zero", expected.into(), got);
            }
            let model = pipeline.part(model, axes.pp.rank())?;
            (Some(Pipe { group: axes.pp.clone(), pipeline, schedule }), model)
        };
        let n_stages = pipe.as_ref().map_or(model.n_stages(), |pipe| pipe.pipeline.plan().stages());
        let mut stages = vec![vec![]; n_stages];
        let mut shapes = BTreeMap::new();
        for info in infos {
            let stage = match &pipe {
                None => model.first_stage(&info.name),
                Some(pipe) if pipe.pipeline.owner(&model, &info.name) == pipe.group.rank() => {
                    pipe.pipeline.stage_of(&model, &info.name)
                }
                Some(_) => continue,
            };
            shapes.insert(info.name.clone(), info.shape);
            stages[stage].push(info.name);
        }
        stages.iter_mut().for_each(|names| names.sort());
        let divisions = Divisions::new(&axes, &model, optimizer)?;
        let collect = Arc::new(Collect::new(&world, &layout, &model, pipe.as_ref())?);
        let Axes { dp: data, cp: context, tp, .. } = axes;
        let ranks = Self { world, data, context, layout, pipe, tp, state_shapes, collect, divisions, stages, shapes };
        Ok((ranks, model))
    }

    /// The number of this rank among those that have data of their own.
    pub fn rank(&self) -> usize {
        self.data.rank()
    }

    /// How many have data of their own.
    pub fn size(&self) -> usize {
        self.data.size()
    }

    /// The number of this rank among those that have the same stages and parts of matrices.
    pub fn copy(&self) -> usize {
        self.divisions.dense.comm.rank()
    }

    /// Those that have data of their own, and the same stages.
    pub fn data(&self) -> &Communicator {
        &self.data
    }

    /// This rank's tokens of a batch.
    pub fn tokens_of(&self, batch: &TokenBatch) -> TokenBatch {
        batch.part(self.context.rank(), self.context.size())
    }

    /// Sums up what the ranks have that divide the tokens of the same rows, in their order.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn over_context(&self, here: &[f64]) -> Result<Vec<f64>, CommError> {
        sums(&self.context, here)
    }

    /// Whether this rank has a part of the first copy of what is divided.
    pub fn is_first_copy(&self) -> bool {
        self.copy() < self.divisions.dense.shard.size()
    }

    /// What is divided.
    pub fn zero(&self) -> Zero {
        self.layout.zero
    }

    /// This rank's place in a pipeline, if there is one.
    pub fn pipe(&self) -> Option<&Pipe> {
        self.pipe.as_ref()
    }

    /// The part of the optimizer's state that is this rank's, if it is divided.
    pub fn state_parts(&self) -> Option<Parts> {
        self.zero().divides().then(|| self.divisions.mine())
    }

    /// Names and shapes of the whole state, where this rank's optimizer has a part of it.
    pub fn divided_state(&self) -> Option<&Shapes> {
        let divided = self.pipe.is_some() || self.zero().divides() || self.tp.size() > 1 || self.divide_experts();
        divided.then_some(&self.state_shapes)
    }

    /// The squared norms of gradients on which clipping rests, over all ranks.
    ///
    /// # Errors
    /// [`TrainError::Optim`], [`TrainError::Comm`].
    pub fn squares<M: Staged>(
        &self,
        model: &M,
        optimizer: &Optimizer,
        grads: &NamedGrads,
    ) -> Result<Vec<f64>, TrainError> {
        let owned = grads.iter().filter_map(|(name, grad)| Some((name.to_owned(), self.counted(model, name, grad)?)));
        let (of_experts, owned): (Vec<_>, Vec<_>) = owned.partition(|(name, _)| self.divisions.is_expert(name));
        let mut squares = optimizer.squares(model, &owned.into_iter().collect())?;
        if let Some(experts) = &self.divisions.experts {
            let mut others = optimizer.squares(model, &of_experts.into_iter().collect())?;
            // Ranks with parts of sums are all added up below.
            if !self.zero().divides() {
                others = sums(&experts.ep, &others)?;
            }
            squares.iter_mut().zip(others).for_each(|(sum, x)| *sum += x);
        }
        if self.zero().divides() {
            squares = sums(&self.divisions.dense.shard, &squares)?;
        }
        for group in [self.pipe.as_ref().map(|pipe| &pipe.group), Some(&self.tp)].into_iter().flatten() {
            if group.size() > 1 {
                squares = sums(group, &squares)?;
            }
        }
        Ok(squares)
    }

    /// What of a gradient no rank before has: a sum over all ranks counts it here. The rest of it is zero.
    fn counted<M: Staged>(&self, model: &M, name: &str, grad: &Tensor<1>) -> Option<Tensor<1>> {
        let shape = self.shapes.get(name)?;
        let (rank, size) = (self.tp.rank(), self.tp.size());
        if size == 1 {
            return Some(grad.clone());
        }
        let divided = self.zero().divides();
        let first = self.divisions.dense.mine().get(name).filter(|_| divided).map_or(0, |part| part.start);
        let n = grad.dims()[0];
        let mut counted: Vec<Range<usize>> = vec![];
        for run in model.placement(name).counted(shape, rank, size) {
            let (start, end) = (run.start.max(first), run.end.min(first + n));
            if start < end {
                counted.push(start - first..end - first);
            }
        }
        match counted.iter().map(Range::len).sum::<usize>() {
            0 => None,
            all if all == n => Some(grad.clone()),
            _ => {
                let (values, mut kept) = (to_host(grad.clone()), vec![0.0; n]);
                for run in counted {
                    kept[run.clone()].copy_from_slice(&values[run]);
                }
                Some(Tensor::from_data(TensorData::new(kept, [n]), &grad.device()))
            }
        }
    }

    /// Whether any rank says yes.
    ///
    /// # Errors
    /// [`CommError`], here and below: ranks that are lost, late, or do something else.
    pub fn any(&self, here: bool) -> Result<bool, CommError> {
        let mut flag = [u32::from(here)];
        self.world.all_reduce(&mut flag, ReduceOp::Max)?;
        Ok(flag[0] != 0)
    }

    /// Of `total` items that the ranks have in turns, all, from this rank's.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn in_turns<const N: usize>(&self, mine: &[[f64; N]], total: usize) -> Result<Vec<[f64; N]>, CommError> {
        let bits: Vec<i64> = mine.as_flattened().iter().map(|x| x.to_bits() as i64).collect();
        let mut all = vec![0i64; total * N];
        self.data.all_gather(&bits, &mut all)?;
        let items: Vec<[f64; N]> = all.as_chunks::<N>().0.iter().map(|x| x.map(|x| f64::from_bits(x as u64))).collect();
        let n = self.size();
        // Rank r has ceil((total - r) / n) of them.
        let starts: Vec<usize> = (0..n)
            .scan(0, |at, rank| {
                let start = *at;
                *at += (total + n - 1 - rank) / n;
                Some(start)
            })
            .collect();
        Ok((0..total).map(|i| items[starts[i % n] + i / n]).collect())
    }

    /// Sums up what each rank has that has data or tokens of its own, in the order of the ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn sum(&self, here: f64) -> Result<f64, CommError> {
        Ok(sums(&self.divisions.dense.comm, &[here])?[0])
    }

    /// Sums up counts of all ranks.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn sum_counts(&self, here: &[u64]) -> Result<Vec<u64>, CommError> {
        let mut sum: Vec<i64> = here.iter().map(|&count| count.cast_signed()).collect();
        self.world.all_reduce(&mut sum, ReduceOp::Sum)?;
        Ok(sum.into_iter().map(i64::cast_unsigned).collect())
    }

    /// The sum of the gradients that the exchange has brought, as the optimizer of this rank takes them: whole, or where its state is divided, this rank's part.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn finish(&self, exchange: Exchange<'_>, device: &Device) -> Result<NamedGrads, CommError> {
        let mut sum = exchange.finish()?;
        let tensor = |values: Vec<f32>| {
            let n = values.len();
            Tensor::from_data(TensorData::new(values, [n]), device)
        };
        let mut whole = vec![];
        for (experts, division) in self.divisions.all() {
            let names = self.stages.iter().flatten().filter(|name| self.divisions.is_expert(name) == experts);
            let names: Vec<String> = names.cloned().collect();
            let added = |name: &str| sum.remove(name).unwrap_or_default();
            let sums = division.completed(&names, |name| self.elements(name), added, self.zero().divides())?;
            whole.extend(sums.into_iter().map(|(name, values)| (name, tensor(values))));
        }
        Ok(whole.into_iter().collect())
    }

    /// The module with the parameters that the ranks have updated, each its parts. Nothing is to be done where each updates all.
    ///
    /// # Errors
    /// See [`any`](Self::any).
    pub fn gather_parameters<M: Module>(&self, module: M) -> Result<M, CommError> {
        if !self.zero().divides() || self.divisions.dense.shard.size() == 1 {
            return Ok(module);
        }
        let mine = self.divisions.mine();
        let names: Vec<String> = self.shapes.keys().cloned().collect();
        let updated: BTreeMap<String, Tensor<1>> =
            values(&module).into_iter().map(|(info, values)| (info.name, values)).collect();
        let part = |name: &str| match (mine.get(name), updated.get(name)) {
            (Some(part), Some(values)) => to_host(values.clone().slice([part.clone()])),
            _ => vec![],
        };
        let whole = self.divisions.gathered(&names, |name| self.elements(name), part)?;
        drop(updated);
        Ok(set_parameters(module, whole.into_iter().collect()))
    }

    /// The number of elements of a parameter whose gradient is completed here.
    fn elements(&self, name: &str) -> usize {
        self.shapes[name].iter().product()
    }

    /// The same ranks, to put tensors together beside the steps.
    pub fn collect(&self) -> Arc<Collect> {
        self.collect.clone()
    }

    /// Begins to add up the gradients of a step.
    pub fn exchange(&self) -> Exchange<'_> {
        Exchange::new(self)
    }
}

/// What each rank of a group has `parts` of, put together on all of them, each of `len` elements; `part` is what this rank has.
fn gathered(
    group: &Communicator,
    parts: &[Parts],
    names: &[String],
    len: impl Fn(&str) -> usize,
    mut part: impl FnMut(&str) -> Vec<f32>,
) -> Result<Vec<(String, Vec<f32>)>, CommError> {
    let mut whole = Vec::with_capacity(names.len());
    let mut first = 0;
    while first < names.len() {
        let (mut last, mut elements) = (first, 0);
        while last < names.len() && (last == first || elements < BUCKET) {
            elements += len(&names[last]);
            last += 1;
        }
        let names = &names[first..last];
        let data: Vec<f32> = names.iter().flat_map(|name| part(name)).collect();
        let mut all = vec![0f32; elements];
        group.all_gather(&data, &mut all)?;
        whole.extend(together(names, parts, &len, &all));
        first = last;
    }
    Ok(whole)
}

/// Takes apart what an all-gather of parts gives: those of the first rank, name by name, then those of the next.
fn together(names: &[String], parts: &[Parts], len: impl Fn(&str) -> usize, all: &[f32]) -> Vec<(String, Vec<f32>)> {
    let mut out: Vec<(String, Vec<f32>)> = names.iter().map(|name| (name.clone(), vec![0.0; len(name)])).collect();
    let mut rest = all;
    for parts in parts {
        for (name, out) in &mut out {
            if let Some(part) = parts.get(name) {
                let (values, others) = rest.split_at(part.len());
                out[part.clone()].copy_from_slice(values);
                rest = others;
            }
        }
    }
    out
}

/// Sums up what each rank of a group has, in the order of the ranks.
fn sums(group: &Communicator, here: &[f64]) -> Result<Vec<f64>, CommError> {
    let bits: Vec<i64> = here.iter().map(|x| x.to_bits() as i64).collect();
    let mut all = vec![0i64; bits.len() * group.size()];
    group.all_gather(&bits, &mut all)?;
    let of_rank = |rank: usize| &all[rank * bits.len()..][..bits.len()];
    let sum = |i: usize| (0..group.size()).map(|rank| f64::from_bits(of_rank(rank)[i] as u64)).sum();
    Ok((0..bits.len()).map(sum).collect())
}
