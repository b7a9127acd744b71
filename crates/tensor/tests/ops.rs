//! Every fused operation against its plain reference on odd shapes, its gradient against finite differences in f64, on every CPU
//! backend of the build.
#![allow(clippy::unwrap_used)]

mod check;
mod reference;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::{check, close, devices, host, values};
use firebox_tensor::ops::{
    self, AdEmaMixHyper, AdamWHyper, LionHyper, LossConfig, MomentumHyper, Precision, ScheduleFreeHyper, SgdHyper,
    SophiaHyper, State, Update,
};
use firebox_tensor::random::{Counter, Purpose};

#[test]
fn linear() {
    for (n, i, o) in [(1, 1, 1), (3, 5, 7), (33, 17, 65), (2, 130, 3)] {
        check(
            "linear",
            &[n * i, i * o, o],
            |t| {
                let [x, w, b] = <[_; 3]>::try_from(t).unwrap();
                ops::linear(x.reshape([n, i]), w.reshape([i, o]), Some(b)).flatten(0, 1)
            },
            |x| reference::linear(&x[0], &x[1], Some(&x[2]), i, o),
        );
        check(
            "linear without bias",
            &[n * i, i * o],
            |t| {
                let [x, w] = <[_; 2]>::try_from(t).unwrap();
                ops::linear(x.reshape([1, n, i]), w.reshape([i, o]), None).flatten(0, 2)
            },
            |x| reference::linear(&x[0], &x[1], None, i, o),
        );
        check(
            "transposed linear",
            &[n * i, i * o],
            |t| {
                let [x, w] = <[_; 2]>::try_from(t).unwrap();
                ops::linear_transposed(x.reshape([n, i]), w.reshape([o, i])).flatten(0, 1)
            },
            |x| reference::linear(&x[0], &reference::transpose(&x[1], o, i), None, i, o),
        );
    }
}

