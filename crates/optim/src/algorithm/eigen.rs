//! Orthonormal bases of symmetric matrices in double precision, on the host. Vectors are rows, so that every inner loop runs over contiguous memory. Rows are
//! shared among threads, and each is computed in one order, whatever their number.

use rayon::prelude::*;

/// Values below which threads cost more than they save.
const MIN_PARALLEL: usize = 128 * 128;

fn dot(x: &[f64], y: &[f64]) -> f64 {
    // Sums of their own, which the compiler can keep in vectors.
    const LANES: usize = 8;
    let (x, y) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f64 = x.remainder().iter().zip(y.remainder()).map(|(x, y)| x * y).sum();
    let mut sums = [0.0; LANES];
    for (x, y) in x.zip(y) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    rest + sums.iter().sum::<f64>()
}

/// `y += k x`
fn add(y: &mut [f64], k: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += k * x);
}

/// Turns `x` into the unit vector v of the Householder reflection I − 2 v vᵀ, which maps `x` to a multiple of its first axis, and returns that multiple. Of
/// zeros v is zero, and the reflection nothing.
fn reflector(x: &mut [f64]) -> f64 {
    let length = dot(x, x).sqrt();
    if length == 0.0 {
        return 0.0;
    }
    // Away from zero, so that nothing cancels.
    let image = -length.copysign(x[0]);
    x[0] -= image;
    let scale = dot(x, x).sqrt().recip();
    x.iter_mut().for_each(|x| *x *= scale);
    image
}

fn reflect(row: &mut [f64], v: &[f64]) {
    add(row, -2.0 * dot(row, v), v);
}

/// Calls `f` with each row of `width` values.
fn each_row(rows: &mut [f64], width: usize, f: impl Fn(usize, &mut [f64]) + Sync + Send) {
    if rows.len() < MIN_PARALLEL {
        rows.chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    } else {
        rows.par_chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    }
}

fn identity(n: usize) -> Vec<f64> {
    let mut rows = vec![0.0; n * n];
    rows.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    rows
}

/// `n` orthonormal rows of which the first k span what the first k of `rows` do: the Q of a QR decomposition, by Householder's reflections. Rows that depend
/// on earlier ones are replaced.
pub(super) fn orthonormal(mut rows: Vec<f64>, n: usize) -> Vec<f64> {
    for j in 0..n {
        let (done, later) = rows.split_at_mut((j + 1) * n);
        let v = &mut done[j * n + j..];
        reflector(v);
        let v = &*v;
        each_row(later, n, |_, row| reflect(&mut row[j..], v));
    }
    let mut q = identity(n);
    each_row(&mut q, n, |i, row| {
        // Later reflections leave this row as it is.
        (0..=i).rev().for_each(|j| reflect(&mut row[j..], &rows[j * n + j..(j + 1) * n]));
    });
    q
}

/// The eigenvectors of a symmetric matrix `[n, n]` as rows, eigenvalues descending: reduction to a tridiagonal matrix, then the QL algorithm with implicit
/// shifts (Golub and Van Loan, Matrix Computations, sections 8.3.1 and 8.3.3). Of a matrix with an element that is not finite: the identity.
pub(super) fn eigenvectors(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    let mut z = identity(n);
    if n < 2 || a.iter().any(|x| !x.is_finite()) {
        return z;
    }
    let mut beside = vec![0.0; n];
    for k in 0..n - 1 {
        let (done, later) = a.split_at_mut((k + 1) * n);
        let v = &mut done[k * n + k + 1..];
        beside[k] = reflector(v);
        let v = &*v;
        // (I − 2 v vᵀ) A (I − 2 v vᵀ) = A − v wᵀ − w vᵀ
        let mut w = vec![0.0; n - k - 1];
        let products = w.iter_mut().zip(later.chunks(n));
        products.for_each(|(w, row)| *w = 2.0 * dot(&row[k + 1..], v));
        let half = dot(&w, v);
        add(&mut w, -half, v);
        each_row(later, n, |i, row| {
            add(&mut row[k + 1..], -v[i], &w);
            add(&mut row[k + 1..], -w[i], v);
        });
    }
    let mut diagonal: Vec<f64> = a.iter().step_by(n + 1).copied().collect();
    tridiagonal(&mut diagonal, &mut beside, &mut z);
    each_row(&mut z, n, |_, row| {
        (0..n - 1).rev().for_each(|k| reflect(&mut row[k + 1..], &a[k * n + k + 1..(k + 1) * n]));
    });
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    order.iter().flat_map(|&i| z[i * n..(i + 1) * n].iter().copied()).collect()
}

