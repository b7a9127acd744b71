//! Values in fewer bits: bfloat16 with stochastic rounding, and 8 bits by blocks with a dynamic map (Dettmers et al., arXiv:2110.02861, sections 2.1 and 2.2, as in
//! bitsandbytes).

use std::sync::OnceLock;

use super::simd::vectorized;

/// Values that share a scale.
pub(crate) const BLOCK: usize = 256;

/// The 256 values that a code can stand for, ascending, in [-1, 1] or [0, 1].
struct Map {
    values: [f32; 256],
    /// Between a code's value and the next: what is not below it has a larger code. Of the last infinity.
    middles: [f32; 256],
    /// For the upper bits of a value's magnitude the smallest code that it can have.
    first: Box<[u8; 2 * ENTRIES]>,
}

/// Mantissa bits that the table of first codes looks at: no entry holds more than one middle between two neighbours of a map.
const MANTISSA_BITS: u32 = 7;

/// Magnitudes below 2^-32 are met by the first entry of the table, which begins at these upper bits.
const LOWEST: u32 = (127 - 32) << MANTISSA_BITS;

/// Entries of the table for one sign: exponents up to that of 1.
const ENTRIES: usize = (33 + 1) << MANTISSA_BITS;

/// The dynamic map: one bit for the sign, then zeros that count the decimal exponent, a one, and a fraction in what is left. As `create_dynamic_map` of
/// bitsandbytes with 7 exponent bits.
fn dynamic_map(signed: bool) -> [f32; 256] {
    const EXPONENT_BITS: i32 = 7;
    let extra_bits = if signed { 0 } else { 1 };
    let mut values = vec![0.0, 1.0];
    for exponent in 0..EXPONENT_BITS {
        let items = (1 << (exponent + extra_bits)) as usize;
        // The middles of `items` parts of [0.1, 1].
        let edge = |i: usize| 0.1 + 0.9 * i as f64 / items as f64;
        let scale = 10f64.powi(exponent - (EXPONENT_BITS - 1));
        for i in 0..items {
            let value = scale * (edge(i) + edge(i + 1)) / 2.0;
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f64::total_cmp);
    let mut map = [1.0; 256];
    // The signed map has 256 values with 0 and 1, the unsigned one too.
    for (map, value) in map.iter_mut().zip(&values) {
        *map = *value as f32;
    }
    map
}

vectorized! {
    /// Values divided by `scale`, and the entries of the table that they have.
    fn look_up(values: &[f32], scale: f32, scaled: &mut [f32; BLOCK], keys: &mut [u32; BLOCK]) {
        for ((x, scaled), key) in values.iter().zip(scaled).zip(keys) {
            *scaled = x / scale;
            let bits = scaled.to_bits();
            let magnitude = (bits & 0x7fff_ffff) >> (23 - MANTISSA_BITS);
            let entry = magnitude.max(LOWEST) - LOWEST;
            *key = entry.min(ENTRIES as u32 - 1) + (bits >> 31) * ENTRIES as u32;
        }
    }
}

impl Map {
    fn of(signed: bool) -> &'static Self {
        static MAPS: [OnceLock<Map>; 2] = [OnceLock::new(), OnceLock::new()];
        MAPS[usize::from(signed)].get_or_init(|| {
            let values = dynamic_map(signed);
            // The smallest value of each entry: for negative ones the largest magnitude.
            let smallest = |entry: usize| {
                let (negative, entry) = (entry >= ENTRIES, (entry % ENTRIES) as u32);
                let magnitude = |entry: u32| f32::from_bits((entry + LOWEST) << (23 - MANTISSA_BITS));
                match (negative, entry) {
                    (false, 0) => 0.0,
                    (false, entry) => magnitude(entry),
                    (true, entry) => -magnitude(entry + 1),
                }
            };
            let middle = |i: usize| values.get(i + 1).map_or(f32::INFINITY, |next| 0.5 * (values[i] + next));
            let middles = std::array::from_fn(middle);
            let mut first = Box::new([0; 2 * ENTRIES]);
            first.iter_mut().enumerate().for_each(|(entry, code)| *code = nearest(&middles, smallest(entry)));
            Self { values, middles, first }
        })
    }
}

/// The code nearest to `x`; ties go up.
fn nearest(middles: &[f32; 256], x: f32) -> u8 {
    middles.partition_point(|&middle| x >= middle) as u8
}

vectorized! {
    /// Bits of the largest magnitude, and whether a positive value has it.
    fn largest(values: &[f32]) -> (u32, bool) {
        // As integers, magnitudes keep their order, and their maximum is a single instruction; what is not finite comes last.
        let max = values.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
        (max, values.iter().fold(false, |any, x| any | (x.to_bits() == max)))
    }
}

/// Codes for up to [`BLOCK`] values; returns their scale. Of values that are not negative (`signed` false) none but 0 becomes 0: what is divided by must
/// not vanish.
pub(crate) fn encode(values: &[f32], codes: &mut [u8], signed: bool) -> f32 {
    // The map has 1 but not -1: with the sign of the largest value in the scale that one is exact, and what was decoded is encoded to the same bits.
    let (largest, positive) = largest(values);
    let scale = if positive { f32::from_bits(largest) } else { -f32::from_bits(largest) };
    let map = Map::of(signed);
    // Values that are not finite have no codes; the scale carries them on.
    if scale == 0.0 || !scale.is_finite() {
        codes.fill(nearest(&map.middles, 0.0));
        return if scale == 0.0 { 0.0 } else { f32::NAN };
    }
    let (mut scaled, mut keys) = ([0.0; BLOCK], [0; BLOCK]);
    look_up(values, scale, &mut scaled, &mut keys);
    // No branch: which code it is no processor could predict.
    let least = u8::from(!signed);
    for (((code, &x), &y), &key) in codes.iter_mut().zip(values).zip(&scaled).zip(&keys) {
        let below = map.first[key as usize];
        let nearest = below + u8::from(y >= map.middles[usize::from(below)]);
        *code = nearest.max(least & u8::from(x > 0.0));
    }
    scale
}

