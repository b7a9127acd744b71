//! Routing, the products of experts and their sum, against plain formulas in double precision and finite differences of them.
#![allow(clippy::unwrap_used)]

mod check;

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use check::{check, close, devices, host, to_f64, values};
use firebox_parallel::{WorldError, spawn};
use firebox_tensor::ops::collective::part;
use firebox_tensor::ops::experts::{Exchange, Group, Routing, combine, dispatch, grouped_linear, router_weights};
use firebox_tensor::ops::{Compute, defer_weights, with_compute};

fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|x| x / sum).collect()
}

fn weights(logits: &[f64], n: usize, routing: &Routing, k: usize) -> Vec<f64> {
    let of_token = |(logits, chosen): (&[f64], &[u32])| {
        let p = softmax(logits);
        let p: Vec<f64> = chosen.iter().map(|&e| p[e as usize]).collect();
        let sum = if k == 1 { 1.0 } else { p.iter().sum() };
        p.into_iter().map(move |p| p / sum).collect::<Vec<_>>()
    };
    logits.chunks(n).zip(routing.chosen().chunks(k)).flat_map(of_token).collect()
}

/// N, n, k: tokens, experts, experts per token.
const SIZES: [[usize; 3]; 5] = [[1, 2, 1], [13, 5, 2], [9, 4, 4], [70, 9, 3], [3, 17, 1]];

#[test]
fn the_best_are_chosen_and_sorted_by_expert() {
    for [tokens, n, k] in SIZES {
        let logits = values(tokens * n, 3);
        let routing = Routing::new(&logits, None, n, k, None);
        for (t, chosen) in routing.chosen().chunks(k).enumerate() {
            let logits = &logits[t * n..][..n];
            let mut sorted: Vec<usize> = (0..n).collect();
            sorted.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            assert!(chosen.iter().zip(&sorted).all(|(a, b)| *a as usize == *b));
        }
        assert_eq!(routing.load().iter().sum::<u32>() as usize, tokens * k);
        assert!(routing.groups().iter().zip(routing.load()).all(|(group, load)| group.rows == *load as usize));
    }
    // Equal ones in their order; a bias lifts the last one.
    let chosen = |bias: Option<&[f32]>| Routing::new(&[1.0; 4], bias, 4, 2, None).chosen().to_vec();
    assert_eq!(chosen(None), [0, 1]);
    assert_eq!(chosen(Some(&[0.0, 0.0, 0.1, 0.5])), [3, 2]);
}

#[test]
fn an_expert_takes_as_many_as_fit_first_choices_first() {
    // All want expert 0; the second token as its second choice.
    let logits = [3.0, 1.0, 0.0, 1.0, 3.0, 0.0, 3.0, 0.0, 1.0];
    let routing = Routing::new(&logits, None, 3, 2, Some(2));
    assert_eq!(routing.load(), [3, 2, 1]);
    assert_eq!(routing.groups().iter().map(|group| group.rows).collect::<Vec<_>>(), [2, 2, 1]);
    for device in devices() {
        let x = Tensor::<2>::from_data([[1.0], [10.0], [100.0]], &device);
        let rows = dispatch(x, &routing);
        // Expert 0: the first and third token; expert 1: first choice of the second, second of the first; expert 2: the third.
        assert_eq!(host(rows.clone()), [1.0, 100.0, 10.0, 1.0, 100.0]);
        let y = combine(rows, Tensor::ones([3, 2], &device), None, &routing);
        assert_eq!(host(y), [2.0, 10.0, 200.0], "the second token lost its second choice");
    }
}

#[test]
fn weights_and_the_balancing_loss() {
    for [tokens, n, k] in SIZES {
        let logits = values(tokens * n, 1);
        let routing = Routing::new(&logits, None, n, k, None);
        let r = routing.clone();
        check(
            "router weights",
            &[tokens * n],
            |t| router_weights(t[0].clone().reshape([tokens, n]), &r, 0.0).flatten(0, 1),
            |x| weights(&x[0], n, &r, k),
        );
        // What is added to the gradient is that of the balancing loss.
        let loss = |logits: &[f64]| -> f64 {
            let mut mean = vec![0.0; n];
            for row in logits.chunks(n) {
                mean.iter_mut().zip(softmax(row)).for_each(|(mean, p)| *mean += p / tokens as f64);
            }
            let share = routing.load().iter().map(|&load| f64::from(load) / tokens as f64);
            n as f64 * mean.iter().zip(share).map(|(p, f)| p * f).sum::<f64>()
        };
        for device in devices().into_iter().map(|device| device.autodiff()) {
            let x = Tensor::<2>::from_data(TensorData::new(logits.clone(), [tokens, n]), &device).require_grad();
            let grads = (router_weights(x.clone(), &routing, 0.3) * 0.0).sum().backward();
            let exact = to_f64(&logits);
            let slopes: Vec<f64> = (0..logits.len())
                .map(|i| {
                    let at = |step: f64| {
                        let mut moved = exact.clone();
                        moved[i] += step;
                        loss(&moved)
                    };
                    0.3 * (at(1e-4) - at(-1e-4)) / 2e-4
                })
                .collect();
            close("balancing loss", &host(x.grad(&grads).unwrap()), &slopes);
        }
    }
}

