//! `bench train`: training steps of whole models.

use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Programs};
use crate::error::Result;
use crate::machine::Machine;
use crate::models::{Spec, Target};
use crate::protocol::{Job, Task, Training};
use crate::race::{Entry, Raced, race};
use crate::stats::{Spread, bytes, number, percent, times};
use crate::table::Table;

/// How a race is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who takes part.
    pub contenders: Vec<Contender>,
    /// Threads of each.
    pub threads: usize,
    /// Rounds.
    pub rounds: usize,
    /// One step a round.
    pub quick: bool,
}

/// The results for one model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The model's name.
    pub name: String,
    /// What it is.
    pub title: String,
    /// What is aimed for.
    pub target: Option<Target>,
    /// Where it was measured.
    pub machine: Machine,
    /// Threads of each contender.
    pub threads: usize,
    /// Shape, batch, hyperparameters.
    pub training: Training,
    /// Steps of a round.
    pub steps: usize,
    /// Floating-point operations per token.
    pub flops_per_token: f64,
    /// Peak rate of matrix products, FLOP/s, a value per round.
    pub peak_flops: Vec<f64>,
    /// The contenders.
    pub results: Vec<Outcome>,
}

/// What a contender reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Who.
    pub contender: Contender,
    /// With what.
    pub software: String,
    /// Tokens/s of each round.
    pub tokens_per_s: Vec<f64>,
    /// The highest resident memory.
    pub peak_rss_bytes: u64,
    /// Resident memory before the model was made.
    pub rss_before_model_bytes: u64,
    /// Loss of the very first step.
    pub first_loss: f64,
    /// Loss after the warm-up and the first round: the same number of steps for all.
    pub loss: f64,
}

impl Outcome {
    fn new(contender: Contender, raced: &Raced, tokens: usize) -> Self {
        Self {
            contender,
            software: raced.ready.software.clone(),
            tokens_per_s: raced.rounds.iter().map(|done| tokens as f64 / done.seconds).collect(),
            peak_rss_bytes: raced.ended.peak_rss_bytes,
            rss_before_model_bytes: raced.ready.rss_before_model_bytes,
            first_loss: raced.ready.loss,
            loss: raced.rounds.first().map_or(raced.ready.loss, |done| done.value),
        }
    }

    fn speed(&self) -> Spread {
        Spread::of(self.tokens_per_s.iter().copied())
    }
}

/// Races the contenders with one model.
///
/// # Errors
/// A worker that fails, or one with another model.
pub fn run(programs: &Programs, spec: &Spec, settings: &Settings) -> Result<Report> {
    eprintln!("==> {}: {}", spec.name, spec.title);
    let steps = if settings.quick { 1 } else { spec.steps };
    let training = &spec.training;
    let warmup_steps = if settings.quick { 1 } else { training.warmup_steps };
    let task = Task::Train(Training { warmup_steps, ..training.clone() });
    let entry = |contender: Contender| Entry {
        job: Job { contender, threads: settings.threads, task: task.clone() },
        n: steps,
        // burn's own modules take three times as long: two rounds are enough to see that.
        rounds: if contender.is_burn() { settings.rounds.min(2) } else { settings.rounds },
    };
    let mut entries: Vec<Entry> = settings.contenders.iter().map(|&contender| entry(contender)).collect();
    let peak = Job { contender: Contender::Peak, threads: settings.threads, task: Task::Peak };
    entries.push(Entry { job: peak, n: 1, rounds: settings.rounds });
    let mut raced = race(programs, &entries, &mut |line| eprintln!("    {line}"))?;
    let peak_flops = raced.pop().map(|peak| peak.rounds.iter().map(|done| done.value).collect()).unwrap_or_default();
    let tokens = steps * training.tokens_per_step();
    Ok(Report {
        name: spec.name.clone(),
        title: spec.title.clone(),
        target: spec.target,
        machine: Machine::here(),
        threads: settings.threads,
        training: Training { warmup_steps, ..training.clone() },
        steps,
        flops_per_token: training.flops_per_token(),
        peak_flops,
        results: settings.contenders.iter().zip(&raced).map(|(&who, raced)| Outcome::new(who, raced, tokens)).collect(),
    })
}

