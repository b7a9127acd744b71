//! Buffers that live on from one operation to the next, and from step to step.
//!
//! A training step asks for the same sizes in the same order every time. Giving each buffer back to the system costs a page fault per 4 KiB when the next
//! one is touched (a fifth of a small model's step); so a buffer that nothing holds any more is kept here for the next request of about its size. *About*, since what a
//! step has most of differs from its end to its middle, there gradients `[D, F]`, here activations `[B T, F]`: each takes the other's place.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smaller buffers are left to the system's allocator, which is good at them: 16 KiB.
const MIN_LEN: usize = 4 * 1024;

/// Kept bytes beyond which a request that finds no buffer of its size frees old ones first, so that what is kept replaces memory and does not
/// add to it.
const KEEP_BYTES: usize = 128 << 20;

#[derive(Default)]
struct Pool {
    /// Kept buffers by capacity, each with the time at which it came.
    free: BTreeMap<usize, VecDeque<(u64, Vec<f32>)>>,
    /// How many buffers of a capacity were given out and have not come back.
    out: BTreeMap<usize, usize>,
    clock: u64,
    stats: Stats,
}

/// What the pool of buffers has done since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests answered with a kept buffer.
    pub reused: u64,
    /// Requests that took new memory.
    pub allocated: u64,
    /// Bytes of new memory taken.
    pub allocated_bytes: u64,
    /// Bytes kept now.
    pub kept_bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: BTreeMap::new(),
    out: BTreeMap::new(),
    clock: 0,
    stats: Stats { reused: 0, allocated: 0, allocated_bytes: 0, kept_bytes: 0 },
});

fn pool() -> MutexGuard<'static, Pool> {
    // The pool is consistent between any two statements that can panic.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// The smallest kept buffer that has room for `len` values and is not much larger.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let (&capacity, kept) = self.free.range_mut(len..=len + len / 2).next()?;
        let (_, buffer) = kept.pop_back()?;
        if kept.is_empty() {
            self.free.remove(&capacity);
        }
        self.stats.kept_bytes -= 4 * capacity;
        Some(buffer)
    }

    fn give_out(&mut self, capacity: usize) {
        *self.out.entry(capacity).or_default() += 1;
    }

    /// Whether a buffer of this capacity, or of about as much, is missing; then it is not any more.
    fn take_back(&mut self, capacity: usize) -> bool {
        let Some((&at, out)) = self.out.range_mut(capacity..=capacity + capacity / 2).next() else { return false };
        *out -= 1;
        if *out == 0 {
            self.out.remove(&at);
        }
        true
    }

    /// Frees the oldest buffers until `bytes` more would not exceed what may be kept.
    fn make_room(&mut self, bytes: usize) {
        let mut room = bytes;
        while self.stats.kept_bytes > KEEP_BYTES && room > 0 {
            let oldest = self.free.iter().min_by_key(|(_, kept)| kept.front().map_or(u64::MAX, |(time, _)| *time));
            let Some(len) = oldest.map(|(&len, _)| len) else { return };
            let Some(kept) = self.free.get_mut(&len) else { return };
            kept.pop_front();
            if kept.is_empty() {
                self.free.remove(&len);
            }
            self.stats.kept_bytes -= 4 * len;
            room = room.saturating_sub(4 * len);
        }
    }
}

/// A buffer of `len` values that a kernel is about to overwrite: they are arbitrary.
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    if len < MIN_LEN {
        return vec![0.0; len];
    }
    let mut pool = pool();
    if let Some(mut buffer) = pool.take(len) {
        pool.give_out(buffer.capacity());
        pool.stats.reused += 1;
        drop(pool);
        buffer.resize(len, 0.0);
        return buffer;
    }
    pool.make_room(4 * len);
    pool.stats.allocated += 1;
    pool.stats.allocated_bytes += 4 * len as u64;
    drop(pool);
    let buffer = with_room(len);
    self::pool().give_out(buffer.capacity());
    buffer
}

/// Smaller buffers come from the heap, larger ones are mapped each for itself.
const MAPPED_BYTES: usize = 1 << 20;

/// New memory for a buffer. A large one has room for longer ones of about its size, which takes no memory until one of them touches it.
fn with_room(len: usize) -> Vec<f32> {
    let mut buffer = if 4 * len < MAPPED_BYTES { fresh(len) } else { roomy(len, len / 4) };
    buffer.truncate(len);
    buffer
}

/// New memory for a buffer. glibc's allocator would cut it from one heap with all others, whose holes fit no later size (gpt2-124m: 180 MB of 2.4 GB). So
/// large buffers are mapped each for itself, in huge pages where the system has them: the first touch of a page of 4 KiB costs as much as computing
/// on it. What is allocated elsewhere stays in the heap up to a few MB, where it is used again without being mapped anew.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn fresh<T: bytemuck::Zeroable>(len: usize) -> Vec<T> {
    if size_of::<T>() * len >= MAPPED_BYTES { roomy(len, 0) } else { bytemuck::zeroed_vec(len) }
}

