//! The K formats: 256 values, whose blocks of 16 or 32 have small scales under a large one.
//!
//! The format says what the integers mean; how they are found is free. Here each block gets the scale (and minimum) of least squared error among some
//! twenty that round it a little differently, each refitted to the integers that it gives.

use half::f16;

use super::{half_at, inverse};

/// Scales and minima are of 6 bits.
const SIX: f32 = 63.0;

/// `d`, `e`, 8 scales and 8 minima in 12 bytes, 4-bit integers: of each 64 values the first 32 beside the others.
pub fn q4(block: &[f32; 256], out: &mut Vec<u8>) {
    let parts = block.as_chunks::<32>().0;
    let fitted: [[f32; 2]; 8] = std::array::from_fn(|i| fit_line(&parts[i]));
    let most = |of: usize| fitted.iter().fold(0f32, |m, part| m.max(part[of]));
    let [d, e] = [0, 1].map(|of| f16::from_f32(most(of) / SIX));
    let small = |of: usize, large: f16| {
        let id = inverse(large.to_f32());
        fitted.map(|part| (part[of] * id).round().clamp(0.0, SIX) as u8)
    };
    let [scales, minima] = [small(0, d), small(1, e)];
    out.extend(d.to_le_bytes());
    out.extend(e.to_le_bytes());
    out.extend(pack_scales(&scales, &minima));
    let q: [[u8; 32]; 8] = std::array::from_fn(|i| {
        // With what the scales have become.
        let [scale, minimum] = [d.to_f32() * f32::from(scales[i]), e.to_f32() * f32::from(minima[i])];
        let id = inverse(scale);
        parts[i].map(|x| ((x + minimum) * id).round().clamp(0.0, 15.0) as u8)
    });
    q.as_chunks::<2>().0.iter().for_each(|[low, high]| out.extend((0..32).map(|i| low[i] | high[i] << 4)));
}

pub fn from_q4(bytes: &[u8; 144], out: &mut [f32; 256]) {
    let [d, e] = [half_at(bytes, 0), half_at(bytes, 2)];
    let (scales, q) = bytes[4..].split_at(12);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [scale, minimum] = scale_of(scales, i);
        let [scale, minimum] = [d * f32::from(scale), e * f32::from(minimum)];
        let q = &q[i / 2 * 32..][..32];
        out.iter_mut().zip(q).for_each(|(out, q)| *out = scale * f32::from(q >> (i % 2 * 4) & 15) - minimum);
    }
}

/// Six bits of each: those of the first four in the first eight bytes, whose upper two bits are the upper ones of the last four.
fn pack_scales(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | scales[i + 4] >> 4 << 6,
        4..8 => minima[i - 4] | minima[i] >> 4 << 6,
        _ => scales[i - 4] & 15 | minima[i - 4] << 4,
    })
}

fn scale_of(packed: &[u8], i: usize) -> [u8; 2] {
    match i {
        0..4 => [packed[i] & 63, packed[i + 4] & 63],
        _ => [packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4],
    }
}

/// Scale and minimum, both at least 0, such that `scale q - minimum` with q from 0 to 15 is close to the values.
fn fit_line(values: &[f32; 32]) -> [f32; 2] {
    let low = values.iter().fold(0f32, |m, x| m.min(*x));
    let high = values.iter().fold(low, |m, x| m.max(*x));
    if high == low {
        return [0.0, -low];
    }
    let mut best = (f32::INFINITY, [0.0, 0.0]);
    for step in 0..=20 {
        // Up to a step more, where an end is cut off for a finer middle, or less.
        let id = (14.0 + 0.1 * step as f32) / (high - low);
        let q = values.map(|x| ((x - low) * id).round().clamp(0.0, 15.0));
        let sum = |of: fn(f32, f32) -> f32| values.iter().zip(&q).map(|(x, q)| of(*x, *q)).sum::<f32>();
        let (x, l, xl, ll) = (sum(|x, _| x), sum(|_, q| q), sum(|x, q| x * q), sum(|_, q| q * q));
        let det = 32.0 * ll - l * l;
        let [mut scale, mut minimum] = match det > 0.0 {
            true => [(32.0 * xl - x * l) / det, (l * xl - ll * x) / det],
            false => [1.0 / id, -low],
        };
        if minimum < 0.0 {
            // There is no maximum below 0 in the format.
            (scale, minimum) = (xl * inverse(ll), 0.0);
        }
        let error: f32 = values.iter().zip(&q).map(|(x, q)| (scale * q - minimum - x).powi(2)).sum();
        if scale > 0.0 && error < best.0 {
            best = (error, [scale, minimum]);
        }
    }
    best.1
}

/// 4 low bits of each, 2 high bits of each, 16 scales of 8 bits, `d`: in two halves of 128 values, each of four times 32.
pub fn q6(block: &[f32; 256], out: &mut Vec<u8>) {
    let parts = block.as_chunks::<16>().0;
    let fitted: [f32; 16] = std::array::from_fn(|i| fit_scale(&parts[i]));
    let largest = fitted.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let d = f16::from_f32(largest / -128.0);
    let id = inverse(d.to_f32());
    let scales = fitted.map(|scale| (scale * id).round().clamp(-128.0, 127.0) as i8);
    let mut q = [0u8; 256];
    for ((values, q), scale) in parts.iter().zip(q.as_chunks_mut::<16>().0).zip(scales) {
        let id = inverse(d.to_f32() * f32::from(scale));
        *q = values.map(|x| ((x * id).round().clamp(-32.0, 31.0) + 32.0) as u8);
    }
    for half in q.as_chunks::<128>().0 {
        out.extend((0..64).map(|i| half[i] & 15 | half[i + 64] << 4));
    }
    for half in q.as_chunks::<128>().0 {
        out.extend(
            (0..32).map(|i| (0..4).fold(0, |bits, quarter| bits | half[i + 32 * quarter] >> 4 << (2 * quarter))),
        );
    }
    out.extend(scales.map(|scale| scale as u8));
    out.extend(d.to_le_bytes());
}

pub fn from_q6(bytes: &[u8; 210], out: &mut [f32; 256]) {
    let (low, rest) = bytes.split_at(128);
    let (high, scales) = rest.split_at(64);
    let d = half_at(scales, 16);
    for (i, out) in out.iter_mut().enumerate() {
        let (half, at) = (i / 128, i % 128);
        let low = low[64 * half + at % 64] >> (at / 64 * 4) & 15;
        let high = high[32 * half + at % 32] >> (at / 32 * 2) & 3;
        let q = i32::from(low | high << 4) - 32;
        *out = d * f32::from(scales[i / 16] as i8) * q as f32;
    }
}

/// The scale, of either sign, such that `scale q` with q from -32 to 31 is close to the values.
fn fit_scale(values: &[f32; 16]) -> f32 {
    let largest = values.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    if largest == 0.0 {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0);
    for step in -9..=9 {
        // The largest goes to -32, or a little further in or out.
        let id = -(32.0 + 0.1 * step as f32) / largest;
        let q = values.map(|x| (x * id).round().clamp(-32.0, 31.0));
        let sum = |of: fn(f32, f32) -> f32| values.iter().zip(&q).map(|(x, q)| of(*x, *q)).sum::<f32>();
        let scale = sum(|x, q| x * q) * inverse(sum(|_, q| q * q));
        let error: f32 = values.iter().zip(&q).map(|(x, q)| (scale * q - x).powi(2)).sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}
