//! Pipelines: whatever the schedule, the ranks have the losses, gradients and parameters of one rank, to the bit.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use firebox_models::TokenBatch;
use firebox_models::decoder::{Decoder, DecoderConfig, FeedForward, NormKind, Positions};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_parallel::pipeline::{Action, Schedule, Timeline, Work};
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::Sequence;
use firebox_train::TrainError;
use firebox_train::engine::pipeline::{Event, Pipeline, write_chrome_trace};
use firebox_train::engine::{Engine, Recompute};
use firebox_train::model_io::{parameters, to_host};

const MICRO_BATCHES: usize = 8;
const ROWS: usize = 2;

type Bits = BTreeMap<String, Vec<u32>>;

fn device() -> Device {
    Backend::NdArray.device().unwrap().autodiff()
}

/// Grouped-query attention, eight blocks (or more where a schedule has more stages).
fn config(blocks: usize, tied: bool) -> DecoderConfig {
    DecoderConfig {
        window: None,
        qk_norm: false,
        attention_softcap: 0.0,
        logit_softcap: 0.0,
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
        tied,
        dropout: 0.1,
        init_std: 0.1,
    }
}

/// GPT-2's kind: biases, LayerNorm, GELU, learned positions.
fn gpt2(tied: bool) -> DecoderConfig {
    DecoderConfig {
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
fn batches(config: &DecoderConfig) -> Vec<TokenBatch> {
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

fn train(
    model: Decoder,
    steps: u64,
    mut gradients: impl FnMut(&Decoder, &[u64], &mut NamedGrads) -> Result<f64, TrainError>,
) -> Result<Trained, TrainError> {
    let mut optimizer = Optimizer::new(AdamWConfig::default(), DecayRule::Matrices)?;
    let (mut model, mut trained) = (model, Trained::default());
    for step in 0..steps {
        let mut grads = NamedGrads::new();
        trained.losses.push(gradients(&model, &counters(step), &mut grads)?.to_bits());
        trained.grads = bits(grads.clone());
        model = optimizer.step(3e-3, model, &mut grads)?;
    }
    trained.parameters = bits(parameters(&model));
    trained.parameters.retain(|_, values| !values.is_empty());
    Ok(trained)
}

fn one_rank(config: &DecoderConfig, steps: u64) -> Trained {
    let (engine, batches) = (Engine::default(), batches(config));
    let model = Decoder::new(config, 7, &device()).unwrap();
    let run = move || {
        train(model, steps, |model, counters, total| {
            let each = batches.iter().zip(counters);
            each.map(|(batch, counter)| engine.gradients(model, batch, *counter, total)).sum()
        })
    };
    std::thread::spawn(|| alone(run)).join().unwrap().unwrap()
}

/// One rank's results, its number of parameters, what it owns and what it did.
struct Rank {
    trained: Trained,
    owned: Vec<String>,
    events: Vec<Event>,
}

fn rank(
    group: &Communicator,
    config: &DecoderConfig,
    schedule: Schedule,
    engine: &Engine,
    steps: u64,
) -> Result<Rank, TrainError> {
    let batches = batches(config);
    let model = Decoder::new(config, 7, &device())?;
    let pipeline = Pipeline::new(&model, schedule, group.size(), MICRO_BATCHES)?;
    let model = pipeline.part(model, group.rank())?;
    let mut events = vec![];
    let owned = |model: &Decoder| {
        let names = parameters(model).into_iter().map(|(name, _)| name);
        names.filter(|name| pipeline.owner(model, name) == group.rank()).collect()
    };
    let owned = owned(&model);
    let trained = train(model, steps, |model, counters, total| {
        let done = engine.pipeline_gradients(model, &pipeline, &batches, counters, group, total)?;
        events = done.events;
        Ok(done.loss)
    })?;
    Ok(Rank { trained, owned, events })
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

/// Every rank has exactly its part of what one rank has.
fn compare(config: &DecoderConfig, ranks: usize, schedule: Schedule, recompute: Recompute, steps: u64) {
    let case = format!("{ranks} ranks, {schedule}, {recompute:?}, tied: {}", config.tied);
    let want = one_rank(config, steps);
    let engine = Engine { recompute, ..Engine::default() };
    let of_ranks = {
        let config = config.clone();
        spawn(ranks, move |group| alone(|| rank(&group, &config, schedule, &engine, steps))).unwrap()
    };
    let mut owned: Vec<String> = vec![];
    for (i, rank) in of_ranks.iter().enumerate() {
        let Trained { losses, grads, parameters } = &rank.trained;
        assert_eq!(*losses, want.losses, "{case}: losses of rank {i}");
        for (kind, got, want) in [("gradient", grads, &want.grads), ("parameter", parameters, &want.parameters)] {
            for (name, values) in got {
                assert_eq!(*values, want[name], "{case}: {kind} {name} of rank {i}");
            }
        }
        let (with, of): (Vec<_>, Vec<_>) = (grads.keys().collect(), parameters.keys().collect());
        assert_eq!(with, of, "{case}: rank {i} has gradients of its parameters, and no other parameters");
        assert!(rank.owned.iter().all(|name| parameters.contains_key(name)), "{case}: rank {i}");
        owned.extend(rank.owned.clone());
    }
    owned.sort();
    assert_eq!(owned, want.parameters.keys().cloned().collect::<Vec<_>>(), "{case}: each has one owner");
}

#[test]
fn two_ranks_have_the_bits_of_one() {
    compare(&config(8, true), 2, Schedule::OneForwardOneBackward, Recompute::None, 1);
}

#[test]
fn every_schedule_has_the_bits_of_one_rank() {
    for tied in [true, false] {
        for (ranks, schedule) in [2, 4, 8].into_iter().flat_map(|ranks| schedules().map(|s| (ranks, s))) {
            // A stage has a block, an embedding or a head at least.
            let blocks = (ranks * schedule.stages_per_rank()).saturating_sub(2).max(8);
            for recompute in [Recompute::None, Recompute::Blocks] {
                compare(&config(blocks, tied), ranks, schedule, recompute, 1);
            }
        }
    }
}

#[test]
fn copies_stay_equal_over_updates() {
    for schedule in schedules() {
        compare(&config(8, true), 4, schedule, Recompute::None, 3);
        compare(&gpt2(true), 4, schedule, Recompute::Every(2), 3);
    }
}
