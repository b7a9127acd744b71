//! What each rank did in a step, as a picture and in figures.

use std::fmt::{self, Write};

use super::data::Run;
use super::page::Esc;
use crate::observe::format::{bytes, count, percent};
use crate::timeline::{Kind, Span, Timeline};

/// Ranks that are drawn, at most.
const MAX_RANKS: usize = 64;
/// Boxes, at most: what is too narrow to be seen is left out, and the rest is not more than this.
const MAX_BOXES: usize = 20_000;

/// Sizes in CSS pixels: of the picture, of a rank's row, of the strip below it, and what is left for its name.
const WIDTH: f64 = 880.0;
const ROW: f64 = 22.0;
const STRIP: f64 = 5.0;
const STEP: f64 = ROW + STRIP + 7.0;
const MARGIN: f64 = 58.0;
/// What is narrower is not drawn.
const SEEN: f64 = 0.15;

/// Fills: as in the pictures of schedules, with red for communication. What has none is computing of another kind.
const FILLS: [(Kind, &str, &str); 6] = [
    (Kind::Forward, "forward", "#6baed6"),
    (Kind::Backward, "backward", "#fd8d3c"),
    (Kind::Weights, "backward of weights", "#74c476"),
    (Kind::Update, "update", "#9e9ac8"),
    (Kind::Communication, "communication", "#d1242f"),
    (Kind::Idle, "waits for others", "var(--page)"),
];

fn fill(kind: Kind) -> &'static str {
    let kind = if kind == Kind::Background { Kind::Communication } else { kind };
    FILLS.iter().find(|(of, ..)| *of == kind).map_or("none", |(_, _, fill)| fill)
}

/// The section, where the run has a timeline.
pub(super) fn render(html: &mut String, run: &Run) -> fmt::Result {
    let Some(timeline) = run.timeline.as_ref().filter(|timeline| !timeline.length().is_zero()) else { return Ok(()) };
    let ms = timeline.length().as_secs_f64() * 1e3;
    write!(
        html,
        "<section>\n<h2>What each rank did in step {}</h2>\n<p class=\"small\">{ms:.1} ms, from left to right. The strip below a rank is what it sends and receives in the \
         background. <code>timeline.json</code> has all of it, for ui.perfetto.dev.</p>\n<p class=\"small\">",
        count(timeline.step)
    )?;
    for (kind, name, fill) in FILLS {
        if timeline.ranks.iter().flatten().any(|span| span.kind == kind) {
            write!(
                html,
                "<svg style=\"display:inline;width:11px;height:11px\" viewBox=\"0 0 11 11\"><rect width=\"11\" height=\"11\" fill=\"{fill}\" stroke=\"var(--ink-text)\" \
                 stroke-width=\".5\"/></svg> {name} &nbsp; "
            )?;
        }
    }
    html.push_str("</p>\n");
    picture(html, timeline)?;
    table(html, timeline)?;
    html.push_str("</section>\n");
    Ok(())
}

fn picture(html: &mut String, timeline: &Timeline) -> fmt::Result {
    let scale = (WIDTH - MARGIN) / timeline.length().as_secs_f64();
    let ranks = &timeline.ranks[..timeline.ranks.len().min(MAX_RANKS)];
    let height = STEP * ranks.len() as f64;
    writeln!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" font-size=\"12\" role=\"img\" aria-label=\"timeline of the ranks\">"
    )?;
    let mut left = MAX_BOXES;
    for (rank, spans) in ranks.iter().enumerate() {
        let top = STEP * rank as f64;
        writeln!(html, "<text x=\"0\" y=\"{}\" fill=\"var(--ink-text)\">rank {rank}</text>", top + 15.0)?;
        writeln!(
            html,
            "<rect x=\"{MARGIN}\" y=\"{top}\" width=\"{}\" height=\"{ROW}\" fill=\"var(--ink-axis)\"/>",
            WIDTH - MARGIN
        )?;
        // Waits lie within what is computed, and over it.
        let waits = |span: &&Span| matches!(span.kind, Kind::Idle | Kind::Communication);
        let below = spans.iter().filter(|span| !waits(span));
        for span in below.chain(spans.iter().filter(waits)) {
            let (x, width) = (MARGIN + scale * span.start.as_secs_f64(), (span.end - span.start).as_secs_f64() * scale);
            if width < SEEN || left == 0 {
                continue;
            }
            left -= 1;
            let (y, height) = if span.kind == Kind::Background { (top + ROW + 1.0, STRIP) } else { (top, ROW) };
            writeln!(
                html,
                "<rect x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{height}\" fill=\"{}\"><title>{}, {:.3} ms</title></rect>",
                fill(span.kind),
                Esc(&span.name),
                (span.end - span.start).as_secs_f64() * 1e3
            )?;
        }
    }
    html.push_str("</svg>\n");
    if ranks.len() < timeline.ranks.len() {
        writeln!(html, "<p class=\"small\">The first {MAX_RANKS} of {} ranks.</p>", timeline.ranks.len())?;
    }
    Ok(())
}

fn table(html: &mut String, timeline: &Timeline) -> fmt::Result {
    html.push_str(
        "<div class=\"scroll\"><table>\n<tr><th></th><th>Computes</th><th>Communication</th><th>Waits for others</th><th>Sent</th><th>Overlap</th></tr>\n",
    );
    for rank in 0..timeline.ranks.len().min(MAX_RANKS) {
        let shares = timeline.shares(rank);
        writeln!(
            html,
            "<tr><td>rank {rank}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            percent(shares.computes),
            percent(shares.communication),
            percent(shares.idle),
            bytes(shares.bytes),
            shares.overlap.map(percent).unwrap_or_default()
        )?;
    }
    html.push_str(
        "</table></div>\n<p class=\"small\">Overlap: of the time in which data moved, the share in which the rank computed.</p>\n",
    );
    Ok(())
}
