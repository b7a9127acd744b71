//! `cargo xtask setup`: what this machine has of what Firebox needs, and the commands that install the rest.

use std::fs;
use std::process::ExitCode;

use clap::Args;

use crate::cargo::output;
use crate::error::Result;
use crate::test::install;
use crate::test::vulkan;
use crate::workspace::Workspace;

/// Says what this machine lacks and which command installs it. It changes nothing.
///
/// Training needs Rust, a C compiler, memory and disk; the tests need a little more, which `cargo xtask test --install`
/// installs.
#[derive(Args)]
#[command(after_help = "The exit code is 0 if Firebox can be built and trained here.")]
pub struct Setup {}

/// Memory in which the default build and run fit; linking the tests takes the most.
const MIN_MEMORY_GIB: f64 = 4.0;

/// Disk that a default build and its tests fill.
const MIN_DISK_GIB: f64 = 8.0;

/// What was looked for.
struct Item {
    name: &'static str,
    /// Without it nothing works.
    required: bool,
    /// What was found.
    found: std::result::Result<String, Missing>,
}

struct Missing {
    what: String,
    advice: String,
}

impl Setup {
    /// Looks and prints one line per item.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        let items = [
            Item { name: "Rust", required: true, found: rust(workspace) },
            Item { name: "C compiler", required: true, found: c_compiler() },
            Item { name: "memory", required: true, found: memory() },
            Item { name: "disk", required: true, found: disk(workspace) },
            Item { name: "rustfmt, clippy", required: false, found: components() },
            Item { name: "Vulkan", required: false, found: vulkan_driver() },
            Item { name: "test tools", required: false, found: packages() },
            Item { name: "mdbook", required: false, found: mdbook() },
        ];
        let mut usable = true;
        for item in items {
            match item.found {
                Ok(found) => println!("{:16} ok       {found}", item.name),
                Err(missing) => {
                    usable &= !item.required;
                    let verdict = if item.required { "MISSING" } else { "optional" };
                    println!("{:16} {verdict:8} {}", item.name, missing.what);
                    println!("{:25} -> {}", "", missing.advice);
                }
            }
        }
        println!();
        if usable {
            println!("This machine can build and train: cargo xtask train");
            Ok(ExitCode::SUCCESS)
        } else {
            println!("Install what is marked MISSING, then call again.");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn missing(what: impl Into<String>, advice: impl Into<String>) -> Missing {
    Missing { what: what.into(), advice: advice.into() }
}

fn rust(workspace: &Workspace) -> std::result::Result<String, Missing> {
    let needed = workspace
        .members
        .packages
        .iter()
        .filter_map(|package| package.rust_version.as_ref())
        .max()
        .map_or_else(String::new, ToString::to_string);
    let advice = "rustup update stable (or install Rust from https://rustup.rs)";
    let version = output("rustc", &["--version"]).ok_or_else(|| missing("no rustc", advice))?;
    if version_at_least(&version, &needed) {
        Ok(version)
    } else {
        Err(missing(format!("{version}; {needed} is needed"), advice))
    }
}

/// Whether `rustc 1.95.0 (...)` is at least `1.95.0`.
fn version_at_least(rustc: &str, needed: &str) -> bool {
    let numbers = |text: &str| -> Vec<u32> { text.split(['.', '-']).map_while(|part| part.parse().ok()).collect() };
    let found = rustc.split_whitespace().nth(1).unwrap_or_default();
    numbers(found) >= numbers(needed)
}

fn c_compiler() -> std::result::Result<String, Missing> {
    let advice = match std::env::consts::OS {
        "macos" => "xcode-select --install",
        "windows" => "install Visual Studio's Build Tools with C++",
        _ => "apt-get install build-essential (Debian, Ubuntu); dnf install gcc (Fedora); pacman -S gcc (Arch)",
    };
    if cfg!(windows) {
        // The linker that Rust found on this system brings the compiler along.
        return Ok("comes with Rust's MSVC toolchain".to_owned());
    }
    ["cc", "gcc", "clang"]
        .iter()
        .find_map(|compiler| output(compiler, &["--version"]))
        .and_then(|text| text.lines().next().map(str::to_owned))
        .ok_or_else(|| missing("neither cc nor gcc nor clang", advice))
}

fn memory() -> std::result::Result<String, Missing> {
    let kib = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| meminfo_kib(&text, "MemTotal:"))
        .or_else(|| Some(output("sysctl", &["-n", "hw.memsize"])?.parse::<f64>().ok()? / 1024.0));
    at_least(kib, MIN_MEMORY_GIB, "close other programs, or add swap")
}

