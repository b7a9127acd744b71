//! GGUF, the files of llama.cpp: metadata, a table of tensors, their blocks.
//!
//! The layout (version 3, little-endian) is that of <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod reader;
mod value;
mod writer;

pub use reader::Gguf;
pub use value::{Kind, Value};
pub use writer::Writer;

use std::path::PathBuf;

use crate::blocks::{BlockError, BlockType};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
/// Where tensors begin, unless the file says otherwise.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// ggml's tensors have no more dimensions.
const MAX_DIMS: usize = 4;
/// Nor longer names.
const MAX_NAME: usize = 63;

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape, row-major: rows before columns. (The file has it the other way round.)
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub format: BlockType,
}

impl TensorInfo {
    /// A tensor of this name, shape and format.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, format: BlockType) -> Self {
        Self { name: name.into(), shape: shape.into(), format }
    }

    /// Values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes in the file, without what fills up to the next one.
    ///
    /// # Errors
    /// [`BlockError::Rows`].
    pub fn bytes(&self) -> Result<usize, BlockError> {
        self.format.bytes(self.elements(), self.columns())
    }
}

/// A GGUF file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The disk, or no such file.
    #[error("cannot {operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Content that is no GGUF, of another version, or cut off.
    #[error("{path}: expected {expected}, got {got}{}", at.map_or_else(String::new, |at| format!(" at byte {at}")))]
    Content {
        /// The file.
        path: PathBuf,
        /// What should be there.
        expected: String,
        /// What is.
        got: String,
        /// Where.
        at: Option<usize>,
    },
    /// A tensor that is not there.
    #[error("{path} has no tensor {name}; it has {n}, such as {example}")]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// How many there are.
        n: usize,
        /// The nearest to it.
        example: String,
    },
    /// A tensor that its format cannot hold.
    #[error("{tensor}: {source}")]
    Block {
        /// The tensor.
        tensor: String,
        /// Why.
        source: BlockError,
    },
    /// Tensors that were not announced, or in another order.
    #[error("cannot write {path}: expected {expected}, got {got}")]
    Order {
        /// The file.
        path: PathBuf,
        /// What comes next.
        expected: String,
        /// What was given.
        got: String,
    },
}
