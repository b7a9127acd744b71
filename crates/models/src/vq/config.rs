//! The shape of a vector quantizer.

use serde::{Deserialize, Serialize};

use crate::transformer::{ConfigError, ImageConfig, TrunkShape};

/// The shape of a vector quantizer of images; every value is resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqConfig {
    /// The images, and how they are cut: each patch has one code.
    pub image: ImageConfig,
    /// D: width of encoder and decoder.
    pub d_model: usize,
    /// Blocks of the encoder, and of the decoder.
    pub n_layers: usize,
    /// Heads.
    pub n_heads: usize,
    /// Feed-forward width.
    pub d_ff: usize,
    /// K: number of codes.
    pub codes: usize,
    /// Length of a code's vector. Few dimensions keep all codes in use (arXiv:2110.04627, section 3.2).
    pub code_dim: usize,
    /// What the commitment loss weighs (arXiv:1711.00937, section 3.2: beta).
    pub commitment: f64,
    /// Added to the variance in norms.
    pub norm_eps: f64,
    /// Standard deviation of initial weights.
    pub init_std: f64,
}

impl VqConfig {
    /// Checks that the shape is possible.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        self.image.check_patches()?;
        self.trunk().validate()?;
        if !(2..=1 << 20).contains(&self.codes) {
            return fail("codes", self.codes.to_string(), "must be from 2 to 1048576");
        }
        if !(2..=4096).contains(&self.code_dim) {
            return fail(
                "code_dim",
                self.code_dim.to_string(),
                "must be from 2 to 4096: codes are vectors of length 1",
            );
        }
        if !(self.commitment >= 0.0 && self.commitment.is_finite()) {
            return fail("commitment", self.commitment.to_string(), "must be 0 or more");
        }
        Ok(())
    }

    /// Of encoder and decoder.
    pub(super) fn trunk(&self) -> TrunkShape {
        let Self { d_model, n_layers, n_heads, d_ff, norm_eps, init_std, .. } = *self;
        TrunkShape { d_model, n_layers, n_heads, d_ff, norm_eps, init_std }
    }
}
