//! `bench scaling`: how time and memory of a step grow with context, width and depth.

use clap::ValueEnum;
use firebox_models::transformer::{TransformerConfig, presets};
use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Programs};
use crate::error::Result;
use crate::models::{Spec, training};
use crate::plot::{self, Panel, Series};
use crate::protocol::Training;
use crate::stats::{Spread, bytes, number, times};
use crate::table::Table;
use crate::train::{self, Settings};

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Tokens of a row, 256 to 4096, at 4096 tokens a step.
    Context,
    /// Width, 128 to 1024, heads of 64.
    Width,
    /// Layers, 2 to 16.
    Depth,
}

impl Axis {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Width => "width",
            Self::Depth => "depth",
        }
    }

    /// What stays the same.
    fn title(self) -> &'static str {
        match self {
            Self::Context => "Llama style, 4 layers of width 256, vocabulary 4096, 4096 tokens a step",
            Self::Width => "GPT-2 style, 4 layers, vocabulary 4096, batches of 4 x 256 tokens",
            Self::Depth => "GPT-2 style, width 256, vocabulary 4096, batches of 4 x 256 tokens",
        }
    }

    fn values(self) -> Vec<usize> {
        match self {
            Self::Context => vec![256, 512, 1024, 2048, 4096],
            Self::Width => vec![128, 256, 512, 1024],
            Self::Depth => vec![2, 4, 8, 16],
        }
    }

    fn training(self, value: usize) -> Training {
        match self {
            Self::Context => {
                let model = TransformerConfig { context: value, init_std: 0.02, ..presets::depth(4, 4096) };
                training(model, 4096 / value, value)
            }
            Self::Width => training(gpt(4, value), 4, 256),
            Self::Depth => training(gpt(value, 256), 4, 256),
        }
    }
}

fn gpt(n_layers: usize, d_model: usize) -> TransformerConfig {
    let n_heads = d_model / 64;
    TransformerConfig {
        d_model,
        n_layers,
        n_heads,
        n_kv_heads: n_heads,
        head_dim: 64,
        d_ff: 4 * d_model,
        vocab_size: 4096,
        context: 256,
        ..presets::nanogpt_cpu(4096)
    }
}

/// The results along one axis.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What grows.
    pub axis: Axis,
    /// Its values with the training there.
    pub points: Vec<(usize, train::Report)>,
}

/// A turn should take about this many floating-point operations, a second on a small machine.
const TURN_FLOPS: f64 = 1e11;

/// Races the contenders along an axis.
///
/// # Errors
/// A worker that fails.
pub fn run(programs: &Programs, axis: Axis, settings: &Settings) -> Result<Report> {
    let mut values = axis.values();
    if settings.quick {
        values.truncate(2);
    }
    let point = |value| {
        let training = axis.training(value);
        let flops = training.flops_per_token() * training.tokens_per_step() as f64;
        let spec = Spec {
            name: format!("{} {value}", axis.name()),
            title: axis.title().to_owned(),
            steps: ((TURN_FLOPS / flops).ceil() as usize).clamp(1, 50),
            training,
            target: None,
        };
        Ok((value, train::run(programs, &spec, settings)?))
    };
    Ok(Report { axis, points: values.into_iter().map(point).collect::<Result<_>>()? })
}

impl Report {
    fn contenders(&self) -> Vec<Contender> {
        self.points.first().map_or_else(Vec::new, |(_, report)| report.results.iter().map(|r| r.contender).collect())
    }

    /// The table, in Markdown.
    pub fn markdown(&self) -> String {
        let contenders = self.contenders();
        let mut header = vec![self.axis.name().to_owned()];
        header.extend(contenders.iter().map(|contender| format!("{contender}, ms")));
        header.extend(contenders.iter().map(|contender| format!("{contender}, peak")));
        header.extend(["speed to the best PyTorch".to_owned(), "memory".to_owned()]);
        let mut table = Table::new(header);
        for (value, report) in &self.points {
            let mut cells = vec![value.to_string()];
            cells.extend(report.results.iter().map(|outcome| number(1e3 * seconds(report, outcome))));
            cells.extend(report.results.iter().map(|outcome| bytes(outcome.peak_rss_bytes)));
            if let Some((firebox, torch)) = report.of(Contender::Firebox).zip(report.best_torch()) {
                cells.push(times(seconds(report, torch) / seconds(report, firebox)));
                cells.push(times(firebox.peak_rss_bytes as f64 / torch.peak_rss_bytes as f64));
            }
            table.row(cells);
        }
        format!("{}. Time and peak memory of a training step.\n\n{table}", self.axis.title())
    }

    /// Time and memory over the axis, as an SVG.
    ///
    /// # Errors
    /// [`crate::error::Error::Draw`].
    pub fn plot(&self) -> Result<String> {
        let series = |value: fn(&train::Report, &train::Outcome) -> f64| {
            let line = |contender: Contender| {
                let at = |(x, report): &(usize, train::Report)| Some((*x as f64, value(report, report.of(contender)?)));
                Series { label: contender.to_string(), points: self.points.iter().filter_map(at).collect() }
            };
            self.contenders().into_iter().map(line).collect()
        };
        let axis = self.axis.name();
        plot::panels(&[
            Panel {
                title: format!("Time of a step over {axis}"),
                value: |ms| format!("{} ms", number(ms)),
                series: series(|report, outcome| 1e3 * seconds(report, outcome)),
            },
            Panel {
                title: format!("Peak memory over {axis}"),
                value: |mb| format!("{mb:.0} MB"),
                series: series(|_, outcome| outcome.peak_rss_bytes as f64 / 1e6),
            },
        ])
    }
}

/// Seconds of a step.
fn seconds(report: &train::Report, outcome: &train::Outcome) -> f64 {
    report.training.tokens_per_step() as f64 / Spread::of(outcome.tokens_per_s.iter().copied()).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_a_model() {
        for &axis in Axis::value_variants() {
            for value in axis.values() {
                let training = axis.training(value);
                assert_eq!(training.model.validate(), Ok(()), "{axis:?} {value}");
                assert!(training.tokens <= training.model.context);
            }
        }
        let tokens: Vec<usize> =
            Axis::Context.values().iter().map(|&v| Axis::Context.training(v).tokens_per_step()).collect();
        assert_eq!(tokens, [4096; 5]);
    }
}
