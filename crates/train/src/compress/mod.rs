//! Compressing a trained model: [step by step](pipeline) by methods of `firebox-compress`, each [stage by stage](layerwise).

mod budget;
pub mod layerwise;
pub mod measure;
pub mod pipeline;
mod prune;
mod quantize;
pub mod recipe;
pub mod report;
mod rewrite;
mod shape;
mod training;
