//! The leading eigenvectors of symmetric matrices in f64: Householder reflections to tridiagonal form, then implicit QL (Golub and Van Loan, Matrix
//! Computations, sections 8.3.1 and 8.3.3), on the threads of the pool.

use rayon::prelude::*;

/// Entries of eigenvectors that rotations run over at once.
const SLAB: usize = 64;
/// Eigenvectors that are reflected back at once.
const TOGETHER: usize = 8;
/// Steps for one eigenvalue; two or three are usual.
const MOST_STEPS: usize = 60;

/// The `count` largest eigenvalues of the symmetric `a` `[n, n]`, falling, and their eigenvectors as rows of `[count, n]`. `a` is overwritten.
pub(crate) fn leading(mut a: Vec<f64>, n: usize, count: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut diagonal, mut beside) = tridiagonal(&mut a, n);
    let slabs = rotate(&mut diagonal, &mut beside);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    order.truncate(count);
    let whole = |&i: &usize| {
        slabs.iter().flat_map(move |slab| slab.chunks_exact(slab.len() / n).skip(i).take(1).flatten().copied())
    };
    let mut vectors: Vec<f64> = order.iter().flat_map(whole).collect();
    vectors.par_chunks_mut(TOGETHER * n.max(1)).for_each(|vectors| {
        for k in (0..n.saturating_sub(2)).rev() {
            let v = &a[k * n + k + 1..(k + 1) * n];
            vectors.chunks_exact_mut(n).for_each(|y| reflect(&mut y[k + 1..], v));
        }
    });
    (order.iter().map(|&i| diagonal[i]).collect(), vectors)
}

/// Diagonal and the entries beside it; of `a`, row `k` keeps the unit vector of its reflection right of the diagonal.
fn tridiagonal(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut beside = vec![0.0; n];
    for k in 0..n.saturating_sub(2) {
        let (row, below) = a[k * n..].split_at_mut(n);
        let v = &mut row[k + 1..];
        let norm = dot(v, v).sqrt();
        // The sign that does not cancel.
        let target = if v[0] > 0.0 { -norm } else { norm };
        beside[k] = target;
        v[0] -= target;
        let length = dot(v, v).sqrt();
        if length == 0.0 {
            continue;
        }
        v.iter_mut().for_each(|x| *x /= length);
        let v = &*v;
        // (I − 2vvᵀ) A (I − 2vvᵀ) = A − vwᵀ − wvᵀ.
        let mut w: Vec<f64> = below.par_chunks(n).map(|row| 2.0 * dot(&row[k + 1..], v)).collect();
        let along = dot(&w, v);
        w.iter_mut().zip(v).for_each(|(w, v)| *w -= along * v);
        below.par_chunks_mut(n).zip(v).zip(&w).for_each(|((row, &vi), &wi)| {
            row[k + 1..].iter_mut().zip(v).zip(&w).for_each(|((x, v), w)| *x -= vi * w + wi * v);
        });
    }
    if n > 1 {
        beside[n - 2] = a[(n - 2) * n + n - 1];
    }
    ((0..n).map(|i| a[i * n + i]).collect(), beside)
}

/// Makes `diagonal` the eigenvalues of the tridiagonal matrix; its eigenvectors are the rows of the slabs, each `[n, up to SLAB]`, side by side.
fn rotate(diagonal: &mut [f64], beside: &mut [f64]) -> Vec<Vec<f64>> {
    let n = diagonal.len();
    let slab = |from: usize| {
        let width = SLAB.min(n - from);
        let mut slab = vec![0.0; n * width];
        (0..width).for_each(|i| slab[(from + i) * width + i] = 1.0);
        slab
    };
    let mut slabs: Vec<Vec<f64>> = (0..n).step_by(SLAB).map(slab).collect();
    for l in 0..n {
        for _ in 0..MOST_STEPS {
            let negligible = |m: usize| beside[m].abs() <= f64::EPSILON * (diagonal[m].abs() + diagonal[m + 1].abs());
            let m = (l..n - 1).find(|&m| negligible(m)).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let rotations = step(diagonal, beside, l, m);
            slabs.par_iter_mut().for_each(|slab| {
                let width = slab.len() / n;
                for &(i, c, s) in &rotations {
                    let (upper, lower) = slab[i * width..(i + 2) * width].split_at_mut(width);
                    for (a, b) in upper.iter_mut().zip(lower) {
                        (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
                    }
                }
            });
        }
    }
    slabs
}

/// An implicit QL step with Wilkinson's shift on rows `l..=m`; the rotations of rows `i` and `i + 1` that it is made of.
fn step(d: &mut [f64], e: &mut [f64], l: usize, m: usize) -> Vec<(usize, f64, f64)> {
    let mut rotations = Vec::with_capacity(m - l);
    let half = (d[l + 1] - d[l]) / (2.0 * e[l]);
    let mut g = d[m] - d[l] + e[l] / (half + half.hypot(1.0).copysign(half));
    let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
    for i in (l..m).rev() {
        let (f, b) = (s * e[i], c * e[i]);
        let r = f.hypot(g);
        e[i + 1] = r;
        if r == 0.0 {
            // The matrix falls apart here.
            d[i + 1] -= p;
            e[m] = 0.0;
            return rotations;
        }
        (s, c) = (f / r, g / r);
        g = d[i + 1] - p;
        let r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        rotations.push((i, c, s));
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
    rotations
}

/// `y − 2v(v·y)`
fn reflect(y: &mut [f64], v: &[f64]) {
    let along = 2.0 * dot(y, v);
    y.iter_mut().zip(v).for_each(|(y, v)| *y -= along * v);
}

/// In eight partial sums, which the compiler keeps in registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, b) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.0.iter().zip(b.0) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + a.1.iter().zip(b.1).map(|(a, b)| a * b).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_are_stretched_and_orthogonal() {
        for n in [1, 2, 3, 10, 65, 130] {
            let mut a = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..=i {
                    let x = ((i * 31 + j * 17) % 101) as f64 / 50.0 - 1.0;
                    (a[i * n + j], a[j * n + i]) = (x, x);
                }
            }
            let count = n.div_ceil(2);
            let (values, vectors) = leading(a.clone(), n, count);
            assert!(values.is_sorted_by(|a, b| a >= b));
            for i in 0..count {
                let y = &vectors[i * n..][..n];
                for (j, row) in a.chunks(n).enumerate() {
                    assert!((dot(row, y) - values[i] * y[j]).abs() < 1e-10 * n as f64, "{n}: {i}");
                }
                for j in 0..count {
                    assert!((dot(y, &vectors[j * n..][..n]) - f64::from(i == j)).abs() < 1e-10, "{n}: {i} {j}");
                }
            }
        }
        // Equal eigenvalues, and none at all.
        let (values, _) = leading(vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], 3, 2);
        assert_eq!(values, [1.0, 1.0]);
        assert_eq!(leading(vec![0.0; 16], 4, 1).0, [0.0]);
    }
}
