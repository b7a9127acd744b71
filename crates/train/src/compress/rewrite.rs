//! A model written as its stages come.

use std::collections::BTreeMap;
use std::path::Path;

use firebox_compress::ScalarFormat;
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;

use super::layerwise::{Layerwise, Stage};
use super::pipeline::{Pipeline, Progress, Source};
use crate::TrainError;
use crate::quantized::{Weights, save};

/// Formats of parameters, by path.
pub(super) type Formats = BTreeMap<String, ScalarFormat>;

impl Pipeline<'_> {
    /// Writes the model into the folder `into` as `edit` leaves its stages: what `formats` names as it gives it, the rest in f32. No more than a stage is in memory.
    pub(super) fn rewrite(
        &self,
        source: &Source,
        into: &Path,
        formats: &Formats,
        batches: Vec<TokenBatch>,
        on: &mut dyn FnMut(Progress<'_>),
        mut edit: impl FnMut(&Transformer, &mut Stage) -> Result<BTreeMap<String, Weights>, TrainError>,
    ) -> Result<(), TrainError> {
        let mut walk = Layerwise::new(|| source.model(&self.device), batches);
        let (mut ready, mut done) = (BTreeMap::new(), 0);
        save(into, &source.config, formats, source.tokenizer.as_ref(), |name| {
            while !ready.contains_key(name) {
                let mut made = BTreeMap::new();
                let stage = walk.next(|model, stage| {
                    made = edit(model, stage)?;
                    Ok(())
                })?;
                // PANIC: `save` asks for the model's parameters, and every one is of a stage.
                let stage = stage.unwrap_or_else(|| panic!("no stage has the parameter {name}"));
                ready.extend(stage.parameters.into_iter().map(|(name, p)| (name, Weights::Full(p.values))));
                ready.extend(made);
                done += 1;
                on(Progress::Stage { done, of: source.config.n_layers + 2 });
            }
            // PANIC: it was just found.
            Ok(ready.remove(name).expect("a parameter that is ready"))
        })
    }
}
