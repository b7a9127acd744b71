//! Firebox's contender in training: the step that `firebox_train::Trainer` takes.

use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::Compute;
use firebox_train::engine::{Engine, Recompute};
use firebox_train::observe::memory;

use crate::contender::Contender;
use crate::error::Result;
use crate::protocol::{Ready, Training, serve};

/// What a step needs and changes.
struct State {
    // Taken out while the optimizer updates it.
    model: Option<Transformer>,
    engine: Engine,
    /// Whether the optimizer runs inside backward.
    in_backward: bool,
    optimizer: Optimizer,
    batch: TokenBatch,
    lr: f64,
    clip: f64,
}

impl State {
    /// Forward, backward, clip, update; returns the loss.
    fn step(&mut self) -> Result<f64> {
        let Some(mut model) = self.model.take() else { return Ok(f64::NAN) };
        let loss;
        if self.in_backward {
            let mut pass = self.engine.forward(&model, &self.batch, 0).map_err(Box::new)?;
            loss = pass.loss();
            while let Some(mut grads) = pass.backward(&model).map_err(Box::new)? {
                model = self.optimizer.step(self.lr, model, &mut grads)?;
            }
        } else {
            let mut grads = NamedGrads::new();
            loss = self.engine.gradients(&model, &self.batch, 0, &mut grads).map_err(Box::new)?;
            let (_, factor) = grads.clip_factor(self.clip);
            model = self.optimizer.step_scaled(self.lr, factor, model, &mut grads)?;
        }
        self.model = Some(model);
        Ok(loss)
    }
}

/// Runs the worker.
///
/// # Errors
/// A shape or hyperparameter that is impossible.
pub fn work(contender: Contender, task: &Training) -> Result<()> {
    let rss_before_model_bytes = memory::current_bytes();
    let device = Backend::NdArray.device()?.autodiff();
    let config =
        AdamWConfig { beta1: task.beta1, beta2: task.beta2, weight_decay: task.weight_decay, ..AdamWConfig::default() };
    let (inputs, targets) = task.batch();
    let (recompute, compute) = match contender {
        Contender::FireboxBf16 => (Recompute::None, Compute::Bf16),
        Contender::Firebox => (Recompute::None, Compute::F32),
        _ => (Recompute::Blocks, Compute::F32),
    };
    let mut state = State {
        engine: Engine { recompute, compute, offload: None },
        in_backward: contender == Contender::FireboxLean,
        model: Some(Transformer::new(&task.model, task.seed, &device)?),
        optimizer: Optimizer::new(config, DecayRule::Matrices)?,
        batch: TokenBatch::plain(task.batch, task.tokens, inputs, targets),
        lr: task.lr,
        clip: task.clip,
    };
    let loss = state.step()?;
    for _ in 1..task.warmup_steps {
        state.step()?;
    }
    let params = task.model.num_params() as u64;
    let software = format!("Firebox {}", env!("CARGO_PKG_VERSION"));
    serve(&Ready { params, loss, rss_before_model_bytes, software }, |_, n, _| {
        let mut loss = f64::NAN;
        for _ in 0..n {
            loss = state.step()?;
        }
        Ok(loss)
    })
}
