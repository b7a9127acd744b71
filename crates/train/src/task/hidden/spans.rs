//! Span corruption: spans of a text that are hidden behind sentinels, after the text (T5; Raffel et al., arXiv:1910.10683, sections 3.1.4 and 3.3.4), for causal decoders.
//!
//! A row is the text with a sentinel in place of each span, then each sentinel with its span, and one more sentinel. What stands behind the text alone is predicted. A row is one segment, whatever
//! documents are in it.

use firebox_data::{Batch, IGNORE_INDEX, Tokenizer};
use firebox_models::TokenBatch;
use firebox_tensor::ops::Sequence;
use firebox_tensor::random::{Counter, uniform_bits};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::recipe::RecipeError;

/// How many sentinels there are, as in T5.
const SENTINELS: usize = 100;

/// How spans are hidden.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpansRecipe {
    /// Share of the tokens that are hidden.
    pub mask_fraction: f64,
    /// Tokens of a span on average.
    pub span_tokens: f64,
}

impl Default for SpansRecipe {
    fn default() -> Self {
        Self { mask_fraction: 0.15, span_tokens: 3.0 }
    }
}

impl SpansRecipe {
    fn validate(&self) -> Result<(), RecipeError> {
        let fail = |key, expected: &str, got: f64| {
            Err(RecipeError::Value { key, expected: expected.into(), got: got.to_string() })
        };
        if !(self.mask_fraction > 0.0 && self.mask_fraction < 1.0) {
            return fail("task.mask_fraction", "a share in (0, 1)", self.mask_fraction);
        }
        if !(self.span_tokens >= 1.0 && self.span_tokens.is_finite()) {
            return fail("task.span_tokens", "at least 1", self.span_tokens);
        }
        Ok(())
    }

    /// How many of `tokens` tokens are hidden, in how many spans.
    fn hidden(&self, tokens: usize) -> (usize, usize) {
        let hidden = ((tokens as f64 * self.mask_fraction).round() as usize).clamp(1, tokens.saturating_sub(1).max(1));
        let most = (SENTINELS - 1).min(hidden).min(tokens.saturating_sub(hidden).max(1));
        (hidden, ((hidden as f64 / self.span_tokens).round() as usize).clamp(1, most))
    }

    /// Tokens of the row that `tokens` tokens of text become, the last of which is predicted alone.
    fn row(&self, tokens: usize) -> usize {
        tokens + 2 * self.hidden(tokens).1
    }
}

/// What hides spans of rows.
#[derive(Debug)]
pub(super) struct Corruption {
    recipe: SpansRecipe,
    sentinels: Vec<u32>,
    /// Of a row.
    tokens: usize,
}

