//! What a user may set: the `data` table of a recipe, and the sources of text.

use crate::error::DataError;
use serde::{Deserialize, Serialize};

/// One source of text: files, folders and globs that are read as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Files, folders or globs. They are read in the order in which they are given, sorted inside a folder or glob.
    pub paths: Vec<String>,
    /// Share of the training samples, relative to the other sources' weights. When no source has a weight, all are
    /// joined and each token is seen once per epoch; when one has, the weight of the others is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Field of a .jsonl line or column of a .parquet file; the [`DataConfig::text_field`] when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_field: Option<String>,
}

impl Source {
    /// A source of one or more paths, without a weight of its own.
    pub fn new<S: Into<String>>(paths: impl IntoIterator<Item = S>) -> Self {
        Self { paths: paths.into_iter().map(Into::into).collect(), weight: None, text_field: None }
    }

    /// The same source with a weight.
    pub fn with_weight(mut self, weight: f64) -> Self {
        self.weight = Some(weight);
        self
    }

    /// The same source with a name for its text field or column.
    pub fn with_text_field(mut self, field: impl Into<String>) -> Self {
        self.text_field = Some(field.into());
        self
    }
}

/// How documents are divided into training and validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValSplit {
    /// By a hash of each document's bytes: a document is on the same side whatever the order or names of the files.
    Hash,
    /// The last characters of the stream, nanoGPT's way; a document over the boundary is cut in two.
    Tail,
}

/// The `data` table of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// `"bpe"` trains a byte-level BPE on the corpus, `"char"` takes the characters of the corpus, anything else is the
    /// path of a `tokenizer.json`.
    pub tokenizer: String,
    /// Tokens of a trained BPE, its 256 bytes and `<|endoftext|>` included. A small corpus may give fewer.
    pub vocab_size: usize,
    /// At most so many bytes of the corpus train the BPE: the pieces of text with the smallest hashes.
    pub tokenizer_sample_bytes: u64,
    /// Share of the corpus that is held out.
    pub val_fraction: f64,
    /// How it is chosen.
    pub val_split: ValSplit,
    /// Keep attention and positions inside documents (segment ids and positions of [`crate::Batch`]). Off, a row is one
    /// segment with positions 0.., as in nanoGPT.
    pub isolate_documents: bool,
    /// Field of a .jsonl line or column of a .parquet file that holds the text.
    pub text_field: String,
    /// Read at most so many bytes of text from each source, before filters; the document that crosses the cap is cut.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Drop all but the first of documents with the same bytes.
    pub dedup: bool,
    /// Drop documents whose similarity (Jaccard, of five-word shingles, estimated by MinHash) to an earlier one
    /// reaches this threshold, such as 0.8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub near_dedup: Option<f64>,
    /// Quality filters, all off by default.
    pub filters: Filters,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            tokenizer: "bpe".into(),
            vocab_size: 4096,
            tokenizer_sample_bytes: 32 << 20,
            val_fraction: 0.05,
            val_split: ValSplit::Hash,
            isolate_documents: true,
            text_field: "text".into(),
            max_bytes: None,
            dedup: true,
            near_dedup: None,
            filters: Filters::default(),
        }
    }
}

/// Quality filters: a document that breaks one is dropped and counted. The measures are those of the Gopher and C4
/// rules (Rae et al. 2021, arXiv:2112.11446, appendix A; Raffel et al. 2020, arXiv:1910.10683, section 2.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filters {
    /// Shortest document, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_bytes: Option<u64>,
    /// Longest document, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Largest share of characters that are neither letters, digits nor white space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_symbol_ratio: Option<f64>,
    /// Longest line, in bytes: drops minified and generated text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_line_bytes: Option<u64>,
    /// Largest share of non-blank lines that repeat an earlier line of the document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_repeated_lines: Option<f64>,
}

impl DataConfig {
    /// Checks every value that can be checked without reading a file.
    ///
    /// # Errors
    /// [`DataError::BadConfig`] with the key, its value and what would work.
    pub fn validate(&self) -> Result<(), DataError> {
        let bad = |key, value: String, reason: &str| Err(DataError::BadConfig { key, value, reason: reason.into() });
        let smallest = crate::tokenizer::SMALLEST_BPE;
        if self.tokenizer == "bpe" && self.vocab_size < smallest {
            let reason = format!("too small: byte-level BPE needs at least {smallest} (256 bytes and <|endoftext|>)");
            return bad("vocab_size", self.vocab_size.to_string(), &reason);
        }
        if self.tokenizer == "bpe" && self.vocab_size > 1 << 24 {
            return bad("vocab_size", self.vocab_size.to_string(), "too large: at most 16777216");
        }
        if self.tokenizer.is_empty() {
            return bad("tokenizer", "\"\"".into(), "use \"bpe\", \"char\" or the path of a tokenizer.json");
        }
        if !(0.0..1.0).contains(&self.val_fraction) {
            return bad("val_fraction", self.val_fraction.to_string(), "must be at least 0 and below 1");
        }
        if let Some(threshold) = self.near_dedup
            && !(threshold > 0.0 && threshold <= 1.0)
        {
            return bad("near_dedup", threshold.to_string(), "a similarity above 0 and at most 1, such as 0.8");
        }
        if self.max_bytes == Some(0) {
            return bad("max_bytes", "0".into(), "leaves no text; remove it to read everything");
        }
        let ratios = [
            ("filters.max_symbol_ratio", self.filters.max_symbol_ratio),
            ("filters.max_repeated_lines", self.filters.max_repeated_lines),
        ];
        for (key, ratio) in ratios {
            if let Some(ratio) = ratio
                && !(0.0..=1.0).contains(&ratio)
            {
                return bad(key, ratio.to_string(), "a share between 0 and 1");
            }
        }
        Ok(())
    }
}

/// Which stream of training tokens each source feeds, and the weight of each stream: all one without weights.
pub(crate) fn groups(sources: &[Source]) -> Result<(Vec<usize>, Vec<f64>), DataError> {
    if sources.iter().all(|s| s.weight.is_none()) {
        return Ok((vec![0; sources.len()], vec![1.0]));
    }
    let weights: Vec<f64> = sources.iter().map(|s| s.weight.unwrap_or(1.0)).collect();
    if let Some(bad) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0)) {
        let reason = "a weight is a number above 0; remove the source to leave it out".into();
        return Err(DataError::BadConfig { key: "sources.weight", value: bad.to_string(), reason });
    }
    Ok(((0..sources.len()).collect(), weights))
}
