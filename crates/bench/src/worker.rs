//! The driver's side of a worker: a child process that is asked, waited for, and never left behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::contender::{Contender, Programs, Runtime};
use crate::error::{Error, Result};
use crate::protocol::{Done, Ended, Job, Ready, Request};

/// How much of a worker's standard error is kept.
const STDERR_BYTES: usize = 8 << 10;

/// A running contender.
pub struct Worker {
    contender: Contender,
    child: Arc<Mutex<Child>>,
    // Taken when the worker is told to quit.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    stderr: Arc<Mutex<Vec<u8>>>,
}

/// The children that run now, for the handler of Ctrl-C.
static CHILDREN: Mutex<Vec<Arc<Mutex<Child>>>> = Mutex::new(vec![]);

/// From now on Ctrl-C and SIGTERM end this process and every worker.
pub fn handle_interrupts() {
    // A handler is set once in a process; should the system refuse, the children still end with their input.
    let _ = ctrlc::set_handler(|| {
        for child in lock(&CHILDREN).iter() {
            // A child that is being waited for has ended.
            if let Ok(mut child) = child.try_lock() {
                let _ = child.kill();
            }
        }
        std::process::exit(130);
    });
}

/// Starts a program whose standard error is kept, and registers it for Ctrl-C.
pub fn spawn(command: &mut Command, what: &str, advice: &'static str) -> Result<Arc<Mutex<Child>>> {
    let child = command.spawn().map_err(|source| Error::Spawn {
        what: what.to_owned(),
        program: command.get_program().into(),
        source,
        advice,
    })?;
    let child = Arc::new(Mutex::new(child));
    lock(&CHILDREN).push(child.clone());
    Ok(child)
}

/// Forgets a child that has ended.
pub fn release(child: &Arc<Mutex<Child>>) {
    lock(&CHILDREN).retain(|other| !Arc::ptr_eq(other, child));
}

/// The guarded value, also after a panic elsewhere: nothing guarded here is ever half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    /// Starts the contender of `job` and waits until it has warmed up.
    ///
    /// # Errors
    /// [`Error`]: it cannot be started, or died; its standard error is part of the message.
    pub fn start(programs: &Programs, job: &Job) -> Result<(Self, Ready)> {
        let contender = job.contender;
        let job_text = serde_json::to_string(job).map_err(|source| Error::Json { what: "a job", source })?;
        let mut command = command(programs, contender)?;
        command.arg(job_text).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MATMUL_NUM_THREADS"] {
            command.env(name, job.threads.to_string());
        }
        // No compile processes beside the worker, and nothing outside the target folder. How long OpenMP's threads spin
        // before they sleep is left as PyTorch ships it: a millisecond or so, and faster than always sleeping.
        command
            .env("TORCHINDUCTOR_COMPILE_THREADS", "1")
            .env("TORCHINDUCTOR_CACHE_DIR", programs.cache.join("inductor"));
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        let child = spawn(&mut command, contender.name(), "build and install anew by `cargo xtask bench`")?;
        let (input, output, errors) = {
            let mut child = lock(&child);
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        };
        // PANIC: all three were asked for as pipes above.
        let (output, errors) = output.zip(errors).expect("piped streams");
        let stderr = Arc::new(Mutex::new(vec![]));
        let keep = stderr.clone();
        thread::spawn(move || keep_tail(errors, &keep));
        let mut worker = Self { contender, child, input, output: BufReader::new(output), stderr };
        let ready = worker.answer("warm up")?;
        Ok((worker, ready))
    }

    /// Who it is.
    pub fn contender(&self) -> Contender {
        self.contender
    }

    /// Does a case `n` times.
    ///
    /// # Errors
    /// [`Error::Died`], [`Error::Protocol`].
    pub fn go(&mut self, case: usize, n: usize) -> Result<Done> {
        let doing = format!("do case {case} {n} times");
        self.say(Request::Go { case, n });
        self.answer(&doing)
    }

    /// Ends it.
    ///
    /// # Errors
    /// [`Error::Died`], [`Error::Protocol`].
    pub fn quit(mut self) -> Result<Ended> {
        self.say(Request::Quit);
        let ended = self.answer("say its peak memory")?;
        self.input = None;
        // It has said its last words; half a minute is for the runtimes that clean up at the end.
        self.wait(Duration::from_secs(30));
        Ok(ended)
    }

    /// A worker that has died shows as the missing answer.
    fn say(&mut self, request: Request) {
        if let Some(input) = &mut self.input {
            let _ = input.write_all(request.line().as_bytes()).and_then(|()| input.flush());
        }
    }

    fn answer<T: DeserializeOwned>(&mut self, doing: &str) -> Result<T> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line).map_err(Error::io("read the answer of", self.contender.name()))?;
        if read == 0 {
            let status = self.wait(Duration::from_secs(5)).unwrap_or_else(|| "still running".to_owned());
            // The other thread reads the rest of the pipe.
            thread::sleep(Duration::from_millis(100));
            let stderr = String::from_utf8_lossy(&lock(&self.stderr)).trim_end().to_owned();
            return Err(Error::Died { contender: self.contender, status, doing: doing.to_owned(), stderr });
        }
        serde_json::from_str(&line)
            .map_err(|_| Error::Protocol { expected: "the JSON of protocol.rs", got: line.trim_end().to_owned() })
    }

    /// How it ended, if it does in time.
    fn wait(&self, time: Duration) -> Option<String> {
        let start = Instant::now();
        while start.elapsed() < time {
            if let Ok(Some(status)) = lock(&self.child).try_wait() {
                return Some(status.to_string());
            }
            thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        // Harmless if it has ended.
        let _ = child.kill();
        let _ = child.wait();
        drop(child);
        release(&self.child);
    }
}

fn command(programs: &Programs, contender: Contender) -> Result<Command> {
    let missing = |what, option| Error::Program { contender, what, option };
    let worker = |program: &Path| {
        let mut command = Command::new(program);
        command.arg("worker");
        command
    };
    Ok(match contender.runtime() {
        Runtime::Own => worker(&programs.own),
        Runtime::Baseline => {
            // This program may be it.
            let program = if cfg!(feature = "baseline") { Some(&programs.own) } else { programs.baseline.as_ref() };
            worker(program.ok_or_else(|| missing("a build with burn's own modules", "--baseline PATH"))?)
        }
        Runtime::Python => {
            let python =
                programs.python.as_ref().ok_or_else(|| missing("a Python that has PyTorch", "--python PATH"))?;
            let mut command = Command::new(python);
            command.arg(script("worker.py"));
            command
        }
    })
}

/// A Python script of this crate.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("torch").join(name)
}

/// Reads a stream to its end and keeps the last of it.
pub fn keep_tail(mut stream: impl Read, tail: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        let mut tail = lock(tail);
        tail.extend_from_slice(&buffer[..n]);
        let excess = tail.len().saturating_sub(STDERR_BYTES);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_stream_is_kept() {
        let text: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let tail = Mutex::new(vec![]);
        keep_tail(&text[..], &tail);
        assert_eq!(*lock(&tail), text[text.len() - STDERR_BYTES..]);
    }

    #[test]
    fn a_contender_without_its_program_says_how_to_get_it() {
        let error = command(&Programs::default(), Contender::TorchEager).err().map(|error| error.to_string());
        let text = error.unwrap_or_default();
        assert!(text.contains("torch-eager") && text.contains("cargo xtask bench"), "{text}");
    }
}
