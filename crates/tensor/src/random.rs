//! Randomness that is counted, not drawn.
//!
//! Every value is a pure function of (seed, purpose, step, index): nothing depends on how many ranks or threads there are, on the order in which
//! they run, or on where a run was interrupted. The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011, section 3.3).
//!
//! ```
//! use firebox_tensor::random::{Counter, Purpose, normal, uniform};
//!
//! let counter = Counter::new(1337, Purpose::Init, 0);
//! assert_eq!(normal(counter, 5), normal(counter, 5));
//! assert_ne!(uniform(counter, 5), uniform(counter, 6));
//! ```

/// What a stream of random numbers is for; streams of different purposes never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial parameters.
    Init = 1,
    /// Dropout masks.
    Dropout = 2,
    /// Sampling of generated tokens.
    Sampling = 3,
    /// Which tokens of training text are masked, and by what.
    Masking = 4,
    /// The same of held-out text.
    HeldOutMasking = 5,
}

/// A stream: the key of the generator and the upper half of its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    key: [u32; 2],
    high: [u32; 2],
}

impl Counter {
    /// The stream of (seed, purpose, step).
    pub fn new(seed: u64, purpose: Purpose, step: u64) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            high: [step as u32, ((step >> 32) as u32) << 8 | purpose as u32],
        }
    }

    /// A stream inside this one, told apart by `name` (a parameter's path, a layer's number).
    pub fn fork(self, name: &str) -> Self {
        // FNV-1a: stable across versions and machines, unlike the standard library's hasher.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let [a, b, _, _] = philox(self.key, [hash as u32, (hash >> 32) as u32, self.high[0], self.high[1]]);
        Self { key: [self.key[0] ^ a, self.key[1] ^ b], ..self }
    }
}

fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(0xD251_1F53u32) * u64::from(c[0]);
        let p1 = u64::from(0xCD9E_8D57u32) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// 32 uniform random bits at `index`.
pub fn uniform_bits(counter: Counter, index: u64) -> u32 {
    let block = index / 4;
    philox(counter.key, [block as u32, (block >> 32) as u32, counter.high[0], counter.high[1]])[(index % 4) as usize]
}

/// A uniform number in [0, 1) at `index`, with 24 random bits.
pub fn uniform(counter: Counter, index: u64) -> f32 {
    (uniform_bits(counter, index) >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// A standard normal number at `index` (Box-Muller over one block of the generator).
pub fn normal(counter: Counter, index: u64) -> f32 {
    let pair = index / 2;
    let c = philox(counter.key, [pair as u32, (pair >> 32) as u32, counter.high[0], counter.high[1] ^ 0x8000_0000]);
    // In (0, 1], so that the logarithm is finite; 53 bits, so that the tail reaches 8 sigma.
    let bits = (u64::from(c[0]) << 32 | u64::from(c[1])) >> 11;
    let u = (bits as f64 + 1.0) / 9_007_199_254_740_992.0;
    let angle = std::f64::consts::TAU * (f64::from(c[2]) / 4_294_967_296.0);
    let r = (-2.0 * u.ln()).sqrt();
    (r * if index.is_multiple_of(2) { angle.cos() } else { angle.sin() }) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // kat_vectors of the authors' Random123 library, philox4x32-10.
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 2], [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn moments_and_independence() {
        let c = Counter::new(7, Purpose::Init, 3);
        let n = 100_000u64;
        let (mut s1, mut s2, mut s4) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let x = f64::from(normal(c, i));
            s1 += x;
            s2 += x * x;
            s4 += x.powi(4);
        }
        let n = n as f64;
        // Four standard errors of each moment.
        assert!((s1 / n).abs() < 4.0 / n.sqrt());
        assert!((s2 / n - 1.0).abs() < 4.0 * (2.0 / n).sqrt());
        assert!((s4 / n - 3.0).abs() < 4.0 * (96.0 / n).sqrt());
        let other = [
            Counter::new(8, Purpose::Init, 3),
            Counter::new(7, Purpose::Dropout, 3),
            Counter::new(7, Purpose::Init, 4),
            c.fork("a"),
            c.fork("b"),
        ];
        for o in other {
            assert!((0..64).filter(|&i| uniform_bits(o, i) == uniform_bits(c, i)).count() < 2, "{o:?} repeats {c:?}");
        }
    }
}
