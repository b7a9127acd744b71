//! The plain references of the fused operations: double precision, no blocks, no tricks. Their gradients are finite differences.
#![allow(dead_code)] // each test file uses some of it

/// `[n, i] x [i, o] + b`
pub fn linear(x: &[f64], w: &[f64], b: Option<&[f64]>, i: usize, o: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks(i) {
        for c in 0..o {
            let dot: f64 = (0..i).map(|k| row[k] * w[k * o + c]).sum();
            y.push(dot + b.map_or(0.0, |b| b[c]));
        }
    }
    y
}

/// `[o, i]` from `[i, o]`
pub fn transpose(w: &[f64], i: usize, o: usize) -> Vec<f64> {
    (0..o).flat_map(|c| (0..i).map(move |k| w[k * o + c])).collect()
}

/// LayerNorm where `center`, RMSNorm otherwise.
pub fn norm(x: &[f64], w: &[f64], b: Option<&[f64]>, center: bool, eps: f64) -> Vec<f64> {
    let d = w.len();
    let mut y = Vec::new();
    for row in x.chunks(d) {
        let mean = if center { row.iter().sum::<f64>() / d as f64 } else { 0.0 };
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
        for k in 0..d {
            y.push((row[k] - mean) / (var + eps).sqrt() * w[k] + b.map_or(0.0, |b| b[k]));
        }
    }
    y
}

/// GELU, tanh form.
pub fn gelu(x: &[f64]) -> Vec<f64> {
    let c = (2.0 / std::f64::consts::PI).sqrt();
    x.iter().map(|&x| 0.5 * x * (1.0 + (c * (x + 0.044715 * x.powi(3))).tanh())).collect()
}

/// GELU, exact form, with erf from its series: 2 / sqrt(pi) e^-x^2 sum_k 2^k x^(2k+1) / (1 3 5 .. (2k+1)), whose terms have one sign.
pub fn gelu_exact(x: &[f64]) -> Vec<f64> {
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for k in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * k + 1);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
    };
    x.iter().map(|&x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))).collect()
}

/// `x sigmoid(1.702 x)`
pub fn quick_gelu(x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| x / (1.0 + (-1.702 * x).exp())).collect()
}

/// `silu(gate) * up`, rows `[gate | up]` of `2 f`.
pub fn swiglu(x: &[f64], f: usize) -> Vec<f64> {
    x.chunks(2 * f).flat_map(|r| (0..f).map(|k| r[k] / (1.0 + (-r[k]).exp()) * r[f + k])).collect()
}

/// `cap tanh(x / cap)`; 0: none.
fn soft_cap(x: f64, cap: f64) -> f64 {
    if cap == 0.0 { x } else { cap * (x / cap).tanh() }
}

/// RMSNorm of the first `h` and the next `k` heads of each row of `h + 2 k`.
pub fn qk_norm(qkv: &[f64], [q, k]: [&[f64]; 2], [h, n]: [usize; 2], eps: f64) -> Vec<f64> {
    let e = q.len();
    let rows = qkv.chunks((h + 2 * n) * e).map(|row| {
        let [queries, keys] =
            [norm(&row[..h * e], q, None, false, eps), norm(&row[h * e..(h + n) * e], k, None, false, eps)];
        [&queries, &keys, &row[(h + n) * e..]].concat()
    });
    rows.flatten().collect()
}

/// One attention layer: shapes, position and segment of each token, base of the rotation.
pub struct Attention<'a> {
    pub tokens: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub positions: &'a [i32],
    pub segments: &'a [i32],
    pub window: usize,
    pub softcap: f64,
    pub theta: Option<f64>,
    pub bidirectional: bool,
}

