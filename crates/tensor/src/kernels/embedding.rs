//! Rows of a table by index, and the scatter of their gradients.

use rayon::prelude::*;

use super::matmul::Into;
use super::{CHUNK, add_assign};

/// `out[i] = table[ids[i]]`, rows of `d` values; zeros where the id is negative.
pub(crate) fn gather(table: &[f32], d: usize, ids: &[i32], out: &mut [f32]) {
    out.par_chunks_mut(d).with_min_len(64).zip(ids.par_iter()).for_each(|(o, &id)| match usize::try_from(id) {
        Ok(id) => o.copy_from_slice(&table[id * d..][..d]),
        Err(_) => o.fill(0.0),
    });
}

/// The same of a table in bfloat16.
pub(crate) fn gather_bf16(table: &[u16], d: usize, ids: &[i32], out: &mut [f32]) {
    out.par_chunks_mut(d).with_min_len(64).zip(ids.par_iter()).for_each(|(o, &id)| match usize::try_from(id) {
        Ok(id) => {
            for (o, &bits) in o.iter_mut().zip(&table[id * d..][..d]) {
                *o = f32::from_bits(u32::from(bits) << 16);
            }
        }
        Err(_) => o.fill(0.0),
    });
}

/// `dtable[ids[i]] += dy[i]`, onto zeros or onto what is there; nothing where the id is negative.
///
/// The rows of one id are summed up in their order before the sum is added: the result has the same bits on any number of threads, and whether a gradient
/// is added to or made and added later.
pub(crate) fn scatter(dy: &[f32], d: usize, ids: &[i32], dtable: &mut [f32], into: Into) {
    let id = |row: &usize| ids[*row] as usize;
    let mut order: Vec<usize> = (0..ids.len()).filter(|&row| ids[row] >= 0).collect();
    order.sort_by_key(id);
    let rows = (CHUNK / d.max(1)).max(1);
    dtable.par_chunks_mut(rows * d).enumerate().for_each_init(
        || vec![0.0; d],
        |sum, (c, part)| {
            if into == Into::Write {
                part.fill(0.0);
            }
            let first = c * rows;
            let [start, end] = [first, first + rows].map(|bound| order.partition_point(|row| id(row) < bound));
            for group in order[start..end].chunk_by(|a, b| ids[*a] == ids[*b]) {
                sum.fill(0.0);
                for row in group {
                    add_assign(sum, &dy[row * d..][..d]);
                }
                add_assign(&mut part[(id(&group[0]) - first) * d..][..d], sum);
            }
        },
    );
}
