//! Compressing a trained model: step by step by methods of `firebox-compress`, [stage by stage](layerwise).

pub mod layerwise;
