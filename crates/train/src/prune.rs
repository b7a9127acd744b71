//! Pruning while a model trains: zeros that stay, and a sparsity that grows.
//!
//! The mask is the set of zeros itself: a weight that is exactly 0 stays so through every update, and pruning is writing zeros. So there is no state beside the
//! parameters, and how ranks divide these does not matter.

use std::collections::HashMap;
use std::fmt;

use firebox_models::Layered;
use firebox_models::transformer::{Transformer, TransformerConfig};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::model_io::{later, set_parameters};
use crate::recipe::RecipeError;

/// The recipe's part on pruning, of the matrices of the blocks: attention's and those of dense feed-forward layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PruneRecipe {
    /// Weights that are 0 stay 0: what a pruned model is fine-tuned with. So it is with a sparsity, too.
    pub keep_zeros: bool,
    /// The share of zeros at the end; of a pattern N:M by default what that leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// The share of zeros at the first pruning.
    pub initial_sparsity: f64,
    /// The first pruning is before this step (from 0).
    pub begin_step: u64,
    /// The last one is before this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_step: Option<u64>,
    /// In between, every so many steps.
    pub every: u64,
    /// Where zeros may be: anywhere, or `"N:M"`.
    pub pattern: Pattern,
    /// Among which weights those of the least magnitude are sought.
    pub scope: Scope,
}

impl Default for PruneRecipe {
    fn default() -> Self {
        Self {
            keep_zeros: false,
            sparsity: None,
            initial_sparsity: 0.0,
            begin_step: 0,
            end_step: None,
            every: 10,
            pattern: Pattern::Unstructured,
            scope: Scope::Layer,
        }
    }
}

/// Where zeros may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Pattern {
    /// Anywhere.
    Unstructured,
    /// At most `n` of every `m` weights in a row that one output has of its inputs are not 0 (Mishra et al., arXiv:2104.08378).
    NOfM {
        /// Weights that may stay.
        n: usize,
        /// Out of so many.
        m: usize,
    },
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unstructured => f.write_str("unstructured"),
            Self::NOfM { n, m } => write!(f, "{n}:{m}"),
        }
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let counts = text.split_once(':').and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
        match counts {
            None if text == "unstructured" => Ok(Self::Unstructured),
            Some((n, m)) if 0 < n && n < m && m <= 64 => Ok(Self::NOfM { n, m }),
            _ => Err(format!("pattern `{text}`: expected unstructured, or N:M with N below M, such as 2:4")),
        }
    }
}

/// Among which weights those of the least magnitude are sought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Those of each matrix by itself: all get the same sparsity.
    Layer,
    /// Those of all matrices together.
    Global,
}

impl PruneRecipe {
    /// The share of zeros at the end, where pruning goes on while the model trains.
    pub fn target(&self) -> Option<f64> {
        match (self.sparsity, self.pattern) {
            (None, Pattern::NOfM { n, m }) => Some(1.0 - n as f64 / m as f64),
            (sparsity, _) => sparsity,
        }
    }

    /// The share of zeros that there has to be before step `step` (from 0), if it is one at which weights are pruned: it grows from the initial to the final
    /// sparsity as 1 - (1 - t)³ does (Zhu and Gupta, arXiv:1710.01878, section 3).
    pub fn sparsity_at(&self, step: u64) -> Option<f64> {
        let (target, end) = (self.target()?, self.end_step?);
        let at = step.checked_sub(self.begin_step)?;
        if step > end || !(at.is_multiple_of(self.every) || step == end) {
            return None;
        }
        let left = if step == end { 0.0 } else { 1.0 - at as f64 / (end - self.begin_step) as f64 };
        Some(target + (self.initial_sparsity - target) * left.powi(3))
    }

