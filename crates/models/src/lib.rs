//! # firebox-models
//!
//! Transformer models for training on [burn](https://burn.dev): for one device, or divided among ranks by tables that are data ([`Placement`]); no files, no flags.
//! A model is a list of [stages](Staged), so that whoever drives it decides what is kept, recomputed, sharded or sent.
//!
//! - [`transformer`]: one configurable transformer that covers GPT-2 and Llama, from 1M to 70B parameters, with its KV cache and the names and
//!   layouts under which Hugging Face stores it.
//! - [`mae`]: a masked autoencoder of images, whose encoder is the transformer.
//! - [`vq`]: a vector quantizer of images: pictures as short rows of codes, which the transformer can write.
//!
//! ```
//! use firebox_models::transformer::{Transformer, TransformerConfig, presets};
//! use firebox_models::{Staged, TokenBatch};
//! use firebox_tensor::device::Backend;
//!
//! let device = Backend::NdArray.device()?.autodiff();
//! let config = TransformerConfig { vocab_size: 64, context: 16, ..presets::depth(2, 64) };
//! let model = Transformer::new(&config, 1337, &device)?;
//! let batch = TokenBatch::plain(1, 4, vec![1, 2, 3, 4], vec![2, 3, 4, 5]);
//! let loss = model.loss(&batch, Some(0));
//! let grads = loss.backward();
//! assert!(model.embed.weight.val().grad(&grads).is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod clip;
mod image;
mod layered;
mod lesson;
pub mod mae;
mod placement;
mod stage;
pub mod transformer;
pub mod vq;

pub use layered::{Layered, Scaled};
pub use lesson::{Hints, Lesson, Taught};
pub use placement::{Placement, Segment};
pub use stage::{Extra, Flow, Staged, TokenBatch};
