//! Linear head and the loss of a student, by chunks of rows as in [`cross_entropy`](super::cross_entropy): of the teacher's logits, too, only those of a chunk exist at once.
//!
//! What a row needs of all of the vocabulary are a few numbers ([`Part`]); ranks that have divided it exchange theirs, and one rank has them all.

use rayon::prelude::*;

use super::cross_entropy::{Gradients, Loss, Shard, by_chunks};
use super::matmul::{Into, Mat, matmul};
use super::simd::{LANES, exp, fold_lanes, max, reduce, sum, tanh, vectorized};
use crate::buffers::{buffer, recycle};

/// What the teacher says of each row.
#[derive(Clone, Copy)]
pub(crate) enum Teacher<'a> {
    /// Its hidden states `[n, d']`, and those rows of its head that the student's head has, `[v, d']`, with the soft-cap of its logits.
    Head { hidden: &'a [f32], weight: Mat<'a>, softcap: f32 },
    /// Its k most probable tokens and their probabilities, `[n, k]`.
    TopK { k: usize, ids: &'a [u32], probabilities: &'a [f32] },
}

/// How the teacher counts.
#[derive(Clone, Copy)]
pub(crate) struct Soft<'a> {
    pub teacher: Teacher<'a>,
    /// Share of the loss of the targets.
    pub alpha: f32,
    /// By what both models' logits are divided.
    pub temperature: f32,
}

/// The scaled sum of `alpha` times the loss of the targets and `1 - alpha` times the squared temperature times KL(teacher | student), over the rows whose target is not
/// negative; and the two scaled sums without their shares.
pub(crate) fn linear_distillation(
    hidden: &[f32],
    weight: Mat<'_>,
    targets: &[i32],
    loss: Loss,
    soft: Soft<'_>,
    shard: &Shard<'_>,
    gradients: Option<Gradients<'_>>,
) -> (f32, [f64; 2]) {
    let (v, with_gradient) = (weight.rows(), gradients.is_some());
    let (mut sums, mut scratch) = ([0f64; 2], vec![]);
    let square = soft.temperature * soft.temperature;
    // A share of 0 hides what is not finite.
    let share = |share: f32, x: f32| if share > 0.0 { share * x } else { 0.0 };
    let losses = |rows: std::ops::Range<usize>, logits: &mut [f32], targets: &[i32]| {
        let n = rows.len();
        if let Teacher::Head { hidden, weight, .. } = soft.teacher {
            let d = weight.cols();
            if scratch.is_empty() {
                // The first chunk is the largest.
                scratch = buffer(n * v);
            }
            let h = Mat::new(&hidden[rows.start * d..rows.end * d], n, d, d);
            matmul(loss.compute, h, weight.t(), &mut scratch[..n * v], v, Into::Write);
        }
        let theirs = if scratch.is_empty() { &mut [][..] } else { &mut scratch[..n * v] };
        let chunk = Chunk {
            v: v.max(1),
            first: rows.start,
            loss,
            soft,
            first_token: shard.first,
            vocab: shard.vocab,
            with_gradient,
        };
        let of_rows = chunk.losses(logits, theirs, targets, shard.exchange);
        let join = |[hard, kl]: [f32; 2]| {
            sums[0] += f64::from(hard);
            sums[1] += f64::from(kl * square);
            share(soft.alpha, hard) + share(1.0 - soft.alpha, kl * square)
        };
        of_rows.into_iter().map(join).collect()
    };
    let total = by_chunks(hidden, weight, targets, loss, shard.largest, gradients, losses);
    recycle(scratch);
    (total, sums.map(|sum| sum * f64::from(loss.scale)))
}

/// What a rank knows of a row. With x the student's logits and y the teacher's, both over this rank's part of the vocabulary, a and b their maxima and t the temperature:
/// a, `sum exp(x - a)`, `sum exp((x - a) / t)`, the sum of x, the target's x or 0, and then
/// - of a teacher's head: b, `sum e` with `e = exp((y - b) / t)`, `sum e (x - a)`, `sum e (y - b)`
/// - of its k tokens: 0, the sum of their probabilities p, `sum p (x - a)`, and `sum exp((x - a) / t)` over the others
type Part = [f32; 9];

