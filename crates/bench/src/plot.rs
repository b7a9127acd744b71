//! Plots as SVG files for the book.

use plotters::coord::combinators::{BindKeyPoints, IntoLogRange};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};

/// A line of a plot.
pub struct Series {
    /// What it is.
    pub label: String,
    /// Its points, x ascending.
    pub points: Vec<(f64, f64)>,
}

/// A plot with logarithmic axes, on which doubling is the same distance everywhere.
pub struct Panel {
    /// What is plotted over what.
    pub title: String,
    /// How a y value is written.
    pub value: fn(f64) -> String,
    /// The lines.
    pub series: Vec<Series>,
}

/// Pixels of a panel; plotters' SVG has whole coordinates, so plots are drawn large and shown smaller.
const PANEL: (u32, u32) = (880, 640);
const FONT: i32 = 30;
/// Room for the lines' names at their ends: the longest is torch-compile.
const LABEL: i32 = 210;
const TEXT: RGBColor = RGBColor(0x55, 0x52, 0x4e);
const GRID: RGBColor = RGBColor(0xdd, 0xd8, 0xd1);
/// Colours that are told apart without red and green (Okabe and Ito, 2008).
const COLORS: [RGBColor; 5] = [
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0x99, 0x66, 0x99),
    RGBColor(0x80, 0x80, 0x80),
];

/// Draws panels side by side as an SVG.
///
/// # Errors
/// [`Error::Draw`] where a panel has nothing to draw.
pub fn panels(panels: &[Panel]) -> Result<String> {
    let mut svg = String::new();
    let size = (PANEL.0 * panels.len().max(1) as u32, PANEL.1);
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(|error| failed("all", error))?;
        for (panel, area) in panels.iter().zip(root.split_evenly((1, panels.len()))) {
            draw(panel, &area).map_err(|reason| Error::Draw { plot: panel.title.clone(), reason })?;
        }
        root.present().map_err(|error| failed("all", error))?;
    }
    Ok(responsive(&svg))
}

fn failed(plot: &str, error: impl ToString) -> Error {
    Error::Draw { plot: plot.to_owned(), reason: error.to_string() }
}

fn draw(panel: &Panel, area: &DrawingArea<SVGBackend, plotters::coord::Shift>) -> std::result::Result<(), String> {
    let points = || panel.series.iter().flat_map(|series| &series.points);
    let mut xs: Vec<f64> = points().map(|&(x, _)| x).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (Some(&x0), Some(&x1)) = (xs.first(), xs.last()) else { return Err("it has no points".to_owned()) };
    let (y0, y1) = points().fold((f64::INFINITY, 0.0f64), |(low, high), &(_, y)| (low.min(y), high.max(y)));
    // Powers of two between which all lies, so that grid lines are doublings.
    let (y0, y1) = (y0.log2().floor().exp2(), y1.log2().ceil().exp2());
    if !(y0 > 0.0 && y1.is_finite() && x0 > 0.0) {
        return Err("a logarithmic axis needs positive values".to_owned());
    }
    let (y0, y1) = if y1 > y0 { (y0, y1) } else { (y0 / 2.0, y1 * 2.0) };
    let mut ticks: Vec<f64> =
        std::iter::successors(Some(y0), |y| Some(y * 2.0)).take_while(|&y| y <= y1 * 1.01).collect();
    // At most eight labels on each axis.
    let at_most_eight = |ticks: Vec<f64>| {
        let step = ticks.len().div_ceil(8);
        ticks.into_iter().step_by(step).collect::<Vec<_>>()
    };
    ticks = at_most_eight(ticks);
    xs = at_most_eight(xs);
    let style = TextStyle::from(("sans-serif", FONT)).color(&TEXT);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, style.clone())
        .margin(24)
        .margin_right(LABEL)
        .x_label_area_size(56)
        .y_label_area_size(130)
        .build_cartesian_2d(
            (x0..x1 * 1.0001).log_scale().with_key_points(xs),
            (y0..y1 * 1.0001).log_scale().with_key_points(ticks),
        )
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(style.clone())
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| (panel.value)(*y))
        .draw()
        .map_err(|error| error.to_string())?;
    for (i, series) in panel.series.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        chart
            .draw_series(LineSeries::new(series.points.iter().copied(), color.stroke_width(5)))
            .map_err(|error| error.to_string())?;
        chart
            .draw_series(series.points.iter().map(|&point| Circle::new(point, 8, color.filled())))
            .map_err(|error| error.to_string())?;
    }
    // Each line's name stands at its end; names that would overlap move down.
    let mut ends: Vec<(i32, i32, usize)> = vec![];
    let origin = area.get_pixel_range();
    for (i, series) in panel.series.iter().enumerate() {
        if let Some(end) = series.points.last() {
            let (x, y) = chart.backend_coord(end);
            ends.push((y - origin.1.start, x - origin.0.start, i));
        }
    }
    ends.sort_unstable();
    let mut lowest = i32::MIN / 2;
    for (y, x, i) in ends {
        lowest = y.max(lowest + FONT + 4);
        let label = style.color(&COLORS[i % COLORS.len()]).pos(Pos::new(HPos::Left, VPos::Center));
        let text = Text::new(panel.series[i].label.clone(), (x + 16, lowest), label);
        area.draw(&text).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The SVG without a fixed size: a page scales it to its width.
fn responsive(svg: &str) -> String {
    match (svg.find("<svg "), svg.find(" viewBox")) {
        (Some(start), Some(view)) if start < view => format!("{}<svg{}", &svg[..start], &svg[view..]),
        _ => svg.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn panel(points: Vec<(f64, f64)>) -> Panel {
        let series = vec![Series { label: "firebox".to_owned(), points }];
        Panel { title: "time".to_owned(), value: |y| format!("{y} s"), series }
    }

    #[test]
    fn points_lines_and_labels_are_there() {
        let svg = panels(&[panel(vec![(256.0, 0.5), (512.0, 1.0), (1024.0, 4.0)]), panel(vec![(1.0, 1.0)])]).unwrap();
        assert_eq!(svg.matches("<circle").count(), 4);
        for text in ["256", "512", "1024", "0.5 s", "4 s", "firebox"] {
            assert!(svg.contains(text), "{text}");
        }
        let head = &svg[..svg.find('>').unwrap()];
        assert!(head.contains("viewBox") && !head.contains("width"), "{head}");
    }

    #[test]
    fn nothing_to_draw_is_an_error() {
        assert!(panels(&[panel(vec![])]).is_err());
        assert!(panels(&[panel(vec![(1.0, 0.0)])]).is_err());
    }
}
