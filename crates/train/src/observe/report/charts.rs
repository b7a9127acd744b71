//! Plots as inline SVG, in the colours of the page.
//!
//! plotters draws with fixed colours. Every drawing here uses stand-ins ([`Ink`]) which are then replaced by the page's
//! CSS variables, so that one drawing serves light, dark and print. Coordinates of plotters' SVG are whole pixels:
//! plots are drawn at twice their size, for lines that are smooth.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::observe::ObserveError;

/// Device pixels per CSS pixel.
const SCALE: i32 = 2;
/// Font size of a plot, CSS pixels.
const FONT: f64 = 12.0;
/// plotters' SVG writes a font of size `s` as `s / 1.24`.
const PLOTTERS_FONT: f64 = 1.24;
/// Points per line at most: more than a plot has pixels can't be seen.
const BUCKETS: usize = 400;
/// Points this many times above the 99th percentile don't set the scale.
const OUTLIER: f64 = 2.0;

/// A colour by its use; the page's style sheet knows `--ink-text`, `--ink-axis`, ...
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Ink {
    /// Axis labels.
    Text,
    /// Grid lines and axes.
    Axis,
    /// The first series.
    First,
    /// The second series.
    Second,
    /// Something went wrong here.
    Alarm,
}

impl Ink {
    const ALL: [Self; 5] = [Self::Text, Self::Axis, Self::First, Self::Second, Self::Alarm];

    fn variable(self) -> &'static str {
        match self {
            Self::Text => "--ink-text",
            Self::Axis => "--ink-axis",
            Self::First => "--ink-first",
            Self::Second => "--ink-second",
            Self::Alarm => "--ink-alarm",
        }
    }

    fn stand_in(self) -> RGBColor {
        RGBColor(1, 0, self as u8)
    }
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Look {
    /// A line.
    Line,
    /// A pale line behind others.
    Faint,
    /// A line with a dot at every point.
    Dots,
    /// A thin line to compare with.
    Level,
}

/// A line of a plot.
pub(super) struct Series {
    /// Written at the line's end; empty for none.
    pub label: String,
    pub ink: Ink,
    pub look: Look,
    pub points: Vec<(f64, f64)>,
}

/// A plot over training steps.
pub(super) struct Plot<'a> {
    pub title: &'a str,
    pub series: Vec<Series>,
    /// Steps to mark on the x axis.
    pub marks: Vec<f64>,
    /// Whether the y axis starts at 0.
    pub from_zero: bool,
    /// How values on the y axis are written.
    pub value: fn(f64) -> String,
}

/// A drawn plot.
pub(super) struct Drawing {
    pub svg: String,
    /// Points that lie above the drawing, and the highest of them.
    pub above: Option<(usize, f64)>,
}

