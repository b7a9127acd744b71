//! Ranks as MPI processes (feature `mpi`): what clusters run, on one machine or many.
//!
//! MPI carries framed messages between processes, and everything else is made of these: a collective is a message between every two
//! ranks of the group, which also says what was called. So each rank knows of each other one whether it came and what it called, sums are
//! made in the order of the ranks whatever MPI's own would be, and no call is made that waits without end. All calls of MPI
//! are non-blocking and made under one lock; a progress thread makes them also while the rank computes.

mod port;

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use self::port::{Link, Received};
use crate::collectives::{Call, Collectives, Lane, Operation, Signature, members};
use crate::communicator::Communicator;
use crate::element::{Buffer, DType, Element, reduce_parts};
use crate::error::{CommError, Result};
use crate::meter::met;
use crate::threads::{check_lengths, even_parts};
use crate::world::{DEFAULT_TIMEOUT, Failure, WorldError, message};

/// Polls that are made at once before a waiting rank begins to sleep between them.
const EAGER_POLLS: u32 = 500;

/// The longest sleep between two polls of a waiting rank.
const POLL: Duration = Duration::from_micros(100);

/// Bytes that an all-reduce sends to a rank at a time: they stay in the caches between the copies that MPI needs.
const PART: usize = 1 << 20;

/// How long a rank that ends tries to get its last messages out.
const FLUSH: Duration = Duration::from_secs(5);

/// How much later a rank ends that fails because another did: `mpirun` ends all with the first, which should be the one that knows why.
const AFTER_YOU: Duration = Duration::from_millis(500);

/// A world of ranks that are the processes that `mpirun`, Slurm or Kubernetes started.
#[derive(Clone, Copy, Debug)]
pub struct Mpi {
    timeout: Duration,
}

impl Default for Mpi {
    fn default() -> Self {
        Self { timeout: DEFAULT_TIMEOUT }
    }
}

impl Mpi {
    /// How long a rank waits for others in one call before it fails.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Starts MPI, runs `f` as this process's rank, and ends MPI. To be called once, on the main thread.
    ///
    /// When `f` fails or panics, the other ranks are told, so that their calls fail with [`CommError::RankLost`]; MPI is not ended then, since that
    /// would wait for them: the process should exit with an error, upon which `mpirun` ends the others. A process that is killed
    /// is noticed by `mpirun`, which names it and ends the others.
    ///
    /// # Errors
    ///
    /// MPI cannot be started, or the failure of `f`.
    pub fn run<T, E: fmt::Display>(self, f: impl FnOnce(Communicator) -> Result<T, E>) -> Result<T, WorldError<E>> {
        let failed = |rank, failure| Err(WorldError { rank, failure, hung: vec![] });
        let (universe, link) = match Link::start() {
            Ok(started) => started,
            Err(error) => return failed(0, Failure::Thread(error.to_string())),
        };
        let link = Arc::new(link);
        let rank = link.rank;
        let ranks: Vec<usize> = (0..link.size).collect();
        let world = MpiEngine::new(link.clone(), self.timeout, 0, ranks, rank);
        let progress = {
            let link = link.clone();
            thread::Builder::new().name("mpi-progress".to_owned()).spawn(move || link.progress_until_stopped())
        };
        let result = match &progress {
            Ok(_) => {
                let communicator = Communicator::new(Arc::new(world));
                match catch_unwind(AssertUnwindSafe(|| f(communicator))) {
                    Ok(result) => result.map_err(Failure::Error),
                    Err(payload) => Err(Failure::Panic(message(payload.as_ref()))),
                }
            }
            Err(error) => Err(Failure::Thread(format!("cannot start the progress thread: {error}"))),
        };
        match &result {
            Ok(_) => link.say_left(),
            Err(Failure::Error(error)) => link.say_lost(&format!("it failed: {error}")),
            Err(Failure::Panic(message)) => link.say_lost(&format!("it panicked: {message}")),
            Err(Failure::Thread(why)) => link.say_lost(why),
        }
        link.flush(FLUSH);
        link.stop();
        if let Ok(progress) = progress {
            // It returns once stopped and has nothing to return.
            let _ = progress.join();
        }
        match result {
            Ok(value) => {
                drop(universe);
                Ok(value)
            }
            Err(failure) => {
                if link.lost_another() {
                    thread::sleep(AFTER_YOU);
                }
                // MPI goes on until the process ends, and may read what it was given.
                std::mem::forget((universe, link));
                failed(rank, failure)
            }
        }
    }
}

