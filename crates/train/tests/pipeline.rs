//! Pipelines: whatever the schedule, the ranks have the losses, gradients and parameters of one rank, to the bit.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use firebox_models::transformer::{FeedForward, Head, NormKind, Positions, Transformer, TransformerConfig};
use firebox_models::{Staged, TokenBatch};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_parallel::pipeline::{Schedule, Timeline, Work};
use firebox_parallel::{Axis, Communicator, Degrees, Mesh, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::{Compute, Sequence};
use firebox_train::TrainError;
use firebox_train::engine::pipeline::{Event, Pipeline};
use firebox_train::engine::{Engine, Recompute};
use firebox_train::model_io::{parameters, to_host};

const MICRO_BATCHES: usize = 8;
const ROWS: usize = 2;

type Bits = BTreeMap<String, Vec<u32>>;

fn device() -> Device {
    Backend::NdArray.device().unwrap().autodiff()
}

/// Grouped-query attention, eight blocks (or more where a schedule has more stages).
fn config(blocks: usize, tied: bool) -> TransformerConfig {
    TransformerConfig {
        window: None,
        qk_norm: false,
        attention_softcap: 0.0,
        logit_softcap: 0.0,
        qkv_bias: false,
        rope_scaling: None,
        labels: vec![],
        encoder: None,
        image: None,
        head: Head::default(),
        experts: None,
        reduction: Default::default(),
        vocab_size: 37,
        d_model: 16,
        n_layers: blocks,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 4,
        d_ff: 24,
        context: 12,
        norm: NormKind::RmsNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::SwiGlu,
        positions: Positions::Rotary { theta: 10000.0 },
        bias: false,
        adapter: None,
        tied,
        dropout: 0.1,
        init_std: 0.1,
    }
}

/// GPT-2's kind: biases, LayerNorm, GELU, learned positions.
fn gpt2(tied: bool) -> TransformerConfig {
    TransformerConfig {
        n_kv_heads: 4,
        norm: NormKind::LayerNorm,
        feed_forward: FeedForward::Gelu,
        positions: Positions::Learned,
        bias: true,
        dropout: 0.0,
        ..config(8, tied)
    }
}

/// Rows of two documents each; the last micro-batch has a row less.
fn batches(config: &TransformerConfig) -> Vec<TokenBatch> {
    (0..MICRO_BATCHES)
        .map(|k| {
            let (rows, t) = (ROWS - usize::from(k + 1 == MICRO_BATCHES), config.context);
            let ids = |a: usize| (0..rows * t).map(|i| ((i * a + i / 3 + 5 * k) % config.vocab_size) as i32).collect();
            let cut = 3 + k % 5;
            let at = |i: usize| i % t;
            let segments: Vec<i32> = (0..rows * t).map(|i| i32::from(at(i) >= cut)).collect();
            let positions = (0..rows * t).map(|i| if at(i) >= cut { at(i) - cut } else { at(i) } as i32).collect();
            let sequence = Sequence::new(rows, t, positions, &segments);
            let scale = 1.0 / (MICRO_BATCHES * ROWS * t) as f64;
            TokenBatch { loss_scale: scale, ..TokenBatch::new(ids(7), ids(11), sequence) }
        })
        .collect()
}

fn counters(step: u64) -> Vec<u64> {
    (0..MICRO_BATCHES as u64).map(|i| step | i << 40).collect()
}

/// One compute thread for each rank: the one it runs on.
fn alone<R>(work: impl FnOnce() -> R) -> R {
    let _pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
    work()
}

fn bits(values: impl IntoIterator<Item = (String, Tensor<1>)>) -> Bits {
    let bits = |tensor: Tensor<1>| to_host(tensor).into_iter().map(f32::to_bits).collect();
    values.into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
}

/// What one or many ranks have after some steps: losses, the last step's gradients, parameters.
#[derive(Debug, Clone, Default, PartialEq)]
struct Trained {
    losses: Vec<u64>,
    grads: Bits,
    parameters: Bits,
}

/// What a model is trained with.
#[derive(Clone)]
struct Case {
    config: TransformerConfig,
    engine: Engine,
    /// Parameters whose name starts with one of these are frozen.
    frozen: &'static [&'static str],
    steps: u64,
}