/// Divides `total` into `parts` of at least one, each division as likely as any other.
fn divided(total: usize, parts: usize, counter: Counter) -> Vec<usize> {
    // The first places behind parts, of all places between two items.
    let mut places: Vec<usize> = (1..total).collect();
    places.sort_by_key(|&place| (uniform_bits(counter, place as u64), place));
    let mut bounds: Vec<usize> = places.into_iter().take(parts.saturating_sub(1)).chain([0, total]).collect();
    bounds.sort_unstable();
    bounds.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

impl Corruption {
    /// The tokenizer gets sentinels where it has none.
    ///
    /// # Errors
    /// [`TrainError`]: an impossible share, or a tokenizer that cannot be loaded.
    pub fn new(recipe: &SpansRecipe, tokenizer: &Tokenizer) -> Result<(Self, Tokenizer), TrainError> {
        recipe.validate()?;
        let (tokenizer, sentinels) = tokenizer.with_sentinels(SENTINELS)?;
        Ok((Self { recipe: recipe.clone(), sentinels, tokens: 0 }, tokenizer))
    }

    /// For rows of `tokens`, and how many tokens of text each has.
    pub fn for_rows(self, tokens: usize) -> Option<(Self, usize)> {
        let text = (2..tokens).rev().find(|&text| self.recipe.row(text) <= tokens)?;
        Some((Self { tokens, ..self }, text))
    }

    /// The text without its spans, and the spans, each behind its sentinel.
    fn corrupted(&self, text: &[i32], counter: Counter) -> [Vec<i32>; 2] {
        let (hidden, spans) = self.recipe.hidden(text.len());
        let sentinel = |i: usize| self.sentinels[i] as i32;
        let (gaps, lengths) =
            (divided(text.len() - hidden, spans, counter.fork("gaps")), divided(hidden, spans, counter.fork("spans")));
        let (mut left, mut behind, mut rest) = (vec![], vec![], text);
        for (i, (gap, length)) in gaps.into_iter().zip(lengths).enumerate() {
            let (gap, others) = rest.split_at(gap);
            let (span, others) = others.split_at(length);
            left.extend_from_slice(gap);
            left.push(sentinel(i));
            behind.push(sentinel(i));
            behind.extend_from_slice(span);
            rest = others;
        }
        behind.push(sentinel(spans));
        [left, behind]
    }

    /// Rows of text, each hidden as its counter says.
    pub fn rows(&self, text: &Batch, counter: impl Fn(usize) -> Counter) -> TokenBatch {
        let tokens = self.tokens;
        let [mut inputs, mut targets]: [Vec<i32>; 2] = Default::default();
        for row in 0..text.rows {
            let (start, n) = (row * text.context, super::text_tokens(text, row));
            // A single token has no span that leaves something.
            if n > 1 {
                let [left, behind] = self.corrupted(&text.inputs[start..start + n], counter(row));
                targets.extend(std::iter::repeat_n(IGNORE_INDEX, left.len() - 1));
                targets.extend_from_slice(&behind);
                inputs.extend(left);
                inputs.extend_from_slice(&behind[..behind.len() - 1]);
            }
            inputs.resize((row + 1) * tokens, 0);
            targets.resize((row + 1) * tokens, IGNORE_INDEX);
        }
        TokenBatch::new(inputs, targets, Sequence::plain(text.rows, tokens))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::random::Purpose;

    use super::*;

    #[test]
    fn spans_behind_their_sentinels_give_the_text_back() {
        let tokenizer = Tokenizer::train_bpe(&["some text"], 257).unwrap();
        for recipe in [SpansRecipe::default(), SpansRecipe { mask_fraction: 0.5, span_tokens: 1.0 }] {
            let (how, made) = Corruption::new(&recipe, &tokenizer).unwrap();
            assert_eq!(made.vocab_size(), 257 + SENTINELS);
            let (how, text) = how.for_rows(64).unwrap();
            for n in [2, 3, 17, text] {
                let ids: Vec<i32> = (1..=n as i32).collect();
                let [left, behind] = how.corrupted(&ids, Counter::new(1, Purpose::Masking, n as u64));
                let (hidden, spans) = recipe.hidden(n);
                assert_eq!((left.len(), behind.len()), (n - hidden + spans, hidden + spans + 1), "{n} tokens");
                assert!(left.len() + behind.len() - 1 <= 64);
                let span_of = |sentinel: i32| {
                    let at = behind.iter().position(|id| *id == sentinel).unwrap();
                    behind[at + 1..].iter().take_while(|id| !how.sentinels.contains(&(**id as u32))).copied()
                };
                let whole: Vec<i32> = left
                    .iter()
                    .flat_map(|&id| if how.sentinels.contains(&(id as u32)) { span_of(id).collect() } else { vec![id] })
                    .collect();
                assert_eq!(whole, ids);
            }
        }
    }

    #[test]
    fn what_stands_behind_the_text_is_predicted() {
        let tokenizer = Tokenizer::train_bpe(&["some text"], 257).unwrap();
        let (how, _) = Corruption::new(&SpansRecipe::default(), &tokenizer).unwrap();
        let (how, context) = how.for_rows(32).unwrap();
        let text = Batch {
            rows: 1,
            context,
            inputs: (1..=context as i32).collect(),
            targets: (2..=context as i32 + 1).collect(),
            segments: vec![0; context],
            positions: (0..context as i32).collect(),
        };
        let batch = how.rows(&text, |_| Counter::new(1, Purpose::Masking, 0));
        let (hidden, spans) = how.recipe.hidden(context);
        assert_eq!(batch.targets.iter().filter(|&&target| target >= 0).count(), hidden + spans + 1);
        let first = batch.targets.iter().position(|&target| target >= 0).unwrap();
        assert_eq!(batch.targets[first], how.sentinels[0] as i32);
        for i in first..context + 2 * spans - 1 {
            assert_eq!(batch.targets[i], batch.inputs[i + 1]);
        }
    }
}
