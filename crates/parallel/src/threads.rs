//! Ranks as threads of one process, over shared memory.
//!
//! A collective is a meeting: every rank leaves pointers to its buffers at a board, and the last to come compares the calls. Then each
//! reads what it needs directly from the buffers of the others, and nobody returns before all have read. No message is
//! ever put together or copied on the way. An all-reduce has two such rounds: first, rank `r` reduces the `r`-th part of
//! all buffers, in the order of the ranks, into its own; then each fetches the other parts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::collectives::{Call, Collectives, Lane, Operation, Signature, members};
use crate::element::{Buffer, reduce_parts};
use crate::error::{CommError, Result};
use crate::meter::met;

/// How often a waiting rank looks whether those it waits for are still there.
const LOOK: Duration = Duration::from_millis(10);

/// What all groups of a world share.
pub(crate) struct WorldState {
    timeout: Duration,
    failed: AtomicBool,
    failure: Mutex<Option<(usize, String)>>,
}

impl WorldState {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, failed: AtomicBool::new(false), failure: Mutex::new(None) }
    }

    /// Records that a rank failed; the first one is why the others do.
    pub(crate) fn fail(&self, rank: usize, why: &str) {
        lock(&self.failure).get_or_insert_with(|| (rank, why.to_owned()));
        self.failed.store(true, Ordering::Release);
    }

    /// The first failure of the world.
    pub(crate) fn failure(&self) -> Option<(usize, String)> {
        if self.failed.load(Ordering::Acquire) { lock(&self.failure).clone() } else { None }
    }
}

/// What the ranks of a group share.
struct Group {
    world: Arc<WorldState>,
    ranks: Vec<usize>,
    lanes: [Board; 2],
    mailboxes: Vec<Mailbox>,
    /// Which ranks have dropped their handle.
    left: Vec<AtomicBool>,
    /// Groups of a split on which not every member has laid hands, by number of the split and color.
    children: Mutex<HashMap<(u64, u32), Child>>,
}

/// A new group and how many of its members have taken their handle.
type Child = (Arc<Group>, usize);

impl Group {
    fn new(world: Arc<WorldState>, ranks: Vec<usize>) -> Self {
        let n = ranks.len();
        Self {
            world,
            ranks,
            lanes: [Board::new(n), Board::new(n)],
            mailboxes: (0..n).map(|_| Mailbox::default()).collect(),
            left: (0..n).map(|_| AtomicBool::new(false)).collect(),
            children: Mutex::new(HashMap::new()),
        }
    }
}

/// Where the calls of a lane meet.
struct Board {
    state: Mutex<Meeting>,
    changed: Condvar,
}

struct Meeting {
    /// The call of each rank in this meeting. They stay until the next one begins, which is after all have read them.
    posted: Vec<Option<Posted>>,
    here: Vec<bool>,
    arrived: usize,
    /// Counts meetings and fences.
    phase: u64,
    /// Why there will be no further meeting.
    broken: Option<CommError>,
}

impl Board {
    fn new(n: usize) -> Self {
        let meeting = Meeting { posted: vec![None; n], here: vec![false; n], arrived: 0, phase: 0, broken: None };
        Self { state: Mutex::new(meeting), changed: Condvar::new() }
    }
}

/// A call as the other ranks see it.
#[derive(Clone, Copy)]
struct Posted {
    signature: Signature,
    /// What the others read.
    data: *const u8,
    /// Bytes of `data`.
    data_len: usize,
    /// Bytes of `out`.
    out_len: usize,
    /// One element count per rank, of an all-to-all.
    counts: *const usize,
}

// SAFETY: the pointers are read only between a meeting and its last fence, in which the ranks that posted them keep what they
// point to alive and leave alone the parts that others read.
unsafe impl Send for Posted {}

/// Messages for one rank.
#[derive(Default)]
struct Mailbox {
    channels: Mutex<HashMap<(usize, u32), Channel>>,
    arrived: Condvar,
}

/// Messages from one rank with one tag.
#[derive(Default)]
struct Channel {
    sent: u64,
    places: u64,
    messages: HashMap<u64, Buffer>,
}

/// A rank's view of a group.
pub(crate) struct ThreadEngine {
    group: Arc<Group>,
    rank: usize,
    /// Calls of one lane from several threads take turns.
    turns: [Mutex<()>; 2],
    splits: AtomicU64,
}

