//! Clipping by a group's own norm, by the rest's, and adaptively, against the formulas in double precision.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_optim::{
    Adaptive, Clip, DecayRule, GroupConfig, NamedGrads, OptimError, Optimizer, ParamInfo, SgdConfig, values,
};

#[derive(Module, Debug)]
struct Linear {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Net {
    embed: Param<Tensor<2>>,
    one: Linear,
    two: Linear,
    head: Param<Tensor<2>>,
}

fn numbers(count: usize, salt: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + salt * 101) as f32 * 0.7).sin()).collect()
}

fn param<const D: usize>(shape: [usize; D], salt: usize) -> Param<Tensor<D>> {
    let data = TensorData::new(numbers(shape.iter().product(), salt), shape);
    Param::from_tensor(Tensor::from_data(data, &Device::default().autodiff()))
}

fn net() -> Net {
    let zero = Param::from_tensor(Tensor::zeros([4], &Device::default().autodiff()));
    Net {
        embed: param([9, 5], 1),
        one: Linear { weight: param([4, 5], 2), bias: zero },
        two: Linear { weight: param([6, 4], 3), bias: param([6], 4) },
        head: param([9, 6], 5),
    }
}

/// By name: shape, value, gradient.
type All = Vec<(String, Vec<usize>, Vec<f64>, Vec<f64>)>;

fn host(x: &Tensor<1>) -> Vec<f64> {
    x.to_data().iter::<f32>().map(f64::from).collect()
}

