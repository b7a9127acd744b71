//! Against `torch.optim.AdamW`, `torch.nn.utils.clip_grad_norm_` and the schedules of torch and transformers, in double precision.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor};
use firebox_optim::{AdamWConfig, Algorithm, Anneal, DecayShape, NamedGrads, ParamKind, ParamState, Schedule};
use safetensors::SafeTensors;
use serde::Deserialize;

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)).unwrap()
}

struct Goldens(HashMap<String, Vec<f32>>);

impl Goldens {
    fn read(bytes: &[u8]) -> Self {
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Self(tensors.iter().map(|(name, view)| (name.to_string(), values(view.data()))).collect())
    }

    fn tensor(&self, name: &str) -> Tensor<1> {
        Tensor::from_floats(self.0[name].as_slice(), &Device::default())
    }
}

fn about<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> T {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    serde_json::from_str(&metadata.metadata().as_ref().unwrap()["firebox"]).unwrap()
}

fn read(tensor: &Tensor<1>) -> Vec<f64> {
    tensor.to_data().iter::<f32>().map(f64::from).collect()
}

/// max |a - b| / max |b| <= 1e-6: eight units of f32's rounding over five steps.
#[track_caller]
fn assert_close(ours: &[f64], golden: impl Iterator<Item = f64>, what: &str) {
    let golden: Vec<f64> = golden.collect();
    assert_eq!(ours.len(), golden.len(), "{what}");
    let scale = golden.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    let error = ours.iter().zip(&golden).fold(0.0_f64, |max, (a, b)| max.max((a - b).abs()));
    assert!(error <= 1e-6 * scale, "{what}: {:.2e} relative", error / scale);
}

#[derive(Deserialize)]
struct About {
    cases: Vec<Case>,
    clips: Vec<Clip>,
}

