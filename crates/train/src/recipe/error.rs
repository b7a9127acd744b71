//! Why a recipe cannot be used.

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// Neither a built-in name nor a file.
    #[error("no recipe `{name}`: built in are {known}; or give the path of a TOML file")]
    Unknown {
        /// What was asked for.
        name: String,
        /// Names of the built-in ones.
        known: String,
    },
    /// The file cannot be read.
    #[error("cannot read the recipe {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no TOML, or a key is unknown or of the wrong type.
    #[error("recipe {origin}: {reason}{hint}")]
    Parse {
        /// Where the text comes from.
        origin: String,
        /// What is wrong.
        reason: String,
        /// The nearest known key.
        hint: String,
    },
    /// An override that is no `key=value`.
    #[error("--set {given}: expected key=value, such as optimizer.lr=3e-4")]
    Override {
        /// What was given.
        given: String,
    },
    /// A value out of its range.
    #[error("recipe: {key} = {got}: expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
}
