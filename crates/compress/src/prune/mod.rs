//! Pruning: which weights can be zero.
//!
//! | | a weight's score | among | changes |
//! |---|---|---|---|
//! | [`magnitude`], [`magnitude_global`] | `abs w` | a matrix, several matrices | nothing else |
//! | [`wanda`] | `abs w · ‖x‖₂` of its input | a row | nothing else |
//! | [`sparsegpt()`] | `w² / U²` of its input | 128 columns | the weights that stay make up for those that go |
//!
//! [`magnitude_global`] apart, each also in patterns N:M, where of every M weights of a row, one after the other, N stay.

mod sparsegpt;

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use sparsegpt::{SparseGpt, sparsegpt};

use crate::{CompressError, Matrix};

/// How many weights go: `0.5`, or `"2:4"` in recipes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub struct Sparsity(Kind);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// This part of the weights goes, anywhere.
    Fraction(f64),
    /// So many stay of every so many.
    Pattern(usize, usize),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Number(f64),
    Pattern(String),
}

/// The largest M: SparseGPT's blocks hold whole groups.
const LARGEST_PATTERN: usize = 128;

impl Sparsity {
    /// This part of the weights goes.
    ///
    /// # Errors
    /// [`CompressError::Value`] outside of 0 to below 1.
    pub fn fraction(part: f64) -> Result<Self, CompressError> {
        if !(0.0..1.0).contains(&part) {
            let expected = "a part of the weights from 0 to below 1 (at 1 nothing is left), or a pattern as in 2:4";
            return Err(CompressError::Value { what: "sparsity", expected, got: part.to_string() });
        }
        Ok(Self(Kind::Fraction(part)))
    }

    /// `stay` of every `of` weights of a row stay.
    ///
    /// # Errors
    /// [`CompressError::Value`] unless `0 < stay < of`, with `of` a power of two up to 128.
    pub fn pattern(stay: usize, of: usize) -> Result<Self, CompressError> {
        if stay == 0 || stay >= of || !of.is_power_of_two() || of > LARGEST_PATTERN {
            let expected = "N:M with N from 1 to below M, M a power of two up to 128, as in 2:4";
            return Err(CompressError::Value { what: "sparsity", expected, got: format!("{stay}:{of}") });
        }
        Ok(Self(Kind::Pattern(stay, of)))
    }

    /// The part of the weights that goes.
    pub fn part(self) -> f64 {
        match self.0 {
            Kind::Fraction(part) => part,
            Kind::Pattern(stay, of) => 1.0 - stay as f64 / of as f64,
        }
    }

    /// How many of a pattern's group go, and the length of the group; none if weights go anywhere.
    fn of_groups(self, cols: usize) -> Result<Option<(usize, usize)>, CompressError> {
        match self.0 {
            Kind::Fraction(_) => Ok(None),
            Kind::Pattern(stay, m) if cols.is_multiple_of(m) => Ok(Some((m - stay, m))),
            Kind::Pattern(_, m) => Err(CompressError::Pattern { pattern: self.to_string(), m, cols }),
        }
    }

    /// How many of so many go.
    fn count(self, of: usize) -> usize {
        (of as f64 * self.part()) as usize
    }
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Fraction(part) => write!(f, "{part}"),
            Kind::Pattern(stay, of) => write!(f, "{stay}:{of}"),
        }
    }
}

impl FromStr for Sparsity {
    type Err = CompressError;

    fn from_str(text: &str) -> Result<Self, CompressError> {
        let wrong = |_| CompressError::Value {
            what: "sparsity",
            expected: "a number as in 0.5, or a pattern as in 2:4",
            got: text.to_owned(),
        };
        match text.split_once(':') {
            Some((stay, of)) => Self::pattern(stay.parse().map_err(|_| wrong(()))?, of.parse().map_err(|_| wrong(()))?),
            None => Self::fraction(text.parse().map_err(|_| wrong(()))?),
        }
    }
}

impl TryFrom<Text> for Sparsity {
    type Error = CompressError;

    fn try_from(text: Text) -> Result<Self, CompressError> {
        match text {
            Text::Number(part) => Self::fraction(part),
            Text::Pattern(text) => text.parse(),
        }
    }
}

