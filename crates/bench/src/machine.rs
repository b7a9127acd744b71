//! What results depend on: the machine and the versions.

use std::fs;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::stats::bytes;

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

impl Machine {
    /// The line under a table: what it was measured on and with.
    pub fn describe(&self, threads: usize, software: &[&str]) -> String {
        let mut versions: Vec<&str> = vec![];
        for version in software.iter().chain([&self.rustc.as_str()]) {
            if !version.is_empty() && !versions.contains(version) {
                versions.push(version);
            }
        }
        let cores = if self.cores == 1 { "1 core".to_owned() } else { format!("{} cores", self.cores) };
        let memory = bytes(self.memory_bytes);
        format!("{}, {cores}, {memory}, {}; {threads} threads; {}.", self.cpu, self.system, versions.join(", "))
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
        let machine = Machine::here();
        assert!(machine.cores > 0);
        let text = machine.describe(2, &["Firebox 1", "PyTorch 2", "PyTorch 2"]);
        assert!(text.contains("; 2 threads; Firebox 1, PyTorch 2, rustc"), "{text}");
    }
}
