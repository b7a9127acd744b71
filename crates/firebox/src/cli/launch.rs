//! `firebox train --mpi` and `--elastic`: the ranks run in other processes, and this one starts them, passes Ctrl-C on, and starts them again.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use clap::Args;
use firebox::train::TrainError;

use super::CliError;
use super::ranks::is_rank;

/// Starts without a new checkpoint, in a row, after which it is given up.
const MAX_RESTARTS: u32 = 3;

/// How long ranks may go on that have lost their mpirun: with Open MPI, a second.
const AFTER_MPIRUN_S: u32 = 5;

/// Options for how ranks start.
#[derive(Args, Clone, Copy)]
pub struct LaunchArgs {
    /// Train on N processes of MPI: starts mpirun. Needs a firebox that was built with the feature mpi.
    #[arg(long, value_name = "N", conflicts_with_all = ["ranks", "cooldown_from"], value_parser = clap::value_parser!(u16).range(1..))]
    mpi: Option<u16>,
    /// When ranks are lost, start again from the last checkpoint: processes of MPI with those that remain, as far as they can be divided as before, threads with all.
    #[arg(long, conflicts_with = "cooldown_from")]
    elastic: bool,
}

/// What must be known of a run to start it again.
pub struct Job<'a> {
    /// Its folder.
    pub dir: &'a Path,
    /// Ranks that have the same rows: the others are so many times this,
    pub same_data: usize,
    /// a multiple of these,
    pub data_degrees: [usize; 2],
    /// and a divisor of the micro-batches of a step, where they must have equally many.
    pub even: Option<usize>,
    pub resume: bool,
}

impl LaunchArgs {
    /// Whether the ranks run in other processes than this one.
    pub fn elsewhere(self) -> bool {
        self.mpi.is_some() || self.elastic
    }

    /// Runs the job in other processes to its end; their exit code.
    pub fn run(self, job: &Job<'_>) -> Result<i32, CliError> {
        let wrong = |what, expected: &str, got: String| Err(TrainError::Input { what, expected: expected.into(), got });
        if is_rank() {
            wrong("--mpi and --elastic", "to be started once: they start mpirun", "a process of mpirun".into())?;
        }
        if let (Some(ranks), false) = (self.mpi, cfg!(feature = "mpi")) {
            let expected = "a firebox with the feature mpi (`cargo xtask train --mpi N` builds it), or --ranks";
            wrong("--mpi", expected, ranks.to_string())?;
        }
        let mut ranks = self.mpi.map(usize::from);
        let (mut restarts, mut in_vain) = (0u32, 0u32);
        pass_signals_on(self.mpi.is_some());
        loop {
            let begun = job.dir.join("run.json").is_file() || latest(job.dir).is_some();
            let before = latest(job.dir);
            let arguments = arguments(begun && (job.resume || restarts > 0));
            let mut command = command(ranks, arguments)?;
            if restarts > 0 {
                // A fault that was asked for comes once.
                command.env_remove("FIREBOX_FAULT");
            }
            let status = watch(command)?;
            let lost = ranks.is_some() && one_was_killed(status);
            if matches!(status.code(), Some(0 | 2 | 130)) || stopping() || !(self.elastic || lost) {
                return Ok(status.code().unwrap_or(1));
            }
            if !self.elastic {
                return Err(CliError::Ranks(format!("a process was killed ({}); mpirun says which", ended(status))));
            }
            let now = latest(job.dir);
            in_vain = if now > before { 0 } else { in_vain + 1 };
            restarts += 1;
            if in_vain > MAX_RESTARTS {
                let ended = ended(status);
                return Err(CliError::Ranks(format!(
                    "given up after {MAX_RESTARTS} restarts without a new checkpoint: the last ended with {ended}"
                )));
            }
            let from = now.map_or("the beginning".to_owned(), |step| format!("step {step}"));
            let mut with = String::new();
            if let (Some(n), true) = (ranks, lost) {
                let left = fewer(n - 1, job);
                with = match left {
                    Some(left) => format!(" on {left} of {n} ranks"),
                    None => format!(" on {n} ranks again, since fewer cannot be divided so"),
                };
                ranks = left.or(ranks);
            }
            eprintln!("elastic: ranks were lost ({}); going on from {from}{with} (restart {restarts})", ended(status));
            if ranks.is_some() && status.code().is_none() {
                // Ranks notice only after a moment that mpirun is gone, and must not write beside the new ones.
                pause(AFTER_MPIRUN_S);
            }
            // Ever longer, where starting again has not helped.
            pause(if in_vain < 2 { 0 } else { 1 << (in_vain - 2) });
        }
    }
}

/// The largest number of ranks, of so many that are left, that can be divided as the job is.
fn fewer(left: usize, job: &Job<'_>) -> Option<usize> {
    let fits = |copies: &usize| {
        job.data_degrees.iter().all(|degree| copies.is_multiple_of(*degree))
            && job.even.is_none_or(|micro_batches| micro_batches.is_multiple_of(*copies))
    };
    (1..=left / job.same_data).rev().find(fits).map(|copies| copies * job.same_data)
}

/// Whether mpirun has ended because one of its processes was killed, upon which it ends the others. Its exit code then is 128 and the signal's number, or that
/// alone; a rank's own are 1, and 101 of a panic.
fn one_was_killed(status: ExitStatus) -> bool {
    status.code().is_some_and(|code| code != 1 && code != 101)
}

