//! Images as rows of patches.
//!
//! An image is `[C, S, S]`, a value per channel and pixel; its patches are `[T, P P C]`, in raster order, each with its pixels in raster order and a pixel's channels side by side (the
//! order of He et al., arXiv:2111.06377, in the authors' code and in transformers' `ViTMAEForPreTraining`).

use crate::transformer::{ConfigError, ImageConfig};

impl ImageConfig {
    /// Patches on a side.
    pub fn grid(&self) -> usize {
        self.size / self.patch.max(1)
    }

    /// Checks that images can be cut into whole patches.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not possible.
    pub fn check_patches(&self) -> Result<(), ConfigError> {
        let fail = |field, got: usize, expected: String| Err(ConfigError { field, got: got.to_string(), expected });
        for (field, value) in [("image.size", self.size), ("image.patch", self.patch)] {
            if !(1..=4096).contains(&value) {
                return fail(field, value, "must be from 1 to 4096".into());
            }
        }
        if !self.size.is_multiple_of(self.patch) {
            return fail("image.patch", self.patch, format!("must divide image.size = {}", self.size));
        }
        if self.channels != 1 && self.channels != 3 {
            return fail("image.channels", self.channels, "must be 1 (grey) or 3".into());
        }
        Ok(())
    }

    /// For each value of patches the place of the same value in an image.
    fn places(&self) -> impl Iterator<Item = usize> {
        let Self { size, patch, channels, .. } = *self;
        let grid = self.grid();
        (0..grid * grid).flat_map(move |at| {
            let (top, left) = (at / grid * patch, at % grid * patch);
            (0..patch * patch).flat_map(move |pixel| {
                let (y, x) = (top + pixel / patch, left + pixel % patch);
                (0..channels).map(move |channel| (channel * size + y) * size + x)
            })
        })
    }

    /// `[B, C, S, S] -> [B, T, P P C]`
    ///
    /// # Panics
    /// If `images` are no whole images.
    pub fn to_patches(&self, images: &[f32]) -> Vec<f32> {
        assert!(images.len().is_multiple_of(self.values()), "patches: {} values of {self:?}", images.len());
        let places: Vec<usize> = self.places().collect();
        images.chunks_exact(self.values()).flat_map(|image| places.iter().map(|&at| image[at])).collect()
    }

    /// `[B, T, P P C] -> [B, C, S, S]`
    ///
    /// # Panics
    /// If `patches` are no whole images.
    pub fn to_images(&self, patches: &[f32]) -> Vec<f32> {
        assert!(patches.len().is_multiple_of(self.values()), "images: {} values of {self:?}", patches.len());
        let (places, mut images) = (self.places().collect::<Vec<usize>>(), vec![0.0; patches.len()]);
        for (image, patches) in images.chunks_exact_mut(self.values()).zip(patches.chunks_exact(self.values())) {
            for (&at, &value) in places.iter().zip(patches) {
                image[at] = value;
            }
        }
        images
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_in_raster_order_and_make_the_image_again() {
        let config = ImageConfig { size: 4, patch: 2, channels: 3, bias: true };
        // The value says channel, row and column.
        let image: Vec<f32> = (0..48).map(|i| (i / 16 * 100 + i % 16 / 4 * 10 + i % 4) as f32).collect();
        let patches = config.to_patches(&image);
        assert_eq!(patches[..6], [0.0, 100.0, 200.0, 1.0, 101.0, 201.0]);
        assert_eq!(patches[12..15], [2.0, 102.0, 202.0], "the patch to the right");
        assert_eq!(patches[24..27], [20.0, 120.0, 220.0], "the patch below");
        assert_eq!(config.to_images(&patches), image);
        let bad = ImageConfig { patch: 3, ..config };
        assert!(bad.check_patches().is_err_and(|error| error.field == "image.patch"));
    }
}