/// A rank's view of a group.
struct MpiEngine {
    link: Arc<Link>,
    timeout: Duration,
    /// The same number on all ranks of the group, and no other group's.
    context: i64,
    ranks: Vec<usize>,
    rank: usize,
    lanes: [LaneState; 2],
    /// Places given out in the queue of each sender and tag.
    places: Mutex<HashMap<(usize, u32), u64>>,
}

#[derive(Default)]
struct LaneState {
    /// Calls of one lane from several threads take turns. Counts the rounds of messages.
    rounds: Mutex<u64>,
    broken: Mutex<Option<CommError>>,
}

/// Numbers for new groups: unique in this process, and with the process's rank in the world.
static GROUPS: AtomicU64 = AtomicU64::new(1);

impl MpiEngine {
    fn new(link: Arc<Link>, timeout: Duration, context: i64, ranks: Vec<usize>, rank: usize) -> Self {
        let lanes = [LaneState::default(), LaneState::default()];
        Self { link, timeout, context, ranks, rank, lanes, places: Mutex::new(HashMap::new()) }
    }

    fn world_rank(&self) -> usize {
        self.ranks[self.rank]
    }

    /// Waits for the message with a place in the queue of a channel; several at once if there are several senders.
    fn wait(
        &self,
        from: impl Iterator<Item = usize>,
        channel: i64,
        place: u64,
        call: Signature,
    ) -> Result<Vec<Received>> {
        let start = Instant::now();
        let mut open: Vec<usize> = from.collect();
        let order = open.clone();
        let mut got: HashMap<usize, Received> = HashMap::new();
        let mut polls = 0;
        let _polling = self.link.polling();
        loop {
            let mut begun = false;
            let busy = self.link.poll(|inbox| {
                begun = open.iter().all(|from| inbox.has_begun(self.ranks[*from], self.context, channel, place));
                open.retain(|from| match inbox.take(self.ranks[*from], self.context, channel, place) {
                    Some(message) => got.insert(*from, message).is_some(),
                    None => true,
                });
                // What a rank sent before it left has been looked at above, but for what is still on its way.
                let needed: Vec<usize> = open.iter().map(|from| self.ranks[*from]).collect();
                match inbox.gone(&needed) {
                    Some((rank, why)) if !open.is_empty() => {
                        Err(CommError::RankLost { rank, why, at: self.world_rank(), call })
                    }
                    _ => Ok(()),
                }
            })?;
            if begun {
                met();
            }
            if open.is_empty() {
                return Ok(order.iter().filter_map(|from| got.remove(from)).collect());
            }
            if start.elapsed() >= self.timeout {
                let missing = open.iter().map(|from| self.ranks[*from]).collect();
                return Err(CommError::Timeout { missing, waited: start.elapsed(), at: self.world_rank(), call });
            }
            polls += 1;
            if busy || polls < EAGER_POLLS {
                thread::yield_now();
            } else {
                thread::sleep(POLL);
            }
        }
    }

    /// Sends each other rank its buffer and returns what each sent, this rank's own in its place.
    fn exchange(
        &self,
        lane: Lane,
        round: &mut u64,
        call: Signature,
        buffer: impl Fn(usize) -> Arc<Buffer>,
    ) -> Result<Vec<Arc<Buffer>>> {
        let channel = port::lane_channel(lane);
        let place = *round;
        *round += 1;
        let others = || (0..self.ranks.len()).filter(|other| *other != self.rank);
        for other in others() {
            self.link.send(self.ranks[other], self.context, channel, call, buffer(other))?;
        }
        let received = self.wait(others(), channel, place, call)?;
        for (other, message) in others().zip(&received) {
            if message.call != call {
                let (mine, other) = ((self.world_rank(), call), (self.ranks[other], message.call));
                let ((a, call_a), (b, call_b)) = if mine.0 < other.0 { (mine, other) } else { (other, mine) };
                return Err(CommError::Mismatch { a, call_a, b, call_b });
            }
        }
        let mut all: Vec<Arc<Buffer>> = received.into_iter().map(|message| Arc::new(message.data)).collect();
        all.insert(self.rank, buffer(self.rank));
        Ok(all)
    }

