//! Smaller models: the formats in which quantized weights are stored, the methods that find them, and the files that hold them.
//!
//! A weight is a [`Matrix`] `[out, in]`, as in the papers. [`mod@format`] names what it can be stored in, [`quantize`] has the methods that turn it into a
//! [`Quantized`] matrix, [`prune`] those that zero weights, [`lowrank`] its decompositions; a [`Hessian`] is what they know of
//! a layer's inputs. [`precision`] spends a budget on the layers.
//! [`blocks`] has GGUF's block formats, [`gguf`] its files, [`onnx`] those of ONNX. They work on host memory and know neither a model nor a device.
//!
//! ```
//! use firebox_compress::blocks::BlockType;
//! use firebox_compress::gguf::{Gguf, TensorInfo, Value, Writer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! let path = dir.path().join("model.gguf");
//! let weight: Vec<f32> = (0..512).map(|i| (i as f32).sin()).collect();
//!
//! let metadata = [("general.architecture".to_owned(), Value::Text("llama".into()))];
//! let tensors = vec![TensorInfo::new("output.weight", [2, 256], BlockType::Q4_K)];
//! let mut writer = Writer::create(&path, &metadata, tensors)?;
//! writer.tensor("output.weight", &weight)?;
//! writer.finish()?;
//!
//! let file = Gguf::open(&path)?;
//! let back = file.values("output.weight")?;
//! assert!(weight.iter().zip(&back).all(|(x, y)| (x - y).abs() < 0.1));
//! # Ok(())
//! # }
//! ```

pub mod blocks;
mod eigen;
mod error;
pub mod format;
pub mod gguf;
mod hessian;
mod linalg;
pub mod lowrank;
mod matrix;
pub mod onnx;
pub mod precision;
pub mod prune;
pub mod quantize;
mod quantized;

pub use error::CompressError;
pub use format::{Format, ScalarFormat};
pub use hessian::Hessian;
pub use matrix::Matrix;
pub use quantized::Quantized;