    /// Checks what can be checked without a model.
    pub(crate) fn validate(&self, steps: u64) -> Result<(), RecipeError> {
        let fail = |key, expected: String, got: String| Err(RecipeError::Value { key, expected, got });
        let Some(target) = self.target() else {
            if !self.keep_zeros {
                return fail("prune.keep_zeros", "true, or a prune.sparsity to prune to".into(), "false".into());
            }
            for (key, given) in [
                ("prune.end_step", self.end_step),
                ("prune.begin_step", Some(self.begin_step).filter(|step| *step > 0)),
            ] {
                if let Some(step) = given {
                    return fail(key, "none without prune.sparsity".into(), step.to_string());
                }
            }
            return Ok(());
        };
        if !(target > 0.0 && target < 1.0) {
            return fail("prune.sparsity", "a share in (0, 1)".into(), target.to_string());
        }
        if let Pattern::NOfM { n, m } = self.pattern {
            let most = 1.0 - n as f64 / m as f64;
            if target > most + 1e-9 {
                let expected = format!("at most {most}, which pattern {n}:{m} leaves");
                return fail("prune.sparsity", expected, target.to_string());
            }
        }
        if !(0.0..=target).contains(&self.initial_sparsity) {
            let expected = format!("from 0 to prune.sparsity = {target}");
            return fail("prune.initial_sparsity", expected, self.initial_sparsity.to_string());
        }
        if self.every == 0 {
            return fail("prune.every", "at least 1".into(), "0".into());
        }
        match self.end_step {
            None => fail("prune.end_step", "the step of the last pruning".into(), "none".into()),
            Some(end) if end < self.begin_step => {
                fail("prune.begin_step", format!("at most prune.end_step = {end}"), self.begin_step.to_string())
            }
            Some(end) if end >= steps => {
                fail("prune.end_step", format!("below train.steps = {steps}: a step follows"), end.to_string())
            }
            Some(_) => Ok(()),
        }
    }

    /// Checks it against the shape of the model.
    pub(crate) fn check(&self, config: &TransformerConfig) -> Result<(), TrainError> {
        let Pattern::NOfM { m, .. } = self.pattern else { return Ok(()) };
        let widths = [config.d_model, config.n_heads * config.head_dim, config.d_ff];
        match widths.iter().find(|width| !width.is_multiple_of(m)) {
            None => Ok(()),
            Some(width) => {
                let expected = format!("N:M whose M divides the inputs of every matrix ({widths:?})");
                let got = format!("{}, which does not divide {width}", self.pattern);
                Err(TrainError::Input { what: "prune.pattern", expected, got })
            }
        }
    }

    /// Sets the weights of the least magnitude to 0, so that a share of `sparsity` is. Zeros stay; no parameter but those that change is touched.
    pub(crate) fn prune(&self, model: Transformer, sparsity: f64) -> Transformer {
        let names = matrices(&model);
        let mut values: Vec<(String, [usize; 2], Vec<f32>)> = later(&model)
            .into_iter()
            .filter(|(info, _)| names.contains(&info.name))
            .map(|(info, values)| (info.name, [info.shape[0], info.shape[1]], values()))
            .collect();
        let mut slices: Vec<Matrix<'_>> =
            values.iter_mut().map(|(_, shape, values)| Matrix { shape: *shape, values }).collect();
        match self.scope {
            Scope::Layer => slices.iter_mut().for_each(|one| self.zero(std::slice::from_mut(one), sparsity)),
            Scope::Global => self.zero(&mut slices, sparsity),
        }
        let values: HashMap<String, Vec<f32>> = values.into_iter().map(|(name, _, values)| (name, values)).collect();
        set_parameters(model, values)
    }