    /// One number from every rank.
    fn numbers(&self, lane: Lane, round: &mut u64, call: Signature, mine: &[i64]) -> Result<Vec<i64>> {
        let mine = Arc::new(Buffer::I64(mine.to_vec()));
        let all = self.exchange(lane, round, call, |_| mine.clone())?;
        Ok(all.iter().flat_map(|buffer| integers(buffer.bytes())).collect())
    }

    fn collective(&self, lane: Lane, round: &mut u64, call: Call<'_>) -> Result<()> {
        let signature = call.signature();
        let empty = Arc::new(Buffer::U8(vec![]));
        match call {
            Call::Barrier => self.exchange(lane, round, signature, |_| empty.clone()).map(|_| ()),
            Call::AllReduce { data, dtype, op } => {
                // An empty call has one piece, too: all must be told what was called.
                let pieces = data.len().div_ceil(PART * self.ranks.len()).max(1);
                for bounds in even_parts(data.len() / dtype.size(), pieces).windows(2) {
                    let piece = &mut data[bounds[0] * dtype.size()..bounds[1] * dtype.size()];
                    let bounds = even_parts(bounds[1] - bounds[0], self.ranks.len());
                    let part = |rank: usize| bounds[rank] * dtype.size()..bounds[rank + 1] * dtype.size();
                    let parts = self.exchange(lane, round, signature, |rank| owned(dtype, &piece[part(rank)]))?;
                    let reduced = Arc::new(reduce(dtype, op, &parts)?);
                    let all = self.exchange(lane, round, signature, |_| reduced.clone())?;
                    for (rank, buffer) in all.iter().enumerate() {
                        fill(&mut piece[part(rank)], buffer)?;
                    }
                }
                Ok(())
            }
            Call::ReduceScatter { data, out, dtype, op } => {
                let lengths = self.numbers(lane, round, signature, &[out.len() as i64])?;
                check_lengths(signature, lengths.iter().map(|len| (0, *len as usize)))?;
                let begin = |rank: usize| lengths[..rank].iter().sum::<i64>() as usize;
                let part = |rank: usize| owned(dtype, &data[begin(rank)..begin(rank + 1)]);
                let parts = self.exchange(lane, round, signature, part)?;
                fill(out, &reduce(dtype, op, &parts)?)
            }
            Call::AllGather { data, out, dtype } => {
                let mine = owned(dtype, data);
                let all = self.exchange(lane, round, signature, |_| mine.clone())?;
                check_lengths(signature, all.iter().map(|buffer| (buffer.bytes().len(), 0)))?;
                let mut offset = 0;
                for buffer in &all {
                    let end = offset + buffer.bytes().len();
                    fill(&mut out[offset..end], buffer)?;
                    offset = end;
                }
                Ok(())
            }
            Call::AllToAll { data, dtype, counts, out, out_counts } => {
                let begin = |rank: usize| counts[..rank].iter().sum::<usize>() * dtype.size();
                let part = |rank: usize| owned(dtype, &data[begin(rank)..begin(rank + 1)]);
                let all = self.exchange(lane, round, signature, part)?;
                *out_counts = all.iter().map(|buffer| buffer.len()).collect();
                *out = Buffer::zeros(dtype, out_counts.iter().sum());
                let (mut offset, bytes) = (0, out.bytes_mut());
                for buffer in &all {
                    let end = offset + buffer.bytes().len();
                    fill(&mut bytes[offset..end], buffer)?;
                    offset = end;
                }
                Ok(())
            }
            Call::Broadcast { data, dtype, root } => {
                let mine = if self.rank == root { owned(dtype, data) } else { empty };
                let all = self.exchange(lane, round, signature, |_| mine.clone())?;
                fill(data, &all[root])
            }
            Call::Split { data, out } => {
                let all = self.numbers(lane, round, signature, &integers(data))?;
                fill(out, &Buffer::I64(all))
            }
        }
    }
}

/// The `i64` whose bytes these are.
fn integers(bytes: &[u8]) -> Vec<i64> {
    let whole = bytes.chunks_exact(size_of::<i64>());
    whole.map(|chunk| i64::from_ne_bytes(chunk.try_into().unwrap_or_default())).collect()
}

