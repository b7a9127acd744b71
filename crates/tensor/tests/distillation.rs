//! The fused head and loss of a student against its plain reference, on one rank and several.
#![allow(clippy::unwrap_used)]

mod check;
mod reference;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::{check, close, devices, host, to_f64, values};
use firebox_parallel::spawn;
use firebox_tensor::device::Backend;
use firebox_tensor::ops::collective::part;
use firebox_tensor::ops::{self, LossConfig, LossParts, SoftLoss, SoftTargets};
use reference::Teacher;

/// Width of the teacher.
const WIDE: usize = 5;

fn table(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn soft(targets: SoftTargets, alpha: f64, temperature: f64) -> SoftLoss {
    SoftLoss { targets, alpha, temperature, parts: LossParts::default() }
}

/// A teacher's hidden states and head.
fn head(n: usize, v: usize) -> [Vec<f32>; 2] {
    [values(n * WIDE, 11), values(v * WIDE, 12)]
}

fn live(n: usize, v: usize, softcap: f64, device: &Device) -> SoftTargets {
    let [hidden, weight] = head(n, v);
    SoftTargets::Head { hidden: hidden.into(), weight: table(weight, [v, WIDE], device), softcap }
}

/// The k first of a made-up order of tokens, with falling probabilities.
fn top_k(n: usize, v: usize, k: usize) -> Vec<Vec<(usize, f64)>> {
    let row = |i: usize| (0..k).map(|j| ((i * 7 + j * 3) % v, 0.5f64.powi(j as i32 + 1))).collect();
    (0..n).map(row).collect()
}

fn as_targets(rows: &[Vec<(usize, f64)>]) -> SoftTargets {
    SoftTargets::TopK {
        k: rows[0].len(),
        ids: rows.iter().flatten().map(|&(id, _)| id as u32).collect(),
        probabilities: rows.iter().flatten().map(|&(_, q)| q as f32).collect(),
    }
}

fn targets(n: usize, v: usize) -> Arc<[i32]> {
    (0..n).map(|i| if i % 3 == 1 { -100 } else { (i * 5 % v) as i32 }).collect()
}

#[test]
fn follows_its_formula() {
    let none = LossConfig::default();
    for (n, d, v) in [(1, 1, 2), (5, 3, 7), (40, 17, 65), (3, 2, 131)] {
        for (alpha, temperature, cap) in [(0.0, 1.0, 0.0), (0.5, 2.0, 0.0), (0.3, 0.7, 2.5), (1.0, 4.0, 0.0)] {
            let (targets, scale) = (targets(n, v), 0.37);
            let [hidden, weight] = head(n, v).map(|x| to_f64(&x));
            let logits = hidden.chunks(WIDE).map(|h| {
                let of_row = weight.chunks(WIDE).map(|w| h.iter().zip(w).map(|(a, b)| a * b).sum::<f64>());
                of_row.map(|x| if cap > 0.0 { cap * (x / cap).tanh() } else { x }).collect()
            });
            let rows = top_k(n, v, if v < 7 { 1 } else { 3 });
            let teachers = [Teacher::Logits(logits.collect()), Teacher::TopK(rows.clone())];
            for teacher in teachers {
                let name = if matches!(teacher, Teacher::Logits(_)) { "live" } else { "top-k" };
                check(
                    &format!("{name}: [{n}, {d}] x [{d}, {v}], alpha {alpha}, temperature {temperature}, cap {cap}"),
                    &[n * d, v * d],
                    |t| {
                        let (h, w) = (t[0].clone().reshape([n, d]), t[1].clone().reshape([v, d]));
                        let targets_of = match &teacher {
                            Teacher::Logits(_) => live(n, v, cap, &h.device().inner()),
                            Teacher::TopK(rows) => as_targets(rows),
                        };
                        let soft = soft(targets_of, alpha, temperature);
                        ops::linear_distillation(h, w, targets.clone(), scale, cap, &none, &soft, None)
                    },
                    |x| {
                        let weights = (alpha, temperature);
                        reference::linear_distillation(&x[0], &x[1], d, &targets, &teacher, scale, cap, weights)
                    },
                );
            }
        }
    }
}

/// Loss and gradients, and the parts of the loss.
fn run(device: &Device, v: usize, n: usize, soft: &SoftLoss, loss: &LossConfig) -> ([Vec<f64>; 3], [f64; 4]) {
    let d = 2;
    let device = device.clone().autodiff();
    let h = table(values(n * d, 1), [n, d], &device).require_grad();
    let w = table(values(v * d, 2), [v, d], &device).require_grad();
    let loss = ops::linear_distillation(h.clone(), w.clone(), targets(n, v), 0.01, 2.0, loss, soft, None);
    let grads = loss.clone().backward();
    ([host(loss), host(h.grad(&grads).unwrap()), host(w.grad(&grads).unwrap())], soft.parts.take())
}

#[test]
fn with_all_weight_on_the_targets_it_is_the_cross_entropy() {
    let config = LossConfig { label_smoothing: 0.1, z_loss: 1e-2 };
    for device in devices() {
        let (n, v, d) = (9, 33, 2);
        let (got, parts) = run(&device, v, n, &soft(live(n, v, 0.0, &device), 1.0, 3.0), &config);
        let autodiff = device.clone().autodiff();
        let h = table(values(n * d, 1), [n, d], &autodiff).require_grad();
        let w = table(values(v * d, 2), [v, d], &autodiff).require_grad();
        let loss = ops::linear_cross_entropy(h.clone(), w.clone(), targets(n, v), 0.01, 2.0, &config);
        let grads = loss.clone().backward();
        close("loss", &got[0], &host(loss));
        close("hidden", &got[1], &host(h.grad(&grads).unwrap()));
        close("weight", &got[2], &host(w.grad(&grads).unwrap()));
        close("part", &[parts[LossParts::HARD]], &got[0]);
        assert!(parts[LossParts::SOFT] > 0.0);
    }
}

/// A teacher that predicts what the student does has nothing to teach.
#[test]
fn the_student_as_its_own_teacher() {
    let (n, v, d) = (9, 33, 2);
    for device in devices() {
        let weight = table(values(v * d, 2), [v, d], &device);
        let targets = SoftTargets::Head { hidden: values(n * d, 1).into(), weight, softcap: 2.0 };
        let (got, parts) = run(&device, v, n, &soft(targets, 0.0, 2.0), &LossConfig::default());
        assert!(got.iter().flatten().all(|x| x.abs() < 1e-7), "{got:?}");
        assert!(parts[LossParts::SOFT].abs() < 1e-7 && parts[LossParts::HARD] > 0.0);
    }
}

#[test]
fn chunks_of_rows_add_up() {
    // So large a vocabulary that 70 rows take two chunks.
    let (n, v) = (70, 262_147);
    for device in devices() {
        let teacher = soft(live(n, v, 0.0, &device), 0.5, 2.0);
        let ([loss, dh, _], _) = run(&device, v, n, &teacher, &LossConfig::default());
        let [hidden, weight] = head(n, v);
        let (d, mut sum) = (2, 0.0);
        for at in 0..n {
            let targets_of = SoftTargets::Head {
                hidden: hidden[at * WIDE..(at + 1) * WIDE].into(),
                weight: table(weight.clone(), [v, WIDE], &device),
                softcap: 0.0,
            };
            if at % 23 > 0 {
                continue;
            }
            let one = soft(targets_of, 0.5, 2.0);
            let autodiff = device.clone().autodiff();
            let h = table(values(n * d, 1)[at * d..(at + 1) * d].to_vec(), [1, d], &autodiff).require_grad();
            let w = table(values(v * d, 2), [v, d], &autodiff);
            let target = vec![targets(n, v)[at]].into();
            let loss = ops::linear_distillation(h.clone(), w, target, 0.01, 2.0, &LossConfig::default(), &one, None);
            let grads = loss.clone().backward();
            close("hidden", &dh[at * d..(at + 1) * d], &host(h.grad(&grads).unwrap()));
            sum += host(loss)[0];
        }
        assert!(sum > 0.0 && loss[0] > sum);
    }
}

#[test]
fn a_divided_vocabulary_gives_the_loss_of_the_whole() {
    let (n, v, d) = (11, 37, 3);
    let config = LossConfig { label_smoothing: 0.1, z_loss: 1e-2 };
    for known in [None, Some(4)] {
        let teacher = move |device: &Device| match known {
            None => live(n, v, 3.0, device),
            Some(k) => as_targets(&top_k(n, v, k)),
        };
        let (h, w) = (values(n * d, 1), values(v * d, 2));
        let device = Backend::NdArray.device().unwrap();
        let autodiff = device.clone().autodiff();
        let whole = {
            let h = table(h.clone(), [n, d], &autodiff).require_grad();
            let w = table(w.clone(), [v, d], &autodiff).require_grad();
            let soft = soft(teacher(&device), 0.4, 2.0);
            let loss = ops::linear_distillation(h.clone(), w.clone(), targets(n, v), 0.2, 1.5, &config, &soft, None);
            let grads = loss.clone().backward();
            [host(loss), host(h.grad(&grads).unwrap()), host(w.grad(&grads).unwrap())]
        };
        let parts = spawn(3, move |comm| {
            let device = Backend::NdArray.device().unwrap();
            let autodiff = device.clone().autodiff();
            let mine = part(v, comm.rank(), comm.size());
            let h = table(h.clone(), [n, d], &autodiff).require_grad();
            let w = table(w[mine.start * d..mine.end * d].to_vec(), [mine.len(), d], &autodiff).require_grad();
            let soft = soft(teacher(&device), 0.4, 2.0);
            let group = Some((v, &comm));
            let loss = ops::linear_distillation(h.clone(), w.clone(), targets(n, v), 0.2, 1.5, &config, &soft, group);
            let grads = loss.clone().backward();
            Ok::<_, std::convert::Infallible>([
                host(loss),
                host(h.grad(&grads).unwrap()),
                host(w.grad(&grads).unwrap()),
            ])
        })
        .unwrap();
        for part in &parts {
            close("loss", &part[0], &whole[0]);
        }
        let hidden: Vec<f64> = (0..n * d).map(|i| parts.iter().map(|part| part[1][i]).sum()).collect();
        close("hidden", &hidden, &whole[1]);
        close("weight", &parts.iter().flat_map(|part| part[2].clone()).collect::<Vec<_>>(), &whole[2]);
    }
}

#[test]
fn a_non_finite_logit_reaches_the_loss() {
    for device in devices() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for of_teacher in [false, true] {
                let hidden = if of_teacher { vec![bad; WIDE] } else { values(WIDE, 3) };
                let weight = table(values(3 * WIDE, 4), [3, WIDE], &device);
                let targets = SoftTargets::Head { hidden: hidden.into(), weight, softcap: 0.0 };
                let h = table(vec![if of_teacher { 1.0 } else { bad }, 1.0], [1, 2], &device);
                let w = table(vec![1.0, 0.5, 0.5, 1.0, 0.1, 0.2], [3, 2], &device);
                let soft = soft(targets, 0.5, 1.0);
                let none = LossConfig::default();
                let loss = ops::linear_distillation(h, w, vec![1].into(), 0.5, 0.0, &none, &soft, None);
                assert!(!host(loss)[0].is_finite(), "{bad}");
            }
        }
    }
}