#[derive(Deserialize)]
struct Case {
    lr: Vec<f64>,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Clip {
    max_norm: f64,
    norm: f64,
}

const SHAPES: usize = 3;

fn moments(state: &ParamState) -> [Tensor<1>; 2] {
    let device = Device::default();
    let mut tensors = state.tensors(&device).map(|(_, tensor)| tensor);
    ["m", "v"].map(|_| tensors.next().unwrap())
}

#[test]
fn adamw_trajectories() {
    let bytes = golden("adamw.safetensors");
    let (goldens, about) = (Goldens::read(&bytes), about::<About>(&bytes));
    assert!(about.cases.len() >= 5);
    for (c, Case { lr, betas: [beta1, beta2], eps, weight_decay }) in about.cases.into_iter().enumerate() {
        let algorithm = Algorithm::from(AdamWConfig { beta1, beta2, eps, weight_decay });
        algorithm.validate().unwrap();
        for i in 0..SHAPES {
            let mut param = goldens.tensor(&format!("case.{c}.param.{i}.0"));
            let mut state = ParamState::new(&algorithm, ParamKind::Matrix, &param.dims(), &Device::default());
            for (s, &lr) in lr.iter().enumerate().map(|(s, lr)| (s + 1, lr)) {
                let grad = goldens.tensor(&format!("case.{c}.grad.{i}.{s}"));
                param = algorithm.step(lr, weight_decay, 1.0, param, grad, &mut state);
                let [m, v] = moments(&state);
                let at = |kind: &str| goldens.0[&format!("case.{c}.{kind}.{i}.{s}")].iter().copied().map(f64::from);
                let what = |kind: &str| format!("case {c}, shape {i}, step {s}, {kind}");
                assert_close(&read(&param), at("param"), &what("param"));
                // Moments are compared after bias correction, each with its own beta: f32's is not exactly the double one.
                let corrected = |x: f64, beta: f64| x / (1.0 - beta.powi(s as i32));
                let ours = |x: &Tensor<1>, beta: f64| {
                    read(x).into_iter().map(|x| corrected(x, f64::from(beta as f32))).collect::<Vec<_>>()
                };
                assert_close(&ours(&m, beta1), at("m").map(|x| corrected(x, beta1)), &what("m"));
                assert_close(&ours(&v, beta2), at("v").map(|x| corrected(x, beta2)), &what("v"));
            }
            assert_eq!(state.steps(), 5);
        }
    }
}

#[test]
fn global_norm_clipping() {
    let bytes = golden("adamw.safetensors");
    let (goldens, about) = (Goldens::read(&bytes), about::<About>(&bytes));
    assert!(about.clips.iter().any(|c| c.max_norm < c.norm) && about.clips.iter().any(|c| c.max_norm > c.norm));
    for (c, Clip { max_norm, norm }) in about.clips.into_iter().enumerate() {
        let mut grads: NamedGrads =
            (0..SHAPES).map(|i| (i.to_string(), goldens.tensor(&format!("clip.{c}.before.{i}")))).collect();
        let before = grads.clip_(max_norm);
        assert!((before / norm - 1.0).abs() < 1e-6, "{before} {norm}");
        for i in 0..SHAPES {
            let after = read(grads.get(&i.to_string()).unwrap());
            assert_close(&after, goldens.0[&format!("clip.{c}.after.{i}")].iter().copied().map(f64::from), "clipped");
        }
        assert!((grads.global_norm() / norm.min(max_norm) - 1.0).abs() < 2e-6);
    }
}

#[derive(Deserialize)]
struct Schedules {
    steps: u64,
    warmup: u64,
    peak: f64,
    wsd_decay_steps: u64,
    schedules: HashMap<String, Vec<f64>>,
}

#[test]
fn schedules() {
    let golden: Schedules = serde_json::from_slice(&golden("schedules.json")).unwrap();
    let Schedules { steps, warmup, peak, wsd_decay_steps, schedules } = golden;
    let decay_fraction = wsd_decay_steps as f64 / steps as f64;
    type Make = fn(u64, f64) -> Schedule;
    let cases: [(&str, Make); 10] = [
        ("constant", |w, _| Schedule::Constant { warmup_steps: w }),
        ("linear", |w, _| Schedule::Linear { warmup_steps: w, min_lr_ratio: 0.0 }),
        ("cosine", |w, _| Schedule::Cosine { warmup_steps: w, min_lr_ratio: 0.0 }),
        ("cosine_min", |w, _| Schedule::Cosine { warmup_steps: w, min_lr_ratio: 0.1 }),
        ("cosine_annealing", |_, _| Schedule::Cosine { warmup_steps: 0, min_lr_ratio: 0.1 }),
        ("inverse_sqrt", |w, _| Schedule::InverseSqrt { warmup_steps: w, min_lr_ratio: 0.0 }),
        ("wsd_linear", |w, f| wsd(w, f, DecayShape::Linear)),
        ("wsd_cosine", |w, f| wsd(w, f, DecayShape::Cosine)),
        ("wsd_1-sqrt", |w, f| wsd(w, f, DecayShape::Sqrt)),
        ("wsd_exponential", |w, f| wsd(w, f, DecayShape::Exponential)),
    ];
    let cycle = |rise_fraction, div_factor, final_div_factor, anneal| Schedule::OneCycle {
        rise_fraction,
        div_factor,
        final_div_factor,
        anneal,
    };
    let cycles = [
        ("one_cycle", cycle(0.3, 25.0, 1e4, Anneal::Cosine)),
        ("one_cycle_linear", cycle(0.45, 10.0, 100.0, Anneal::Linear)),
    ];
    assert_eq!(cases.len() + cycles.len(), schedules.len());
    for (name, ours) in cycles {
        assert_eq!(schedules[name].len() as u64, steps);
        for (step, golden) in (0..).zip(&schedules[name]) {
            let got = ours.lr_at(peak, step, steps);
            assert!((got - golden).abs() <= 1e-9 * golden, "{name} at {step}: {got} {golden}");
        }
    }
    for (name, make) in cases {
        let rates = &schedules[name];
        assert_eq!(rates.len() as u64, steps + 1);
        let close = |ours: f64, golden: f64, step: u64| {
            assert!((ours - golden).abs() <= 1e-12 * peak + 1e-9 * golden.abs(), "{name} at {step}: {ours} {golden}");
        };
        let ours = make(warmup, decay_fraction);
        ours.validate(steps).unwrap();
        for step in ours.warmup_steps()..=steps {
            close(ours.lr_at(peak, step, steps), rates[step as usize], step);
        }
        // transformers' warmup begins at zero (that of its wsd at the minimum): ours is one step ahead of it, and one step shorter.
        let shorter = make(warmup - 1, decay_fraction);
        let floor = if name.starts_with("wsd") { 0.1 } else { 0.0 };
        for step in 0..shorter.warmup_steps() {
            let from_zero = (rates[step as usize + 1] - floor * peak) / (1.0 - floor);
            close(shorter.lr_at(peak, step, steps), from_zero, step);
        }
    }
}

fn wsd(warmup_steps: u64, decay_fraction: f64, decay: DecayShape) -> Schedule {
    Schedule::Wsd { warmup_steps, min_lr_ratio: 0.1, decay_fraction, decay }
}
