//! The page itself.

use std::fmt::{self, Write};
use std::path::Path;

use super::data::Run;
use crate::noise::advice;
use crate::observe::format::{bytes, count, duration, figure, flops, operations, percent, plural, short, utc};
use crate::observe::{ObserveError, StepRecord};

pub(crate) const STYLE: &str = include_str!("report.css");
/// Evaluations and skipped steps that are listed at most.
const MAX_ROWS: usize = 200;

/// Text for HTML: what has a meaning there is escaped, and characters that a page may not hold are replaced.
pub(crate) struct Esc<'a>(pub &'a str);

impl fmt::Display for Esc<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' | '\t' => f.write_char(c)?,
                // Control characters, and those that turn the direction of the text around them.
                c if c.is_control()
                    || ('\u{202a}'..='\u{202e}').contains(&c)
                    || ('\u{2066}'..='\u{2069}').contains(&c) =>
                {
                    f.write_char('\u{fffd}')?;
                }
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The report as one HTML document.
pub(super) fn render(run: &Run) -> Result<String, ObserveError> {
    let mut html = String::with_capacity(256 << 10);
    let plots = super::plots::render(run)?;
    // Writing to a String does not fail.
    let _ = (|| {
        head(&mut html, run)?;
        headline(&mut html, run)?;
        figures(&mut html, run)?;
        comparison(&mut html, run)?;
        html.push_str(&plots);
        super::timeline::render(&mut html, run)?;
        noise_scale(&mut html, run)?;
        skipped(&mut html, run)?;
        samples(&mut html, run)?;
        next_commands(&mut html, run)?;
        evaluations(&mut html, run)?;
        details(&mut html, run)
    })();
    html.push_str("</main>\n</body>\n</html>\n");
    Ok(html)
}

fn head(html: &mut String, run: &Run) -> fmt::Result {
    let name = run.name();
    write!(
        html,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{} – Firebox report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n",
        Esc(&name)
    )
}

/// What was trained, for how long, and what came of it, in plain words.
fn headline(html: &mut String, run: &Run) -> fmt::Result {
    let info = &run.info;
    write!(
        html,
        "<header>\n<p class=\"kicker\">Training report</p>\n<h1>{}</h1>\n<p class=\"lead\">",
        Esc(&run.name())
    )?;
    let model = if info.model.is_empty() { "A model" } else { &info.model };
    write!(html, "{}", Esc(model))?;
    if run.params() > 0 {
        write!(html, ", {} parameters", short(run.params() as f64))?;
    }
    write!(html, ", trained on {} tokens", short(run.tokens() as f64))?;
    if let Some(summary) = run.summary.as_ref().filter(|summary| summary.wall_s > 0.0) {
        write!(html, " in {}", duration(summary.wall_s))?;
    }
    if !info.data.is_empty() {
        write!(html, ". Data: {}", Esc(&info.data))?;
    }
    html.push_str(".</p>\n");
    if let Some(bpb) = run.val_bpb() {
        write!(html, "<p class=\"result\">It takes <b>{bpb:.3} bits per byte</b> for text that it has not seen")?;
        if let Some(base) = run.baselines.filter(|base| base.bytes > 0) {
            write!(html, "; gzip -9 needs {:.3}, xz -9 {:.3}", base.gzip_bpb, base.xz_bpb)?;
        }
        html.push_str(".</p>\n");
    }
    match &run.summary {
        None => {
            let total = if info.total_steps > 0 { format!(" of {}", count(info.total_steps)) } else { String::new() };
            writeln!(
                html,
                "<p class=\"note\"><b>Not finished:</b> step {}{total} when this page was made. \
                 The run goes on or was ended from outside.</p>",
                count(run.steps())
            )?;
        }
        Some(summary) if !matches!(summary.stopped.as_str(), "done" | "") => {
            let total = if info.total_steps > 0 { format!(" of {}", count(info.total_steps)) } else { String::new() };
            writeln!(
                html,
                "<p class=\"note\"><b>Ended early:</b> {}, after step {}{total}.</p>",
                Esc(&summary.stopped),
                count(summary.steps)
            )?;
        }
        Some(_) => {}
    }
    html.push_str("</header>\n");
    Ok(())
}

