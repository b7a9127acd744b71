//! The teacher: a frozen model that says what it thinks of a batch.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use firebox_data::{Dataset, Loader, Tokenizer};
use firebox_models::transformer::{ContextParallel, Transformer, TransformerConfig};
use firebox_models::{Hints, Lesson, Taught, TokenBatch};
use firebox_parallel::Communicator;
use firebox_tensor::device::is_fused;
use firebox_tensor::ops::{LossParts, Relations, SoftLoss, SoftTargets};

use super::DistillRecipe;
use super::cache::{Cache, Contents};
use crate::TrainError;
use crate::model_io::{load, to_host};
use crate::ranks::{Layout, Ranks};

/// A teacher of one run.
#[derive(Debug)]
pub(crate) struct Teacher {
    model: Arc<Transformer>,
    recipe: DistillRecipe,
    /// The block that each of the student's blocks learns from, where it does.
    blocks: Vec<usize>,
    /// The block whose relations the student's last one learns from, and in how many parts.
    relations: Option<(usize, usize)>,
    /// What the student's blocks are projected to, where it is not their width.
    projected: Option<usize>,
    parts: LossParts,
    /// Its predictions for the samples of the run.
    cache: Option<Cache>,
}

fn fail<T>(what: &'static str, expected: impl Into<String>, got: impl ToString) -> Result<T, TrainError> {
    Err(TrainError::Input { what, expected: expected.into(), got: got.to_string() })
}

impl Teacher {
    /// The teacher of a recipe. Its parameters are read when they are first used: never, on a rank that has no stage with a lesson.
    ///
    /// # Errors
    /// [`TrainError::Input`] for one with other tokens or a shorter context than the student's, or with nothing to compare; as [`load`].
    pub fn new(
        recipe: &DistillRecipe,
        student: &TransformerConfig,
        tokenizer: &Tokenizer,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let loaded = load(Path::new(&recipe.teacher), device)?;
        let config = loaded.model.config();
        if loaded.tokenizer.is_some_and(|theirs| theirs.json() != tokenizer.json()) {
            let expected = "the tokenizer of the corpus; set data.tokenizer to the teacher's tokenizer.json";
            return fail("distill.teacher", expected, "one with another tokenizer");
        }
        if config.vocab_size != student.vocab_size {
            return fail("model.vocab_size", format!("the teacher's {}", config.vocab_size), student.vocab_size);
        }
        if config.context < student.context {
            return fail("model.context", format!("at most the teacher's {}", config.context), student.context);
        }
        if recipe.cache_top_k > config.vocab_size {
            let expected = format!("at most the {} tokens of the vocabulary", config.vocab_size);
            return fail("distill.cache_top_k", expected, recipe.cache_top_k);
        }
        for (what, weight) in [("distill.hidden", recipe.hidden), ("distill.relations", recipe.relations)] {
            if weight > 0.0 && !is_fused(device) {
                return fail(what, "0 on this backend: it is an operation of the CPU backends", weight);
            }
        }
        let (mine, theirs) = (student.n_layers, config.n_layers);
        let blocks =
            if recipe.hidden > 0.0 { (1..=mine).map(|i| (i * theirs / mine).max(1) - 1).collect() } else { vec![] };
        let projected = (recipe.hidden > 0.0 && config.d_model != student.d_model).then_some(config.d_model);
        let relations = relations(recipe, student, config)?;
        let (recipe, model) = (recipe.clone(), Arc::new(loaded.model));
        Ok(Self { model, recipe, blocks, relations, projected, parts: LossParts::default(), cache: None })
    }

    /// The width to which the outputs of the student's blocks are projected.
    pub fn projected(&self) -> Option<usize> {
        self.projected
    }

    /// Whether it teaches hidden states, and whether attention relations.
    pub fn hints(&self) -> [bool; 2] {
        [!self.blocks.is_empty(), self.relations.is_some()]
    }

    /// The same teacher for this rank's tokens of each row.
    ///
    /// # Errors
    /// [`TrainError::Input`] for what the ranks have not together; a shape whose attention they cannot divide.
    pub fn with_ranks(self, context: &Communicator, layout: &Layout) -> Result<Self, TrainError> {
        if self.recipe.hidden > 0.0 && layout.sequence_parallel {
            let expected = "0 with sequence-parallel, which divides the tokens between blocks";
            return fail("distill.hidden", expected, self.recipe.hidden);
        }
        if self.recipe.relations > 0.0 && layout.tp * layout.cp > 1 {
            let expected = "0 with tp or cp, which divide the heads or the tokens that relations are between";
            return fail("distill.relations", expected, self.recipe.relations);
        }
        if layout.cp == 1 {
            return Ok(self);
        }
        self.model.config().validate_context(layout.context, layout.cp, 1)?;
        let rows = ContextParallel { group: context.clone(), kind: layout.context };
        let model = Arc::unwrap_or_clone(self.model).with_context(Some(rows));
        Ok(Self { model: Arc::new(model), ..self })
    }

