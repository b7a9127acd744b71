//! Weights `[in, out]` rounded to a grid: every output has a step for each group of its inputs.

use half::f16;
use rayon::prelude::*;

use super::simd::vectorized;

/// Columns of a task that goes down the rows of a group.
const COLUMNS: usize = 128;

/// The smallest step that is used: f16 has it with four bits.
const LEAST: f32 = 1.0 / (1 << 20) as f32;

/// Which weights share a step, and how far it goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub outputs: usize,
    /// Rows of a group.
    pub rows: usize,
    /// The largest code; the smallest is as far on the other side.
    pub largest: f32,
    /// Whether steps are numbers of 16 bits.
    pub half: bool,
}

impl Grid {
    /// What goes down the columns of every group: `each` gets the group's first element of a column range, and what it returns is put together as `[groups, out]`.
    fn by_columns(self, n: usize, each: impl Fn(usize, usize, usize) -> Vec<f32> + Sync) -> Vec<f32> {
        let groups = n / (self.outputs * self.rows).max(1);
        let tasks: Vec<(usize, usize)> =
            (0..groups).flat_map(|g| (0..self.outputs).step_by(COLUMNS).map(move |first| (g, first))).collect();
        let parts: Vec<Vec<f32>> = tasks
            .into_par_iter()
            .map(|(g, first)| each(g * self.rows * self.outputs, first, COLUMNS.min(self.outputs - first)))
            .collect();
        parts.into_iter().flatten().collect()
    }

    /// A step as it is used.
    pub fn step(self, step: f32) -> f32 {
        if self.half { f16::from_f32(step).min(f16::MAX).to_f32() } else { step }
    }

    /// A learned step as it is used.
    pub fn learned(self, step: f32) -> f32 {
        self.step(step.max(LEAST))
    }

    /// Steps with which the largest weight of each group is on the grid; 0 where all are 0.
    pub fn absmax(self, w: &[f32]) -> Vec<f32> {
        let largest = self.by_columns(w.len(), |start, first, n| {
            let mut most = vec![0f32; n];
            for r in 0..self.rows {
                let row = &w[start + r * self.outputs + first..][..n];
                most.iter_mut().zip(row).for_each(|(most, w)| *most = most.max(w.abs()));
            }
            most
        });
        let step = |most: f32| self.step((f64::from(most) / f64::from(self.largest)) as f32);
        largest.into_iter().map(step).collect()
    }

    /// Mean magnitudes of each group.
    pub fn mean(self, w: &[f32]) -> Vec<f32> {
        self.by_columns(w.len(), |start, first, n| {
            let mut sums = vec![0f64; n];
            for r in 0..self.rows {
                let row = &w[start + r * self.outputs + first..][..n];
                sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(w.abs()));
            }
            sums.into_iter().map(|sum| (sum / self.rows as f64) as f32).collect()
        })
    }

    /// The value on the grid that is nearest to each weight, ties to even, the last for what is beyond.
    pub fn quantize(self, w: &[f32], steps: &[f32], out: &mut [f32]) {
        let rows = out.par_chunks_mut(self.outputs.max(1)).zip(w.par_chunks(self.outputs.max(1)));
        rows.enumerate().with_min_len(16).for_each(|(r, (out, w))| {
            let steps = &steps[r / self.rows * self.outputs..][..self.outputs];
            quantize_row(w, steps, self.largest, out);
        });
    }

    /// Gradients of [`quantize`](Self::quantize) by the straight-through estimate: that of a weight (into `dy`'s place) is that of its value where it is not beyond
    /// the grid, else 0; those of the steps, times `factor`, are returned.
    pub fn learned_gradients(self, w: &[f32], steps: &[f32], dy: &mut [f32], factor: f32) -> Vec<f32> {
        let sums = self.by_columns(w.len(), |start, first, n| {
            let steps = &steps[start / self.rows + first..][..n];
            let mut sums = vec![0f32; n];
            for r in 0..self.rows {
                let at = start + r * self.outputs + first;
                step_gradients(&w[at..][..n], steps, &dy[at..][..n], self.largest, &mut sums);
            }
            sums.into_iter().map(|sum| sum * factor).collect()
        });
        let rows = dy.par_chunks_mut(self.outputs.max(1)).zip(w.par_chunks(self.outputs.max(1)));
        rows.enumerate().with_min_len(16).for_each(|(r, (dy, w))| {
            let steps = &steps[r / self.rows * self.outputs..][..self.outputs];
            clip_row(w, steps, self.largest, dy);
        });
        sums
    }
}

vectorized! {
    fn quantize_row(w: &[f32], steps: &[f32], largest: f32, out: &mut [f32]) {
        let largest = f64::from(largest);
        for ((out, w), step) in out.iter_mut().zip(w).zip(steps) {
            // In double precision, in which the quotient is on the right side of a half.
            let code = (f64::from(*w) / f64::from(*step)).round_ties_even().clamp(-largest, largest) as f32;
            *out = if *step > 0.0 { code * step } else { 0.0 };
        }
    }
}

vectorized! {
    fn step_gradients(w: &[f32], steps: &[f32], dy: &[f32], largest: f32, sums: &mut [f32]) {
        for (((sum, w), step), dy) in sums.iter_mut().zip(w).zip(steps).zip(dy) {
            let v = w / step;
            // The last code beyond the grid, what rounding added inside.
            let inside = v.round_ties_even() - v;
            let slope = if v > largest { largest } else if v < -largest { -largest } else { inside };
            *sum += dy * slope;
        }
    }
}

vectorized! {
    fn clip_row(w: &[f32], steps: &[f32], largest: f32, dy: &mut [f32]) {
        for ((dy, w), step) in dy.iter_mut().zip(w).zip(steps) {
            let inside = (w / step).abs() <= largest;
            *dy = if inside { *dy } else { 0.0 };
        }
    }
}
