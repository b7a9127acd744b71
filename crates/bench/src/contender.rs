//! Who takes part.

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A contender: a way to train a model or to compute a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// Firebox, as `firebox train` runs it.
    Firebox,
    /// The same with `memory.recompute = "blocks"`: blocks are computed again in backward instead of kept.
    FireboxRecompute,
    /// The same with `memory.optimizer_in_backward`: each parameter is updated as soon as its gradient is complete. There is no clipping then.
    FireboxLean,
    /// The same with `precision.compute = "bf16"`: products, and what backward needs of the layers, in bfloat16.
    FireboxBf16,
    /// PyTorch: scaled_dot_product_attention, fused AdamW.
    TorchEager,
    /// The same model through torch.compile.
    TorchCompile,
    /// PyTorch's eager model under `torch.autocast` to bfloat16.
    TorchBf16,
    /// PyTorch's optimizers in their `foreach` form (optim).
    TorchForeach,
    /// A model of burn's own modules and AdamW on burn-ndarray.
    BurnNdarray,
    /// The same on burn-flex.
    BurnFlex,
    /// Three nested loops on one thread (kernels: sgemm).
    Naive,
    /// ndarray's `dot`, the matrixmultiply crate, on one thread (kernels: sgemm).
    Matrixmultiply,
    /// The machine's peak rate of matrix products; always takes part.
    #[value(skip)]
    Peak,
}

/// What runs a contender's worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// This program.
    Own,
    /// `torch/worker.py` in a Python that has PyTorch.
    Python,
    /// This program, built with the feature `baseline`.
    Baseline,
}

impl Contender {
    /// The name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Firebox => "firebox",
            Self::FireboxRecompute => "firebox-recompute",
            Self::FireboxLean => "firebox-lean",
            Self::FireboxBf16 => "firebox-bf16",
            Self::TorchEager => "torch-eager",
            Self::TorchCompile => "torch-compile",
            Self::TorchBf16 => "torch-bf16",
            Self::TorchForeach => "torch-foreach",
            Self::BurnNdarray => "burn-ndarray",
            Self::BurnFlex => "burn-flex",
            Self::Naive => "naive",
            Self::Matrixmultiply => "matrixmultiply",
            Self::Peak => "peak",
        }
    }

    /// What runs it.
    pub fn runtime(self) -> Runtime {
        match self {
            Self::Firebox
            | Self::FireboxRecompute
            | Self::FireboxLean
            | Self::FireboxBf16
            | Self::Naive
            | Self::Matrixmultiply
            | Self::Peak => Runtime::Own,
            Self::TorchEager | Self::TorchCompile | Self::TorchBf16 | Self::TorchForeach => Runtime::Python,
            Self::BurnNdarray | Self::BurnFlex => Runtime::Baseline,
        }
    }

    /// Whether it trains models.
    pub fn trains(self) -> bool {
        !matches!(self, Self::Naive | Self::Matrixmultiply | Self::TorchForeach | Self::Peak)
    }

    /// Whether it computes kernels by themselves.
    pub fn computes_kernels(self) -> bool {
        !matches!(
            self,
            Self::FireboxRecompute
                | Self::FireboxLean
                | Self::FireboxBf16
                | Self::TorchBf16
                | Self::BurnNdarray
                | Self::BurnFlex
                | Self::Peak
        )
    }

    /// Whether it is a model of burn's own modules.
    pub fn is_burn(self) -> bool {
        self.runtime() == Runtime::Baseline
    }

    /// Whether it multiplies in bfloat16.
    pub fn is_bf16(self) -> bool {
        matches!(self, Self::FireboxBf16 | Self::TorchBf16)
    }

    /// Whether it is PyTorch.
    pub fn is_torch(self) -> bool {
        self.runtime() == Runtime::Python
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where the programs are that contenders run in.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// This program.
    pub own: PathBuf,
    /// A Python that has PyTorch.
    pub python: Option<PathBuf>,
    /// This program, built with the feature `baseline`.
    pub baseline: Option<PathBuf>,
    /// Where torch.compile keeps what it has compiled.
    pub cache: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_everywhere() {
        for contender in Contender::value_variants() {
            let on_the_command_line = contender.to_possible_value().map(|value| value.get_name().to_owned());
            assert_eq!(on_the_command_line.as_deref(), Some(contender.name()));
            let in_json = serde_json::to_string(contender).unwrap_or_default();
            assert_eq!(in_json, format!("\"{contender}\""));
        }
    }
}
