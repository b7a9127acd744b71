//! Adapters in models with gradients, and in shapes that cannot have them.
#![allow(clippy::unwrap_used)]
use firebox_tensor::device::Backend;

use super::*;
use crate::transformer::presets;
use crate::{Staged, TokenBatch};

fn config(name: &str) -> TransformerConfig {
    TransformerConfig {
        vocab_size: 45,
        d_model: 32,
        d_ff: 48,
        n_heads: 4,
        n_kv_heads: if name == "gpt2" { 4 } else { 2 },
        head_dim: 8,
        n_layers: 2,
        context: 16,
        dropout: 0.0,
        ..presets::named(name).unwrap()
    }
}

fn batch() -> TokenBatch {
    TokenBatch::plain(1, 9, (0..9).map(|i| i * 7 % 45).collect(), (1..10).map(|i| i * 7 % 45).collect())
}

/// With other values than the first, of which B is zero.
fn moved(model: Transformer) -> Transformer {
    struct Move(Vec<String>);
    impl burn::module::ModuleMapper for Move {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.0.join(".");
            if !path.contains(".adapter.") {
                return param;
            }
            let trainable = param.is_require_grad();
            let param = param.map(|value| {
                let (shape, device) = (value.dims(), value.device());
                let values: Vec<f32> = value.into_data().iter::<f32>().collect();
                let n = path.len();
                let moved = values.iter().enumerate();
                let moved = moved.map(|(i, v)| v * 1.1 + 0.01 * ((i * 31 + n) % 11) as f32 - 0.03).collect();
                Tensor::from_data(TensorData::new::<f32, _>(moved, shape), &device).set_require_grad(trainable)
            });
            param.set_require_grad(trainable)
        }
    }
    model.map(&mut Move(vec![]))
}

#[test]
fn adapters_start_as_nothing_train_alone_and_merge() {
    let device = Backend::NdArray.device().unwrap().autodiff();
    for name in ["gpt2", "llama-30m"] {
        let config = config(name);
        let plain = Transformer::new(&config, 3, &device).unwrap();
        let all = Targets::all(&config, name == "gpt2");
        let some = Targets::new([Target::Key, Target::Up]);
        for (kind, targets) in [(AdapterKind::Lora, all), (AdapterKind::Dora, all), (AdapterKind::Dora, some)] {
            let adapter = AdapterConfig { kind, rank: 3, alpha: 6.0, rslora: false, targets };
            let model = plain.clone().with_adapters(adapter, 5).unwrap();
            let loss = |model: &Transformer| -> f32 { model.loss(&batch(), None).into_scalar() };
            assert!((loss(&model) - loss(&plain)).abs() < 1e-5, "{name} {kind:?}");
            let model = moved(model);
            assert!((loss(&model) - loss(&plain)).abs() > 1e-3, "{name} {kind:?}");
            let merged = model.clone().merged();
            assert_eq!(merged.config(), &config);
            let logits =
                |model: &Transformer| -> Vec<f32> { model.logits(&batch()).into_data().try_into_vec().unwrap() };
            let (a, b) = (logits(&model), logits(&merged));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + a.abs())), "{name} {kind:?}");
            // Adapters alone have gradients.
            let grads = model.loss(&batch(), Some(0)).backward();
            let qkv = &model.blocks[1].attn.qkv;
            assert!(qkv.weight.val().grad(&grads).is_none());
            assert!(model.embed.weight.val().grad(&grads).is_none());
            let adapter = qkv.adapter.as_ref().unwrap();
            assert!(adapter.up.val().grad(&grads).is_some() && adapter.down.val().grad(&grads).is_some());
            let magnitude = adapter.magnitude.as_ref().map(|m| m.val().grad(&grads).is_some());
            assert_eq!(magnitude, (kind == AdapterKind::Dora).then_some(true));
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let config = config("llama-30m");
    let refuse = |change: &dyn Fn(&mut AdapterConfig)| {
        let targets = Targets::new([Target::Query]);
        let mut adapter = AdapterConfig { kind: AdapterKind::Lora, rank: 2, alpha: 4.0, rslora: false, targets };
        change(&mut adapter);
        TransformerConfig { adapter: Some(adapter), ..config.clone() }.validate().unwrap_err().to_string()
    };
    assert!(refuse(&|adapter| adapter.rank = 0).contains("adapter.rank"));
    assert!(refuse(&|adapter| adapter.rank = 33).contains("32"));
    assert!(refuse(&|adapter| adapter.alpha = f64::NAN).contains("adapter.alpha"));
    assert!(refuse(&|adapter| adapter.targets = Targets::default()).contains("at least one"));
    assert!(refuse(&|adapter| adapter.targets = Targets::new([Target::Packed, Target::Key])).contains("c_attn"));
    let error = Targets::try_from(vec!["w_q".to_owned()]).unwrap_err().to_string();
    assert!(error.contains("w_q") && error.contains("q_proj"), "{error}");
    let rslora = AdapterConfig { rslora: true, rank: 4, ..adapter() };
    assert_eq!((rslora.scale(), adapter().scale()), (4.0, 4.0));
}

fn adapter() -> AdapterConfig {
    AdapterConfig { kind: AdapterKind::Lora, rank: 2, alpha: 8.0, rslora: false, targets: Targets::default() }
}
