//! A student's run.

use burn::tensor::Device;
use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_models::transformer::hf::Entry;
use firebox_tensor::ops::LossParts;

use super::Trainer;
use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::distill::Teacher;
use crate::model_io::from_entries;
use crate::observe::DistillRecord;
use crate::task::Model;
use crate::task::device_of;

/// The projections to the teacher's width, which belong to the training and not to the student.
pub(super) const PROJECTIONS: &str = "distill.safetensors";

/// The projections of a student of this shape, as they are in a file.
fn projections(layers: usize, width: usize, projected: usize) -> Vec<Entry> {
    let entry = |i: usize| {
        let name = format!("projections.{i}.weight");
        Entry::whole(&name, &[width, projected], &name)
    };
    (0..layers).map(entry).collect()
}

impl<M: Model> Trainer<'_, M> {
    /// Makes or opens the file of the teacher's predictions, where there is to be one. All ranks must ask.
    pub(super) fn prepare_lessons(&mut self) -> Result<(), TrainError> {
        let (seed, context) = (self.recipe.seed, self.task.tokens_per_row());
        let samples = (0..self.recipe.train.steps).map(|step| self.recipe.train.rows_at(step) as u64).sum();
        let Self { teacher: Some(teacher), dir, task, ranks, .. } = self else { return Ok(()) };
        let Some((dataset, loader)) = task.language() else { return Ok(()) };
        teacher.prepare(dir, dataset, (seed, context, samples), loader, ranks.as_ref())
    }

    /// The micro-batch of the current step with its lesson, where there is a teacher.
    pub(super) fn taught(&self, micro_batch: usize, batch: TokenBatch) -> TokenBatch {
        match &self.teacher {
            Some(teacher) => {
                let first = self.state.samples + (micro_batch * self.recipe.train.micro_rows()) as u64;
                teacher.teach(first, batch)
            }
            None => batch,
        }
    }

    /// The same model with the projections of a checkpoint, where it has some.
    pub(super) fn with_projections_of(&self, model: M, checkpoint: &Checkpoint) -> Result<M, TrainError> {
        let projected = self.teacher.as_ref().and_then(Teacher::projected);
        let Some(projected) = projected.filter(|_| checkpoint.contains(PROJECTIONS)) else { return Ok(model) };
        let (seed, device) = (self.recipe.seed, device_of(&model));
        let model = model.map_transformer(|model| project(model, Some(projected), seed, &device));
        let entries = projections_of(&model, projected);
        from_entries(model, entries, checkpoint.tensors(PROJECTIONS)?)
    }

    /// The parts of the losses of this rank's batches in the step that was done.
    pub(super) fn loss_parts(&self, scale: f64) -> [f64; 4] {
        self.teacher.as_ref().map(Teacher::take_parts).unwrap_or_default().map(|part| part / scale)
    }

    /// The parts of a step's loss, of all ranks, where there is a teacher. All must ask.
    pub(super) fn distilled(&self, mine: [f64; 4]) -> Result<Option<DistillRecord>, TrainError> {
        let Some(teacher) = &self.teacher else { return Ok(None) };
        let mut sum = mine;
        if let Some(ranks) = &self.ranks {
            let all = ranks.numbers(mine.map(f64::to_bits))?;
            let of_all = |i: usize| all.iter().map(|parts| f64::from_bits(parts[i])).sum::<f64>();
            sum = std::array::from_fn(|i| of_all(i) / ranks.with_the_same_loss() as f64);
        }
        let [hidden, relations] = teacher.hints();
        Ok(Some(DistillRecord {
            hard_loss: sum[LossParts::HARD],
            soft_loss: sum[LossParts::SOFT],
            hidden_loss: hidden.then_some(sum[LossParts::HIDDEN]),
            relation_loss: relations.then_some(sum[LossParts::RELATIONS]),
        }))
    }
}

/// Those of a model that is a student.
pub(super) fn projections_of<M: Model>(model: &M, projected: usize) -> Vec<Entry> {
    let config = model.transformer().map(Transformer::config);
    config.map(|config| projections(config.n_layers, config.d_model, projected)).unwrap_or_default()
}

/// The model with projections of its blocks to this width, unless it has them already.
pub(super) fn project(model: Transformer, width: Option<usize>, seed: u64, device: &Device) -> Transformer {
    match width.filter(|_| model.projections.is_empty()) {
        Some(width) => model.with_projections(width, seed, device),
        None => model,
    }
}
