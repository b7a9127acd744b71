//! The shape of a masked autoencoder.

use crate::transformer::{ConfigError, Head, ImageConfig, TransformerConfig, TrunkShape};

/// The shape of a masked autoencoder; every value is resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct MaeConfig {
    /// The encoder: of images, without a head.
    pub encoder: TransformerConfig,
    /// The decoder.
    pub decoder: TrunkShape,
    /// The share of patches that the encoder does not see.
    pub mask_ratio: f64,
    /// Whether a patch's values are to be given as they are apart from their mean and deviation (section 4.1, "Reconstruction target").
    pub normalize: bool,
}

impl MaeConfig {
    /// Checks that the shape is possible.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        self.encoder.validate()?;
        self.decoder.validate()?;
        let Some(image) = self.encoder.image else {
            return fail("image", "none".into(), "must be there: what is masked are its patches");
        };
        image.check_patches()?;
        if self.encoder.head != Head::Hidden {
            return fail("head", format!("{:?}", self.encoder.head), "must be hidden: a decoder follows");
        }
        for (field, width) in [("d_model", self.encoder.d_model), ("decoder_width", self.decoder.d_model)] {
            if !width.is_multiple_of(4) {
                return fail(
                    field,
                    width.to_string(),
                    "must be a multiple of 4: positions are sines and cosines of both sides",
                );
            }
        }
        if !(0.0..1.0).contains(&self.mask_ratio) || !(1..image.patches()).contains(&self.seen()) {
            let got = format!("{} of {} patches", self.mask_ratio, image.patches());
            return fail("mask_ratio", got, "must leave at least one patch to see, and one to make");
        }
        if self.normalize && image.patch_values() < 2 {
            return fail(
                "normalize",
                "true".into(),
                "must be false with patches of one value, which have no deviation",
            );
        }
        Ok(())
    }

    /// The images.
    ///
    /// # Panics
    /// Of a shape that is not [valid](Self::validate).
    pub fn image(&self) -> ImageConfig {
        // PANIC: as documented.
        self.encoder.image.expect("a masked autoencoder of images")
    }

    /// t: how many patches the encoder sees.
    pub fn seen(&self) -> usize {
        let patches = self.encoder.image.map_or(0, |image| image.patches());
        (patches as f64 * (1.0 - self.mask_ratio)) as usize
    }
}