/// A copy that MPI can read for as long as it needs, also when the call has failed.
fn owned(dtype: DType, bytes: &[u8]) -> Arc<Buffer> {
    let mut buffer = Buffer::zeros(dtype, bytes.len() / dtype.size());
    buffer.bytes_mut().copy_from_slice(bytes);
    Arc::new(buffer)
}

/// Copies what came, whose length is that of its place unless the ranks run different programs.
fn fill(out: &mut [u8], buffer: &Buffer) -> Result<()> {
    if out.len() != buffer.bytes().len() {
        return Err(wrong_length(out.len(), buffer.bytes().len()));
    }
    out.copy_from_slice(buffer.bytes());
    Ok(())
}

fn wrong_length(expected: usize, got: usize) -> CommError {
    let (expected, got) = (format!("{expected} bytes"), format!("{got}; do all ranks run the same build?"));
    CommError::Argument { operation: "receive a part", expected, got }
}

/// Reduces the buffers of all ranks in their order.
fn reduce(dtype: DType, op: crate::ReduceOp, parts: &[Arc<Buffer>]) -> Result<Buffer> {
    let len = parts[0].len();
    if let Some(other) = parts.iter().find(|part| part.len() != len || part.dtype() != dtype) {
        return Err(wrong_length(len * dtype.size(), other.bytes().len()));
    }
    let mut out = Buffer::zeros(dtype, len);
    let pointers: Vec<*const u8> = parts.iter().map(|part| part.bytes().as_ptr()).collect();
    // SAFETY: all parts and `out` are vectors of `len` elements of `dtype`, as checked; `out` is none of them.
    unsafe { reduce_parts(dtype, op, &pointers, out.bytes_mut().as_mut_ptr(), len) };
    Ok(out)
}

impl Collectives for MpiEngine {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn call(&self, lane: Lane, call: Call<'_>) -> Result<()> {
        let state = &self.lanes[lane as usize];
        let mut round = state.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let mut broken = state.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = &*broken {
            return Err(error.clone());
        }
        self.collective(lane, &mut round, call).inspect_err(|error| *broken = Some(error.clone()))
    }

    fn send(&self, to: usize, tag: u32, message: Buffer) -> Result<()> {
        let operation = Operation::Send { to, tag };
        let call = Signature { operation, data: Some((message.dtype(), message.len())) };
        self.link.poll(|inbox| match inbox.gone(&[self.ranks[to]]) {
            Some((rank, why)) => Err(CommError::RankLost { rank, why, at: self.world_rank(), call }),
            None => Ok(()),
        })?;
        self.link.send(self.ranks[to], self.context, port::tag_channel(tag), call, Arc::new(message))
    }

    fn post_recv(&self, from: usize, tag: u32) -> Result<u64> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let next = places.entry((from, tag)).or_default();
        *next += 1;
        Ok(*next - 1)
    }

    fn recv(&self, from: usize, tag: u32, place: u64) -> Result<Buffer> {
        let call = Signature { operation: Operation::Recv { from, tag }, data: None };
        let mut messages = self.wait(std::iter::once(from), port::tag_channel(tag), place, call)?;
        let ended = CommError::Engine { operation: "recv", why: "nothing came".to_owned() };
        messages.pop().map(|message| message.data).ok_or(ended)
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn Collectives>>> {
        // The number that the first member of a new group proposes is the group's.
        let number = (self.world_rank() as i64) << 32 | GROUPS.fetch_add(1, Ordering::Relaxed) as i64;
        let mine = [color.map_or(-1, i64::from), i64::from(key), number];
        let mut all = vec![0i64; 3 * self.ranks.len()];
        self.call(Lane::Blocking, Call::Split { data: i64::bytes(&mine), out: i64::bytes_mut(&mut all) })?;
        let Some(color) = color else { return Ok(None) };
        let pairs: Vec<i64> = all.chunks_exact(3).flat_map(|of| [of[0], of[1]]).collect();
        let members = members(&pairs, color);
        let context = all[3 * members[0] + 2];
        let ranks = members.iter().map(|rank| self.ranks[*rank]).collect();
        let rank = members.iter().position(|rank| *rank == self.rank).unwrap_or_default();
        Ok(Some(Arc::new(Self::new(self.link.clone(), self.timeout, context, ranks, rank))))
    }

    fn abandon(&self, why: &str) {
        self.link.say_lost(why);
    }
}