/// The teacher's tokens that a rank has of a row, by their places, with their probabilities.
type Known = Vec<(usize, f32)>;

/// A chunk of rows.
struct Chunk<'a> {
    v: usize,
    /// The number of its first row.
    first: usize,
    loss: Loss,
    soft: Soft<'a>,
    /// The number of this rank's first token, and all ranks' tokens.
    first_token: usize,
    vocab: usize,
    with_gradient: bool,
}

impl Chunk<'_> {
    /// Of each row the loss of its target and KL(teacher | student).
    fn losses(
        &self,
        logits: &mut [f32],
        theirs: &mut [f32],
        targets: &[i32],
        exchange: &dyn Fn(&[f32]) -> Vec<f32>,
    ) -> Vec<[f32; 2]> {
        let (v, n, loss, soft) = (self.v, targets.len(), self.loss, self.soft);
        let mine: Vec<Part> = (logits.par_chunks_exact_mut(v))
            .zip(rows(theirs, v, n))
            .zip(targets.par_iter())
            .enumerate()
            .map(|(i, ((x, y), &target))| match target {
                0.. => row_part(x, y, self.place(target as usize), &self.known(i), loss.softcap, soft),
                _ => [0.0; 9],
            })
            .collect();
        let all = exchange(mine.as_flattened());
        let of_ranks: Vec<&[Part]> = all.as_chunks::<9>().0.chunks_exact(n).collect();
        let losses = (logits.par_chunks_exact_mut(v))
            .zip(rows(theirs, v, n))
            .zip(targets.par_iter())
            .enumerate()
            .map(|(i, ((x, y), &target))| {
                if target < 0 {
                    x.fill(0.0);
                    return [0.0; 2];
                }
                let parts: Vec<Part> = of_ranks.iter().map(|parts| parts[i]).collect();
                let whole = Whole::new(&parts, soft, self.vocab);
                let losses = whole.losses(loss, soft, self.constant(i));
                if self.with_gradient {
                    let (at, known) = (self.place(target as usize), self.known(i));
                    row_gradient(x, y, at, &known, loss, soft, &whole, mine[i][5], self.rest(i));
                }
                // A non-finite logit must reach the loss, although `exp` and `max` would hide it.
                let finite = |part: &Part| part[0].is_finite() && part[4].is_finite() && part[5].is_finite();
                if parts.iter().all(finite) { losses } else { [f32::NAN; 2] }
            })
            .collect();
        recycle(all);
        losses
    }

    /// A token's place in this rank's vocabulary, if it has it.
    fn place(&self, id: usize) -> Option<usize> {
        id.checked_sub(self.first_token).filter(|&at| at < self.v)
    }

    fn top_k(&self, row: usize) -> (&[u32], &[f32]) {
        match self.soft.teacher {
            Teacher::TopK { k, ids, probabilities } => {
                let of_row = (self.first + row) * k..(self.first + row + 1) * k;
                (&ids[of_row.clone()], &probabilities[of_row])
            }
            Teacher::Head { .. } => (&[], &[]),
        }
    }

    fn known(&self, row: usize) -> Known {
        let (ids, p) = self.top_k(row);
        ids.iter().zip(p).filter_map(|(&id, &p)| Some((self.place(id as usize)?, p))).collect()
    }

    /// What the teacher gives to all other tokens than its k.
    fn rest(&self, row: usize) -> f32 {
        (1.0 - self.top_k(row).1.iter().sum::<f32>()).max(0.0)
    }

    /// What the student does not change in KL: the sum of `p ln p` of what a list of k tokens has; and the rest.
    fn constant(&self, row: usize) -> [f32; 2] {
        let (p_ln_p, rest) = (|p: f32| if p > 0.0 { p * p.ln() } else { 0.0 }, self.rest(row));
        [self.top_k(row).1.iter().map(|&p| p_ln_p(p)).sum::<f32>() + p_ln_p(rest), rest]
    }
}