#[test]
fn a_token_is_the_weighted_sum_of_its_rows() {
    for ([tokens, n, k], d, capacity) in [([1, 2, 1], 3, None), ([13, 5, 2], 7, None), ([40, 4, 3], 33, Some(11))] {
        let routing = Routing::new(&values(tokens * n, 5), None, n, k, capacity);
        let rows = routing.groups().iter().map(|group| group.rows).sum::<usize>();
        assert_eq!(rows < tokens * k, capacity.is_some());
        // Rows by expert, then as the choices stand.
        let place = |t: usize, j: usize| {
            let device = devices().remove(0);
            let mark: Vec<f32> = (0..tokens).map(|i| if i == t { 1.0 } else { 0.0 }).collect();
            let marked = host(dispatch(Tensor::from_data(TensorData::new(mark, [tokens, 1]), &device), &routing));
            let expert = routing.chosen()[t * k + j] as usize;
            let first: usize = routing.groups()[..expert].iter().map(|group| group.rows).sum();
            (first..first + routing.groups()[expert].rows).find(|&row| marked[row] == 1.0)
        };
        let places: Vec<Option<usize>> = (0..tokens * k).map(|c| place(c / k, c % k)).collect();
        let sum = |y: &[f64], w: &[f64], residual: Option<&[f64]>| -> Vec<f64> {
            let mut out = residual.map_or(vec![0.0; tokens * d], <[f64]>::to_vec);
            for (c, row) in places.iter().enumerate() {
                if let Some(row) = row {
                    (0..d).for_each(|i| out[c / k * d + i] += w[c] * y[row * d + i]);
                }
            }
            out
        };
        check(
            "combine with a residual",
            &[rows * d, tokens * k, tokens * d],
            |t| {
                let [y, w, residual] = <[_; 3]>::try_from(t).unwrap();
                let residual = Some(residual.reshape([tokens, d]));
                combine(y.reshape([rows, d]), w.reshape([tokens, k]), residual, &routing).flatten(0, 1)
            },
            |x| sum(&x[0], &x[1], Some(&x[2])),
        );
        check(
            "combine",
            &[rows * d, tokens * k],
            |t| {
                let [y, w] = <[_; 2]>::try_from(t).unwrap();
                combine(y.reshape([rows, d]), w.reshape([tokens, k]), None, &routing).flatten(0, 1)
            },
            |x| sum(&x[0], &x[1], None),
        );
    }
}

/// Some experts have no rows, some several groups.
fn groups(of: &[(usize, usize)]) -> Arc<[Group]> {
    of.iter().map(|&(expert, rows)| Group { expert, rows }).collect()
}

#[test]
fn each_group_is_multiplied_by_its_expert() {
    for (experts, i, o, of) in [
        (1, 1, 1, &[(0, 3)][..]),
        (3, 5, 7, &[(0, 2), (1, 0), (2, 4)]),
        (4, 33, 17, &[(0, 9), (2, 70), (0, 5), (2, 1), (3, 0)]),
    ] {
        let groups = groups(of);
        let rows: usize = groups.iter().map(|group| group.rows).sum();
        let expert: Vec<usize> = groups.iter().flat_map(|group| vec![group.expert; group.rows]).collect();
        for gated in [false, true] {
            let width = if gated { 2 * i } else { i };
            let plain = |x: &[f64], w: &[f64]| -> Vec<f64> {
                let mut y = vec![];
                for (row, &expert) in x.chunks(width).zip(&expert) {
                    let a: Vec<f64> = match gated {
                        false => row.to_vec(),
                        true => (0..i).map(|k| row[k] / (1.0 + (-row[k]).exp()) * row[i + k]).collect(),
                    };
                    y.extend((0..o).map(|j| (0..i).map(|k| a[k] * w[(expert * i + k) * o + j]).sum::<f64>()));
                }
                y
            };
            check(
                if gated { "gated grouped linear" } else { "grouped linear" },
                &[rows * width, experts * i * o],
                |t| {
                    let [x, w] = <[_; 2]>::try_from(t).unwrap();
                    let (x, w) = (x.reshape([rows, width]), w.reshape([experts, i, o]));
                    grouped_linear(x, gated, w, &groups).flatten(0, 1)
                },
                |x| plain(&x[0], &x[1]),
            );
        }
    }
}

