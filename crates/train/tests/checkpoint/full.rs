//! A disk that fills, and a limit on file sizes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use firebox_train::checkpoint::{CheckpointError, TensorSpec, Writer, find_latest};

use super::kill::{Mode, kill_many};
use super::{consistent_value, helper, helper_dir, names, write};

#[track_caller]
fn assert_full(result: Result<impl std::fmt::Debug, CheckpointError>, at_least: u64) -> String {
    let error = result.unwrap_err();
    match &error {
        CheckpointError::Full { needed, free, .. } => {
            assert!(*needed >= at_least, "{error}");
            assert!(free.is_some(), "{error}");
        }
        other => panic!("{other}"),
    }
    error.one_line()
}

/// Works on a disk of 4 MiB at `helper_dir()`.
#[test]
#[ignore = "a helper process of the test below"]
fn on_a_small_disk() {
    let Some(dir) = helper_dir() else { return };
    write(&dir, 1, 1.0, 50_000, None).unwrap();

    // Far too large, in the first file: the size that the header promises is what was needed.
    let message = assert_full(write(&dir, 2, 2.0, 3_000_000, None), 12_000_000);
    println!("{message}");
    assert!(message.contains("earlier ones are untouched") && message.contains("free"), "{message}");
    assert_eq!(names(&dir), ["step-1"]);
    // What was free before is free again.
    write(&dir, 3, 3.0, 50_000, None).unwrap();
    fs::remove_dir_all(dir.join("step-3")).unwrap();

    // Full at every place: leave one more page each time, until the checkpoint fits.
    let filler = dir.join("filler");
    let (mut full, mut fit, mut places) = (0, 0, BTreeMap::new());
    for pages in 0..40 {
        let mut file = File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        let size = file.metadata().unwrap().len();
        file.set_len((size / 4096 - pages) * 4096).unwrap();
        let mut writer = match Writer::create(&dir, 2) {
            Ok(writer) => writer,
            Err(error) => panic!("{error}"), // folders take no pages on this file system
        };
        let specs = [TensorSpec::f32("wte", [20_000])];
        let result = writer
            .tensors("model.safetensors", &BTreeMap::new(), &specs, [2f32.to_le_bytes().repeat(20_000)])
            .map_err(|e| ("model.safetensors", e))
            .and_then(|()| writer.json("state.json", &1).map_err(|e| ("state.json", e)))
            .and_then(|()| writer.finish().map_err(|e| ("manifest.json", e)));
        match result {
            Ok(path) => {
                fit += 1;
                assert_eq!(find_latest(&dir).unwrap().checkpoint.step(), 2);
                fs::remove_dir_all(path).unwrap();
            }
            Err((place, error)) => {
                full += 1;
                *places.entry(place).or_insert(0) += 1;
                assert_full(Err::<(), _>(error), 80_000);
            }
        }
        assert_eq!(names(&dir), ["filler", "step-1"], "{pages} pages left");
        let found = find_latest(&dir).unwrap();
        assert_eq!((consistent_value(&found.checkpoint), found.skipped.len()), (1.0, 0));
    }
    println!("full {full} times ({places:?}), fit {fit} times");
    assert!(places.len() == 3 && fit > 0, "the disk filled in each of the files: {places:?}, {fit}");

    fs::remove_file(&filler).unwrap();
    kill_many(&dir, Mode::Fill, 50);
}

/// Runs the helper in a mount namespace of its own with a small disk on `dir`, which vanishes with it. Says why not,
/// where that is not allowed.
#[cfg(target_os = "linux")]
fn run_on_small_disk(dir: &Path) -> Result<(), String> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::process::CommandExt as _;

    let target = CString::new(dir.as_os_str().as_bytes()).unwrap();
    let mut command = helper("full::on_a_small_disk", dir);
    let mount = move || {
        let check = |code: i32| if code == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
        let (none, root, tmpfs) = (std::ptr::null(), c"/".as_ptr(), c"tmpfs".as_ptr());
        // SAFETY: all pointers are to C strings that live on, or null where the call allows it. The three are plain
        // system calls that take no lock and no memory, as is asked between fork and exec.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            check(libc::mount(none, root, none, libc::MS_REC | libc::MS_PRIVATE, none.cast()))?;
            check(libc::mount(tmpfs, target.as_ptr(), tmpfs, 0, c"size=4m".as_ptr().cast()))
        }
    };
    // SAFETY: the closure keeps to what is allowed after fork, see above.
    unsafe { command.pre_exec(mount) };
    match command.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            println!("{text}");
            assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
            assert!(text.contains("1 passed"), "{text}");
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(not(target_os = "linux"))]
fn run_on_small_disk(_: &Path) -> Result<(), String> {
    Err("only Linux has mount namespaces".to_owned())
}

#[test]
fn a_full_disk_costs_only_the_unfinished_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    if let Err(reason) = run_on_small_disk(dir.path()) {
        // Written past the test harness, which hides what passing tests print.
        let text = format!(
            "\nSKIPPED: no small disk can be mounted here ({reason}); run as root on Linux to test a full disk\n"
        );
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        #[cfg(unix)]
        {
            // SAFETY: a system call without arguments that cannot fail.
            let root = unsafe { libc::geteuid() } == 0;
            let ci = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!(root && ci), "CI runs as root and could not mount a small disk: {reason}");
        }
    }
    assert!(names(dir.path()).is_empty(), "the small disk hid this folder");
}

/// Under a limit of 64 KiB a file.
#[test]
#[ignore = "a helper process of the test below"]
fn under_a_file_size_limit() {
    let Some(dir) = helper_dir() else { return };
    write(&dir, 1, 1.0, 5_000, None).unwrap();
    let message = assert_full(write(&dir, 2, 2.0, 50_000, None), 200_000);
    println!("{message}");
    assert!(message.contains("ulimit -f"), "{message}");
    let mut writer = Writer::create(&dir, 2).unwrap();
    assert_full(writer.bytes("tokenizer.json", &[0; 70_000]), 70_000);
    assert_eq!(names(&dir), ["step-1"]);
    assert_eq!(consistent_value(&find_latest(&dir).unwrap().checkpoint), 1.0);
    write(&dir, 3, 3.0, 5_000, None).unwrap();
}

#[cfg(unix)]
#[test]
fn a_file_size_limit_costs_only_the_unfinished_checkpoint() {
    use std::os::unix::process::CommandExt as _;

    let dir = tempfile::tempdir().unwrap();
    let mut command = helper("full::under_a_file_size_limit", dir.path());
    let limit = || {
        let limit = libc::rlimit { rlim_cur: 65_536, rlim_max: 65_536 };
        // SAFETY: two system calls with valid arguments. Ignoring the signal, which outlives exec, makes the write fail
        // with an error instead of ending the process.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            if libc::setrlimit(libc::RLIMIT_FSIZE, &limit) != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(limit) };
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(dir.path()), ["step-1", "step-3"]);
}
