//! AdamW over a module: the formula in double precision, resume, decay, errors.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_optim::{
    AdamWConfig, Algorithm, DecayRule, GroupConfig, LionConfig, NamedGrads, OptimError, Optimizer, ParamKind,
    ParamState, StateTensor, parameters,
};

#[derive(Module, Debug)]
struct Layer {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Net {
    layers: Vec<Layer>,
    table: Param<Tensor<3>>,
    unused: Param<Tensor<2>>,
}

/// Fixed numbers between -1 and 1, different for every `salt`.
fn numbers(count: usize, salt: u64) -> Vec<f32> {
    (0..count as u64)
        .map(|i| {
            let x = (i + 1000 * salt + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn param<const D: usize>(shape: [usize; D], salt: u64) -> Param<Tensor<D>> {
    let device = Device::default().autodiff();
    let data = TensorData::new(numbers(shape.iter().product(), salt), shape);
    Param::from_tensor(Tensor::from_data(data, &device))
}

fn net() -> Net {
    let layer = |salt| Layer { weight: param([3, 5], salt), bias: param([5], salt + 1) };
    Net { layers: vec![layer(1), layer(3)], table: param([2, 3, 4], 5), unused: param([2, 2], 6) }
}

/// Gradients of every parameter but `unused`, with magnitudes from 1e-6 to 1.
fn grads(net: &Net, salt: u64) -> NamedGrads {
    let infos = parameters(net).unwrap().into_iter().filter(|p| p.name != "unused");
    infos
        .enumerate()
        .map(|(i, p)| {
            let values = numbers(p.elements(), salt * 50 + i as u64).into_iter().enumerate();
            let values: Vec<f32> = values.map(|(j, x)| x * 10f32.powi(-(j as i32 % 7))).collect();
            (p.name, Tensor::from_floats(values.as_slice(), &Device::default()))
        })
        .collect()
}

fn values(net: &Net) -> BTreeMap<String, Vec<f32>> {
    let read = |t: TensorData| t.iter::<f32>().collect();
    let mut all = BTreeMap::new();
    for (i, layer) in net.layers.iter().enumerate() {
        all.insert(format!("layers.{i}.weight"), read(layer.weight.val().into_data()));
        all.insert(format!("layers.{i}.bias"), read(layer.bias.val().into_data()));
    }
    all.insert("table".into(), read(net.table.val().into_data()));
    all.insert("unused".into(), read(net.unused.val().into_data()));
    all
}

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.3 };

#[test]
fn equals_the_formula_in_double_precision() {
    let mut net = net();
    let mut optimizer = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    let mut theta: BTreeMap<String, Vec<f64>> =
        values(&net).into_iter().map(|(n, v)| (n, v.into_iter().map(f64::from).collect())).collect();
    let mut moments: BTreeMap<String, Vec<(f64, f64)>> =
        theta.iter().map(|(n, v)| (n.clone(), vec![(0.0, 0.0); v.len()])).collect();
    let start = values(&net);
    let (beta1, beta2) = (CONFIG.beta1, CONFIG.beta2);

    for t in 1..=20 {
        let lr = 1e-2 / f64::from(t);
        let mut g = grads(&net, t as u64);
        for (name, grad) in g.iter() {
            let lambda = if name.ends_with("bias") { 0.0 } else { CONFIG.weight_decay };
            let state = theta.get_mut(name).unwrap().iter_mut().zip(moments.get_mut(name).unwrap());
            for ((theta, (m, v)), g) in state.zip(grad.to_data().iter::<f32>().map(f64::from)) {
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - beta1.powi(t)), *v / (1.0 - beta2.powi(t)));
                *theta = *theta - lr * m_hat / (v_hat.sqrt() + CONFIG.eps) - lr * lambda * *theta;
            }
        }
        net = optimizer.step(lr, net, &mut g).unwrap();
        assert!(g.is_empty(), "gradients are taken");
    }
    for (name, ours) in values(&net) {
        for (i, (ours, exact)) in ours.iter().zip(&theta[&name]).enumerate() {
            // 20 steps, each rounding to half a unit of numbers up to 1.
            assert!((f64::from(*ours) - exact).abs() < 1e-6, "{name}[{i}]: {ours} {exact}");
        }
        assert_eq!(ours == start[&name], name == "unused", "{name}: moves exactly if it has a gradient");
    }
}

#[test]
fn a_resumed_optimizer_takes_the_same_next_step() {
    let mut net = net();
    let mut optimizer = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    for t in 0..3 {
        let mut g = grads(&net, t);
        net = optimizer.step(1e-2, net, &mut g).unwrap();
    }
    assert_eq!(optimizer.state_bytes(), 8 * net.num_params());
    let mut saved: Vec<StateTensor> = optimizer.state().collect();
    assert_eq!(saved.len(), 3 * 6);
    assert!(optimizer.state_shapes().eq(saved.iter().map(|t| (t.name.clone(), t.shape.clone()))));
    let steps = |name: &str| saved.iter().find(|t| t.name == format!("{name}.steps")).unwrap().values[0];
    assert_eq!((steps("table"), steps("unused")), (3.0, 0.0), "a parameter without gradients takes no steps");
    saved.reverse();

    let mut resumed = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    resumed.load_state::<_, OptimError>(&net, saved.into_iter().map(Ok)).unwrap();
    let twin = net.clone();
    let next = optimizer.step(1e-2, net.clone(), &mut grads(&net, 9)).unwrap();
    let again = resumed.step(1e-2, twin, &mut grads(&net, 9)).unwrap();
    let bits = |net: &Net| values(net).into_values().flatten().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&next), bits(&again));
    assert!(optimizer.state().eq(resumed.state()));
    assert_ne!(bits(&next), bits(&net));
    // And clones kept what they had: an update in place never writes through a shared tensor.
    let fresh =
        Optimizer::new(CONFIG, DecayRule::Matrices).unwrap().step(1e-2, net.clone(), &mut grads(&net, 9)).unwrap();
    assert_ne!(bits(&next), bits(&fresh), "the state matters");
}