/// All models in one table: what Firebox reaches beside PyTorch, and the target in parentheses.
pub fn overview(reports: &[Report]) -> String {
    let mut table = Table::new(["model", "speed to the best PyTorch", "MFU", "peak memory to PyTorch"]);
    for report in reports {
        let both = report.best_torch().zip(report.torch_memory());
        if let Some((firebox, (best, memory))) = report.of(Contender::Firebox).zip(both) {
            let target =
                |text: fn(Target) -> String| report.target.map_or_else(String::new, |t| format!(" ({})", text(t)));
            let of_memory = firebox.peak_rss_bytes as f64 / memory.peak_rss_bytes as f64;
            table.row([
                report.name.clone(),
                times(firebox.speed().median / best.speed().median) + &target(|t| format!("≥ {}", times(t.speed))),
                percent(report.mfu(firebox)) + &target(|t| format!("≥ {}", percent(t.mfu))),
                times(of_memory) + &target(|t| format!("≤ {}", times(t.memory))),
            ]);
        }
    }
    table.to_string()
}

impl Report {
    /// Versions of what took part.
    pub fn software(&self) -> Vec<&str> {
        self.results.iter().map(|outcome| outcome.software.as_str()).collect()
    }

    /// The contender's outcome.
    pub fn of(&self, contender: Contender) -> Option<&Outcome> {
        self.results.iter().find(|outcome| outcome.contender == contender)
    }

    /// The fastest of PyTorch in f32.
    pub fn best_torch(&self) -> Option<&Outcome> {
        let torch = self.results.iter().filter(|outcome| outcome.contender.is_torch() && !outcome.contender.is_bf16());
        torch.max_by(|a, b| a.speed().median.total_cmp(&b.speed().median))
    }

    /// The outcome whose memory is compared with: PyTorch's eager one, which takes less than the compiled.
    fn torch_memory(&self) -> Option<&Outcome> {
        self.of(Contender::TorchEager).or_else(|| self.best_torch())
    }

    /// The one of PyTorch that an outcome is compared with: the fastest of its precision.
    fn rival(&self, outcome: &Outcome) -> Option<&Outcome> {
        if outcome.contender.is_bf16() { self.of(Contender::TorchBf16) } else { self.best_torch() }
    }

    fn peak(&self) -> f64 {
        Spread::of(self.peak_flops.iter().copied()).median
    }

    fn mfu(&self, outcome: &Outcome) -> f64 {
        self.flops_per_token * outcome.speed().median / self.peak()
    }

    /// The table and what was aimed for, in Markdown.
    pub fn markdown(&self) -> String {
        let header = ["", "tokens/s", "min – max", "to PyTorch", "MFU", "peak memory", "before the model", "loss"];
        let mut table = Table::new(header);
        let (best, memory) = (self.best_torch(), self.torch_memory());
        for outcome in &self.results {
            let speed = outcome.speed();
            table.row([
                outcome.contender.to_string(),
                number(speed.median),
                format!("{} – {}", number(speed.min), number(speed.max)),
                self.rival(outcome).map_or_else(String::new, |rival| times(speed.median / rival.speed().median)),
                if outcome.contender.is_bf16() { String::new() } else { percent(self.mfu(outcome)) },
                bytes(outcome.peak_rss_bytes),
                bytes(outcome.rss_before_model_bytes),
                format!("{:.3} → {:.3}", outcome.first_loss, outcome.loss),
            ]);
        }
        let Training { batch, tokens, model, warmup_steps, .. } = &self.training;
        let mut text = format!(
            "{}. {}M parameters, batches of {batch} x {tokens} tokens, {} MFLOP a token; the loss is of the first step and of \
             step {}. Peak rate {} GFLOP/s.\n\n{table}\n",
            self.title,
            number(model.num_params() as f64 / 1e6),
            number(self.flops_per_token / 1e6),
            warmup_steps + self.steps,
            number(self.peak() / 1e9),
        );
        if let (Some(firebox), Some(best), Some(memory)) = (self.of(Contender::Firebox), best, memory) {
            text.push_str(&self.targets(firebox, best, memory));
        }
        text
    }

