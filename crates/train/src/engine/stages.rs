//! Passes through a model whose parameters are never all there: those of a stage come before it and are dropped after it.

use firebox_models::{Flow, Staged, TokenBatch};
use firebox_optim::NamedGrads;

use super::{Engine, first_stage};
use crate::TrainError;
use crate::model_io::to_host;
use crate::timeline::{Kind, Recorder};

/// Brings the parameters of stages.
pub(crate) trait StageSource<M> {
    /// A model in which the parameters of `stage` are there, without gradients or recording them. `next` is the stage that will be asked for after it, if
    /// that is known.
    fn bring(&mut self, stage: usize, record: bool, next: Option<usize>) -> Result<M, TrainError>;
}

impl Engine {
    /// [`gradients`](Self::gradients) of a batch in a training step, with the parameters of each stage from `source`. A kept graph would hold parameters, so
    /// all stages but the last are recomputed, whatever `recompute` says; to the bits of the results that makes no difference. `sink` gets what is complete
    /// after each stage, from the last to the first; `recorder` what is computed. Without a batch, `source` and `sink` hear the same, and nothing is computed.
    ///
    /// # Errors
    /// Those of `source` and `sink`; [`TrainError::Offload`].
    pub(crate) fn gradients_by_stage<M: Staged>(
        &self,
        shapes: &M,
        batch: Option<(&TokenBatch, u64)>,
        source: &mut dyn StageSource<M>,
        sink: &mut dyn FnMut(usize, Option<NamedGrads>) -> Result<(), TrainError>,
        recorder: &Recorder,
    ) -> Result<Option<f64>, TrainError> {
        let (last, first) = (shapes.n_stages() - 1, first_stage(shapes)?);
        let mut pass = batch.map(|(batch, step)| self.start(first, false, batch, step)).transpose()?;
        let mut flow = Flow::Start;
        for i in 0..last {
            let plain = source.bring(i, false, Some(i + 1))?;
            if let Some(pass) = &mut pass {
                let forward = || pass.run(&plain, i, flow);
                flow = recorder.span(Kind::Forward, || format!("forward of stage {i}"), forward)?;
            }
        }
        let before = |i: usize| i.checked_sub(1).filter(|&before| before >= first);
        let mut stage = Some(source.bring(last, true, before(last))?);
        let mut loss = None;
        if let (Some(pass), Some(model)) = (&mut pass, &stage) {
            let forward = || pass.keep(model, last, flow).loss();
            pass.loss = Some(recorder.span(Kind::Forward, || format!("forward of stage {last}"), forward));
            loss = Some(pass.loss());
        }
        for i in (0..=last).rev() {
            let mut grads = pass.is_some().then(NamedGrads::new);
            if i >= first {
                let model = stage.take().map_or_else(|| source.bring(i, true, before(i)), Ok)?;
                let backward = || pass.as_mut().map(|pass| pass.backward(&model)).transpose();
                let complete = recorder.span(Kind::Backward, || format!("backward of stage {i}"), backward)?;
                if let Some(complete) = complete.flatten() {
                    grads = Some(complete);
                }
            }
            sink(i, grads)?;
        }
        Ok(loss)
    }
}

/// The losses of batches as in evaluation, each stage for all of them. Without any, `source` hears the same.
///
/// # Errors
/// Those of `source`.
pub(crate) fn losses_by_stage<M: Staged>(
    n_stages: usize,
    batches: &[TokenBatch],
    source: &mut dyn StageSource<M>,
) -> Result<Vec<f64>, TrainError> {
    let mut flows = vec![Flow::Start; batches.len()];
    for i in 0..n_stages {
        let plain = source.bring(i, false, Some(i + 1).filter(|&next| next < n_stages))?;
        let stage = |(flow, batch)| plain.forward_stage(i, flow, batch, None);
        flows = flows.into_iter().zip(batches).map(stage).collect();
    }
    Ok(flows.into_iter().map(|flow| f64::from(to_host(flow.loss())[0])).collect())
}
