//! The engine: no way of saving memory changes a bit, and memory stays flat.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use firebox_data::{Dataset, Source, prepare};
use firebox_models::transformer::{FeedForward, Head, NormKind, Positions, Transformer, TransformerConfig};
use firebox_models::{Staged, TokenBatch};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_tensor::device::Backend;
use firebox_train::engine::{Engine, Recompute};
use firebox_train::model_io::{parameters, to_host};
use firebox_train::observe::{Event, ObserveError, Observer, RunInfo};
use firebox_train::recipe::ModelRecipe;
use firebox_train::{Recipe, TrainError, Trainer};

const ROWS: usize = 3;

fn device() -> Device {
    Backend::NdArray.device().unwrap()
}

/// GPT-2's kind of decoder: LayerNorm, GELU, learned positions, biases.
fn gpt2(tied: bool, dropout: f64) -> TransformerConfig {
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
        d_model: 24,
        n_layers: 5,
        n_heads: 3,
        n_kv_heads: 3,
        head_dim: 8,
        d_ff: 40,
        context: 11,
        norm: NormKind::LayerNorm,
        norm_eps: 1e-5,
        feed_forward: FeedForward::Gelu,
        positions: Positions::Learned,
        bias: true,
        adapter: None,
        tied,
        dropout,
        init_std: 0.1,
    }
}

/// Llama's kind: RMSNorm, SwiGLU, rotary positions, grouped heads.
fn llama(tied: bool, dropout: f64) -> TransformerConfig {
    TransformerConfig {
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 6,
        norm: NormKind::RmsNorm,
        feed_forward: FeedForward::SwiGlu,
        positions: Positions::Rotary { theta: 10000.0 },
        bias: false,
        ..gpt2(tied, dropout)
    }
}

