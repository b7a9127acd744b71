//! Runs of the `firebox` command in a folder of their own.
// Each test program uses a part of this.
#![allow(dead_code, clippy::unwrap_used)]

#[cfg(target_os = "linux")]
pub mod processes;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What a step of a hung process may take at most; nothing here comes near.
const PATIENCE: Duration = Duration::from_secs(300);

/// A temporary folder with a corpus, a cache and runs.
pub struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// A folder with `docs.jsonl`: `documents` short documents of counted sentences.
    pub fn new(documents: usize) -> Self {
        let lab = Self { dir: tempfile::tempdir().unwrap() };
        let mut lines = String::new();
        for i in 0..documents {
            writeln!(lines, "{}", serde_json::json!({ "text": document(i) })).unwrap();
        }
        lab.write("docs.jsonl", lines);
        lab
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file into the folder.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// `firebox ARGS`, called in the folder.
    pub fn firebox(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_firebox"));
        command.current_dir(self.dir.path()).env("FIREBOX_CACHE", self.path("cache")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same, to its end.
    pub fn call(&self, args: &[&str]) -> Ended {
        Ended::new(self.firebox(args).output().unwrap(), args.join(" "))
    }

    /// `firebox train` of the small recipe on `docs.jsonl` into `out`.
    pub fn train(&self, out: &str, args: &[&str]) -> Command {
        let recipe = self.write("small.toml", SMALL);
        let mut command = self.firebox(&["train", recipe.to_str().unwrap(), "--data", "docs.jsonl", "--out", out]);
        command.args(args);
        command
    }

    /// The same, to a good end.
    pub fn trained(&self, out: &str, args: &[&str]) -> Run {
        Ended::new(self.train(out, args).output().unwrap(), format!("train {args:?}")).succeeded();
        self.run(out)
    }

    /// The run in `out`.
    pub fn run(&self, out: &str) -> Run {
        Run { dir: self.path(out) }
    }
}

/// A model of 15 thousand parameters on characters; each step is logged, each fourth saved.
pub const SMALL: &str = r#"
name = "small"
[model]
d_model = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
d_ff = 48
context = 24
dropout = 0.1
[data]
tokenizer = "char"
val_fraction = 0.1
[optimizer]
lr = 3e-3
[schedule]
kind = "cosine"
warmup_steps = 5
[train]
steps = 40
batch_rows = 6
micro_batch_rows = 4
log_every = 1
[eval]
every = 10
sample_tokens = 8
[checkpoint]
every = 4
"#;

fn document(i: usize) -> String {
    let nouns = ["boiler", "fire", "valve", "piston", "driver", "tender", "whistle"];
    let verbs = ["feeds", "warms", "opens", "turns", "watches"];
    let sentence = |j: usize| {
        format!("The {} {} the {}, {} times.\n", nouns[j % 7], verbs[j * 3 % 5], nouns[(j * 5 + 2) % 7], j % 10)
    };
    (0..1 + i % 4).map(|j| sentence(i * 11 + j * j)).collect::<String>() + &i.to_string()
}

/// A process that ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    pub what: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn new(output: Output, what: String) -> Self {
        Self {
            what,
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts a good end.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}\n{}", self.what, self.stdout, self.stderr);
        self
    }

    /// Asserts that it ended with `code` and, after whatever it told of its progress, a single line of error that has all of `words`.
    #[track_caller]
    pub fn failed(&self, code: i32, words: &[&str]) {
        let Self { what, stdout, stderr, .. } = self;
        assert_eq!(self.code, Some(code), "{what}\n{stdout}\n{stderr}");
        let errors = stderr.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{what}: one line of error:\n{stderr}");
        let line = stderr.lines().find(|line| line.starts_with("error:")).unwrap();
        for word in words {
            assert!(line.contains(word), "{what}: expected `{word}` in: {line}");
        }
        for noise in ["panicked", "RUST_BACKTRACE", "Error {", "Some("] {
            assert!(!stderr.contains(noise) && !stdout.contains(noise), "{what}: {noise}\n{stderr}");
        }
    }
}

/// What a run left in its folder.
pub struct Run {
    pub dir: PathBuf,
}

