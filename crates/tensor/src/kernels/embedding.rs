//! Rows of a table by index, and the scatter of their gradients.

use rayon::prelude::*;

/// `out[i] = table[ids[i]]`, rows of `d` values.
pub(crate) fn gather(table: &[f32], d: usize, ids: &[i32], out: &mut [f32]) {
    out.par_chunks_mut(d).with_min_len(64).zip(ids.par_iter()).for_each(|(o, &id)| {
        let at = id as usize * d;
        o.copy_from_slice(&table[at..at + d]);
    });
}

/// `dtable[ids[i]] += dy[i]`. One thread, in the order of `ids`: it touches each row once, and the
/// order of sums stays fixed.
pub(crate) fn scatter_add(dy: &[f32], d: usize, ids: &[i32], dtable: &mut [f32]) {
    for (row, &id) in dy.chunks_exact(d).zip(ids) {
        let at = id as usize * d;
        super::add_assign(&mut dtable[at..at + d], row);
    }
}