impl Case {
    fn new(config: TransformerConfig) -> Self {
        Self { config, engine: Engine::default(), frozen: &[], steps: 1 }
    }

    fn recompute(self, recompute: Recompute) -> Self {
        Self { engine: Engine { recompute, ..self.engine }, ..self }
    }

    fn model(&self) -> Transformer {
        struct Freeze(&'static [&'static str], Vec<String>);
        impl ModuleMapper for Freeze {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.1.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.1.pop();
            }
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let name = self.1.join(".");
                let frozen = self.0.iter().any(|start| name.starts_with(start));
                if frozen { param.set_require_grad(false) } else { param }
            }
        }
        let model = Transformer::new(&self.config, 7, &device()).unwrap();
        if self.frozen.is_empty() { model } else { model.map(&mut Freeze(self.frozen, vec![])) }
    }

    fn train(
        &self,
        model: Transformer,
        mut gradients: impl FnMut(&Transformer, &[u64], &mut NamedGrads) -> Result<f64, TrainError>,
    ) -> Result<Trained, TrainError> {
        let mut optimizer = Optimizer::new(AdamWConfig::default(), DecayRule::Matrices)?;
        let (mut model, mut trained) = (model, Trained::default());
        for step in 0..self.steps {
            let mut grads = NamedGrads::new();
            trained.losses.push(gradients(&model, &counters(step), &mut grads)?.to_bits());
            trained.grads = bits(grads.clone());
            model = optimizer.step(3e-3, model, &mut grads)?;
        }
        trained.parameters = bits(parameters(&model));
        trained.parameters.retain(|_, values| !values.is_empty());
        Ok(trained)
    }

    fn one_rank(&self) -> Trained {
        let case = Self { engine: Engine { compute: self.engine.compute, ..Engine::default() }, ..self.clone() };
        let run = move || {
            let batches = batches(&case.config);
            case.train(case.model(), |model, counters, total| {
                let each = batches.iter().zip(counters);
                each.map(|(batch, counter)| case.engine.gradients(model, batch, *counter, total)).sum()
            })
        };
        std::thread::spawn(|| alone(run)).join().unwrap().unwrap()
    }

    fn rank(&self, group: &Communicator, schedule: Schedule) -> Result<Rank, TrainError> {
        let (batches, model) = (batches(&self.config), self.model());
        let pipeline = Pipeline::new(&model, schedule, group.size(), MICRO_BATCHES)?;
        let model = pipeline.part(model, group.rank())?;
        let names = parameters(&model).into_iter().map(|(name, _)| name);
        let owned = names.filter(|name| pipeline.owner(&model, name) == group.rank()).collect();
        let mut events = vec![];
        let trained = self.train(model, |model, counters, total| {
            let done = self.engine.pipeline_gradients(model, &pipeline, &batches, counters, group, total)?;
            events = done.events;
            Ok(done.loss)
        })?;
        let list = &pipeline.plan().actions[group.rank()];
        assert_eq!(events.iter().map(|event| event.action).collect::<Vec<_>>(), *list, "exactly the list");
        Ok(Rank { trained, owned, events })
    }

    fn ranks(&self, ranks: usize, schedule: Schedule) -> Vec<Rank> {
        let case = self.clone();
        spawn(ranks, move |group| alone(|| case.rank(&group, schedule))).unwrap()
    }

    /// Every rank has exactly its part of what one rank has.
    fn compare(&self, ranks: usize, schedule: Schedule) {
        let case = format!("{ranks} ranks, {schedule}, {:?}, tied: {}", self.engine, self.config.tied);
        let want = self.one_rank();
        assert!(want.grads.values().all(|values| values.iter().any(|bits| *bits != 0)));
        let mut owned: Vec<String> = vec![];
        for (i, rank) in self.ranks(ranks, schedule).into_iter().enumerate() {
            let Trained { losses, grads, parameters } = &rank.trained;
            assert_eq!(*losses, want.losses, "{case}: losses of rank {i}");
            for (kind, got, want) in [("gradient", grads, &want.grads), ("parameter", parameters, &want.parameters)] {
                for (name, values) in got {
                    assert_eq!(*values, want[name], "{case}: {kind} {name} of rank {i}");
                }
            }
            let trainable = parameters.keys().filter(|name| want.grads.contains_key(*name));
            let (with, of): (Vec<_>, Vec<_>) = (grads.keys().collect(), trainable.collect());
            assert_eq!(with, of, "{case}: rank {i} has gradients of its parameters");
            assert!(rank.owned.iter().all(|name| parameters.contains_key(name)), "{case}: rank {i}");
            owned.extend(rank.owned);
        }
        owned.sort();
        assert_eq!(owned, want.parameters.keys().cloned().collect::<Vec<_>>(), "{case}: each has one owner");
    }
}

