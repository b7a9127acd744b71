//! Models that others trained: folders of Hugging Face, GGUF files, and repositories of the hub, as folders that Firebox and `transformers` load.

pub(crate) mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod vocabulary;

use std::path::{Path, PathBuf};

pub use gguf::GgufContent;
#[cfg(feature = "hub")]
pub use hub::HubError;

use crate::TrainError;
use crate::checkpoint::Dtype;
use crate::export::{Exported, Target, export};

/// What a name on the hub begins with.
const HUB: &str = "hf:";

/// Writes the model at `source` to the folder `out`, which must not exist, with its tokenizer, chat template and what else belongs to it: a folder of Hugging Face (with one file of
/// tensors or several), a `.gguf` file, or `hf:OWNER/NAME`, which is fetched from the hub (`HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` count as everywhere). Each tensor is stored in `dtype`, or
/// as it was; a block format of GGUF as the f32 that it stands for. Tensors go through memory one by one.
///
/// # Errors
/// [`TrainError`]: nothing there, an architecture that is not known, tensors that do not fit (all of them at once), the network, or the disk.
pub fn import(source: &str, dtype: Option<Dtype>, out: impl AsRef<Path>) -> Result<Exported, TrainError> {
    let path = match source.strip_prefix(HUB) {
        #[cfg(feature = "hub")]
        Some(name) => hub::fetch(name)?,
        #[cfg(not(feature = "hub"))]
        Some(name) => {
            let expected = "a folder or a .gguf file: this build has no `hub` feature, which fetches models by name";
            return Err(TrainError::Input { what: "source", expected: expected.into(), got: format!("hf:{name}") });
        }
        None => PathBuf::from(source),
    };
    export(path, Target::Hf(dtype), out)
}