    /// The same of matrices that are one as far as thresholds go. Of weights of the same magnitude the first go.
    fn zero(&self, matrices: &mut [Matrix<'_>], sparsity: f64) {
        let total: usize = matrices.iter().map(|matrix| matrix.values.len()).sum();
        let count = (sparsity * total as f64).round() as usize;
        let masks: Vec<Option<Vec<bool>>> = matrices.iter().map(|matrix| self.may_go(matrix)).collect();
        // The bits of positive numbers sort as the numbers do.
        let magnitudes = |matrix: &Matrix<'_>, mask: &Option<Vec<bool>>| -> Vec<u32> {
            let may = |i: usize| mask.as_ref().is_none_or(|mask| mask[i]);
            matrix.values.iter().enumerate().filter(|(i, _)| may(*i)).map(|(_, w)| w.abs().to_bits()).collect()
        };
        let mut all: Vec<u32> = matrices.iter().zip(&masks).flat_map(|(m, mask)| magnitudes(m, mask)).collect();
        let count = count.min(all.len());
        if count == 0 {
            return;
        }
        let threshold = *all.select_nth_unstable(count - 1).1;
        let below = all.iter().filter(|&&bits| bits < threshold).count();
        let mut at_threshold = count - below;
        drop(all);
        for (matrix, mask) in matrices.iter_mut().zip(&masks) {
            for (i, w) in matrix.values.iter_mut().enumerate() {
                let bits = w.abs().to_bits();
                if bits > threshold || mask.as_ref().is_some_and(|mask| !mask[i]) {
                    continue;
                }
                if bits == threshold {
                    if at_threshold == 0 {
                        continue;
                    }
                    at_threshold -= 1;
                }
                *w = 0.0;
            }
        }
    }

    /// Which weights the pattern lets go: all but the N largest of every M inputs of an output. None: any.
    fn may_go(&self, matrix: &Matrix<'_>) -> Option<Vec<bool>> {
        let Pattern::NOfM { n, m } = self.pattern else { return None };
        let [inputs, outputs] = matrix.shape;
        let mut may = vec![true; matrix.values.len()];
        for first in (0..inputs).step_by(m) {
            for output in 0..outputs {
                let at = |i: usize| (first + i) * outputs + output;
                let mut order: Vec<usize> = (0..m.min(inputs - first)).collect();
                order.sort_by(|&a, &b| matrix.values[at(b)].abs().total_cmp(&matrix.values[at(a)].abs()));
                order.iter().take(n).for_each(|&i| may[at(i)] = false);
            }
        }
        Some(may)
    }
}

/// A weight `[in, out]`.
struct Matrix<'a> {
    shape: [usize; 2],
    values: &'a mut Vec<f32>,
}

/// Names of the weights that are pruned.
fn matrices(model: &Transformer) -> Vec<String> {
    use firebox_models::Staged;
    (0..model.n_stages()).flat_map(|stage| model.matrices(stage)).collect()
}

/// The share of zeros in the matrices of the blocks.
pub fn sparsity(model: &Transformer) -> f64 {
    let names = matrices(model);
    let (mut zeros, mut total) = (0usize, 0usize);
    for (info, values) in later(model) {
        if names.contains(&info.name) {
            let values = values();
            zeros += values.iter().filter(|w| **w == 0.0).count();
            total += values.len();
        }
    }
    zeros as f64 / total.max(1) as f64
}

