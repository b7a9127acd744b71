//! Texts of which some tokens are to be learned, as rows of batches.

use std::collections::BTreeMap;

use firebox_data::Answered;
use firebox_models::TokenBatch;
use firebox_models::transformer::TransformerConfig;
use firebox_tensor::ops::Sequence;

use crate::TrainError;
use crate::recipe::Recipe;

/// Numbers of texts that share a row.
pub(super) type Packed = Vec<u32>;

/// Tokens of a row at most, and the shape of the model, for a tokenizer of so many tokens.
///
/// # Errors
/// [`TrainError::Input`] for a model that does not have all of them; an impossible shape.
pub(super) fn room(recipe: &Recipe, tokens: usize) -> Result<(usize, TransformerConfig), TrainError> {
    let config = recipe.model.resolve(tokens)?;
    if config.vocab_size < tokens {
        let expected = format!("at least the tokenizer's {tokens} tokens");
        return Err(TrainError::Input { what: "model.vocab_size", expected, got: config.vocab_size.to_string() });
    }
    Ok((recipe.train.row_tokens(config.context), config))
}

/// The most tokens that a model reads of a text: all but the last, which it only predicts.
pub(super) fn places(text: &Answered) -> usize {
    text.ids.len().saturating_sub(1)
}

/// Puts texts that take so many places into rows of `room`: each, in the order in which they come, into the fullest row that has room for it.
pub(super) fn pack(places: impl Iterator<Item = (u32, usize)>, room: usize) -> Vec<Packed> {
    let mut rows: Vec<Packed> = vec![];
    // Rows by what is left of them.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (text, n) in places {
        let fullest = open.range(n..).next().map(|(&left, _)| left);
        let (row, left) = match fullest.and_then(|left| Some((open.get_mut(&left)?.pop()?, left))) {
            Some(found) => found,
            None => {
                rows.push(vec![]);
                (rows.len() - 1, room)
            }
        };
        if open.get(&left).is_some_and(Vec::is_empty) {
            open.remove(&left);
        }
        rows[row].push(text);
        open.entry(left.saturating_sub(n)).or_default().push(row);
    }
    rows
}

/// Rows of texts, one behind the other, each a segment whose positions begin anew. The rest of what the longest row takes is padding. Targets are the answers alone, or all tokens; the loss is
/// their mean.
pub(super) fn batch(rows: &[Vec<&Answered>], answers_alone: bool) -> TokenBatch {
    let length = |row: &Vec<&Answered>| row.iter().map(|text| places(text)).sum::<usize>();
    let tokens = rows.iter().map(length).max().unwrap_or(0).max(1);
    let n = rows.len() * tokens;
    let (mut inputs, mut targets) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let (mut positions, mut segments) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for row in rows {
        let mut add = |segment: usize, pairs: &mut dyn Iterator<Item = (i32, i32)>| {
            for (position, (input, target)) in pairs.enumerate() {
                inputs.push(input);
                targets.push(target);
                positions.push(position as i32);
                segments.push(segment as i32);
            }
        };
        for (segment, text) in row.iter().enumerate() {
            let target = |i: usize| if text.answer[i] || !answers_alone { text.ids[i] as i32 } else { -1 };
            add(segment, &mut (0..places(text)).map(|i| (text.ids[i] as i32, target(i + 1))));
        }
        add(row.len(), &mut (length(row)..tokens).map(|_| (0, -1)));
    }
    TokenBatch::new(inputs, targets, Sequence::new(rows.len(), tokens, positions, &segments))
}

/// How many targets a batch has.
pub(super) fn targets(batch: &TokenBatch) -> usize {
    batch.targets.iter().filter(|&&target| target >= 0).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_fill_rows() {
        let lengths = [5, 7, 3, 8, 2, 1, 10, 4];
        let rows = pack((0..).zip(lengths), 10);
        assert_eq!(rows, [vec![0, 5, 7], vec![1, 2], vec![3, 4], vec![6]]);
        let mut all: Vec<u32> = rows.into_iter().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn texts_of_a_row_do_not_see_each_other() {
        let text = |ids: &[u32], answers: usize| Answered {
            ids: ids.to_vec(),
            answer: (0..ids.len()).map(|i| i + answers >= ids.len()).collect(),
        };
        let (a, b, c) = (text(&[1, 2, 3], 1), text(&[4, 5], 2), text(&[6, 7], 1));
        let made = batch(&[vec![&a, &b], vec![&c]], true);
        assert_eq!(&*made.inputs, [1, 2, 4, 6, 0, 0]);
        assert_eq!(&*made.targets, [-1, 3, 5, 7, -1, -1]);
        assert_eq!(made.sequence.positions(), [0, 1, 0, 0, 0, 1]);
        assert_eq!(made.loss_scale, 1.0 / 3.0);
        assert_eq!(&*batch(&[vec![&a, &b]], false).targets, [2, 3, 5]);
    }
}
