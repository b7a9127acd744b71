//! The run's view of the held-out text: evaluations and samples.

use std::collections::HashMap;

use firebox_models::TokenBatch;
use firebox_models::transformer::Transformer;
use firebox_optim::values;
use firebox_parallel::Communicator;

use super::{LastEval, Trainer};
use crate::TrainError;
use crate::engine::losses_by_stage;
use crate::evaluate::{Evaluation, Tally, tallies};
use crate::model_io::{set_parameters, to_host};
use crate::observe::{EvalRecord, Event, Observer};
use crate::ranks::{Pipe, Ranks, Shards};
use crate::task::{HeldOut, Model};

/// Batches that a rank evaluates at once, where it has not the whole model.
const AT_ONCE: usize = 8;

impl<M: Model> Trainer<'_, M> {
    /// Evaluates on the held-out text (at most `limit` batches), tells observers, lets the model write.
    pub(super) fn evaluate(&mut self, limit: Option<u64>, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if !self.task.has_held_out() {
            return Ok(());
        }
        let model = self.averaged()?;
        let model = if self.shards.is_some() { model } else { model.valid() };
        let Evaluation { loss, bpb, .. } = self.evaluated(&model, self.shards.as_ref(), limit)?;
        let average = match (&self.average, &self.shards) {
            (Some(average), Some(shards)) => Some(self.evaluated(&model, Some(&shards.averaged(average)), limit)?),
            (Some(average), None) => Some(self.evaluated(&average.apply(self.model().clone()).valid(), None, limit)?),
            (None, _) => None,
        };
        let (samples, pictures, metrics) = (self.task.has_samples(), self.task.has_pictures(), self.task.has_metrics());
        let (samples, pictures) = (samples && loss.is_finite(), pictures && loss.is_finite());
        let whole = if samples || pictures || metrics { self.whole(model)?.map(|model| model.valid()) } else { None };
        let found = match &whole {
            Some(model) if metrics => self.task.metrics(model, limit)?,
            _ => vec![],
        };
        self.state.metrics = found.into_iter().collect();
        let record = EvalRecord {
            step: self.state.step,
            tokens: self.state.tokens,
            val_loss: loss,
            val_bpb: bpb,
            val_loss_average: average.map(|found| found.loss),
            sparsity: self.sparsity(),
            metrics: self.state.metrics.clone(),
        };
        observer.on_event(&Event::Evaluated(&record))?;
        self.state.last_eval = Some(LastEval { step: self.state.step, loss, bpb, whole: limit.is_none() });
        if loss.is_finite() && self.state.best_loss.is_none_or(|best| loss < best) {
            self.state.best_loss = Some(loss);
            self.state.best_step = Some(self.state.step);
            self.state.evals_without_gain = 0;
        } else {
            self.state.evals_without_gain += 1;
        }
        let Some(model) = whole else { return Ok(()) };
        if samples && let Some(text) = self.task.sample(&model)? {
            observer.on_event(&Event::Sampled { step: self.state.step, text: &text })?;
        }
        if pictures && let Some(png) = self.task.picture(&model)? {
            observer.on_event(&Event::Pictured { step: self.state.step, png: &png })?;
        }
        Ok(())
    }

    /// Ranks evaluate batches in turns.
    fn evaluated(&self, model: &M, shards: Option<&Shards<M>>, limit: Option<u64>) -> Result<Evaluation, TrainError> {
        let batches = self.task.held_out(self.recipe.train.micro_rows());
        let batches = batches.take(limit.map_or(usize::MAX, |n| n as usize));
        let Some(ranks) = &self.ranks else {
            return Ok(Tally::evaluation(&tallies(model, batches, |batch| batch)));
        };
        if let Some(pipe) = ranks.pipe() {
            return self.evaluated_in_a_pipe(ranks, pipe, model, batches);
        }
        if let Some(shards) = shards {
            return self.evaluated_by_stage(ranks, shards, batches);
        }
        let mut turns = Turns::new(ranks, batches);
        let mine = tallies(model, &mut turns, |batch| ranks.tokens_of(&batch));
        Self::of_all(ranks, mine, &turns)
    }

    /// Puts together what each rank has found of its batches, and of its tokens of them.
    fn of_all<I>(ranks: &Ranks, mine: Vec<Tally>, turns: &Turns<'_, I>) -> Result<Evaluation, TrainError> {
        let mut mine: Vec<[f64; 3]> = mine.into_iter().take(turns.mine).map(Tally::into).collect();
        let nats: Vec<f64> = mine.iter().map(|[nats, ..]| *nats).collect();
        for ([nats, ..], sum) in mine.iter_mut().zip(ranks.over_context(&nats)?) {
            *nats = sum;
        }
        let all: Vec<Tally> = ranks.in_turns(&mine, turns.total)?.into_iter().map(Tally::from).collect();
        Ok(Tally::evaluation(&all))
    }

    /// The same where ranks have parts of the model: each pipeline takes its turns of the batches, a few at a time.
    fn evaluated_in_a_pipe(
        &self,
        ranks: &Ranks,
        pipe: &Pipe,
        model: &M,
        batches: impl Iterator<Item = HeldOut>,
    ) -> Result<Evaluation, TrainError> {
        let pipeline = pipe.usual();
        let (mut turns, mut mine) = (Turns::new(ranks, batches), vec![]);
        let mut waiting: Vec<(Tally, TokenBatch)> = vec![];
        let mut run = |waiting: &mut Vec<(Tally, TokenBatch)>| -> Result<(), TrainError> {
            let (tallies, batches): (Vec<Tally>, Vec<TokenBatch>) = waiting.drain(..).unzip();
            let losses = pipeline.losses(model, &batches, &pipe.group)?;
            mine.extend(tallies.into_iter().zip(losses).map(|(tally, loss)| tally.with_loss(loss)));
            Ok(())
        };
        for held in &mut turns {
            waiting.push((Tally::of(&held), ranks.tokens_of(&held.batch)));
            if waiting.len() == AT_ONCE {
                run(&mut waiting)?;
            }
        }
        run(&mut waiting)?;
        Self::of_all(ranks, mine, &turns)
    }

    /// The same where ranks have divided the parameters: they bring each stage together for a few batches of each.
    fn evaluated_by_stage(
        &self,
        ranks: &Ranks,
        shards: &Shards<M>,
        batches: impl Iterator<Item = HeldOut>,
    ) -> Result<Evaluation, TrainError> {
        let (mut turns, mut mine) = (Turns::new(ranks, batches), vec![]);
        loop {
            let before = turns.total;
            let of_rank = turns.by_ref().take(AT_ONCE);
            let of_rank = of_rank.map(|held| (Tally::of(&held), ranks.tokens_of(&held.batch)));
            let (tallies, tokens): (Vec<Tally>, Vec<TokenBatch>) = of_rank.unzip();
            if turns.total == before {
                break;
            }
            let losses = losses_by_stage(self.model().n_stages(), &tokens, &mut shards.gather(ranks))?;
            mine.extend(tallies.into_iter().zip(losses).map(|(tally, loss)| tally.with_loss(loss)));
        }
        Self::of_all(ranks, mine, &turns)
    }

    /// The whole of a model, on the rank that writes and speaks alone. All ranks must ask.
    pub(super) fn whole(&self, model: M) -> Result<Option<M>, TrainError> {
        let Some(ranks) = &self.ranks else { return Ok(Some(model)) };
        // The first copy of the model is enough.
        let copies = model.transformer().and_then(Transformer::expert_group).map_or(1, Communicator::size);
        let model = match &self.shards {
            Some(shards) if ranks.is_first_copy() => shards.whole(ranks)?,
            Some(_) => None,
            None => Some(model).filter(|_| ranks.copy() < copies),
        };
        let Some(model) = model else { return Ok(None) };
        let model = model.map_transformer(|model| model.with_context(None));
        let Some(model) = self.whole_matrices(ranks, model)? else { return Ok(None) };
        let Some(model) = self.whole_experts(ranks, model)? else { return Ok(None) };
        let Some(pipe) = ranks.pipe() else { return Ok(Some(model)) };
        let pipeline = pipe.usual();
        let empty = model.empty(self.recipe.seed)?;
        pipeline.gather(&model, empty, 0, &pipe.group)
    }

    /// The parts of the matrices put together, on the first of the ranks that have divided them.
    fn whole_matrices(&self, ranks: &Ranks, model: M) -> Result<Option<M>, TrainError> {
        let Some(parallel) = model.parallel() else { return Ok(Some(model)) };
        let mut whole = HashMap::new();
        for (info, part) in values(&model) {
            // What other stages have is empty.
            if info.elements() > 0 {
                let placement = model.placement(&info.name);
                whole.insert(info.name, parallel.gather(&placement, &to_host(part), &info.shape)?);
            }
        }
        if parallel.group().rank() > 0 {
            return Ok(None);
        }
        let mut made = model.empty(self.recipe.seed)?;
        if let Some(pipe) = ranks.pipe() {
            made = pipe.usual().part(made, pipe.group.rank())?;
        }
        Ok(Some(set_parameters(made, whole)))
    }

    /// The experts put together, on the first of the ranks that have divided them.
    fn whole_experts(&self, ranks: &Ranks, model: M) -> Result<Option<M>, TrainError> {
        let Some((transformer, group)) = model.transformer().and_then(|model| Some((model, model.expert_group()?)))
        else {
            return Ok(Some(model));
        };
        let (config, mut whole) = (transformer.config(), HashMap::new());
        for (info, part) in values(&model) {
            let placement = config.expert_placement(&info.name);
            let mut all = to_host(part);
            // What other stages have is empty.
            if !placement.is_replicated() && info.elements() > 0 {
                let mut parts = vec![0.0; placement.full_shape(&info.shape).iter().product()];
                group.all_gather(&all, &mut parts)?;
                all = parts;
            }
            if info.elements() > 0 {
                whole.insert(info.name, all);
            }
        }
        if group.rank() > 0 {
            return Ok(None);
        }
        let mut made = model.empty(self.recipe.seed)?;
        if let Some(pipe) = ranks.pipe() {
            made = pipe.usual().part(made, pipe.group.rank())?;
        }
        Ok(Some(set_parameters(made, whole)))
    }
}

