//! The loss of attention relations, and its gradient.

use rayon::prelude::*;

use super::simd::{dot, exp, max, vectorized};

/// `[q | k | v]` of one of the two models, for all tokens.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a> {
    pub values: &'a [f32],
    /// Of queries and of keys.
    pub widths: [usize; 2],
}

/// What relations are between.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Of each row.
    pub tokens: usize,
    /// Parts of queries, keys and values.
    pub heads: usize,
    /// The first token that each sees, and the one behind the last.
    pub seen: &'a [[u32; 2]],
    /// Negative where nothing is learned.
    pub targets: &'a [i32],
}

impl Side<'_> {
    /// Part `head` of queries (0), keys (1) or values (2) of a row of the batch, one token after the other; and where in a token it begins, and how wide it is.
    fn part(&self, row: usize, kind: usize, head: usize, rows: Rows<'_>) -> (Vec<f32>, usize, usize) {
        let [queries, keys] = self.widths;
        let (all, width) = (queries + 2 * keys, [queries, keys, keys][kind] / rows.heads);
        let first = [0, queries, queries + keys][kind] + head * width;
        let tokens = self.values[row * rows.tokens * all..][..rows.tokens * all].chunks_exact(all);
        (tokens.flat_map(|token| &token[first..first + width]).copied().collect(), first, width)
    }
}

/// The sum of KL(teacher | student) over tokens, kinds and heads; adds the gradient of `scale` times it to that of the student's `[q | k | v]`.
pub(crate) fn relations(student: Side<'_>, teacher: Side<'_>, rows: Rows<'_>, scale: f32, gradient: &mut [f32]) -> f64 {
    let [queries, keys] = student.widths;
    let (all, t, per_row) = (queries + 2 * keys, rows.tokens, 3 * rows.heads);
    let mut sum = 0f64;
    for (row, gradient) in gradient.chunks_exact_mut((t * all).max(1)).enumerate() {
        let (seen, targets) = (&rows.seen[row * t..(row + 1) * t], &rows.targets[row * t..(row + 1) * t]);
        let parts: Vec<_> = (0..per_row)
            .into_par_iter()
            .map(|i| {
                let (kind, head) = (i / rows.heads, i % rows.heads);
                let (mine, first, width) = student.part(row, kind, head, rows);
                let (theirs, _, their_width) = teacher.part(row, kind, head, rows);
                let mut slopes = vec![0f32; mine.len()];
                let loss = of_part(&mine, width, &theirs, their_width, seen, targets, &mut slopes);
                (loss, slopes, first, width)
            })
            .collect();
        for (loss, slopes, first, width) in parts {
            sum += loss;
            let tokens = gradient.chunks_exact_mut(all).zip(slopes.chunks_exact(width));
            for (token, slopes) in tokens {
                token[first..first + width].iter_mut().zip(slopes).for_each(|(g, slope)| *g += scale * slope);
            }
        }
    }
    sum
}

vectorized! {
    /// The sum of one part's losses, with its gradient in `slopes`.
    fn of_part(
        mine: &[f32],
        width: usize,
        theirs: &[f32],
        their_width: usize,
        seen: &[[u32; 2]],
        targets: &[i32],
        slopes: &mut [f32],
    ) -> f64 {
        let (root, their_root) = (1.0 / (width as f32).sqrt(), 1.0 / (their_width as f32).sqrt());
        let mut sum = 0f64;
        for (i, (&[first, end], &target)) in seen.iter().zip(targets).enumerate() {
            if target < 0 {
                continue;
            }
            let range = first as usize..end as usize;
            let (mut p, log_p) = log_softmax(mine, width, i, range.clone(), root);
            let (mut q, log_q) = log_softmax(theirs, their_width, i, range.clone(), their_root);
            let mut loss = 0f32;
            for (p, q) in p.iter_mut().zip(&mut q) {
                let (x, y) = (*p - log_p, *q - log_q);
                *q = exp(y);
                loss += *q * (y - x);
                // Of the student's score.
                *p = (exp(x) - *q) * root;
            }
            sum += f64::from(loss);
            for (j, slope) in range.zip(p) {
                // The product of token i with itself has it twice.
                for k in 0..width {
                    slopes[i * width + k] += slope * mine[j * width + k];
                    slopes[j * width + k] += slope * mine[i * width + k];
                }
            }
        }
        sum
    }
}

/// The scores of token `i` with those that it sees, and the logarithm of the sum of their exponentials.
#[inline(always)]
fn log_softmax(x: &[f32], width: usize, i: usize, range: std::ops::Range<usize>, root: f32) -> (Vec<f32>, f32) {
    let token = &x[i * width..(i + 1) * width];
    let scores: Vec<f32> = range.map(|j| dot(token, &x[j * width..(j + 1) * width]) * root).collect();
    let top = max(&scores);
    let sum: f32 = scores.iter().map(|score| exp(score - top)).sum();
    (scores, top + sum.ln())
}
