//! Tensor parallelism: whatever the number of ranks that share the matrices, the same model with the same losses and gradients.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use firebox_models::transformer::{
    EncoderConfig, FeedForward, Head, NormKind, Positions, Reduction, Transformer, TransformerConfig,
};
use firebox_models::{Extra, Staged, TokenBatch};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_parallel::pipeline::Schedule;
use firebox_parallel::{Axis, Communicator, Degrees, Mesh, spawn};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::{Compute, LossConfig, Sequence};
use firebox_tensor::random::{Counter, Purpose, uniform_bits};
use firebox_tensor::threads;
use firebox_train::TrainError;
use firebox_train::engine::pipeline::Pipeline;
use firebox_train::engine::{Engine, Recompute};
use firebox_train::model_io::{parameters, to_host};

const STEPS: u64 = 3;

/// RMSNorm, SwiGLU, rotary positions, grouped heads; a vocabulary and an inner width that no number of ranks divides.
fn llama(n_kv_heads: usize, tied: bool) -> TransformerConfig {
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
        vocab_size: 61,
        d_model: 24,
        n_layers: 3,
        n_heads: 8,
        n_kv_heads,
        head_dim: 6,
        d_ff: 45,
        context: 16,
        norm: NormKind::RmsNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::SwiGlu,
        positions: Positions::Rotary { theta: 10_000.0 },
        bias: false,
        adapter: None,
        tied,
        dropout: 0.0,
        init_std: 0.2,
    }
}

/// LayerNorm, GELU, learned positions, biases.
fn gpt2(n_kv_heads: usize, tied: bool) -> TransformerConfig {
    TransformerConfig {
        norm: NormKind::LayerNorm,
        feed_forward: FeedForward::Gelu,
        positions: Positions::Learned,
        bias: true,
        ..llama(n_kv_heads, tied)
    }
}

/// Rows of several documents each; some targets count nothing.
fn batch(vocab: usize, [b, t]: [usize; 2]) -> TokenBatch {
    let random = |i: usize, below: usize| {
        (uniform_bits(Counter::new(7, Purpose::Sampling, 0), i as u64) as usize % below) as i32
    };
    let mut inputs = vec![];
    let mut targets = vec![];
    let (mut positions, mut segments) = (vec![], vec![]);
    for i in 0..b * t {
        let starts = [0, 5 + i / t, 9];
        let segment = starts.iter().rposition(|&start| start <= i % t).unwrap();
        segments.push(segment as i32);
        positions.push((i % t - starts[segment]) as i32);
        inputs.push(random(2 * i, vocab));
        targets.push(if i % 7 == 3 { -1 } else { random(2 * i + 1, vocab) });
    }
    TokenBatch::new(inputs, targets, Sequence::new(b, t, positions, &segments))
}

/// BERT with a masked language model's head; ALBERT with rows as narrow as this, and one block.
fn encoder(narrow: Option<usize>, tied: bool) -> TransformerConfig {
    let encoder = EncoderConfig { norm_after: true, embed_norm: true, token_types: 2, position_offset: 2 };
    let albert = |embed_dim| Reduction { layers_per_block: 3, embed_dim, ..Reduction::default() };
    TransformerConfig {
        encoder: Some(encoder),
        head: Head::Masked,
        reduction: narrow.map_or(Reduction::default(), albert),
        ..gpt2(8, tied)
    }
}

/// Rows of several lengths, of two types of tokens.
fn padded(vocab: usize, [b, t]: [usize; 2]) -> TokenBatch {
    let plain = batch(vocab, [b, t]);
    let lengths: Vec<usize> = (0..b).map(|i| t - 3 * i).collect();
    let known = |(i, &target): (usize, &i32)| if i % t < lengths[i / t] { target } else { -1 };
    let targets = plain.targets.iter().enumerate().map(known).collect();
    let mut batch = TokenBatch::new(plain.inputs.to_vec(), targets, Sequence::padded(t, &lengths));
    let token_types = (0..b * t).map(|i| i32::from(i % t > 4)).collect();
    batch.extra = Some(Arc::new(Extra { token_types, ..Extra::default() }));
    batch
}

/// What training gives: losses, the gradients of the first step, parameters at the end.
struct Run {
    losses: Vec<f64>,
    grads: BTreeMap<String, Vec<f32>>,
    params: BTreeMap<String, Vec<f32>>,
    /// The sum of the squares of the gradients that this rank counts.
    squares: f64,
    shapes: BTreeMap<String, Vec<usize>>,
}

