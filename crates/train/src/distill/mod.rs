//! Knowledge distillation: a student is trained as any model is, and its batches carry a [lesson](firebox_models::Lesson): what a teacher says of their tokens.
//!
//! The teacher's targets travel with the batch to whichever stage needs them, on whichever rank that runs. So a student has every layout, memory option, checkpoint and
//! report of the [`Trainer`](crate::Trainer). Losses look at the positions that have a target and at no others: to them a causal and a masked model are the same.

mod cache;
mod init;
mod teacher;

use serde::{Deserialize, Serialize};

use crate::recipe::RecipeError;

pub(crate) use cache::hash_model;
pub(crate) use init::from_teacher;
pub(crate) use teacher::Teacher;

/// The recipe's `[distill]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillRecipe {
    /// The teacher: a run, a checkpoint, or a folder in Hugging Face's form.
    pub teacher: String,
    /// By what the logits of both are divided before softmax (Hinton et al., arXiv:1503.02531).
    #[serde(default = "temperature")]
    pub temperature: f64,
    /// Share of the loss of the targets; the loss against the teacher's predictions has the rest.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// What the student starts from.
    #[serde(default)]
    pub init: StudentInit,
    /// Weight of the squared error of every block's output against that of an evenly spaced block of the teacher; 0: none.
    #[serde(default)]
    pub hidden: f64,
    /// Weight of the divergence of the last block's attention relations from those of a block of the teacher; 0: none.
    #[serde(default)]
    pub relations: f64,
    /// In how many parts queries, keys and values are cut for relations; 0: as many as the student has key-value heads.
    #[serde(default)]
    pub relation_heads: usize,
    /// The teacher's block of the relations, from 1; 0: the last.
    #[serde(default)]
    pub relation_layer: usize,
    /// Keep of the teacher's predictions the most probable so many tokens of each position, in a file in the run's folder that is made before the first step; 0: the
    /// teacher runs in every step.
    #[serde(default)]
    pub cache_top_k: usize,
}

fn temperature() -> f64 {
    2.0
}

fn alpha() -> f64 {
    0.5
}

/// What a student starts from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StudentInit {
    /// Random values, as any model.
    #[default]
    Random,
    /// The teacher's embeddings, norm, head and evenly spaced layers (DistilBERT, Sanh et al., arXiv:1910.01108, section 3).
    Teacher,
}

impl DistillRecipe {
    /// Checks what can be checked without the teacher.
    pub(crate) fn validate(&self) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: String| Err(RecipeError::Value { key, expected: expected.into(), got });
        if self.teacher.is_empty() {
            return fail("distill.teacher", "the path of a checkpoint", "nothing".into());
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return fail("distill.temperature", "a number above 0", self.temperature.to_string());
        }
        if !(0.0..=1.0).contains(&self.alpha) {
            return fail("distill.alpha", "a share from 0 to 1", self.alpha.to_string());
        }
        for (key, weight) in [("distill.hidden", self.hidden), ("distill.relations", self.relations)] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return fail(key, "a weight, or 0 for none", weight.to_string());
            }
        }
        if self.cache_top_k > 0 && self.hidden + self.relations > 0.0 {
            let expected = "0 with distill.hidden or distill.relations, for which the teacher runs in every step";
            return fail("distill.cache_top_k", expected, self.cache_top_k.to_string());
        }
        Ok(())
    }
}
