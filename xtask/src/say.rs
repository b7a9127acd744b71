//! How xtask talks: headings before what takes time, and times in words.

use std::io::{self, IsTerminal};
use std::time::Duration;

/// Announces a part of the work on standard error, where cargo's own progress goes.
pub fn heading(text: &str) {
    if io::stderr().is_terminal() {
        eprintln!("\x1b[1m==> {text}\x1b[0m");
    } else {
        eprintln!("==> {text}");
    }
}

/// `3.2 s`, `48 s`, `6 min 36 s`, `1 h 02 min`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let whole = seconds.round() as u64;
    if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else if whole < 60 {
        format!("{whole} s")
    } else if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

/// `1 test`, `2 tests`.
pub fn plural(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_words() {
        let cases = [
            (0.04, "0.0 s"),
            (3.21, "3.2 s"),
            (9.97, "10 s"),
            (59.4, "59 s"),
            (59.6, "1 min 00 s"),
            (396.0, "6 min 36 s"),
            (3720.0, "1 h 02 min"),
        ];
        for (seconds, words) in cases {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), words);
        }
    }

    #[test]
    fn one_test_is_singular() {
        assert_eq!(plural(1, "test"), "1 test");
        assert_eq!(plural(0, "test"), "0 tests");
    }
}
