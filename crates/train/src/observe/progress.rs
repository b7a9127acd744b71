//! The progress of a run, for a person: a bar on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::{bytes, clock, count, duration, figure, percent, plural, printable, short};
use super::{Event, ObserveError, Observer, RunInfo, StepRecord, Summary};

/// Plain lines come no more often than this.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// A sample is shown up to this many lines and characters.
const SAMPLE_LINES: usize = 12;
const SAMPLE_CHARS: usize = 1_000;
/// Share of the old value in the smoothed loss, per logged step.
const SMOOTHING: f64 = 0.9;

/// Shows the progress of a run.
pub struct Progress {
    output: Output,
    /// What to say about the run, from its start on.
    run: Option<Run>,
}

enum Output {
    Bar(ProgressBar),
    Lines { to: Box<dyn Write>, every: Duration },
}

struct Run {
    total_steps: u64,
    start_step: u64,
    started: Instant,
    /// Debiased exponential average of the loss: sum and weight.
    loss: (f64, f64),
    /// When a plain line was written, and the step that still waits for one.
    last_line: Option<Instant>,
    waiting: Option<StepRecord>,
}

impl Progress {
    /// A bar on standard error if that is a terminal, plain lines on it otherwise.
    pub fn auto() -> Self {
        if io::stderr().is_terminal() {
            Self::bar(ProgressDrawTarget::stderr())
        } else {
            Self::lines(io::stderr(), PLAIN_EVERY)
        }
    }

    /// A bar.
    pub fn bar(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        Self { output: Output::Bar(bar), run: None }
    }

    /// Plain lines: the first and the last step, and between them at most one in `every`.
    pub fn lines(to: impl Write + 'static, every: Duration) -> Self {
        Self { output: Output::Lines { to: Box::new(to), every }, run: None }
    }

    /// Plain lines on standard error, each behind the number of a rank, where several ranks speak.
    pub fn of_rank(rank: usize) -> Self {
        Self::lines(Prefixed { prefix: format!("[rank {rank}] "), text: String::new(), to: io::stderr() }, PLAIN_EVERY)
    }

    /// A line that stays: above the bar, or one of the plain ones.
    fn say(&mut self, text: &str) {
        match &mut self.output {
            Output::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            // A closed pipe must not end the training.
            Output::Lines { to, .. } => drop(writeln!(to, "{text}").and_then(|()| to.flush())),
        }
    }

    fn start(&mut self, info: &RunInfo) {
        let mut text = info.name.clone();
        let model = if info.model.is_empty() { "model" } else { &info.model };
        text.push_str(&format!(": {model}, {} parameters", short(info.params as f64)));
        if !info.backend.is_empty() {
            text.push_str(&format!(", on {}", info.backend));
        }
        if info.start_step > 0 {
            text.push_str(&format!("; resumed after step {}", count(info.start_step)));
        }
        self.say(&text);
        if let Output::Bar(bar) = &self.output {
            bar.set_length(info.total_steps);
            // A template that is fixed here can only fail to parse by a mistake here: then the default bar serves.
            if let Ok(style) = ProgressStyle::with_template("{bar:24.cyan/dim} {pos}/{len}  {wide_msg}") {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_position(info.start_step);
        }
        self.run = Some(Run {
            total_steps: info.total_steps,
            start_step: info.start_step,
            started: Instant::now(),
            loss: (0.0, 0.0),
            last_line: None,
            waiting: None,
        });
    }

    fn step(&mut self, record: &StepRecord) {
        let Some(run) = &mut self.run else { return };
        if record.loss.is_finite() {
            run.loss.0 = SMOOTHING * run.loss.0 + (1.0 - SMOOTHING) * record.loss;
            run.loss.1 = SMOOTHING * run.loss.1 + (1.0 - SMOOTHING);
        }
        match &self.output {
            Output::Bar(bar) => {
                bar.set_position(record.step);
                bar.set_message(run.bar_message(record));
            }
            Output::Lines { every, .. } => {
                let last = record.step >= run.total_steps;
                if last || run.last_line.is_none_or(|at| at.elapsed() >= *every) {
                    self.plain_line(record);
                } else {
                    run.waiting = Some(*record);
                }
            }
        }
    }

    fn plain_line(&mut self, record: &StepRecord) {
        let Some(run) = &mut self.run else { return };
        run.waiting = None;
        run.last_line = Some(Instant::now());
        let text = run.line(record);
        self.say(&text);
    }

    fn finish(&mut self, summary: &Summary) {
        if let Some(record) = self.run.as_mut().and_then(|run| run.waiting.take()) {
            self.plain_line(&record);
        }
        if let Output::Bar(bar) = &self.output {
            bar.finish_and_clear();
        }
        self.say(&closing_line(summary));
        self.run = None;
    }
}

/// Writes lines behind a prefix, all of a flush in one piece: others write to the same place.
struct Prefixed<W> {
    prefix: String,
    text: String,
    to: W,
}

impl<W: Write> Write for Prefixed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let lines: String = self.text.lines().map(|line| format!("{}{line}\n", self.prefix)).collect();
        self.text.clear();
        self.to.write_all(lines.as_bytes())?;
        self.to.flush()
    }
}

impl Run {
    fn smooth_loss(&self) -> f64 {
        if self.loss.1 > 0.0 { self.loss.0 / self.loss.1 } else { f64::NAN }
    }

