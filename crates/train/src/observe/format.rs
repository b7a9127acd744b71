//! Numbers as a person reads them.

/// A whole number with thousands separators: `12,345`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A count with its noun: `1 step`, `12,345 steps`.
pub fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// Three significant digits with k, M, B (10⁹), T: `13.9M`; whole and exact below 10,000.
pub fn short(n: f64) -> String {
    if !n.is_finite() {
        return "–".to_owned();
    }
    if n.abs() < 9_999.5 {
        return if n < 0.0 { format!("-{}", count(-n.round() as u64)) } else { count(n.round() as u64) };
    }
    scaled(n, 1e3, &["", "k", "M", "B", "T"])
}

/// A number of bytes, in powers of 1000: `574 MB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1e3, &[" B", " kB", " MB", " GB", " TB"])
}

/// Floating point operations per second: `113 GFLOP/s`.
pub fn flops(n: f64) -> String {
    scaled(n, 1e3, &[" FLOP/s", " kFLOP/s", " MFLOP/s", " GFLOP/s", " TFLOP/s", " PFLOP/s"])
}

/// A number of floating point operations: `81.2 MFLOP`.
pub fn operations(n: f64) -> String {
    scaled(n, 1e3, &[" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"])
}

/// A share from 0 to 1: `61%`.
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "–".to_owned();
    }
    let percent = share * 100.0;
    if percent < 9.95 { format!("{percent:.1}%") } else { format!("{percent:.0}%") }
}

/// A time in words: `48 s`, `4 min 12 s`, `2 h 05 min`, `3 d 4 h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".to_owned();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..172_800 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A time as on a clock: `4:12`, `1:02:10`.
pub fn clock(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–:––".to_owned();
    }
    let s = seconds.round() as u64;
    if s < 3600 {
        format!("{}:{:02}", s / 60, s % 60)
    } else {
        format!("{}:{:02}:{:02}", s / 3600, s % 3600 / 60, s % 60)
    }
}

/// Any number at four significant digits, without trailing zeros: `0.8312`, `3e-4`, `12.5k`.
pub fn figure(x: f64) -> String {
    if !x.is_finite() {
        return "–".to_owned();
    }
    let size = x.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if size >= 999.95 {
        tick(&short(x))
    } else if size < 0.9995e-3 {
        let text = format!("{x:.3e}");
        match text.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", trim_zeros(digits)),
            None => text,
        }
    } else {
        let decimals = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        trim_zeros(&format!("{x:.decimals$}")).to_owned()
    }
}

/// A moment in UTC: `2026-03-01 14:05 UTC`.
pub fn utc(unix_s: u64) -> String {
    let (days, rest) = (unix_s / 86_400, unix_s % 86_400);
    // Howard Hinnant's `civil_from_days`, for dates from 1970 on: https://howardhinnant.github.io/date_algorithms.html
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest % 3600 / 60)
}

/// Text with everything replaced that could steer a terminal: control characters other than newline and tab.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A number and its unit without trailing zeros, as on an axis: `10k` for `10.0k`, `4 MB` for `4.00 MB`.
pub fn tick(text: &str) -> String {
    let unit = text.find(|c: char| !c.is_ascii_digit() && !",.-".contains(c)).unwrap_or(text.len());
    format!("{}{}", trim_zeros(&text[..unit]), &text[unit..])
}

fn trim_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

/// Three significant digits with the unit that fits.
fn scaled(n: f64, base: f64, units: &[&str]) -> String {
    if !n.is_finite() {
        return "–".to_owned();
    }
    let (mut value, mut unit) = (n, 0);
    // 999.5 would be shown as 1000.
    while value.abs() >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = if unit == 0 || value.abs() >= 99.95 {
        0
    } else if value.abs() >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let cases = [
            (count(0), "0"),
            (count(999), "999"),
            (count(1_000), "1,000"),
            (count(12_345_678), "12,345,678"),
            (plural(1, "step"), "1 step"),
            (plural(0, "step"), "0 steps"),
            (short(1_412.4), "1,412"),
            (short(-3.0), "-3"),
            (short(9_999.9), "10.0k"),
            (short(13_912_345.0), "13.9M"),
            (short(999_600.0), "1.00M"),
            (short(f64::NAN), "–"),
            (bytes(999), "999 B"),
            (bytes(573_600_000), "574 MB"),
            (bytes(3_004_000_000), "3.00 GB"),
            (flops(113.2e9), "113 GFLOP/s"),
            (operations(81.2e6), "81.2 MFLOP"),
            (percent(0.614), "61%"),
            (percent(0.0312), "3.1%"),
            (duration(3.12), "3.1 s"),
            (duration(59.6), "1 min 00 s"),
            (duration(252.0), "4 min 12 s"),
            (duration(7_500.0), "2 h 05 min"),
            (duration(273_600.0), "3 d 4 h"),
            (clock(252.0), "4:12"),
            (clock(3_730.0), "1:02:10"),
            (figure(0.0), "0"),
            (figure(3e-4), "3e-4"),
            (figure(1e-3), "0.001"),
            (figure(0.831_249), "0.8312"),
            (figure(2.5), "2.5"),
            (figure(2_500.0), "2,500"),
            (figure(100.0), "100"),
            (figure(12_500.0), "12.5k"),
            (figure(10_000.0), "10k"),
            (figure(100_000.0), "100k"),
            (tick("4.00 MB"), "4 MB"),
            (tick("0"), "0"),
            (figure(f64::INFINITY), "–"),
            (utc(0), "1970-01-01 00:00 UTC"),
            (utc(951_782_399), "2000-02-28 23:59 UTC"),
            (utc(951_782_400), "2000-02-29 00:00 UTC"),
            (utc(4_107_542_400), "2100-03-01 00:00 UTC"),
        ];
        for (got, expected) in cases {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn terminal_escapes_are_removed() {
        assert_eq!(printable("a\x1b[31mb\n\tc\r\u{9b}"), "a\u{fffd}[31mb\n\tc\u{fffd}\u{fffd}");
    }
}
