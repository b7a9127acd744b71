//! What a run leaves in its folder, read back by other eyes than the ones that wrote it.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use firebox_train::observe::compare::{self, Baselines};
use firebox_train::observe::{
    DistillRecord, EvalRecord, Event, MetricsWriter, ObserveError, Observer, Observers, Progress, RanksRecord, RunInfo,
    StepRecord, Summary, metrics, report,
};

/// A run folder that is gone at the end of its test.
struct Folder {
    dir: PathBuf,
    _guard: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let guard = tempfile::tempdir().unwrap();
        Self { dir: guard.path().to_path_buf(), _guard: guard }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap()
    }
}

fn info(dir: &Path, start_step: u64) -> RunInfo {
    RunInfo {
        dir: dir.to_path_buf(),
        name: "night & day".into(),
        recipe_toml: "[optimizer]\nlr = 1e-3 # <b>\n".into(),
        params: 1_234_567,
        total_steps: 20,
        start_step,
        backend: "ndarray".into(),
        peak_flops: 100e9,
        flops_per_token: 1e7,
        ..RunInfo::default()
    }
}

fn step(step: u64) -> StepRecord {
    StepRecord {
        step,
        tokens: step * 512,
        loss: 9.0 / step as f64 + 0.1,
        lr: 1e-3 / 3.0,
        grad_norm: 0.7,
        tokens_per_s: 1_400.5,
        mfu: 0.14,
        memory_bytes: 1 << 29,
        // Not measured from the first step on.
        noise_scale_rows: (step > 2).then_some(40.0),
        noise_scale_tokens: (step > 2).then_some(20_480.0),
        expert_load: (step > 2).then_some(1.25),
        distill: (step > 2).then_some(DistillRecord {
            hard_loss: 2.5,
            soft_loss: 0.25,
            hidden_loss: Some(0.5),
            relation_loss: None,
        }),
        // As if the run went on on ranks.
        ranks: (step > 3).then_some(RanksRecord {
            bytes_sent: 1 << 40,
            messages_sent: 96,
            idle: 0.1 / 3.0,
            communication: 0.02,
            overlap: Some(0.75),
            bubble: (step > 4).then_some(0.11),
        }),
    }
}

fn eval(step: u64) -> EvalRecord {
    EvalRecord {
        step,
        tokens: step * 512,
        val_loss: 9.5 / step as f64,
        val_bpb: 3.2 / step as f64,
        // Not of every task.
        metrics: if step > 2 { [("accuracy".to_owned(), 0.75)].into() } else { Default::default() },
        ..EvalRecord::default()
    }
}

fn summary(stopped: &str) -> Summary {
    Summary {
        params: 1_234_567,
        steps: 10,
        tokens: 5_120,
        wall_s: 252.0,
        tokens_per_s: 1_400.0,
        val_loss: Some(0.95),
        val_bpb: Some(0.32),
        peak_memory_bytes: 1 << 30,
        skipped_steps: 1,
        noise_scale_rows: Some(40.0),
        noise_scale_tokens: Some(20_480.0),
        stopped: stopped.into(),
        ..Summary::default()
    }
}

/// Steps `from..=to`, an evaluation at every fifth, a sample at every tenth.
fn train(observer: &mut impl Observer, steps: std::ops::RangeInclusive<u64>) {
    for n in steps {
        observer.on_event(&Event::Step(&step(n))).unwrap();
        if n % 5 == 0 {
            observer.on_event(&Event::Evaluated(&eval(n))).unwrap();
        }
        if n % 10 == 0 {
            observer.on_event(&Event::Sampled { step: n, text: "<script>alert('x')</script> & \u{1b}[31m" }).unwrap();
        }
    }
}

