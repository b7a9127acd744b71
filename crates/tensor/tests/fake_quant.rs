//! Weights that are rounded in training: against plain arithmetic, PyTorch, and finite differences where there is something to differentiate.
#![allow(clippy::unwrap_used)]

mod check;

use burn::tensor::{Device, Tensor, TensorData};
use check::{close, devices, host, to_f64, values};
use firebox_tensor::ops::{FakeQuant, fake_quantize, fake_quantized};
use half::f16;

const SHAPES: [[usize; 2]; 4] = [[32, 1], [64, 7], [160, 33], [128, 300]];

/// Straight from the definition: of column `o` of group `g`, in f64 but for the steps, which are stored in f16 or f32.
fn plain(w: &[f32], [inputs, outputs]: [usize; 2], steps: Option<&[f32]>, format: FakeQuant) -> Vec<f32> {
    let rows = if format.group == 0 { inputs } else { format.group };
    let largest = f64::from((1u32 << (format.bits - 1)) - 1);
    let mut out = vec![0.0; w.len()];
    for g in 0..inputs / rows {
        for o in 0..outputs {
            let column = (0..rows).map(|r| (g * rows + r) * outputs + o);
            let most = column.clone().map(|i| f64::from(w[i]).abs()).fold(0.0, f64::max);
            let step = steps.map_or((most / largest) as f32, |steps| steps[g * outputs + o]);
            let step = if format.group == 0 { step } else { f16::from_f32(step).to_f32() };
            for i in column.filter(|_| step > 0.0) {
                let code = (f64::from(w[i]) / f64::from(step)).round_ties_even().clamp(-largest, largest);
                out[i] = code as f32 * step;
            }
        }
    }
    out
}

fn formats(inputs: usize) -> impl Iterator<Item = FakeQuant> {
    let groups = [0, 32, 64].into_iter().filter(move |group| *group == 0 || inputs.is_multiple_of(*group));
    groups.flat_map(|group| [2, 3, 4, 8].map(|bits| FakeQuant { bits, group }))
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

#[test]
fn values_are_those_of_the_definition() {
    for device in devices() {
        for shape in SHAPES {
            let n = shape[0] * shape[1];
            let mut w = values(n, 3);
            // A column of zeros, and halves on the grid.
            w.iter_mut().step_by(shape[1]).for_each(|w| *w = 0.0);
            for format in formats(shape[0]) {
                let start = format.initial_steps(&w, shape);
                for steps in [None, Some(&start[..])] {
                    let on_device = steps.map(|steps| tensor(steps, [steps.len()], &device));
                    let got = fake_quantize(tensor(&w, shape, &device), on_device, format);
                    let got: Vec<f32> = got.into_data().iter::<f32>().collect();
                    assert_eq!(got, plain(&w, shape, steps, format), "{shape:?} {format:?}");
                    let (on_host, used) = fake_quantized(&w, shape, steps, format);
                    assert_eq!(on_host, got);
                    // What is on the grid stays there.
                    assert_eq!(fake_quantized(&got, shape, Some(&used), format).0, got, "{shape:?} {format:?}");
                }
            }
        }
    }
}

#[test]
fn gradients_of_weights_pass_straight_through() {
    for device in devices() {
        let (shape, device) = ([64, 7], device.autodiff());
        let w = tensor(&values(64 * 7, 3), shape, &device).require_grad();
        let upstream = values(64 * 7, 4);
        let y = fake_quantize(w.clone(), None, FakeQuant { bits: 4, group: 32 });
        let grads = (y * tensor(&upstream, shape, &device)).sum().backward();
        assert_eq!(host(w.grad(&grads).unwrap()), to_f64(&upstream));
    }
}

#[test]
fn learned_steps_are_those_of_pytorch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/lsq.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let golden = |name: &str| -> Vec<f32> {
        let data = golden.tensor(name).unwrap();
        data.data().chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    };
    let (w, upstream, shape) = (golden("weight"), golden("upstream"), [64, 5]);
    for device in devices() {
        let device = device.autodiff();
        for format in formats(32) {
            let of = |kind: &str| golden(&format!("{}.{}.{kind}", format.bits, format.group));
            close("start", &to_f64(&format.initial_steps(&w, shape)), &to_f64(&of("start")));
            let weight = tensor(&w, shape, &device).require_grad();
            let steps = of("step");
            let steps = tensor(&steps, [steps.len()], &device).require_grad();
            let y = fake_quantize(weight.clone(), Some(steps.clone()), format);
            let grads = (y.clone() * tensor(&upstream, shape, &device)).sum().backward();
            for (kind, got) in [
                ("value", host(y.inner().reshape([64 * 5]))),
                ("grad_weight", host(weight.grad(&grads).unwrap().reshape([64 * 5]))),
                ("grad_step", host(steps.grad(&grads).unwrap())),
            ] {
                close(&format!("{format:?} {kind}"), &got, &to_f64(&of(kind)));
            }
        }
    }
}

/// Beyond the grid nothing is rounded: there the gradients are the slopes.
#[test]
fn beyond_the_grid_gradients_are_differences() {
    let (shape, format) = ([16, 3], FakeQuant { bits: 3, group: 0 });
    let w: Vec<f32> = values(48, 5).iter().map(|w| w.signum() * (5.0 + w.abs())).collect();
    let (upstream, at) = (values(48, 6), [1.0f32, 1.25, 0.5]);
    let loss = |steps: &[f32]| -> f64 {
        let y = fake_quantized(&w, shape, Some(steps), format).0;
        y.iter().zip(&upstream).map(|(y, u)| f64::from(*y) * f64::from(*u)).sum()
    };
    for device in devices() {
        let device = device.autodiff();
        let (weight, steps) = (tensor(&w, shape, &device).require_grad(), tensor(&at, [3], &device).require_grad());
        let y = fake_quantize(weight.clone(), Some(steps.clone()), format);
        let grads = (y * tensor(&upstream, shape, &device)).sum().backward();
        assert!(host(weight.grad(&grads).unwrap()).iter().all(|g| *g == 0.0));
        let factor = f64::from(format.step_gradient_factor(16));
        let slopes: Vec<f64> = (0..3)
            .map(|i| {
                let moved = |by: f32| {
                    let mut steps = at;
                    steps[i] += by;
                    loss(&steps)
                };
                (moved(1.0 / 64.0) - moved(-1.0 / 64.0)) * 32.0 * factor
            })
            .collect();
        close("steps", &host(steps.grad(&grads).unwrap()), &slopes);
    }
}
