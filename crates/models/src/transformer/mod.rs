//! A causal decoder: GPT-2 (Radford et al., 2019) and Llama (Touvron et al., arXiv:2302.13971) by configuration.

mod cache;
mod config;
mod context;
mod experts;
mod fake_quant;
pub mod hf;
mod layered;
mod model;
pub mod packed;
mod parallel;
pub mod presets;
mod reduction;
mod tables;
mod teach;

pub use cache::KvCache;
pub use config::{
    ConfigError, EncoderConfig, FeedForward, Head, ImageConfig, NormKind, Positions, RopeScaling, TransformerConfig,
};
pub use context::{ContextKind, ContextParallel};
pub use experts::{ExpertWeights, Experts, ExpertsConfig};
pub use fake_quant::Quantizer;
pub use model::{Attention, Block, Linear, Mlp, Norm, Transformer};
pub use parallel::{TensorParallel, TensorParallelError};
pub use reduction::{Delta, Layer, LayerDeltas, LowRank, Product, Reduction, Source};
pub use tables::{Embedding, Projection};
pub use teach::Observed;
