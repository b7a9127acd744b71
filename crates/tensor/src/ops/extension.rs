//! The fused operations as an extension of burn's backends: routing alone, the work is in [`Vjp`](super::vjp::Vjp) implementations.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use super::activation::{Dropout, Gelu, SwiGlu};
use super::attention::{self, Attention};
use super::collective::Collective;
use super::cross_entropy::{self, CrossEntropy};
use super::deferred;
use super::distillation::{self, Distillation};
use super::embedding::Embedding;
use super::experts::{Combine, GroupedLinear, RouterWeights};
use super::fake_quant::FakeQuant;
use super::hint::{HiddenHint, RelationHint};
use super::linear::Linear;
use super::low_rank::LowRank;
use super::norm::{Norm, QkNorm};
use super::packed::PackedLinear;
use super::parallel_linear::ParallelLinear;
use super::seed::{self, Enter};
use super::ulysses::Swap;
use super::vjp::{Vjp, apply};
use crate::adapter::HostBackend;

#[backend_extension(NdArray: cfg(feature = "ndarray"), Flex: cfg(feature = "flex"), Autodiff)]
#[allow(missing_docs)]
pub(crate) trait FusedOps: Backend {
    fn fused_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: Linear,
    ) -> FloatTensor<Self>;
    fn fused_parallel_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: ParallelLinear,
    ) -> FloatTensor<Self>;
    fn fused_packed_linear(
        x: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: PackedLinear,
    ) -> FloatTensor<Self>;
    fn fused_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        up: FloatTensor<Self>,
        op: LowRank,
    ) -> FloatTensor<Self>;
    fn fused_collective(x: FloatTensor<Self>, op: Collective) -> FloatTensor<Self>;
    fn fused_fake_quantize(w: FloatTensor<Self>, steps: FloatTensor<Self>, op: FakeQuant) -> FloatTensor<Self>;
    fn fused_swap(x: FloatTensor<Self>, op: Swap) -> FloatTensor<Self>;
    fn fused_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, b: FloatTensor<Self>, op: Norm) -> FloatTensor<Self>;
    fn fused_qk_norm(
        qkv: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        op: QkNorm,
    ) -> FloatTensor<Self>;
    fn fused_gelu(x: FloatTensor<Self>, op: Gelu) -> FloatTensor<Self>;
    fn fused_swiglu(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_dropout(x: FloatTensor<Self>, op: Dropout) -> FloatTensor<Self>;
    fn fused_attention(qkv: FloatTensor<Self>, op: Attention) -> FloatTensor<Self>;
    fn fused_embedding(table: FloatTensor<Self>, op: Embedding) -> FloatTensor<Self>;
    fn fused_router_weights(logits: FloatTensor<Self>, op: RouterWeights) -> FloatTensor<Self>;
    fn fused_grouped_linear(x: FloatTensor<Self>, w: FloatTensor<Self>, op: GroupedLinear) -> FloatTensor<Self>;
    fn fused_combine(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        op: Combine,
    ) -> FloatTensor<Self>;
    fn fused_linear_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        op: CrossEntropy,
    ) -> FloatTensor<Self>;
    fn fused_linear_distillation(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        op: Distillation,
    ) -> FloatTensor<Self>;
    fn fused_hidden_hint(x: FloatTensor<Self>, projection: FloatTensor<Self>, op: HiddenHint) -> FloatTensor<Self>;
    fn fused_relation_hint(qkv: FloatTensor<Self>, op: RelationHint) -> FloatTensor<Self>;
    fn fused_enter(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_seed(output: FloatTensor<Self>, upstream: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_carry(leaf: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;
    fn fused_deferred(leaf: FloatTensor<Self>) -> FloatTensor<Self>;
}

macro_rules! host_backend {
    ($feature:literal, $backend:ident) => {
        #[cfg(feature = $feature)]
        impl FusedOps for burn::backend::$backend {
            fn fused_linear(
                x: FloatTensor<Self>,
                w: FloatTensor<Self>,
                b: FloatTensor<Self>,
                residual: FloatTensor<Self>,
                norm_weight: FloatTensor<Self>,
                norm_bias: FloatTensor<Self>,
                op: Linear,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, w, b, residual, norm_weight, norm_bias])
            }
            fn fused_parallel_linear(
                x: FloatTensor<Self>,
                w: FloatTensor<Self>,
                b: FloatTensor<Self>,
                residual: FloatTensor<Self>,
                norm_weight: FloatTensor<Self>,
                norm_bias: FloatTensor<Self>,
                op: ParallelLinear,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, w, b, residual, norm_weight, norm_bias])
            }
            fn fused_packed_linear(
                x: FloatTensor<Self>,
                b: FloatTensor<Self>,
                residual: FloatTensor<Self>,
                norm_weight: FloatTensor<Self>,
                norm_bias: FloatTensor<Self>,
                op: PackedLinear,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, b, residual, norm_weight, norm_bias])
            }
            fn fused_low_rank(
                y: FloatTensor<Self>,
                x: FloatTensor<Self>,
                up: FloatTensor<Self>,
                op: LowRank,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([y, x, up])
            }
            fn fused_collective(x: FloatTensor<Self>, op: Collective) -> FloatTensor<Self> {
                op.forward::<Self>([x])
            }
            fn fused_fake_quantize(w: FloatTensor<Self>, steps: FloatTensor<Self>, op: FakeQuant) -> FloatTensor<Self> {
                op.forward::<Self>([w, steps])
            }
            fn fused_swap(x: FloatTensor<Self>, op: Swap) -> FloatTensor<Self> {
                op.forward::<Self>([x])
            }
            fn fused_norm(
                x: FloatTensor<Self>,
                w: FloatTensor<Self>,
                b: FloatTensor<Self>,
                op: Norm,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, w, b])
            }
            fn fused_qk_norm(
                qkv: FloatTensor<Self>,
                q: FloatTensor<Self>,
                k: FloatTensor<Self>,
                op: QkNorm,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([qkv, q, k])
            }
            fn fused_gelu(x: FloatTensor<Self>, op: Gelu) -> FloatTensor<Self> {
                op.forward::<Self>([x])
            }
            fn fused_swiglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
                SwiGlu.forward::<Self>([x])
            }
            fn fused_dropout(x: FloatTensor<Self>, op: Dropout) -> FloatTensor<Self> {
                op.forward::<Self>([x])
            }
            fn fused_attention(qkv: FloatTensor<Self>, op: Attention) -> FloatTensor<Self> {
                attention::forward::<Self>(qkv, &op)
            }
            fn fused_embedding(table: FloatTensor<Self>, op: Embedding) -> FloatTensor<Self> {
                op.forward::<Self>([table])
            }
            fn fused_router_weights(logits: FloatTensor<Self>, op: RouterWeights) -> FloatTensor<Self> {
                op.forward::<Self>([logits])
            }
            fn fused_grouped_linear(
                x: FloatTensor<Self>,
                w: FloatTensor<Self>,
                op: GroupedLinear,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, w])
            }
            fn fused_combine(
                y: FloatTensor<Self>,
                weights: FloatTensor<Self>,
                residual: FloatTensor<Self>,
                op: Combine,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([y, weights, residual])
            }
            fn fused_linear_cross_entropy(
                hidden: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                op: CrossEntropy,
            ) -> FloatTensor<Self> {
                cross_entropy::forward::<Self>(hidden, weight, &op)
            }
            fn fused_linear_distillation(
                hidden: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                teacher: FloatTensor<Self>,
                op: Distillation,
            ) -> FloatTensor<Self> {
                distillation::forward::<Self>(hidden, weight, teacher, &op)
            }
            fn fused_hidden_hint(
                x: FloatTensor<Self>,
                projection: FloatTensor<Self>,
                op: HiddenHint,
            ) -> FloatTensor<Self> {
                op.forward::<Self>([x, projection])
            }
            fn fused_relation_hint(qkv: FloatTensor<Self>, op: RelationHint) -> FloatTensor<Self> {
                op.forward::<Self>([qkv])
            }
            fn fused_enter(x: FloatTensor<Self>) -> FloatTensor<Self> {
                Enter.forward::<Self>([x])
            }
            fn fused_seed(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
                seed::forward::<Self>()
            }
            fn fused_carry(_: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
                grad
            }
            fn fused_deferred(_: FloatTensor<Self>) -> FloatTensor<Self> {
                Self::tensor(vec![], &[0])
            }
        }
    };
}
host_backend!("ndarray", NdArray);
host_backend!("flex", Flex);