#[test]
fn metrics_come_back_as_they_were_written() {
    let folder = Folder::new();
    let mut writer = MetricsWriter::new();
    writer.on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    train(&mut writer, 1..=5);
    let odd = StepRecord { step: 6, loss: f64::NAN, grad_norm: f64::INFINITY, ..step(6) };
    writer.on_event(&Event::Step(&odd)).unwrap();
    writer.on_event(&Event::Skipped { step: 6, reason: "the loss is \"NaN\"\n" }).unwrap();
    // Not finished: what was written must be there without it.
    let read = metrics::read(&folder.dir.join("metrics.jsonl")).unwrap().unwrap();
    assert_eq!(read.steps[..5], (1..=5).map(step).collect::<Vec<_>>());
    assert!(read.steps[5].loss.is_nan() && read.steps[5].grad_norm.is_nan());
    assert_eq!(read.evals, [eval(5)]);
    assert_eq!(read.skipped, [(6, "the loss is \"NaN\"\n".to_owned())]);
    assert_eq!(read.unreadable_lines, 0);

    // The names are a contract with whoever reads the file.
    let lines: Vec<serde_json::Value> =
        folder.read("metrics.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let keys = |line: &serde_json::Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let mut of_step = keys(&lines[0]);
    of_step.sort();
    assert_eq!(of_step, ["grad_norm", "loss", "lr", "memory_bytes", "mfu", "step", "tokens", "tokens_per_s"]);
    let of_later = keys(&lines[2]);
    assert!(["noise_scale_rows", "noise_scale_tokens"].iter().all(|key| of_later.iter().any(|k| k == key)));
    let of_ranks = ["bytes_sent", "messages_sent", "idle", "communication", "overlap", "bubble"];
    let (with, without) = (keys(&lines[4]), keys(&lines[2]));
    assert!(of_ranks.iter().all(|key| with.iter().any(|k| k == key) && without.iter().all(|k| k != key)), "{with:?}");
    let mut of_eval = keys(&lines[5]);
    of_eval.sort();
    assert_eq!(of_eval, ["metrics", "step", "tokens", "val_bpb", "val_loss"]);
    assert_eq!(lines[5]["metrics"]["accuracy"], 0.75);
}

#[test]
fn a_resumed_run_forgets_what_came_after_its_checkpoint() {
    let folder = Folder::new();
    let path = folder.dir.join("metrics.jsonl");
    let mut first = Observers::files();
    first.on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    train(&mut first, 1..=10);
    first.on_event(&Event::Finished(&summary("interrupted"))).unwrap();
    // As kill -9 leaves it: half a line.
    let mut file = fs::File::options().append(true).open(&path).unwrap();
    file.write_all(b"{\"step\":11,\"tokens\":56").unwrap();
    drop(file);
    assert_eq!(metrics::read(&path).unwrap().unwrap().unreadable_lines, 1);

    let mut second = Observers::files();
    second.on_event(&Event::RunStarted(&info(&folder.dir, 7))).unwrap();
    assert!(!folder.dir.join("summary.json").exists(), "the old result is not that of the new run");
    assert!(!folder.dir.join("samples/step-10.txt").exists());
    train(&mut second, 8..=20);
    let read = metrics::read(&path).unwrap().unwrap();
    assert_eq!(read.steps.iter().map(|r| r.step).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    assert_eq!(read.evals.iter().map(|r| r.step).collect::<Vec<_>>(), [5, 10, 15, 20]);
    assert_eq!(read.unreadable_lines, 0);
    assert!(folder.dir.join("samples/step-20.txt").exists());

    // A new run in the same folder starts from nothing.
    MetricsWriter::new().on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    assert_eq!(folder.read("metrics.jsonl"), "");
    Observers::files().on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    let left: Vec<_> =
        fs::read_dir(&folder.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.contains(".tmp")), "{left:?}");
    assert_eq!(left.iter().filter(|name| name.contains("tfevents")).count(), 1, "{left:?}");
}

#[test]
fn lines_that_make_no_sense_are_counted() {
    let folder = Folder::new();
    let path = folder.dir.join("metrics.jsonl");
    let long = "x".repeat(100_000);
    let good = serde_json::to_string(&step(3)).unwrap();
    fs::write(&path, format!("\0\0\0\n{{}}\n\n{good}\n[1,2]\n{long}\n{good}")).unwrap();
    let read = metrics::read(&path).unwrap().unwrap();
    assert_eq!(read.steps, [step(3), step(3)]);
    assert!(read.unreadable_lines >= 4);
}

/// CRC-32C bit by bit (RFC 3720, appendix B.4), independent of the crate that wrote the file.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The messages of a TFRecord file.
fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(masked(&file[..8]), u32::from_le_bytes(file[8..12].try_into().unwrap()));
        let data = &file[12..12 + length];
        assert_eq!(masked(data), u32::from_le_bytes(file[12 + length..16 + length].try_into().unwrap()));
        out.push(data.to_vec());
        file = &file[16 + length..];
    }
    out
}

