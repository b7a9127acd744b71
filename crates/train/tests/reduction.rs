//! Layers that share blocks, matrices of low rank, narrow embeddings: the same model as one with a whole matrix for every layer.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Tensor, TensorData};
use firebox_models::transformer::hf::Family;
use firebox_models::transformer::{
    ExpertsConfig, KvCache, LowRank, NormKind, Reduction, Transformer, TransformerConfig, presets,
};
use firebox_models::{Staged, TokenBatch};
use firebox_optim::NamedGrads;
use firebox_tensor::device::Backend;
use firebox_tensor::random::{Counter, Purpose, normal};
use firebox_train::engine::{Engine, Recompute};
use firebox_train::model_io::{load, parameters, to_host};
use firebox_train::quantized::{self, Weights};
use firebox_train::reshape::structured::{Importance, Kept, Removal, remove};
use firebox_train::reshape::{expand, low_rank, share};

fn llama() -> TransformerConfig {
    TransformerConfig {
        d_model: 24,
        n_layers: 4,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 6,
        d_ff: 20,
        context: 12,
        ..presets::depth(2, 31)
    }
}

fn gpt2() -> TransformerConfig {
    let TransformerConfig { norm, feed_forward, positions, bias, .. } = presets::named("gpt2").unwrap();
    TransformerConfig { n_kv_heads: 4, norm, feed_forward, positions, bias, ..llama() }
}

fn reduced(reduction: Reduction, config: TransformerConfig) -> TransformerConfig {
    TransformerConfig { reduction, ..config }
}

fn cases() -> Vec<TransformerConfig> {
    let per_block = |layers_per_block| Reduction { layers_per_block, ..Reduction::default() };
    let ranks = LowRank { qkv: 5, out: 0, input: 3, output: 7 };
    let untied = || TransformerConfig { tied: false, ..llama() };
    vec![
        reduced(per_block(4), llama()),
        reduced(per_block(2), TransformerConfig { qk_norm: true, ..untied() }),
        reduced(per_block(2), gpt2()),
        reduced(Reduction { delta_rank: 3, ..per_block(2) }, llama()),
        reduced(Reduction { embed_dim: 7, ..Reduction::default() }, llama()),
        reduced(Reduction { embed_dim: 7, ..per_block(4) }, untied()),
        reduced(Reduction { low_rank: ranks, ..Reduction::default() }, gpt2()),
        reduced(Reduction { low_rank: ranks, delta_rank: 2, embed_dim: 9, ..per_block(2) }, gpt2()),
    ]
}

fn batch() -> TokenBatch {
    let ids = |k: usize| (0..24).map(|i| (i * k + i / 5) as i32 % 31).collect();
    TokenBatch::plain(2, 12, ids(7), ids(11))
}

/// Every parameter through `change`.
fn mapped(model: Transformer, change: impl Fn(&str, &[usize], Vec<f32>) -> Vec<f32>) -> Transformer {
    struct Mapper<F>(Vec<String>, F);
    impl<F: Fn(&str, &[usize], Vec<f32>) -> Vec<f32>> ModuleMapper for Mapper<F> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.0.join(".");
            param.map(|value| {
                let (shape, device) = (value.dims(), value.device());
                let values = (self.1)(&path, &shape, value.into_data().try_into_vec().unwrap());
                Tensor::from_data(TensorData::new(values, shape), &device).set_require_grad(device.is_autodiff())
            })
        }
    }
    model.map(&mut Mapper(vec![], change))
}

/// A model all of whose parameters matter.
fn model(config: &TransformerConfig) -> Transformer {
    let device = Backend::NdArray.device().unwrap();
    mapped(Transformer::new(config, 3, &device).unwrap(), |name, _, mut values| {
        let counter = Counter::new(9, Purpose::Init, 0).fork(name);
        values.iter_mut().enumerate().for_each(|(i, v)| *v += 0.1 * normal(counter, i as u64));
        values
    })
}

fn save(model: &Transformer, dir: &Path) {
    let values: HashMap<String, Vec<f32>> =
        parameters(model).into_iter().map(|(name, value)| (name, to_host(value))).collect();
    let weights = |name: &str| Ok(Weights::Full(values[name].clone()));
    quantized::save(dir, model.config(), &BTreeMap::new(), None, weights).unwrap();
}

fn open(dir: &Path) -> Transformer {
    load(dir, &Backend::NdArray.device().unwrap()).unwrap().model
}

fn logits(model: &Transformer) -> Vec<f32> {
    to_host(model.logits(&batch()))
}

#[track_caller]
fn assert_close(a: &[f32], b: &[f32], bound: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(b).fold(0f32, |worst, (a, b)| worst.max((a - b).abs() / (1.0 + a.abs())));
    assert!(worst < bound, "{what}: {worst}");
}

