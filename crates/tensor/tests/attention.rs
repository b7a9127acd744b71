//! Fused attention against its plain reference around every block border, and the same bits on any number of threads.
#![allow(clippy::unwrap_used)]

mod check;
mod reference;

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use check::{check, devices, host, values};
use firebox_tensor::ops::{self, AttentionConfig, RopeTable, Sequence};

/// Positions and segments of each row, by the lengths of its segments.
fn layout(tokens: usize, rows: &[&[usize]]) -> (Vec<i32>, Vec<i32>) {
    let (mut positions, mut segments) = (vec![], vec![]);
    for row in rows {
        assert_eq!(row.iter().sum::<usize>(), tokens);
        for (s, &n) in row.iter().enumerate() {
            positions.extend(0..n as i32);
            segments.extend(std::iter::repeat_n(s as i32, n));
        }
    }
    (positions, segments)
}

/// T, H, K, E, lengths of the segments of each row, rotary positions.
type Case = (usize, usize, usize, usize, &'static [&'static [usize]], bool);

fn run(case: &Case) {
    run_with(case, None, 0.0, false);
}

fn run_with(
    &(tokens, heads, kv_heads, head_dim, rows, rotary): &Case,
    window: Option<usize>,
    softcap: f64,
    bidirectional: bool,
) {
    let (positions, segments) = layout(tokens, rows);
    let make = if bidirectional { Sequence::bidirectional } else { Sequence::new };
    let sequence = make(rows.len(), tokens, positions.clone(), &segments);
    let theta = rotary.then_some(100.0);
    let config = AttentionConfig {
        n_heads: heads,
        n_kv_heads: kv_heads,
        head_dim,
        window,
        softcap,
        rope: theta.map(|theta| Arc::new(RopeTable::new(theta, head_dim, tokens))),
    };
    let width = config.qkv_width();
    let plain = reference::Attention {
        tokens,
        heads,
        kv_heads,
        head_dim,
        positions: &positions,
        segments: &segments,
        window: window.unwrap_or(usize::MAX),
        softcap,
        theta,
        bidirectional,
    };
    check(
        &format!(
            "attention T {tokens} H {heads} K {kv_heads} E {head_dim} {rows:?} window {window:?} cap {softcap} bidirectional {bidirectional}"
        ),
        &[rows.len() * tokens * width],
        |t| ops::attention(t[0].clone().reshape([rows.len(), tokens, width]), &config, &sequence).flatten(0, 2),
        |x| plain.forward(&x[0]),
    );
}

#[test]
fn small_shapes() {
    let cases: &[Case] = &[
        (1, 1, 1, 2, &[&[1]], true),
        (1, 1, 1, 1, &[&[1]], false),
        (5, 1, 1, 3, &[&[5], &[5]], false),
        (7, 4, 2, 6, &[&[3, 4], &[1, 1, 5]], true),
        (9, 3, 1, 4, &[&[9]], true),
        (12, 4, 1, 33, &[&[12]], false),
        (11, 2, 2, 70, &[&[11], &[1, 10]], true),
    ];
    cases.iter().for_each(run);
}

#[test]
fn block_borders() {
    let cases: &[Case] = &[
        (63, 1, 1, 3, &[&[63]], false),
        (64, 4, 1, 2, &[&[64]], true),
        (65, 3, 3, 5, &[&[65], &[30, 35]], false),
        (127, 2, 1, 8, &[&[64, 63]], true),
        (129, 2, 2, 4, &[&[129], &[1, 128]], true),
        (130, 1, 1, 2, &[&[1, 128, 1]], true),
        (257, 1, 1, 2, &[&[257]], false),
        (300, 2, 1, 2, &[&[300], &[200, 60, 40]], true),
        (520, 1, 1, 2, &[&[270, 250]], true),
    ];
    cases.iter().for_each(run);
}

#[test]
fn windows() {
    let cases: &[(Case, usize)] = &[
        ((1, 1, 1, 2, &[&[1]], false), 1),
        ((70, 2, 1, 3, &[&[70]], false), 1),
        ((70, 2, 1, 3, &[&[70], &[40, 30]], false), 7),
        ((65, 3, 1, 4, &[&[65]], true), 64),
        ((9, 1, 1, 2, &[&[9]], true), 100),
        ((129, 2, 2, 4, &[&[129], &[100, 29]], true), 33),
        ((300, 1, 1, 2, &[&[300]], false), 20),
        ((530, 1, 1, 2, &[&[530]], true), 200),
    ];
    for (case, window) in cases {
        run_with(case, Some(*window), 0.0, false);
    }
}

