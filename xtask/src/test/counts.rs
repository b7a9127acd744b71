//! How many tests passed: read from what the test programs print.

use std::fmt;
use std::ops::AddAssign;

/// Tests by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
    /// Tests that are ignored, and parts that could not run.
    pub skipped: usize,
}

impl Counts {
    /// Reads the closing line of one test program: `test result: ok. 12 passed; 0 failed; 1 ignored; ...`.
    pub fn from_line(line: &str) -> Option<Self> {
        let rest = line.trim().strip_prefix("test result: ")?;
        let (_, numbers) = rest.split_once(". ")?;
        let mut counts = Self::default();
        for field in numbers.split(';') {
            let Some((number, kind)) = field.trim().split_once(' ') else {
                continue;
            };
            let target = match kind {
                "passed" => &mut counts.passed,
                "failed" => &mut counts.failed,
                "ignored" => &mut counts.skipped,
                _ => continue,
            };
            *target = number.parse().ok()?;
        }
        Some(counts)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let ok = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.52s";
        let failed =
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n";
        let mut sum = Counts::default();
        for line in [ok, failed] {
            sum += Counts::from_line(line).unwrap_or_default();
        }
        assert_eq!(sum.to_string(), "15 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn other_lines_are_not() {
        for line in ["running 3 tests", "test a ... ok", "", "test result: odd"] {
            assert_eq!(Counts::from_line(line), None, "{line}");
        }
    }
}
