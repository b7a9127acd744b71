//! Blocks of 32 values with one scale, and perhaps a minimum.

use half::f16;

use super::{half_at, inverse};

/// `d`, then 32 signed bytes.
pub fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
    let d = largest / 127.0;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(block.iter().map(|x| (x * id).round() as i8 as u8));
}

pub fn from_q8_0(bytes: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(bytes, 0);
    out.iter_mut().zip(&bytes[2..]).for_each(|(out, &q)| *out = f32::from(q as i8) * d);
}

/// The value of the largest magnitude becomes the lowest integer exactly: of the two's complement ends, the one that is a step further out.
pub fn with_scale<const BITS: u32>(block: &[f32; 32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let middle = (1u32 << (BITS - 1)) as f32;
    let d = largest / -middle;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    pack::<BITS>(&block.map(|x| cut::<BITS>(x * id + (middle + 0.5))), out);
}

pub fn from_scale<const BITS: u32, const B: usize>(bytes: &[u8; B], out: &mut [f32; 32]) {
    let (d, middle) = (half_at(bytes, 0), 1i32 << (BITS - 1));
    let q = unpack::<BITS>(&bytes[2..]);
    out.iter_mut().zip(q).for_each(|(out, q)| *out = d * (i32::from(q) - middle) as f32);
}

/// The smallest value becomes 0, the largest the highest integer.
pub fn with_minimum<const BITS: u32>(block: &[f32; 32], out: &mut Vec<u8>) {
    let low = block.iter().fold(f32::INFINITY, |m, x| m.min(*x));
    let high = block.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let d = (high - low) / ((1u32 << BITS) - 1) as f32;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(f16::from_f32(low).to_le_bytes());
    pack::<BITS>(&block.map(|x| cut::<BITS>((x - low) * id + 0.5)), out);
}

pub fn from_minimum<const BITS: u32, const B: usize>(bytes: &[u8; B], out: &mut [f32; 32]) {
    let [d, m] = [half_at(bytes, 0), half_at(bytes, 2)];
    let q = unpack::<BITS>(&bytes[4..]);
    out.iter_mut().zip(q).for_each(|(out, q)| *out = d * f32::from(q) + m);
}

fn cut<const BITS: u32>(q: f32) -> u8 {
    (q as u8).min((1 << BITS) - 1)
}

/// The fifth bits of all, if there are such, as one number; then the low four, value `i` beside value `i + 16`.
fn pack<const BITS: u32>(q: &[u8; 32], out: &mut Vec<u8>) {
    if BITS == 5 {
        let high = q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4) << i);
        out.extend(high.to_le_bytes());
    }
    out.extend((0..16).map(|i| q[i] & 15 | q[i + 16] << 4));
}

fn unpack<const BITS: u32>(bytes: &[u8]) -> [u8; 32] {
    let (high, low) = match BITS {
        5 => (u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), &bytes[4..]),
        _ => (0, bytes),
    };
    std::array::from_fn(|i| {
        let low = if i < 16 { low[i] & 15 } else { low[i - 16] >> 4 };
        low | ((high >> i & 1) as u8) << 4
    })
}