/// The values of codes.
pub(crate) fn decode(codes: &[u8], scale: f32, signed: bool, values: &mut [f32]) {
    let map = &Map::of(signed).values;
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = map[usize::from(code)] * scale;
    }
}

/// Bits of the bfloat16 above or below `x`, the nearer one the likelier; `random` decides.
#[inline(always)]
pub(crate) fn to_bf16(x: f32, random: u32) -> u16 {
    // The addition would turn an infinity into NaN, and some NaN into numbers.
    let bits = x.to_bits();
    let rounded = if x.is_finite() { bits.wrapping_add(random & 0xffff) } else { bits };
    // Rounding up from the largest number stays there.
    let rounded = if x.is_finite() && rounded & 0x7f80_0000 == 0x7f80_0000 { bits } else { rounded };
    (rounded >> 16) as u16
}

vectorized! {
    /// Values as bfloat16, each rounded with a random number of its own.
    pub(crate) fn encode_bf16(values: &[f32], bits: &mut [u16], seed: u32) {
        for (i, (bits, &value)) in bits.iter_mut().zip(values).enumerate() {
            *bits = to_bf16(value, hash(seed, i as u32));
        }
    }
}

vectorized! {
    /// And back.
    pub(crate) fn decode_bf16(bits: &[u16], values: &mut [f32]) {
        values.iter_mut().zip(bits).for_each(|(value, &bits)| *value = from_bf16(bits));
    }
}

/// The value of a bfloat16.
#[inline(always)]
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// 32 random bits of an index (the finalizer of MurmurHash3 by Appleby, over a Weyl sequence).
#[inline(always)]
pub(crate) fn hash(seed: u32, index: u32) -> u32 {
    let mut x = index.wrapping_mul(0x9e37_79b9) ^ seed;
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: u32) -> impl Iterator<Item = f32> {
        // Magnitudes over eight decades.
        (0..n).map(|i| (hash(7, i) as f32 / u32::MAX as f32 - 0.5) * 10f32.powi(-((hash(9, i) % 8) as i32)))
    }

    #[test]
    fn maps_are_those_of_bitsandbytes() {
        // `bitsandbytes.functional.create_dynamic_map(signed)`, version 0.45: first, some, last.
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        let at = |map: &[f32; 256], codes: [usize; 5]| codes.map(|code| map[code]);
        let close = |found: [f32; 5], expected: [f32; 5]| {
            for (found, expected) in found.into_iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-7 * expected.abs(), "{found} {expected}");
            }
        };
        close(at(&signed, [0, 127, 128, 254, 255]), [-0.992_968_75, 0.0, 5.5e-7, 0.992_968_75, 1.0]);
        close(at(&unsigned, [0, 1, 2, 254, 255]), [0.0, 3.25e-7, 7.75e-7, 0.996_484_4, 1.0]);
        assert!(signed.is_sorted() && unsigned.is_sorted());
    }

    #[test]
    fn every_value_gets_its_nearest_code() {
        for signed in [true, false] {
            let map = &Map::of(signed).values;
            let values: Vec<f32> = numbers(20_000).map(|x| if signed { x } else { x.abs() }).collect();
            for block in values.chunks(BLOCK) {
                let (mut codes, mut back) = (vec![0; block.len()], vec![0.0; block.len()]);
                let scale = encode(block, &mut codes, signed);
                decode(&codes, scale, signed, &mut back);
                for (&x, &y) in block.iter().zip(&back) {
                    let best = map.iter().map(|v| (v * scale - x).abs()).fold(f32::INFINITY, f32::min);
                    let never_zero = !signed && y == map[1] * scale && x > 0.0;
                    let rounding = 1e-7 * scale.abs();
                    assert!((y - x).abs() <= best + rounding || never_zero, "{x} became {y}");
                    assert!(signed || (y > 0.0) == (x > 0.0));
                }
                // What was decoded has the same codes again: a restart changes nothing.
                let mut again = vec![0; block.len()];
                assert_eq!((encode(&back, &mut again, signed), again), (scale, codes));
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut codes, mut back) = ([0; 3], [0.0; 3]);
            let scale = encode(&[1.0, bad, 2.0], &mut codes, true);
            decode(&codes, scale, true, &mut back);
            assert!(back.iter().any(|x| !x.is_finite()));
            assert!(!from_bf16(to_bf16(bad, 0xffff)).is_finite());
        }
        let mut codes = [7; 2];
        assert_eq!(encode(&[0.0, 0.0], &mut codes, false), 0.0);
    }

    #[test]
    fn stochastic_rounding_is_right_in_the_mean() {
        for x in [1.003f32, -0.37, 1e-30, 3.0e38, f32::MAX, f32::MIN] {
            let mean = (0..20_000).map(|i| f64::from(from_bf16(to_bf16(x, hash(3, i))))).sum::<f64>() / 20_000.0;
            assert!((mean / f64::from(x) - 1.0).abs() < 1e-4 || x.abs() == f32::MAX, "{x} {mean}");
            // A bfloat16 is its own rounding.
            let exact = from_bf16(to_bf16(x, 0));
            assert!((0..100).all(|i| from_bf16(to_bf16(exact, hash(5, i))) == exact));
        }
    }
}