/// What comes before the product, its width in inputs, and its reference.
type Pre = (&'static str, usize, fn(&[f64], &[Vec<f64>], usize) -> Vec<f64>);

#[test]
fn fused_linear() {
    let pres: [Pre; 7] = [
        ("nothing", 1, |x, _, _| x.to_vec()),
        ("layer norm", 1, |x, p, _| reference::norm(x, &p[0], Some(&p[1]), true, 1e-5)),
        ("rms norm", 1, |x, p, _| reference::norm(x, &p[0], None, false, 1e-6)),
        ("gelu", 1, |x, _, _| reference::gelu(x)),
        ("gelu exact", 1, |x, _, _| reference::gelu_exact(x)),
        ("quick gelu", 1, |x, _, _| reference::quick_gelu(x)),
        ("swiglu", 2, |x, _, i| reference::swiglu(x, i)),
    ];
    for (n, i, o) in [(1, 2, 1), (3, 5, 7), (131, 17, 33)] {
        for (name, width, plain) in pres {
            // x, w, b, residual, weight and bias of the norm
            let lengths = [n * width * i, i * o, o, n * o, i, i];
            let used = if name == "layer norm" {
                6
            } else if name == "rms norm" {
                5
            } else {
                4
            };
            check(
                &format!("linear of {name}"),
                &lengths[..used],
                |t| {
                    let pre = match name {
                        "nothing" => ops::Pre::Nothing,
                        "layer norm" => {
                            ops::Pre::LayerNorm { weight: t[4].clone(), bias: Some(t[5].clone()), eps: 1e-5 }
                        }
                        "rms norm" => ops::Pre::RmsNorm { weight: t[4].clone(), eps: 1e-6 },
                        "gelu" => ops::Pre::Gelu,
                        "gelu exact" => ops::Pre::GeluExact,
                        "quick gelu" => ops::Pre::QuickGelu,
                        _ => ops::Pre::SwiGlu,
                    };
                    let x = t[0].clone().reshape([n, width * i]);
                    let (w, residual) = (t[1].clone().reshape([i, o]), t[3].clone().reshape([n, o]));
                    ops::fused_linear(x, pre, w, Some(t[2].clone()), Some(residual)).flatten(0, 1)
                },
                |x| {
                    let mut y = reference::linear(&plain(&x[0], &x[4..], i), &x[1], Some(&x[2]), i, o);
                    y.iter_mut().zip(&x[3]).for_each(|(y, r)| *y += r);
                    y
                },
            );
        }
    }
}

/// Values that several operations use: their gradients add up, in place where the graph allows it.
#[test]
fn gradients_of_shared_values_add_up() {
    for (n, d) in [(1, 3), (131, 40)] {
        let residual = |x: &[f64], y: Vec<f64>| -> Vec<f64> { x.iter().zip(&y).map(|(x, y)| x + y).collect() };
        check(
            "two residual blocks of one weight",
            &[n * d, d * d, d],
            |t| {
                let (w, norm) = (t[1].clone().reshape([d, d]), t[2].clone());
                // A first product, so that the block's input is inside the graph and not a leaf.
                let mut x = ops::linear(t[0].clone().reshape([n, d]), w.clone(), None);
                for _ in 0..2 {
                    let pre = ops::Pre::RmsNorm { weight: norm.clone(), eps: 1e-6 };
                    let h = ops::fused_linear(x.clone(), pre, w.clone(), None, None);
                    x = ops::fused_linear(h.clone(), ops::Pre::Gelu, w.clone(), None, Some(x)) + ops::gelu(h);
                }
                x.flatten(0, 1)
            },
            |x| {
                let (w, norm) = (&x[1], &x[2]);
                let mut x = reference::linear(&x[0], w, None, d, d);
                for _ in 0..2 {
                    let h = reference::linear(&reference::norm(&x, norm, None, false, 1e-6), w, None, d, d);
                    let y = reference::linear(&reference::gelu(&h), w, None, d, d);
                    x = residual(&residual(&x, y), reference::gelu(&h));
                }
                x
            },
        );
    }
}

#[test]
fn qk_norm() {
    for (b, t, heads, e) in [(1, 1, [1, 1], 2), (2, 3, [3, 1], 5), (1, 37, [4, 2], 33), (3, 11, [2, 2], 64)] {
        let width = (heads[0] + 2 * heads[1]) * e;
        check(
            &format!("qk_norm [{b}, {t}] of {heads:?} heads of {e}"),
            &[b * t * width, e, e],
            |x| {
                let gains = [x[1].clone(), x[2].clone()];
                ops::qk_norm(x[0].clone().reshape([b, t, width]), gains, heads, 1e-5).flatten(0, 2)
            },
            |x| reference::qk_norm(&x[0], [&x[1], &x[2]], heads, 1e-5),
        );
    }
}

#[test]
fn norms() {
    for (n, d) in [(1, 2), (3, 7), (131, 17), (2, 130)] {
        check(
            "layer norm",
            &[n * d, d, d],
            |t| {
                let [x, w, b] = <[_; 3]>::try_from(t).unwrap();
                ops::layer_norm(x.reshape([n, d]), w, Some(b), 1e-5).flatten(0, 1)
            },
            |x| reference::norm(&x[0], &x[1], Some(&x[2]), true, 1e-5),
        );
        check(
            "layer norm without bias",
            &[n * d, d],
            |t| {
                let [x, w] = <[_; 2]>::try_from(t).unwrap();
                ops::layer_norm(x.reshape([n, d]), w, None, 1e-5).flatten(0, 1)
            },
            |x| reference::norm(&x[0], &x[1], None, true, 1e-5),
        );
        check(
            "rms norm",
            &[n * d, d],
            |t| {
                let [x, w] = <[_; 2]>::try_from(t).unwrap();
                ops::rms_norm(x.reshape([n, d]), w, 1e-6).flatten(0, 1)
            },
            |x| reference::norm(&x[0], &x[1], None, false, 1e-6),
        );
    }
}

#[test]
fn activations() {
    for n in [1, 3, 37, 20_000] {
        check("gelu", &[n], |t| ops::gelu(t[0].clone()), |x| reference::gelu(&x[0]));
        check("exact gelu", &[n], |t| ops::gelu_exact(t[0].clone()), |x| reference::gelu_exact(&x[0]));
    }
    for (n, f) in [(1, 1), (5, 3), (7, 33)] {
        check(
            "swiglu",
            &[n * 2 * f],
            |t| ops::swiglu(t[0].clone().reshape([n, 2 * f])).flatten(0, 1),
            |x| reference::swiglu(&x[0], f),
        );
    }
}

#[test]
fn embedding() {
    let ids: Arc<[i32]> = vec![3, 0, 3, 6, 1, 3].into();
    let (v, d) = (7, 5);
    let expected = ids.clone();
    check(
        "embedding",
        &[v * d],
        |t| ops::embedding(t[0].clone().reshape([v, d]), ids.clone(), 2, 3).flatten(0, 2),
        |x| expected.iter().flat_map(|&id| x[0][id as usize * d..(id as usize + 1) * d].to_vec()).collect(),
    );
}

#[test]
fn dropout_is_counted() {
    for device in devices() {
        let device = device.autodiff();
        let n = 40_000;
        let x = Tensor::<1>::ones([n], &device).require_grad();
        let counter = Counter::new(3, Purpose::Dropout, 8);
        let y = ops::dropout(x.clone(), 0.25, counter);
        let kept = host(y.clone());
        let share = kept.iter().filter(|&&v| v > 0.0).count() as f64 / n as f64;
        assert!((share - 0.75).abs() < 4.0 * (0.25 * 0.75 / n as f64).sqrt(), "kept {share}");
        assert!(kept.iter().all(|&v| v == 0.0 || (v - 1.0 / 0.75).abs() < 1e-6));
        assert_eq!(kept, host(ops::dropout(x.clone(), 0.25, counter)), "the same counter gives the same mask");
        assert_ne!(kept, host(ops::dropout(x.clone(), 0.25, Counter::new(3, Purpose::Dropout, 9))));
        let grads = y.sum().backward();
        assert_eq!(kept, host(x.grad(&grads).unwrap()), "backward makes the same mask again");
    }
}

#[test]
fn a_seed_hands_the_gradient_over() {
    for device in devices() {
        let inner = device.clone();
        let device = device.autodiff();
        let tensor = |seed: u64, device: &Device| {
            Tensor::<3>::from_data(TensorData::new(values(2 * 3 * 5, seed), [2, 3, 5]), device)
        };
        let (x, upstream) = (tensor(1, &device).require_grad(), tensor(2, &inner));
        let seeded = ops::seed(ops::gelu(x.clone()), upstream.clone()).backward();
        let plain = (ops::gelu(x.clone()) * Tensor::from_inner(upstream)).sum().backward();
        assert_eq!(host(x.grad(&seeded).unwrap()), host(x.grad(&plain).unwrap()));
    }
}

/// AdamW's third step.
const HYPER: AdamWHyper = AdamWHyper {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    bias_correction1: 0.271,
    bias_correction2: 0.142_625,
    grad_scale: 0.5,
};

fn full(values: Tensor<1>) -> State {
    let mut state = State::zeros(values.dims()[0], Precision::Full, true, &values.device());
    state.set(values, 0);
    state
}

#[test]
fn adamw_follows_its_formula() {
    for device in devices() {
        for n in [1usize, 7, 20_001] {
            let (p, g, m) = (values(n, 1), values(n, 2), values(n, 3));
            let v: Vec<f32> = values(n, 4).iter().map(|v| v * v).collect();
            let t = |v: &[f32]| Tensor::<1>::from_data(TensorData::new(v.to_vec(), [n]), &device);
            let mut states = [&m, &v].map(|state| full(t(state)));
            let p2 = ops::update(Update::AdamW(HYPER), t(&p), t(&g), &mut states, 0);
            let [m2, v2] = states.map(|state| state.get(&device));
            let (mut wp, mut wm, mut wv) = (vec![], vec![], vec![]);
            for i in 0..n {
                let [p, g, m, v] = [p[i], g[i], m[i], v[i]].map(f64::from);
                let g = 0.5 * g;
                let m = 0.9 * m + 0.1 * g;
                let v = 0.95 * v + 0.05 * g * g;
                wp.push(p - 0.01 * (m / 0.271) / ((v / 0.142625).sqrt() + 1e-8) - 0.01 * 0.1 * p);
                wm.push(m);
                wv.push(v);
            }
            close("param", &host(p2), &wp);
            close("m", &host(m2), &wm);
            close("v", &host(v2), &wv);
            close(
                "sum of squares",
                &host(ops::sum_of_squares(t(&g))),
                &[g.iter().map(|&g| f64::from(g).powi(2)).sum()],
            );
        }
    }
}

/// Rows on both sides of their limit, a row of zeros in the parameter, and a vector as one row; without a change where nothing is too large.
#[test]
fn clipped_rows_follow_the_formula() {
    for device in devices() {
        for (rows, columns) in [(1usize, 1usize), (1, 40_001), (3, 7), (700, 65), (5, 0)] {
            let n = rows * columns;
            let t = |v: &[f32]| Tensor::<1>::from_data(TensorData::new(v.to_vec(), [n]), &device);
            let mut param = values(n, 1);
            param.iter_mut().take(columns).for_each(|x| *x = 0.0);
            // Every third row is too large by far, the others by nothing.
            let scaled = |(i, x): (usize, f32)| if i / columns.max(1) % 3 == 0 { x } else { x * 1e-3 };
            let grad: Vec<f32> = values(n, 2).into_iter().enumerate().map(scaled).collect();
            let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let mut want = vec![];
            for (g, p) in grad.chunks(columns.max(1)).zip(param.chunks(columns.max(1))) {
                let factor = (0.05 * norm(p).max(1e-3) / norm(g)).min(1.0);
                want.extend(g.iter().map(|&x| f64::from(x) * factor));
            }
            let got = host(ops::clip_rows(t(&grad), t(&param), rows, 0.05, 1e-3));
            close("clipped", &got, &want);
            if rows > 1 && n > 0 {
                let second: Vec<f64> = grad[columns..2 * columns].iter().map(|&x| f64::from(x)).collect();
                assert_eq!(got[columns..2 * columns], second, "left as it was");
            }
        }
    }
}

/// Every element-wise optimizer on every length, against its formula in double precision; and the composition for other devices too.
#[test]
fn updates_follow_their_formulas() {
    let sgd = SgdHyper { lr: 0.1, l2: 0.3, grad_scale: 0.5 };
    let rules = [
        Update::AdamW(HYPER),
        Update::Sgd(sgd),
        Update::Momentum(MomentumHyper { sgd, momentum: 0.9, share: 0.7, nesterov: false }),
        Update::Momentum(MomentumHyper { sgd, momentum: 0.9, share: 1.0, nesterov: true }),
        Update::Lion(LionHyper { lr: 0.01, beta1: 0.95, beta2: 0.98, weight_decay: 1.0, grad_scale: 0.5 }),
        Update::AdEmaMix(AdEmaMixHyper { adamw: HYPER, beta3: 0.999, alpha: 5.0 }),
        Update::ScheduleFree(ScheduleFreeHyper {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            bias_correction2: 0.142_625,
            share: 0.25,
            grad_scale: 0.5,
        }),
        Update::Sophia(SophiaHyper {
            lr: 0.01,
            beta1: 0.96,
            gamma: 0.4,
            weight_decay: 0.1,
            eps: 1e-15,
            grad_scale: 0.5,
        }),
    ];
    for (rule, device) in rules.iter().flat_map(|rule| devices().into_iter().map(move |device| (*rule, device))) {
        for n in [1usize, 7, 33, 16_385, 50_003] {
            let raw: Vec<Vec<f32>> = (0..rule.states() as u64).map(|i| values(n, 3 + i)).collect();
            // The last of several states is a second moment: not negative, and away from zero.
            let states: Vec<Vec<f32>> = match rule.states() {
                0 | 1 => raw,
                count => (0..count)
                    .map(
                        |i| if i == count - 1 { raw[i].iter().map(|v| v * v + 0.01).collect() } else { raw[i].clone() },
                    )
                    .collect(),
            };
            let (p, g) = (values(n, 1), values(n, 2));
            let t = |v: &[f32]| Tensor::<1>::from_data(TensorData::new(v.to_vec(), [n]), &device);
            let mut fused: Vec<State> = states.iter().map(|state| full(t(state))).collect();
            let fused_param = ops::update(rule, t(&p), t(&g), &mut fused, 0);
            let fused: Vec<Tensor<1>> = fused.iter().map(|state| state.get(&device)).collect();
            let mut composed: Vec<Tensor<1>> = states.iter().map(|state| t(state)).collect();
            let composed_param = rule.step(t(&p), t(&g), &mut composed);
            let mut wanted = vec![vec![]; 1 + states.len()];
            for i in 0..n {
                let mut s: Vec<f64> = states.iter().map(|state| f64::from(state[i])).collect();
                wanted[0].push(rule.step(f64::from(p[i]), f64::from(g[i]), &mut s));
                s.into_iter().zip(&mut wanted[1..]).for_each(|(s, wanted)| wanted.push(s));
            }
            for (i, wanted) in wanted.iter().enumerate() {
                let of = |param: &Tensor<1>, states: &[Tensor<1>]| {
                    host(if i == 0 { param.clone() } else { states[i - 1].clone() })
                };
                close(&format!("{rule:?}, {n}, fused {i}"), &of(&fused_param, &fused), wanted);
                close(&format!("{rule:?}, {n}, composed {i}"), &of(&composed_param, &composed), wanted);
            }
        }
    }
}

/// What states in fewer bits give is what their own values, decoded, give in f32, encoded again; and a second step from the stored bits is the same.
#[test]
fn compact_states_are_updated_as_their_values_say() {
    let rule = Update::AdamW(HYPER);
    for device in devices() {
        for (precision, error) in [(Precision::Bf16, 1.0 / 128.0), (Precision::Int8, 0.05)] {
            for n in [1usize, 255, 257, 16_385, 50_003] {
                let t = |v: &[f32]| Tensor::<1>::from_data(TensorData::new(v.to_vec(), [n]), &device);
                let (p, g) = (values(n, 1), values(n, 2));
                let squares: Vec<f32> = values(n, 4).iter().map(|v| v * v + 0.1).collect();
                let [mut m, mut v] = [(values(n, 3), true), (squares, false)].map(|(values, signed)| {
                    let mut state = State::zeros(n, precision, signed, &device);
                    state.set(t(&values), 9);
                    state
                });
                assert!(m.bytes() < 4 * n || n == 1);
                let (before_m, before_v) = (m.read(), v.read());
                m.restore(&before_m, &device);
                v.restore(&before_v, &device);
                assert_eq!((m.read(), v.read()), (before_m.clone(), before_v.clone()), "a restart changes nothing");
                let mut compact = [m, v];
                let mut plain = [full(t(&before_m)), full(t(&before_v))];
                let param = host(ops::update(rule, t(&p), t(&g), &mut compact, 77));
                let expected = host(ops::update(rule, t(&p), t(&g), &mut plain, 77));
                assert_eq!(param, expected, "{precision:?}, {n}");
                for (compact, plain) in compact.iter().zip(&plain) {
                    for (block, exact) in compact.read().chunks(256).zip(plain.read().chunks(256)) {
                        let scale = exact.iter().fold(0f32, |max, x| max.max(x.abs()));
                        for (x, y) in block.iter().zip(exact) {
                            let allowed = if precision == Precision::Bf16 { y.abs() } else { scale } * error;
                            assert!((x - y).abs() <= allowed, "{precision:?}, {n}: {x} {y} of {scale}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_run() {
    for device in devices() {
        let run = || {
            let device = device.clone().autodiff();
            let x = Tensor::<1>::from_data(TensorData::new(values(130 * 12, 1), [130 * 12]), &device).require_grad();
            let y = ops::gelu(x.clone());
            let w = Tensor::<2>::from_data(TensorData::new(values(11 * 12, 2), [11, 12]), &device);
            let targets = (0..130).map(|i| i % 11).collect();
            let loss = ops::linear_cross_entropy(y.reshape([130, 12]), w, targets, 0.1, 0.0, &LossConfig::default());
            let grads = loss.clone().backward();
            (host(loss), host(x.grad(&grads).unwrap()))
        };
        assert_eq!(run(), run());
    }
}
