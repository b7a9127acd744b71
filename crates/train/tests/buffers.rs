//! Steps after the first ones compute in the memory of those before them.
#![allow(clippy::unwrap_used)]

use firebox_models::TokenBatch;
use firebox_models::transformer::{Transformer, presets};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_tensor::buffers;
use firebox_tensor::device::Backend;
use firebox_train::engine::Engine;

#[test]
fn later_steps_take_no_new_buffers() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    let (config, batch, tokens) = (presets::depth(2, 300), 4, 64);
    let mut model = Transformer::new(&config, 1, &device).unwrap();
    let mut optimizer = Optimizer::new(AdamWConfig::default(), DecayRule::Matrices).unwrap();
    let ids: Vec<i32> = (0..(batch * tokens) as i32).map(|i| i * 7 % 300).collect();
    let batch = TokenBatch::plain(batch, tokens, ids.clone(), ids);
    let mut step = |n: u64| {
        let mut grads = NamedGrads::new();
        Engine::default().gradients(&model, &batch, n, &mut grads).unwrap();
        let (_, factor) = grads.clip_factor(1.0);
        model = optimizer.step_scaled(1e-3, factor, model.clone(), &mut grads).unwrap();
    };
    (0..5).for_each(&mut step);
    let before = buffers::stats();
    (5..25).for_each(&mut step);
    let after = buffers::stats();
    assert!(before.reused > 0 && after.reused > before.reused + 20 * 40, "{before:?} {after:?}");
    assert_eq!(after.allocated, before.allocated, "{before:?} {after:?}");
}
