//! Starting ranks as threads and collecting what they return.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::communicator::Communicator;
use crate::error::Ranks;
use crate::threads::{self, WorldState};

/// How long a rank waits for the others unless told otherwise. Long, since one rank may write a checkpoint meanwhile.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// A world of ranks that are threads of this process.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    size: usize,
    timeout: Duration,
}

/// A rank that failed, and with it the world.
#[derive(Debug)]
pub struct WorldError<E> {
    /// The rank that failed first.
    pub rank: usize,
    /// How it failed.
    pub failure: Failure<E>,
    /// Ranks that had not returned a timeout later. Their threads go on; only the end of the process ends them.
    pub hung: Vec<usize>,
}

/// How a rank failed.
#[derive(Debug)]
pub enum Failure<E> {
    /// It returned an error.
    Error(E),
    /// It panicked with this message.
    Panic(String),
    /// Its thread could not be started, or it has not returned.
    Thread(String),
}

impl<E: fmt::Display> fmt::Display for WorldError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} failed: ", self.rank)?;
        match &self.failure {
            Failure::Error(error) => error.fmt(f)?,
            Failure::Panic(message) => write!(f, "it panicked: {message}")?,
            Failure::Thread(why) => f.write_str(why)?,
        }
        if !self.hung.is_empty() {
            write!(f, "; {} did not return", Ranks(&self.hung))?;
        }
        Ok(())
    }
}

impl<E: fmt::Display + fmt::Debug> std::error::Error for WorldError<E> {}

/// Runs `f` on `size` ranks with the default timeout: see [`Threads::run`].
///
/// # Errors
///
/// The first failure of a rank.
pub fn spawn<T, E, F>(size: usize, f: F) -> Result<Vec<T>, WorldError<E>>
where
    T: Send + 'static,
    E: fmt::Display + Send + 'static,
    F: Fn(Communicator) -> Result<T, E> + Send + Sync + 'static,
{
    Threads::new(size).run(f)
}

impl Threads {
    /// A world of `size` ranks; none is one.
    pub fn new(size: usize) -> Self {
        Self { size: size.max(1), timeout: DEFAULT_TIMEOUT }
    }

    /// How long a rank waits for others in one call before it fails.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs `f` on each rank, a thread of its own, and returns the results in the order of the ranks.
    ///
    /// When a rank panics or returns an error, the calls of all others fail with [`CommError::RankLost`](crate::CommError::RankLost), which names it.
    ///
    /// # Errors
    ///
    /// The failure of the rank that failed first. Those that have not returned a timeout later are named as hung.
    pub fn run<T, E, F>(self, f: F) -> Result<Vec<T>, WorldError<E>>
    where
        T: Send + 'static,
        E: fmt::Display + Send + 'static,
        F: Fn(Communicator) -> Result<T, E> + Send + Sync + 'static,
    {
        let world = Arc::new(WorldState::new(self.timeout));
        let f = Arc::new(f);
        let (sender, ended) = mpsc::channel();
        let mut results: Vec<Option<T>> = (0..self.size).map(|_| None).collect();
        let mut running: Vec<usize> = vec![];
        let mut failures: Vec<(usize, Failure<E>)> = vec![];
        for (rank, engine) in threads::world(&world, self.size).into_iter().enumerate() {
            let (fate, f, sender) = (world.clone(), f.clone(), sender.clone());
            let run = move || {
                // The rank is in its group until its failure, if there is one, is known.
                let communicator = Communicator::new(Arc::new(engine));
                let result = match catch_unwind(AssertUnwindSafe(|| f(communicator.clone()))) {
                    Ok(result) => result.map_err(Failure::Error),
                    Err(payload) => Err(Failure::Panic(message(payload.as_ref()))),
                };
                match &result {
                    Ok(_) => {}
                    Err(Failure::Error(error)) => fate.fail(rank, &format!("it failed: {error}")),
                    Err(Failure::Panic(message)) => fate.fail(rank, &format!("it panicked: {message}")),
                    Err(Failure::Thread(why)) => fate.fail(rank, why),
                }
                drop(communicator);
                // The caller may have given up.
                let _ = sender.send((rank, result));
            };
            match thread::Builder::new().name(format!("rank-{rank}")).spawn(run) {
                Ok(_) => running.push(rank),
                Err(error) => {
                    let why = format!("cannot start its thread: {error}");
                    world.fail(rank, &why);
                    failures.push((rank, Failure::Thread(why)));
                }
            }
        }
        drop(sender);
        let mut deadline = None;
        while !running.is_empty() {
            if !failures.is_empty() {
                deadline = deadline.or_else(|| Instant::now().checked_add(self.timeout));
            }
            let received = match deadline {
                None => ended.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => ended.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            let Ok((rank, result)) = received else { break };
            running.retain(|other| *other != rank);
            match result {
                Ok(value) => results[rank] = Some(value),
                Err(failure) => failures.push((rank, failure)),
            }
        }
        // What a rank says of another's failure follows from that failure.
        let first = world.failure().map(|(rank, _)| rank);
        let index = failures.iter().position(|(rank, _)| Some(*rank) == first).unwrap_or_default();
        if !failures.is_empty() {
            let (rank, failure) = failures.swap_remove(index);
            return Err(WorldError { rank, failure, hung: running });
        }
        if let Some(rank) = results.iter().position(Option::is_none) {
            let failure = Failure::Thread("its thread ended without a result".to_owned());
            return Err(WorldError { rank, failure, hung: running });
        }
        Ok(results.into_iter().flatten().collect())
    }
}

/// What a panic said.
pub(crate) fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".to_owned())
}
