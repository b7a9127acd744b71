//! `bench kernels`: single operations, each as a training step calls it, forward and backward.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Programs};
use crate::error::Result;
use crate::machine::Machine;
use crate::optim;
use crate::protocol::{Job, Task};
use crate::stats::{Spread, number, times};
use crate::table::Table;
use crate::train::Settings;
use crate::worker::Worker;

/// An operation at a shape. All but `Sgemm` and `AdamW` are forward and backward, with gradients of every input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Kernel {
    /// `[m, k] x [k, n]`
    Sgemm { m: usize, k: usize, n: usize },
    /// `[rows, d_in] x [d_in, d_out]` and a bias.
    Linear { rows: usize, d_in: usize, d_out: usize },
    /// Causal attention of packed `[q | k | v]`.
    Attention { batch: usize, tokens: usize, n_heads: usize, n_kv_heads: usize, head_dim: usize },
    /// LayerNorm of `[rows, d]`.
    LayerNorm { rows: usize, d: usize },
    /// RMSNorm of `[rows, d]`.
    RmsNorm { rows: usize, d: usize },
    /// GELU, tanh form, of `[rows, d]`.
    Gelu { rows: usize, d: usize },
    /// SwiGLU of `[rows, 2 d]`.
    SwiGlu { rows: usize, d: usize },
    /// `rows` rows of a `[vocab, d]` table.
    Embedding { rows: usize, d: usize, vocab: usize },
    /// Head `[rows, d] x [d, vocab]` and cross-entropy.
    LinearCrossEntropy { rows: usize, d: usize, vocab: usize },
    /// AdamW of `n` elements.
    AdamW { n: usize },
    /// A step of an optimizer for `count` matrices `[d, d]`, its state in so many bits.
    Optimizer { algorithm: String, bits: u32, count: usize, d: usize },
    /// A copy of `n` elements.
    Copy { n: usize },
}

/// What a call does at least: the arithmetic of its products, or what it must read and write.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Work {
    /// Floating-point operations of its matrix products, of which causal attention needs half.
    Flops(f64),
    /// Bytes of inputs read and outputs written once.
    Bytes(f64),
}