fn train(model: Transformer, rank: usize, size: usize, case: &Case) -> Run {
    let mut model = model.with_loss(case.loss);
    let batch = match case.config.encoder {
        Some(_) => padded(case.config.vocab_size, case.tokens),
        None => batch(case.config.vocab_size, case.tokens),
    };
    // The bias of keys has no influence: what rounding leaves of its gradient, a small epsilon would make a step as large as any other.
    let adamw = AdamWConfig { eps: 1e-3, ..AdamWConfig::default() };
    let mut optimizer = Optimizer::new(adamw, DecayRule::Matrices).unwrap();
    let mut run = Run {
        losses: vec![],
        grads: BTreeMap::new(),
        params: BTreeMap::new(),
        squares: 0.0,
        shapes: firebox_optim::parameters(&model).unwrap().into_iter().map(|info| (info.name, info.shape)).collect(),
    };
    for step in 0..STEPS {
        let mut grads = NamedGrads::new();
        run.losses.push(case.engine.gradients(&model, &batch, step, &mut grads).unwrap());
        if step == 0 {
            run.grads = grads.iter().map(|(name, grad)| (name.to_owned(), to_host(grad.clone()))).collect();
        }
        model = optimizer.step(3e-3, model, &mut grads).unwrap();
    }
    for (name, grad) in &run.grads {
        for range in model.placement(name).counted(&run.shapes[name], rank, size) {
            run.squares += grad[range].iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
    }
    if let Some(parallel) = model.parallel() {
        // What a rank puts together for a checkpoint is what all ranks have.
        let name = "blocks.0.attn.qkv.weight";
        let part = &run.grads[name];
        let full = parallel.gather(&model.placement(name), part, &run.shapes[name]).unwrap();
        let shape = model.placement(name).full_shape(&run.shapes[name]);
        assert_eq!(&model.placement(name).shard(&full, &shape, rank, size), part);
    }
    run.params = parameters(&model).into_iter().map(|(name, tensor)| (name, to_host(tensor))).collect();
    run
}

/// What is trained, and how.
#[derive(Clone)]
struct Case {
    config: TransformerConfig,
    loss: LossConfig,
    /// B and T: 39 tokens, which no number of ranks divides.
    tokens: [usize; 2],
    engine: Engine,
    /// Of losses, and of gradients and parameters to the largest value in them.
    tolerance: f64,
}

impl Case {
    fn new(config: TransformerConfig) -> Self {
        let engine = Engine::default();
        Self { config, loss: LossConfig::default(), tokens: [3, 13], engine, tolerance: 1e-5 }
    }

    /// With label smoothing and z-loss.
    fn with_loss(self) -> Self {
        Self { loss: LossConfig { label_smoothing: 0.1, z_loss: 1e-2 }, ..self }
    }
}

/// One rank's run against that of `size` ranks.
fn same(what: &str, case: &Case, size: usize, sequence: bool) {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let what = format!("{what} on {size} ranks{}", if sequence { ", tokens divided" } else { "" });
    let alone = Case { engine: Engine { compute: case.engine.compute, ..Engine::default() }, ..case.clone() };
    let whole = train(Transformer::new(&case.config, 5, &device).unwrap(), 0, 1, &alone);
    let runs = {
        let case = case.clone();
        spawn(size, move |comm: Communicator| {
            let _pool = threads::for_rank(1).map_err(|error| error.to_string())?;
            let model =
                Transformer::sharded(&case.config, 5, &device, &comm, sequence).map_err(|error| error.to_string())?;
            Ok::<Run, String>(train(model, comm.rank(), size, &case))
        })
        .unwrap_or_else(|error| panic!("{what}: {error}"))
    };
    for (step, want) in whole.losses.iter().enumerate() {
        for run in &runs {
            let got = run.losses[step];
            assert!((got - want).abs() <= case.tolerance * want, "{what}: loss {got} of step {step}, expected {want}");
            assert_eq!(got, runs[0].losses[step], "{what}: ranks differ in the loss");
        }
    }
    close(&what, "gradient", case, &whole, &runs, |run| &run.grads, 1e-30);
    close(&what, "parameter", case, &whole, &runs, |run| &run.params, 0.1);
    let squares: f64 = runs.iter().map(|run| run.squares).sum();
    assert!(
        (squares - whole.squares).abs() <= 10.0 * case.tolerance * whole.squares,
        "{what}: {squares}, {}",
        whole.squares
    );
}

/// Within the tolerance of the largest value, or of `smallest`.
fn close(
    what: &str,
    kind: &str,
    case: &Case,
    whole: &Run,
    runs: &[Run],
    of: impl Fn(&Run) -> &BTreeMap<String, Vec<f32>>,
    smallest: f64,
) {
    assert!(!of(whole).is_empty());
    for (name, want) in of(whole) {
        let what = format!("{what}: {kind} of {name}");
        let placement = case.config.placement(name, runs.len());
        let parts: Vec<&Vec<f32>> = runs.iter().map(|run| &of(run)[name]).collect();
        let shape = &whole.shapes[name];
        assert_eq!(&placement.full_shape(&runs[0].shapes[name]), shape, "{what}");
        let got = placement.unshard(&parts, shape);
        // What several ranks have is the same on all, to the bit.
        for (rank, part) in parts.iter().enumerate() {
            assert!(**part == placement.shard(&got, shape, rank, runs.len()), "{what}: ranks differ");
        }
        let size = want.iter().fold(smallest, |max: f64, v| max.max(f64::from(v.abs())));
        let worst = want.iter().zip(&got).map(|(w, g)| f64::from((w - g).abs())).fold(0.0, f64::max);
        assert!(worst <= case.tolerance * size, "{what}: off by {worst}, largest {size}");
    }
}

#[test]
fn llama_is_the_same_on_any_number_of_ranks() {
    let bounded = TransformerConfig { qk_norm: true, attention_softcap: 5.0, logit_softcap: 4.0, ..llama(2, true) };
    for size in [2, 4, 8] {
        for sequence in [false, true] {
            same("two key-value heads", &Case::new(bounded.clone()).with_loss(), size, sequence);
            same("eight key-value heads", &Case::new(llama(8, false)), size, sequence);
        }
    }
}

#[test]
fn gpt2_is_the_same_on_any_number_of_ranks() {
    for size in [2, 4, 8] {
        for sequence in [false, true] {
            same("one key-value head", &Case::new(gpt2(1, true)).with_loss(), size, sequence);
            same("dropout", &Case::new(TransformerConfig { dropout: 0.2, ..gpt2(8, false) }), size, sequence);
        }
    }
}

#[test]
fn encoders_are_the_same_on_any_number_of_ranks() {
    for size in [2, 4] {
        for sequence in [false, true] {
            same("BERT", &Case::new(encoder(None, true)).with_loss(), size, sequence);
            same("ALBERT", &Case::new(encoder(Some(10), true)), size, sequence);
            same("dropout", &Case::new(TransformerConfig { dropout: 0.2, ..encoder(Some(10), false) }), size, sequence);
        }
    }
}

#[test]
fn what_is_computed_again_talks_again() {
    let config = TransformerConfig { qk_norm: true, dropout: 0.1, ..llama(2, true) };
    let engine = Engine { recompute: Recompute::Blocks, ..Engine::default() };
    let case = Case { engine, ..Case::new(config) };
    for sequence in [false, true] {
        same("recomputed", &case, 4, sequence);
    }
}

#[test]
fn products_in_bf16_stay_close() {
    let engine = Engine { compute: Compute::Bf16, ..Engine::default() };
    for config in [llama(2, true), gpt2(8, false)] {
        let case = Case { engine: engine.clone(), tolerance: 3e-2, ..Case::new(config) };
        for sequence in [false, true] {
            same("bf16", &case, 4, sequence);
        }
    }
}

#[test]
fn heads_may_be_divided_unevenly() {
    let config = TransformerConfig { n_heads: 9, n_kv_heads: 3, ..llama(3, true) };
    same("nine heads", &Case::new(config), 2, true);
    // Biases of q, k and v alone, also where several ranks have the same key-value head.
    let config = TransformerConfig { qkv_bias: true, ..llama(2, true) };
    same("Qwen 2", &Case::new(config.clone()), 2, true);
    same("Qwen 2", &Case::new(config), 4, false);
}

#[test]
fn there_may_be_fewer_tokens_than_ranks() {
    same("five tokens", &Case { tokens: [1, 5], ..Case::new(gpt2(2, true)) }, 8, true);
    same("five tokens", &Case { tokens: [1, 5], ..Case::new(llama(2, true)) }, 8, true);
}

#[test]
fn what_does_not_divide_is_refused() {
    let refused = |config: TransformerConfig, size: usize| config.validate_parallel(size).unwrap_err().to_string();
    assert_eq!(
        refused(llama(2, true), 3),
        "decoder config: n_kv_heads = 2: must be at least the 3 ranks of tensor parallelism, or divide them while they divide \
         n_heads = 8"
    );
    let few = TransformerConfig { vocab_size: 3, ..llama(2, true) };
    assert_eq!(refused(few, 4), "decoder config: vocab_size = 3: must be at least the 4 ranks of tensor parallelism");
    llama(2, true).validate_parallel(8).unwrap();
}

#[test]
fn a_rank_that_fails_is_named() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let failure = spawn(4, move |comm: Communicator| {
        let _pool = threads::for_rank(1).map_err(|error| error.to_string())?;
        let config = llama(2, true);
        let model = Transformer::sharded(&config, 5, &device, &comm, false).map_err(|error| error.to_string())?;
        let batch = batch(config.vocab_size, [3, 13]);
        let loss = model.loss(&batch, Some(0));
        if comm.rank() == 2 {
            return Err("out of memory".to_owned());
        }
        // The others are inside backward, where no error can be returned.
        loss.backward();
        Ok(())
    });
    assert_eq!(failure.unwrap_err().to_string(), "rank 2 failed: out of memory");
}