/// One rank's results, what it owns and what it did.
struct Rank {
    trained: Trained,
    owned: Vec<String>,
    events: Vec<Event>,
}

fn schedules() -> [Schedule; 5] {
    [
        Schedule::AllForwardAllBackward,
        Schedule::OneForwardOneBackward,
        Schedule::Interleaved { stages_per_rank: 2 },
        Schedule::ZeroBubbleH1,
        Schedule::ZeroBubbleV,
    ]
}

#[test]
fn every_schedule_has_the_bits_of_one_rank() {
    for tied in [true, false] {
        for (ranks, schedule) in [2, 4, 8].into_iter().flat_map(|ranks| schedules().map(|s| (ranks, s))) {
            // A stage has a block, an embedding or a head at least.
            let blocks = (ranks * schedule.stages_per_rank()).saturating_sub(2).max(8);
            for recompute in [Recompute::None, Recompute::Blocks] {
                Case::new(config(blocks, tied)).recompute(recompute).compare(ranks, schedule);
            }
        }
    }
}

#[test]
fn copies_stay_equal_over_updates() {
    for schedule in schedules() {
        Case { steps: 3, ..Case::new(config(8, true)) }.compare(4, schedule);
        Case { steps: 3, ..Case::new(gpt2(true)) }.recompute(Recompute::Every(2)).compare(4, schedule);
    }
}

#[test]
fn frozen_parameters_and_products_in_16_bits_change_nothing_of_it() {
    for schedule in schedules() {
        for frozen in [&["embed", "blocks.0", "blocks.5"][..], &["embed", "positions", "blocks.0", "blocks.1"]] {
            Case { frozen, ..Case::new(gpt2(false)) }.compare(4, schedule);
        }
        let engine = Engine { compute: Compute::Bf16, ..Engine::default() };
        Case { engine, ..Case::new(config(8, true)) }.compare(2, schedule);
    }
}

#[test]
fn a_rank_has_its_part_of_the_parameters_alone() {
    let count = |parameters: &Bits| parameters.values().map(Vec::len).sum::<usize>();
    for tied in [true, false] {
        let case = Case::new(config(14, tied));
        let (all, table) = (count(&case.one_rank().parameters), case.config.vocab_size * case.config.d_model);
        for schedule in schedules() {
            let ranks = case.ranks(4, schedule);
            let of_ranks: Vec<usize> = ranks.iter().map(|rank| count(&rank.trained.parameters)).collect();
            // ZB-V has the first and the last stage on one rank.
            let twice = if tied && schedule != Schedule::ZeroBubbleV { table } else { 0 };
            assert_eq!(of_ranks.iter().sum::<usize>(), all + twice, "{schedule}");
            assert!(of_ranks.iter().all(|n| *n * 3 < all), "{schedule}: {of_ranks:?} of {all}");
        }
    }
}