    /// Makes or opens the file of its predictions for so many samples of a run in `dir`, where the recipe wants one. All ranks must ask.
    ///
    /// # Errors
    /// As [`Cache::open`].
    pub fn prepare(
        &mut self,
        dir: &Path,
        dataset: &Dataset,
        (seed, context, samples): (u64, usize, u64),
        loader: &Loader,
        ranks: Option<&Ranks>,
    ) -> Result<(), TrainError> {
        let DistillRecipe { cache_top_k: k, temperature, ref teacher, .. } = self.recipe;
        if k == 0 || self.cache.is_some() {
            return Ok(());
        }
        let vocab = self.model.config().vocab_size;
        let contents = Contents::new(Path::new(teacher), dataset, (seed, context, vocab), (k, temperature, samples))?;
        // Ranks that divide rows make predictions of whole ones.
        let whole = match self.model.context_parallel() {
            Some(_) => Arc::new(Transformer::clone(&self.model).with_context(None)),
            None => self.model.clone(),
        };
        self.cache = Some(Cache::open(dir, contents, &whole, loader, ranks)?);
        Ok(())
    }

    /// The batch with its lesson; its rows are samples of the run from `first` on.
    pub fn teach(&self, first: u64, batch: TokenBatch) -> TokenBatch {
        let known = self.cache.clone().map(|cache| (cache, batch.sequence.clone()));
        let (model, of_batch, parts) = (self.model.clone(), batch.clone(), self.parts.clone());
        let DistillRecipe { alpha, temperature, hidden, relations: weight, .. } = self.recipe;
        let (blocks, relations) = (self.blocks.clone(), self.relations);
        let lesson = Lesson::new(self.hints().contains(&true), move || {
            if let Some(targets) = known.and_then(|(cache, sequence)| cache.targets(first, &sequence)) {
                let soft = Some(SoftLoss { targets, alpha, temperature, parts: parts.clone() });
                return Taught { soft, parts, ..Taught::default() };
            }
            let seen = model.observe(&of_batch, &blocks, relations.map(|(block, _)| block));
            let targets = SoftTargets::Head {
                hidden: to_host(seen.hidden).into(),
                weight: seen.head,
                softcap: model.config().logit_softcap,
            };
            let hints =
                || Hints { blocks: seen.blocks.into_iter().map(|x| to_host(x).into()).collect(), weight: hidden };
            let of_relations = |(qkv, (_, heads))| {
                (Relations { teacher: to_host(qkv).into(), widths: model.config().qk_widths(), heads }, weight)
            };
            Taught {
                soft: Some(SoftLoss { targets, alpha, temperature, parts: parts.clone() }),
                hidden: (!blocks.is_empty()).then(hints),
                relations: seen.qkv.zip(relations).map(of_relations),
                parts,
            }
        });
        TokenBatch { lesson: Some(lesson), ..batch }
    }

    /// The parts of the losses of this rank's batches since it was asked last.
    pub fn take_parts(&self) -> [f64; 4] {
        self.parts.take()
    }
}

/// The teacher's block of the relations, and the number of their parts.
fn relations(
    recipe: &DistillRecipe,
    student: &TransformerConfig,
    teacher: &TransformerConfig,
) -> Result<Option<(usize, usize)>, TrainError> {
    if recipe.relations == 0.0 {
        return Ok(None);
    }
    let layer = if recipe.relation_layer == 0 { teacher.n_layers } else { recipe.relation_layer };
    if layer > teacher.n_layers {
        let expected = format!("a layer of the teacher, 1 to {}, or 0 for the last", teacher.n_layers);
        return fail("distill.relation_layer", expected, layer);
    }
    let heads = if recipe.relation_heads == 0 { student.n_kv_heads } else { recipe.relation_heads };
    for (whose, config) in [("student", student), ("teacher", teacher)] {
        if let Some(width) = config.qk_widths().into_iter().find(|width| !width.is_multiple_of(heads)) {
            let expected = format!("a divisor of the width of all queries and of all keys, {width} of the {whose}");
            return fail("distill.relation_heads", expected, heads);
        }
    }
    Ok(Some((layer - 1, heads)))
}