impl Attention<'_> {
    /// `[B, T, H E]` from `[B, T, (H + 2 K) E]`
    pub fn forward(&self, qkv: &[f64]) -> Vec<f64> {
        let Attention { tokens: t, heads: h, kv_heads: k, head_dim: e, .. } = *self;
        let w = (h + 2 * k) * e;
        let batch = qkv.len() / (t * w);
        let vector = |b: usize, i: usize, head: usize, rotate: bool| -> Vec<f64> {
            let at = (b * t + i) * w + head * e;
            let x = &qkv[at..at + e];
            let Some(theta) = self.theta.filter(|_| rotate) else { return x.to_vec() };
            let half = e / 2;
            (0..e)
                .map(|j| {
                    let angle = f64::from(self.positions[b * t + i]) * theta.powf(-2.0 * (j % half) as f64 / e as f64);
                    let partner = if j < half { -x[j + half] } else { x[j - half] };
                    x[j] * angle.cos() + partner * angle.sin()
                })
                .collect()
        };
        let mut out = vec![0.0; batch * t * h * e];
        for b in 0..batch {
            for head in 0..h {
                let kv = head / (h / k);
                for i in 0..t {
                    let q = vector(b, i, head, true);
                    let seen: Vec<usize> = (0..if self.bidirectional { t } else { i + 1 })
                        .filter(|&j| self.segments[b * t + j] == self.segments[b * t + i])
                        .filter(|&j| i.saturating_sub(j) < self.window)
                        .collect();
                    let scores: Vec<f64> = seen
                        .iter()
                        .map(|&j| {
                            let key = vector(b, j, h + kv, true);
                            soft_cap(
                                q.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / (e as f64).sqrt(),
                                self.softcap,
                            )
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                    for (&j, s) in seen.iter().zip(&scores) {
                        let p = (s - top).exp() / total;
                        let v = vector(b, j, h + k + kv, false);
                        for c in 0..e {
                            out[((b * t + i) * h + head) * e + c] += p * v[c];
                        }
                    }
                }
            }
        }
        out
    }
}

/// `scale * sum(-(1 - e) log softmax(h w^T)[target] - e mean(log softmax(h w^T)) + z (log sum exp h w^T)^2)` over targets that are not
/// negative, with e = `smoothing` and z = `z_loss`, and the logits capped by `cap`; `w` is `[v, d]`.
pub fn linear_cross_entropy(
    hidden: &[f64],
    w: &[f64],
    d: usize,
    targets: &[i32],
    scale: f64,
    (smoothing, z_loss, cap): (f64, f64, f64),
) -> Vec<f64> {
    let mut total = 0.0;
    for (row, &target) in hidden.chunks(d).zip(targets) {
        if target >= 0 {
            let logits: Vec<f64> =
                w.chunks(d).map(|w| soft_cap(row.iter().zip(w).map(|(a, b)| a * b).sum(), cap)).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
            let log = top + sum.ln();
            let log_p: Vec<f64> = logits.iter().map(|l| l - log).collect();
            let mean = log_p.iter().sum::<f64>() / log_p.len() as f64;
            total += -(1.0 - smoothing) * log_p[target as usize] - smoothing * mean + z_loss * log * log;
        }
    }
    vec![total * scale]
}

/// What a teacher predicts for each row: its logits, or its k most probable tokens with their probabilities.
pub enum Teacher {
    Logits(Vec<Vec<f64>>),
    TopK(Vec<Vec<(usize, f64)>>),
}

/// See `ops::linear_distillation`, without smoothing or z-loss.
#[allow(clippy::too_many_arguments)]
pub fn linear_distillation(
    hidden: &[f64],
    w: &[f64],
    d: usize,
    targets: &[i32],
    teacher: &Teacher,
    scale: f64,
    cap: f64,
    (alpha, temperature): (f64, f64),
) -> Vec<f64> {
    let softmax = |logits: &[f64], t: f64| -> Vec<f64> {
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = logits.iter().map(|l| ((l - top) / t).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    };
    let mut total = 0.0;
    for (i, (row, &target)) in hidden.chunks(d).zip(targets).enumerate() {
        if target < 0 {
            continue;
        }
        let logits: Vec<f64> =
            w.chunks(d).map(|w| soft_cap(row.iter().zip(w).map(|(a, b)| a * b).sum(), cap)).collect();
        let hard = -softmax(&logits, 1.0)[target as usize].ln();
        let p = softmax(&logits, temperature);
        let kl: f64 = match teacher {
            Teacher::Logits(rows) => softmax(&rows[i], temperature).iter().zip(&p).map(|(q, p)| q * (q / p).ln()).sum(),
            Teacher::TopK(rows) => {
                let of_known: f64 = rows[i].iter().map(|&(id, q)| q * (q / p[id]).ln()).sum();
                let rest = 1.0 - rows[i].iter().map(|(_, q)| q).sum::<f64>();
                let others: f64 =
                    (0..p.len()).filter(|id| rows[i].iter().all(|(known, _)| known != id)).map(|id| p[id]).sum();
                of_known + rest * (rest / others).ln()
            }
        };
        total += alpha * hard + (1.0 - alpha) * temperature * temperature * kl;
    }
    vec![total * scale]
}