impl Plot<'_> {
    /// Draws the plot, `width` x `height` CSS pixels; `None` if there is nothing finite to draw.
    pub fn draw(&self, width: u32, height: u32) -> Result<Option<Drawing>, ObserveError> {
        let Some((xs, ys, above)) = self.ranges() else { return Ok(None) };
        let mut svg = String::new();
        self.draw_into(&mut svg, (width, height), xs, ys)
            .map_err(|error| ObserveError::Draw { plot: self.title.to_owned(), reason: error.to_string() })?;
        Ok(Some(Drawing { svg: restyle(&svg, self.title), above }))
    }

    /// The ranges of both axes, and what lies above.
    #[expect(clippy::type_complexity, reason = "used once")]
    fn ranges(&self) -> Option<((f64, f64), (f64, f64), Option<(usize, f64)>)> {
        let finite =
            || self.series.iter().flat_map(|s| &s.points).copied().filter(|(x, y)| x.is_finite() && y.is_finite());
        let (mut x0, mut x1) = (f64::INFINITY, f64::NEG_INFINITY);
        for x in finite().map(|(x, _)| x).chain(self.marks.iter().copied()) {
            (x0, x1) = (x0.min(x), x1.max(x));
        }
        let mut ys: Vec<f64> = finite().map(|(_, y)| y).collect();
        if ys.is_empty() {
            return None;
        }
        ys.sort_by(f64::total_cmp);
        let (lowest, highest) = (ys[0], ys[ys.len() - 1]);
        let usual = ys[(ys.len() - 1) * 99 / 100];
        let top = if usual > 0.0 && highest > OUTLIER * usual { OUTLIER * usual } else { highest };
        let above = ys.iter().filter(|&&y| y > top).count();
        let bottom = if self.from_zero { lowest.min(0.0) } else { lowest };
        let room = if top > bottom { (top - bottom) * 0.06 } else { bottom.abs().max(1e-9) * 0.1 };
        // A single step is drawn in the middle.
        let (x0, x1) = if x1 > x0 { (x0, x1) } else { (x0 - 1.0, x1 + 1.0) };
        let bottom = if self.from_zero && bottom == 0.0 { 0.0 } else { bottom - room };
        Some(((x0, x1), (bottom, top + room), (above > 0).then_some((above, highest))))
    }

    fn draw_into(
        &self,
        svg: &mut String,
        (width, height): (u32, u32),
        (x0, x1): (f64, f64),
        (y0, y1): (f64, f64),
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let px = |n: i32| n * SCALE;
        let scale = SCALE as u32;
        let font = FontDesc::new(FontFamily::SansSerif, FONT * f64::from(SCALE) * PLOTTERS_FONT, FontStyle::Normal);
        let text_color = Ink::Text.stand_in();
        let label_style = TextStyle::from(font).color(&text_color);
        let label_width = self.series.iter().map(|s| s.label.chars().count()).max().unwrap_or(0) as i32;
        // Half an em a character, and some: 12 px text is about 6.5 px a character.
        let right = if label_width == 0 { 22 } else { 12 + label_width * 13 / 2 };

        let root = SVGBackend::with_string(svg, (width * scale, height * scale)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(px(8))
            .margin_right(px(right))
            .margin_bottom(px(2))
            .x_label_area_size(px(40))
            .y_label_area_size(px(52))
            .build_cartesian_2d(x0..x1, y0..y1)?;
        let hair = Ink::Axis.stand_in().stroke_width(scale);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .axis_style(hair)
            .bold_line_style(hair)
            .light_line_style(TRANSPARENT)
            .x_labels((width / 60).clamp(3, 12) as usize)
            .y_labels((height / 45).clamp(3, 8) as usize)
            .set_all_tick_mark_size(px(4))
            .x_label_formatter(&|x| if x.fract() == 0.0 { crate::observe::format::figure(*x) } else { String::new() })
            .y_label_formatter(&|y| (self.value)(*y))
            .label_style(label_style.clone())
            .axis_desc_style(label_style.clone())
            .x_desc("step")
            .draw()?;

        // What lies above is drawn at the upper edge.
        let inside = |&(x, y): &(f64, f64)| (x, y.min(y1));
        let mut labels: Vec<(i32, i32, &Series)> = Vec::new();
        for series in &self.series {
            let points: Vec<(f64, f64)> =
                series.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()).map(inside).collect();
            let Some(&last) = points.last() else { continue };
            let color = series.ink.stand_in();
            let (style, thinned) = match series.look {
                Look::Line => (color.stroke_width(2 * scale), firsts(&points)),
                Look::Level => (color.stroke_width(scale), points.clone()),
                Look::Dots => (color.stroke_width(2 * scale), points.clone()),
                Look::Faint => (color.mix(0.3).stroke_width(scale), extremes(&points)),
            };
            // A single point is no line, many dots are one.
            if points.len() == 1 || (series.look == Look::Dots && points.len() <= 60) {
                chart.draw_series(points.iter().map(|&at| Circle::new(at, px(3), color.filled())))?;
            }
            chart.draw_series([PathElement::new(thinned, style)])?;
            if !series.label.is_empty() {
                let (x, y) = chart.backend_coord(&last);
                labels.push((x, y, series));
            }
        }
        let alarm = Ink::Alarm.stand_in();
        let mark = |&x: &f64| {
            let (x, y) = chart.backend_coord(&(x, y0));
            PathElement::new([(x, y), (x, y - px(9))], alarm.stroke_width(2 * scale))
        };
        for step in self.marks.iter().take(BUCKETS) {
            root.draw(&mark(step))?;
        }

        // Labels at line ends, pushed apart where lines end close to each other.
        labels.sort_by_key(|(_, y, _)| *y);
        let mut free_from = i32::MIN;
        for (x, y, series) in labels {
            let y = y.max(free_from);
            free_from = y + px(15);
            let color = series.ink.stand_in();
            let style = label_style.clone().color(&color).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(series.label.clone(), (x + px(7), y), style))?;
        }
        root.present()
    }
}

/// A moving average centred at each point, over a fiftieth of the points. Its window shrinks towards the start, where a
/// loss falls so fast that a full one would lie.
pub(super) fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let half = points.len() / 100;
    let mut sums = Vec::with_capacity(points.len() + 1);
    sums.push(0.0);
    for (_, y) in &points {
        sums.push(sums[sums.len() - 1] + y);
    }
    let average = |i: usize| {
        let reach = half.min(i);
        let (from, to) = (i - reach, (i + reach).min(points.len() - 1) + 1);
        (points[i].0, (sums[to] - sums[from]) / (to - from) as f64)
    };
    (0..points.len()).map(average).collect()
}

