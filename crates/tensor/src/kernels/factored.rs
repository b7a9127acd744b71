//! Optimizers that keep a number per row and column of a matrix: means of squares, and updates that they scale. All threads, in an order that does not depend
//! on how many there are.

use rayon::prelude::*;

use super::matmul::Into;
use super::{CHUNK, simd, sum_over_rows};

/// Rows of a task.
fn rows_per_task(columns: usize) -> usize {
    (CHUNK / columns.max(1)).max(1)
}

/// Means of the squares of matrices `[n, rows, columns]`: over columns, `[n, rows]`, and over rows, `[n, columns]`.
///
/// # Panics
/// If the length does not fit the shape.
pub(crate) fn mean_squares(x: &[f32], [n, rows, columns]: [usize; 3]) -> (Vec<f32>, Vec<f32>) {
    simd::vectorized! {
        fn task(x: &[f32], means: &mut [f32], sums: &mut [f32]) {
            let columns = sums.len();
            for (x, mean) in x.chunks_exact(columns).zip(means) {
                *mean = simd::dot(x, x) / columns as f32;
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
            }
        }
    }
    assert_eq!(x.len(), n * rows * columns, "mean_squares: length");
    let (mut over_columns, mut over_rows) = (vec![0.0; n * rows], vec![0.0; n * columns]);
    if x.is_empty() {
        return (over_columns, over_rows);
    }
    let many = rows_per_task(columns);
    let matrices = x.chunks(rows * columns).zip(over_columns.chunks_mut(rows)).zip(over_rows.chunks_mut(columns));
    for ((x, means), sums) in matrices {
        let tasks = x.par_chunks(many * columns).zip(means.par_chunks_mut(many));
        sum_over_rows(tasks, sums, Into::Write, |(x, means), sums| task(x, means, sums));
        sums.iter_mut().for_each(|sum| *sum /= rows as f32);
    }
    (over_columns, over_rows)
}

/// `y = x / √max(r c, least)`, for the factors r of its row, `[n, rows]`, and c of its column, `[n, columns]`.
///
/// # Panics
/// If the lengths do not fit the shape.
pub(crate) fn divide_by_root(
    y: &mut [f32],
    x: &[f32],
    shape: [usize; 3],
    by_row: &[f32],
    by_column: &[f32],
    least: f32,
) {
    simd::vectorized! {
        fn row(y: &mut [f32], x: &[f32], r: f32, c: &[f32], least: f32) {
            y.iter_mut().zip(x).zip(c).for_each(|((y, x), c)| *y = x / (r * c).max(least).sqrt());
        }
    }
    let [n, rows, columns] = shape;
    let elements = n * rows * columns;
    let expected = [elements, elements, n * rows, n * columns];
    assert_eq!([y.len(), x.len(), by_row.len(), by_column.len()], expected, "divide_by_root: lengths");
    if x.is_empty() {
        return;
    }
    let many = rows_per_task(columns);
    let tasks = y.par_chunks_mut(many * columns).zip(x.par_chunks(many * columns)).zip(by_row.par_chunks(many));
    tasks.enumerate().for_each(|(task, ((y, x), by_row))| {
        for (i, ((y, x), &r)) in y.chunks_mut(columns).zip(x.chunks(columns)).zip(by_row).enumerate() {
            let matrix = (task * many + i) / rows;
            row(y, x, r, &by_column[matrix * columns..][..columns], least);
        }
    });
}

/// `keep y − r c x` in place of `y`, for the factors r of its row and c of its column.
///
/// # Panics
/// If the lengths do not fit: `[rows, columns]`, with as many rows and columns as there are factors.
pub(crate) fn subtract_scaled(y: &mut [f32], keep: f32, x: &[f32], by_row: &[f32], by_column: &[f32]) {
    simd::vectorized! {
        fn row(y: &mut [f32], keep: f32, x: &[f32], r: f32, c: &[f32]) {
            y.iter_mut().zip(x).zip(c).for_each(|((y, x), c)| *y = keep * *y - r * c * x);
        }
    }
    let columns = by_column.len();
    assert!(y.len() == by_row.len() * columns && x.len() == y.len(), "subtract: lengths differ");
    if y.is_empty() {
        return;
    }
    let many = rows_per_task(columns);
    let tasks = y.par_chunks_mut(many * columns).zip(x.par_chunks(many * columns)).zip(by_row.par_chunks(many));
    tasks.for_each(|((y, x), by_row)| {
        for ((y, x), &r) in y.chunks_mut(columns).zip(x.chunks(columns)).zip(by_row) {
            row(y, keep, x, r, by_column);
        }
    });
}