/// The fields of a protobuf message: (number, bytes), the bytes of a varint as its value in little endian.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let (mut n, mut shift) = (0, 0);
        loop {
            let byte = message[0];
            *message = &message[1..];
            n |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return n;
            }
        }
    }
    let mut out = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let value = match key & 7 {
            0 => varint(&mut message).to_le_bytes().to_vec(),
            wire => {
                let length = match wire {
                    1 => 8,
                    2 => varint(&mut message) as usize,
                    5 => 4,
                    other => panic!("wire type {other}"),
                };
                let (value, rest) = message.split_at(length);
                message = rest;
                value.to_vec()
            }
        };
        out.push((key >> 3, value));
    }
    out
}

fn field(message: &[u8], number: u64) -> Vec<u8> {
    fields(message).into_iter().find(|(n, _)| *n == number).unwrap().1
}

#[test]
fn event_files_are_what_tensorboard_defines() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of CRC-32C");
    let folder = Folder::new();
    for start in [0, 300] {
        let mut observers = Observers::files();
        observers.on_event(&Event::RunStarted(&info(&folder.dir, start))).unwrap();
        observers.on_event(&Event::Step(&StepRecord { step: start + 1, ..step(1) })).unwrap();
        observers.on_event(&Event::Evaluated(&eval(start + 1))).unwrap();
        observers.on_event(&Event::Sampled { step: start + 1, text: "a\nb" }).unwrap();
    }
    let mut names: Vec<_> = fs::read_dir(&folder.dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("tfevents"))
        .collect();
    names.sort();
    assert_eq!(names.len(), 2);
    let step_of = |event: &[u8]| u64::from_le_bytes(field(event, 2).try_into().unwrap());
    for (name, start) in names.iter().zip([0u64, 300]) {
        let events = records(&fs::read(folder.dir.join(name)).unwrap());
        assert_eq!(events.len(), 5);
        assert_eq!(field(&events[0], 3), b"brain.Event:2");
        let restart = &events[1];
        assert_eq!(step_of(restart), if start == 0 { 0 } else { 301 });
        assert_eq!(field(&field(restart, 7), 1), 1u64.to_le_bytes(), "SessionLog START");
        assert_eq!(step_of(&events[2]), start + 1);
        let scalars: Vec<(String, f32)> = fields(&field(&events[2], 5))
            .iter()
            .map(|(_, value)| {
                let tag = String::from_utf8(field(value, 1)).unwrap();
                (tag, f32::from_le_bytes(field(value, 2).try_into().unwrap()))
            })
            .collect();
        let r = step(1);
        let expected = [
            ("train/loss", r.loss),
            ("train/learning_rate", r.lr),
            ("train/gradient_norm", r.grad_norm),
            ("speed/tokens_per_s", r.tokens_per_s),
            ("speed/mfu", r.mfu),
            ("memory/resident_bytes", r.memory_bytes as f64),
        ];
        assert_eq!(scalars, expected.map(|(tag, value)| (tag.to_owned(), value as f32)));
        let text = field(&field(&events[4], 5), 1);
        assert_eq!(field(&field(&text, 8), 8), b"    a\n    b\n");
    }
}

