//! Draws a timeline.

use std::fmt::Write;

use super::{Timeline, Work};

/// Height of a rank's row and left margin for its name, in pixels.
const ROW: f64 = 24.0;
const MARGIN: f64 = 56.0;

/// Shades by the stages of a rank: the first light, the others darker.
const FORWARD: [&str; 4] = ["#9ecae1", "#4292c6", "#2171b5", "#084594"];
const INPUT: [&str; 4] = ["#fdd0a2", "#fd8d3c", "#d94801", "#8c2d04"];
const WEIGHT: [&str; 4] = ["#c7e9c0", "#74c476", "#238b45", "#005a32"];

impl Timeline {
    /// An SVG picture, `width` pixels wide: a row per rank, a box for each thing computed with the number of its micro-batch; forward
    /// blue, backward (or its inputs' half) orange, its weights' half green, a rank's later stages in darker shades.
    pub fn svg(&self, title: &str, width: f64) -> String {
        let scale = (width - MARGIN - 8.0) / self.makespan().max(f64::MIN_POSITIVE);
        let height = ROW * (self.ranks.len() + 1) as f64 + 8.0;
        let title = title.replace('&', "&amp;").replace('<', "&lt;");
        let share = 100.0 * self.bubble_share();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
             <text x=\"4\" y=\"16\">{title}: idle {share:.0} %</text>\n"
        );
        for (rank, spans) in self.ranks.iter().enumerate() {
            let y = ROW * (rank + 1) as f64;
            // Writing into a String cannot fail.
            let _ = writeln!(svg, "<text x=\"4\" y=\"{}\">rank {rank}</text>", y + 16.0);
            let mut stages: Vec<usize> = spans.iter().map(|span| span.stage).collect();
            stages.sort_unstable();
            stages.dedup();
            for span in spans {
                let shade = stages.iter().position(|stage| *stage == span.stage).unwrap_or_default().min(3);
                let shades = match span.work {
                    Work::Forward => FORWARD,
                    Work::Backward | Work::BackwardInput => INPUT,
                    Work::BackwardWeight => WEIGHT,
                };
                let (x, w) = (MARGIN + scale * span.start, scale * (span.end - span.start));
                let ink = if shade < 2 { "#000000" } else { "#ffffff" };
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{w:.1}\" height=\"{}\" fill=\"{}\" stroke=\"#ffffff\"/>\
                     <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"10\" fill=\"{ink}\">{}</text>",
                    ROW - 2.0,
                    shades[shade],
                    x + w / 2.0,
                    y + 15.0,
                    span.micro_batch,
                );
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}