/// Whether there is a zero in the matrices of the blocks. No more than one matrix is made that has not been.
pub(crate) fn has_zeros(model: &Transformer) -> bool {
    let names = matrices(model);
    later(model).into_iter().any(|(info, values)| names.contains(&info.name) && values().contains(&0.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn recipe(text: &str) -> PruneRecipe {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn sparsity_grows_as_in_the_paper() {
        let prune = recipe("sparsity = 0.8\ninitial_sparsity = 0.2\nbegin_step = 10\nend_step = 45\nevery = 10");
        let due: Vec<(u64, f64)> = (0..60).filter_map(|step| Some((step, prune.sparsity_at(step)?))).collect();
        let at = |n: f64| 0.8 - 0.6 * (1.0 - n / 35.0).powi(3);
        let want = [(10, at(0.0)), (20, at(10.0)), (30, at(20.0)), (40, at(30.0)), (45, 0.8)];
        assert_eq!(due.len(), want.len());
        assert!(due.iter().zip(&want).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-12), "{due:?}");
        let once = recipe("sparsity = 0.5\nbegin_step = 7\nend_step = 7");
        assert_eq!((6..9).map(|step| once.sparsity_at(step)).collect::<Vec<_>>(), [None, Some(0.5), None]);
        assert_eq!(recipe("keep_zeros = true").sparsity_at(0), None);
    }

    #[test]
    fn the_smallest_go() {
        let weights = || vec![4.0, -1.0, 0.5, 3.0, -0.5, 2.0, 6.0, 0.0];
        let zeroed = |prune: &PruneRecipe, shape: [usize; 2], sparsity: f64| {
            let mut values = weights();
            prune.zero(&mut [Matrix { shape, values: &mut values }], sparsity);
            values
        };
        let any = recipe("sparsity = 0.5\nend_step = 1");
        // Of the two halves the first goes.
        assert_eq!(zeroed(&any, [4, 2], 0.25), [4.0, -1.0, 0.0, 3.0, -0.5, 2.0, 6.0, 0.0]);
        assert_eq!(zeroed(&any, [4, 2], 0.5), [4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 6.0, 0.0]);
        assert_eq!(zeroed(&any, [4, 2], 0.01), weights());
        // Of the four inputs of either output, columns of [4, 2], two stay.
        let two_of_four = recipe("pattern = '2:4'\nend_step = 1");
        assert_eq!(two_of_four.target(), Some(0.5));
        assert_eq!(zeroed(&two_of_four, [4, 2], 0.5), [4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 6.0, 0.0]);
        assert_eq!(zeroed(&two_of_four, [8, 1], 0.5), [4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 6.0, 0.0]);
        let half = recipe("pattern = '1:2'\nend_step = 1");
        assert_eq!(zeroed(&half, [8, 1], 0.5), [4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 6.0, 0.0]);
        // On the way, those that the pattern lets go do so by their magnitude.
        assert_eq!(zeroed(&half, [2, 4], 0.375), [4.0, -1.0, 0.0, 3.0, 0.0, 2.0, 6.0, 0.0]);
    }

    #[test]
    fn a_global_threshold_takes_more_from_smaller_matrices() {
        let (mut a, mut b) = (vec![1.0, 2.0], vec![0.1, 0.2]);
        let prune = recipe("sparsity = 0.5\nend_step = 1\nscope = 'global'");
        prune.zero(&mut [Matrix { shape: [2, 1], values: &mut a }, Matrix { shape: [2, 1], values: &mut b }], 0.5);
        assert_eq!((a, b), (vec![1.0, 2.0], vec![0.0, 0.0]));
    }

    #[test]
    fn what_cannot_be() {
        for (text, key) in [
            ("", "prune.keep_zeros"),
            ("sparsity = 1.0\nend_step = 5", "prune.sparsity"),
            ("sparsity = 0.0\nend_step = 5", "prune.sparsity"),
            ("sparsity = 0.6\npattern = '2:4'\nend_step = 5", "prune.sparsity"),
            ("sparsity = 0.5\ninitial_sparsity = 0.6\nend_step = 5", "prune.initial_sparsity"),
            ("sparsity = 0.5", "prune.end_step"),
            ("sparsity = 0.5\nend_step = 10", "prune.end_step"),
            ("sparsity = 0.5\nbegin_step = 6\nend_step = 5", "prune.begin_step"),
            ("sparsity = 0.5\nend_step = 5\nevery = 0", "prune.every"),
            ("keep_zeros = true\nend_step = 5", "prune.end_step"),
        ] {
            let error = recipe(text).validate(10).unwrap_err().to_string();
            assert!(error.contains(&format!("{key} =")), "{text}: {error}");
        }
        for pattern in ["4:2", "0:4", "2:", "half"] {
            assert!(toml::from_str::<PruneRecipe>(&format!("pattern = '{pattern}'")).is_err(), "{pattern}");
        }
    }
}
