//! Which plots the page shows, and of what.

use std::fmt::Write;

use super::charts::{Drawing, Ink, Look, Plot, Series, smooth};
use super::data::Run;
use super::page::Esc;
use crate::observe::format::{bytes, count, figure, percent, tick};
use crate::observe::{ObserveError, RanksRecord, StepRecord};

/// Sizes of plots, CSS pixels: one that takes the page's width, and the one used beside another or on a phone.
const WIDE: (u32, u32) = (880, 340);
const NARROW: (u32, u32) = (430, 250);
/// All plots of the page, as HTML.
pub(super) fn render(run: &Run) -> Result<String, ObserveError> {
    let line = |value: fn(&StepRecord) -> f64| -> Vec<(f64, f64)> {
        run.metrics.steps.iter().map(|record| (record.step as f64, value(record))).collect()
    };
    let series = |label: String, ink, look, points| Series { label, ink, look, points };
    let mut html = String::new();

    let raw = line(|r| r.loss);
    let smoothed = smooth(&raw);
    let validation: Vec<(f64, f64)> = run.metrics.evals.iter().map(|e| (e.step as f64, e.val_loss)).collect();
    let end = |points: &[(f64, f64)]| points.last().map_or(String::new(), |(_, y)| format!("{y:.3}"));
    let loss = Plot {
        title: "Loss, nats per token",
        series: vec![
            series(String::new(), Ink::First, Look::Faint, raw),
            series(format!("train {}", end(&smoothed)), Ink::First, Look::Line, smoothed),
            series(format!("held out {}", end(&validation)), Ink::Second, Look::Dots, validation),
        ],
        marks: run.metrics.skipped.iter().map(|(step, _)| *step as f64).collect(),
        from_zero: false,
        value: figure,
    };
    if let (Some(wide), Some(narrow)) = (loss.draw(WIDE.0, WIDE.1)?, loss.draw(NARROW.0, NARROW.1)?) {
        let mut note =
            "Training loss of each logged step (pale), its moving average, and the loss on the held-out text."
                .to_owned();
        if !run.metrics.skipped.is_empty() {
            note.push_str(" Red marks: skipped steps.");
        }
        let _ = write!(
            html,
            "<section>\n<h2>{}</h2>\n<p class=\"small\">{note}{}</p>\n<div class=\"wide\">{}</div>\n<div class=\"narrow\">{}</div>\n</section>\n",
            Esc(loss.title),
            above_note(&wide, loss.value),
            wide.svg,
            narrow.svg
        );
    }

    let of_text = run.metrics.evals.iter().filter(|e| e.val_bpb > 0.0);
    let bpb: Vec<(f64, f64)> = of_text.map(|e| (e.step as f64, e.val_bpb)).collect();
    let level = |name: &str, y: f64| {
        let ends = run.metrics.steps.first().zip(bpb.last()).map(|(from, to)| vec![(from.step as f64, y), (to.0, y)]);
        series(format!("{name} {y:.3}"), Ink::Text, Look::Level, ends.unwrap_or_default())
    };
    let mut bits = Vec::new();
    if let Some(base) = run.baselines.filter(|base| base.bytes > 0) {
        bits = vec![level("gzip", base.gzip_bpb), level("xz", base.xz_bpb)];
    }
    bits.push(series(format!("model {}", end(&bpb)), Ink::Second, Look::Dots, bpb));

    let noisy = run.metrics.steps.iter().filter_map(|r| Some((r.step as f64, r.noise_scale_rows?)));
    let noise: Vec<(f64, f64)> = noisy.collect();
    let of_ranks = |value: fn(&RanksRecord) -> Option<f64>| -> Vec<(f64, f64)> {
        let seen = run.metrics.steps.iter().filter_map(|r| Some((r.step as f64, value(r.ranks.as_ref()?)?)));
        seen.collect()
    };
    let gradient = line(|r| r.grad_norm);
    let speed = line(|r| r.tokens_per_s);
    let small = [
        Plot {
            title: "Loss after the first quarter, nats per token",
            series: after_first_quarter(&loss.series),
            marks: Vec::new(),
            from_zero: false,
            value: figure,
        },
        Plot {
            title: "Held-out text, bits per byte",
            series: bits,
            marks: Vec::new(),
            from_zero: false,
            value: figure,
        },
        Plot {
            title: "Learning rate",
            series: vec![series(String::new(), Ink::First, Look::Line, line(|r| r.lr))],
            marks: Vec::new(),
            from_zero: true,
            value: figure,
        },
        Plot {
            title: "Gradient norm before clipping",
            series: vec![
                series(String::new(), Ink::First, Look::Line, smooth(&gradient)),
                series(String::new(), Ink::First, Look::Faint, gradient),
            ],
            marks: Vec::new(),
            from_zero: true,
            value: figure,
        },
        Plot {
            title: "Gradient noise scale, rows",
            series: vec![series(String::new(), Ink::First, Look::Line, noise)],
            marks: Vec::new(),
            from_zero: true,
            value: figure,
        },
        Plot {
            title: "Speed, tokens per second",
            series: vec![
                series(String::new(), Ink::First, Look::Line, smooth(&speed)),
                series(String::new(), Ink::First, Look::Faint, speed),
            ],
            marks: Vec::new(),
            from_zero: true,
            value: figure,
        },
        Plot {
            title: "Ranks: share of time, waiting for others (pipelines: bubble)",
            series: vec![
                series("waits".into(), Ink::First, Look::Line, of_ranks(|ranks| Some(ranks.idle))),
                series("bubble".into(), Ink::Second, Look::Line, of_ranks(|ranks| ranks.bubble)),
            ],
            marks: Vec::new(),
            from_zero: true,
            value: percent,
        },
        Plot {
            title: "Ranks: share of communication behind computation",
            series: vec![series(String::new(), Ink::First, Look::Line, of_ranks(|ranks| ranks.overlap))],
            marks: Vec::new(),
            from_zero: true,
            value: percent,
        },
        Plot {
            title: "Resident memory",
            series: vec![series(String::new(), Ink::First, Look::Line, line(|r| r.memory_bytes as f64))],
            marks: Vec::new(),
            from_zero: true,
            value: |n| if n <= 0.0 { "0".to_owned() } else { tick(&bytes(n as u64)) },
        },
    ];
    html.push_str("<div class=\"grid\">\n");
    for plot in small {
        if let Some(drawing) = plot.draw(NARROW.0, NARROW.1)? {
            let _ = write!(
                html,
                "<section>\n<h2>{}</h2>\n{}\n<p class=\"small\">{}</p>\n</section>\n",
                Esc(plot.title),
                drawing.svg,
                above_note(&drawing, plot.value).trim_start()
            );
        }
    }
    html.push_str("</div>\n");
    Ok(html)
}

/// The same lines without the steep fall at the start, which makes all that follows look flat.
fn after_first_quarter(all: &[Series]) -> Vec<Series> {
    let last = all.iter().filter_map(|s| s.points.last()).map(|(x, _)| *x).fold(0.0, f64::max);
    if all.iter().all(|s| s.points.len() < 8) {
        return Vec::new();
    }
    let later = |series: &Series| Series {
        label: series.label.clone(),
        ink: series.ink,
        look: series.look,
        points: series.points.iter().copied().filter(|(x, _)| *x > last / 4.0).collect(),
    };
    all.iter().map(later).collect()
}

/// Says what a plot leaves out, if it does.
fn above_note(drawing: &Drawing, value: fn(f64) -> String) -> String {
    match drawing.above {
        Some((1, highest)) => format!(" One point lies above the plot, at {}.", value(highest)),
        Some((n, highest)) => {
            format!(" {} points lie above the plot, the highest at {}.", count(n as u64), value(highest))
        }
        None => String::new(),
    }
}