impl Kernel {
    /// The operation's name.
    pub fn operation(&self) -> &'static str {
        match self {
            Self::Sgemm { .. } => "sgemm",
            Self::Linear { .. } => "linear",
            Self::Attention { .. } => "attention",
            Self::LayerNorm { .. } => "layer-norm",
            Self::RmsNorm { .. } => "rms-norm",
            Self::Gelu { .. } => "gelu",
            Self::SwiGlu { .. } => "swiglu",
            Self::Embedding { .. } => "embedding",
            Self::LinearCrossEntropy { .. } => "linear-cross-entropy",
            Self::AdamW { .. } => "adamw",
            Self::Optimizer { .. } => "optimizer",
            Self::Copy { .. } => "copy",
        }
    }

    /// What a call does.
    pub fn work(&self) -> Work {
        let product = |a: usize, b: usize, c: usize| 2.0 * a as f64 * b as f64 * c as f64;
        let floats = |n: usize| Work::Bytes(4.0 * n as f64);
        match *self {
            Self::Sgemm { m, k, n } => Work::Flops(product(m, k, n)),
            Self::Linear { rows, d_in, d_out } => Work::Flops(3.0 * product(rows, d_in, d_out)),
            // Two products forward and four backward, half of each masked.
            Self::Attention { batch, tokens, n_heads, head_dim, .. } => {
                Work::Flops(3.0 * (batch * n_heads) as f64 * product(tokens, tokens, head_dim))
            }
            // Forward reads x and writes y; backward reads x and dy and writes dx.
            Self::LayerNorm { rows, d } | Self::RmsNorm { rows, d } | Self::Gelu { rows, d } => floats(5 * rows * d),
            Self::SwiGlu { rows, d } => floats(8 * rows * d),
            // Backward writes a whole table of gradients.
            Self::Embedding { rows, d, vocab } => floats(3 * rows * d + vocab * d),
            Self::LinearCrossEntropy { rows, d, vocab } => Work::Flops(3.0 * product(rows, d, vocab)),
            // Reads parameter, gradient and both moments, writes all but the gradient.
            Self::AdamW { n } => floats(7 * n),
            // Reads the gradient, reads and writes parameter and state.
            Self::Optimizer { ref algorithm, bits, count, d } => {
                let state = optim::named(algorithm).and_then(|algorithm| optim::state_bytes(&algorithm, bits, d).ok());
                Work::Bytes((count * (12 * d * d + 2 * state.unwrap_or(0))) as f64)
            }
            Self::Copy { n } => floats(2 * n),
        }
    }

    /// Whether the contender computes it.
    fn is_for(&self, contender: Contender) -> bool {
        match (contender, self) {
            (Contender::TorchEager | Contender::TorchForeach, Self::Optimizer { algorithm, bits, .. }) => {
                *bits == 32 && optim::torch_has(algorithm, contender)
            }
            (Contender::TorchForeach, _) => false,
            (Contender::Naive | Contender::Matrixmultiply, _) => matches!(self, Self::Sgemm { .. }),
            (other, _) => other.computes_kernels(),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.operation())?;
        match self {
            Self::Sgemm { m, k, n } => write!(f, "{m} x {k} x {n}"),
            Self::Linear { rows, d_in, d_out } => write!(f, "{rows} x {d_in} x {d_out}"),
            Self::Attention { batch, tokens, n_heads, n_kv_heads, head_dim } => {
                write!(f, "B {batch}, T {tokens}, {n_heads}/{n_kv_heads} heads of {head_dim}")
            }
            Self::LayerNorm { rows, d }
            | Self::RmsNorm { rows, d }
            | Self::Gelu { rows, d }
            | Self::SwiGlu { rows, d } => {
                write!(f, "{rows} x {d}")
            }
            Self::Embedding { rows, d, vocab } => write!(f, "{rows} of {vocab} x {d}"),
            Self::LinearCrossEntropy { rows, d, vocab } => write!(f, "{rows} x {d} x {vocab}"),
            Self::AdamW { n } | Self::Copy { n } => write!(f, "{n}"),
            Self::Optimizer { algorithm, bits, count, d } => write!(f, "{algorithm}, {bits} bits, {count} x {d} x {d}"),
        }
    }
}

/// The ladder: each operation at the shapes of `bench train`'s models.
pub fn all() -> Vec<Kernel> {
    let sgemm = [(2048, 384, 1536), (1024, 768, 3072), (768, 128, 512), (4096, 512, 1024), (2048, 384, 4096)];
    let linear = [(2048, 384, 1536), (1024, 768, 3072), (768, 128, 512), (4096, 512, 2752)];
    let mut kernels = vec![];
    kernels.extend(sgemm.map(|(m, k, n)| Kernel::Sgemm { m, k, n }));
    kernels.extend(linear.map(|(rows, d_in, d_out)| Kernel::Linear { rows, d_in, d_out }));
    kernels.push(Kernel::Attention { batch: 12, tokens: 64, n_heads: 4, n_kv_heads: 4, head_dim: 32 });
    let attention =
        |tokens| Kernel::Attention { batch: 4096 / tokens, tokens, n_heads: 8, n_kv_heads: 8, head_dim: 64 };
    kernels.extend([256, 512, 1024, 2048, 4096].map(attention));
    kernels.push(Kernel::Attention { batch: 4, tokens: 1024, n_heads: 8, n_kv_heads: 4, head_dim: 64 });
    kernels.extend([(2048, 384), (1024, 768), (768, 128)].map(|(rows, d)| Kernel::LayerNorm { rows, d }));
    kernels.push(Kernel::RmsNorm { rows: 4096, d: 512 });
    kernels.extend([(2048, 1536), (1024, 3072), (768, 512)].map(|(rows, d)| Kernel::Gelu { rows, d }));
    kernels.push(Kernel::SwiGlu { rows: 4096, d: 1376 });
    kernels.push(Kernel::Embedding { rows: 2048, d: 384, vocab: 4096 });
    kernels.push(Kernel::Embedding { rows: 1024, d: 768, vocab: 50_257 });
    kernels.push(Kernel::LinearCrossEntropy { rows: 2048, d: 384, vocab: 4096 });
    kernels.push(Kernel::LinearCrossEntropy { rows: 1024, d: 768, vocab: 50_257 });
    kernels.push(Kernel::AdamW { n: 1 << 24 });
    kernels
}