/// The engines of a new world of `n` ranks.
pub(crate) fn world(world: &Arc<WorldState>, n: usize) -> Vec<ThreadEngine> {
    let group = Arc::new(Group::new(world.clone(), (0..n).collect()));
    (0..n).map(|rank| ThreadEngine::new(group.clone(), rank)).collect()
}

impl Drop for ThreadEngine {
    fn drop(&mut self) {
        self.group.left[self.rank].store(true, Ordering::Release);
    }
}

impl ThreadEngine {
    fn new(group: Arc<Group>, rank: usize) -> Self {
        Self { group, rank, turns: [Mutex::new(()), Mutex::new(())], splits: AtomicU64::new(0) }
    }

    fn world_rank(&self) -> usize {
        self.group.ranks[self.rank]
    }

    /// Waits until all ranks have posted their call and returns these, or says which rank is missing or differs.
    fn meet(&self, board: &Board, posted: Posted) -> Result<Vec<Posted>> {
        let start = Instant::now();
        let mut state = lock(&board.state);
        if let Some(error) = &state.broken {
            return Err(error.clone().seen_by(self.world_rank(), posted.signature));
        }
        state.posted[self.rank] = Some(posted);
        state.here[self.rank] = true;
        state.arrived += 1;
        if state.arrived == self.group.ranks.len() {
            let calls: Vec<Posted> = state.posted.iter().flatten().copied().collect();
            let checked = check(&calls, &self.group.ranks);
            match &checked {
                Ok(()) => {
                    met();
                    state.arrived = 0;
                    state.here.fill(false);
                    state.phase += 1;
                }
                Err(error) => state.broken = Some(error.clone()),
            }
            board.changed.notify_all();
            return checked.map(|()| calls);
        }
        let phase = state.phase;
        loop {
            if state.phase != phase {
                met();
                return Ok(state.posted.iter().flatten().copied().collect());
            }
            if let Some(error) = &state.broken {
                return Err(error.clone().seen_by(self.world_rank(), posted.signature));
            }
            let missing = || (0..state.here.len()).filter(|rank| !state.here[*rank]);
            let error = if let Some(error) = self.lost(posted.signature, missing()) {
                Some(error)
            } else if start.elapsed() >= self.group.world.timeout {
                Some(self.timed_out(posted.signature, missing(), start))
            } else {
                None
            };
            if let Some(error) = error {
                // From here on the meeting cannot take place: no rank will read what this one posted.
                state.broken = Some(error.clone());
                board.changed.notify_all();
                return Err(error);
            }
            state = board.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all ranks of a meeting are here once more. They are all inside their call, where there is only copying and
    /// adding, and so need no deadline; and no rank may go while others read its buffers.
    fn fence(&self, board: &Board) {
        let mut state = lock(&board.state);
        state.arrived += 1;
        if state.arrived == self.group.ranks.len() {
            state.arrived = 0;
            state.phase += 1;
            board.changed.notify_all();
            return;
        }
        let phase = state.phase;
        while state.phase == phase {
            state = board.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the world failed or one of `needed` (of this group) left.
    fn lost(&self, call: Signature, needed: impl Iterator<Item = usize>) -> Option<CommError> {
        // First: a rank that failed has also left.
        let left: Vec<usize> = needed.filter(|rank| self.group.left[*rank].load(Ordering::Acquire)).collect();
        let at = self.world_rank();
        if let Some((rank, why)) = self.group.world.failure() {
            return Some(CommError::RankLost { rank, why, at, call });
        }
        let rank = self.group.ranks[*left.first()?];
        Some(CommError::RankLost { rank, why: "it has dropped its communicator".to_owned(), at, call })
    }

    fn timed_out(&self, call: Signature, missing: impl Iterator<Item = usize>, start: Instant) -> CommError {
        let missing = missing.map(|rank| self.group.ranks[rank]).collect();
        CommError::Timeout { missing, waited: start.elapsed(), at: self.world_rank(), call }
    }
}

/// Whether all calls are the same and their lengths add up.
fn check(calls: &[Posted], ranks: &[usize]) -> Result<()> {
    let first = &calls[0];
    if let Some(other) = calls.iter().position(|call| call.signature != first.signature) {
        let (a, b) = (ranks[0], ranks[other]);
        return Err(CommError::Mismatch { a, call_a: first.signature, b, call_b: calls[other].signature });
    }
    let lengths = calls.iter().map(|call| (call.data_len, call.out_len));
    check_lengths(first.signature, lengths)
}

/// Whether the parts of a gather or scatter add up to the whole. Lengths are those of data and out of each rank, in bytes.
pub(crate) fn check_lengths(signature: Signature, lengths: impl Iterator<Item = (usize, usize)> + Clone) -> Result<()> {
    let Some((dtype, whole)) = signature.data else { return Ok(()) };
    let elements = |bytes: usize| bytes / dtype.size();
    let (operation, parts): (_, Vec<usize>) = match signature.operation {
        Operation::AllGather => ("all_gather", lengths.map(|(data, _)| elements(data)).collect()),
        Operation::ReduceScatter(_) => ("reduce_scatter", lengths.map(|(_, out)| elements(out)).collect()),
        _ => return Ok(()),
    };
    if parts.iter().sum::<usize>() == whole {
        return Ok(());
    }
    let expected = format!("parts of the ranks that add up to {whole} elements");
    Err(CommError::Argument { operation, expected, got: format!("{parts:?}") })
}

/// Where the part of each of `n` ranks begins in `len` elements; the last entry is `len`.
pub(crate) fn even_parts(len: usize, n: usize) -> Vec<usize> {
    (0..=n).map(|i| (len as u128 * i as u128 / n as u128) as usize).collect()
}

impl Collectives for ThreadEngine {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_ranks(&self) -> &[usize] {
        &self.group.ranks
    }

    fn call(&self, lane: Lane, call: Call<'_>) -> Result<()> {
        let _turn = lock(&self.turns[lane as usize]);
        let board = &self.group.lanes[lane as usize];
        let signature = call.signature();
        let post = |data: *const u8, data_len, out_len| Posted {
            signature,
            data,
            data_len,
            out_len,
            counts: std::ptr::null(),
        };
        // SAFETY, for all pointers below: `meet` has compared types and lengths, so that every offset lies inside its buffer; what a
        // rank writes before a fence, no other reads before it; nobody returns before the last fence. Nothing below can
        // panic, for a rank that unwinds would free what others read; if it did, the process ends.
        let guard = AbortOnUnwind;
        let result = match call {
            Call::Barrier => self.meet(board, post(std::ptr::null(), 0, 0)).map(|_| ()),
            Call::AllReduce { data, dtype, op } => {
                let (mine, len) = (data.as_mut_ptr(), data.len());
                self.meet(board, post(mine, len, 0)).map(|calls| {
                    let bounds: Vec<usize> = even_parts(len / dtype.size(), calls.len());
                    let part = |rank: usize| (bounds[rank] * dtype.size(), bounds[rank + 1] - bounds[rank]);
                    let (offset, n) = part(self.rank);
                    // SAFETY: see above; this rank alone touches this part of any buffer until the fence.
                    unsafe {
                        let parts: Vec<*const u8> = calls.iter().map(|call| call.data.add(offset)).collect();
                        reduce_parts(dtype, op, &parts, mine.add(offset), n);
                    }
                    self.fence(board);
                    for (rank, call) in calls.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
                        let (offset, n) = part(rank);
                        // SAFETY: see above; of the buffer of `rank` this is the part that it reduced and writes no more.
                        unsafe { copy(call.data.add(offset), mine.add(offset), n * dtype.size()) };
                    }
                    self.fence(board);
                })
            }
            Call::ReduceScatter { data, out, dtype, op } => {
                self.meet(board, post(data.as_ptr(), data.len(), out.len())).map(|calls| {
                    let offset: usize = calls[..self.rank].iter().map(|call| call.out_len).sum();
                    // SAFETY: see above; `out` is this rank's alone.
                    unsafe {
                        let parts: Vec<*const u8> = calls.iter().map(|call| call.data.add(offset)).collect();
                        reduce_parts(dtype, op, &parts, out.as_mut_ptr(), out.len() / dtype.size());
                    }
                    self.fence(board);
                })
            }
            Call::AllGather { data, out, .. } | Call::Split { data, out } => {
                self.meet(board, post(data.as_ptr(), data.len(), out.len())).map(|calls| {
                    let mut offset = 0;
                    for call in &calls {
                        // SAFETY: see above; the lengths of all data add up to that of `out`.
                        unsafe { copy(call.data, out.as_mut_ptr().add(offset), call.data_len) };
                        offset += call.data_len;
                    }
                    self.fence(board);
                })
            }
            Call::AllToAll { data, dtype, counts, out, out_counts } => {
                let posted = Posted { counts: counts.as_ptr(), ..post(data.as_ptr(), data.len(), 0) };
                self.meet(board, posted).map(|calls| {
                    // SAFETY: each rank's counts are one per rank and add up to its data, which its communicator checked.
                    let of = |call: &Posted| unsafe { std::slice::from_raw_parts(call.counts, calls.len()) };
                    *out_counts = calls.iter().map(|call| of(call)[self.rank]).collect();
                    *out = Buffer::zeros(dtype, out_counts.iter().sum());
                    let mut to = out.bytes_mut().as_mut_ptr();
                    for call in &calls {
                        let before: usize = of(call)[..self.rank].iter().sum();
                        let bytes = of(call)[self.rank] * dtype.size();
                        // SAFETY: see above; `out` was made as long as all that comes.
                        unsafe {
                            copy(call.data.add(before * dtype.size()), to, bytes);
                            to = to.add(bytes);
                        }
                    }
                    self.fence(board);
                })
            }
            Call::Broadcast { data, root, .. } => {
                let (mine, len) = (data.as_mut_ptr(), data.len());
                self.meet(board, post(mine, len, 0)).map(|calls| {
                    if self.rank != root {
                        // SAFETY: see above; nobody writes to the root's buffer, and nobody reads this one.
                        unsafe { copy(calls[root].data, mine, len) };
                    }
                    self.fence(board);
                })
            }
        };
        std::mem::forget(guard);
        result
    }

    fn send(&self, to: usize, tag: u32, message: Buffer) -> Result<()> {
        let data = Some((message.dtype(), message.len()));
        let call = Signature { operation: Operation::Send { to, tag }, data };
        if let Some(error) = self.lost(call, std::iter::once(to)) {
            return Err(error);
        }
        let mailbox = &self.group.mailboxes[to];
        let mut channels = lock(&mailbox.channels);
        let channel = channels.entry((self.rank, tag)).or_default();
        channel.messages.insert(channel.sent, message);
        channel.sent += 1;
        mailbox.arrived.notify_all();
        Ok(())
    }

    fn post_recv(&self, from: usize, tag: u32) -> Result<u64> {
        let mut channels = lock(&self.group.mailboxes[self.rank].channels);
        let channel = channels.entry((from, tag)).or_default();
        channel.places += 1;
        Ok(channel.places - 1)
    }

    fn recv(&self, from: usize, tag: u32, place: u64) -> Result<Buffer> {
        let call = Signature { operation: Operation::Recv { from, tag }, data: None };
        let start = Instant::now();
        let mailbox = &self.group.mailboxes[self.rank];
        let mut channels = lock(&mailbox.channels);
        loop {
            // Looked at before the messages: what a rank sent before it left is there.
            let lost = self.lost(call, std::iter::once(from));
            if let Some(message) = channels.entry((from, tag)).or_default().messages.remove(&place) {
                return Ok(message);
            }
            if let Some(error) = lost {
                return Err(error);
            }
            if start.elapsed() >= self.group.world.timeout {
                return Err(self.timed_out(call, std::iter::once(from), start));
            }
            channels = mailbox.arrived.wait_timeout(channels, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Arc<dyn Collectives>>> {
        let mine = [color.map_or(-1, i64::from), i64::from(key)];
        let mut all = vec![0i64; 2 * self.group.ranks.len()];
        let call = Call::Split { data: bytemuck::cast_slice(&mine), out: bytemuck::cast_slice_mut(all.as_mut_slice()) };
        self.call(Lane::Blocking, call)?;
        let number = self.splits.fetch_add(1, Ordering::Relaxed);
        let Some(color) = color else { return Ok(None) };
        let members = members(&all, color);
        let mut children = lock(&self.group.children);
        let (group, taken) = children.entry((number, color)).or_insert_with(|| {
            let ranks = members.iter().map(|rank| self.group.ranks[*rank]).collect();
            (Arc::new(Group::new(self.group.world.clone(), ranks)), 0)
        });
        *taken += 1;
        let (group, all_took) = (group.clone(), *taken == members.len());
        if all_took {
            children.remove(&(number, color));
        }
        let rank = members.iter().position(|rank| *rank == self.rank).unwrap_or_default();
        Ok(Some(Arc::new(Self::new(group, rank))))
    }

    fn abandon(&self, why: &str) {
        self.group.world.fail(self.world_rank(), why);
    }
}

/// Ends the process if it is dropped, which only unwinding does.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        eprintln!("firebox-parallel: a panic inside a collective, in which other ranks read this one's memory");
        std::process::abort();
    }
}

/// # Safety
///
/// As [`std::ptr::copy_nonoverlapping`], but that an empty copy may have any pointers.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    if bytes > 0 {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    }
}

/// The data under these locks is whole at any moment: whoever panicked has left it so.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