/// This rank's turns of the batches. Where experts are divided, ranks must go through as many batches each: one whose turn does not come in the last round
/// takes the first batch of that round as well, which does not count.
struct Turns<'a, I> {
    ranks: &'a Ranks,
    batches: I,
    /// Batches until now, and how many of them were this rank's turn.
    total: usize,
    mine: usize,
}

impl<'a, I: Iterator<Item = HeldOut>> Turns<'a, I> {
    fn new(ranks: &'a Ranks, batches: I) -> Self {
        Self { ranks, batches, total: 0, mine: 0 }
    }
}

impl<I: Iterator<Item = HeldOut>> Iterator for Turns<'_, I> {
    type Item = HeldOut;

    fn next(&mut self) -> Option<HeldOut> {
        let (rank, size) = (self.ranks.rank(), self.ranks.size());
        let mut round: Vec<HeldOut> = self.batches.by_ref().take(size).collect();
        self.total += round.len();
        if rank < round.len() {
            self.mine += 1;
            return Some(round.swap_remove(rank));
        }
        round.into_iter().next().filter(|_| self.ranks.divide_experts())
    }
}

/// Tokens of a prompt, after the end-of-text token that every document follows. Where there is neither (an empty prompt, a character tokenizer) it is
/// the first token, for characters the smallest: mostly the line break.
///
/// # Errors
/// [`TrainError::Data`] for a character that a character tokenizer does not have.
pub fn prompt_ids(tokenizer: &firebox_data::Tokenizer, prompt: &[u8]) -> Result<Vec<i32>, TrainError> {
    let mut ids: Vec<i32> = tokenizer.eot().map(|id| id as i32).into_iter().collect();
    ids.extend(tokenizer.encode(prompt)?.into_iter().map(|id| id as i32));
    if ids.is_empty() {
        ids.push(0);
    }
    Ok(ids)
}
