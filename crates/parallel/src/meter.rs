//! What a rank sends, and how long it waits for others and for data.

use std::cell::RefCell;
use std::ops::Sub;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::collectives::{Call, Operation};
use crate::threads::even_parts;

/// The time since 1970. Within a process it never goes back; ranks of several processes share it as well as their machines' clocks agree.
pub fn clock() -> Duration {
    static START: OnceLock<(Duration, Instant)> = OnceLock::new();
    let (since_1970, began) =
        START.get_or_init(|| (SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), Instant::now()));
    *since_1970 + began.elapsed()
}

/// What a rank has sent, and the time that it spent on it, over all groups that come from one world.
///
/// An all-reduce counts two messages to each other rank of its group (of which the first is the part that the other reduces, the second the reduced part), any other
/// collective one, a send one; bytes are those of elements that go to other ranks. So the counts are the same between threads, where nothing is copied on
/// the way, and over MPI, which adds headers and sends what is large in pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent to other ranks.
    pub bytes: u64,
    /// Messages sent to other ranks.
    pub messages: u64,
    /// Time for which the rank stood and waited for others: to come to a collective, or to send.
    pub idle: Duration,
    /// Time for which it stood while data moved.
    pub exposed: Duration,
    /// Time in which data moved in the background while it computed.
    pub hidden: Duration,
}

impl Sub for Traffic {
    type Output = Self;

    /// What came between two counts.
    fn sub(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            messages: self.messages - before.messages,
            idle: self.idle - before.idle,
            exposed: self.exposed - before.exposed,
            hidden: self.hidden - before.hidden,
        }
    }
}

/// Where a call was made, and so who waited for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The rank made it and stood.
    Here,
    /// Another thread made it.
    Background,
    /// The rank stood until such a call of another thread was done.
    Awaited,
}

/// A call that a [`Meter`] has recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// What was called.
    pub operation: Operation,
    /// Where.
    pub place: Place,
    /// When it began, by the [`clock`].
    pub start: Duration,
    /// When all others had come, or the sender had begun; from then on data moves.
    pub met: Duration,
    /// When it was done.
    pub end: Duration,
    /// Bytes sent to other ranks.
    pub bytes: u64,
}

/// Counts for a rank: of a world's communicator and all that come from it by clones and splits.
#[derive(Debug)]
pub struct Meter {
    /// The thread that is the rank: what others do is in the background.
    rank: ThreadId,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Duration,
    own: Phase,
    /// Calls in the background in which data moves.
    moving: u32,
    traffic: Traffic,
    recorded: Option<Vec<Recorded>>,
}

/// What the rank's own thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Computes,
    Waits,
    Moves,
    /// Waits for a call in the background, whatever that does.
    Awaits,
}

thread_local! {
    /// The call that this thread is in.
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
}

struct Current {
    meter: Arc<Meter>,
    here: bool,
    met: Option<Duration>,
}

/// To be called by an engine, inside a call, as soon as all others have come: what follows is no longer waiting.
pub(crate) fn met() {
    CURRENT.with_borrow_mut(|current| {
        let Some(current) = current.as_mut().filter(|current| current.met.is_none()) else { return };
        let mut state = current.meter.advance();
        current.met = Some(state.since);
        if current.here { state.own = Phase::Moves } else { state.moving += 1 }
    });
}

impl Meter {
    /// Of a rank that is the current thread.
    pub(crate) fn new() -> Self {
        let (since, traffic) = (clock(), Traffic::default());
        let state = State { since, own: Phase::Computes, moving: 0, traffic, recorded: None };
        Self { rank: thread::current().id(), state: Mutex::new(state) }
    }

    /// All until now.
    pub fn traffic(&self) -> Traffic {
        self.advance().traffic
    }

    /// Records each call from now on.
    pub fn record(&self) {
        self.lock().recorded = Some(vec![]);
    }