/// The results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// Threads of each contender.
    pub threads: usize,
    /// Versions of what took part.
    pub software: Vec<String>,
    /// Who took part, in the order of the columns.
    pub contenders: Vec<Contender>,
    /// The kernels.
    pub rows: Vec<Row>,
}

/// One kernel's results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// What.
    pub kernel: Kernel,
    /// The work of a call.
    pub work: Work,
    /// Seconds of a call, a value per round, for each contender; none where it does not compute this.
    pub seconds: Vec<Vec<f64>>,
}

/// How long a turn should take: long enough for the clock and to wake the threads.
const TURN_SECONDS: f64 = 0.2;

/// What takes longer is measured once: the three loops, which nobody would time to a percent.
const SLOW_SECONDS: f64 = 1.0;

/// Lets the contenders compute the kernels in turns.
///
/// # Errors
/// A worker that fails.
pub fn run(programs: &Programs, kernels: Vec<Kernel>, settings: &Settings) -> Result<Report> {
    let contenders = settings.contenders.clone();
    let mut workers = vec![];
    let mut software = vec![];
    for &contender in &contenders {
        let job = Job { contender, threads: settings.threads, task: Task::Kernels(kernels.clone()) };
        let (worker, ready) = Worker::start(programs, &job)?;
        if !software.contains(&ready.software) {
            software.push(ready.software);
        }
        workers.push(worker);
    }
    let mut rows = vec![];
    for (case, kernel) in kernels.into_iter().enumerate() {
        eprintln!("    {kernel}");
        let mut seconds = vec![vec![]; workers.len()];
        let mut turns = vec![0; workers.len()];
        for ((worker, turns), seconds) in workers.iter_mut().zip(&mut turns).zip(&mut seconds) {
            if kernel.is_for(worker.contender()) {
                let once = worker.go(case, 1)?.seconds.max(1e-9);
                if once > SLOW_SECONDS {
                    seconds.push(once);
                    continue;
                }
                *turns = if settings.quick { 1 } else { ((TURN_SECONDS / once).ceil() as usize).clamp(1, 1000) };
            }
        }
        for _ in 0..settings.rounds {
            for ((worker, &turns), seconds) in workers.iter_mut().zip(&turns).zip(&mut seconds) {
                if turns > 0 {
                    seconds.push(worker.go(case, turns)?.seconds / turns as f64);
                }
            }
        }
        rows.push(Row { work: kernel.work(), kernel, seconds });
    }
    for worker in workers {
        worker.quit()?;
    }
    Ok(Report { machine: Machine::here(), threads: settings.threads, software, contenders, rows })
}

