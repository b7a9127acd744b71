//! The page that shows what each step did.

use std::fmt::Write as _;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::pipeline::Row;
use crate::observe::ObserveError;
use crate::observe::files::replace;
use crate::observe::report::{Esc, STYLE};

/// Pixels of the picture.
const SIZE: (u32, u32) = (960, 560);
const FONT: i32 = 20;

/// Writes `report.html` into `dir`.
///
/// # Errors
/// [`ObserveError`].
pub(super) fn write(dir: &Path, title: &str, rows: &[Row]) -> Result<(), ObserveError> {
    let points: Vec<_> =
        rows.iter().map(|row| (row.measured.bytes as f64 / 1e6, row.measured.perplexity, row.name.clone())).collect();
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title} – Firebox report</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n<p class=\"kicker\">Compression report</p>\n<h1>{title}</h1>\n",
        title = Esc(title)
    );
    if let (Some(first), Some(last)) = (rows.first(), rows.last()) {
        let (a, b) = (&first.measured, &last.measured);
        // Writing to a String does not fail.
        let _ = writeln!(
            html,
            "<p class=\"lead\">From {:.1} MB to {:.1} MB ({:.1} times smaller); perplexity {:.3} → {:.3}.</p>",
            a.bytes as f64 / 1e6,
            b.bytes as f64 / 1e6,
            a.bytes as f64 / b.bytes.max(1) as f64,
            a.perplexity,
            b.perplexity
        );
    }
    html.push_str("</header>\n<section>\n<h2>Quality against size</h2>\n");
    html.push_str(&picture(&points)?);
    html.push_str(
        "</section>\n<section>\n<h2>Steps</h2>\n<table>\n<tr><th>step</th><th>MB</th><th>parameters</th><th>bits a weight</th><th>zeros</th>\
         <th>perplexity</th><th>bits a byte</th><th>tokens/s</th><th>took</th></tr>\n",
    );
    for row in rows {
        let m = &row.measured;
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{:.2}</td><td>{:.2}M</td><td>{:.2}</td><td>{:.0} %</td><td>{:.4}</td><td>{:.4}</td><td>{:.0}</td><td>{:.0} s</td></tr>",
            Esc(&row.name),
            m.bytes as f64 / 1e6,
            m.parameters as f64 / 1e6,
            m.bits_per_weight,
            100.0 * m.sparsity,
            m.perplexity,
            m.bpb,
            m.tokens_per_s,
            row.seconds
        );
    }
    html.push_str("</table>\n</section>\n</main>\n</body>\n</html>\n");
    replace(&dir.join("report.html"), html.as_bytes())
}

/// Models by size (MB, logarithmic) and perplexity (logarithmic), with their names, as SVG.
///
/// # Errors
/// [`ObserveError::Draw`] where a size or perplexity is not positive.
pub fn picture(points: &[(f64, f64, String)]) -> Result<String, ObserveError> {
    let mut svg = String::new();
    draw(&mut svg, points).map_err(|reason| ObserveError::Draw { plot: "quality against size".into(), reason })?;
    // As wide as the page lets it be.
    Ok(svg.replacen(
        &format!("<svg width=\"{}\" height=\"{}\"", SIZE.0, SIZE.1),
        "<svg style=\"width:100%;height:auto;background:#fff\"",
        1,
    ))
}

fn draw(svg: &mut String, points: &[(f64, f64, String)]) -> Result<(), String> {
    let usable = points.iter().filter(|(x, y, _)| *x > 0.0 && *y > 0.0 && y.is_finite());
    let range = |values: Vec<f64>| {
        let (low, high) = values.iter().fold((f64::INFINITY, 0.0f64), |(low, high), &v| (low.min(v), high.max(v)));
        if high > 0.0 { Ok(low / 1.15..high * 1.3) } else { Err("nothing to draw".to_owned()) }
    };
    let xs = range(usable.clone().map(|p| p.0).collect())?;
    let ys = range(usable.clone().map(|p| p.1).collect())?;
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(56)
        .y_label_area_size(80)
        .build_cartesian_2d(xs.log_scale(), ys.log_scale())
        .map_err(text)?;
    chart
        .configure_mesh()
        .x_desc("MB")
        .y_desc("perplexity")
        .x_label_formatter(&|x| format!("{x:.3}").trim_end_matches('0').trim_end_matches('.').to_owned())
        .y_label_formatter(&|y| format!("{y:.3}").trim_end_matches('0').trim_end_matches('.').to_owned())
        .label_style(("sans-serif", FONT))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(text)?;
    let ink = RGBColor(0xd5, 0x5e, 0x00);
    chart.draw_series(usable.clone().map(|(x, y, _)| Circle::new((*x, *y), 6, ink.filled()))).map_err(text)?;
    let style = ("sans-serif", FONT).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Bottom));
    chart
        .draw_series(
            usable.map(|(x, y, name)| EmptyElement::at((*x, *y)) + Text::new(name.clone(), (9, -4), style.clone())),
        )
        .map_err(text)?;
    root.present().map_err(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::compress::measure::Measured;

    #[test]
    fn the_page_has_every_step_and_a_point_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let row = |name: &str, bytes, perplexity| Row {
            name: name.into(),
            folder: "x".into(),
            seconds: 1.0,
            measured: Measured {
                bytes,
                parameters: 1000,
                sparsity: 0.5,
                bits_per_weight: 4.25,
                loss: 1.0,
                perplexity,
                bpb: 1.0,
                tokens_per_s: 10.0,
            },
        };
        let rows =
            [row("start", 4_000_000, 3.0), row("int4 <gptq>", 600_000, 3.1), row("broken", 600_000, f64::INFINITY)];
        write(dir.path(), "small", &rows).unwrap();
        let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        assert!(page.contains("int4 &lt;gptq&gt;") && !page.contains("<gptq>"));
        assert_eq!(page.matches("<circle").count(), 2, "one that has no perplexity has no place");
        assert!(page.contains("From 4.0 MB to 0.6 MB (6.7 times smaller)"));
    }
}
