//! firebox-train

pub mod checkpoint;
pub mod observe;
