//! Images as rows of patches (Dosovitskiy et al., arXiv:2010.11929).
//!
//! Shapes: `B` images, `C` values of a pixel, `p` pixels on a side of a patch, `D` model width, `T` tokens of a row: a class token and patches.
//!
//! A convolution by patches is a product of each patch with a matrix `[C p p, D]`: the embedding, whose rows are those of a patch's values instead of tokens. Which patches a row has, its positions
//! say: an encoder of masked images (He et al., arXiv:2111.06377) is given some of them.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use firebox_tensor::ops::collective::reduce_from;
use firebox_tensor::ops::{self, Pre};

use super::config::ImageConfig;
use super::model::{Init, Transformer};
use super::parallel::TensorParallel;
use crate::placement::Placement;
use crate::stage::TokenBatch;

/// What images have besides the embedding.
#[derive(Module, Debug)]
pub struct Patches {
    /// The class token, `[D]`.
    pub class: Param<Tensor<1>>,
    /// What is added to each patch, `[D]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Init<'_> {
    pub(super) fn patches(&self, image: &ImageConfig) -> Patches {
        let d = self.config.d_model;
        Patches {
            class: self.vector("patches.class", d, self.config.init_std),
            bias: image.bias.then(|| self.constant(d, 0.0)),
        }
    }
}

impl Transformer {
    /// Patches and class tokens as rows `[B, T, D]`, without their positions.
    ///
    /// # Panics
    /// If the batch has not the pixels of its rows, or a row is not a class token and patches of an image.
    pub(super) fn embed_patches(&self, batch: &TokenBatch, image: &ImageConfig, patches: &Patches) -> Tensor<3> {
        let (b, t) = (batch.sequence.batch(), batch.sequence.tokens());
        let pixels = batch.extra.as_ref().map_or(&[][..], |extra| &extra.pixels);
        let device = self.embed.weight.lazy_device();
        let weight = self.embed.weight.val();
        let first = self.parallel().map_or(0, |parallel| self.first_value(parallel));
        let [inputs, d] = weight.dims();
        let rows = patch_rows(pixels, batch.sequence.positions(), [b, t], image, first..first + inputs);
        let x = Tensor::<3>::from_data(TensorData::new(rows, [b, t - 1, inputs]), &device);
        let bias = patches.bias.as_ref().map(Param::val);
        let x = match self.parallel() {
            None => ops::fused_linear(x, Pre::Nothing, weight, bias, None),
            Some(parallel) => {
                let sum = reduce_from(ops::fused_linear(x, Pre::Nothing, weight, None, None), parallel.group());
                bias.map_or(sum.clone(), |bias| sum + bias.reshape([1, 1, d]))
            }
        };
        let class = patches.class.val().reshape([1, 1, d]).expand([b, 1, d]);
        Tensor::cat(vec![class, x], 1)
    }

    /// The first of a patch's values whose rows of the embedding this rank has.
    fn first_value(&self, parallel: &TensorParallel) -> usize {
        let values = self.config().vocab_size;
        let placement: Placement = self.config().placement("embed.weight", parallel.size());
        placement.runs(&[values, 1], parallel.rank(), parallel.size()).first().map_or(0, |run| run.start)
    }
}

/// The values `of` of each patch that the rows have, `[B, T - 1, of]`, from pixels `[B, C, size, size]`.
fn patch_rows(
    pixels: &[f32],
    positions: &[i32],
    [b, t]: [usize; 2],
    image: &ImageConfig,
    of: std::ops::Range<usize>,
) -> Vec<f32> {
    let &ImageConfig { size, patch, channels, .. } = image;
    assert_eq!(
        pixels.len(),
        b * image.values(),
        "images: {b} rows of {channels} x {size} x {size} pixels: give the batch as many"
    );
    let side = size / patch;
    let mut rows = Vec::with_capacity(b * t.saturating_sub(1) * of.len());
    for (pixels, positions) in pixels.chunks_exact(image.values()).zip(positions.chunks_exact(t)) {
        assert_eq!(positions[0], 0, "images: a row begins with the class token, at position 0");
        for &position in &positions[1..] {
            let at = position as usize;
            assert!(
                (1..=side * side).contains(&at),
                "images: patches stand at positions 1..={}, got {at}",
                side * side
            );
            let corner = (at - 1) / side * patch * size + (at - 1) % side * patch;
            // Value (c, y, x) of a patch.
            let value = |i: usize| {
                let (c, y, x) = (i / (patch * patch), i / patch % patch, i % patch);
                pixels[(c * size + y) * size + corner + x]
            };
            rows.extend(of.clone().map(value));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_squares_of_all_channels() {
        let image = ImageConfig { size: 4, patch: 2, channels: 3, bias: true };
        // Pixel (c, y, x) is 100 c + 10 y + x.
        let pixels: Vec<f32> = (0..48).map(|i| (i / 16 * 100 + i / 4 % 4 * 10 + i % 4) as f32).collect();
        let rows = patch_rows(&pixels, &[0, 4, 1], [1, 3], &image, 0..12);
        assert_eq!(rows[..12], [22., 23., 32., 33., 122., 123., 132., 133., 222., 223., 232., 233.]);
        assert_eq!(rows[12..16], [0., 1., 10., 11.]);
        assert_eq!(patch_rows(&pixels, &[0, 4, 1], [1, 3], &image, 3..5), [33., 122., 11., 100.]);
    }
}
