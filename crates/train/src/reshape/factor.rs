//! Two thin matrices whose product is close to a given one.

use firebox_tensor::random::{Counter, Purpose, normal};
use rayon::prelude::*;

/// Iterations of the subspace: enough for singular values that fall slowly.
const ITERATIONS: usize = 12;

/// `a b` of `[rows, inner]` and `[inner, columns]`.
pub(super) fn product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
    let mut out = vec![0f32; rows * columns];
    if columns == 0 {
        return out;
    }
    out.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
        let mut sum = vec![0f64; columns];
        for (x, b) in a[row * inner..(row + 1) * inner].iter().zip(b.chunks_exact(columns)) {
            sum.iter_mut().zip(b).for_each(|(sum, y)| *sum += f64::from(*x) * f64::from(*y));
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
    });
    out
}

pub(super) fn transposed(a: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| a[i % rows * columns + i / rows]).collect()
}

/// `A [rows, rank]` and `B [rank, columns]` with `A B` as close to `weight` as the first `rank` singular vectors make it. With `scales`, one positive number for each row, what is small
/// is the error of the rows times these (Yuan et al., arXiv:2312.05821, section 3.2, with the root mean square of each input).
///
/// Subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4) finds the space of the singular vectors, which is all that a product needs.
pub(super) fn low_rank(
    weight: &[f32],
    [rows, columns]: [usize; 2],
    rank: usize,
    scales: Option<&[f32]>,
) -> [Vec<f32>; 2] {
    let scaled: Vec<f32> = match scales {
        Some(scales) => {
            weight.chunks_exact(columns).zip(scales).flat_map(|(row, s)| row.iter().map(move |w| w * s)).collect()
        }
        None => weight.to_vec(),
    };
    let back = transposed(&scaled, rows, columns);
    // A few more than are asked for, so that the last ones are found as well.
    let width = (rank + 8).min(rows).min(columns);
    let counter = Counter::new(0, Purpose::Init, 0).fork("subspace");
    let start: Vec<f32> = (0..columns * width).map(|i| normal(counter, i as u64)).collect();
    let mut basis = product(&scaled, &start, [rows, columns, width]);
    for _ in 0..ITERATIONS {
        orthonormalize(&mut basis, rows, width);
        let mut right = product(&back, &basis, [columns, rows, width]);
        orthonormalize(&mut right, columns, width);
        basis = product(&scaled, &right, [rows, columns, width]);
    }
    // The columns of the last product are by now the singular vectors times their values, apart from a rotation among near ones: the first `rank` after sorting by size.
    orthonormalize(&mut basis, rows, width);
    let right = product(&transposed(&basis, rows, width), &scaled, [width, rows, columns]);
    let [rotation, _] = symmetric(&right, width, columns);
    let first = |from: &[f32], height: usize| -> Vec<f32> {
        let turned = product(from, &rotation, [height, width, width]);
        turned.chunks_exact(width).flat_map(|row| row[..rank].to_vec()).collect()
    };
    let mut a = first(&basis, rows);
    let mut b = product(&transposed(&a, rows, rank), &scaled, [rank, rows, columns]);
    // Factors of one size: a step changes both alike.
    let size: Vec<f32> = b.chunks_exact(columns).map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    let root: Vec<f32> = size.iter().map(|size| size.sqrt().max(1e-12)).collect();
    b.chunks_exact_mut(columns).zip(&root).for_each(|(row, root)| row.iter_mut().for_each(|x| *x /= root));
    for (i, row) in a.chunks_exact_mut(rank).enumerate() {
        let scale = scales.map_or(1.0, |scales| scales[i]);
        row.iter_mut().zip(&root).for_each(|(x, root)| *x *= root / scale);
    }
    [a, b]
}

