//! Tokens of a text that are hidden, to be predicted from those around them (BERT; Devlin et al., arXiv:1810.04805, section 3.1).

use firebox_data::tokenizer::{MaskTokens, Words};
use firebox_data::{Batch, IGNORE_INDEX, Tokenizer};
use firebox_models::TokenBatch;
use firebox_tensor::ops::Sequence;
use firebox_tensor::random::{Counter, uniform, uniform_bits};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::recipe::RecipeError;

/// Of the tokens that are hidden, the share in whose place the mask stands, and the share in whose place any token does; the others stay (section 3.1).
const MASKED: f32 = 0.8;
const REPLACED: f32 = 0.1;

/// How text is masked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskedRecipe {
    /// Share of the tokens that are to be predicted.
    pub mask_fraction: f64,
    /// Whether words are hidden as a whole.
    pub whole_word: bool,
}

impl Default for MaskedRecipe {
    fn default() -> Self {
        Self { mask_fraction: 0.15, whole_word: false }
    }
}

/// Tokens of a row besides the text.
pub(super) const AROUND: usize = 2;

/// What hides tokens of rows.
#[derive(Debug)]
pub(super) struct Masking {
    recipe: MaskedRecipe,
    tokens: MaskTokens,
    /// Tokens that may be hidden, by id, and all of these.
    is_ordinary: Vec<bool>,
    ordinary: Vec<i32>,
    words: Option<Words>,
}

impl Masking {
    /// With the tokens of a tokenizer.
    ///
    /// # Errors
    /// [`TrainError::Recipe`] for an impossible share, [`TrainError::Input`] for a tokenizer without a mask.
    pub fn new(recipe: &MaskedRecipe, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        if !(recipe.mask_fraction > 0.0 && recipe.mask_fraction < 1.0) {
            let (expected, got) = ("a share in (0, 1)".into(), recipe.mask_fraction.to_string());
            return Err(RecipeError::Value { key: "task.mask_fraction", expected, got }.into());
        }
        let Some(tokens) = tokenizer.mask_tokens() else {
            let expected = "one with [CLS], [SEP] and [MASK] (or <s>, </s> and <mask>)".to_owned();
            return Err(TrainError::Input { what: "data.tokenizer", expected, got: format!("{tokenizer:?}") });
        };
        let is_ordinary: Vec<bool> = tokenizer.token_bytes().iter().map(|&bytes| bytes > 0).collect();
        let ordinary = (0..).zip(&is_ordinary).filter(|(_, ordinary)| **ordinary).map(|(id, _)| id).collect();
        let words = if recipe.whole_word { Some(tokenizer.words()?) } else { None };
        Ok(Self { recipe: recipe.clone(), tokens, is_ordinary, ordinary, words })
    }

    /// Hides some of `ids`; what each is to be predicted as, or [`IGNORE_INDEX`].
    ///
    /// Of each row the same number of tokens is hidden, at least one; of words as many as do not go beyond it.
    pub fn hide(&self, ids: &mut [i32], counter: Counter) -> Vec<i32> {
        let ordinary = |id: i32| self.is_ordinary.get(id as usize) == Some(&true);
        // Tokens that are hidden together.
        let mut groups: Vec<Vec<usize>> = vec![];
        for (i, &id) in ids.iter().enumerate().filter(|(_, id)| ordinary(**id)) {
            let previous = (i > 0).then(|| ids[i - 1] as u32);
            let goes_on = self.words.as_ref().is_some_and(|words| !words.begins(previous, id as u32));
            match groups.last_mut() {
                Some(group) if goes_on && group.last() == Some(&(i - 1)) => group.push(i),
                _ => groups.push(vec![i]),
            }
        }
        let tokens: usize = groups.iter().map(Vec::len).sum();
        let most = ((tokens as f64 * self.recipe.mask_fraction).round() as usize).max(1);
        groups.sort_by_key(|group| (uniform_bits(counter, group[0] as u64), group[0]));
        let mut targets = vec![IGNORE_INDEX; ids.len()];
        let mut hidden = 0;
        for group in &groups {
            if hidden > 0 && hidden + group.len() > most {
                continue;
            }
            for &i in group {
                targets[i] = ids[i];
                ids[i] = self.instead(ids[i], counter, i as u64);
            }
            hidden += group.len();
        }
        targets
    }

    fn instead(&self, id: i32, counter: Counter, at: u64) -> i32 {
        let chance = uniform(counter.fork("what"), at);
        if chance < MASKED {
            self.tokens.mask as i32
        } else if chance < MASKED + REPLACED {
            self.ordinary[uniform_bits(counter.fork("which"), at) as usize % self.ordinary.len()]
        } else {
            id
        }
    }

