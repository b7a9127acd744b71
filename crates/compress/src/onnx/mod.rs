//! ONNX models: a graph as a protobuf message, and its weights in a file beside it.
//!
//! Of the format (<https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>) this writes what a transformer needs. A [`Writer`] gets nodes and weights as a program
//! makes them; weights go to the disk at once, so that no more than one is in memory, and the graph, which is small, when it is finished.
//!
//! ```
//! use firebox_compress::onnx::{Attribute, Dim, Element, Writer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! let mut writer = Writer::create(dir.path(), "product")?;
//! let rows = [Dim::Named("rows"), Dim::Fixed(2)];
//! writer.input("x", Element::F32, &rows);
//! writer.weight("w", Element::F32, &[2, 2], &[0u8; 16])?;
//! let product = writer.node("MatMul", &["x", "w"], &[]);
//! writer.output("y", &product, Element::F32, &rows);
//! writer.finish()?;
//! assert!(dir.path().join("model.onnx").is_file());
//! # Ok(())
//! # }
//! ```

mod proto;
mod writer;

pub use writer::Writer;

use std::path::PathBuf;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floats.
    F32 = 1,
    /// 8-bit integers.
    I8 = 3,
    /// 64-bit integers.
    I64 = 7,
    /// Yes or no.
    Bool = 9,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::I8 | Self::Bool => 1,
            Self::I64 => 8,
        }
    }
}

/// A dimension of an input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim<'a> {
    /// Always the same.
    Fixed(usize),
    /// One that differs between calls.
    Named(&'a str),
}

/// A parameter of a node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attribute<'a> {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f32),
    /// Integers.
    Ints(&'a [i64]),
}

/// A model that cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// The disk.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A weight whose bytes are not those of its shape.
    #[error("cannot write the weight {name}: expected {expected} bytes, got {got}")]
    Bytes {
        /// Its name.
        name: String,
        /// Bytes of its shape.
        expected: usize,
        /// What was given.
        got: usize,
    },
}