#[test]
fn weights_gradients_can_wait_and_products_be_in_16_bits() {
    let groups = groups(&[(1, 4), (0, 3)]);
    for device in devices().into_iter().map(|device| device.autodiff()) {
        let make = |n: usize, seed| Tensor::<1>::from_data(TensorData::new(values(n, seed), [n]), &device);
        let run = |compute: Compute, deferred: bool| {
            let (x, w) = (make(7 * 10, 1).reshape([7, 10]), make(2 * 5 * 6, 2).reshape([2, 5, 6]).require_grad());
            let y = with_compute(compute, || grouped_linear(x, true, w.clone(), &groups));
            if !deferred {
                return host(w.grad(&y.sum().backward()).unwrap());
            }
            let (grads, mut later) = defer_weights(|| y.sum().backward());
            assert!(w.grad(&grads).is_none());
            host(later.compute(w).unwrap())
        };
        let full = run(Compute::F32, false);
        assert_eq!(run(Compute::F32, true), full);
        let half = run(Compute::Bf16, false);
        let size = full.iter().fold(0f64, |most, x| most.max(x.abs()));
        let worst = full.iter().zip(&half).fold(0f64, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst > 0.0 && worst < 0.02 * size, "{worst} of {size}");
    }
}

/// Ranks with their own tokens and other experts: together what one rank makes of its tokens with all experts.
#[test]
fn rows_travel_to_their_experts_and_back() {
    const RANKS: usize = 3;
    let (tokens, n, k, d) = (9, 5, 2, 4);
    let world: Result<_, WorldError<String>> = spawn(RANKS, move |comm| {
        let device = devices().remove(0).autodiff();
        let own = 10 + comm.rank() as u64;
        // The second rank's tokens all go to one expert.
        let logits = match comm.rank() {
            1 => [[5.0, 4.0, 1.0, 0.0, 0.0]; 9].concat(),
            _ => values(tokens * n, own),
        };
        let routing = Routing::new(&logits, None, n, k, None);
        let input = |seed| Tensor::<2>::from_data(TensorData::new(values(tokens * d, seed), [tokens, d]), &device);
        let weights = Tensor::<3>::from_data(TensorData::new(values(n * d * d, 3), [n, d, d]), &device).require_grad();
        let upstream = Tensor::<2>::from_data(TensorData::new(values(tokens * k * d, own), [tokens * k, d]), &device);
        let run = |divided: bool| {
            let x = input(own).require_grad();
            let rows = dispatch(x.clone(), &routing);
            let y = if divided {
                let mine = part(n, comm.rank(), RANKS);
                let exchange = Exchange::new(&routing, &comm);
                let y = grouped_linear(
                    exchange.there(rows),
                    false,
                    weights.clone().narrow(0, mine.start, mine.len()),
                    exchange.groups(),
                );
                exchange.back(y)
            } else {
                grouped_linear(rows, false, weights.clone(), routing.groups())
            };
            let grads = (y.clone() * upstream.clone()).sum().backward();
            let dw = host(weights.grad(&grads).unwrap());
            (host(y), host(x.grad(&grads).unwrap()), dw)
        };
        Ok((run(true), run(false)))
    });
    let world = world.unwrap();
    let sum = |of: fn(&(Run, Run)) -> &Run| -> Vec<f64> {
        (0..n * d * d).map(|i| world.iter().map(|both| of(both).2[i]).sum()).collect()
    };
    for ((y, dx, _), (want, want_dx, _)) in &world {
        close("rows", y, want);
        close("gradients of tokens", dx, want_dx);
    }
    // Each expert's gradient is complete where it is.
    close("gradients of experts", &sum(|both| &both.0), &sum(|both| &both.1));
}

/// Rows, gradient of the tokens, gradient of the experts.
type Run = (Vec<f64>, Vec<f64>, Vec<f64>);