fn gradients(model: &Transformer, recompute: Recompute) -> (f64, BTreeMap<String, Vec<f32>>) {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let values: HashMap<String, Vec<f32>> =
        parameters(model).into_iter().map(|(name, value)| (name, to_host(value))).collect();
    let model = mapped(Transformer::new(model.config(), 0, &device).unwrap(), |name, _, _| values[name].clone());
    let mut grads = NamedGrads::new();
    let engine = Engine { recompute, ..Engine::default() };
    let loss = engine.gradients(&model, &batch(), 1, &mut grads).unwrap();
    (loss, grads.iter().map(|(name, grad)| (name.to_owned(), to_host(grad.clone()))).collect())
}

#[test]
fn a_reduced_model_computes_what_the_expanded_one_does() {
    for config in cases() {
        let dir = tempfile::tempdir().unwrap();
        let model = model(&config);
        let what = format!("{:?}", config.reduction);
        let count: usize = parameters(&model).iter().map(|(_, value)| value.dims()[0]).sum();
        assert_eq!(count, config.num_params(), "{what}");
        save(&model, &dir.path().join("reduced"));
        let again = open(&dir.path().join("reduced"));
        assert_eq!(again.config().reduction, config.reduction);
        assert_eq!(logits(&again), logits(&model), "{what}: a checkpoint holds all of it");
        let wide = dir.path().join("wide");
        let expanded = expand(&dir.path().join("reduced"), &wide).unwrap();
        assert!(expanded.num_params() > config.num_params(), "{what}");
        assert_ne!(Family::of(&expanded), Family::Firebox, "{what}: what other programs load");
        let wide = open(&wide);
        assert_close(&logits(&wide), &logits(&model), 1e-4, &what);
        // Of layers that share a block each has its own keys and values.
        let ids: Vec<i32> = batch().inputs[..12].to_vec();
        let mut cache = KvCache::new(&model);
        for (i, id) in ids.iter().enumerate() {
            let next = to_host(model.forward_cached(&[*id], &mut cache));
            assert_close(&next, &logits(&model)[i * 31..(i + 1) * 31], 1e-4, &format!("{what}, token {i}"));
        }
        let (loss, reduced) = gradients(&model, Recompute::None);
        let (wide_loss, all) = gradients(&wide, Recompute::None);
        assert!((loss - wide_loss).abs() < 1e-4 * loss, "{what}: {loss} {wide_loss}");
        let (again, recomputed) = gradients(&model, Recompute::Blocks);
        assert!(loss == again && reduced == recomputed, "{what}: recomputing changes no bit");
        assert_eq!(reduced.len(), parameters(&model).len(), "{what}: each has a gradient");
        let mut sums: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (name, grad) in &all {
            // What is a parameter of both, with a gradient from each layer that uses it.
            let Some(of) = config.source(name).whole else { continue };
            let sum = sums.entry(of).or_insert_with(|| vec![0.0; grad.len()]);
            sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
        }
        assert!(sums.len() > 4);
        for (name, sum) in sums {
            assert_close(&sum, &reduced[&name], 1e-4, &format!("{what}: gradient of {name}"));
        }
    }
}

#[test]
fn stages_say_which_blocks_they_use() {
    let config = reduced(Reduction { layers_per_block: 2, delta_rank: 1, ..Reduction::default() }, llama());
    let model = model(&config);
    assert_eq!(model.n_stages(), 6);
    let of = |name: &str| (0..6).filter(|i| model.uses(*i, name)).collect::<Vec<_>>();
    assert_eq!(of("blocks.0.attn.qkv.weight"), [1, 2]);
    assert_eq!(of("blocks.1.mlp_norm.weight"), [3, 4]);
    assert_eq!(of("deltas.2.out.up"), [3]);
    assert_eq!((of("embed.weight"), of("norm.weight")), (vec![0, 5], vec![5]));
    assert_eq!(model.first_stage("blocks.1.mlp_norm.weight"), 3);
    let shared = reduced(Reduction { layers_per_block: 4, ..Reduction::default() }, llama());
    assert_eq!(shared.flops_per_token(), llama().flops_per_token(), "sharing saves parameters, not work");
}

