//! SIGKILL at random moments.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use firebox_train::checkpoint::{Checkpoint, CheckpointError, Writer, find_latest, prune};

use super::{HELPER_DIR, consistent_value, helper, helper_dir, hidden, names, write};

/// Numbers of the large tensor: a megabyte in two files, so that a kill often falls into the middle of one.
const SCALE: usize = 150_000;
const MODE: &str = "FIREBOX_TEST_CHECKPOINT_MODE";

/// What a process that is about to be killed does in a loop.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Step after step, with retention.
    Advance,
    /// The same step again and again.
    Replace,
    /// Step after step on a small disk, with every other checkpoint too large for it.
    Fill,
}

/// The helper process: goes on from the newest checkpoint until it is killed, and says what it has finished.
#[test]
#[ignore = "a helper process of the tests below"]
fn child_writer() {
    let Some(dir) = helper_dir() else { return };
    let mode = std::env::var(MODE).unwrap();
    let say = |value: f32| {
        // A single write, so that a kill leaves no half line.
        std::io::stdout().write_all(format!("\n@finished {value}\n").as_bytes()).unwrap();
    };
    let mut value = match find_latest(&dir) {
        Ok(found) => consistent_value(&found.checkpoint),
        Err(CheckpointError::Missing { .. }) => 0.0,
        Err(error) => panic!("{error}"),
    };
    println!("\n@started");
    loop {
        value += 1.0;
        match mode.as_str() {
            "advance" => {
                write(&dir, value as u64, value, SCALE, Some(-f64::from(value) % 5.0)).unwrap();
                say(value);
                prune(&dir, 2, true).unwrap();
            }
            "replace" => {
                write(&dir, 7, value, SCALE, None).unwrap();
                say(value);
            }
            "fill" => {
                let error = write(&dir, value as u64, value, 100 * SCALE, None).unwrap_err();
                assert!(matches!(error, CheckpointError::Full { .. }), "{error}");
                write(&dir, value as u64, value, SCALE / 10, None).unwrap();
                say(value);
                prune(&dir, 2, false).unwrap();
            }
            other => panic!("{other}"),
        }
    }
}

/// Starts and kills writers in `dir`, and asserts after each kill that the newest checkpoint is whole, of one writing,
/// and none older than what was announced as finished.
pub fn kill_many(dir: &Path, mode: Mode, kills: u64) {
    let mode_name = match mode {
        Mode::Advance => "advance",
        Mode::Replace => "replace",
        Mode::Fill => "fill",
    };
    let mut announced: Option<f32> = None;
    let (mut in_the_middle, mut finished) = (0, 0);
    // Any fixed sequence: what makes the moments random is the machine.
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    // Long enough for a few checkpoints: on a busy machine it grows.
    let mut longest = Duration::from_millis(100);
    for round in 0..kills {
        let mut command: Command = helper("kill::child_writer", dir);
        let mut child = command.env(MODE, mode_name).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.ends_with("@started\n") && stdout.read_line(&mut said).unwrap() > 0 {}
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(longest.mul_f64((random >> 33) as f64 / (1u64 << 31) as f64));
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        let mut complained = String::new();
        stdout.read_to_string(&mut said).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut complained).unwrap();
        assert!(!complained.contains("panicked"), "round {round}: the writer failed by itself: {complained}");
        for value in said.lines().filter_map(|line| line.strip_prefix("@finished ")) {
            announced = Some(value.parse().unwrap());
            finished += 1;
        }
        if finished == 0 {
            longest = (longest * 2).min(Duration::from_secs(5));
        }

        // Not only the newest: whatever bears the name of a checkpoint is one, also those that were being deleted.
        for name in names(dir).iter().filter(|name| name.starts_with("step-")) {
            if let Err(error) = Checkpoint::open(dir.join(name)) {
                panic!("round {round}: {error}");
            }
        }
        in_the_middle += u64::from(!hidden(dir).is_empty());
        match find_latest(dir) {
            Ok(found) => {
                assert!(found.skipped.is_empty(), "round {round}: {}", found.skipped[0]);
                let value = consistent_value(&found.checkpoint);
                assert!(Some(value) >= announced, "round {round}: {value} after {announced:?} was announced");
                assert_eq!(found.checkpoint.step(), if mode == Mode::Replace { 7 } else { value as u64 });
            }
            // Killed before the first was finished.
            Err(CheckpointError::Missing { .. }) => assert_eq!(announced, None, "round {round}"),
            Err(error) => panic!("round {round}: {error}"),
        }
    }
    println!("{mode_name}: {kills} kills, {in_the_middle} of them in the middle of a checkpoint; {finished} finished");
    assert!(in_the_middle > 0 && finished > 0, "the kills came at no interesting moments");
    // The next writer cleans up after the dead.
    drop(Writer::create(dir, 1_000_000).unwrap());
    assert_eq!(hidden(dir), [""; 0]);
}

#[test]
fn killed_while_advancing() {
    let dir = tempfile::tempdir().unwrap();
    kill_many(dir.path(), Mode::Advance, 60);
}

#[test]
fn killed_while_replacing() {
    let dir = tempfile::tempdir().unwrap();
    kill_many(dir.path(), Mode::Replace, 60);
}

#[test]
fn helpers_are_told_apart_from_tests() {
    assert!(std::env::var_os(HELPER_DIR).is_none(), "{HELPER_DIR} is for helper processes");
}