#[test]
fn the_report_has_every_part_and_escapes_what_it_shows() {
    let folder = Folder::new();
    let mut observers = Observers::files();
    observers.on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    train(&mut observers, 1..=10);
    observers.on_event(&Event::Skipped { step: 4, reason: "<img src=x onerror=alert(1)>" }).unwrap();
    Baselines { bytes: 1_000_000, gzip_bytes: 225_000, xz_bytes: 200_000, gzip_bpb: 1.8, xz_bpb: 1.6 }
        .save(&folder.dir)
        .unwrap();
    fs::create_dir_all(folder.dir.join("checkpoints/step-5")).unwrap();
    fs::create_dir_all(folder.dir.join("checkpoints/step-10")).unwrap();
    observers.on_event(&Event::Finished(&summary("early stop"))).unwrap();

    let html = folder.read("report.html");
    let parts = [
        "night &amp; day",
        "1.23M parameters",
        "4 min 12 s",
        "0.320 bits per byte",
        "gzip\u{a0}-9 needs 1.800, xz\u{a0}-9\u{a0}1.600",
        "better than both compressors",
        "Ended early:</b> early stop, after step 10 of 20",
        "Loss, nats per token",
        "Loss after the first quarter",
        "Held-out text, bits per byte",
        "Learning rate",
        "Gradient norm",
        "Speed, tokens per second",
        "Ranks: share of time",
        "Ranks: share of communication",
        "Resident memory",
        "1.07 GB",
        "1 step was skipped",
        "The gradient noise scale is about 40 rows, 20.5k tokens",
        "&lt;img src=x",
        "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; \u{fffd}[31m",
        "lr = 1e-3 # &lt;b&gt;",
        "step-10 --prompt",
        "--resume",
        "All evaluations",
        "100 GFLOP/s",
    ];
    for part in parts {
        assert!(html.contains(part), "{part:?} is missing");
    }
    for not in ["<script", "<img", "http-equiv=\"refresh", "<link", "<iframe", "NaN", "@import", "url("] {
        assert!(!html.contains(not), "{not:?} is in the report");
    }
    // Nothing is loaded: the only address is the name of the SVG language.
    let addresses = html.matches("http://").count() + html.matches("https://").count();
    assert_eq!(addresses, html.matches("http://www.w3.org/2000/svg").count());
    // Eleven drawings, the large one for two widths.
    assert_eq!(html.matches("<svg").count(), 11);
    assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    assert_eq!(html.matches("<section").count(), html.matches("</section>").count());

    // Remade from the folder alone, it is the same page.
    fs::remove_file(folder.dir.join("report.html")).unwrap();
    report::write(&folder.dir).unwrap();
    assert_eq!(folder.read("report.html"), html);
}

#[test]
fn the_report_of_a_run_that_was_killed() {
    let folder = Folder::new();
    let mut observers = Observers::files();
    observers.on_event(&Event::RunStarted(&info(&folder.dir, 0))).unwrap();
    // Nothing happened yet.
    report::write(&folder.dir).unwrap();
    assert!(folder.read("report.html").contains("Not finished:</b> step 0 of 20"));
    // One step, and one that has no finite number.
    observers.on_event(&Event::Step(&step(1))).unwrap();
    let odd = StepRecord { loss: f64::NAN, grad_norm: f64::NAN, tokens_per_s: f64::NAN, mfu: f64::NAN, ..step(2) };
    observers.on_event(&Event::Step(&odd)).unwrap();
    drop(observers);
    fs::write(folder.dir.join("metrics.jsonl"), folder.read("metrics.jsonl") + "{\"step\":3,\"lo").unwrap();
    report::write(&folder.dir).unwrap();
    let html = folder.read("report.html");
    assert!(html.contains("Not finished:</b> step 2 of 20"));
    assert!(html.contains("train --out") && html.contains("--resume"));
    assert!(html.contains("Unreadable lines"));
    assert!(!html.contains("NaN") && !html.contains("Against general compressors"));

    // metrics.jsonl alone is enough.
    fs::remove_file(folder.dir.join("run.json")).unwrap();
    report::write(&folder.dir).unwrap();
}

#[test]
fn what_is_no_run_is_refused() {
    let folder = Folder::new();
    let error = report::write(&folder.dir).unwrap_err();
    assert!(matches!(error, ObserveError::NotARun { .. }));
    assert!(error.to_string().contains("not a run folder"));
    fs::write(folder.dir.join("run.json"), "{\"params\": \"many\"}").unwrap();
    let error = report::write(&folder.dir).unwrap_err();
    assert!(matches!(error, ObserveError::Malformed { .. }), "{error}");
}