fn models() -> [(&'static str, TransformerConfig); 5] {
    let bounded = TransformerConfig { qk_norm: true, attention_softcap: 2.0, logit_softcap: 5.0, ..llama(true, 0.0) };
    [
        ("GPT-2, tied, dropout", gpt2(true, 0.2)),
        ("GPT-2, untied", gpt2(false, 0.0)),
        ("Llama, untied, dropout", llama(false, 0.1)),
        ("Llama, tied", llama(true, 0.0)),
        ("Llama, tied, QK-norm, soft-caps", bounded),
    ]
}

fn engines(dir: &Path) -> Vec<Engine> {
    let with =
        |recompute| [None, Some(dir.to_path_buf())].map(|offload| Engine { recompute, offload, ..Engine::default() });
    [Recompute::None, Recompute::Blocks, Recompute::Every(2), Recompute::Every(3)].into_iter().flat_map(with).collect()
}

fn batch(config: &TransformerConfig, k: usize) -> TokenBatch {
    let n = ROWS * config.context;
    let ids = |a: usize| (0..n).map(|i| ((i * a + i / 3 + 5 * k) % config.vocab_size) as i32).collect();
    TokenBatch { loss_scale: 0.5 / n as f64, ..TokenBatch::plain(ROWS, config.context, ids(7), ids(11)) }
}

fn bits(tensor: &Tensor<1>) -> Vec<u32> {
    to_host(tensor.clone()).into_iter().map(f32::to_bits).collect()
}

type Bits = Vec<(String, Vec<u32>)>;

fn gradient_bits(grads: &NamedGrads) -> Bits {
    grads.iter().map(|(name, grad)| (name.to_owned(), bits(grad))).collect()
}

fn parameter_bits(model: &Transformer) -> Bits {
    parameters(model).into_iter().map(|(name, values)| (name, bits(&values))).collect()
}

/// Losses, gradients of the last step and parameters after ten AdamW steps of two micro-batches each.
fn ten_steps(
    config: &TransformerConfig,
    mut gradients: impl FnMut(&Transformer, &TokenBatch, u64, &mut NamedGrads) -> f64,
) -> (Vec<u64>, Bits, Bits) {
    let mut model = Transformer::new(config, 7, &device().autodiff()).unwrap();
    let mut optimizer = Optimizer::new(AdamWConfig::default(), DecayRule::Matrices).unwrap();
    let (mut losses, mut last) = (vec![], vec![]);
    for step in 0..10u64 {
        let mut grads = NamedGrads::new();
        for k in 0..2 {
            let loss = gradients(&model, &batch(config, k), step | (k as u64) << 40, &mut grads);
            losses.push(loss.to_bits());
        }
        grads.clip_(1.0);
        last = gradient_bits(&grads);
        model = optimizer.step(3e-3, model, &mut grads).unwrap();
    }
    (losses, last, parameter_bits(&model))
}

/// What one graph of the whole model gives.
fn whole_graph(model: &Transformer, batch: &TokenBatch, step: u64, total: &mut NamedGrads) -> f64 {
    let loss = model.loss(batch, Some(step));
    total.add(NamedGrads::from_backward(model, &mut loss.backward()));
    f64::from(to_host(loss.inner())[0])
}

#[test]
fn every_setting_gives_the_bits_of_one_graph() {
    let dir = tempfile::tempdir().unwrap();
    for (name, config) in models() {
        let (losses, grads, params) = ten_steps(&config, whole_graph);
        assert!(f64::from_bits(losses[18]) < 0.9 * f64::from_bits(losses[0]), "{name}: nothing was learned");
        for engine in engines(dir.path()) {
            let got =
                ten_steps(&config, |model, batch, step, total| engine.gradients(model, batch, step, total).unwrap());
            assert_eq!(got.0, losses, "{name}, {engine:?}: losses");
            assert_eq!(got.1, grads, "{name}, {engine:?}: gradients");
            assert_eq!(got.2, params, "{name}, {engine:?}: parameters");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left on the disk");
}

#[test]
fn each_gradient_comes_once_and_as_early_as_it_can() {
    for (name, config) in models() {
        let model = Transformer::new(&config, 7, &device().autodiff()).unwrap();
        let batch = batch(&config, 0);
        let mut pass = Engine::default().forward(&model, &batch, 0).unwrap();
        let mut seen = vec![];
        let mut stage = model.n_stages();
        while let Some(grads) = pass.backward(&model).unwrap() {
            stage -= 1;
            for (param, _) in grads.iter() {
                assert_eq!(model.first_stage(param), stage, "{name}: {param}");
                seen.push(param.to_owned());
            }
        }
        let mut expected: Vec<String> = parameters(&model).into_iter().map(|(param, _)| param).collect();
        seen.sort();
        expected.sort();
        assert_eq!((stage, seen), (0, expected), "{name}");
    }
}

/// Freezes the parameters whose name starts with one of these.
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

#[test]
fn frozen_parameters_get_no_gradients() {
    let dir = tempfile::tempdir().unwrap();
    for frozen in [&["embed", "positions"][..], &["embed", "positions", "blocks.0", "blocks.2"], &["blocks", "norm"]] {
        for config in [gpt2(false, 0.2), llama(true, 0.0)] {
            let model = Transformer::new(&config, 7, &device().autodiff()).unwrap().map(&mut Freeze(frozen, vec![]));
            let batch = batch(&config, 1);
            let mut want = NamedGrads::new();
            let loss = whole_graph(&model, &batch, 3, &mut want);
            assert!(want.iter().all(|(name, _)| !frozen.iter().any(|start| name.starts_with(start))));
            for engine in engines(dir.path()) {
                let mut got = NamedGrads::new();
                assert_eq!(engine.gradients(&model, &batch, 3, &mut got).unwrap(), loss, "{frozen:?}, {engine:?}");
                assert_eq!(gradient_bits(&got), gradient_bits(&want), "{frozen:?}, {engine:?}");
            }
        }
    }
    let all = Transformer::new(&gpt2(true, 0.0), 7, &device().autodiff()).unwrap().map(&mut Freeze(&[""], vec![]));
    let (batch, mut none) = (batch(all.config(), 0), NamedGrads::new());
    let loss = Engine::default().gradients(&all, &batch, 0, &mut none).unwrap();
    assert!(none.is_empty() && loss > 0.0);
}

fn dataset(dir: &Path) -> Dataset {
    let text = dir.join("text.txt");
    let lines: String = (0..400).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 91)).collect();
    std::fs::write(&text, lines).unwrap();
    let recipe = recipe(&gpt2(true, 0.0), &[]);
    prepare(&recipe.data, &[Source::new([text.display().to_string()])], &dir.join("cache"), &mut |_| {}).unwrap()
}

fn recipe(config: &TransformerConfig, set: &[&str]) -> Recipe {
    let base = [
        "data={ tokenizer = \"char\", val_split = \"tail\" }",
        "schedule={ kind = \"constant\" }",
        "train={ steps = 10, batch_rows = 4, log_every = 1 }",
        "optimizer.clip=0",
        "eval={ every = 0, max_batches = 1, sample_tokens = 0 }",
        "checkpoint.every=0",
    ];
    let set: Vec<String> = base.iter().chain(set).map(ToString::to_string).collect();
    let model = ModelRecipe::exactly(config);
    Recipe { model, ..Recipe::load("tiny", &[]).unwrap() }.with(&set).unwrap()
}

#[derive(Default)]
struct Steps {
    losses: Vec<u64>,
    norms: Vec<f64>,
    skipped: Vec<String>,
    memory: Vec<(u64, u64)>,
}

impl Observer for Steps {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::Step(step) => {
                self.losses.push(step.loss.to_bits());
                self.norms.push(step.grad_norm);
                self.memory.push((step.step, step.memory_bytes));
            }
            Event::Skipped { reason, .. } => self.skipped.push((*reason).into()),
            _ => {}
        }
        Ok(())
    }
}

