//! Hashes: a fast one for shingles, lines and sampling, and a strong one for what decides about a document.
//!
//! The fast hash is fixed here rather than taken from a library, because what it decides (which near duplicates are
//! found, which text trains the tokenizer) must not change with a library's version or the machine's instructions.

use sha2::{Digest, Sha256};

/// Finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits in which every input bit moves every output bit.
pub(crate) fn mix64(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// 64-bit hash of bytes, eight at a time by multiply and fold. Not for adversaries.
#[inline]
pub(crate) fn hash64(bytes: &[u8], seed: u64) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = mix64(seed.wrapping_add((bytes.len() as u64 + 1).wrapping_mul(K)));
    let mut fold = |word: u64| {
        let wide = u128::from(state ^ word ^ K) * u128::from(0xa076_1d64_78bd_642f_u64);
        state = (wide as u64) ^ ((wide >> 64) as u64) ^ word.rotate_left(29);
    };
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        fold(u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        fold(u64::from_le_bytes(word));
    }
    mix64(state)
}

/// First 128 bits of a SHA-256.
pub(crate) fn first_128(hasher: Sha256) -> u128 {
    let digest = hasher.finalize();
    let mut first = [0; 16];
    first.copy_from_slice(&digest[..16]);
    u128::from_be_bytes(first)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_the_length_count() {
        let base = hash64(b"a somewhat longer text", 0);
        assert_ne!(base, hash64(b"a somewhat longer texu", 0));
        assert_ne!(base, hash64(b"b somewhat longer text", 0));
        assert_ne!(base, hash64(b"a somewhat longer text", 1));
        assert_ne!(hash64(b"\0", 0), hash64(b"\0\0", 0));
        assert_ne!(hash64(b"", 0), hash64(b"\0", 0));
    }
}