    /// Rows of text, each hidden as its counter says.
    pub fn rows(&self, text: &Batch, counter: impl Fn(usize) -> Counter) -> TokenBatch {
        let MaskTokens { first: cls, last: sep, .. } = self.tokens;
        let (context, tokens) = (text.context, text.context + AROUND);
        let [mut inputs, mut targets, mut positions, mut segments]: [Vec<i32>; 4] = Default::default();
        for row in 0..text.rows {
            let (start, end) = (row * context, (row + 1) * tokens);
            let n = super::text_tokens(text, row);
            let mut ids = text.inputs[start..start + n].to_vec();
            let hidden = self.hide(&mut ids, counter(row));
            inputs.push(cls as i32);
            inputs.extend(ids);
            inputs.push(sep as i32);
            inputs.resize(end, 0);
            targets.push(IGNORE_INDEX);
            targets.extend(hidden);
            targets.resize(end, IGNORE_INDEX);
            // The first segment has one more token before it, the last one behind it.
            let of_text = &text.segments[start..start + n];
            let (from, to) = (of_text.first().copied().unwrap_or(0), of_text.last().copied().unwrap_or(0));
            segments.push(from);
            segments.extend_from_slice(of_text);
            segments.push(to);
            segments.resize(end, to + 1);
            let shifted = |(&at, &segment): (&i32, &i32)| at + i32::from(segment == from);
            positions.push(0);
            positions.extend(text.positions[start..].iter().zip(of_text).map(shifted));
            positions.push(positions.last().map_or(0, |at| at + 1));
            positions.extend(0..(end - positions.len()) as i32);
        }
        TokenBatch::new(inputs, targets, Sequence::bidirectional(text.rows, tokens, positions, &segments))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use firebox_tensor::random::Purpose;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let text = "The boiler feeds the firebox, and the firebox feeds nobody; whistles warm the drivers. ".repeat(30);
        Tokenizer::train_bpe(&[text], 300).unwrap().with_mask_tokens().unwrap()
    }

    fn masking(recipe: MaskedRecipe) -> Masking {
        Masking::new(&recipe, &tokenizer()).unwrap()
    }

    #[test]
    fn of_fifteen_percent_most_are_masked_some_replaced_and_some_stay() {
        let masking = masking(MaskedRecipe::default());
        let MaskTokens { first, last, mask } = masking.tokens;
        let text: Vec<i32> = (0..200).map(|i| 1 + i % 250).collect();
        let (mut masked, mut replaced, mut stayed) = (0, 0, 0);
        for sample in 0..100 {
            let mut ids = text.clone();
            (ids[7], ids[150]) = (first as i32, last as i32);
            let before = ids.clone();
            let targets = masking.hide(&mut ids, Counter::new(3, Purpose::Masking, sample));
            // 198 tokens that may be hidden.
            assert_eq!(targets.iter().filter(|&&target| target >= 0).count(), 30);
            assert_eq!((targets[7], targets[150]), (IGNORE_INDEX, IGNORE_INDEX));
            for ((target, id), before) in targets.iter().zip(&ids).zip(&before) {
                match *target {
                    IGNORE_INDEX => assert_eq!(id, before),
                    target => {
                        assert_eq!(target, *before);
                        assert!(*id == mask as i32 || masking.is_ordinary[*id as usize]);
                        match *id {
                            id if id == mask as i32 => masked += 1,
                            id if id == target => stayed += 1,
                            _ => replaced += 1,
                        }
                    }
                }
            }
        }
        // Of 3,000: three standard deviations are 66 and 49.
        assert!((masked - 2400i32).abs() < 66, "{masked} masked");
        assert!((replaced - 300i32).abs() < 49 && (stayed - 300i32).abs() < 49, "{replaced} replaced, {stayed} stayed");
    }

    #[test]
    fn a_sample_is_always_hidden_the_same_and_another_otherwise() {
        let masking = masking(MaskedRecipe::default());
        let hide = |sample| {
            let mut ids: Vec<i32> = (1..200).collect();
            masking.hide(&mut ids, Counter::new(3, Purpose::Masking, sample));
            ids
        };
        assert_eq!(hide(5), hide(5));
        assert_ne!(hide(5), hide(6));
    }

    #[test]
    fn whole_words_are_hidden_together() {
        let tokenizer = tokenizer();
        let masking = masking(MaskedRecipe { whole_word: true, mask_fraction: 0.3 });
        let text = " unfeeding thefirebox nobody's whistler drives the boilers, warmly".repeat(3);
        let ids: Vec<i32> = tokenizer.encode(text.as_bytes()).unwrap().into_iter().map(|id| id as i32).collect();
        let words = tokenizer.words().unwrap();
        let starts: Vec<bool> =
            (0..ids.len()).map(|i| words.begins((i > 0).then(|| ids[i - 1] as u32), ids[i] as u32)).collect();
        assert!(starts.iter().filter(|starts| **starts).count() < ids.len(), "words of several tokens");
        for sample in 0..20 {
            let targets = masking.hide(&mut ids.clone(), Counter::new(1, Purpose::Masking, sample));
            let hidden: Vec<bool> = targets.iter().map(|&target| target >= 0).collect();
            assert!(hidden.contains(&true));
            for i in (1..ids.len()).filter(|&i| !starts[i]) {
                assert_eq!(hidden[i], hidden[i - 1], "token {i} of sample {sample}");
            }
        }
    }

    #[test]
    fn rows_are_between_their_tokens_and_documents_stay_apart() {
        let masking = masking(MaskedRecipe::default());
        let text = Batch {
            rows: 1,
            context: 6,
            inputs: vec![11, 12, 0, 13, 14, 0],
            targets: vec![12, 0, 13, 14, 15, IGNORE_INDEX],
            segments: vec![0, 0, 1, 1, 1, 2],
            positions: vec![0, 1, 0, 1, 2, 0],
        };
        let batch = masking.rows(&text, |_| Counter::new(1, Purpose::Masking, 0));
        let MaskTokens { first, last, .. } = masking.tokens;
        assert_eq!((batch.inputs[0], batch.inputs[6], batch.inputs[7]), (first as i32, last as i32, 0));
        assert_eq!(batch.sequence.positions(), [0, 1, 2, 0, 1, 2, 3, 0]);
        assert_eq!(batch.sequence.lengths(), [3]);
        assert_eq!(batch.targets.iter().filter(|&&target| target >= 0).count(), 1);
    }
}