impl From<Sparsity> for Text {
    fn from(sparsity: Sparsity) -> Self {
        match sparsity.0 {
            Kind::Fraction(part) => Self::Number(part),
            Kind::Pattern(..) => Self::Pattern(sparsity.to_string()),
        }
    }
}

/// Which weights of a matrix stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    cols: usize,
    keep: Vec<bool>,
}

impl Mask {
    /// For each weight, row by row, whether it stays.
    pub fn keep(&self) -> &[bool] {
        &self.keep
    }

    /// The part that goes.
    pub fn sparsity(&self) -> f64 {
        self.keep.iter().filter(|keep| !**keep).count() as f64 / self.keep.len().max(1) as f64
    }

    /// Zeroes the weights that go.
    ///
    /// # Errors
    /// [`CompressError::Shape`] for a matrix of another shape.
    pub fn apply(&self, weight: &mut Matrix) -> Result<(), CompressError> {
        if (weight.rows(), weight.cols()) != (self.rows, self.cols) {
            let expected = format!("a weight [{}, {}]", self.rows, self.cols);
            let got = format!("[{}, {}]", weight.rows(), weight.cols());
            return Err(CompressError::Shape { operation: "mask", expected, got });
        }
        weight.values_mut().iter_mut().zip(&self.keep).filter(|(_, keep)| !**keep).for_each(|(w, _)| *w = 0.0);
        Ok(())
    }
}

/// The smallest weights of the matrix go, or of each group of a pattern.
///
/// # Errors
/// [`CompressError`]: rows that are not whole groups of a pattern, values that are not finite.
pub fn magnitude(weight: &Matrix, sparsity: Sparsity) -> Result<Mask, CompressError> {
    weight.finite("magnitude pruning")?;
    let scores: Vec<f32> = weight.values().iter().map(|w| w.abs()).collect();
    masked(weight, &scores, sparsity, scores.len())
}

/// The smallest weights of all matrices together go: a matrix of large weights loses fewer.
///
/// # Errors
/// [`CompressError`]: a pattern, which says how many each row loses; values that are not finite.
pub fn magnitude_global(weights: &[&Matrix], sparsity: Sparsity) -> Result<Vec<Mask>, CompressError> {
    if matches!(sparsity.0, Kind::Pattern(..)) {
        let expected = "a part of the weights from 0 to below 1: a pattern takes the same from every matrix";
        return Err(CompressError::Value { what: "global sparsity", expected, got: sparsity.to_string() });
    }
    weights.iter().try_for_each(|weight| weight.finite("magnitude pruning"))?;
    let scores: Vec<f32> = weights.iter().flat_map(|weight| weight.values()).map(|w| w.abs()).collect();
    let mut keep = vec![true; scores.len()];
    drop_smallest(&scores, sparsity.count(scores.len()), &mut keep);
    let mut rest = keep.as_slice();
    let cut = |weight: &&Matrix| {
        let (mine, others) = rest.split_at(weight.values().len());
        rest = others;
        Mask { rows: weight.rows(), cols: weight.cols(), keep: mine.to_vec() }
    };
    Ok(weights.iter().map(cut).collect())
}

/// Wanda (Sun et al., arXiv:2306.11695, section 3): of each row, the weights with the smallest `|w| ‖x‖₂` go, with the norms of the inputs over all
/// rows seen, or their root mean squares, which rank alike.
///
/// # Errors
/// [`CompressError`]: norms of another number of inputs, rows that are not whole groups of a pattern, values that are not finite.
pub fn wanda(weight: &Matrix, norms: &[f32], sparsity: Sparsity) -> Result<Mask, CompressError> {
    weight.finite("Wanda")?;
    weight.fits("Wanda", norms.len())?;
    crate::matrix::finite("Wanda", norms)?;
    let row = |row: &[f32]| -> Vec<f32> { row.iter().zip(norms).map(|(w, x)| w.abs() * x).collect() };
    let scores: Vec<f32> = weight.values().chunks_exact(norms.len().max(1)).flat_map(row).collect();
    masked(weight, &scores, sparsity, weight.cols())
}

