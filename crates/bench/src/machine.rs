//! What results depend on: the machine and the versions.

use std::fs;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

/// The machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Logical cores.
    pub cores: usize,
    /// Memory.
    pub memory_bytes: u64,
    /// `rustc --version`.
    pub rustc: String,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// This one. What the system does not tell is "unknown" or 0.
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = value(&read("/proc/cpuinfo"), "model name")
            .or_else(|| output("sysctl", &["-n", "machdep.cpu.brand_string"]));
        let memory = value(&read("/proc/meminfo"), "MemTotal")
            .and_then(|text| Some(text.split_whitespace().next()?.parse::<u64>().ok()? * 1024))
            .or_else(|| output("sysctl", &["-n", "hw.memsize"])?.parse().ok());
        Self {
            cpu: cpu.unwrap_or_else(|| "unknown processor".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory.unwrap_or(0),
            rustc: output("rustc", &["--version"]).unwrap_or_else(|| "rustc unknown".to_owned()),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// The value of the first line `key : value`.
fn value(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_from_the_system_s_tables() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC 7B12\nmodel name\t: other\n";
        assert_eq!(value(text, "model name").as_deref(), Some("AMD EPYC 7B12"));
        assert_eq!(value(text, "MemTotal"), None);
        assert!(Machine::here().cores > 0);
    }
}
