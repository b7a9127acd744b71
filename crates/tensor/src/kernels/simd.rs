//! Runtime dispatch to the widest vector unit, and the element functions of the kernels.
//!
//! A kernel's body is written once as plain loops; [`vectorized!`] compiles it for AVX-512, for AVX2 and for the
//! target's baseline, and picks one at run time. Bodies use neither fused multiply-add nor a reduction whose order depends on the
//! width (sums run in [`LANES`] fixed lanes), so all three give the same bits.

/// Fixed number of partial sums in every reduction: one AVX-512 register of f32, two of AVX2, four of SSE2 or NEON.
pub(crate) const LANES: usize = 16;

/// Vector instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// What the build's target guarantees (SSE2 on x86-64, NEON on AArch64).
    Baseline,
    /// 256-bit registers, and fused multiply-add, which every CPU with them has.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit registers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest level of this machine, found once.
pub(crate) fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Baseline
    })
}

/// Compiles one function body for every [`Level`] and dispatches at run time.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match $crate::kernels::simd::level() {
                // SAFETY: `level()` returns this variant only where the CPU reports the feature.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::kernels::simd::Level::Baseline => body($($arg),*),
            }
        }
    };
}
pub(crate) use vectorized;

/// e^x to 2 ulp for x in [-87, 88]; clamped outside (so e^-inf is about 1e-38, not 0).
///
/// Cephes' `expf`: x = n ln2 + r with ln2 in two parts, a polynomial of degree 5 in r, then the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer in the low mantissa bits: no call, no branch.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    f32::from_bits((((n as i32) + 127) << 23) as u32) * y
}

/// 2^x to 2 ulp for x in [-126, 127]; 0 below -127, and so for -inf. NaN stays NaN.
///
/// Cephes' `exp2f`: x = n + r, a polynomial of degree 6 in r, then the exponent bits.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -127.0 { -127.0 } else { x };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let p = 1.535_336_2e-4f32;
    let p = p * r + 1.339_887_4e-3;
    let p = p * r + 9.618_437e-3;
    let p = p * r + 5.550_332_5e-2;
    let p = p * r + 2.402_264_8e-1;
    let p = p * r + 6.931_472e-1;
    // The low bits of `shifted` are n: moved to the exponent they drop the rest, and n = -127 gives 0.
    f32::from_bits(shifted.to_bits().wrapping_add(127) << 23) * (p * r + 1.0)
}

/// The error function, to 4e-7: an odd rational function, x P(x^2) / Q(x^2), on [-4, 4], beyond which it is 1 to f32's precision.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let p = -2.726_142e-10;
    let p = p * x2 + 2.770_681_4e-8;
    let p = p * x2 - 2.101_024e-6;
    let p = p * x2 - 5.692_506_4e-5;
    let p = p * x2 - 7.349_906_3e-4;
    let p = p * x2 - 2.954_6e-3;
    let p = p * x2 - 1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * x2 - 2.133_740_6e-4;
    let q = q * x2 - 1.682_827e-3;
    let q = q * x2 - 7.373_329e-3;
    let q = q * x2 - 1.426_473_9e-2;
    x * p / q
}

/// The hyperbolic tangent, to 3e-7 of itself: an odd rational function (Eigen's `ptanh`), x P(x^2) / Q(x^2), up to where it is 1 to f32's precision. NaN
/// stays NaN.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let x = x.clamp(-7.905_311, 7.905_311);
    let x2 = x * x;
    let p = -2.760_768_5e-16;
    let p = p * x2 + 2.000_188e-13;
    let p = p * x2 - 8.604_672e-11;
    let p = p * x2 + 5.122_297e-8;
    let p = p * x2 + 1.485_722_4e-5;
    let p = p * x2 + 6.372_619e-4;
    let p = p * x2 + 4.893_524_6e-3;
    let q = 1.198_258_4e-6;
    let q = q * x2 + 1.185_347_1e-4;
    let q = q * x2 + 2.268_434_6e-3;
    let q = q * x2 + 4.893_525e-3;
    x * p / q
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum in [`LANES`] fixed lanes.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    reduce(x, 0.0, |a, b| a + b, |a, b| a + b)
}

/// Dot product in [`LANES`] fixed lanes.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (xc, yc) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (xr, yr) = (xc.remainder(), yc.remainder());
    for (x, y) in xc.zip(yc) {
        for k in 0..LANES {
            lanes[k] += x[k] * y[k];
        }
    }
    let mut total = fold_lanes(lanes, |a, b| a + b);
    for (x, y) in xr.iter().zip(yr) {
        total += x * y;
    }
    total
}

/// Largest value; -inf where `x` is empty.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    reduce(x, f32::NEG_INFINITY, f32::max, f32::max)
}

/// Replaces every x by e^(x - shift) and returns the sum in [`LANES`] fixed lanes, in one pass.
#[inline(always)]
pub(crate) fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp(*x - shift);
            *lane += *x;
        }
    }
    let mut total = fold_lanes(lanes, |a, b| a + b);
    for x in rest {
        *x = exp(*x - shift);
        total += *x;
    }
    total
}

/// Folds `x` in [`LANES`] fixed lanes: `map` joins an element to its lane, `join` two lanes.
#[inline(always)]
pub(crate) fn reduce(x: &[f32], init: f32, map: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [init; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for k in 0..LANES {
            lanes[k] = map(lanes[k], chunk[k]);
        }
    }
    let mut total = fold_lanes(lanes, join);
    for &v in rest {
        total = map(total, v);
    }
    total
}

/// Joins the lanes pairwise, in one order.
#[inline(always)]
pub(crate) fn fold_lanes(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for k in 0..half {
            lanes[k] = join(lanes[k], lanes[k + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_functions_follow_f64() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - want) / want).abs() < 3e-7, "exp {x}");
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(sigmoid(x)) - want).abs() < 2e-7, "sigmoid {x}");
        }
    }

    #[test]
    fn tanh_follows_f64() {
        for i in -12_000..=12_000 {
            let x = (f64::from(i) * 1e-3) as f32;
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - want).abs() <= 4e-7 * want.abs(), "tanh {x}: {} {want}", tanh(x));
        }
        assert!(tanh(f32::NAN).is_nan());
    }

    /// Against the integral of the density, by Simpson's rule.
    #[test]
    fn erf_is_the_integral_of_the_normal_density() {
        let density = |t: f64| 2.0 / std::f64::consts::PI.sqrt() * (-t * t).exp();
        for i in -500..=500 {
            let x = f64::from(i) * 0.01;
            let h = x / 400.0;
            let inner: f64 = (1..400).map(|k| density(f64::from(k) * h) * if k % 2 == 1 { 4.0 } else { 2.0 }).sum();
            let want = (density(0.0) + density(x) + inner) * h / 3.0;
            assert!((f64::from(erf(x as f32)) - want).abs() < 4e-7, "erf {x}: {} {want}", erf(x as f32));
        }
    }

    #[test]
    fn exp2_follows_f64_and_keeps_what_is_not_finite() {
        for i in -12_600..12_700 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp2();
            assert!(((f64::from(exp2(x)) - want) / want).abs() < 3e-7, "exp2 {x}");
        }
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(-127.5), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_cover_every_tail() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let want: f64 = x.iter().map(|&v| f64::from(v)).sum();
            assert!((f64::from(sum(&x)) - want).abs() < 1e-5);
            let want: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            assert!((f64::from(dot(&x, &x)) - want).abs() < 1e-5);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
