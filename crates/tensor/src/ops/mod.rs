//! Differentiable operations for transformers.
//!
//! On the CPU backends each is one fused operation of a burn backend extension with a handwritten backward; on every other device it is
//! composed of burn's own operations. Shapes: `B` batch rows, `T` tokens, `D` model width, `H` heads, `K` key-value heads, `E` head width,
//! `V` vocabulary.

mod activation;
mod attention;
pub mod collective;
mod compute;
mod cross_entropy;
mod deferred;
mod distillation;
mod embedding;
mod expert_parallel;
pub mod experts;
mod extension;
mod factored;
mod fake_quant;
pub(crate) mod formula;
mod hint;
mod linear;
mod low_rank;
mod norm;
mod optim;
mod packed;
mod parallel_linear;
mod preference;
mod ring;
mod seed;
mod sequence;
mod softcap;
pub(crate) mod state;
mod ulysses;
mod vjp;

pub use activation::{dropout, dropout_of, gelu, gelu_exact, quick_gelu, swiglu};
pub use attention::{AttentionConfig, attention};
pub use compute::{Compute, with_compute};
pub use cross_entropy::{LossConfig, cross_entropy, linear_cross_entropy, vocab_cross_entropy};
pub use deferred::{Deferred, defer_weights};
pub use distillation::{LossParts, SoftLoss, SoftTargets, linear_distillation};
pub use embedding::{embedding, vocab_embedding};
pub use factored::{divide_by_root, mean_squares, subtract_scaled};
pub use fake_quant::{FakeQuant, fake_quantize, fake_quantized};
pub use formula::{
    AdEmaMixHyper, AdamWHyper, Formula, LionHyper, MomentumHyper, Number, ScheduleFreeHyper, SgdHyper, SophiaHyper,
    Update,
};
pub use hint::{HintLoss, Relations, hidden_hint, relation_hint};
pub use linear::{Pre, fused_linear, linear, linear_transposed};
pub use low_rank::add_low_rank;
pub use norm::{layer_norm, qk_norm, rms_norm};
pub use optim::{
    add, clip_rows, is_bf16, release, sum_of_squares, to_bf16, to_bf16_from, to_f32, to_host, update, zeros_like,
};
pub use packed::{PackedError, PackedMatrix, Scales, packed_cross_entropy, packed_linear, packed_rows};
pub use parallel_linear::{column_linear, row_linear};
pub use preference::{Preference, linear_preference, preference};
pub use ring::ring_attention;
pub use seed::{carry_gradient, enter, seed};
pub use sequence::{RopeTable, Sequence, rotate_half, zigzag, zigzag_part};
pub use softcap::soft_cap;
pub use state::{Precision, State};
pub use ulysses::{heads_of_rank, ulysses_attention};
