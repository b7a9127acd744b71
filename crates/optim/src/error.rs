//! The one error type of this crate.

use std::fmt;

/// What an optimizer refuses, and why. Nothing has been changed when one is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimError {
    /// A hyperparameter outside its range.
    #[error("{name} = {value} is out of range: expected {expected}")]
    Hyperparameter {
        /// Its name, as in the recipe.
        name: &'static str,
        /// What was given.
        value: f64,
        /// The range, in words.
        expected: &'static str,
    },
    /// Learning rate times weight decay is one or more: decay would flip the sign of every weight in each step.
    #[error(
        "lr {lr} x weight_decay {weight_decay} = {} must be below 1: decay would overshoot zero; lower one of them",
        lr * weight_decay
    )]
    DecayTooStrong {
        /// The learning rate of the step.
        lr: f64,
        /// The decay of the configuration.
        weight_decay: f64,
    },
    /// Two parameters of a module have one path.
    #[error("the module has two parameters named `{name}`: optimizer state is kept by name, so names must differ")]
    DuplicateName {
        /// The path.
        name: String,
    },
    /// Groups do not cover the module exactly.
    #[error(
        "parameter groups hold {grouped} elements, the module has {total}: every parameter must be in exactly one group"
    )]
    NotAPartition {
        /// Elements in all groups.
        grouped: usize,
        /// Elements of the module.
        total: usize,
    },
    /// A pattern of a group that is none.
    #[error(
        "parameter group `{pattern}`: {reason}; patterns are names with `*`, `?` and `{{a,b}}`, such as `blocks.0.*`"
    )]
    Pattern {
        /// As it was given.
        pattern: String,
        /// What is wrong.
        reason: String,
    },
    /// A group that no parameter fits, or all that fit it are in groups before it.
    #[error("no parameter is in the group `{group}`: mend its patterns and kinds, move it up, or leave it out")]
    EmptyGroup {
        /// What it was chosen by.
        group: String,
    },
    /// Gradients that belong to no trainable parameter.
    #[error("gradients without a trainable parameter: {}; were they taken from another module?", List(names))]
    UnknownGradients {
        /// Their names.
        names: Vec<String>,
    },
    /// A gradient as long as no parameter of its name.
    #[error("the gradient of `{name}` has {got} elements, expected {expected}")]
    GradientSize {
        /// The parameter.
        name: String,
        /// Elements of the parameter.
        expected: usize,
        /// Elements of the gradient.
        got: usize,
    },
    /// A saved optimizer state that does not fit the module.
    #[error("the optimizer state does not fit the model: {}", StateProblems { missing, unused, wrong })]
    State {
        /// Entries that the module needs and the state lacks.
        missing: Vec<String>,
        /// Entries of no parameter of the module.
        unused: Vec<String>,
        /// Entries of a wrong shape or with impossible values, each with what was expected and got.
        wrong: Vec<String>,
    },
}

/// The first names of a list and how many more there are: an error stays one line.
struct List<'a>(&'a [String]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        for (i, name) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{name}", if i == 0 { "" } else { ", " })?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

struct StateProblems<'a> {
    missing: &'a [String],
    unused: &'a [String],
    wrong: &'a [String],
}

impl fmt::Display for StateProblems<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [("missing", self.missing), ("unused", self.unused), ("wrong", self.wrong)];
        for (i, (kind, names)) in kinds.into_iter().filter(|(_, names)| !names.is_empty()).enumerate() {
            write!(f, "{}{} {kind}: {}", if i == 0 { "" } else { "; " }, names.len(), List(names))?;
        }
        Ok(())
    }
}

/// Checks one hyperparameter against a closed or half-open range.
pub(crate) fn check(name: &'static str, value: f64, ok: bool, expected: &'static str) -> Result<(), OptimError> {
    // A NaN makes every comparison false, so `ok` is false for it.
    if ok { Ok(()) } else { Err(OptimError::Hyperparameter { name, value, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_stay_one_line() {
        let names: Vec<String> = (0..100).map(|i| format!("blocks.{i}.weight")).collect();
        let text = OptimError::State { missing: names, unused: vec![], wrong: vec!["x: expected [2], got [3]".into()] }
            .to_string();
        assert_eq!(
            text,
            "the optimizer state does not fit the model: 100 missing: blocks.0.weight, blocks.1.weight, blocks.2.weight, \
             blocks.3.weight and 96 more; 1 wrong: x: expected [2], got [3]"
        );
    }
}
