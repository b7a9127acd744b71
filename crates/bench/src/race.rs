//! Contenders in turns: A, B, C, A, B, C, …, so that whatever else the machine does meets all of them alike.

use crate::contender::Programs;
use crate::error::{Error, Result};
use crate::protocol::{Done, Ended, Job, Ready, Task};
use crate::worker::Worker;

/// A contender's part in a race.
pub struct Entry {
    /// What it does.
    pub job: Job,
    /// How many times in a round.
    pub n: usize,
    /// In how many rounds it takes part: a slow one in fewer.
    pub rounds: usize,
}

/// What a contender did.
#[derive(Clone, Debug)]
pub struct Raced {
    /// What it said before.
    pub ready: Ready,
    /// Its rounds.
    pub rounds: Vec<Done>,
    /// What it said after.
    pub ended: Ended,
}

/// Starts all contenders, one after the other, and runs them in turns. `said` hears of each step of it.
///
/// Whoever trains must train the same model: the number of parameters is compared with that of the job's shape.
///
/// # Errors
/// The first worker that fails ends the race, and all the others.
pub fn race(programs: &Programs, entries: &[Entry], said: &mut dyn FnMut(&str)) -> Result<Vec<Raced>> {
    let mut workers = vec![];
    for entry in entries {
        said(&format!("{} warms up", entry.job.contender));
        let (worker, ready) = Worker::start(programs, &entry.job)?;
        if let Task::Train(training) = &entry.job.task {
            let (expected, got) = (training.model.num_params() as u64, ready.params);
            if got != expected {
                return Err(Error::OtherModel { contender: worker.contender(), expected, got });
            }
        }
        workers.push((worker, ready));
    }
    let mut done: Vec<Vec<Done>> = vec![vec![]; entries.len()];
    let last = entries.iter().map(|entry| entry.rounds).max().unwrap_or(0);
    for round in 0..last {
        for ((entry, (worker, _)), done) in entries.iter().zip(&mut workers).zip(&mut done) {
            if round < entry.rounds {
                let result = worker.go(0, entry.n)?;
                let each = result.seconds / entry.n as f64;
                said(&format!("round {}/{last}  {:17} {each:9.4} s each", round + 1, worker.contender()));
                done.push(result);
            }
        }
    }
    workers
        .into_iter()
        .zip(done)
        .map(|((worker, ready), rounds)| Ok(Raced { ready, rounds, ended: worker.quit()? }))
        .collect()
}
