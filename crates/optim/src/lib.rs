//! # firebox-optim
//!
//! Optimizers and learning-rate schedules for large models on [burn](https://burn.dev). Useful alone, with nothing but burn and a module of your own:
//!
//! ```
//! use burn::module::{Module, Param};
//! use burn::tensor::{Device, Tensor};
//! use firebox_optim::{AdamW, AdamWConfig, DecayRule, NamedGrads, OptimError, Schedule};
//!
//! #[derive(Module, Debug)]
//! struct Line { weight: Param<Tensor<2>> }
//!
//! # fn main() -> Result<(), OptimError> {
//! let device = Device::default().autodiff();
//! let mut line = Line { weight: Param::from_tensor(Tensor::zeros([2, 1], &device)) };
//! let x = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], &device);
//! let y = Tensor::<2>::from_floats([[2.0], [-1.0], [1.0]], &device);
//! let mut adamw = AdamW::new(AdamWConfig { weight_decay: 0.0, ..Default::default() }, DecayRule::Matrices)?;
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
//! - [`AdamW`] goes over a module by parameter name; [`adamw::step`] is the pure update of one flat tensor, a fused in-place kernel on the
//!   CPU backends. Defaults differ from PyTorch's where [`AdamWConfig`] says so.
//! - [`NamedGrads`] accumulates, clips by global norm, tells whether all is finite.
//! - [`DecayGroups`] says what decays, and proves that the groups cover the module.
//! - [`Schedule`] is a pure function of the step: constant, linear, cosine, inverse square root, warmup-stable-decay, each with a warmup.
//! - [`AdamW::state`] and [`AdamW::load_state`] save and restore: the next step is the same, bit for bit.
//!
//! | optimizer | state, bytes per parameter | paper |
//! |---|---|---|
//! | AdamW | 8 | [1711.05101](https://arxiv.org/abs/1711.05101) |
//!
//! Values are tested against `torch.optim.AdamW`, `clip_grad_norm_` and the schedules of transformers, from goldens that come with their
//! generator, and against the formula in double precision.

pub mod adamw;
mod error;
mod grads;
mod optimizer;
mod params;
mod schedule;

pub use adamw::{AdamWConfig, Moments};
pub use error::OptimError;
pub use grads::NamedGrads;
pub use optimizer::{AdamW, StateTensor};
pub use params::{DecayGroups, DecayRule, ParamInfo, parameters};
pub use schedule::{DecayShape, Schedule};