    /// Ends the recording, and gives what it has, in the order in which calls ended.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.lock().recorded.take().unwrap_or_default()
    }

    /// Makes a call that sends so much.
    pub(crate) fn call<R>(
        self: &Arc<Self>,
        operation: Operation,
        (bytes, messages): (u64, u64),
        call: impl FnOnce() -> R,
    ) -> R {
        let here = thread::current().id() == self.rank;
        let start = {
            let mut state = self.advance();
            if here {
                state.own = Phase::Waits;
            }
            state.since
        };
        CURRENT.set(Some(Current { meter: self.clone(), here, met: None }));
        let result = call();
        let met = CURRENT.take().and_then(|current| current.met);
        let mut state = self.advance();
        match met {
            _ if here => state.own = Phase::Computes,
            Some(_) => state.moving -= 1,
            None => {}
        }
        let place = if here { Place::Here } else { Place::Background };
        state.count(bytes, messages);
        let end = state.since;
        state.keep(Recorded { operation, place, start, met: met.unwrap_or(end), end, bytes });
        result
    }

    /// Waits for a call in the background.
    pub(crate) fn await_background<R>(&self, operation: Operation, wait: impl FnOnce() -> R) -> R {
        if thread::current().id() != self.rank {
            return wait();
        }
        let start = {
            let mut state = self.advance();
            state.own = Phase::Awaits;
            state.since
        };
        let result = wait();
        let mut state = self.advance();
        state.own = Phase::Computes;
        let end = state.since;
        state.keep(Recorded { operation, place: Place::Awaited, start, met: end, end, bytes: 0 });
        result
    }

    /// Counts what is sent without waiting.
    pub(crate) fn count(&self, bytes: u64, messages: u64) {
        self.lock().count(bytes, messages);
    }

    /// Adds the time since the last change to what it was spent on.
    fn advance(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let now = clock().max(state.since);
        let spent = now - state.since;
        state.since = now;
        let moves = state.moving > 0;
        match (state.own, moves) {
            (Phase::Computes, true) => state.traffic.hidden += spent,
            (Phase::Computes, false) => {}
            (Phase::Moves, _) | (Phase::Awaits, true) => state.traffic.exposed += spent,
            (Phase::Waits, _) | (Phase::Awaits, false) => state.traffic.idle += spent,
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn count(&mut self, bytes: u64, messages: u64) {
        self.traffic.bytes += bytes;
        self.traffic.messages += messages;
    }

    fn keep(&mut self, call: Recorded) {
        if let Some(recorded) = &mut self.recorded {
            recorded.push(call);
        }
    }
}

/// Bytes and messages that a call sends from this rank to others.
pub(crate) fn sent(call: &Call<'_>, rank: usize, size: usize) -> (u64, u64) {
    let others = size - 1;
    let (bytes, rounds) = match call {
        Call::Barrier => (0, 1),
        Call::AllReduce { data, dtype, .. } => {
            let bounds = even_parts(data.len() / dtype.size(), size);
            let part = (bounds[rank + 1] - bounds[rank]) * dtype.size();
            (data.len() - part + part * others, 2)
        }
        Call::ReduceScatter { data, out, .. } => (data.len().saturating_sub(out.len()), 1),
        Call::AllGather { data, .. } | Call::Split { data, .. } => (data.len() * others, 1),
        Call::AllToAll { data, dtype, counts, .. } => (data.len() - counts[rank] * dtype.size(), 1),
        Call::Broadcast { data, root, .. } => (if *root == rank { data.len() * others } else { 0 }, 1),
    };
    (bytes as u64, (rounds * others) as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{CommError, ReduceOp, spawn};

    /// The counts of all ranks, added up.
    fn sum(
        ranks: usize,
        f: impl Fn(&crate::Communicator) -> Result<(), CommError> + Send + Sync + 'static,
    ) -> [u64; 2] {
        let counts = spawn(ranks, move |comm| {
            let before = comm.meter().traffic();
            f(&comm)?;
            let Traffic { bytes, messages, .. } = comm.meter().traffic() - before;
            Ok::<_, CommError>([bytes, messages])
        });
        counts.unwrap().into_iter().fold([0, 0], |sum, x| [sum[0] + x[0], sum[1] + x[1]])
    }

    #[test]
    fn calls_count_what_goes_to_other_ranks() {
        for n in [1usize, 2, 3, 5] {
            let (x, others) = (n as u64, n as u64 - 1);
            assert_eq!(sum(n, |comm| comm.barrier()), [0, x * others]);
            // 7 elements: parts differ in size.
            let all_reduce = sum(n, |comm| comm.all_reduce(&mut [1.0f32; 7], ReduceOp::Sum));
            assert_eq!(all_reduce, [2 * 28 * others, 2 * x * others], "{n} ranks");
            let background = sum(n, |comm| comm.start_all_reduce(vec![1.0f32; 7], ReduceOp::Sum)?.wait().map(drop));
            assert_eq!(background, all_reduce);
            let gather = sum(n, move |comm| comm.all_gather(&[1u8; 3], &mut vec![0; 3 * comm.size()]));
            assert_eq!(gather, [3 * x * others, x * others]);
            let to_all = sum(n, |comm| comm.all_to_all(&vec![1i64; comm.size()], &vec![1; comm.size()]).map(drop));
            assert_eq!(to_all, [8 * x * others, x * others]);
            let scatter =
                sum(n, |comm| comm.reduce_scatter(&vec![1.0f32; 2 * comm.size()], &mut [0.0; 2], ReduceOp::Sum));
            assert_eq!(scatter, [8 * x * others, x * others]);
            let broadcast = sum(n, |comm| comm.broadcast(&mut [1.0f32; 5], 0));
            assert_eq!(broadcast, [20 * others, x * others]);
        }
        let message = sum(2, |comm| match comm.rank() {
            0 => comm.send(vec![1.0f32; 9], 1, 3),
            _ => comm.recv::<f32>(0, 3).map(drop),
        });
        assert_eq!(message, [36, 1]);
        // Groups of a rank count together.
        let split = sum(4, |comm| {
            let half = comm.split(Some(comm.rank() as u32 / 2), 0)?.unwrap();
            half.all_gather(&[1.0f32], &mut [0.0; 2])
        });
        assert_eq!(split, [4 * (3 * 16 + 4), 4 * (3 + 1)]);
    }

    #[test]
    fn who_waits_for_others_is_idle_and_what_goes_on_behind_a_computation_is_hidden() {
        const LATE: Duration = Duration::from_millis(60);
        let times = spawn(2, |comm| {
            comm.barrier()?;
            let before = comm.meter().traffic();
            comm.meter().record();
            if comm.rank() == 1 {
                thread::sleep(LATE);
            }
            comm.barrier()?;
            let waited = comm.meter().traffic() - before;
            let pending = comm.start_all_reduce(vec![1.0f32; 1 << 20], ReduceOp::Sum)?;
            // "Computes" until it is surely done.
            thread::sleep(LATE * 4);
            pending.wait()?;
            Ok::<_, CommError>((waited, comm.meter().traffic() - before, comm.meter().recorded()))
        });
        let times = times.unwrap();
        assert!(times[0].0.idle > LATE / 2 && times[1].0.idle < LATE / 2, "{times:?}");
        for (_, all, calls) in times {
            assert!(all.hidden > Duration::ZERO && all.hidden > all.exposed, "{all:?}");
            let places: Vec<Place> = calls.iter().map(|call| call.place).collect();
            assert_eq!(places, [Place::Here, Place::Background, Place::Awaited]);
            assert!(calls.iter().all(|call| call.start <= call.met && call.met <= call.end), "{calls:?}");
            let moved = calls[1].end - calls[1].met;
            assert!(all.hidden <= moved && moved < LATE * 4, "{all:?} {calls:?}");
        }
    }
}