#[test]
fn impossible_reductions_are_refused() {
    let none = Reduction::default();
    let experts = TransformerConfig { experts: Some(ExpertsConfig::default()), ..llama() };
    for (reduction, config, says) in [
        (Reduction { layers_per_block: 3, ..none }, llama(), "divide n_layers = 4"),
        (Reduction { layers_per_block: 0, ..none }, llama(), "layers_per_block"),
        (Reduction { delta_rank: 2, ..none }, llama(), "layers_per_block to at least 2"),
        (Reduction { delta_rank: 20, layers_per_block: 2, ..none }, llama(), "delta_rank = 20"),
        (Reduction { embed_dim: 24, ..none }, llama(), "less than d_model = 24"),
        (Reduction { low_rank: LowRank { qkv: 24, ..LowRank::default() }, ..none }, llama(), "low_rank.qkv = 24"),
        (Reduction { low_rank: LowRank { input: 2, ..LowRank::default() }, ..none }, experts, "n_experts"),
    ] {
        let error = reduced(reduction, config).validate().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_trained_model_becomes_a_shared_one() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Layers that are alike, up to a difference of low rank.
    let whole = model(&llama());
    let first: HashMap<String, Vec<f32>> =
        parameters(&whole).into_iter().map(|(name, value)| (name, to_host(value))).collect();
    let of_first = |name: &str| {
        let path = name.strip_prefix("blocks.").map(|rest| format!("blocks.0.{}", rest.split_once('.').unwrap().1));
        first[&path.unwrap_or(name.into())].clone()
    };
    let alike = mapped(whole.clone(), |name, _, _| of_first(name));
    save(&alike, &at("alike"));
    let config = share(&at("alike"), &at("shared"), 4, 0).unwrap();
    assert_close(&logits(&open(&at("shared"))), &logits(&alike), 1e-4, "the mean of equals");
    assert!(4 * config.num_params() < 2 * llama().num_params());
    let different = mapped(alike, |name, shape, mut values| {
        let [rows, columns] = shape[..] else { return values };
        if name.starts_with("blocks.") {
            let sign = if name.starts_with("blocks.1") || name.starts_with("blocks.3") { 0.02 } else { -0.02 };
            (0..rows * columns)
                .for_each(|i| values[i] += sign * ((i / columns) as f32).sin() * ((i % columns) as f32).cos());
        }
        values
    });
    save(&different, &at("different"));
    share(&at("different"), &at("adjacent"), 2, 0).unwrap();
    share(&at("different"), &at("relaxed"), 2, 1).unwrap();
    let want = logits(&different);
    assert_close(&logits(&open(&at("relaxed"))), &want, 1e-3, "a difference of rank 1");
    let far = logits(&open(&at("adjacent")));
    assert!(far.iter().zip(&want).any(|(a, b)| (a - b).abs() > 1e-2), "without it");
    let error = share(&at("shared"), &at("again"), 2, 0).unwrap_err().to_string();
    assert!(error.contains("of their own"), "{error}");
    assert!(share(&at("alike"), &at("third"), 3, 0).unwrap_err().to_string().contains("divide n_layers"));
    assert!(share(&at("alike"), &at("shared"), 2, 0).unwrap_err().to_string().contains("does not exist yet"));
    assert!(!at("third").exists() && !at("again").exists());
}

#[test]
fn matrices_of_low_rank_are_factored_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let ranks = LowRank { qkv: 4, out: 3, input: 5, output: 6 };
    let config = reduced(Reduction { low_rank: ranks, ..Reduction::default() }, gpt2());
    let factored = model(&config);
    save(&factored, &at("factored"));
    expand(&at("factored"), &at("whole")).unwrap();
    for (name, batches) in [("plain", vec![]), ("aware", vec![batch()])] {
        low_rank(&at("whole"), &at(name), ranks, batches).unwrap();
        assert_close(&logits(&open(&at(name))), &logits(&factored), 1e-3, "ranks that are enough");
    }
    // With less, what text says of the inputs makes the outputs on it closer.
    let full = model(&llama());
    save(&full, &at("full"));
    let half = LowRank { qkv: 9, out: 9, input: 9, output: 9 };
    let far = |name: &str, batches| -> f32 {
        low_rank(&at("full"), &at(name), half, batches).unwrap();
        logits(&open(&at(name))).iter().zip(logits(&full)).map(|(a, b)| (a - b).powi(2)).sum()
    };
    let (plain, aware) = (far("half-plain", vec![]), far("half-aware", vec![batch()]));
    assert!(aware < plain, "{aware} {plain}");
    let too_large = LowRank { qkv: 24, ..ranks };
    for (ranks, says) in [(LowRank::default(), "not 0"), (too_large, "low_rank.qkv")] {
        let error = low_rank(&at("whole"), &at("none"), ranks, vec![]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = low_rank(&at("factored"), &at("none"), ranks, vec![]).unwrap_err().to_string();
    assert!(error.contains("of their own"), "{error}");
    assert!(!at("none").exists());
}

/// Without what a structure adds to the residual stream; the second of the heads' groups, units 3 and 7, channel 5, layer 2.
fn idle(model: Transformer, channels: bool) -> Transformer {
    let config = model.config().clone();
    let group = config.n_heads / config.n_kv_heads * config.head_dim;
    mapped(model, |name, shape, mut values| {
        let columns = *shape.last().unwrap();
        for (i, value) in values.iter_mut().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let zero = match name {
                _ if name.ends_with("attn.out.weight") => row / group == 1,
                _ if name.ends_with("mlp.output.weight") => row == 3 || row == 7,
                _ => false,
            };
            let writes =
                ["out.weight", "out.bias", "output.weight", "output.bias"].iter().any(|end| name.ends_with(end));
            let writes = writes || name == "embed.weight" || name == "positions.weight";
            let of_layer = name.starts_with("blocks.2.") && writes;
            if zero || of_layer || channels && writes && column == 5 {
                *value = 0.0;
            }
        }
        values
    })
}

#[test]
fn what_adds_nothing_is_taken_out_without_a_change() {
    let qk = TransformerConfig { qk_norm: true, tied: false, ..llama() };
    let gpt2_grouped = TransformerConfig { n_kv_heads: 2, ..gpt2() };
    let shared = reduced(Reduction { layers_per_block: 2, delta_rank: 2, ..Reduction::default() }, llama());
    for config in [llama(), qk, gpt2(), gpt2_grouped, shared] {
        let dir = tempfile::tempdir().unwrap();
        let what = format!("{config:?}");
        // LayerNorm's mean is over the channels that are there.
        let channels = config.norm == NormKind::RmsNorm && config.reduction.is_none();
        let mut model = idle(model(&config), channels);
        if config.reduction.delta_rank > 0 {
            model =
                mapped(model, |name, _, values| if name.ends_with(".up") { vec![0.0; values.len()] } else { values });
        }
        save(&model, &dir.path().join("before"));
        let layers = usize::from(config.reduction.layers_per_block == 1);
        let removal = Removal { kv_heads: 1, units: 2, layers, width: usize::from(channels) };
        let importance = Importance::measure(&dir.path().join("before"), vec![batch()]).unwrap();
        let kept = Kept::of(&config, removal, &importance).unwrap();
        assert!(kept.kv_heads.iter().enumerate().all(|(b, heads)| b == 2 || !heads.contains(&1)), "{kept:?}");
        assert!(kept.units.iter().enumerate().all(|(b, units)| b == 2 || !units.contains(&3)), "{kept:?}");
        if layers > 0 {
            assert_eq!(kept.layers, [0, 1, 3], "{:?}", importance.layers);
        }
        assert!(!channels || !kept.width.contains(&5), "{:?}", importance.width);
        let after = dir.path().join("after");
        let smaller = remove(&dir.path().join("before"), &after, &kept).unwrap();
        assert!(smaller.num_params() < config.num_params());
        let bytes = std::fs::metadata(after.join("model.safetensors")).unwrap().len() as usize;
        assert!(bytes.abs_diff(4 * smaller.num_params()) < 10_000, "the file shrinks with the parameters");
        assert!(smaller.flops_per_token() < config.flops_per_token());
        let pruned = open(&after);
        assert_eq!(pruned.config(), &smaller);
        assert_close(&logits(&pruned), &logits(&model), 1e-3, &what);
        let (loss, grads) = gradients(&pruned, Recompute::None);
        assert!(loss.is_finite() && grads.len() == parameters(&pruned).len(), "it trains on");
        // By weights alone what weighs nothing goes first, too.
        let by_weights = Importance::measure(&dir.path().join("before"), vec![]).unwrap();
        let without = Removal { layers: 0, width: 0, ..removal };
        let kept = Kept::of(&config, without, &by_weights).unwrap();
        assert!(kept.units[0].len() == 18 && !kept.units[0].contains(&7));
    }
}

#[test]
fn what_cannot_be_taken_out_is_said() {
    let importance = Importance { width: vec![1.0; 24], ..Importance::default() };
    let shared = reduced(Reduction { layers_per_block: 2, ..Reduction::default() }, llama());
    let narrow = reduced(Reduction { embed_dim: 20, ..Reduction::default() }, llama());
    let experts = TransformerConfig { experts: Some(ExpertsConfig::default()), ..llama() };
    let none = Removal::default();
    for (config, removal, says) in [
        (llama(), Removal { kv_heads: 2, ..none }, "fewer than the model's 2"),
        (llama(), Removal { units: 20, ..none }, "fewer than the model's 20"),
        (llama(), Removal { layers: 4, ..none }, "fewer than the model's 4"),
        (llama(), Removal { width: 24, ..none }, "fewer than the model's 24"),
        (llama(), Removal { layers: 1, ..none }, "calibration text"),
        (llama(), Removal { units: 1, ..none }, "20 finite numbers"),
        (shared, Removal { layers: 1, ..none }, "share blocks"),
        (narrow, Removal { width: 4, ..none }, "embed_dim = 20"),
        (experts, Removal { units: 1, ..none }, "experts"),
    ] {
        let error = Kept::of(&config, removal, &importance).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(says), "{error}");
    }
}
