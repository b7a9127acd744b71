//! The fused head and loss against their plain reference: label smoothing, z-loss, rows that count nothing, chunks of rows.
#![allow(clippy::unwrap_used)]

mod check;
mod reference;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use check::{check, close, devices, host, values};
use firebox_tensor::ops::{self, LossConfig};

#[test]
fn follows_its_formula() {
    for (n, d, v) in [(1, 1, 2), (5, 3, 7), (40, 17, 65), (3, 2, 131)] {
        let losses =
            [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, 0.3, 0.0), (0.2, 0.05, 0.0), (0.0, 0.0, 1.5), (0.2, 0.05, 3.0)];
        for (label_smoothing, z_loss, cap) in losses {
            let targets: Arc<[i32]> = (0..n).map(|i| if i % 3 == 1 { -100 } else { (i * 5 % v) as i32 }).collect();
            let scale = 0.37;
            let loss = LossConfig { label_smoothing, z_loss };
            check(
                &format!("[{n}, {d}] x [{d}, {v}], {loss:?}, cap {cap}"),
                &[n * d, v * d],
                |t| {
                    let (h, w) = (t[0].clone().reshape([n, d]), t[1].clone().reshape([v, d]));
                    ops::linear_cross_entropy(h, w, targets.clone(), scale, cap, &loss)
                },
                |x| reference::linear_cross_entropy(&x[0], &x[1], d, &targets, scale, (label_smoothing, z_loss, cap)),
            );
        }
    }
}

/// Loss and gradients of `rows` of the hidden states.
fn run(device: &Device, v: usize, rows: std::ops::Range<usize>) -> [Vec<f64>; 3] {
    let (d, n) = (2, rows.len());
    let device = device.clone().autodiff();
    let h = values(v.min(1000) * d, 1)[rows.start * d..rows.end * d].to_vec();
    let h = Tensor::<2>::from_data(TensorData::new(h, [n, d]), &device).require_grad();
    let w = Tensor::<2>::from_data(TensorData::new(values(v * d, 2), [v, d]), &device).require_grad();
    let targets: Arc<[i32]> = rows.map(|i| (i * 6007 % v) as i32).collect();
    let loss = ops::linear_cross_entropy(
        h.clone(),
        w.clone(),
        targets,
        0.01,
        2.0,
        &LossConfig { label_smoothing: 0.1, z_loss: 1e-3 },
    );
    let grads = loss.clone().backward();
    [host(loss), host(h.grad(&grads).unwrap()), host(w.grad(&grads).unwrap())]
}

#[test]
fn chunks_add_up() {
    // A vocabulary so large that 70 rows take two chunks, and each half one.
    let v = 262_147;
    for device in devices() {
        let [loss, dh, dw] = run(&device, v, 0..70);
        let [first, second] = [run(&device, v, 0..35), run(&device, v, 35..70)];
        close("loss", &loss, &[first[0][0] + second[0][0]]);
        close("hidden", &dh, &[&first[1][..], &second[1][..]].concat());
        let sum: Vec<f64> = first[2].iter().zip(&second[2]).map(|(a, b)| a + b).collect();
        close("weight", &dw, &sum);
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    for device in devices() {
        let with = |threads: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&device, 1003, 0..300))
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(3));
    }
}

#[test]
fn a_non_finite_logit_reaches_the_loss() {
    for device in devices() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let h = Tensor::<2>::from_data([[1.0f32, 2.0], [bad, 1.0]], &device);
            let w = Tensor::<2>::from_data([[1.0f32, 0.5], [0.5, 1.0], [0.1, 0.2]], &device);
            let loss = host(ops::linear_cross_entropy(h, w, vec![0, 1].into(), 0.5, 0.0, &LossConfig::default()))[0];
            assert!(!loss.is_finite(), "{bad}: loss {loss}");
        }
    }
}