/// The smallest scores of each `among` go, or of each group of a pattern.
fn masked(weight: &Matrix, scores: &[f32], sparsity: Sparsity, among: usize) -> Result<Mask, CompressError> {
    let (count, among) = match sparsity.of_groups(weight.cols())? {
        Some(group) => group,
        None => (sparsity.count(among), among.max(1)),
    };
    let mut keep = vec![true; scores.len()];
    keep.par_chunks_mut(among).zip(scores.par_chunks(among)).for_each(|(keep, scores)| {
        drop_smallest(scores, count, keep);
    });
    Ok(Mask { rows: weight.rows(), cols: weight.cols(), keep })
}

/// Exactly `count` go; of equal ones the first.
fn drop_smallest<T: PartialOrd + Copy>(scores: &[T], count: usize, keep: &mut [bool]) {
    if count == 0 {
        return;
    }
    let order = |a: &T, b: &T| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal);
    let last = *scores.to_vec().select_nth_unstable_by(count - 1, order).1;
    let mut equal = count - scores.iter().filter(|score| **score < last).count();
    for (keep, score) in keep.iter_mut().zip(scores) {
        *keep = *score > last || (*score == last && equal == 0);
        if *score == last && equal > 0 {
            equal -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As many go as are to go, none of them larger than one that stays, also among equals.
        #[test]
        fn the_smallest_go(seed in prop::collection::vec(-9i8..9, 96), part in 0.0f64..0.999) {
            let weight = Matrix::new(4, 24, seed.iter().map(|x| f32::from(*x)).collect()).unwrap();
            let check = |scores: &[f32], keep: &[bool], count: usize| {
                assert_eq!(keep.iter().filter(|keep| !**keep).count(), count);
                let gone = scores.iter().zip(keep).filter(|(_, keep)| !**keep).fold(0f32, |m, (x, _)| m.max(*x));
                assert!(scores.iter().zip(keep).all(|(x, keep)| !keep || *x >= gone));
            };
            let scores: Vec<f32> = weight.values().iter().map(|x| x.abs()).collect();
            let sparsity = Sparsity::fraction(part).unwrap();
            check(&scores, magnitude(&weight, sparsity).unwrap().keep(), (96.0 * part) as usize);
            let all = magnitude_global(&[&weight, &weight], sparsity).unwrap();
            check(&[scores.clone(), scores.clone()].concat(), &[all[0].keep(), all[1].keep()].concat(), (192.0 * part) as usize);
            let norms: Vec<f32> = (0..24).map(|i| 1.0 + i as f32).collect();
            let mask = wanda(&weight, &norms, sparsity).unwrap();
            let groups = magnitude(&weight, "4:8".parse().unwrap()).unwrap();
            for row in 0..4 {
                let scores: Vec<f32> = weight.row(row).iter().zip(&norms).map(|(w, x)| w.abs() * x).collect();
                check(&scores, &mask.keep()[row * 24..][..24], (24.0 * part) as usize);
            }
            scores.chunks(8).zip(groups.keep().chunks(8)).for_each(|(scores, keep)| check(scores, keep, 4));
        }
    }

    #[test]
    fn texts_are_sparsities_and_the_rest_is_refused() {
        assert_eq!("2:4".parse::<Sparsity>().unwrap().part(), 0.5);
        assert_eq!(serde_json::from_str::<Sparsity>("\"4:8\"").unwrap(), Sparsity::pattern(4, 8).unwrap());
        assert_eq!(serde_json::to_string(&Sparsity::fraction(0.25).unwrap()).unwrap(), "0.25");
        let say = |text: &str| text.parse::<Sparsity>().unwrap_err().to_string();
        assert!(say("1").contains("below 1 (at 1 nothing is left), or a pattern as in 2:4, got 1"), "{}", say("1"));
        for text in ["1.0", "-0.1", "NaN", "4:4", "0:4", "3:6", "2:4:8", "half"] {
            assert!(say(text).starts_with("sparsity: expected "), "{}", say(text));
        }
        let weight = Matrix::new(2, 6, vec![1.0; 12]).unwrap();
        let pattern = "2:4".parse().unwrap();
        assert!(magnitude(&weight, pattern).unwrap_err().to_string().contains("multiple of 4 weights, got 6"));
        assert!(magnitude_global(&[&weight], pattern).is_err());
        assert!(wanda(&weight, &[1.0; 5], pattern).is_err());
        let mask = magnitude(&weight, "0.5".parse().unwrap()).unwrap();
        assert_eq!(mask.sparsity(), 0.5);
        assert!(mask.apply(&mut weight.transposed()).is_err());
    }
}
