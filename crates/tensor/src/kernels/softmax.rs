//! The softmax of attention's blocks: strips of scores in panels, and of the queries that have them the keys they see.

use super::attention::QUERIES;
use super::panel::{PANEL, Row};
use super::simd::{LANES, exp2, fold_lanes, tanh, vectorized};
use super::tile::STRIP;

/// Of each query, the first key it sees and the one behind the last.
pub(super) type Seen = [usize; 2];

/// Of each query of a block: the running maximum and sum of its probabilities, and what its earlier results are multiplied with.
pub(super) struct Running {
    pub tops: [[f32; STRIP]; QUERIES / STRIP],
    pub sums: [[f32; STRIP]; QUERIES / STRIP],
    pub corrections: [[f32; STRIP]; QUERIES / STRIP],
}

/// Joins a row's lanes in a fixed order.
#[inline(always)]
fn fold(lanes: &Row, join: impl Fn(f32, f32) -> f32) -> f32 {
    fold_lanes(std::array::from_fn::<f32, LANES, _>(|j| join(lanes[j], lanes[j + LANES])), join)
}

/// Sets the columns of a row of a panel outside `first..end`.
#[inline(always)]
fn mask(row: &mut Row, column: usize, first: usize, end: usize, value: f32) {
    if column < first || column + PANEL > end {
        let (first, end) = (first as i32 - column as i32, end as i32 - column as i32);
        for (j, x) in row.iter_mut().enumerate() {
            *x = if j as i32 >= first && (j as i32) < end { *x } else { value };
        }
    }
}

vectorized! {
    /// Turns the scores of strip `strip` into probabilities that are not yet divided by their sum, and continues the running softmax. The strip's first panel begins at key `column`, `seen` has a key range for each of its rows.
    pub(super) fn softmax(
        scores: &mut [Row],
        panels: usize,
        column: usize,
        seen: &[Seen],
        cap: f32,
        running: &mut Running,
        strip: usize,
    ) {
        // Row by row in three steps, so that the end of one row's reduction does not hold up the next row.
        let mut tops = [f32::NEG_INFINITY; STRIP];
        for (i, (top, &[first, end])) in tops.iter_mut().zip(seen).enumerate() {
            let mut lanes = [f32::NEG_INFINITY; PANEL];
            for p in 0..panels {
                let scores = &mut scores[p * QUERIES + i];
                if cap > 0.0 {
                    scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
                }
                mask(scores, column + p * PANEL, first, end, f32::NEG_INFINITY);
                for (lane, &score) in lanes.iter_mut().zip(&*scores) {
                    *lane = if score > *lane { score } else { *lane };
                }
            }
            *top = fold(&lanes, |a, b| if a > b { a } else { b });
        }
        let old = running.tops[strip];
        for (top, old) in tops.iter_mut().zip(old) {
            *top = if old > *top { old } else { *top };
        }
        running.tops[strip] = tops;
        // No key of this block: every score is -inf, and so is the maximum.
        let shifts = tops.map(|top| if top == f32::NEG_INFINITY { 0.0 } else { top });
        let mut corrections = old;
        for (correction, shift) in corrections.iter_mut().zip(shifts) {
            *correction = exp2(*correction - shift);
        }
        running.corrections[strip] = corrections;
        for (sum, correction) in running.sums[strip].iter_mut().zip(corrections) {
            *sum *= correction;
        }
        for i in 0..seen.len() {
            let shift = shifts[i];
            let mut sums = [0f32; PANEL];
            for p in 0..panels {
                for (sum, score) in sums.iter_mut().zip(&mut scores[p * QUERIES + i]) {
                    *score = exp2(*score - shift);
                    *sum += *score;
                }
            }
            running.sums[strip][i] += fold(&sums, |a, b| a + b);
        }
    }
}

vectorized! {
    /// Multiplies the results of earlier blocks of keys by their corrections.
    pub(super) fn correct(o: &mut [Row], corrections: &[f32], row: usize) {
        for panel in o.chunks_exact_mut(QUERIES) {
            for (o, correction) in panel[row..].iter_mut().zip(corrections) {
                for o in o {
                    *o *= correction;
                }
            }
        }
    }
}

vectorized! {
    /// `p = 2^(p - log_sum)` and `ds = p (ds - delta)` for a strip; zero outside each query's reach. With a cap, p is `cap tanh(p / cap)` first, and ds
    /// has the slope of that.
    pub(super) fn softmax_backward(
        p: &mut [Row],
        ds: &mut [Row],
        panels: usize,
        column: usize,
        seen: &[Seen],
        cap: f32,
        log_sums: &[f32],
        delta: &[f32],
    ) {
        for (i, ((&[first, end], &log_sum), &delta)) in seen.iter().zip(log_sums).zip(delta).enumerate() {
            for panel in 0..panels {
                let (p, ds) = (&mut p[panel * QUERIES + i], &mut ds[panel * QUERIES + i]);
                if cap > 0.0 {
                    for (p, ds) in p.iter_mut().zip(&mut *ds) {
                        let t = tanh(*p / cap);
                        *p = exp2(cap * t - log_sum);
                        *ds = *p * (*ds - delta) * (1.0 - t * t);
                    }
                } else {
                    for (p, ds) in p.iter_mut().zip(&mut *ds) {
                        *p = exp2(*p - log_sum);
                        *ds = *p * (*ds - delta);
                    }
                }
                mask(p, column + panel * PANEL, first, end, 0.0);
                mask(ds, column + panel * PANEL, first, end, 0.0);
            }
        }
    }
}
