//! What can be wrong with a matrix, a format, or what is asked of them.

/// What a compression method refuses, in one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CompressError {
    /// Parts that do not belong together.
    #[error("{operation}: expected {expected}, got {got}: these are of different layers")]
    Shape {
        /// What was to be done.
        operation: &'static str,
        /// What fits.
        expected: String,
        /// What came.
        got: String,
    },
    /// A name that is no format's.
    #[error(
        "expected the name of a format, got {name:?}: int8, int4, int3, int2, nf4 or fp8, then -tensor, -channel, -g32, -g64 or -g128, \
         then -sym or -asym (integers only), as in int4-g128-sym; or a GGUF type, as in q4_k"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Rows that are not whole groups.
    #[error("{format}: expected rows of a multiple of {group} weights, got {cols}: take a smaller group, or -channel")]
    Group {
        /// The format's name.
        format: String,
        /// Weights of a group.
        group: usize,
        /// Weights of a row.
        cols: usize,
    },
    /// A weight or an input that is not a number.
    #[error(
        "{operation}: expected finite values, got {value} at {index}: the model is damaged, or its training has diverged"
    )]
    NotFinite {
        /// What was to be done.
        operation: &'static str,
        /// The index of the value, row by row.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A code that the format does not have.
    #[error("{format}: no weight has the code {code}: the file is damaged, or of another format")]
    Code {
        /// The format's name.
        format: String,
        /// The code.
        code: i8,
    },
    /// Inputs from which no second moments follow.
    #[error(
        "{operation}: the second moments of {width} inputs are not positive definite (pivot {pivot}): calibrate with more text, or raise the damping"
    )]
    Singular {
        /// What was to be done.
        operation: &'static str,
        /// Inputs of the layer.
        width: usize,
        /// The pivot that failed.
        pivot: usize,
    },
    /// A number outside of its range.
    #[error("{what}: expected {expected}, got {got}")]
    Value {
        /// The number's name.
        what: &'static str,
        /// Its range.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// Rows that are not whole groups of an N:M pattern.
    #[error(
        "sparsity {pattern}: expected rows of a multiple of {m} weights, got {cols}: no such pattern fits this layer"
    )]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Its group.
        m: usize,
        /// Weights of a row.
        cols: usize,
    },
    /// A budget below the smallest choice.
    #[error("budget: the smallest formats take {least} bytes, got {budget}: allow more, or give smaller formats")]
    Budget {
        /// Bytes of the smallest choice.
        least: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// A GGUF block type's own complaint.
    #[error(transparent)]
    Block(#[from] crate::blocks::BlockError),
}
