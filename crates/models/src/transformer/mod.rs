//! A transformer, by configuration a causal decoder, GPT-2 (Radford et al., 2019) or Llama (Touvron et al., arXiv:2302.13971), or an encoder, BERT (Devlin et al., arXiv:1810.04805).

mod adapter;
mod cache;
mod config;
mod context;
mod experts;
mod fake_quant;
mod head;
pub mod hf;
mod image;
mod layered;
mod linear;
mod model;
pub mod packed;
mod parallel;
mod preference;
pub mod presets;
mod reduction;
mod rope;
mod tables;
mod teach;
mod trunk;

pub use adapter::{
    Adapted, Adapter, AdapterConfig, AdapterKind, Target, Targets, UnknownTarget, freeze, merge as merge_adapter,
};
pub use cache::KvCache;
pub use config::{
    ConfigError, EncoderConfig, FeedForward, ImageConfig, NormKind, Positions, RopeScaling, TransformerConfig,
};
pub use context::{ContextKind, ContextParallel};
pub use experts::{ExpertWeights, Experts, ExpertsConfig};
pub use fake_quant::Quantizer;
pub use head::{Head, Pool, Pooler, TaskHead};
pub use image::Patches;
pub use model::{Attention, Block, Linear, Mlp, Norm, Transformer};
pub use parallel::{TensorParallel, TensorParallelError};
pub use reduction::{Delta, Layer, LayerDeltas, LowRank, Product, Reduction, Source};
pub use tables::{Embedding, Projection};
pub use teach::Observed;
pub(crate) use trunk::Parts;
pub use trunk::{Trunk, TrunkShape};