fn figures(html: &mut String, run: &Run) -> fmt::Result {
    let mut cards: Vec<(&str, String, String)> = Vec::new();
    if let Some(bpb) = run.val_bpb() {
        cards.push(("Held-out text", format!("{bpb:.3}"), "bits per byte".into()));
    }
    if let Some(loss) = run.val_loss() {
        let perplexity = loss.exp();
        let note =
            if perplexity < 1e6 { format!("perplexity {}", figure(perplexity)) } else { "nats per token".into() };
        cards.push(("Validation loss", format!("{loss:.3}"), note));
    }
    let metrics = run.last_eval().map(|eval| &eval.metrics).into_iter().flatten();
    cards.extend(metrics.map(|(name, value)| (name.as_str(), format!("{value:.4}"), "held out".into())));
    if let Some(loss) = run.train_loss() {
        cards.push(("Training loss", format!("{loss:.3}"), "nats per token".into()));
    }
    let summary = run.summary.as_ref();
    let speed = summary.map(|s| s.tokens_per_s).filter(|s| *s > 0.0).or_else(|| median(run, |r| r.tokens_per_s));
    if let Some(speed) = speed {
        let mfu = summary.and_then(|s| s.mfu).or_else(|| median(run, |r| r.mfu)).filter(|mfu| *mfu > 0.0);
        let mfu = mfu.map_or(String::new(), |mfu| format!("MFU {}", percent(mfu)));
        cards.push(("Tokens per s", short(speed), mfu));
    }
    let logged_peak = run.metrics.steps.iter().map(|r| r.memory_bytes).max();
    if let Some(peak) = summary.map(|s| s.peak_memory_bytes).or(logged_peak).filter(|peak| *peak > 0) {
        cards.push(("Peak memory", bytes(peak), "resident".into()));
    }
    if let Some(share) = summary.and_then(|s| s.sparsity) {
        cards.push(("Zeros", percent(share), "of the blocks' matrices".into()));
    }
    let steps = if run.steps() < 1_000_000 { count(run.steps()) } else { short(run.steps() as f64) };
    cards.push(("Steps", steps, format!("{} tokens", short(run.tokens() as f64))));
    html.push_str("<dl class=\"figures\">\n");
    for (name, value, note) in cards {
        writeln!(html, "<div><dt>{name}</dt><dd>{value}</dd><dd class=\"small\">{note}</dd></div>")?;
    }
    html.push_str("</dl>\n");
    Ok(())
}