#[test]
fn a_state_that_does_not_fit_is_refused_whole() {
    let net = net();
    let mut optimizer = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    let stepped = optimizer.step(1e-2, net, &mut NamedGrads::new()).unwrap();
    let saved: Vec<StateTensor> = optimizer.state().collect();
    let mut fresh = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    let mut load = |saved: &[StateTensor]| fresh.load_state::<_, OptimError>(&stepped, saved.iter().cloned().map(Ok));

    load(&[]).unwrap(); // the state before the first step
    load(&saved).unwrap();
    let at = |name: &str| saved.iter().position(|t| t.name == name).unwrap();
    type Spoil = fn(&mut Vec<StateTensor>, usize);
    let cases: [(&str, Spoil, &str); 7] = [
        ("table.m", |s, i| drop(s.remove(i)), "1 missing: table.m"),
        ("table.steps", |s, i| drop(s.remove(i)), "1 missing: table.steps"),
        ("table.v", |s, i| s[i].name = "tabel.v".into(), "1 missing: table.v; 1 unused: tabel.v"),
        (
            "layers.0.bias.v",
            |s, i| s[i].shape = vec![6],
            "1 wrong: layers.0.bias.v: expected shape [5], got [6] with 5 values",
        ),
        ("table.m", |s, i| s[i].values[3] = f32::NAN, "1 wrong: table.m: expected finite numbers, got NaN"),
        ("table.v", |s, i| s[i].values[3] = -1.0, "1 wrong: table.v: expected finite numbers, none negative, got -1"),
        ("table.steps", |s, i| s[i].values[0] = 1.5, "1 wrong: table.steps: expected a count of steps, got 1.5"),
    ];
    for (name, spoil, problem) in cases {
        let mut spoiled = saved.clone();
        spoil(&mut spoiled, at(name));
        let error = load(&spoiled).unwrap_err().to_string();
        assert_eq!(error, format!("the optimizer state does not fit the model: {problem}"));
    }
    assert_eq!(fresh.state().count(), saved.len(), "a refused state changes nothing");
}