/// `len + room` zeros, in huge pages as far as `len` goes: a huge page is memory as a whole.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn roomy<T: bytemuck::Zeroable>(len: usize, room: usize) -> Vec<T> {
    mapped(len + room, len, MAPPED_BYTES, libc::MADV_HUGEPAGE)
}

/// Zeros, of which only the pages that are touched take memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn untouched(len: usize) -> Vec<f64> {
    /// Smaller ones are not worth pages of their own.
    const MAPPED_BYTES: usize = 64 << 10;
    // A huge page would be memory as a whole.
    if 8 * len < MAPPED_BYTES { vec![0.0; len] } else { mapped(len, len, MAPPED_BYTES, libc::MADV_NOHUGEPAGE) }
}

/// Zeros mapped by themselves, more than `threshold` bytes of them, of which the first are advised on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn mapped<T: bytemuck::Zeroable>(len: usize, advised: usize, threshold: usize, advice: libc::c_int) -> Vec<T> {
    /// Everyone else's threshold. glibc's own would grow to 32 MB with the first large memory that is freed; then the heap of gpt2-124m has 100 MB more.
    const USUAL_BYTES: libc::c_int = 4 << 20;
    const PAGE: usize = 4096;
    // SAFETY: mallopt may be called at any time from any thread; one that allocates in between has its memory mapped as well.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, threshold as libc::c_int) };
    let values = bytemuck::zeroed_vec::<T>(len);
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, USUAL_BYTES) };
    let (start, end) = (values.as_ptr() as usize, values.as_ptr() as usize + size_of::<T>() * advised);
    let (start, end) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
    // SAFETY: whole pages inside one allocation of ours; the advice changes no content. Where it is refused, pages are small.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) };
    values
}

/// New memory for a buffer.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn fresh<T: bytemuck::Zeroable>(len: usize) -> Vec<T> {
    bytemuck::zeroed_vec(len)
}

/// `len + room` zeros.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn roomy<T: bytemuck::Zeroable>(len: usize, room: usize) -> Vec<T> {
    bytemuck::zeroed_vec(len + room)
}

/// Zeros, of which the system may give memory to touched pages alone.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn untouched(len: usize) -> Vec<f64> {
    vec![0.0; len]
}

/// Keeps a buffer for the next request of about its size, in place of one that was given out. Memory that comes from elsewhere is kept only as far as ours went
/// there: the pool does not grow from what others allocate.
pub(crate) fn recycle(buffer: Vec<f32>) {
    let capacity = buffer.capacity();
    if capacity < MIN_LEN {
        return;
    }
    let mut pool = pool();
    if !pool.take_back(capacity) {
        return;
    }
    pool.clock += 1;
    let time = pool.clock;
    pool.stats.kept_bytes += 4 * capacity;
    pool.free.entry(capacity).or_default().push_back((time, buffer));
}

/// What the pool has done: a training loop in its steady state takes (almost) no new memory.
pub fn stats() -> Stats {
    pool().stats
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Held by tests that look for buffers of their own in the one pool of the process.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_buffer_comes_back_for_about_its_size() {
        let _alone = ALONE.lock();
        // A size that no other test of this process uses.
        const LEN: usize = 1_048_583;
        let mut first = buffer(LEN);
        first[7] = 3.0;
        let at = first.as_ptr();
        recycle(first);
        let other = buffer(2 * LEN);
        assert_ne!(other.as_ptr(), at);
        for len in [LEN, LEN + LEN / 8, LEN - LEN / 8, LEN] {
            let again = buffer(len);
            assert_eq!((again.as_ptr(), again.len()), (at, len));
            recycle(again);
        }
        // Half of it would be wasted.
        let half = buffer(LEN / 2);
        assert_ne!(half.as_ptr(), at);
    }

    #[test]
    fn memory_from_elsewhere_does_not_pile_up() {
        let _alone = ALONE.lock();
        const LEN: usize = 4_194_319;
        drop(buffer(LEN));
        // The one that was given out and dropped has one successor.
        for _ in 0..5 {
            recycle(vec![1.0; LEN]);
        }
        let kept = |pool: MutexGuard<'_, Pool>| pool.free.get(&LEN).map_or(0, VecDeque::len);
        assert_eq!(kept(pool()), 1);
        let again = buffer(LEN);
        assert_eq!((kept(pool()), again.len()), (0, LEN));
    }

    #[test]
    fn old_buffers_make_room() {
        let mut pool = Pool::default();
        for time in 0..4 {
            let len = KEEP_BYTES / 8 + time;
            pool.free.entry(len).or_default().push_back((time as u64, vec![0.0; 1]));
            pool.stats.kept_bytes += 4 * len;
        }
        pool.make_room(4);
        assert_eq!(pool.free.keys().copied().collect::<Vec<_>>(), [1, 2, 3].map(|time| KEEP_BYTES / 8 + time));
        pool.make_room(KEEP_BYTES * 4);
        assert!(pool.stats.kept_bytes <= KEEP_BYTES);
    }
}
