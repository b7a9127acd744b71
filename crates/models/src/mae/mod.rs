//! Masked autoencoding of images (He et al., arXiv:2111.06377): a vision transformer sees a few of an image's patches, and a light decoder, which training alone needs, makes the others of what it says.
//!
//! Shapes: `B` images, `T` patches of an image, `t` of them that are seen, `P` values of a patch, `D` width of the encoder, `W` of the decoder.

mod config;
mod model;
mod positions;

pub use config::MaeConfig;
pub use model::Mae;
