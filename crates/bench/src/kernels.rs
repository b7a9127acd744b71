//! `bench kernels`: single operations.

use serde::{Deserialize, Serialize};

/// An operation at a shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {}