fn train(recipe: Recipe, dataset: &Dataset, init: Option<Transformer>) -> (Result<Bits, TrainError>, Steps) {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(recipe, dir.path(), dataset, &device(), init).unwrap();
    let mut steps = Steps::default();
    let run = trainer.run(&RunInfo::default(), &mut steps, &AtomicBool::new(false));
    let found: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(found.iter().all(|name| name == "checkpoints"), "left over: {found:?}");
    (run.map(|_| parameter_bits(trainer.model())), steps)
}

#[test]
fn the_trainer_gives_the_same_bits_with_every_setting() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let oib = "memory.optimizer_in_backward=true";
    for (name, config) in models() {
        let (want, plain) = train(recipe(&config, &[]), &dataset, None);
        let want = want.unwrap();
        assert_eq!(plain.losses.len(), 10);
        for set in [
            &[oib][..],
            &[oib, "memory.recompute=blocks"],
            &[oib, "memory.recompute=2", "memory.offload=disk"],
            &["memory.recompute=blocks", "memory.offload=disk"],
        ] {
            let (got, steps) = train(recipe(&config, set), &dataset, None);
            assert_eq!(steps.losses, plain.losses, "{name}, {set:?}: losses");
            assert_eq!(got.unwrap(), want, "{name}, {set:?}: parameters");
            let off = steps.norms.iter().zip(&plain.norms).fold(0f64, |m, (a, b)| m.max((a / b - 1.0).abs()));
            assert!(off < 1e-12, "{name}, {set:?}: norms are {off:.1e} off");
        }
    }
}

/// Replaces the values of one parameter.
struct Scale(&'static str, f64, Vec<String>);

impl ModuleMapper for Scale {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.2.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.2.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.2.join(".") != self.0 {
            return param;
        }
        let values = Tensor::from_inner(param.val().inner() * self.1);
        param.map(|_| values.require_grad())
    }
}

#[test]
fn a_gradient_that_is_not_finite_ends_an_update_in_backward() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let config = TransformerConfig { vocab_size: dataset.tokenizer.vocab_size(), ..gpt2(false, 0.0) };
    let model = |scales: &[(&'static str, f64)]| {
        let model = Transformer::new(&config, 7, &device().autodiff()).unwrap();
        scales.iter().fold(model, |model, &(name, by)| model.map(&mut Scale(name, by, vec![])))
    };
    let set = ["memory.optimizer_in_backward=true", "train.max_bad_steps=2"];
    // Finite forward; in backward the gradient of the output projection is beyond what can be squared.
    let block = [("blocks.1.mlp.input.weight", 1e22), ("blocks.1.mlp.output.weight", 1e-22)];
    let (result, steps) = train(recipe(&config, &set), &dataset, Some(model(&block)));
    let error = result.unwrap_err();
    assert!(matches!(error, TrainError::HalfUpdated { step: 1 }) && !error.is_input(), "{error}");
    assert!(steps.losses.is_empty() && steps.skipped.is_empty());
    // Nothing is updated yet: the step is skipped, as without it.
    for (part, reason) in [("head.weight", "gradient"), ("norm.weight", "loss")] {
        let scales = match part {
            "head.weight" => vec![("norm.weight", 1e22), ("head.weight", 1e-22)],
            _ => vec![("norm.weight", f64::NAN)],
        };
        let (result, steps) = train(recipe(&config, &set), &dataset, Some(model(&scales)));
        let error = result.unwrap_err();
        assert!(matches!(error, TrainError::Diverged { step: 2, last_good: 0, .. }), "{error}");
        assert!(steps.skipped.len() == 2 && steps.skipped[0].contains(reason), "{:?}", steps.skipped);
    }
}