#[test]
fn a_large_vocabulary_is_a_stage_of_its_own() {
    let cut = |vocab_size: usize| {
        let model = Transformer::new(&TransformerConfig { vocab_size, ..config(8, false) }, 7, &device()).unwrap();
        Pipeline::new(&model, Schedule::OneForwardOneBackward, 4, 8).unwrap().cut().to_vec()
    };
    // The embedding costs next to nothing, the head of 37 rows less than a block.
    assert_eq!(cut(37), [0..3, 3..5, 5..7, 7..10]);
    assert_eq!(cut(1000), [0..3, 3..6, 6..9, 9..10]);
}

#[test]
fn parts_evaluate_together_and_make_a_whole() {
    for schedule in
        [Schedule::OneForwardOneBackward, Schedule::Interleaved { stages_per_rank: 2 }, Schedule::ZeroBubbleV]
    {
        for tied in [true, false] {
            let new = move || Transformer::new(&config(8, tied), 7, &device()).unwrap();
            let (model, batches) = (new().valid(), batches(&config(8, tied)));
            let want: Vec<f64> = batches.iter().map(|batch| f64::from(to_host(model.loss(batch, None))[0])).collect();
            let of_ranks = spawn(4, move |group| {
                let pipeline = Pipeline::new(&new(), schedule, 4, 4)?;
                let part = pipeline.part(new(), group.rank())?;
                let losses = pipeline.losses(&part, &batches, &group)?;
                // Of another seed: nothing of it stays.
                let other = Transformer::new(&config(8, tied), 8, &device())?;
                let whole = pipeline.gather(&part, other, 1, &group)?;
                Ok::<_, TrainError>((losses, whole.map(|whole| bits(parameters(&whole)))))
            });
            for (rank, (losses, whole)) in of_ranks.unwrap().into_iter().enumerate() {
                assert_eq!(losses, want, "{schedule}");
                assert_eq!(whole, (rank == 1).then(|| bits(parameters(&model))), "{schedule}");
            }
        }
    }
}

#[test]
fn two_pipelines_side_by_side_add_up_to_one_rank() {
    // Micro-batch i is that of pipeline i mod 2.
    let case = Case::new(config(8, true));
    let want = case.one_rank();
    for schedule in schedules() {
        let case = case.clone();
        let of_ranks = spawn(4, move |world| {
            let degrees = Degrees { dp_replicate: 2, pp: 2, ..Degrees::default() };
            let mesh = Mesh::new(degrees, world).unwrap();
            let (dp, pp) = (mesh.group(Axis::Dp), mesh.group(Axis::Pp));
            let each = |all: Vec<TokenBatch>| all.into_iter().skip(dp.rank()).step_by(2).collect::<Vec<_>>();
            let batches = each(batches(&case.config));
            let counters: Vec<u64> = counters(0).into_iter().skip(dp.rank()).step_by(2).collect();
            let pipeline = Pipeline::new(&case.model(), schedule, 2, MICRO_BATCHES / 2)?;
            let model = pipeline.part(case.model(), pp.rank())?;
            let mut total = NamedGrads::new();
            let mut sink = |_: usize, _: usize, grads: NamedGrads| {
                for (name, grad) in grads {
                    let values = to_host(grad);
                    let mut all = vec![0.0; 2 * values.len()];
                    dp.all_gather(&values, &mut all)?;
                    for values in all.chunks_exact(values.len()) {
                        total.add(
                            [(name.clone(), Tensor::from_floats(values, &device().inner()))].into_iter().collect(),
                        );
                    }
                }
                Ok(())
            };
            case.engine.pipeline_step(&model, &pipeline, &batches, &counters, pp, &mut sink)?;
            pipeline.share(&model, pp, &mut total)?;
            Ok::<_, TrainError>(bits(total))
        });
        for (rank, grads) in of_ranks.unwrap().into_iter().enumerate() {
            assert!(grads.len() > 16, "{schedule}: rank {rank}");
            for (name, grad) in grads {
                assert_eq!(grad, want.grads[&name], "{schedule}: {name} on rank {rank}");
            }
        }
    }
}