fn disk(workspace: &Workspace) -> std::result::Result<String, Missing> {
    // The target folder may not exist yet; what is asked for is its file system.
    let folder = workspace.target.ancestors().find(|folder| folder.exists()).unwrap_or(&workspace.root);
    let listing = output("df", &["-Pk".as_ref(), folder.as_os_str()]);
    let kib = listing.and_then(|text| df_free_kib(&text));
    at_least(kib, MIN_DISK_GIB, "free some space, or set CARGO_TARGET_DIR to a folder elsewhere")
}

fn at_least(kib: Option<f64>, gib: f64, advice: &str) -> std::result::Result<String, Missing> {
    let Some(kib) = kib else {
        return Ok(format!("not measured; {gib} GiB are enough"));
    };
    let found = kib / 1024.0 / 1024.0;
    if found >= gib {
        Ok(format!("{found:.1} GiB"))
    } else {
        Err(missing(format!("{found:.1} GiB; {gib} are needed"), advice))
    }
}

fn meminfo_kib(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The fourth column of `df -P`: KiB available.
fn df_free_kib(text: &str) -> Option<f64> {
    text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()
}

fn components() -> std::result::Result<String, Missing> {
    let both = output("cargo", &["fmt", "--version"]).zip(output("cargo", &["clippy", "--version"]));
    both.map(|(fmt, clippy)| format!("{fmt}, {clippy}"))
        .ok_or_else(|| missing("needed by cargo xtask tidy", "rustup component add rustfmt clippy"))
}

fn vulkan_driver() -> std::result::Result<String, Missing> {
    if !cfg!(target_os = "linux") {
        return Ok("not needed: wgpu uses this system's own interface".to_owned());
    }
    let advice = "cargo xtask test --install, or your GPU vendor's driver";
    if !vulkan::has_loader() {
        return Err(missing("no loader (libvulkan.so.1), needed by --backend wgpu", advice));
    }
    let names: Vec<String> = vulkan::manifests()
        .iter()
        .filter_map(|path| path.file_stem())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    if names.is_empty() {
        Err(missing("no driver, needed by --backend wgpu", advice))
    } else {
        Ok(format!("drivers {}", names.join(", ")))
    }
}

fn packages() -> std::result::Result<String, Missing> {
    let absent: Vec<&str> =
        install::packages().filter(|package| !(package.present)()).map(|package| package.name).collect();
    if absent.is_empty() {
        Ok("all there".to_owned())
    } else {
        Err(missing(absent.join(", "), "cargo xtask test --install"))
    }
}

fn mdbook() -> std::result::Result<String, Missing> {
    output("mdbook", &["--version"])
        .ok_or_else(|| missing("needed by cargo xtask docs to build the book", "cargo install mdbook --locked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let rustc = "rustc 1.95.0 (59807616e 2026-04-14)";
        assert!(version_at_least(rustc, "1.95"));
        assert!(version_at_least(rustc, "1.95.0"));
        assert!(version_at_least(rustc, "1.9.3"));
        assert!(!version_at_least(rustc, "1.96.0"));
        assert!(version_at_least("rustc 1.97.0-nightly (x)", "1.95.0"));
        assert!(!version_at_least("nonsense", "1.95.0"));
    }

    #[test]
    fn sizes_are_read_from_the_system_s_tables() {
        let meminfo = "MemFree:  1 kB\nMemTotal:       8388608 kB\n";
        assert_eq!(meminfo_kib(meminfo, "MemTotal:"), Some(8_388_608.0));
        let df = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/vda 100 40 60 40% /\n";
        assert_eq!(df_free_kib(df), Some(60.0));
        assert_eq!(df_free_kib(""), None);
    }

    #[test]
    fn too_little_is_missing_and_unknown_is_not() {
        assert!(at_least(Some(3.0 * 1024.0 * 1024.0), 4.0, "").is_err());
        assert!(at_least(Some(5.0 * 1024.0 * 1024.0), 4.0, "").is_ok());
        assert!(at_least(None, 4.0, "").is_ok());
    }
}
