//! # firebox-tensor
//!
//! Fused differentiable operations for transformers as a [burn](https://burn.dev) backend extension, the choice of backends and devices, and
//! randomness that is counted instead of drawn.
//!
//! On the CPU backends (`ndarray`, the default, and `flex`) every operation of [`ops`] is one multi-threaded kernel with a handwritten backward:
//! linear layers, causal attention (grouped heads, segments, windows, rotary positions, no T x T matrix kept), norms, activations, embedding, and
//! a head with cross-entropy whose logits never exist all at once. On the others (`wgpu`, `vulkan`, `metal`, `webgpu`, `cuda`, `rocm`) the
//! same functions compose burn's own operations. [`ops::collective`] has the operations between ranks.
//!
//! ```
//! use burn::tensor::{Distribution, Tensor};
//! use firebox_tensor::device::Backend;
//! use firebox_tensor::ops;
//!
//! let device = Backend::NdArray.device()?.autodiff();
//! let x = Tensor::<3>::random([2, 5, 8], Distribution::Default, &device);
//! let w = Tensor::<2>::random([8, 3], Distribution::Default, &device).require_grad();
//! let y = ops::gelu(ops::linear(x, w.clone(), None));
//! let grads = y.sum().backward();
//! assert_eq!(w.grad(&grads).unwrap().dims(), [8, 3]);
//! # Ok::<(), firebox_tensor::device::DeviceError>(())
//! ```
//!
//! Features: one per backend, `ndarray` by default.

// burn-ndarray 0.22 is marked deprecated; it stays the default CPU backend of this line, with flex beside it.
#![allow(deprecated)]

mod adapter;
pub mod buffers;
pub mod device;
mod kernels;
pub mod ops;
pub mod peak;
pub mod random;
pub mod threads;

pub use burn::tensor::Device;
