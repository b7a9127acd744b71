//! Images and what belongs to them: classes, captions. Folders of files, rows of .jsonl with paths, rows of .parquet with the bytes themselves.
//!
//! Files are decoded once and kept as bytes, `[C, size, size]`: four times less than the numbers that models take, which [`Preprocess::normalize`] makes for a batch.
//! Shapes: `C` channels (3, or 1 for grey), `size` pixels on a side.

mod classes;
mod decode;
mod preprocess;
mod resize;
mod rows;
mod write;

pub use classes::{Classes, classes_of};
pub use decode::{MAX_SIDE, decode};
pub use preprocess::{Fit, Preprocess};
pub use resize::{Filter, Raster};
pub use rows::{ImageRow, read_images};
pub use write::png;