/// The rows of the teacher's logits; empty ones where there are none.
fn rows(theirs: &mut [f32], v: usize, n: usize) -> Vec<&mut [f32]> {
    if theirs.is_empty() {
        return (0..n).map(|_| Default::default()).collect();
    }
    theirs.chunks_exact_mut(v).collect()
}

/// What the ranks know of a row together; fields as in [`Part`].
struct Whole {
    a: f32,
    sum: f32,
    sum_t: f32,
    mean: f32,
    at_target: f32,
    b: f32,
    sum_y: f32,
    dot_x: f32,
    dot_y: f32,
    vocab: f32,
}

impl Whole {
    fn new(parts: &[Part], soft: Soft<'_>, vocab: usize) -> Self {
        let (t, vocab) = (1.0 / soft.temperature, vocab as f32);
        let largest = |at: usize| parts.iter().fold(f32::NEG_INFINITY, |top, part| top.max(part[at]));
        let (a, b) = (largest(0), largest(5));
        let total = |of: &dyn Fn(&Part) -> f32| parts.iter().map(of).sum::<f32>();
        let up = |part: &Part| exp((part[0] - a) * t);
        let (sum, sum_t) = (total(&|p| p[1] * exp(p[0] - a)), total(&|p| p[2] * up(p)));
        let (mean, at_target) = (total(&|p| p[3]) / vocab, total(&|p| p[4]));
        match soft.teacher {
            Teacher::Head { .. } => {
                let up = |part: &Part| exp((part[5] - b) * t);
                let sum_y = total(&|p| p[6] * up(p));
                let dot_x = total(&|p| up(p) * (p[7] + (p[0] - a) * p[6]));
                let dot_y = total(&|p| up(p) * (p[8] + (p[5] - b) * p[6]));
                Self { a, sum, sum_t, mean, at_target, b, sum_y, dot_x, dot_y, vocab }
            }
            Teacher::TopK { .. } => {
                let dot_x = total(&|p| p[7] + (p[0] - a) * p[6]);
                Self { a, sum, sum_t, mean, at_target, b, sum_y: 1.0, dot_x, dot_y: total(&|p| p[8] * up(p)), vocab }
            }
        }
    }

    /// Of the target and of the teacher. Of a list of k tokens, all others are one outcome for both models.
    fn losses(&self, loss: Loss, soft: Soft<'_>, [constant, rest]: [f32; 2]) -> [f32; 2] {
        let log = self.a + self.sum.ln();
        let smooth = loss.label_smoothing * (self.at_target - self.mean);
        let hard = log - self.at_target + smooth + loss.z_loss * log * log;
        let t = 1.0 / soft.temperature;
        let kl = match soft.teacher {
            Teacher::Head { .. } => (self.dot_y - self.dot_x) / self.sum_y * t - self.sum_y.ln() + self.sum_t.ln(),
            Teacher::TopK { .. } => {
                let others = if rest > 0.0 { rest * self.dot_y.ln() } else { 0.0 };
                constant - self.dot_x * t + self.sum_t.ln() - others
            }
        };
        [hard, kl]
    }
}

