//! Hints from a teacher's hidden states and attention relations: identities whose backward adds the gradient of a loss.
#![allow(clippy::unwrap_used)]

mod check;

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use check::{close, devices, host, to_f64, values};
use firebox_tensor::ops::{self, HintLoss, LossParts, Relations, Sequence};

/// Compares the gradient that a hint adds to one from above, and its loss, with a formula in f64 and its central differences.
fn compare(
    what: &str,
    lengths: &[usize],
    part: usize,
    weight: f64,
    hint: impl Fn(&[Tensor<1>], LossParts) -> Tensor<1>,
    plain: impl Fn(&[Vec<f64>]) -> f64,
) {
    let inputs: Vec<Vec<f32>> = lengths.iter().enumerate().map(|(i, &n)| values(n, i as u64 + 1)).collect();
    let exact: Vec<Vec<f64>> = inputs.iter().map(|x| to_f64(x)).collect();
    for device in devices() {
        let make =
            |x: &Vec<f32>| Tensor::<1>::from_data(TensorData::new(x.clone(), [x.len()]), &device.clone().autodiff());
        let tensors: Vec<Tensor<1>> = inputs.iter().map(|x| make(x).require_grad()).collect();
        let parts = LossParts::default();
        let y = hint(&tensors, parts.clone());
        close(&format!("{what}: output"), &host(y.clone()), &exact[0]);
        let grads = (y * 0.5).sum().backward();
        close(&format!("{what}: loss"), &[parts.take()[part]], &[plain(&exact)]);
        for (k, tensor) in tensors.iter().enumerate() {
            let got = host(tensor.grad(&grads).unwrap());
            let slope = |i: usize| {
                let moved = |by: f64| {
                    let mut moved = exact.clone();
                    moved[k][i] += by;
                    plain(&moved)
                };
                weight * (moved(1e-4) - moved(-1e-4)) / 2e-4 + if k == 0 { 0.5 } else { 0.0 }
            };
            let want: Vec<f64> = (0..got.len()).map(slope).collect();
            close(&format!("{what}: gradient {k}"), &got, &want);
        }
    }
}

fn targets(n: usize) -> Arc<[i32]> {
    (0..n).map(|i| if i % 4 == 2 { -1 } else { 1 }).collect()
}

#[test]
fn hidden_states() {
    for (b, t, d, width) in [(1, 1, 2, 2), (2, 5, 3, 7), (1, 9, 17, 5), (2, 3, 4, 0)] {
        let (n, projected) = (b * t, width > 0);
        let width = if projected { width } else { d };
        let teacher = values(n * width, 9);
        let (scale, weight) = (0.3, 2.5);
        let lengths: &[usize] = if projected { &[n * d, d * width] } else { &[n * d] };
        compare(
            &format!("[{b}, {t}, {d}] to {width}"),
            lengths,
            LossParts::HIDDEN,
            weight,
            |x, parts| {
                let projection = projected.then(|| x[1].clone().reshape([d, width]));
                let loss = HintLoss { targets: targets(n), scale, weight, parts };
                let teacher = teacher.clone().into();
                ops::hidden_hint(x[0].clone().reshape([b, t, d]), projection, teacher, loss).reshape([n * d])
            },
            |x| {
                let mut sum = 0.0;
                for i in (0..n).filter(|i| targets(n)[*i] >= 0) {
                    for j in 0..width {
                        let y = match projected {
                            true => (0..d).map(|k| x[0][i * d + k] * x[1][k * width + j]).sum(),
                            false => x[0][i * d + j],
                        };
                        sum += (y - f64::from(teacher[i * width + j])).powi(2) / width as f64;
                    }
                }
                sum * scale
            },
        );
    }
}

#[test]
fn attention_relations() {
    // Rows, tokens, heads, widths of the student and of the teacher.
    for (b, t, heads, mine, theirs) in
        [(1, 3, 1, [2, 2], [3, 3]), (2, 6, 2, [8, 4], [12, 6]), (1, 17, 3, [3, 3], [6, 3])]
    {
        let n = b * t;
        let [width, their_width] = [mine, theirs].map(|[q, k]| q + 2 * k);
        let teacher = values(n * their_width, 9);
        // The second half of each row is another document.
        let segments: Vec<i32> = (0..n).map(|i| i32::from(i % t >= t / 2)).collect();
        let positions = (0..n).map(|i| (i % t) as i32).collect();
        let sequence = Sequence::new(b, t, positions, &segments);
        let (scale, weight) = (0.3, 2.5);
        let exact = to_f64(&teacher);
        compare(
            &format!("{b} rows of {t}, {heads} heads of {mine:?} and {theirs:?}"),
            &[n * width],
            LossParts::RELATIONS,
            weight,
            |x, parts| {
                let relations = Relations { teacher: teacher.clone().into(), widths: theirs, heads };
                let loss = HintLoss { targets: targets(n), scale, weight, parts };
                ops::relation_hint(x[0].clone().reshape([b, t, width]), mine, &sequence, relations, loss)
                    .reshape([n * width])
            },
            |x| {
                let probabilities = |x: &[f64], [q, k]: [usize; 2], kind: usize, head: usize, i: usize| -> Vec<f64> {
                    let (all, w) = (q + 2 * k, [q, k, k][kind] / heads);
                    let at = |i: usize| &x[i * all + [0, q, q + k][kind] + head * w..][..w];
                    let first = if i % t >= t / 2 { i - i % t + t / 2 } else { i - i % t };
                    let scores: Vec<f64> = (first..=i)
                        .map(|j| at(i).iter().zip(at(j)).map(|(a, b)| a * b).sum::<f64>() / (w as f64).sqrt())
                        .collect();
                    let sum: f64 = scores.iter().map(|score| score.exp()).sum();
                    scores.into_iter().map(|score| score.exp() / sum).collect()
                };
                let mut sum = 0.0;
                for i in (0..n).filter(|i| targets(n)[*i] >= 0) {
                    for (kind, head) in (0..3).flat_map(|kind| (0..heads).map(move |head| (kind, head))) {
                        let p = probabilities(&x[0], mine, kind, head, i);
                        let q = probabilities(&exact, theirs, kind, head, i);
                        sum += p.iter().zip(&q).map(|(p, q)| q * (q / p).ln()).sum::<f64>() / heads as f64;
                    }
                }
                sum * scale
            },
        );
    }
}
