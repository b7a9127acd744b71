//! Order without memory: a permutation that is computed, not stored.

use crate::hash::mix64;

/// Counter-based random number: a pure function of its key and counter.
pub(crate) fn random(key: u64, counter: u64) -> u64 {
    mix64(mix64(key ^ 0x9e37_79b9_7f4a_7c15).wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The place to which a seeded permutation of `0..n` sends `i`: a Feistel network over the next power of four, walked
/// until it falls below `n` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2). Fewer than four
/// steps on average, and no memory.
///
/// # Panics
/// When `i` is not below `n`.
pub(crate) fn permute(i: u64, n: u64, key: u64) -> u64 {
    assert!(i < n, "{i} is not below {n}");
    // Both halves of the network have this many bits.
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut at = i;
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        // Six rounds: four make a strong pseudorandom permutation of a good round function (Luby and Rackoff 1988), two
        // more for the tiny domains of tiny corpora.
        for round in 0..6 {
            (left, right) = (right, left ^ (random(key ^ (round << 56), right) & mask));
        }
        at = left << half | right;
        if at < n {
            return at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_permutation_for_every_size() {
        for n in (1..200).chain([255, 256, 257, 1000, 4095, 4096, 4097]) {
            for key in [0, 1, u64::MAX] {
                let mut hit = vec![false; n as usize];
                for i in 0..n {
                    let to = permute(i, n, key) as usize;
                    assert!(!std::mem::replace(&mut hit[to], true), "{n} {key}: {to} twice");
                }
            }
        }
    }

    #[test]
    fn differs_by_key_and_mixes() {
        let n = 10_000;
        let fixed = (0..n).filter(|&i| permute(i, n, 7) == i).count();
        assert!(fixed < 10, "{fixed} places stayed");
        let same = (0..n).filter(|&i| permute(i, n, 7) == permute(i, n, 8)).count();
        assert!(same < 10, "{same} places are the same under another key");
        // Neighbours do not stay neighbours: the mean distance of a random order is n / 3.
        let distance: f64 =
            (1..n).map(|i| permute(i, n, 7).abs_diff(permute(i - 1, n, 7)) as f64).sum::<f64>() / n as f64;
        assert!((distance / n as f64 - 1.0 / 3.0).abs() < 0.02, "{distance}");
        assert_eq!(permute(0, 1, 3), 0);
        assert!(permute(u64::MAX - 5, u64::MAX - 1, 3) < u64::MAX - 1);
    }
}