/// Scores are of size 1 and, in wide heads, larger: the small caps are nearly reached, the large ones hardly bend.
#[test]
fn soft_caps() {
    let cases: &[(Case, Option<usize>, f64)] = &[
        ((1, 1, 1, 2, &[&[1]], false), None, 1.0),
        ((7, 4, 2, 6, &[&[3, 4], &[1, 1, 5]], true), None, 0.5),
        ((12, 4, 1, 33, &[&[12]], false), None, 3.0),
        ((65, 3, 3, 5, &[&[65], &[30, 35]], false), Some(9), 0.7),
        ((129, 2, 2, 4, &[&[129], &[1, 128]], true), None, 50.0),
        ((300, 2, 1, 2, &[&[300], &[200, 60, 40]], true), Some(270), 2.0),
    ];
    for (case, window, softcap) in cases {
        run_with(case, *window, *softcap, false);
    }
}

#[test]
fn both_directions() {
    let cases: &[Case] = &[
        (1, 1, 1, 2, &[&[1]], true),
        (5, 1, 1, 3, &[&[5], &[1, 4]], false),
        (7, 4, 2, 6, &[&[3, 4], &[1, 1, 5]], true),
        (12, 4, 1, 33, &[&[12]], false),
        (64, 4, 1, 2, &[&[64]], true),
        (65, 3, 3, 5, &[&[65], &[30, 35]], false),
        (130, 1, 1, 2, &[&[1, 128, 1], &[130]], true),
        (257, 1, 1, 2, &[&[257]], false),
        (300, 2, 1, 2, &[&[300], &[200, 60, 40]], true),
        (520, 1, 1, 2, &[&[270, 250]], true),
        (590, 1, 1, 1, &[&[10, 300, 280]], false),
    ];
    cases.iter().for_each(|case| run_with(case, None, 0.0, true));
    run_with(&(65, 2, 1, 4, &[&[30, 35]], true), None, 0.7, true);
}

/// Padding changes nothing of what stands before it.
#[test]
fn padding_is_not_seen() {
    let config = AttentionConfig { n_heads: 2, n_kv_heads: 2, head_dim: 3, window: None, softcap: 0.0, rope: None };
    let width = config.qkv_width();
    for device in devices() {
        let x = Tensor::<3>::from_data(TensorData::new(values(2 * 9 * width, 1), [2, 9, width]), &device);
        let padded = ops::attention(x.clone(), &config, &Sequence::padded(9, &[4, 9]));
        let short = ops::attention(x.slice([0..1, 0..4]), &config, &Sequence::padded(4, &[4]));
        let (padded, short) = (host(padded.slice([0..1, 0..4])), host(short));
        assert!(padded.iter().zip(&short).all(|(a, b)| (a - b).abs() < 1e-6), "{padded:?} {short:?}");
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    for device in devices() {
        for (batch, tokens, heads, kv_heads) in [(2, 65, 2, 1), (1, 300, 4, 2), (1, 150, 1, 1)] {
            let run = |threads: usize| {
                let device = device.clone().autodiff();
                let config = AttentionConfig {
                    n_heads: heads,
                    n_kv_heads: kv_heads,
                    head_dim: 6,
                    window: None,
                    softcap: 1.5,
                    rope: None,
                };
                let n = batch * tokens * config.qkv_width();
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                    let x = Tensor::<1>::from_data(TensorData::new(values(n, 1), [n]), &device).require_grad();
                    let rows = x.clone().reshape([batch, tokens, config.qkv_width()]);
                    let y = ops::attention(rows, &config, &Sequence::plain(batch, tokens));
                    let u = values(batch * tokens * heads * 6, 2);
                    let u = Tensor::from_data(TensorData::new(u, [batch, tokens, heads * 6]), &device);
                    let grads = (y.clone() * u).sum().backward();
                    (host(y), host(x.grad(&grads).unwrap()))
                })
            };
            let one = run(1);
            assert_eq!(one, run(2));
            assert_eq!(one, run(5));
        }
    }
}