#[test]
fn decay_follows_the_rule() {
    let zero = |net: &Net| grads(net, 1).iter().map(|(n, g)| (n.to_owned(), g.zeros_like())).collect::<NamedGrads>();
    for (rule, matrices, vectors) in
        [(DecayRule::Matrices, 0.97, 1.0), (DecayRule::All, 0.97, 0.97), (DecayRule::None, 1.0, 1.0)]
    {
        let before = values(&net());
        let mut g = zero(&net());
        let after = values(&Optimizer::new(CONFIG, rule).unwrap().step(0.1, net(), &mut g).unwrap());
        for (name, after) in after {
            let factor = match name.as_str() {
                "unused" => 1.0, // no gradient, no step: unlike a gradient of zeros
                name if name.ends_with("bias") => vectors,
                _ => matrices,
            };
            for (before, after) in before[&name].iter().zip(after) {
                assert!((before * factor - after).abs() < 1e-6, "{rule:?} {name}: {before} {after}");
            }
        }
    }
}

#[test]
fn bad_steps_are_refused() {
    let mut optimizer = Optimizer::new(CONFIG, DecayRule::Matrices).unwrap();
    let error = optimizer.step(f64::NAN, net(), &mut NamedGrads::new()).unwrap_err();
    assert!(matches!(error, OptimError::Hyperparameter { name: "lr", .. }), "{error}");
    let error = optimizer.step(4.0, net(), &mut NamedGrads::new()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "lr 4 x weight_decay 0.3 = 1.2 must be below 1: decay would overshoot zero; lower one of them"
    );
    let one = |name: &str, n| NamedGrads::from_iter([(name.to_owned(), Tensor::ones([n], &Device::default()))]);
    let error = optimizer.step(0.1, net(), &mut one("layers.7.bias", 5)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "gradients without a trainable parameter: layers.7.bias; were they taken from another module?"
    );
    let error = optimizer.step(0.1, net(), &mut one("table", 23)).unwrap_err();
    assert_eq!(error.to_string(), "the gradient of `table` has 23 elements, expected 24");
    assert_eq!(optimizer.state().count(), 0);
    assert!(Optimizer::new(AdamWConfig { beta1: 2.0, ..CONFIG }, DecayRule::All).is_err());
}

#[test]
fn backward_gives_gradients_by_name() {
    let net = net();
    let layer = &net.layers[1];
    let x = Tensor::<2>::ones([4, 3], &Device::default());
    let loss = (x.matmul(layer.weight.val()) + layer.bias.val().unsqueeze()).sum();
    let grads = NamedGrads::from_backward(&net, &mut loss.backward());
    let found: Vec<(&str, Vec<f32>)> = grads.iter().map(|(n, g)| (n, g.to_data().iter().collect())).collect();
    assert_eq!(found, [("layers.1.bias", vec![4.0; 5]), ("layers.1.weight", vec![4.0; 15])]);
    assert!(grads.iter().all(|(_, g)| !g.is_autodiff()));
    // 20 elements of 4.
    assert!((grads.global_norm() - 320f64.sqrt()).abs() < 1e-6);
}

/// The update composed of burn's own operations: the oracle of the fused kernel.
fn composed(
    c: &AdamWConfig,
    lr: f32,
    t: i32,
    param: Tensor<1>,
    grad: Tensor<1>,
    m: Tensor<1>,
    v: Tensor<1>,
) -> [Tensor<1>; 3] {
    let (beta1, beta2) = (c.beta1 as f32, c.beta2 as f32);
    let m = m * beta1 + grad.clone() * (1.0 - beta1);
    let v = v * beta2 + grad.clone() * grad * (1.0 - beta2);
    let m_hat = m.clone() / (1.0 - beta1.powi(t));
    let v_hat = v.clone() / (1.0 - beta2.powi(t));
    let decayed = param.clone() - param * (lr * c.weight_decay as f32);
    [decayed - m_hat / (v_hat.sqrt() + c.eps as f32) * lr, m, v]
}

