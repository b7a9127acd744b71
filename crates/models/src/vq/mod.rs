//! A vector quantizer of images: a picture becomes a short row of codes, and the codes the picture again (VQ-VAE, van den Oord et al., arXiv:1711.00937). Encoder and decoder are vision
//! transformers, and codes are short vectors of length 1, as in ViT-VQGAN (Yu et al., arXiv:2110.04627, section 3).

mod config;
mod model;

pub use config::VqConfig;
pub use model::VqModel;