    /// Seconds to the end at the mean pace since the start, evaluations included.
    fn seconds_left(&self, step: u64) -> f64 {
        let done = step.saturating_sub(self.start_step);
        if done == 0 {
            return f64::NAN;
        }
        self.started.elapsed().as_secs_f64() / done as f64 * self.total_steps.saturating_sub(step) as f64
    }

    fn bar_message(&self, record: &StepRecord) -> String {
        let mut text = format!("loss {:.3}  {} tokens/s", self.smooth_loss(), short(record.tokens_per_s));
        if record.mfu > 0.0 {
            text.push_str(&format!("  MFU {}", percent(record.mfu)));
        }
        text.push_str(&format!("  {} left", clock(self.seconds_left(record.step))));
        text
    }

    fn line(&self, record: &StepRecord) -> String {
        let total = count(self.total_steps);
        let step = count(record.step);
        let mut text = format!(
            "step {step:>width$}/{total}  loss {:.4}  lr {}  grad norm {:.3}  {} tokens/s",
            record.loss,
            figure(record.lr),
            record.grad_norm,
            short(record.tokens_per_s),
            width = total.len(),
        );
        if let Some(rows) = record.noise_scale_rows {
            text.push_str(&format!("  noise scale {} rows", short(rows)));
        }
        if record.mfu > 0.0 {
            text.push_str(&format!("  MFU {}", percent(record.mfu)));
        }
        if record.memory_bytes > 0 {
            text.push_str(&format!("  {}", bytes(record.memory_bytes)));
        }
        if record.step < self.total_steps {
            text.push_str(&format!("  {} left", clock(self.seconds_left(record.step))));
        }
        text
    }
}

fn closing_line(summary: &Summary) -> String {
    let mut text = format!(
        "{} after {}, {} tokens in {}",
        if summary.stopped.is_empty() { "done" } else { &summary.stopped },
        plural(summary.steps, "step"),
        short(summary.tokens as f64),
        duration(summary.wall_s),
    );
    if let Some(bpb) = summary.val_bpb {
        text.push_str(&format!("; validation {bpb:.3} bits per byte"));
    } else if let Some(loss) = summary.val_loss {
        text.push_str(&format!("; validation loss {loss:.4}"));
    }
    if let (Some(rows), Some(tokens)) = (summary.noise_scale_rows, summary.noise_scale_tokens) {
        text.push_str(&format!("; gradient noise scale {} rows ({} tokens)", short(rows), short(tokens)));
    }
    if let Some(share) = summary.sparsity {
        text.push_str(&format!("; {} zeros in the matrices", percent(share)));
    }
    if summary.skipped_steps > 0 {
        text.push_str(&format!("; {} skipped", plural(summary.skipped_steps, "step")));
    }
    text
}

/// The beginning of a sample, each line behind a bar, so that it can't be taken for Firebox's own words.
fn sample_block(text: &str) -> String {
    let shown: String = text.chars().take(SAMPLE_CHARS).collect();
    let mut lines: Vec<String> =
        shown.lines().take(SAMPLE_LINES).map(|line| format!("  │ {}", printable(line))).collect();
    if shown.len() < text.len() || shown.lines().count() > SAMPLE_LINES {
        lines.push("  │ …".to_owned());
    }
    lines.join("\n")
}

impl Observer for Progress {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        match event {
            Event::RunStarted(info) => self.start(info),
            Event::Step(record) => self.step(record),
            Event::Evaluated(record) => self.say(&format!(
                "step {}: validation loss {:.4}{}{}{}{}",
                count(record.step),
                record.val_loss,
                if record.val_bpb > 0.0 { format!(", {:.3} bits per byte", record.val_bpb) } else { String::new() },
                record.val_loss_average.map_or_else(String::new, |loss| format!("; of the average {loss:.4}")),
                record.sparsity.map_or_else(String::new, |share| format!("; {} zeros", percent(share))),
                record.metrics.iter().map(|(name, value)| format!("; {name} {value:.4}")).collect::<String>()
            )),
            Event::Sampled { step, text } => {
                self.say(&format!("step {}: a sample\n{}", count(*step), sample_block(text)));
            }
            Event::Pictured { step, .. } => self.say(&format!("step {}: samples/step-{step}.png", count(*step))),
            Event::Timeline { step, .. } => self.say(&format!("step {}: timeline.json", count(*step))),
            Event::CheckpointSaved { step, path } => {
                self.say(&format!("step {}: checkpoint {}", count(*step), path.display()));
            }
            Event::Skipped { step, reason } => {
                self.say(&format!("step {}: skipped, {}", count(*step), printable(reason)));
            }
            Event::Finished(summary) => self.finish(summary),
        }
        Ok(())
    }
}

impl Drop for Progress {
    /// A run that ends with an error leaves no half a bar behind.
    fn drop(&mut self) {
        if let Output::Bar(bar) = &self.output {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_line_of_a_rank_is_behind_its_number() {
        let mut written = vec![];
        let mut to = Prefixed { prefix: "[rank 2] ".into(), text: String::new(), to: &mut written };
        writeln!(to, "step 1\n  a sample").unwrap();
        to.flush().unwrap();
        to.flush().unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), "[rank 2] step 1\n[rank 2]   a sample\n");
    }
}
