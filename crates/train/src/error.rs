//! What can go wrong in a run.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::observe::ObserveError;
use crate::recipe::RecipeError;

/// Why a run could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The recipe.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The text.
    #[error(transparent)]
    Data(#[from] firebox_data::DataError),
    /// The model's shape.
    #[error(transparent)]
    Model(#[from] firebox_models::transformer::ConfigError),
    /// A checkpoint's `config.json`.
    #[error(transparent)]
    Architecture(#[from] firebox_models::transformer::hf::HfError),
    /// The optimizer.
    #[error(transparent)]
    Optim(#[from] firebox_optim::OptimError),
    /// Other ranks.
    #[error(transparent)]
    Comm(#[from] firebox_parallel::CommError),
    /// A checkpoint.
    #[error("{}", .0.one_line())]
    Checkpoint(#[from] CheckpointError),
    /// What compressed a model, or a compressed model.
    #[error(transparent)]
    Compress(#[from] firebox_compress::CompressError),
    /// Packed weights.
    #[error(transparent)]
    Packed(#[from] firebox_models::transformer::packed::PackedWeightError),
    /// A model that cannot be exported.
    #[error(transparent)]
    Export(#[from] crate::export::ExportError),
    /// A GGUF file that cannot be imported.
    #[error(transparent)]
    Gguf(#[from] crate::import::GgufContent),
    /// The Hugging Face hub.
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] crate::import::HubError),
    /// A file of the run folder.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// A file or folder.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file in which activations wait for backward.
    #[error("cannot {operation} the activations in {}: {source}; make room there, or set memory.offload = \"none\"", path.display())]
    Offload {
        /// What was attempted.
        operation: &'static str,
        /// The folder of the file, which has no name.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The run folder holds another run.
    #[error("{} already holds a run: continue it with --resume, or choose another folder with --out", .0.display())]
    RunExists(PathBuf),
    /// Something to be continued does not fit.
    #[error("cannot continue {}: {expected}, got {got}", path.display())]
    Resume {
        /// The run.
        path: PathBuf,
        /// What was expected.
        expected: String,
        /// What is there.
        got: String,
    },
    /// Something in the request that cannot be done.
    #[error("{what}: expected {expected}, got {got}")]
    Input {
        /// The input at fault.
        what: &'static str,
        /// What would work.
        expected: String,
        /// What was given.
        got: String,
    },
    /// Loss or gradients were not finite too often in a row.
    #[error(
        "training diverged: loss or gradients were not finite in {in_a_row} steps in a row, the last of them step {step}; the parameters are \
         those of step {last_good}: lower optimizer.lr, lengthen the warmup, or set optimizer.clip"
    )]
    Diverged {
        /// The last step.
        step: u64,
        /// Bad steps in a row.
        in_a_row: u64,
        /// The last step that changed the parameters.
        last_good: u64,
    },
    /// A gradient that was not finite, found when a part of the parameters was updated already.
    #[error(
        "a gradient was not finite in step {step}, and optimizer_in_backward had updated a part of the parameters by then: go on from the last \
         checkpoint with --resume and a lower optimizer.lr, or without memory.optimizer_in_backward, which skips such a step"
    )]
    HalfUpdated {
        /// The step.
        step: u64,
    },
}

impl TrainError {
    /// Whether the cause lies in what the user gave (arguments, recipe, files), so that the exit code is 2.
    pub fn is_input(&self) -> bool {
        !matches!(self, TrainError::Diverged { .. } | TrainError::HalfUpdated { .. } | TrainError::Comm(_))
    }

    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }
}