/// Median over the logged steps of a value that is positive.
fn median(run: &Run, value: impl Fn(&StepRecord) -> f64) -> Option<f64> {
    let mut values: Vec<f64> = run.metrics.steps.iter().map(value).filter(|v| v.is_finite() && *v > 0.0).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Bars: bits per byte of the model, xz and gzip on the same text.
fn comparison(html: &mut String, run: &Run) -> fmt::Result {
    let (Some(bpb), Some(base)) = (run.val_bpb(), run.baselines.filter(|base| base.bytes > 0)) else { return Ok(()) };
    let verdict = match (bpb < base.gzip_bpb, bpb < base.xz_bpb) {
        (true, true) => "The model predicts the text better than both compressors.",
        (true, false) => "The model predicts the text better than gzip, not yet as well as xz.",
        (false, true) => "The model predicts the text better than xz, not yet as well as gzip.",
        (false, false) => "The model does not predict the text as well as the compressors yet: train it longer.",
    };
    write!(
        html,
        "<section>\n<h2>Against general compressors</h2>\n<p>{verdict}</p>\n\
         <div class=\"bars\" role=\"img\" aria-label=\"Bits per byte, shorter is better\">\n"
    )?;
    let longest = bpb.max(base.gzip_bpb).max(base.xz_bpb);
    let mut rows = [("this model", bpb, "model"), ("xz -9", base.xz_bpb, ""), ("gzip -9", base.gzip_bpb, "")];
    rows.sort_by(|a, b| a.1.total_cmp(&b.1));
    for (name, value, class) in rows {
        writeln!(
            html,
            "<span>{name}</span><span class=\"track\"><i class=\"{class}\" style=\"width:{:.1}%\"></i></span><b>{value:.3}</b>",
            100.0 * value / longest
        )?;
    }
    write!(
        html,
        "</div>\n<p class=\"small\">Bits per byte of the held-out text ({}), which the model has not been trained on; shorter is better. \
         The compressors start each file from nothing; the model has read its training text before, and its own size is not counted.</p>\n</section>\n",
        bytes(base.bytes)
    )
}

/// What the gradients say about the batch.
fn noise_scale(html: &mut String, run: &Run) -> fmt::Result {
    let Some((rows, tokens)) = run.noise_scale() else { return Ok(()) };
    write!(
        html,
        "<section>\n<h2>Batch size</h2>\n<p>The gradient noise scale is about {} rows, {} tokens",
        short(rows),
        short(tokens)
    )?;
    if run.info.tokens_per_step > 0 {
        let batch = run.info.tokens_per_step as f64;
        write!(html, "; a step of this run has {} tokens: {}", short(batch), advice(tokens, batch))?;
    }
    html.push_str(
        ".</p>\n<p class=\"small\">A batch of just that size takes twice the fewest possible steps and twice the fewest possible tokens. \
         The noise scale grows as the loss falls.</p>\n</section>\n",
    );
    Ok(())
}

fn skipped(html: &mut String, run: &Run) -> fmt::Result {
    let total = run.skipped();
    if total == 0 {
        return Ok(());
    }
    let were = if total == 1 { "was" } else { "were" };
    write!(
        html,
        "<section>\n<h2>Skipped steps</h2>\n<p>{} {were} skipped: the parameters stayed as they were.</p>\n",
        plural(total, "step")
    )?;
    if !run.metrics.skipped.is_empty() {
        html.push_str("<ul>\n");
        for (step, reason) in run.metrics.skipped.iter().take(MAX_ROWS) {
            writeln!(html, "<li>step {}: {}</li>", count(*step), Esc(reason))?;
        }
        html.push_str("</ul>\n");
    }
    html.push_str("</section>\n");
    Ok(())
}

/// The last sample open, the earlier ones to unfold.
fn samples(html: &mut String, run: &Run) -> fmt::Result {
    let Some(((step, last), earlier)) = run.samples.split_last() else { return Ok(()) };
    write!(
        html,
        "<section>\n<h2>What the model writes</h2>\n<p class=\"small\">After step {}. The model made this up.</p>\n<pre>{}</pre>\n",
        count(*step),
        Esc(last)
    )?;
    for (step, text) in earlier.iter().rev() {
        writeln!(html, "<details><summary>After step {}</summary><pre>{}</pre></details>", count(*step), Esc(text))?;
    }
    html.push_str("</section>\n");
    Ok(())
}

fn next_commands(html: &mut String, run: &Run) -> fmt::Result {
    let program = quoted(&run.info.program);
    let dir = quoted_path(&run.dir);
    html.push_str("<section>\n<h2>How to go on</h2>\n<dl class=\"commands\">\n");
    let mut row =
        |what: &str, command: String| writeln!(html, "<dt>{what}</dt><dd><code>{}</code></dd>", Esc(&command));
    if let Some((_, checkpoint)) = &run.checkpoint {
        let checkpoint = quoted_path(checkpoint);
        row("Write with the model", format!("{program} generate {checkpoint} --prompt \"Once\""))?;
        row("Measure it on other text", format!("{program} eval {checkpoint} --data FILE"))?;
    }
    let unfinished = run.summary.as_ref().is_none_or(|s| run.info.total_steps > 0 && s.steps < run.info.total_steps);
    if unfinished {
        row("Go on with the training", format!("{program} train --out {dir} --resume"))?;
    }
    row("Look at the curves in TensorBoard", format!("tensorboard --logdir {dir}"))?;
    row("Make this page anew", format!("{program} report {dir}"))?;
    html.push_str("</dl>\n</section>\n");
    Ok(())
}

fn evaluations(html: &mut String, run: &Run) -> fmt::Result {
    if run.metrics.evals.is_empty() {
        return Ok(());
    }
    let best = run.best_eval().map(|eval| eval.step);
    html.push_str(
        "<section>\n<details>\n<summary>All evaluations</summary>\n<div class=\"scroll\"><table>\n\
         <tr><th>Step</th><th>Tokens</th><th>Loss, nats/token</th>",
    );
    let text = run.val_bpb().is_some();
    let names: Vec<&String> = run.last_eval().map(|eval| eval.metrics.keys().collect()).unwrap_or_default();
    let titles = text.then_some("Bits per byte").into_iter().chain(names.iter().map(|name| name.as_str()));
    titles.into_iter().try_for_each(|title| write!(html, "<th>{}</th>", Esc(title)))?;
    html.push_str("</tr>\n");
    let hidden = run.metrics.evals.len().saturating_sub(MAX_ROWS);
    for eval in &run.metrics.evals[hidden..] {
        let (class, mark) = if Some(eval.step) == best { (" class=\"best\"", " (best)") } else { ("", "") };
        write!(
            html,
            "<tr{class}><td>{}{mark}</td><td>{}</td><td>{:.4}</td>",
            count(eval.step),
            short(eval.tokens as f64),
            eval.val_loss
        )?;
        let values = names.iter().map(|name| eval.metrics.get(*name).copied().unwrap_or(f64::NAN));
        let values = text.then_some(eval.val_bpb).into_iter().chain(values);
        values.into_iter().try_for_each(|value| write!(html, "<td>{value:.4}</td>"))?;
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
    if hidden > 0 {
        writeln!(html, "<p class=\"small\">The first {} are in metrics.jsonl.</p>", count(hidden as u64))?;
    }
    html.push_str("</details>\n</section>\n");
    Ok(())
}

/// The recipe and what else is known about the run.
fn details(html: &mut String, run: &Run) -> fmt::Result {
    let info = &run.info;
    if let Some(recipe) = &run.recipe {
        write!(
            html,
            "<section>\n<details>\n<summary>The recipe</summary>\n<p class=\"small\">As resolved, with every default; <code>recipe.toml</code> in the run folder.</p>\n<pre>{}</pre>\n</details>\n</section>\n",
            Esc(recipe)
        )?;
    }
    let mut rows: Vec<(&str, String)> = Vec::new();
    if info.started_unix_s > 0 {
        let what = if info.start_step > 0 { "Last resumed" } else { "Started" };
        rows.push((what, utc(info.started_unix_s)));
    }
    if info.start_step > 0 {
        rows.push(("Resumed after step", count(info.start_step)));
    }
    if !info.backend.is_empty() {
        let threads = if info.threads > 0 { format!(", {} threads", info.threads) } else { String::new() };
        rows.push(("Backend", format!("{}{threads}", info.backend)));
    }
    if info.peak_flops > 0.0 {
        rows.push(("Measured matrix multiplication peak", flops(info.peak_flops)));
    }
    if info.flops_per_token > 0.0 {
        rows.push(("Operations per token, forward and backward", operations(info.flops_per_token)));
    }
    if info.tokens_per_step > 0 {
        rows.push(("Tokens per step", count(info.tokens_per_step)));
    }
    if run.params() > 0 {
        rows.push(("Parameters", count(run.params())));
    }
    if !info.version.is_empty() {
        rows.push(("Firebox", info.version.clone()));
    }
    if run.metrics.unreadable_lines > 0 {
        rows.push(("Unreadable lines in metrics.jsonl", count(run.metrics.unreadable_lines)));
    }
    if rows.is_empty() {
        return Ok(());
    }
    html.push_str("<section>\n<details>\n<summary>The run</summary>\n<div class=\"scroll\"><table class=\"facts\">\n");
    for (name, value) in rows {
        writeln!(html, "<tr><th>{name}</th><td>{}</td></tr>", Esc(&value))?;
    }
    html.push_str("</table></div>\n</details>\n</section>\n");
    Ok(())
}

fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// A word for a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_and_controls_are_escaped() {
        assert_eq!(
            Esc("<script a='1' b=\"2\">&\u{0}\u{202e}\n").to_string(),
            "&lt;script a=&#39;1&#39; b=&quot;2&quot;&gt;&amp;\u{fffd}\u{fffd}\n"
        );
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quoted("runs/tiny-1"), "runs/tiny-1");
        assert_eq!(quoted("my run's $HOME"), "'my run'\\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }
}
