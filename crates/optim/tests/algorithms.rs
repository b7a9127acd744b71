//! Every algorithm against an independent implementation, by its state's size, and through a restart.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebox_optim::{Algorithm, DecayRule, NamedGrads, OptimError, Optimizer, StateTensor};
use firebox_tensor::ops::Precision;
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Module, Debug)]
struct Part {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

/// The parameters of `tests/golden/optimizers.py`.
#[derive(Module, Debug)]
struct Net {
    wide: Part,
    tall: Part,
    embed: Part,
}

const NAMES: [&str; 4] = ["wide.weight", "tall.weight", "tall.bias", "embed.weight"];

struct Goldens {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    about: About,
}

#[derive(Deserialize)]
struct About {
    cases: Vec<Algorithm>,
    lr: Vec<f64>,
    kept: Vec<usize>,
    sophia_batch: u64,
}

impl Goldens {
    fn read() -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/optimizers.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let about = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["firebox"]).unwrap();
        let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors
            .iter()
            .map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), values(view.data()))))
            .collect();
        Self { tensors, about }
    }

    fn param<const D: usize>(&self, name: &str) -> Param<Tensor<D>> {
        let (shape, values) = &self.tensors[&format!("start.{name}")];
        let data = TensorData::new(values.clone(), shape.clone());
        Param::from_tensor(Tensor::from_data(data, &Device::default().autodiff()))
    }

    fn net(&self) -> Net {
        Net {
            wide: Part { weight: self.param("wide.weight"), bias: None },
            tall: Part { weight: self.param("tall.weight"), bias: Some(self.param("tall.bias")) },
            embed: Part { weight: self.param("embed.weight"), bias: None },
        }
    }

    fn grads(&self, step: usize) -> NamedGrads {
        let grad = |name: &&str| {
            let values = &self.tensors[&format!("g.{name}.{step}")].1;
            ((*name).to_owned(), Tensor::from_floats(values.as_slice(), &Device::default()))
        };
        NAMES.iter().map(grad).collect()
    }

    /// Replaces the bases of SOAP by those of case `c`, if it has any. Eigenvectors of the eigenvalue 0, which the wider side of a matrix has after one gradient,
    /// are a matter of taste, on which later steps depend.
    fn share_bases(&self, c: usize, optimizer: &mut Optimizer, net: &Net) {
        let shared = |tensor: StateTensor| match self.tensors.get(&format!("{c}.{}", tensor.name)) {
            Some((_, values)) => StateTensor { values: values.clone(), ..tensor },
            None => tensor,
        };
        let state: Vec<StateTensor> = optimizer.state().map(shared).collect();
        optimizer.load_state::<_, OptimError>(net, state.into_iter().map(Ok)).unwrap();
    }

    /// One step, with an estimate of the curvature before it where the algorithm asks for one.
    fn step(&self, optimizer: &mut Optimizer, net: Net, step: usize) -> Net {
        if optimizer.curvature_is_due(step as u64 - 1) {
            optimizer.curvature(&net, self.grads(step), self.about.sophia_batch).unwrap();
        }
        optimizer.step(self.about.lr[step - 1], net, &mut self.grads(step)).unwrap()
    }
}

fn values(net: &Net) -> BTreeMap<&'static str, Vec<f32>> {
    let bias = net.tall.bias.as_ref().unwrap().val().into_data();
    let [wide, tall, embed] = [&net.wide, &net.tall, &net.embed].map(|part| part.weight.val().into_data());
    NAMES.into_iter().zip([wide, tall, bias, embed].map(|data| data.iter::<f32>().collect())).collect()
}

/// Largest difference relative to the largest value.
fn distance(ours: &[f32], golden: &[f32]) -> f64 {
    let scale = golden.iter().fold(0f64, |max, x| max.max(f64::from(x.abs())));
    ours.iter().zip(golden).fold(0f64, |max, (a, b)| max.max(f64::from((a - b).abs()))) / scale
}