fn grads(net: &Net) -> NamedGrads {
    let one = |(i, (info, _)): (usize, (ParamInfo, Tensor<1>))| {
        // Small and large rows.
        let values: Vec<f32> = numbers(info.elements(), 20 + i)
            .iter()
            .enumerate()
            .map(|(j, x)| x * 10f32.powi((j / 5) as i32 % 3 - 2))
            .collect();
        (info.name, Tensor::from_floats(values.as_slice(), &Device::default()))
    };
    values(net).into_iter().enumerate().map(one).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// What plain SGD with a rate of one subtracts: the clipped gradients.
fn check(clip: Clip, groups: Vec<GroupConfig>, expected: impl Fn(&All) -> Vec<Vec<f64>>) {
    let config = SgdConfig { momentum: 0.0, weight_decay: 0.0, ..SgdConfig::default() };
    let mut optimizer = Optimizer::with_groups(config, DecayRule::None, groups).unwrap().with_clip(clip).unwrap();
    let net = net();
    let mut grads = grads(&net);
    let all: All = values(&net)
        .iter()
        .map(|(info, value)| (info.name.clone(), info.shape.clone(), host(value), host(grads.get(&info.name).unwrap())))
        .collect();
    // As with a scaled loss.
    grads.scale(1024.0);
    let clipping = optimizer.clipping(&net, &grads, 1024.0).unwrap();
    let whole: Vec<f64> = all.iter().flat_map(|(_, _, _, grad)| grad.clone()).collect();
    assert!((clipping.norm / norm(&whole) - 1.0).abs() < 1e-6, "the norm is that of all");
    let after = optimizer.step_clipped(1.0, &clipping, net, &mut grads).unwrap();
    for (((name, _, before, grad), want), (_, after)) in all.iter().zip(expected(&all)).zip(values(&after)) {
        for (i, (after, want)) in host(&after).iter().zip(&want).enumerate() {
            let got = before[i] - after;
            assert!((got - want).abs() < 3e-7, "{name}[{i}]: {got}, should be {want} of {}", grad[i]);
        }
    }
}

fn scaled(x: &[f64], factor: f64) -> Vec<f64> {
    x.iter().map(|x| x * factor).collect()
}

#[test]
fn a_group_is_clipped_by_its_own_norm_and_the_rest_by_the_rests() {
    let group = |name: &str, clip| GroupConfig { params: vec![name.to_owned()], clip, ..GroupConfig::default() };
    // The last group has no clipping of its own: it counts to the rest.
    let groups =
        || vec![group("one.*", Some(Clip::Norm(0.2))), group("head", Some(Clip::Norm(0.0))), group("two.bias", None)];
    check(Clip::Norm(0.5), groups(), |all| {
        let of = |own: bool| {
            let names = all.iter().filter(|(name, ..)| name.starts_with("one.") == own && name != "head");
            norm(&names.flat_map(|(_, _, _, grad)| grad.clone()).collect::<Vec<_>>())
        };
        assert!(of(true) > 0.2 && of(false) > 0.5, "both are clipped");
        all.iter()
            .map(|(name, _, _, grad)| match name.as_str() {
                "head" => grad.clone(),
                name if name.starts_with("one.") => scaled(grad, 0.2 / (of(true) + 1e-6 / 1024.0)),
                _ => scaled(grad, 0.5 / (of(false) + 1e-6 / 1024.0)),
            })
            .collect()
    });
    let printed =
        Optimizer::with_groups(SgdConfig::default(), DecayRule::None, groups()).unwrap().groups(&net()).unwrap();
    assert!(printed.to_string().starts_with("one.*: 2 tensors, 24, clip 0.2; head: 1 tensor, 54, no clip; two.bias: "));
}

/// Equation 3 of Brock et al.
fn adaptive(shape: &[usize], value: &[f64], grad: &[f64], share: f64) -> Vec<f64> {
    let columns = if shape.len() < 2 { grad.len() } else { grad.len() / shape[0] };
    let row = |(w, g): (&[f64], &[f64])| {
        let most = share * norm(w).max(1e-3);
        if norm(g) > most { scaled(g, most / norm(g)) } else { g.to_vec() }
    };
    value.chunks(columns).zip(grad.chunks(columns)).flat_map(row).collect()
}

#[test]
fn adaptive_clipping_follows_its_equation_and_leaves_head_and_embedding_out() {
    let clip = |adaptive| Clip::Adaptive(Adaptive { adaptive });
    check(clip(0.1), vec![], |all| {
        all.iter()
            .map(|(name, shape, value, grad)| match name.as_str() {
                "head" | "embed" => grad.clone(),
                _ => adaptive(shape, value, grad, 0.1),
            })
            .collect()
    });
    // A group that says so is clipped whatever it is; norms of others are not touched by it.
    let group = GroupConfig { params: vec!["head".to_owned()], clip: Some(clip(0.02)), ..GroupConfig::default() };
    check(Clip::Norm(1e9), vec![group], |all| {
        all.iter()
            .map(|(name, shape, value, grad)| match name.as_str() {
                "head" => adaptive(shape, value, grad, 0.02),
                _ => grad.clone(),
            })
            .collect()
    });
}

#[test]
fn what_is_not_finite_is_left_for_the_caller_and_bad_values_are_refused() {
    let optimizer = Optimizer::new(SgdConfig::default(), DecayRule::None).unwrap().with_clip(Clip::Norm(1.0)).unwrap();
    let net = net();
    let mut grads = grads(&net);
    grads.insert("head", Tensor::from_floats([f32::NAN; 54], &Device::default()));
    assert!(!optimizer.clipping(&net, &grads, 1.0).unwrap().norm.is_finite());
    for (clip, words) in [
        (Clip::Norm(-1.0), "clip = -1"),
        (Clip::Norm(f64::NAN), "clip = NaN"),
        (Clip::Adaptive(Adaptive { adaptive: 0.0 }), "clip.adaptive = 0"),
    ] {
        let error = optimizer.clone().with_clip(clip).unwrap_err();
        assert!(matches!(error, OptimError::Hyperparameter { .. }) && error.to_string().contains(words), "{error}");
        let group = GroupConfig { clip: Some(clip), ..GroupConfig::default() };
        let of_group = Optimizer::with_groups(SgdConfig::default(), DecayRule::None, vec![group]).unwrap_err();
        assert_eq!(of_group.to_string(), error.to_string());
    }
}
