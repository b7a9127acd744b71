//! # firebox-optim
//!
//! Optimizers and learning-rate schedules for large models on [burn](https://burn.dev). Useful alone, with nothing but burn and a module of your own:
//!
//! ```
//! use burn::module::{Module, Param};
//! use burn::tensor::{Device, Tensor};
//! use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, OptimError, Optimizer, Schedule};
//!
//! #[derive(Module, Debug)]
//! struct Line { weight: Param<Tensor<2>> }
//!
//! # fn main() -> Result<(), OptimError> {
//! let device = Device::default().autodiff();
//! let mut line = Line { weight: Param::from_tensor(Tensor::zeros([2, 1], &device)) };
//! let x = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], &device);
//! let y = Tensor::<2>::from_floats([[2.0], [-1.0], [1.0]], &device);
//! let mut adamw = Optimizer::new(AdamWConfig { weight_decay: 0.0, ..Default::default() }, DecayRule::Matrices)?;
//! let schedule = Schedule::default(); // a cosine
//! println!("{}", adamw.groups(&line)?); // decay: 1 tensor, 2; no decay: 0 tensors, 0
//! for step in 0..200 {
//!     let loss = (x.clone().matmul(line.weight.val()) - y.clone()).powi_scalar(2).mean();
//!     let mut grads = NamedGrads::from_backward(&line, &mut loss.backward());
//!     grads.clip_(1.0);
//!     line = adamw.step(schedule.lr_at(0.1, step, 200), line, &mut grads)?;
//! }
//! let found: Vec<f32> = line.weight.val().into_data().iter().collect(); // the line is y = 2 a - b
//! assert!((found[0] - 2.0).abs() < 1e-2 && (found[1] + 1.0).abs() < 1e-2, "{found:?}");
//! # Ok(())
//! # }
//! ```
//!
//! - [`Optimizer`] goes over a module by parameter name with one [`Algorithm`], or several by [groups](GroupConfig). The updates are fused in-place kernels on
//!   the CPU backends. Each configuration says where its defaults differ from PyTorch's.
//! - [`NamedGrads`] accumulates, clips by global norm, tells whether all is finite. [`Clip`] is by norm, of all or of a group, or adaptive.
//! - [`Groups`] says what is trained how, and proves that the groups cover the module.
//! - [`Average`] is a running average of parameters, exponential or of the last ones.
//! - [`Schedule`] is a pure function of the step: constant, linear, cosine, inverse square root, warmup-stable-decay, each with a warmup, and
//!   one-cycle. [`BatchScaling`] fits the rate to the batch.
//! - [`Optimizer::state`] and [`Optimizer::load_state`] save and restore: the next step is the same, bit for bit.
//!
//! | algorithm | state, bytes per parameter | paper |
//! |---|---|---|
//! | [AdamW](AdamWConfig) | 8 | [1711.05101](https://arxiv.org/abs/1711.05101) |
//! | [Adam](AdamConfig) | 8 | [1412.6980](https://arxiv.org/abs/1412.6980) |
//! | [SGD](SgdConfig) | 4, without momentum 0 | |
//! | [Adafactor](AdafactorConfig) | 4 per row and column | [1804.04235](https://arxiv.org/abs/1804.04235) |
//! | [LAMB](LambConfig) | 8 | [1904.00962](https://arxiv.org/abs/1904.00962) |
//! | [Lion](LionConfig) | 4 | [2302.06675](https://arxiv.org/abs/2302.06675) |
//! | [Muon](MuonConfig) | 4 of matrices, 8 of the rest | [2502.16982](https://arxiv.org/abs/2502.16982) |
//! | [Sophia-G](SophiaConfig) | 8 | [2305.14342](https://arxiv.org/abs/2305.14342) |
//! | [Schedule-Free AdamW](ScheduleFreeConfig) | 8 | [2405.15682](https://arxiv.org/abs/2405.15682) |
//! | [AdEMAMix](AdEmaMixConfig) | 12 | [2409.03137](https://arxiv.org/abs/2409.03137) |
//! | [Adam-mini](AdamMiniConfig) | 4, and 4 per block | [2406.16793](https://arxiv.org/abs/2406.16793) |
//! | [SOAP](SoapConfig) | 8, and 8 per element of a square of each side: 24 of square matrices | [2409.11321](https://arxiv.org/abs/2409.11321) |
//!
//! Values are tested against `torch.optim` and the authors' packages, `clip_grad_norm_` and the schedules of transformers, from goldens that come with
//! their generator, and against the formulas in double precision.

pub mod algorithm;
mod average;
mod clip;
mod error;
mod grads;
mod groups;
mod optimizer;
mod params;
mod parts;
mod scaling;
mod schedule;

pub use algorithm::{
    AdEmaMixConfig, AdafactorConfig, AdamConfig, AdamMiniConfig, AdamWConfig, Algorithm, LambConfig, LionConfig,
    MuonConfig, MuonScale, ParamState, ScheduleFreeConfig, SgdConfig, SoapConfig, SophiaConfig,
};
pub use average::{Average, AverageConfig};
pub use clip::{Adaptive, Clip, Clipping};
pub use error::OptimError;
pub use grads::NamedGrads;
pub use groups::{Group, GroupConfig, Groups, Patterns};
pub use optimizer::{Optimizer, StateTensor};
pub use params::{DecayRule, ParamInfo, ParamKind, is_trainable, parameters, values};
pub use parts::Parts;
pub use scaling::{BatchScaling, ScalingRule};
pub use schedule::{Anneal, DecayShape, Schedule};
