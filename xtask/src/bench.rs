//! `cargo xtask bench`: build the benchmark, install PyTorch beside it, then measure.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::cargo::{build_binary, replace_self};
use crate::error::Result;
use crate::say;
use crate::test::install::Python;
use crate::workspace::Workspace;

/// Measures Firebox beside PyTorch and plain burn: builds the benchmark, installs PyTorch into the target folder, runs.
#[derive(Args)]
#[command(
    override_usage = "cargo xtask bench <train|finetune|kernels|optim|scaling|speedrun|shootout|mup|compress> [OPTIONS]",
    after_help = "Benchmarks:
  train      training steps of four models: tokens/s, MFU, peak memory
  finetune   steps of fine-tuning, full and LoRA, beside transformers and PEFT
  kernels    single operations: GFLOP/s or GB/s
  optim      a step of each optimizer: ms, GB/s
  scaling    time and memory over context, width and depth
  shootout   every optimizer on one recipe: --data tinyshakespeare.txt
  mup        what a step changes over the width, with μP and without
  compress   what each method makes of one model: --data TEXT; or tokens/s and memory: --speed
  speedrun   nanoGPT's CPU recipe to the same loss, wall-clock: --data tinyshakespeare.txt

Examples:
  cargo xtask bench train --quick                  a smoke run
  cargo xtask bench train gpt-14m
  cargo xtask bench train --contenders firebox,torch-eager,burn-flex
  cargo xtask bench kernels --help                 all options of a benchmark

PyTorch takes 6 GB in the target folder and is installed when first needed; torch.compile needs g++. The contenders
burn-ndarray and burn-flex are built, fully optimized, when first named: 15 minutes on 2 cores."
)]
pub struct Bench {
    /// The benchmark and its options.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "BENCHMARK AND OPTIONS")]
    arguments: Vec<String>,
}

/// What pins PyTorch.
const REQUIREMENTS: &str = "crates/bench/torch/requirements.txt";

impl Bench {
    /// Builds and installs what these arguments need, then becomes `firebox-bench`.
    pub fn run(self, workspace: &Workspace) -> Result<ExitCode> {
        let needs = Needs::of(&self.arguments);
        say::heading("building the benchmark");
        let binary = build_binary(workspace, &["firebox-bench", "firebox"], "firebox-bench", "release", &[])?;
        let mut command = Command::new(&binary);
        command.args(&self.arguments).env("FIREBOX_BENCH_RESULTS", workspace.target.join("bench"));
        if needs.torch {
            command.env("FIREBOX_BENCH_PYTHON", Python::new(workspace, "bench", REQUIREMENTS).install()?);
        }
        if needs.firebox {
            command.env("FIREBOX_BENCH_FIREBOX", build_binary(workspace, &["firebox"], "firebox", "release", &[])?);
        }
        if needs.burn {
            command.env("FIREBOX_BENCH_BASELINE", baseline(workspace)?);
        }
        replace_self(command, &binary)
    }
}

/// The benchmark once more, with models of burn's own modules, and with burn built as fast as it gets.
fn baseline(workspace: &Workspace) -> Result<PathBuf> {
    say::heading("building burn's own modules, fully optimized (first time: 15 minutes on 2 cores)");
    build_binary(workspace, &["firebox-bench"], "firebox-bench", "baseline", &["baseline"])
}

/// What the arguments ask for beyond the benchmark itself.
#[derive(Debug, PartialEq, Eq)]
struct Needs {
    torch: bool,
    burn: bool,
    firebox: bool,
}

impl Needs {
    fn of(arguments: &[String]) -> Self {
        let help = arguments.iter().any(|argument| argument == "--help" || argument == "-h");
        let first = arguments.first().map(String::as_str);
        let speedrun = matches!(first, Some("speedrun" | "shootout"));
        let contenders = contenders(arguments);
        let names =
            |prefix: &str| contenders.iter().flat_map(|list| list.split(',')).any(|name| name.starts_with(prefix));
        Self {
            torch: !help
                && !matches!(first, Some("shootout" | "mup" | "compress"))
                && (contenders.is_none() || names("torch")),
            burn: !help && names("burn"),
            firebox: !help && speedrun,
        }
    }
}

/// The value of `--contenders`, if it is given.
fn contenders(arguments: &[String]) -> Option<&str> {
    let at = arguments.iter().position(|argument| argument.starts_with("--contenders"))?;
    arguments[at].split_once('=').map(|(_, value)| value).or_else(|| arguments.get(at + 1).map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_is_installed() {
        let needs = |line: &str| Needs::of(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let (torch, burn, firebox) = (true, true, true);
        assert_eq!(needs("train"), Needs { torch, burn: false, firebox: false });
        assert_eq!(needs("train --help"), Needs { torch: false, burn: false, firebox: false });
        assert_eq!(needs("train --contenders firebox"), Needs { torch: false, burn: false, firebox: false });
        assert_eq!(needs("train --contenders=firebox,burn-flex"), Needs { torch: false, burn, firebox: false });
        assert_eq!(needs("train gpt-14m --contenders torch-eager,burn-flex"), Needs { torch, burn, firebox: false });
        assert_eq!(needs("speedrun --data x.txt"), Needs { torch, burn: false, firebox });
        assert_eq!(needs("mup"), Needs { torch: false, burn: false, firebox: false });
        assert_eq!(needs("compress --speed"), Needs { torch: false, burn: false, firebox: false });
        assert_eq!(needs("shootout --data x.txt"), Needs { torch: false, burn: false, firebox });
    }
}
