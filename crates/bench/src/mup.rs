//! `bench mup`: the coordinate check of the standard and the maximal update parametrization.

use firebox_tensor::device::Backend;
use firebox_train::coordinates::{BASE_WIDTH, Change, coordinate_check, coordinate_recipe};
use serde::Serialize;

use crate::error::Result;
use crate::plot::{self, Panel, Series};
use crate::table::Table;

const WIDTHS: [usize; 5] = [64, 128, 256, 512, 1024];
/// Steps after which it is looked: the first, whose Adam is a sign, and the fourth.
const LOOKS: [usize; 2] = [1, 4];
const VOCABULARY: usize = 96;

/// What is measured for one parametrization after one number of steps.
#[derive(Serialize)]
struct Line {
    name: &'static str,
    steps: usize,
    /// (width, change of hidden states, change of logits).
    points: Vec<(usize, f64, f64)>,
}

/// The results.
#[derive(Serialize)]
pub struct Report {
    lines: Vec<Line>,
}

/// Trains every width a few steps in both parametrizations; a smoke run the two smallest.
///
/// # Errors
/// [`Error`](crate::error::Error) where a model cannot be made.
pub fn run(quick: bool) -> Result<Report> {
    let device = Backend::NdArray.device()?;
    let widths = if quick { &WIDTHS[..2] } else { &WIDTHS[..] };
    let mut lines: Vec<Line> = vec![];
    for (name, mup) in [("standard", false), ("μP", true)] {
        let mut of_width: Vec<(usize, Vec<Change>)> = vec![];
        for &width in widths {
            let recipe = coordinate_recipe(width, mup).map_err(|error| Box::new(error.into()))?;
            let changes = coordinate_check(&recipe, VOCABULARY, LOOKS[1], &device).map_err(Box::new)?;
            of_width.push((width, changes));
        }
        lines.extend(LOOKS.map(|steps| {
            let points = of_width.iter().filter_map(|(width, changes)| {
                let change = changes.get(steps - 1)?;
                Some((*width, change.hidden, change.logits))
            });
            Line { name, steps, points: points.collect() }
        }));
    }
    Ok(Report { lines })
}

impl Line {
    fn label(&self) -> String {
        format!("{}, {} step{}", self.name, self.steps, if self.steps == 1 { "" } else { "s" })
    }
}

impl Report {
    /// The table, in Markdown.
    pub fn markdown(&self) -> String {
        let Some(first) = self.lines.first() else { return String::new() };
        let widths = first.points.iter().map(|(width, ..)| width.to_string());
        let mut table = Table::new(["change of".to_owned(), String::new()].into_iter().chain(widths));
        for (what, value) in SHOWN {
            for line in &self.lines {
                let cells = line.points.iter().map(|point| format!("{:.4}", value(point)));
                table.row([what.to_owned(), line.label()].into_iter().chain(cells));
            }
        }
        format!(
            "Root mean square of what a few steps of AdamW on one batch change, over the width: two blocks, heads of 16, learning rate 5e-4, base width \
             {BASE_WIDTH}. Logits: by the head's own update.\n\n{table}"
        )
    }

    /// Both changes over the width, as an SVG.
    ///
    /// # Errors
    /// [`Error::Draw`](crate::error::Error::Draw).
    pub fn plot(&self) -> Result<String> {
        let panel = |(what, value): (&str, fn(&Point) -> f64)| Panel {
            title: format!("Change of {what} after 1 and 4 steps"),
            value: |y| format!("{y:.3}"),
            series: self
                .lines
                .iter()
                .map(|line| Series {
                    // The plot has little room for names.
                    label: format!("{}, {}", line.name, line.steps),
                    points: line.points.iter().map(|point| (point.0 as f64, value(point))).collect(),
                })
                .collect(),
        };
        plot::panels(&SHOWN.map(panel))
    }
}

type Point = (usize, f64, f64);

/// What is shown: its name, and its value at a point.
type Shown = (&'static str, fn(&Point) -> f64);

const SHOWN: [Shown; 2] = [("hidden states", |point| point.1), ("logits", |point| point.2)];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn both_parametrizations_are_one_at_the_base_width_and_part_from_there() {
        let report = run(true).unwrap();
        let [standard, mup] = ["standard", "μP"].map(|name| {
            let line = report.lines.iter().find(|line| line.name == name && line.steps == 4).unwrap();
            line.points.clone()
        });
        assert_eq!(standard[0], mup[0]);
        assert!(standard[1].1 > 1.1 * standard[0].1 && mup[1].1 < standard[1].1, "{standard:?} {mup:?}");
        let svg = report.plot().unwrap();
        assert!(svg.contains("μP, 4") && svg.contains("standard, 1"));
        assert!(report.markdown().contains("hidden states"));
    }
}