#[test]
fn twenty_steps_equal_an_independent_implementation() {
    let goldens = Goldens::read();
    let mut seen: Vec<&str> = goldens.about.cases.iter().map(Algorithm::name).collect();
    seen.dedup();
    assert_eq!(seen, Algorithm::all().iter().map(Algorithm::name).collect::<Vec<_>>(), "every algorithm has a case");
    let mut failed = vec![];
    for (c, algorithm) in goldens.about.cases.iter().enumerate() {
        let mut optimizer = Optimizer::new(*algorithm, DecayRule::All).unwrap();
        let mut net = goldens.net();
        let mut worst = 0f64;
        for step in 1..=goldens.about.lr.len() {
            net = goldens.step(&mut optimizer, net, step);
            if step == 1 {
                goldens.share_bases(c, &mut optimizer, &net);
            }
            if goldens.about.kept.contains(&step) {
                for (name, ours) in values(&net) {
                    worst = worst.max(distance(&ours, &goldens.tensors[&format!("{c}.{name}.{step}")].1));
                }
            }
        }
        if let Algorithm::ScheduleFree(_) = algorithm {
            for (name, ours) in values(&optimizer.averaged(net).unwrap()) {
                worst = worst.max(distance(&ours, &goldens.tensors[&format!("average.{name}")].1));
            }
        }
        println!("{:<14} {worst:.1e}", algorithm.name());
        if worst > 1e-6 {
            failed.push(format!("case {c}, {algorithm:?}: {worst:.2e}"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn states_are_as_large_as_documented_and_survive_a_restart() {
    let goldens = Goldens::read();
    // Elements: matrices 66 and 66, bias 13, embedding 36.
    let expected = |algorithm: &Algorithm| match algorithm.name() {
        "adamw" | "adam" | "lamb" | "sophia" => 8 * 181,
        "sgd" | "lion" => 4 * 181,
        "adafactor" => 4 * (17 + 17 + 13 + 13),
        "muon" => 4 * 132 + 8 * 49,
        // The sum and the largest of the weights of each parameter.
        "schedule_free" => 8 * 181 + 4 * 8,
        "ademamix" => 12 * 181,
        "adam_mini" => 4 * (181 + 11 + 6 + 1 + 9),
        // Two squares of each side of the matrices and of the embedding.
        "soap" => 8 * (181 + 2 * (36 + 121) + 81 + 16),
        other => panic!("{other}: how large is its state?"),
    };
    for algorithm in Algorithm::all() {
        let new = || Optimizer::new(algorithm, DecayRule::Matrices).unwrap();
        let (mut optimizer, mut net) = (new(), goldens.net());
        for step in 1..=5 {
            net = goldens.step(&mut optimizer, net, step);
        }
        assert_eq!(optimizer.state_bytes(), expected(&algorithm), "{}", algorithm.name());
        let saved: Vec<StateTensor> = optimizer.state().collect();
        let mut resumed = new();
        resumed.load_state::<_, OptimError>(&net, saved.into_iter().map(Ok)).unwrap();
        let twin = net.clone();
        for step in 6..=8 {
            net = goldens.step(&mut optimizer, net, step);
        }
        let mut again = twin;
        for step in 6..=8 {
            again = goldens.step(&mut resumed, again, step);
        }
        let bits = |net: &Net| values(net).into_values().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&net), bits(&again), "{}", algorithm.name());
        assert!(optimizer.state().eq(resumed.state()), "{}", algorithm.name());

        // The state of another algorithm is refused in one line.
        let other = if algorithm.name() == "adafactor" { Algorithm::default() } else { Algorithm::all()[3] };
        let mut other = Optimizer::new(other, DecayRule::Matrices).unwrap();
        let error = other.load_state::<_, OptimError>(&net, optimizer.state().map(Ok)).unwrap_err().to_string();
        assert!(error.contains("missing") && error.contains("unused") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn hyperparameters_out_of_range_are_refused() {
    let refused = [
        (r#"{"kind": "sgd", "momentum": -0.1}"#, "momentum"),
        (r#"{"kind": "sgd", "momentum": 0.0, "nesterov": true}"#, "nesterov"),
        (r#"{"kind": "lion", "beta2": 1.5}"#, "beta2"),
        (r#"{"kind": "adafactor", "beta2_decay": 0.8}"#, "beta2_decay"),
        (r#"{"kind": "muon", "ns_steps": 0}"#, "ns_steps"),
        (r#"{"kind": "sophia", "every": 0}"#, "every"),
        (r#"{"kind": "schedule_free", "beta1": 0.0}"#, "beta1"),
        (r#"{"kind": "ademamix", "alpha": -1.0}"#, "alpha"),
        (r#"{"kind": "lamb", "weight_decay": -1.0}"#, "weight_decay"),
        (r#"{"kind": "adam_mini", "eps": 0.0}"#, "eps"),
        (r#"{"kind": "soap", "precondition_frequency": 0}"#, "precondition_frequency"),
        (r#"{"kind": "soap", "max_precond_dim": 0}"#, "max_precond_dim"),
    ];
    for (given, word) in refused {
        let algorithm: Algorithm = serde_json::from_str(given).unwrap();
        let error = Optimizer::new(algorithm, DecayRule::Matrices).unwrap_err().to_string();
        assert!(error.contains(word) && !error.contains('\n'), "{given}: {error}");
    }
    for algorithm in Algorithm::all() {
        algorithm.validate().unwrap();
    }
}

#[derive(Module, Debug)]
struct Large {
    weight: Param<Tensor<2>>,
}

/// A quadratic of 5000 dimensions, badly scaled, with noise: the loss after 60 steps, and the bytes of state.
fn descend(algorithm: Algorithm, precision: Precision, restart: bool) -> (f64, usize) {
    let device = Device::default();
    const SHAPE: [usize; 2] = [50, 100];
    let number = |i: u64| {
        let x = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let numbers = |salt: u64| (0..5000).map(|i| number(i + 10_000 * salt)).collect::<Vec<f32>>();
    let stiffness: Vec<f32> = numbers(1).iter().map(|x| 10f32.powf(2.0 * x)).collect();
    let data = TensorData::new(numbers(2), SHAPE);
    let mut model = Large { weight: Param::from_tensor(Tensor::from_data(data, &device.clone().autodiff())) };
    let new = || Optimizer::new(algorithm, DecayRule::None).unwrap().with_precision(precision);
    let mut optimizer = new();
    let read = |model: &Large| model.weight.val().into_data().iter::<f32>().collect::<Vec<f32>>();
    for step in 0..60 {
        let noise = numbers(3 + step);
        let gradient = |values: Vec<f32>| -> NamedGrads {
            let grad: Vec<f32> = (0..5000).map(|i| stiffness[i] * (values[i] + 0.1 * noise[i])).collect();
            [("weight".to_owned(), Tensor::from_floats(grad.as_slice(), &device))].into_iter().collect()
        };
        if optimizer.curvature_is_due(step) {
            optimizer.curvature(&model, gradient(read(&model)), 16).unwrap();
        }
        let mut grads = gradient(read(&model));
        model = optimizer.step(0.01, model, &mut grads).unwrap();
        if restart && step == 30 {
            let saved: Vec<StateTensor> = optimizer.state().collect();
            optimizer = new();
            optimizer.load_state::<_, OptimError>(&model, saved.into_iter().map(Ok)).unwrap();
        }
    }
    let loss = read(&model).iter().zip(&stiffness).map(|(x, k)| f64::from(k * x * x)).sum();
    (loss, optimizer.state_bytes())
}

#[test]
fn states_in_fewer_bits_train_as_well_and_survive_a_restart() {
    for algorithm in Algorithm::all() {
        let (exact, bytes) = descend(algorithm, Precision::Full, false);
        for (precision, share) in [(Precision::Bf16, 0.5), (Precision::Int8, 0.254)] {
            let (loss, compact) = descend(algorithm, precision, false);
            println!(
                "{:<14} {precision:?} loss {:+.3} %, {compact} of {bytes} bytes",
                algorithm.name(),
                100.0 * (loss / exact - 1.0)
            );
            // Gradients of a block differ by four decades here; Lion, which takes signs, loses most.
            assert!(loss / exact - 1.0 < 0.06, "{}, {precision:?}: {loss}, {exact} in f32", algorithm.name());
            assert_eq!(
                descend(algorithm, precision, true).0.to_bits(),
                loss.to_bits(),
                "{}: a restart",
                algorithm.name()
            );
            match algorithm.name() {
                // A few values per row, column or block beside a full mean; z is a parameter; bases are not rounded.
                "adafactor" | "adam_mini" | "schedule_free" | "soap" => assert!(compact <= bytes),
                name => assert!((compact as f64 / bytes as f64 - share).abs() < 0.001, "{name}: {compact} of {bytes}"),
            }
        }
    }
}