#[test]
fn matrices_and_stages_are_divided_together() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let (micro_batches, degrees) = (4, Degrees { pp: 2, tp: 4, ..Degrees::default() });
    let batches = move |config: &TransformerConfig| -> Vec<TokenBatch> {
        (0..micro_batches).map(|i| batch(config.vocab_size, [3, 12 + i])).collect()
    };
    let counters: Vec<u64> = (0..micro_batches as u64).collect();
    for (config, sequence) in [(llama(2, true), false), (gpt2(2, true), true)] {
        let config = TransformerConfig { dropout: 0.1, ..config };
        let model = Transformer::new(&config, 5, &device).unwrap();
        let (mut want, mut loss) = (NamedGrads::new(), 0.0);
        for (batch, counter) in batches(&config).iter().zip(&counters) {
            loss += Engine::default().gradients(&model, batch, *counter, &mut want).unwrap();
        }
        for schedule in [Schedule::OneForwardOneBackward, Schedule::ZeroBubbleV] {
            let what = format!("{schedule}, tokens divided: {sequence}");
            let ranks = {
                let (config, device, counters) = (config.clone(), device.clone(), counters.clone());
                spawn(8, move |world: Communicator| {
                    let _pool = threads::for_rank(1).map_err(|error| error.to_string())?;
                    let mesh = Mesh::new(degrees, world).map_err(|error| error.to_string())?;
                    let (tp, pp) = (mesh.group(Axis::Tp), mesh.group(Axis::Pp));
                    let model =
                        Transformer::sharded(&config, 5, &device, tp, sequence).map_err(|error| error.to_string())?;
                    let run = || -> Result<(f64, NamedGrads), TrainError> {
                        let pipeline = Pipeline::new(&model, schedule, pp.size(), micro_batches)?;
                        let model = pipeline.part(model.clone(), pp.rank())?;
                        let mut total = NamedGrads::new();
                        let engine = Engine::default();
                        let batches = batches(&config);
                        let done = engine.pipeline_gradients(&model, &pipeline, &batches, &counters, pp, &mut total)?;
                        Ok((done.loss, total))
                    };
                    let (loss, grads) = run().map_err(|error| error.to_string())?;
                    let grads = grads.iter().map(|(name, grad)| (name.to_owned(), to_host(grad.clone()))).collect();
                    Ok::<(f64, BTreeMap<String, Vec<f32>>), String>((loss, grads))
                })
                .unwrap_or_else(|error| panic!("{what}: {error}"))
            };
            assert!(ranks.iter().all(|(got, _)| (got - loss).abs() <= 1e-5 * loss), "{what}: {loss}");
            let shapes = firebox_optim::parameters(&model).unwrap();
            let mut seen = 0;
            for info in &shapes {
                let want = to_host(want.get(&info.name).unwrap().clone());
                // The ranks of one stage are neighbours.
                for stage in ranks.chunks(degrees.tp) {
                    let parts: Vec<&Vec<f32>> = stage.iter().filter_map(|(_, grads)| grads.get(&info.name)).collect();
                    if parts.is_empty() {
                        continue;
                    }
                    seen += 1;
                    let got = config.placement(&info.name, degrees.tp).unshard(&parts, &info.shape);
                    let size = want.iter().fold(1e-30, |max: f64, v| max.max(f64::from(v.abs())));
                    let worst = want.iter().zip(&got).map(|(w, g)| f64::from((w - g).abs())).fold(0.0, f64::max);
                    assert!(worst <= 1e-5 * size, "{what}: gradient of {}: off by {worst}, {size}", info.name);
                }
            }
            assert!(seen >= shapes.len(), "{what}: {seen} of {}", shapes.len());
        }
    }
}