#[test]
fn the_fused_step_equals_the_composed_one_at_every_length() {
    let device = Device::default();
    let tensor = |n, salt| Tensor::<1>::from_floats(numbers(n, salt).as_slice(), &device);
    // Lengths around the widths of vectors and the chunks that threads share.
    for n in [1, 7, 8, 31, 33, 16_383, 16_384, 16_385, 50_003] {
        let algorithm = Algorithm::from(CONFIG);
        let mut fused = tensor(n, 1);
        let mut state = ParamState::new(&algorithm, ParamKind::Matrix, &[n], &device);
        let mut plain = [tensor(n, 1), Tensor::zeros([n], &device), Tensor::zeros([n], &device)];
        for t in 1..=3 {
            let grad = tensor(n, 10 + t as u64);
            fused = algorithm.step(1e-2, CONFIG.weight_decay, 1.0, fused, grad.clone(), &mut state);
            let [param, m, v] = plain;
            plain = composed(&CONFIG, 1e-2, t, param, grad, m, v);
        }
        for (fused, plain) in [fused].into_iter().chain(state.tensors(&device).map(|(_, tensor)| tensor)).zip(&plain) {
            let distance = (fused - plain.clone()).abs().max().into_scalar::<f32>();
            // Values are at most one; each of three steps rounds a few times.
            assert!(distance < 1e-6, "{n}: {distance}");
        }
    }
}

#[test]
fn groups_partition_the_module_and_are_trained_in_their_own_way() {
    let group = |params: &[&str]| GroupConfig {
        params: params.iter().map(|name| (*name).to_owned()).collect(),
        ..GroupConfig::default()
    };
    let with = |groups| Optimizer::with_groups(CONFIG, DecayRule::Matrices, groups);
    let frozen_rate = GroupConfig { lr_scale: 0.0, ..group(&["layers.0.*"]) };
    let lion = GroupConfig { algorithm: Some(LionConfig::default().into()), ..group(&["tab?e"]) };
    let mut optimizer = with(vec![frozen_rate, lion]).unwrap();
    let before = net();
    assert_eq!(
        optimizer.groups(&before).unwrap().to_string(),
        "layers.0.*: 2 tensors, 20, lr x 0; tab?e: 1 tensor, 24, lion; decay: 2 tensors, 19; no decay: 1 tensor, 5"
    );
    let start = values(&before);
    let gradients = grads(&before, 3);
    let after = values(&optimizer.step(1e-3, before, &mut gradients.clone()).unwrap());
    assert_eq!(after["layers.0.weight"], start["layers.0.weight"], "its learning rate is 0");
    // Lion moves every element by the learning rate, and decays by it.
    for (after, before) in after["table"].iter().zip(&start["table"]) {
        assert!(((after - before * (1.0 - 1e-3)).abs() - 1e-3).abs() < 1e-6, "{before} {after}");
    }
    let alone = values(
        &Optimizer::new(CONFIG, DecayRule::Matrices).unwrap().step(1e-3, net(), &mut gradients.clone()).unwrap(),
    );
    assert_eq!(after["layers.1.weight"], alone["layers.1.weight"]);

    let kinds = GroupConfig { kinds: vec![ParamKind::Vector], weight_decay: Some(0.5), ..GroupConfig::default() };
    let groups = with(vec![kinds]).unwrap().groups(&net()).unwrap();
    assert_eq!(groups.groups[0].params.len(), 2);
    let error = with(vec![group(&["nothing.*"])]).unwrap().groups(&net()).unwrap_err();
    assert!(error.to_string().starts_with("no parameter is in the group `nothing.*`"), "{error}");
    let error = with(vec![group(&["a{b"])]).unwrap_err();
    assert!(matches!(error, OptimError::Pattern { .. }), "{error}");
    assert!(with(vec![GroupConfig { lr_scale: -1.0, ..group(&["*"]) }]).is_err());
    let strong = GroupConfig { weight_decay: Some(100.0), ..group(&["*"]) };
    assert!(matches!(with(vec![strong]).unwrap().validate_lr(0.1), Err(OptimError::DecayTooStrong { .. })));
}
