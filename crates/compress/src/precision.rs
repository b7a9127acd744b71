//! Mixed precision: which format each matrix gets within a budget.

use serde::{Deserialize, Serialize};

use crate::CompressError;

/// A format that a matrix could have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// What the matrix takes in it.
    pub bytes: u64,
    /// What the model loses by it: whatever adds up over matrices, as a growth of the loss.
    pub loss: f64,
}

/// Steps in which a budget is counted at most.
const STEPS: u64 = 1 << 16;

/// For each matrix the index of its candidate, so that all together lose least within `budget` bytes: a multiple-choice knapsack, solved exactly by dynamic
/// programming if the sizes' greatest common divisor goes into the budget up to 65,536 times; otherwise sizes are rounded up to so many steps, and the
/// budget holds all the same.
///
/// # Errors
/// [`CompressError::Budget`] if not even the smallest candidates fit; [`CompressError::Value`] for a matrix without candidates or a loss that is not a number.
pub fn choose(matrices: &[Vec<Candidate>], budget: u64) -> Result<Vec<usize>, CompressError> {
    let all = || matrices.iter().flatten();
    if matrices.iter().any(Vec::is_empty) || all().any(|candidate| !candidate.loss.is_finite()) {
        let (expected, got) = ("a finite one for some format of each matrix", "none".to_owned());
        return Err(CompressError::Value { what: "loss of a format", expected, got });
    }
    let smallest = |candidates: &Vec<Candidate>| candidates.iter().map(|candidate| candidate.bytes).min().unwrap_or(0);
    let least: u64 = matrices.iter().map(smallest).sum();
    if least > budget {
        return Err(CompressError::Budget { least, budget });
    }
    // What every choice takes is not counted, so that steps are as fine as they can be.
    let more = |candidates: &Vec<Candidate>, candidate: &Candidate| candidate.bytes - smallest(candidates);
    let largest: u64 = matrices.iter().map(|c| c.iter().map(|x| more(c, x)).max().unwrap_or(0)).sum();
    let free = (budget - least).min(largest);
    let common = matrices.iter().flat_map(|c| c.iter().map(|x| more(c, x))).fold(0, gcd).max(1);
    let step = common.max(free.div_ceil(STEPS));
    let steps = (free / step) as usize;

    // The least loss within so many steps, matrix by matrix, and by which candidate.
    let mut losses = vec![0.0; steps + 1];
    let mut chosen: Vec<Vec<u32>> = vec![];
    for candidates in matrices {
        let mut next = vec![f64::INFINITY; steps + 1];
        let mut by = vec![0; steps + 1];
        for (i, candidate) in candidates.iter().enumerate() {
            let cost = usize::try_from(more(candidates, candidate).div_ceil(step)).unwrap_or(usize::MAX);
            for at in cost..=steps {
                let loss = losses[at - cost] + candidate.loss;
                if loss < next[at] {
                    (next[at], by[at]) = (loss, i as u32);
                }
            }
        }
        losses = next;
        chosen.push(by);
    }
    let mut at = steps;
    let mut choice = vec![0; matrices.len()];
    for (matrix, candidates) in matrices.iter().enumerate().rev() {
        choice[matrix] = chosen[matrix][at] as usize;
        at -= more(candidates, &candidates[choice[matrix]]).div_ceil(step) as usize;
    }
    Ok(choice)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn candidate() -> impl Strategy<Value = Candidate> {
        (1u64..60, 0u32..100).prop_map(|(bytes, loss)| Candidate { bytes: 32 * bytes, loss: f64::from(loss) })
    }

    proptest! {
        #[test]
        fn no_choice_loses_less(
            matrices in prop::collection::vec(prop::collection::vec(candidate(), 1..4), 1..6),
            budget in 0u64..6000,
        ) {
            let count: usize = matrices.iter().map(Vec::len).product();
            let total = |choice: &[usize]| {
                let of = |(candidates, i): (&Vec<Candidate>, &usize)| candidates[*i];
                let taken: Vec<Candidate> = matrices.iter().zip(choice).map(of).collect();
                (taken.iter().map(|x| x.bytes).sum::<u64>(), taken.iter().map(|x| x.loss).sum::<f64>())
            };
            let nth = |mut i: usize| -> Vec<usize> {
                let digit = |candidates: &Vec<Candidate>| { let digit = i % candidates.len(); i /= candidates.len(); digit };
                matrices.iter().map(digit).collect()
            };
            let best = (0..count).map(|i| total(&nth(i))).filter(|(bytes, _)| *bytes <= budget).map(|(_, loss)| loss).reduce(f64::min);
            match (choose(&matrices, budget), best) {
                (Ok(choice), Some(best)) => {
                    let (bytes, loss) = total(&choice);
                    prop_assert!(bytes <= budget && loss == best, "{} bytes of {}, {} for {}", bytes, budget, loss, best);
                }
                (Err(CompressError::Budget { least, .. }), None) => prop_assert!(least > budget),
                (ours, best) => prop_assert!(false, "{:?} {:?}", ours, best),
            }
        }
    }

    /// Sizes without a common divisor: the budget holds, and is used.
    #[test]
    fn rounding_up_stays_within_the_budget() {
        let matrices: Vec<Vec<Candidate>> = (0..200)
            .map(|i| {
                let of = |bits: u64| Candidate {
                    bytes: bits * 10_000_019 + i,
                    loss: f64::from(i as u32 % 7 + 1) / bits as f64,
                };
                vec![of(2), of(3), of(4), of(8)]
            })
            .collect();
        let budget = 200 * 4 * 10_000_019;
        let choice = choose(&matrices, budget).unwrap();
        let bytes: u64 = matrices.iter().zip(&choice).map(|(candidates, i)| candidates[*i].bytes).sum();
        assert!(bytes <= budget && bytes > budget / 100 * 99, "{bytes} of {budget}");
    }

    #[test]
    fn what_cannot_be_is_said() {
        let some = Candidate { bytes: 10, loss: 1.0 };
        assert!(choose(&[vec![some]], 9).unwrap_err().to_string().contains("take 10 bytes, got 9"));
        assert!(choose(&[vec![]], 9).is_err());
        assert!(choose(&[vec![Candidate { loss: f64::NAN, ..some }]], 90).is_err());
    }
}