#[test]
fn a_long_run_has_a_small_report() {
    let folder = Folder::new();
    let mut writer = MetricsWriter::new();
    writer.on_event(&Event::RunStarted(&RunInfo { total_steps: 100_000, ..info(&folder.dir, 0) })).unwrap();
    let mut text = String::new();
    for n in 1..=100_000u64 {
        let noise = (n.wrapping_mul(2_654_435_761) % 1_000) as f64 / 1_000.0;
        text.push_str(&serde_json::to_string(&StepRecord { loss: 2.0 + noise, ..step(n) }).unwrap());
        text.push('\n');
    }
    fs::write(folder.dir.join("metrics.jsonl"), text).unwrap();
    let path = report::write(&folder.dir).unwrap();
    let size = fs::metadata(path).unwrap().len();
    assert!(size < 200_000, "{size} bytes");
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do() {
    let folder = Folder::new();
    let file = folder.dir.join("file");
    fs::write(&file, "").unwrap();
    let error = Observers::files().on_event(&Event::RunStarted(&info(&file, 0))).unwrap_err();
    assert!(matches!(error, ObserveError::Write { .. }));
    assert!(error.to_string().contains("--out"), "{error}");
}

/// A writer whose content the test sees.
#[derive(Clone, Default)]
struct Shared(Rc<RefCell<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn plain_lines_show_first_and_last_step() {
    let out = Shared::default();
    let mut progress = Progress::lines(out.clone(), Duration::from_secs(3_600));
    progress.on_event(&Event::RunStarted(&info(Path::new("."), 0))).unwrap();
    train(&mut progress, 1..=13);
    progress.on_event(&Event::Finished(&summary("interrupted"))).unwrap();
    let text = String::from_utf8(out.0.borrow().clone()).unwrap();
    let steps: Vec<&str> = text.lines().filter(|line| line.contains("grad norm")).collect();
    assert_eq!(steps.len(), 2, "{text}");
    assert!(steps[0].starts_with("step  1/20  loss 9.1000"), "{text}");
    assert!(steps[1].starts_with("step 13/20"), "{text}");
    assert_eq!(text.matches("validation loss").count(), 2);
    assert!(text.contains("  │ <script>") && !text.contains('\u{1b}'), "samples can't steer the terminal");
    assert!(
        text.ends_with(
            "interrupted after 10 steps, 5,120 tokens in 4 min 12 s; validation 0.320 bits per byte; gradient noise scale 40 rows (20.5k tokens); 1 step skipped\n"
        ),
        "{text}"
    );
}

/// The size that a program makes of `text`, if this machine has it.
fn size_by(program: &str, text: &[u8]) -> Option<u64> {
    let mut child =
        Command::new(program).arg("-9").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    let mut input = child.stdin.take().unwrap();
    let text = text.to_vec();
    let feeder = std::thread::spawn(move || input.write_all(&text).unwrap());
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    assert!(output.status.success());
    Some(output.stdout.len() as u64)
}

#[test]
fn baselines_are_those_of_the_programs() {
    // Real text that is always here: the crate's own sources, several times the size of gzip's window.
    let mut text = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src"), root.join("tests")];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() { folders.push(path) } else { text.extend(fs::read(path).unwrap()) }
        }
    }
    assert!(text.len() > 64 << 10);
    let ours = compare::gzip_xz([text.clone()]).unwrap();
    assert_eq!(ours.bytes, text.len() as u64);
    assert!((ours.gzip_bpb - 8.0 * ours.gzip_bytes as f64 / text.len() as f64).abs() < 1e-12);
    match size_by("xz", &text) {
        // Headers, checks and index are the same; only liblzma's version can differ.
        Some(xz) => assert!(ours.xz_bytes.abs_diff(xz) <= 64, "{} and {xz}", ours.xz_bytes),
        None => eprintln!("SKIPPED: no program xz"),
    }
    match size_by("gzip", &text) {
        // DEFLATE encoders choose their matches differently at the same level.
        Some(gzip) => assert!(ours.gzip_bytes.abs_diff(gzip) <= gzip / 100, "{} and {gzip}", ours.gzip_bytes),
        None => eprintln!("SKIPPED: no program gzip"),
    }
    let nothing = compare::gzip_xz([]).unwrap();
    assert_eq!((nothing.bytes, nothing.gzip_bpb, nothing.xz_bpb), (0, 0.0, 0.0));
}