/// Eigenvectors of `m mᵀ`, as columns, the largest first (Jacobi's method).
fn symmetric(m: &[f32], n: usize, columns: usize) -> [Vec<f32>; 2] {
    let dot = |i: usize, j: usize| -> f64 {
        let (x, y) = (&m[i * columns..(i + 1) * columns], &m[j * columns..(j + 1) * columns]);
        x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    let mut s: Vec<f64> = (0..n * n).into_par_iter().map(|k| dot(k / n, k % n)).collect();
    let mut v: Vec<f64> = (0..n * n).map(|k| f64::from(u8::from(k / n == k % n))).collect();
    for _ in 0..30 {
        let mut off = 0.0;
        for p in 0..n {
            for q in p + 1..n {
                let (pp, qq, pq) = (s[p * n + p], s[q * n + q], s[p * n + q]);
                if pq.abs() <= 1e-12 * (pp.abs() * qq.abs()).sqrt() {
                    continue;
                }
                off += pq * pq;
                let theta = (qq - pp) / (2.0 * pq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let turn = |x: f64, y: f64| (c * x - t * c * y, t * c * x + c * y);
                for k in 0..n {
                    (s[k * n + p], s[k * n + q]) = turn(s[k * n + p], s[k * n + q]);
                }
                for k in 0..n {
                    (s[p * n + k], s[q * n + k]) = turn(s[p * n + k], s[q * n + k]);
                    (v[k * n + p], v[k * n + q]) = turn(v[k * n + p], v[k * n + q]);
                }
            }
        }
        if off == 0.0 {
            break;
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| s[b * n + b].total_cmp(&s[a * n + a]));
    let vectors = (0..n * n).map(|k| v[k / n * n + order[k % n]] as f32).collect();
    [vectors, order.iter().map(|i| s[i * n + i] as f32).collect()]
}

/// Makes the columns orthonormal (Gram-Schmidt, twice); what depends on others becomes zero.
fn orthonormalize(a: &mut [f32], rows: usize, columns: usize) {
    let mut done: Vec<Vec<f64>> = vec![];
    for c in 0..columns {
        let mut column: Vec<f64> = (0..rows).map(|r| f64::from(a[r * columns + c])).collect();
        let before = column.iter().map(|x| x * x).sum::<f64>().sqrt();
        for _ in 0..2 {
            for other in &done {
                let dot: f64 = column.iter().zip(other).map(|(x, y)| x * y).sum();
                column.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = column.iter().map(|x| x * x).sum::<f64>().sqrt();
        let factor = if norm > 1e-7 * before && norm > 0.0 { 1.0 / norm } else { 0.0 };
        column.iter_mut().for_each(|x| *x *= factor);
        (0..rows).for_each(|r| a[r * columns + c] = column[r] as f32);
        done.push(column);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, name: &str) -> Vec<f32> {
        let counter = Counter::new(5, Purpose::Init, 0).fork(name);
        (0..n).map(|i| normal(counter, i as u64)).collect()
    }

    fn error(weight: &[f32], [a, b]: &[Vec<f32>; 2], [rows, rank, columns]: [usize; 3], scales: &[f32]) -> f64 {
        let close = product(a, b, [rows, rank, columns]);
        let rows = weight.chunks_exact(columns).zip(close.chunks_exact(columns)).zip(scales);
        rows.flat_map(|((w, c), s)| w.iter().zip(c).map(move |(w, c)| f64::from((w - c) * s).powi(2))).sum()
    }

    #[test]
    fn what_has_the_rank_comes_back_and_the_rest_is_as_close_as_singular_values_say() {
        let [rows, columns, rank] = [23, 17, 4];
        let ones = vec![1.0; rows];
        let exact = product(&random(rows * rank, "a"), &random(rank * columns, "b"), [rows, rank, columns]);
        let factors = low_rank(&exact, [rows, columns], rank, None);
        assert!(error(&exact, &factors, [rows, rank, columns], &ones) < 1e-6);
        // Diagonal: the error is what the smaller values leave.
        let weight: Vec<f32> = (0..rows * columns)
            .map(|i| if i / columns == i % columns { 1.0 + (i % columns) as f32 } else { 0.0 })
            .collect();
        let left: f64 = (1..=columns - rank).map(|v| (v * v) as f64).sum();
        let factors = low_rank(&weight, [rows, columns], rank, None);
        assert!((error(&weight, &factors, [rows, rank, columns], &ones) / left - 1.0).abs() < 1e-2);
    }

    #[test]
    fn scales_say_which_rows_count() {
        let [rows, columns, rank] = [12, 9, 3];
        let weight = random(rows * columns, "w");
        let scales: Vec<f32> = (0..rows).map(|i| if i % 4 == 0 { 10.0 } else { 0.3 }).collect();
        let plain = low_rank(&weight, [rows, columns], rank, None);
        let aware = low_rank(&weight, [rows, columns], rank, Some(&scales));
        let of = |factors| error(&weight, factors, [rows, rank, columns], &scales);
        assert!(of(&aware) < 0.9 * of(&plain), "{} {}", of(&aware), of(&plain));
    }
}
