//! AdamW with nothing but burn and a module of one's own: a small perceptron learns a curve, and a resumed optimizer goes on
//! as if nothing had happened.
//!
//! `cargo run --release -p firebox-optim --example adamw_alone`

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData, activation};
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, OptimError, Optimizer, Schedule, StateTensor};

#[derive(Module, Debug)]
struct Perceptron {
    hidden: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
    output: Param<Tensor<2>>,
}

const WIDTH: usize = 32;
const STEPS: u64 = 1_000;
const PEAK: f64 = 1e-2;

impl Perceptron {
    fn new(device: &Device) -> Self {
        let spread = |scale: f32| (0..WIDTH).map(|i| scale * (i as f32 / (WIDTH - 1) as f32 - 0.5)).collect::<Vec<_>>();
        let matrix =
            |values, shape: [usize; 2]| Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), device));
        Self {
            hidden: matrix(spread(8.0), [1, WIDTH]),
            bias: Param::from_tensor(Tensor::from_floats(spread(6.0).as_slice(), device)),
            output: matrix(spread(0.1), [WIDTH, 1]),
        }
    }

    /// The mean square distance from y = sin(3x) on x in [-1, 1].
    fn loss(&self, device: &Device) -> Tensor<1> {
        let x: Vec<f32> = (0..101).map(|i| i as f32 / 50.0 - 1.0).collect();
        let x = Tensor::<1>::from_floats(x.as_slice(), device).reshape([101, 1]);
        let hidden = activation::tanh(x.clone().matmul(self.hidden.val()) + self.bias.val().unsqueeze());
        (hidden.matmul(self.output.val()) - (x * 3.0).sin()).powi_scalar(2).mean()
    }
}

fn main() -> Result<(), OptimError> {
    let device = Device::default().autodiff();
    let mut model = Perceptron::new(&device);
    let mut adamw = Optimizer::new(AdamWConfig { weight_decay: 0.01, ..Default::default() }, DecayRule::Matrices)?;
    let schedule = Schedule::Cosine { warmup_steps: 50, min_lr_ratio: 0.1 };
    schedule.validate(STEPS)?;
    println!("{}", adamw.groups(&model)?);

    for step in 0..STEPS {
        if step == STEPS / 2 {
            let saved: Vec<StateTensor> = adamw.state().collect();
            adamw = Optimizer::new(*adamw.algorithm(), DecayRule::Matrices)?;
            adamw.load_state::<_, OptimError>(&model, saved.into_iter().map(Ok))?;
        }
        let loss = model.loss(&device);
        let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
        let norm = grads.clip_(1.0);
        let lr = schedule.lr_at(PEAK, step, STEPS);
        if step % 100 == 0 || step == STEPS - 1 {
            println!("step {step:4}  loss {:.6}  gradient norm {norm:.4}  lr {lr:.5}", loss.into_scalar::<f32>());
        }
        model = adamw.step(lr, model, &mut grads)?;
    }
    println!("optimizer state: {} bytes for {} parameters", adamw.state_bytes(), model.num_params());
    Ok(())
}