/// Thins a smooth line: the first point of each bucket, and the last point.
fn firsts(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= BUCKETS {
        return points.to_vec();
    }
    let mut out: Vec<_> = (0..BUCKETS).map(|i| points[i * points.len() / BUCKETS]).collect();
    out.extend(points.last());
    out
}

/// Thins a noisy line: lowest and highest point of each bucket, in their order, so that no spike is lost.
fn extremes(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= 2 * BUCKETS {
        return points.to_vec();
    }
    let mut out = Vec::with_capacity(2 * BUCKETS);
    for i in 0..BUCKETS {
        let bucket = &points[i * points.len() / BUCKETS..(i + 1) * points.len() / BUCKETS];
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(&low), Some(&high)) = (bucket.iter().min_by(by_value), bucket.iter().max_by(by_value)) else {
            continue;
        };
        out.extend(if low.0 <= high.0 { [low, high] } else { [high, low] });
    }
    out
}

/// Replaces stand-in colours by the page's, the fonts by the page's, and the fixed size by one that adapts.
fn restyle(svg: &str, title: &str) -> String {
    let mut out = svg.replace(" font-family=\"sans-serif\"", "").replace(" opacity=\"1\"", "");
    for ink in Ink::ALL {
        let RGBColor(r, g, b) = ink.stand_in();
        for attribute in ["fill", "stroke"] {
            out = out.replace(
                &format!("{attribute}=\"#{r:02X}{g:02X}{b:02X}\""),
                &format!("style=\"{attribute}:var({})\"", ink.variable()),
            );
        }
    }
    // plotters opens with <svg width=".." height=".." viewBox=".." xmlns="..">.
    let view_box = out.find("viewBox").unwrap_or(0);
    format!("<svg role=\"img\" aria-label=\"{}\" {}", super::page::Esc(title), &out[view_box..])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> Plot<'static> {
        let series = Series { label: "loss".into(), ink: Ink::First, look: Look::Faint, points };
        Plot {
            title: "Loss",
            series: vec![series],
            marks: vec![],
            from_zero: false,
            value: crate::observe::format::figure,
        }
    }

    #[test]
    fn no_stand_in_colour_remains() {
        let mut plot = plot((0..50).map(|i| (f64::from(i), f64::from(i % 7))).collect());
        plot.marks = vec![3.0, 17.0];
        let svg = plot.draw(400, 240).unwrap().unwrap().svg;
        assert!(!svg.contains("#0100"), "{svg}");
        for ink in [Ink::Text, Ink::Axis, Ink::First, Ink::Alarm] {
            assert!(svg.contains(ink.variable()), "{ink:?}");
        }
    }

    #[test]
    fn odd_data_is_drawn_or_left_out() {
        assert!(plot(vec![]).draw(400, 240).unwrap().is_none());
        assert!(plot(vec![(1.0, f64::NAN), (2.0, f64::INFINITY)]).draw(400, 240).unwrap().is_none());
        for points in [vec![(1.0, 2.0)], vec![(1.0, 0.0), (2.0, 0.0)], vec![(1.0, -1.0), (2.0, f64::NAN), (3.0, -2.0)]]
        {
            let svg = plot(points.clone()).draw(400, 240).unwrap().unwrap().svg;
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{points:?}");
            assert!(svg.contains("loss"), "{points:?}");
        }
    }

    #[test]
    fn a_spike_does_not_set_the_scale() {
        let mut points: Vec<_> = (0..1000).map(|i| (f64::from(i), 1.0)).collect();
        points[500].1 = 1e6;
        let drawing = plot(points).draw(400, 240).unwrap().unwrap();
        assert_eq!(drawing.above, Some((1, 1e6)));
    }

    #[test]
    fn thinning_keeps_ends_and_spikes() {
        let mut points: Vec<_> = (0..100_000).map(|i| (f64::from(i), 1.0)).collect();
        points[77_777].1 = 9.0;
        let thin = extremes(&points);
        assert!(thin.len() <= 2 * BUCKETS);
        assert!(thin.contains(&(77_777.0, 9.0)));
        let line = firsts(&points);
        assert_eq!((line[0].0, line[line.len() - 1].0), (0.0, 99_999.0));
    }

    #[test]
    fn smoothing_keeps_a_straight_line() {
        let points: Vec<_> = (0..1_000).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        // But for the last fiftieth, where the window is cut on one side.
        for (before, after) in points.iter().zip(smooth(&points)).take(980) {
            assert!((before.1 - after.1).abs() < 1e-6, "{before:?} {after:?}");
        }
    }
}
