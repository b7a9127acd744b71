//! Pruning between the steps of a run.

use firebox_models::transformer::Transformer;

use super::Trainer;
use crate::TrainError;
use crate::prune::{has_zeros, sparsity};
use crate::ranks::{Layout, Zero};
use crate::recipe::Recipe;
use crate::task::Model;

/// Zeros that stay, of a model without any, are a mistake.
pub(super) fn check_zeros(recipe: &Recipe, model: &Transformer) -> Result<(), TrainError> {
    let kept_alone = recipe.prune.as_ref().is_some_and(|prune| prune.target().is_none());
    if kept_alone && !has_zeros(model) {
        let expected = "a pruned model to start from (--init), or a prune.sparsity to prune to".into();
        let got = "a model without a zero in its matrices".into();
        return Err(TrainError::Input { what: "prune.keep_zeros", expected, got });
    }
    Ok(())
}

/// A threshold is sought in whole matrices; zeros stay in parts of them, too.
pub(super) fn check_layout(recipe: &Recipe, layout: &Layout) -> Result<(), TrainError> {
    let Layout { zero, pp, tp, ep, .. } = layout;
    let grows = recipe.prune.as_ref().is_some_and(|prune| prune.target().is_some());
    if grows && (pp * tp * ep > 1 || *zero == Zero::Parameters) {
        let expected = "pp 1, tp 1, ep 1 and zero 0, 1 or 2: its thresholds are those of whole matrices".into();
        let got = format!("pp {pp}, tp {tp}, ep {ep}, zero {}", u8::from(*zero));
        return Err(TrainError::Input { what: "prune.sparsity", expected, got });
    }
    Ok(())
}

impl<M: Model> Trainer<'_, M> {
    /// Prunes before the step, if that is due. What a step finds is a function of its number, so that a resumed run prunes as one that was never interrupted.
    pub(super) fn prune(&mut self) {
        let due = self.recipe.prune.as_ref().and_then(|prune| Some((prune, prune.sparsity_at(self.state.step)?)));
        let Some((prune, sparsity)) = due else { return };
        if let Some(model) = self.model.take() {
            let model = model.map_transformer(|model| prune.prune(model, sparsity));
            self.model = Some(self.recipe.precision.hold(model));
        }
    }

    /// The share of zeros in the matrices of the blocks, of a run that prunes or keeps them, where this rank has these whole.
    pub(super) fn sparsity(&self) -> Option<f64> {
        let whole = self.shards.is_none()
            && self.model().parallel().is_none()
            && self.ranks.as_ref().is_none_or(|ranks| ranks.pipe().is_none());
        self.model().transformer().filter(|_| self.recipe.prune.is_some() && whole).map(sparsity)
    }
}
