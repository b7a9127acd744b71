//! The teacher: a frozen model that says what it thinks of a batch.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use firebox_data::Tokenizer;
use firebox_models::decoder::{ContextParallel, Decoder, DecoderConfig};
use firebox_models::{Lesson, Taught, TokenBatch};
use firebox_parallel::Communicator;
use firebox_tensor::ops::{LossParts, SoftLoss, SoftTargets};

use super::DistillRecipe;
use crate::TrainError;
use crate::model_io::{load, to_host};
use crate::ranks::Layout;

/// A teacher of one run.
#[derive(Debug)]
pub(crate) struct Teacher {
    model: Arc<Decoder>,
    alpha: f64,
    temperature: f64,
    parts: LossParts,
}

impl Teacher {
    /// The teacher of a recipe. Its parameters are read when they are first used: never, on a rank that has no stage with a lesson.
    ///
    /// # Errors
    /// [`TrainError::Input`] for one with other tokens or a shorter context than the student's; as [`load`].
    pub fn new(
        recipe: &DistillRecipe,
        student: &DecoderConfig,
        tokenizer: &Tokenizer,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let fail = |what, expected: String, got: String| Err(TrainError::Input { what, expected, got });
        let loaded = load(Path::new(&recipe.teacher), device)?;
        let config = loaded.model.config();
        if loaded.tokenizer.is_some_and(|theirs| theirs.json() != tokenizer.json()) {
            let expected = "the tokenizer of the corpus; set data.tokenizer to the teacher's tokenizer.json".into();
            return fail("distill.teacher", expected, "one with another tokenizer".into());
        }
        if config.vocab_size != student.vocab_size {
            let expected = format!("the teacher's {}", config.vocab_size);
            return fail("model.vocab_size", expected, student.vocab_size.to_string());
        }
        if config.context < student.context {
            let expected = format!("at most the teacher's {}", config.context);
            return fail("model.context", expected, student.context.to_string());
        }
        let DistillRecipe { alpha, temperature, .. } = *recipe;
        Ok(Self { model: Arc::new(loaded.model), alpha, temperature, parts: LossParts::default() })
    }

    /// The same teacher for this rank's tokens of each row.
    ///
    /// # Errors
    /// A shape whose attention the ranks cannot divide.
    pub fn with_ranks(self, context: &Communicator, layout: &Layout) -> Result<Self, TrainError> {
        if layout.cp == 1 {
            return Ok(self);
        }
        self.model.config().validate_context(layout.context, layout.cp, 1)?;
        let rows = ContextParallel { group: context.clone(), kind: layout.context };
        let model = Arc::unwrap_or_clone(self.model).with_context(Some(rows));
        Ok(Self { model: Arc::new(model), ..self })
    }

    /// The batch with its lesson.
    pub fn teach(&self, batch: TokenBatch) -> TokenBatch {
        let (model, of_batch, parts) = (self.model.clone(), batch.clone(), self.parts.clone());
        let (alpha, temperature) = (self.alpha, self.temperature);
        let lesson = Lesson::new(false, move || {
            let targets = SoftTargets::Head {
                hidden: to_host(model.hidden(&of_batch)).into(),
                weight: model.head.as_ref().unwrap_or(&model.embed).weight.val(),
                softcap: model.config().logit_softcap,
            };
            Taught { soft: Some(SoftLoss { targets, alpha, temperature, parts }), ..Taught::default() }
        });
        TokenBatch { lesson: Some(lesson), ..batch }
    }

    /// The parts of the losses of this rank's batches since it was asked last.
    pub fn take_parts(&self) -> [f64; 4] {
        self.parts.take()
    }
}