impl<B: HostBackend + FusedOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: Linear,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 6>(op, [x, w, b, residual, norm_weight, norm_bias])
    }
    fn fused_parallel_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: ParallelLinear,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 6>(op, [x, w, b, residual, norm_weight, norm_bias])
    }
    fn fused_packed_linear(
        x: FloatTensor<Self>,
        b: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        norm_weight: FloatTensor<Self>,
        norm_bias: FloatTensor<Self>,
        op: PackedLinear,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 5>(op, [x, b, residual, norm_weight, norm_bias])
    }
    fn fused_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        up: FloatTensor<Self>,
        op: LowRank,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 3>(op, [y, x, up])
    }
    fn fused_collective(x: FloatTensor<Self>, op: Collective) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [x])
    }
    fn fused_fake_quantize(w: FloatTensor<Self>, steps: FloatTensor<Self>, op: FakeQuant) -> FloatTensor<Self> {
        apply::<B, C, _, 2>(op, [w, steps])
    }
    fn fused_swap(x: FloatTensor<Self>, op: Swap) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [x])
    }
    fn fused_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, b: FloatTensor<Self>, op: Norm) -> FloatTensor<Self> {
        apply::<B, C, _, 3>(op, [x, w, b])
    }
    fn fused_qk_norm(
        qkv: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        op: QkNorm,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 3>(op, [qkv, q, k])
    }
    fn fused_gelu(x: FloatTensor<Self>, op: Gelu) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [x])
    }
    fn fused_swiglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(SwiGlu, [x])
    }
    fn fused_dropout(x: FloatTensor<Self>, op: Dropout) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [x])
    }
    fn fused_attention(qkv: FloatTensor<Self>, op: Attention) -> FloatTensor<Self> {
        attention::apply::<B, C>(qkv, op)
    }
    fn fused_embedding(table: FloatTensor<Self>, op: Embedding) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [table])
    }
    fn fused_router_weights(logits: FloatTensor<Self>, op: RouterWeights) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [logits])
    }
    fn fused_grouped_linear(x: FloatTensor<Self>, w: FloatTensor<Self>, op: GroupedLinear) -> FloatTensor<Self> {
        apply::<B, C, _, 2>(op, [x, w])
    }
    fn fused_combine(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        op: Combine,
    ) -> FloatTensor<Self> {
        apply::<B, C, _, 3>(op, [y, weights, residual])
    }
    fn fused_linear_cross_entropy(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        op: CrossEntropy,
    ) -> FloatTensor<Self> {
        cross_entropy::apply::<B, C>(hidden, weight, op)
    }
    fn fused_linear_distillation(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        op: Distillation,
    ) -> FloatTensor<Self> {
        distillation::apply::<B, C>(hidden, weight, teacher, &op)
    }
    fn fused_hidden_hint(x: FloatTensor<Self>, projection: FloatTensor<Self>, op: HiddenHint) -> FloatTensor<Self> {
        apply::<B, C, _, 2>(op, [x, projection])
    }
    fn fused_relation_hint(qkv: FloatTensor<Self>, op: RelationHint) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(op, [qkv])
    }
    fn fused_enter(x: FloatTensor<Self>) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(Enter, [x])
    }
    fn fused_seed(output: FloatTensor<Self>, upstream: FloatTensor<Self>) -> FloatTensor<Self> {
        seed::apply::<B, C>(output, upstream)
    }
    fn fused_carry(leaf: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        seed::exchange::<B, C>(&leaf, grad)
    }
    fn fused_deferred(leaf: FloatTensor<Self>) -> FloatTensor<Self> {
        deferred::compute::<B, C>(&leaf)
    }
}