    fn targets(&self, firebox: &Outcome, best: &Outcome, memory: &Outcome) -> String {
        let Some(Target { speed, mfu, memory: share, recompute_memory }) = self.target else { return String::new() };
        let ratio = firebox.speed().median / best.speed().median;
        let used = self.mfu(firebox);
        let share_of = |outcome: &Outcome| outcome.peak_rss_bytes as f64 / memory.peak_rss_bytes as f64;
        let mut table = Table::new(["firebox", "measured", "target", ""]);
        let verdict = |met: bool| if met { "met" } else { "missed" }.to_owned();
        let mut row =
            |what: String, got: String, target: String, met: bool| table.row([what, got, target, verdict(met)]);
        row(format!("speed to {}", best.contender), times(ratio), format!("≥ {}", times(speed)), ratio >= speed);
        row("MFU".to_owned(), percent(used), format!("≥ {}", percent(mfu)), used >= mfu);
        let mut memory_row = |what: &str, outcome: &Outcome, share: f64| {
            let (name, got) = (format!("{what} to {}", memory.contender), share_of(outcome));
            row(name, times(got), format!("≤ {}", times(share)), got <= share);
        };
        memory_row("peak memory", firebox, share);
        if let Some((outcome, share)) = self.of(Contender::FireboxRecompute).zip(recompute_memory) {
            memory_row("peak memory with recompute", outcome, share);
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;

    fn outcome(contender: Contender, tokens_per_s: [f64; 3], peak_rss_bytes: u64) -> Outcome {
        Outcome {
            contender,
            software: String::new(),
            tokens_per_s: tokens_per_s.to_vec(),
            peak_rss_bytes,
            rss_before_model_bytes: 4_000_000,
            first_loss: 8.3,
            loss: 8.1,
        }
    }

    fn report() -> Report {
        let training = models::training(firebox_models::transformer::presets::nanogpt_cpu(65), 12, 64);
        Report {
            name: "a".to_owned(),
            title: "A model".to_owned(),
            target: Some(Target { speed: 1.4, mfu: 0.8, memory: 0.4, recompute_memory: Some(0.5) }),
            machine: Machine::here(),
            threads: 2,
            training,
            steps: 4,
            flops_per_token: 1e6,
            peak_flops: vec![1.9e9, 2.0e9, 2.1e9],
            results: vec![
                outcome(Contender::Firebox, [1400.0, 1500.0, 1600.0], 500_000_000),
                outcome(Contender::FireboxRecompute, [1000.0, 1100.0, 1200.0], 300_000_000),
                outcome(Contender::TorchEager, [900.0, 800.0, 1000.0], 1_000_000_000),
                outcome(Contender::TorchCompile, [1000.0, 1000.0, 2000.0], 4_000_000_000),
            ],
        }
    }

    #[test]
    fn speed_is_to_the_faster_and_memory_to_the_eager() {
        let report = report();
        assert_eq!(report.best_torch().map(|best| best.contender), Some(Contender::TorchCompile));
        let text = report.markdown();
        let row = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        let firebox = row("| firebox ");
        for cell in ["1,500", "1,400 – 1,600", "1.50x", "75 %", "500 MB", "8.300 → 8.100"] {
            assert!(firebox.contains(cell), "{cell} in {firebox}");
        }
        assert!(row("| speed to torch-compile").contains("met"));
        assert!(row("| MFU").contains("missed"));
        let memory = row("| peak memory to torch-eager");
        assert!(memory.contains("0.50x") && memory.contains("missed"), "{memory}");
        let memory = row("| peak memory with recompute to torch-eager");
        assert!(memory.contains("0.30x") && memory.contains("met"), "{memory}");
    }

    #[test]
    fn the_overview_has_a_line_per_model() {
        let text = overview(&[report(), report()]);
        let line = text.lines().last().unwrap_or_default();
        assert!(
            line.contains("1.50x (≥ 1.40x)") && line.contains("75 % (≥ 80 %)") && line.contains("0.50x (≤ 0.40x)"),
            "{line}"
        );
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn results_survive_being_kept() {
        let text = serde_json::to_string(&report()).unwrap_or_default();
        let back: Option<Report> = serde_json::from_str(&text).ok();
        assert_eq!(back.map(|report| report.markdown()), Some(report().markdown()));
    }
}
