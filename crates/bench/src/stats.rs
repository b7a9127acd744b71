//! Medians and how numbers are written.

use serde::{Deserialize, Serialize};

/// What a list of measurements comes to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle value, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value; zeros for none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        let n = values.len();
        let median = (at(n.saturating_sub(1) / 2) + at(n / 2)) / 2.0;
        Self { median, min: at(0), max: at(n.saturating_sub(1)) }
    }
}

/// Three significant digits, four from a thousand on, with separators: `0.0123`, `1.86`, `143`, `1,410`, `43,280`.
pub fn number(x: f64) -> String {
    if !x.is_finite() {
        return x.to_string();
    }
    let magnitude = if x == 0.0 { 0 } else { x.abs().log10().floor() as i32 };
    if magnitude < 3 {
        return format!("{x:.*}", (2 - magnitude).clamp(0, 6) as usize);
    }
    let step = 10f64.powi(magnitude - 3);
    let digits = format!("{:.0}", (x.abs() / step).round() * step);
    let grouped: Vec<&str> = (0..digits.len())
        .rev()
        .step_by(3)
        .map(|end| &digits[end.saturating_sub(2)..=end])
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    format!("{}{}", if x < 0.0 { "-" } else { "" }, grouped.join(","))
}

/// Bytes in MB or GB, as decimal units.
pub fn bytes(n: u64) -> String {
    let n = n as f64;
    if n < 1e9 { format!("{:.0} MB", n / 1e6) } else { format!("{:.2} GB", n / 1e9) }
}

/// `1.52x`
pub fn times(ratio: f64) -> String {
    format!("{ratio:.2}x")
}

/// `81 %`
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 9.0]), Spread { median: 3.0, min: 1.0, max: 9.0 });
        assert_eq!(Spread::of([5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
        assert_eq!(Spread::of([]), Spread { median: 0.0, min: 0.0, max: 0.0 });
    }

    #[test]
    fn numbers_have_three_digits_and_separators() {
        let cases = [
            (0.0, "0.00"),
            (0.012_34, "0.0123"),
            (1.859, "1.86"),
            (99.96, "100.0"),
            (143.2, "143"),
            (999.6, "1000"),
            (1410.4, "1,410"),
            (43_284.0, "43,280"),
            (1_234_567.0, "1,235,000"),
            (-5210.0, "-5,210"),
        ];
        for (x, text) in cases {
            assert_eq!(number(x), text);
        }
    }

    #[test]
    fn units() {
        assert_eq!((bytes(574_000_000).as_str(), bytes(4_012_000_000).as_str()), ("574 MB", "4.01 GB"));
        assert_eq!((times(1.4).as_str(), percent(0.806).as_str()), ("1.40x", "81 %"));
    }
}