#[test]
fn what_was_done_has_its_times() {
    let ranks = Case::new(config(8, true)).ranks(4, Schedule::ZeroBubbleH1);
    let events: Vec<Vec<Event>> = ranks.into_iter().map(|rank| rank.events).collect();
    let origin = events.iter().flatten().map(|event| event.start).min().unwrap();
    let spans = |events: &Vec<Event>| events.iter().filter_map(|event| event.span(origin)).collect();
    let timeline = Timeline { ranks: events.iter().map(spans).collect() };
    for (events, spans) in events.iter().zip(&timeline.ranks) {
        assert!(events.is_sorted_by(|a, b| a.start <= a.end && a.end <= b.start), "one after the other");
        // 8 forward passes, 8 of each half of backward.
        assert_eq!(spans.len(), 3 * MICRO_BATCHES);
    }
    let bubble = timeline.bubble_share();
    assert!(bubble > 0.0 && bubble < 1.0, "{bubble}");
}

#[test]
fn the_second_half_of_backward_computes_the_matrices_gradients() {
    let large =
        TransformerConfig { d_model: 128, head_dim: 32, d_ff: 384, context: 64, dropout: 0.0, ..config(8, false) };
    let ranks = Case::new(large).ranks(2, Schedule::ZeroBubbleH1);
    let seconds = |work: Work| -> f64 {
        let spans = ranks.iter().flat_map(|rank| rank.events.iter().filter_map(|event| event.span(Duration::ZERO)));
        spans.filter(|span| span.work == work).map(|span| span.end - span.start).sum()
    };
    let share = seconds(Work::BackwardWeight) / seconds(Work::BackwardInput);
    // Were all made in the first half, this would be the additions over micro-batches: a hundredth of it.
    assert!(share > 0.15, "{share}");
}

#[test]
fn what_cannot_be_is_refused_and_a_lost_rank_is_named() {
    let model = Transformer::new(&config(8, true), 7, &device()).unwrap();
    let new = |schedule, ranks, micro_batches| Pipeline::new(&model, schedule, ranks, micro_batches);
    for (schedule, ranks, micro_batches, says) in [
        (Schedule::ZeroBubbleV, 8, 8, "10 layers into 16 stages"),
        (Schedule::Interleaved { stages_per_rank: 2 }, 4, 6, "multiple of its 4 ranks, got 6"),
        (Schedule::OneForwardOneBackward, 0, 8, "ranks = 0"),
    ] {
        let error = new(schedule, ranks, micro_batches).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(says), "{error}");
    }

    let error = spawn(2, |group| {
        let model = Transformer::new(&config(8, true), 7, &device())?;
        let pipeline = Pipeline::new(&model, Schedule::OneForwardOneBackward, 2, 4)?;
        let (batches, counters) = (batches(model.config()), counters(0));
        let total = &mut NamedGrads::new();
        Engine::default().pipeline_gradients(&model, &pipeline, &batches, &counters, &group, total)
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("micro-batches of a pipeline's step: expected 4, as in its plan, got 8"), "{error}");

    let error = spawn(3, |group| {
        let model = Transformer::new(&config(8, true), 7, &device())?;
        let pipeline = Pipeline::new(&model, Schedule::OneForwardOneBackward, 3, MICRO_BATCHES)?;
        let (batches, counters) = (batches(model.config()), counters(0));
        let rank = group.rank();
        let mut sink = |_: usize, micro_batch: usize, _: NamedGrads| {
            assert!(rank != 1 || micro_batch < 3, "out of luck");
            Ok(())
        };
        Engine::default().pipeline_step(&model, &pipeline, &batches, &counters, &group, &mut sink)
    });
    let error = error.unwrap_err();
    assert!(error.rank == 1 && error.hung.is_empty() && error.to_string().contains("out of luck"), "{error}");
}