/// The step of the last checkpoint, whole or not: what counts is that there is another one.
fn latest(dir: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(dir.join("checkpoints")).ok()?;
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()).max()
}

/// How a process ended, in words.
fn ended(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return format!("signal {signal}");
    }
    status.code().map_or("no exit code".to_owned(), |code| format!("exit code {code}"))
}

/// What this process was called with, for the one that has the ranks.
fn arguments(resume: bool) -> Vec<OsString> {
    let mut given = std::env::args_os().skip(1);
    let mut kept = vec![];
    while let Some(argument) = given.next() {
        let text = argument.to_string_lossy();
        if text == "--mpi" {
            given.next();
        } else if !(text == "--elastic" || text == "--resume" || text.starts_with("--mpi=")) {
            kept.push(argument);
        }
    }
    kept.extend(resume.then(|| "--resume".into()));
    kept
}

/// This program with these arguments, or mpirun that starts it so many times.
fn command(ranks: Option<usize>, arguments: Vec<OsString>) -> Result<Command, CliError> {
    let this = std::env::current_exe().map_err(|error| CliError::Launch("firebox".into(), error))?;
    let Some(ranks) = ranks else {
        let mut command = Command::new(&this);
        #[cfg(unix)]
        if let Some(name) = std::env::args_os().next() {
            std::os::unix::process::CommandExt::arg0(&mut command, name);
        }
        command.args(arguments);
        return Ok(command);
    };
    let mut command = Command::new("mpirun");
    let version = Command::new("mpirun").arg("--version").stdin(Stdio::null()).output();
    let version = version.map_err(|error| CliError::Launch("mpirun".into(), error))?;
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        // More ranks than cores are allowed: a test of a layout need not be fast.
        command.arg("--oversubscribe");
        // Open MPI refuses to be run by root, who is the only user of many a container.
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    }
    command.args(["-n".into(), ranks.to_string()]).arg(this).args(arguments);
    Ok(command)
}

/// The process that has the ranks, while there is one.
static CHILD: AtomicI32 = AtomicI32::new(0);

/// How often the user has asked to stop.
static ASKED: AtomicU32 = AtomicU32::new(0);

fn stopping() -> bool {
    ASKED.load(Ordering::SeqCst) > 0
}

/// Runs a process to its end.
fn watch(mut command: Command) -> Result<ExitStatus, CliError> {
    let program = PathBuf::from(command.get_program()).display().to_string();
    let failed = |error| CliError::Launch(program.clone(), error);
    command.stdin(Stdio::null());
    apart(&mut command);
    let mut child: Child = command.spawn().map_err(failed)?;
    CHILD.store(child.id() as i32, Ordering::SeqCst);
    if stopping() {
        // Asked in between.
        tell_child(ASKED.load(Ordering::SeqCst), false);
    }
    let status = child.wait().map_err(failed);
    CHILD.store(0, Ordering::SeqCst);
    status
}

/// Puts a process out of reach of the terminal's signals, which would come twice, and ends it with this one, however that ends.
fn apart(command: &mut Command) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        command.process_group(0);
        #[cfg(target_os = "linux")]
        // SAFETY: between fork and exec there is nothing but a system call.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
    }
    #[cfg(not(unix))]
    let _ = command;
}

/// Ctrl-C and SIGTERM are for the ranks, which write a checkpoint and end; the second time they end at once.
fn pass_signals_on(mpi: bool) {
    let installed = ctrlc::set_handler(move || {
        let times = ASKED.fetch_add(1, Ordering::SeqCst) + 1;
        tell_child(times, mpi);
    });
    if let Err(error) = installed {
        eprintln!("warning: Ctrl-C will not write a checkpoint: {error}");
    }
}

fn tell_child(times: u32, mpi: bool) {
    #[cfg(unix)]
    {
        let child = CHILD.load(Ordering::SeqCst);
        // mpirun ends all at once upon SIGTERM; SIGUSR1 it passes on.
        let signal = if mpi && times == 1 { libc::SIGUSR1 } else { libc::SIGTERM };
        if child > 0 {
            // SAFETY: a signal to a process that this one has started and not yet waited for.
            unsafe { libc::kill(child, signal) };
        }
    }
    #[cfg(not(unix))]
    let _ = (times, mpi);
}

/// Waits, unless the user asks to stop.
fn pause(seconds: u32) {
    for _ in 0..10 * seconds {
        if stopping() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_ranks_go_on_as_can_be_divided_alike() {
        let job = |same_data, even| Job { dir: Path::new("run"), same_data, data_degrees: [1, 1], even, resume: false };
        assert_eq!(fewer(7, &job(1, None)), Some(7));
        assert_eq!(fewer(7, &job(2, None)), Some(6));
        // Eight micro-batches: one, two or four pipelines.
        assert_eq!(fewer(7, &job(2, Some(8))), Some(4));
        assert_eq!(fewer(3, &job(4, Some(8))), None);
        assert_eq!(fewer(0, &job(1, None)), None);
        // Groups that divide experts are whole.
        assert_eq!(fewer(7, &Job { data_degrees: [1, 2], ..job(1, Some(8)) }), Some(4));
    }
}