impl Report {
    /// The tables, in Markdown: rates of products, then rates of what moves memory.
    pub fn markdown(&self) -> String {
        let part = |title: &str, is_flops: bool| {
            let rows = || self.rows.iter().filter(|row| matches!(row.work, Work::Flops(_)) == is_flops);
            let takes_part = |i: usize| rows().any(|row| row.seconds.get(i).is_some_and(|seconds| !seconds.is_empty()));
            let columns: Vec<usize> = (0..self.contenders.len()).filter(|&i| takes_part(i)).collect();
            if columns.is_empty() {
                return String::new();
            }
            let names = columns.iter().map(|&i| self.contenders[i].to_string());
            let mut table = Table::new(
                [title.to_owned()].into_iter().chain(names).chain(["firebox to the best PyTorch".to_owned()]),
            );
            for row in rows() {
                let rate = |&i: &usize| self.rate(row, i).map_or_else(String::new, number);
                let cells = columns.iter().map(rate);
                let ratio = self.ratio(row).map_or_else(String::new, times);
                table.row([row.kernel.to_string()].into_iter().chain(cells).chain([ratio]));
            }
            table.to_string()
        };
        let tables = [part("GFLOP/s", true), part("GB/s", false)];
        tables.into_iter().filter(|table| !table.is_empty()).collect::<Vec<_>>().join("\n")
    }

    /// GFLOP/s or GB/s of a contender.
    fn rate(&self, row: &Row, contender: usize) -> Option<f64> {
        let seconds = row.seconds.get(contender).filter(|seconds| !seconds.is_empty())?;
        let (Work::Flops(work) | Work::Bytes(work)) = row.work;
        Some(work / Spread::of(seconds.iter().copied()).median / 1e9)
    }

    fn ratio(&self, row: &Row) -> Option<f64> {
        let rates = |of: fn(Contender) -> bool| {
            let chosen = self.contenders.iter().enumerate().filter(move |(_, contender)| of(**contender));
            chosen.filter_map(|(i, _)| self.rate(row, i)).max_by(f64::total_cmp)
        };
        Some(rates(|contender| contender == Contender::Firebox)? / rates(Contender::is_torch)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn work_is_counted_by_hand() {
        let flops = |kernel: Kernel| match kernel.work() {
            Work::Flops(flops) => flops,
            Work::Bytes(_) => panic!("{kernel} is counted in bytes"),
        };
        assert_eq!(flops(Kernel::Sgemm { m: 2, k: 3, n: 5 }), 60.0);
        assert_eq!(flops(Kernel::Linear { rows: 2, d_in: 3, d_out: 5 }), 180.0);
        // Forward: q k^T and p v, 2 T^2 E each, half of it: 2 T^2 E. Backward twice that.
        let attention = Kernel::Attention { batch: 3, tokens: 8, n_heads: 2, n_kv_heads: 1, head_dim: 4 };
        assert_eq!(flops(attention), 3.0 * (3 * 2) as f64 * (2 * 8 * 8 * 4) as f64);
        assert_eq!(Kernel::AdamW { n: 10 }.work(), Work::Bytes(280.0));
    }

    #[test]
    fn tables_hold_rates_and_the_ratio_to_the_best() {
        let report = Report {
            machine: Machine::here(),
            threads: 1,
            software: vec![],
            contenders: vec![Contender::Naive, Contender::Firebox, Contender::TorchEager, Contender::TorchCompile],
            rows: vec![
                Row {
                    kernel: Kernel::Sgemm { m: 1000, k: 1000, n: 1000 },
                    work: Work::Flops(2e9),
                    seconds: vec![vec![2.0], vec![0.02, 0.04, 0.01], vec![0.04], vec![0.05]],
                },
                Row {
                    kernel: Kernel::AdamW { n: 1000 },
                    work: Work::Bytes(28_000.0),
                    seconds: vec![vec![], vec![1e-6], vec![2e-6], vec![4e-6]],
                },
            ],
        };
        let text = report.markdown();
        let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let row = |name: &str| cells(text.lines().find(|line| line.contains(name)).unwrap());
        assert_eq!(row("sgemm")[2..7], ["1.00", "100", "50.0", "40.0", "2.00x"]);
        assert_eq!(row("adamw")[2..6], ["28.0", "14.0", "7.00", "2.00x"], "naive has no column in the second table");
    }
}
