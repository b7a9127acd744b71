//! The shape of two towers.

use serde::{Deserialize, Serialize};

use crate::transformer::{ConfigError, Head, TransformerConfig};

/// The shape of two towers; every value is resolved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipConfig {
    /// The encoder of images.
    pub image: TransformerConfig,
    /// The causal decoder of texts.
    pub text: TransformerConfig,
    /// P: width of what both are projected to.
    pub width: usize,
    /// The logarithm of the factor of the products, at the start.
    pub logit_scale: f64,
    /// The token with which texts end, for programs that look for it.
    pub end: usize,
}

/// log(1 / 0.07): where the factor of the products starts (section 2.5 of the paper).
pub(crate) const LOGIT_SCALE: f64 = 2.659_260_036_932_778;

impl ClipConfig {
    /// Of two towers, with the factor's usual start, for texts that end with the token `end`. What follows their last blocks are hidden states.
    pub fn new(image: TransformerConfig, text: TransformerConfig, width: usize, end: usize) -> Self {
        let hidden = |config: TransformerConfig| TransformerConfig { head: Head::Hidden, tied: true, ..config };
        Self { image: hidden(image), text: hidden(text), width, logit_scale: LOGIT_SCALE, end }
    }

    /// Checks that the shape is possible.
    ///
    /// # Errors
    /// [`ConfigError`] names the first value that is not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |field, got: String, expected: &str| Err(ConfigError { field, got, expected: expected.into() });
        self.image.validate()?;
        self.text.validate()?;
        if self.image.image.is_none() {
            return fail("image", "none".into(), "must be there: { size, patch, channels }");
        }
        if self.text.image.is_some() || self.text.encoder.is_some() {
            return fail("text", "an encoder".into(), "must be a causal decoder");
        }
        for (field, tower) in [("image.head", &self.image), ("text.head", &self.text)] {
            if tower.head != Head::Hidden {
                return fail(field, format!("{:?}", tower.head), "must be hidden");
            }
            if tower.experts.is_some() {
                return fail("n_experts", "some".into(), "must be 0 in a tower of two");
            }
        }
        if !(1..=1 << 20).contains(&self.width) {
            return fail("width", self.width.to_string(), "must be from 1 to 1048576");
        }
        if !self.logit_scale.is_finite() {
            return fail("logit_scale", self.logit_scale.to_string(), "must be a number");
        }
        Ok(())
    }

    /// Number of parameters, without making the model.
    pub fn num_params(&self) -> usize {
        let projections = self.width * (self.image.d_model + self.text.d_model);
        self.image.num_params() + self.text.num_params() + projections + 1
    }
}