/// Rotates the rows of `z` into eigenvectors of the matrix with `d` on its diagonal and `e` beside it; `d` becomes the eigenvalues.
fn tridiagonal(d: &mut [f64], e: &mut [f64], z: &mut [f64]) {
    /// Each eigenvalue takes two or three.
    const MAX_ITERATIONS: usize = 60;
    let n = d.len();
    for l in 0..n {
        for _ in 0..MAX_ITERATIONS {
            let negligible = |&m: &usize| e[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs());
            let m = (l..n - 1).find(negligible).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let half = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut g = d[m] - d[l] + e[l] / (half + half.hypot(1.0).copysign(half));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut splits = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    splits = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let (low, high) = z.split_at_mut((i + 1) * n);
                for (x, y) in low[i * n..].iter_mut().zip(&mut high[..n]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            e[m] = 0.0;
            if !splits {
                d[l] -= p;
                e[l] = g;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, salt: u64) -> Vec<f64> {
        let number = |i: usize| {
            let x = (i as u64 + 1000 * salt + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        (0..n).map(number).collect()
    }

    /// `X Xᵀ` of `[n, rank]`, with columns of very different sizes.
    fn gram(n: usize, rank: usize) -> Vec<f64> {
        let mut x = numbers(n * rank, 3);
        x.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f64.powi(-((i % rank) as i32 % 5)));
        let row = |i: usize| &x[i * rank..(i + 1) * rank];
        (0..n * n).map(|ij| dot(row(ij / n), row(ij % n))).collect()
    }

    #[track_caller]
    fn assert_orthonormal(rows: &[f64], n: usize) {
        for (i, x) in rows.chunks(n).enumerate() {
            for (j, y) in rows.chunks(n).enumerate() {
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((dot(x, y) - expected).abs() < 1e-13, "{n}: {i}, {j}: {}", dot(x, y));
            }
        }
    }

    #[test]
    fn eigenvectors_are_orthonormal_diagonalize_and_descend() {
        for (n, rank) in [(1, 1), (2, 2), (3, 1), (11, 6), (17, 40), (90, 90), (130, 7)] {
            let a = gram(n, rank);
            let vectors = eigenvectors(a.clone(), n);
            assert_orthonormal(&vectors, n);
            let mut last = f64::INFINITY;
            let trace: f64 = a.iter().step_by(n + 1).sum();
            for v in vectors.chunks(n) {
                let product: Vec<f64> = a.chunks(n).map(|row| dot(row, v)).collect();
                let value = dot(&product, v);
                let off = product.iter().zip(v).map(|(p, v)| (p - value * v).abs()).fold(0.0, f64::max);
                assert!(off <= 1e-13 * trace, "{n}, rank {rank}: {off}");
                assert!(value <= last + 1e-13 * trace, "{n}: {value} after {last}");
                last = value;
            }
        }
        // Nothing to decompose.
        assert_eq!(eigenvectors(vec![0.0; 9], 3), identity(3));
        assert_eq!(eigenvectors(vec![f64::NAN; 4], 2), identity(2));
    }

    #[test]
    fn orthonormal_rows_span_what_they_are_made_of() {
        for n in [1, 2, 5, 33, 80] {
            let rows = numbers(n * n, 5);
            let q = orthonormal(rows.clone(), n);
            assert_orthonormal(&q, n);
            for (i, row) in rows.chunks(n).enumerate() {
                for later in q.chunks(n).skip(i + 1) {
                    assert!(dot(row, later).abs() < 1e-12, "{n}: row {i}");
                }
            }
        }
        // Dependent rows, and none at all.
        let mut rows = numbers(25, 7);
        rows.copy_within(0..5, 10);
        rows[20..].fill(0.0);
        assert_orthonormal(&orthonormal(rows, 5), 5);
        assert_orthonormal(&orthonormal(vec![0.0; 25], 5), 5);
    }
}
