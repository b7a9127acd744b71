//! # firebox
//!
//! Efficient training of large pretrained models in Rust, on top of [burn](https://burn.dev): raw text in, a trained language model out.
//! This crate is the facade over the layered crates, and the home of the `firebox` command.
//!
//! | module | crate | what it has |
//! |---|---|---|
//! | [`tensor`] | `firebox-tensor` | fused differentiable operations, devices, counted randomness |
//! | [`data`] | `firebox-data` | text, tokenizers, token shards, batches |
//! | [`models`] | `firebox-models` | the decoder, presets, Hugging Face names |
//! | [`compress`] | `firebox-compress` | quantization, pruning, low rank, GGUF files |
//! | [`optim`] | `firebox-optim` | optimizers, groups, schedules, clipping |
//! | [`train`] | `firebox-train` | recipes, the loop, checkpoints, reports, generation |
//!
//! ```
//! use firebox::models::transformer::{Transformer, presets};
//! use firebox::tensor::device::Backend;
//! use firebox::train::generate::{Sampling, generate};
//!
//! let device = Backend::NdArray.device()?;
//! let model = Transformer::new(&presets::depth(1, 300), 1337, &device)?;
//! let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
//! let ids = generate(&model, &[1, 2, 3], 4, &greedy, None, |_| true)?;
//! assert_eq!(ids.len(), 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod corpus;

pub use firebox_compress as compress;
pub use firebox_data as data;
pub use firebox_models as models;
pub use firebox_optim as optim;
pub use firebox_parallel as parallel;
pub use firebox_tensor as tensor;
pub use firebox_train as train;
