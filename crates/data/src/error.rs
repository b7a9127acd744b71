//! What can go wrong between a text file and a batch. Every variant is caused by the input or the machine, and says
//! what was tried, what was found and what to do about it, on one line.

use std::path::{Path, PathBuf};

/// An error of this crate. All of them are errors of input or environment, never of the caller's code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// Neither a path nor a glob was given.
    #[error("no data: give at least one file, folder or glob of text")]
    NoSources,
    /// A path does not exist, or a folder or glob holds nothing that can be read as text.
    #[error(
        "no data in `{pattern}`: {why}; a folder is searched for .txt, .md, .rs, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, \
         and a file of any other name is read as plain text when it is named itself"
    )]
    NothingMatches {
        /// The path or glob as it was given.
        pattern: String,
        /// What was found instead.
        why: String,
    },
    /// A glob does not parse.
    #[error("cannot understand the glob `{pattern}`: {reason}")]
    BadGlob {
        /// The glob as it was given.
        pattern: String,
        /// What its parser says.
        reason: String,
    },
    /// The operating system refused an operation on a file.
    #[error("cannot {operation} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was tried, as a verb: "open", "read", "write".
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A compressed or columnar file ends early or is damaged.
    #[error("cannot read {} as {format}: {reason}; the file is torn or damaged, or its name does not match what it holds", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// "gzip", "zstd", "parquet".
        format: &'static str,
        /// What its decoder says.
        reason: String,
    },
    /// A line of a .jsonl file is not a JSON object.
    #[error("{}:{line}: not a JSON object: {reason}", path.display())]
    BadJsonLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What the JSON parser says.
        reason: String,
    },
    /// A line of a .jsonl file lacks the text field.
    #[error("{}:{line}: no field `{field}` (there are: {found}); name the field of the text with text_field", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The field that was asked for.
        field: String,
        /// The fields that are there.
        found: String,
    },
    /// A .parquet file lacks the text column, or the column holds no text.
    #[error("{}: {why} `{column}` (columns of text: {found}); name the column of the text with text_field", path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// "no column" or "no text in column".
        why: &'static str,
        /// The column that was asked for.
        column: String,
        /// The columns that could be used.
        found: String,
    },
    /// All documents together hold no text, or the filters dropped everything.
    #[error("the corpus is empty: {0}")]
    EmptyCorpus(String),
    /// The training text is too short for a single row.
    #[error(
        "the corpus is too short: {tokens} training tokens in `{source_name}`, a row of context {context} needs {}; give more text or a smaller context",
        context + 1
    )]
    TooShort {
        /// Tokens there are.
        tokens: u64,
        /// Tokens of a row.
        context: usize,
        /// Which of the mixed sources.
        source_name: String,
    },
    /// A setting has a value that cannot work.
    #[error("data.{key} = {value}: {reason}")]
    BadConfig {
        /// The key inside the `data` table.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why not, and what would work.
        reason: String,
    },
    /// A tokenizer file does not load, or a tokenizer cannot be trained.
    #[error("cannot {operation} the tokenizer: {reason}")]
    Tokenizer {
        /// "load", "train", "encode with".
        operation: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// A character tokenizer met a character that is not in its vocabulary.
    #[error(
        "the character {character} is not among the {vocab_size} characters of the tokenizer; use text of the characters it was built from, or data.tokenizer = \"bpe\", which encodes any text"
    )]
    UnknownCharacter {
        /// The character, quoted, or the byte that is not UTF-8.
        character: String,
        /// How many the tokenizer knows.
        vocab_size: usize,
    },
    /// A row of labelled data or of a conversation does not hold what the task needs.
    #[error("{}:{line}: {reason}", path.display())]
    BadRow {
        /// The file.
        path: PathBuf,
        /// The line or row, from 1.
        line: u64,
        /// What is wrong, and what would work.
        reason: String,
    },
    /// A file that is no image, or a broken one.
    #[error("cannot use the image {}: {reason}", path.display())]
    BadImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A chat template does not parse, or objects to a conversation.
    #[error("chat template {origin}: {reason}")]
    Template {
        /// Where the template is from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// A file of the cache does not hold what its header promises.
    #[error("{}: not a whole token shard: {reason}", path.display())]
    TornShard {
        /// The shard.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The files of the corpus are not the same in the second pass as in the first.
    #[error("the corpus changed while it was read ({0}); run again once nothing writes to it")]
    ChangedWhileReading(String),
}

/// A hint after the operating system's words, where there is something to do.
fn hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => "; free some space, or put the cache on another disk",
        _ => "",
    }
}

impl DataError {
    /// Wraps an error of the operating system.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}
