//! Attention over rows that ranks have divided: what one rank gives, on odd shapes, with documents, windows and grouped heads.
#![allow(clippy::unwrap_used)]

mod check;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::values;
use firebox_parallel::{Communicator, spawn};
use firebox_tensor::ops::{
    self, AttentionConfig, RopeTable, Sequence, dropout, dropout_of, heads_of_rank, ring_attention, ulysses_attention,
    zigzag, zigzag_part,
};
use firebox_tensor::random::{Counter, Purpose};

type Form = fn(Tensor<3>, &AttentionConfig, &Sequence, &Communicator) -> Tensor<3>;

/// T, H, K, E, the first tokens of the segments of each row.
type Case = (usize, usize, usize, usize, &'static [&'static [usize]]);

fn sequence(&(tokens, _, _, _, rows): &Case) -> Sequence {
    let (mut positions, mut segments) = (vec![], vec![]);
    for starts in rows {
        for i in 0..tokens {
            let segment = starts.iter().rposition(|&start| start <= i).unwrap();
            segments.push(segment as i32);
            positions.push((i - starts[segment]) as i32);
        }
    }
    Sequence::new(rows.len(), tokens, positions, &segments)
}

fn config(&(tokens, heads, kv_heads, head_dim, _): &Case, window: Option<usize>, softcap: f64) -> AttentionConfig {
    let rope = head_dim.is_multiple_of(2).then(|| Arc::new(RopeTable::new(100.0, head_dim, tokens)));
    AttentionConfig { n_heads: heads, n_kv_heads: kv_heads, head_dim, window, softcap, rope }
}

/// The output for `x` and the gradient of `x` for the upstream gradient `u`.
fn run(
    x: Vec<f32>,
    u: Vec<f32>,
    sequence: &Sequence,
    device: &Device,
    op: impl FnOnce(Tensor<3>) -> Tensor<3>,
) -> [Vec<f32>; 2] {
    let device = device.clone().autodiff();
    let [b, t] = [sequence.batch(), sequence.tokens()];
    let tensor = |x: Vec<f32>| {
        let shape = [b, t, x.len() / (b * t)];
        Tensor::<3>::from_data(TensorData::new(x, shape), &device)
    };
    let x = tensor(x).require_grad();
    let y = op(x.clone());
    let grads = (y.clone() * tensor(u)).sum().backward();
    [y.inner(), x.grad(&grads).unwrap()].map(|t| t.into_data().try_to_vec().unwrap())
}

/// The rows of `d` values of a rank's tokens.
fn of_rank(all: &[f32], sequence: &Sequence, rank: usize, ranks: usize) -> Vec<f32> {
    let d = all.len() / (sequence.batch() * sequence.tokens());
    let mine = sequence.part(rank, ranks);
    let runs = mine.runs(0..mine.batch() * mine.tokens());
    runs.into_iter().flat_map(|run| &all[run.start * d..run.end * d]).copied().collect()
}

#[track_caller]
fn check_form(what: &str, form: Form, ranks: usize, case: Case, window: Option<usize>, softcap: f64) {
    for device in check::devices() {
        let (sequence, config) = (sequence(&case), config(&case, window, softcap));
        let n = sequence.batch() * sequence.tokens();
        let x = values(n * config.qkv_width(), 1);
        let u = values(n * config.n_heads * config.head_dim, 2);
        let one = run(x.clone(), u.clone(), &sequence, &device, |x| ops::attention(x, &config, &sequence));
        let (whole, backend) = (sequence.clone(), device.clone());
        let parts = spawn(ranks, move |comm| {
            let mine = |all: &[f32]| of_rank(all, &whole, comm.rank(), ranks);
            let part = whole.part(comm.rank(), ranks);
            Ok::<_, String>(run(mine(&x), mine(&u), &part, &backend, |x| form(x, &config, &part, &comm)))
        });
        for (rank, part) in parts.unwrap().into_iter().enumerate() {
            for (name, (got, one)) in ["output", "gradient"].into_iter().zip(part.into_iter().zip(&one)) {
                let what = format!("{what}, rank {rank} of {ranks}, {case:?}, window {window:?}, {name}");
                check::close(&what, &check::to_f64(&got), &check::to_f64(&of_rank(one, &sequence, rank, ranks)));
            }
        }
    }
}

/// Documents that begin at, before and behind the borders of chunks, so that some queries see nothing of some rank's keys.
const CASES: [Case; 6] = [
    (8, 4, 2, 4, &[&[0], &[0, 3]]),
    (13, 4, 4, 3, &[&[0, 5, 6], &[0, 12]]),
    (64, 4, 1, 6, &[&[0], &[0, 16, 40], &[0, 8, 24]]),
    (150, 8, 4, 2, &[&[0], &[0, 10, 20, 30, 100]]),
    (301, 4, 4, 10, &[&[0, 37, 150]]),
    (640, 4, 4, 2, &[&[0, 300]]),
];

#[test]
fn the_ring_gives_what_one_rank_gives() {
    for case in CASES {
        for ranks in [1, 2, 3, 4] {
            check_form("ring", ring_attention, ranks, case, None, 0.0);
        }
    }
    check_form("ring", ring_attention, 2, CASES[3], Some(40), 1.5);
    check_form("ring", ring_attention, 4, CASES[4], Some(20), 0.0);
}

#[test]
fn divided_heads_give_what_one_rank_gives() {
    for case in CASES {
        for ranks in [1, 2, 4] {
            check_form("heads", ulysses_attention, ranks, case, None, 0.0);
        }
    }
    // Key-value heads that do not divide evenly.
    check_form("heads", ulysses_attention, 3, (20, 8, 4, 2, &[&[0, 7]]), Some(9), 0.7);
}

#[test]
fn heads_go_to_ranks_with_their_keys() {
    assert_eq!(heads_of_rank(8, 4, 2, 3), Some([4..8, 2..4]));
    assert_eq!(heads_of_rank(8, 2, 2, 4), Some([4..6, 1..2]));
    assert_eq!(heads_of_rank(8, 2, 0, 3), None);
    assert_eq!(heads_of_rank(6, 1, 0, 4), None);
}

#[test]
fn chunks_are_dealt_out_and_found_again() {
    let row: Vec<usize> = (0..13).collect();
    let parts: Vec<Vec<usize>> = (0..3).map(|rank| zigzag_part(&row, 13, rank, 3)).collect();
    assert_eq!(parts, [vec![0, 1, 10, 11, 12], vec![2, 3, 8, 9], vec![4, 5, 6, 7]]);
    assert_eq!(zigzag(13, 0, 1).map(|chunk| chunk.len()), [6, 7]);
    let part = Sequence::plain(2, 13).part(1, 3);
    assert_eq!((part.tokens(), part.positions()), (4, &[2, 3, 8, 9, 2, 3, 8, 9][..]));
    assert_eq!(part.runs(1..7), [3..4, 8..10, 15..17, 21..22]);
}

#[test]
fn parts_have_the_mask_of_the_whole() {
    for device in check::devices() {
        let ones = |n: usize| Tensor::<1>::ones([n], &device);
        let counter = Counter::new(3, Purpose::Dropout, 5);
        let whole: Vec<f32> = dropout(ones(100), 0.4, counter).into_data().try_to_vec().unwrap();
        let part: Vec<f32> = dropout_of(ones(40), 0.4, counter, &[90..100, 5..35]).into_data().try_to_vec().unwrap();
        assert_eq!(part, [&whole[90..], &whole[5..35]].concat());
    }
}