impl Run {
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.join(name)).unwrap()).unwrap()
    }

    /// The whole lines of `metrics.jsonl`; none before there is one.
    pub fn metrics(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Steps and values of a key of `metrics.jsonl`, in order.
    pub fn series(&self, key: &str) -> Vec<(u64, f64)> {
        self.metrics().iter().filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect()
    }

    /// The last step that was logged.
    pub fn step(&self) -> u64 {
        self.series("loss").last().map_or(0, |(step, _)| *step)
    }

    /// Everything in `checkpoints`, hidden names too, in order of steps.
    pub fn checkpoints(&self) -> Vec<String> {
        let mut names = names(&self.dir.join("checkpoints"));
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    /// The steps in `checkpoints`.
    pub fn saved(&self) -> Vec<u64> {
        self.checkpoints().iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect()
    }

    /// What must not depend on how a run came to its end: the last checkpoint but for its clock, and losses, rates and norms of all steps.
    pub fn fingerprint(&self) -> Fingerprint {
        let last = self.saved().last().copied().unwrap();
        let dir = self.dir.join(format!("checkpoints/step-{last}"));
        let files = ["config.json", "model.safetensors", "optimizer/adamw.safetensors", "tokenizer.json"];
        let mut state = self.json(&format!("checkpoints/step-{last}/state.json"));
        state.as_object_mut().unwrap().remove("elapsed_s").unwrap();
        let series = ["loss", "lr", "grad_norm", "val_loss", "val_bpb"];
        Fingerprint {
            files: files.iter().map(|name| (*name, std::fs::read(dir.join(name)).unwrap())).collect(),
            state,
            // As bits, so that nothing is rounded.
            series: series
                .iter()
                .map(|key| (*key, self.series(key).into_iter().map(|(step, x)| (step, x.to_bits())).collect()))
                .collect(),
        }
    }
}

/// See [`Run::fingerprint`].
#[derive(PartialEq)]
pub struct Fingerprint {
    files: BTreeMap<&'static str, Vec<u8>>,
    state: Value,
    series: BTreeMap<&'static str, Vec<(u64, u64)>>,
}

impl Fingerprint {
    /// Asserts that both are the same, and names the first difference.
    #[track_caller]
    pub fn assert_equals(&self, other: &Self, what: &str) {
        for (key, want) in &self.series {
            let got = &other.series[key];
            let differ = want.iter().zip(got).find(|(w, g)| w != g);
            if let Some((w, g)) = differ {
                let (w_value, g_value) = (f64::from_bits(w.1), f64::from_bits(g.1));
                panic!("{what}: {key}: expected {w_value} at step {}, got {g_value} at step {}", w.0, g.0);
            }
            assert_eq!(want.len(), got.len(), "{what}: {key}");
        }
        for (name, want) in &self.files {
            assert!(*want == other.files[name], "{what}: {name} differs");
        }
        assert_eq!(self.state, other.state, "{what}: state.json");
    }

    /// The same for layouts that may differ in the last bit of the gradients' norm.
    #[track_caller]
    pub fn assert_same_steps(&self, other: &Self, what: &str) {
        for key in ["loss", "val_loss"] {
            assert!(self.series[key] == other.series[key], "{what}: {key} differs");
        }
        for (name, want) in &self.files {
            assert!(*want == other.files[name], "{what}: {name} differs");
        }
    }
}

/// Names in a folder, sorted; none if it is not there.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until `ready`, or until the process has ended by itself; true if it is still running.
pub fn wait_until(child: &mut Child, ready: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if ready() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    panic!("nothing happened in {PATIENCE:?}");
}

/// Sends a signal by its name, such as `TERM`.
#[cfg(unix)]
pub fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap().success());
}

/// A fixed sequence of numbers below `n` each: what makes moments random is the machine.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        // Knuth's MMIX multiplier and increment.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Says past the test harness, which hides what passing tests print, that a test could not run.
pub fn skipped(reason: &str) {
    use std::io::Write as _;
    std::io::stderr().write_all(format!("\nSKIPPED: {reason}\n").as_bytes()).unwrap();
}
