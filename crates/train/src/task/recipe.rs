//! The recipe's `[task]`.

use serde::{Deserialize, Serialize};

/// What a model is trained for: `kind` says which, the other keys belong to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TaskRecipe {
    /// The next token of text.
    #[default]
    Language,
}

impl TaskRecipe {
    /// Whether it is language modelling, the task of a recipe that names none.
    pub fn is_language(&self) -> bool {
        *self == Self::Language
    }
}