vectorized! {
    /// Caps both rows, and leaves in the teacher's the e of [`Part`].
    fn row_part(
        x: &mut [f32],
        y: &mut [f32],
        at: Option<usize>,
        known: &Known,
        softcap: f32,
        soft: Soft<'_>,
    ) -> Part {
        let t = 1.0 / soft.temperature;
        if softcap > 0.0 {
            x.iter_mut().for_each(|x| *x = softcap * tanh(*x / softcap));
        }
        let a = max(x);
        let mut part = [0.0; 9];
        part[0] = a;
        part[1] = reduce(x, 0.0, |sum, x| sum + exp(x - a), |a, b| a + b);
        part[3] = sum(x);
        part[4] = at.map_or(0.0, |at| x[at]);
        match soft.teacher {
            Teacher::Head { softcap, .. } => {
                part[2] = reduce(x, 0.0, |sum, x| sum + exp((x - a) * t), |a, b| a + b);
                if softcap > 0.0 {
                    y.iter_mut().for_each(|y| *y = softcap * tanh(*y / softcap));
                }
                let b = max(y);
                part[5] = b;
                let mut lanes = [[0f32; LANES]; 3];
                for (x, y) in x.chunks(LANES).zip(y.chunks_mut(LANES)) {
                    for (k, (x, y)) in x.iter().zip(y).enumerate() {
                        let e = exp((*y - b) * t);
                        lanes[0][k] += e;
                        lanes[1][k] += e * (x - a);
                        lanes[2][k] += e * (*y - b);
                        *y = e;
                    }
                }
                for (part, lanes) in part[6..].iter_mut().zip(lanes) {
                    *part = fold_lanes(lanes, |a, b| a + b);
                }
            }
            Teacher::TopK { .. } => {
                let mut of_known = 0.0;
                for &(at, p) in known {
                    of_known += exp((x[at] - a) * t);
                    part[6] += p;
                    part[7] += p * (x[at] - a);
                }
                // The difference of two sums would be nothing but rounding where the k tokens have nearly all.
                let kept: Vec<f32> = known.iter().map(|&(at, _)| std::mem::replace(&mut x[at], f32::NEG_INFINITY)).collect();
                part[8] = reduce(x, 0.0, |sum, x| sum + exp((x - a) * t), |a, b| a + b);
                known.iter().zip(kept).for_each(|(&(at, _), kept)| x[at] = kept);
                part[2] = part[8] + of_known;
            }
        }
        part
    }
}

vectorized! {
    /// Turns the student's row into the gradient: with p and q the probabilities of student and teacher at temperature t, of `alpha` times what
    /// [`cross_entropy`](super::cross_entropy) has plus `(1 - alpha) t (p - q)`. Where only k of the teacher's are known, the others share the rest as the student's do.
    fn row_gradient(
        x: &mut [f32],
        y: &[f32],
        at: Option<usize>,
        known: &Known,
        loss: Loss,
        soft: Soft<'_>,
        whole: &Whole,
        own_b: f32,
        rest: f32,
    ) {
        let Loss { scale, label_smoothing, z_loss, softcap, .. } = loss;
        let (a, t) = (whole.a, 1.0 / soft.temperature);
        let hard_scale = scale * soft.alpha;
        let hard = hard_scale * (1.0 + 2.0 * z_loss * (a + whole.sum.ln())) / whole.sum;
        let spread = hard_scale * label_smoothing / whole.vocab;
        let of_teacher = scale * (1.0 - soft.alpha) * soft.temperature;
        let slope = |x: f32| if softcap > 0.0 { 1.0 - (x / softcap) * (x / softcap) } else { 1.0 };
        let at_target = at.map_or(0.0, |at| slope(x[at]));
        match soft.teacher {
            Teacher::Head { .. } => {
                let (student, teacher) = (of_teacher / whole.sum_t, of_teacher * exp((own_b - whole.b) * t) / whole.sum_y);
                for (x, y) in x.iter_mut().zip(y) {
                    let soft = exp((*x - a) * t) * student - y * teacher;
                    *x = (exp(*x - a) * hard - spread + soft) * slope(*x);
                }
            }
            Teacher::TopK { .. } => {
                let others = if rest > 0.0 { rest / whole.dot_y } else { 0.0 };
                let student = of_teacher * (1.0 / whole.sum_t - others);
                let of_known: Vec<f32> = known
                    .iter()
                    .map(|&(at, p)| {
                        let soft = of_teacher * (exp((x[at] - a) * t) / whole.sum_t - p);
                        (exp(x[at] - a) * hard - spread + soft) * slope(x[at])
                    })
                    .collect();
                x.iter_mut().for_each(|x| *x = (exp(*x - a) * hard - spread + exp((*x - a) * t) * student) * slope(*x));
                known.iter().zip(of_known).for_each(|(&(at, _), value)| x[at] = value);
            }
        }
        if let Some(at) = at {
            x[at] -= hard_scale * (1.0 - label_smoothing) * at_target;
        }
    }
}
