//! What the driver and its workers say to each other.
//!
//! Every contender is a child process. It gets its [`Job`] as JSON in an argument, prints a [`Ready`] when it has warmed up,
//! a [`Done`] for each line `go CASE N` on its standard input, and an [`Ended`] after `quit` or the end of input. Each is
//! one line of JSON. Between lines it sleeps.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use firebox_models::transformer::TransformerConfig;
use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::error::{Error, Result};
use crate::kernels::Kernel;

/// What a worker is started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Who it is.
    pub contender: Contender,
    /// Threads to compute on.
    pub threads: usize,
    /// What to do.
    pub task: Task,
}

/// What a worker does.
// One for each worker: a box would only add an allocation.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Training steps of a model; one case.
    Train(Training),
    /// Calls of kernels; a case each.
    Kernels(Vec<Kernel>),
    /// The machine's peak rate of matrix products; one case, whose value is FLOP/s.
    Peak,
}

/// Training steps on one fixed batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Training {
    /// The model's shape.
    pub model: TransformerConfig,
    /// B: rows of a batch.
    pub batch: usize,
    /// T: tokens of a row, at most the model's context.
    pub tokens: usize,
    /// Seed of initial values and of the batch.
    pub seed: u64,
    /// Learning rate, constant.
    pub lr: f64,
    /// AdamW's β1.
    pub beta1: f64,
    /// AdamW's β2.
    pub beta2: f64,
    /// AdamW's decay of matrices.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub clip: f64,
    /// Steps before the worker is ready: at least one.
    pub warmup_steps: usize,
    /// Whether PyTorch's model is that of transformers, with PEFT's adapters where the model has some, and not the plain one of `torch/models.py`.
    #[serde(default)]
    pub transformers: bool,
}

impl Training {
    /// Tokens of a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch * self.tokens
    }

    /// Floating-point operations per token at this row length.
    pub fn flops_per_token(&self) -> f64 {
        TransformerConfig { context: self.tokens, ..self.model.clone() }.flops_per_token()
    }

    /// The batch: inputs and targets, `[B, T]` each.
    pub fn batch(&self) -> (Vec<i32>, Vec<i32>) {
        let ids = tokens(self.seed, self.batch * (self.tokens + 1), self.model.vocab_size);
        let rows = || ids.chunks_exact(self.tokens + 1);
        (
            rows().flat_map(|row| &row[..self.tokens]).copied().collect(),
            rows().flat_map(|row| &row[1..]).copied().collect(),
        )
    }
}

/// Random tokens by SplitMix64 of a counter (Steele et al., OOPSLA 2014), which `torch/worker.py` computes as well.
pub fn tokens(seed: u64, count: usize, vocab: usize) -> Vec<i32> {
    (1..=count as u64)
        .map(|i| {
            let mut z = i.wrapping_add(seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) % vocab as u64) as i32
        })
        .collect()
}

/// A worker has made its model and warmed up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Parameters of the model; 0 where there is none.
    pub params: u64,
    /// Loss of the first step.
    pub loss: f64,
    /// Resident memory before the model was made: what the runtime and its libraries take by themselves.
    pub rss_before_model_bytes: u64,
    /// What computes, with its version.
    pub software: String,
}

/// A worker has done what a `go` asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// How long that took.
    pub seconds: f64,
    /// Loss of the last step, or what else a task measures.
    pub value: f64,
}

/// A worker's last words.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// The highest resident memory of the process.
    pub peak_rss_bytes: u64,
}

/// A line from the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Do a case so many times.
    Go {
        /// Its number in the task.
        case: usize,
        /// How many times.
        n: usize,
    },
    /// Say the last words and end.
    Quit,
}

impl Request {
    /// The request as a line.
    pub fn line(self) -> String {
        match self {
            Self::Go { case, n } => format!("go {case} {n}\n"),
            Self::Quit => "quit\n".to_owned(),
        }
    }

    /// Reads a line; `None` for what is no request.
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["quit"] => Some(Self::Quit),
            ["go", case, n] => Some(Self::Go { case: case.parse().ok()?, n: n.parse().ok()? }),
            _ => None,
        }
    }
}

/// Measures a turn, from its beginning or from where the worker starts it again.
pub struct Clock(Instant);

impl Clock {
    /// What came before was preparation.
    pub fn start(&mut self) {
        self.0 = Instant::now();
    }
}

/// Answers the driver's lines until it has enough: the loop of every worker written in Rust. `run(case, n, clock)` returns the value.
///
/// # Errors
/// What `run` returns, and the streams.
pub fn serve(ready: &Ready, mut run: impl FnMut(usize, usize, &mut Clock) -> Result<f64>) -> Result<()> {
    say(ready)?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(Error::io("read", "standard input"))?;
        match Request::parse(&line) {
            Some(Request::Go { case, n }) => {
                let mut clock = Clock(Instant::now());
                let value = run(case, n, &mut clock)?;
                say(&Done { seconds: clock.0.elapsed().as_secs_f64(), value })?;
            }
            Some(Request::Quit) => break,
            None => return Err(Error::Protocol { expected: "`go CASE N` or `quit`", got: line }),
        }
    }
    say(&Ended { peak_rss_bytes: firebox_train::observe::memory::peak_bytes() })
}

fn say(message: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(message).map_err(|source| Error::Json { what: "a message", source })?;
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_round_trip() {
        for request in [Request::Go { case: 3, n: 17 }, Request::Quit] {
            assert_eq!(Request::parse(&request.line()), Some(request));
        }
        for bad in ["", "go", "go 1", "go x 2", "go 1 2 3", "stop"] {
            assert_eq!(Request::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn tokens_are_those_of_the_python_worker() {
        // `tokens(1337, 6, 1000)` and `tokens(7, 4, 50257)` in torch/worker.py.
        assert_eq!(tokens(1337, 6, 1000), [507, 112, 731, 28, 113, 389]);
        assert_eq!(tokens(7, 4, 50257), [45566, 1398, 34981, 15285]);
    }
}
