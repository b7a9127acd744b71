//! Buffers that live on from one operation to the next, and from step to step.
//!
//! A training step asks for the same sizes in the same order every time. Giving each buffer back to the system costs a page fault per 4 KiB when the next
//! one is touched (a fifth of a small model's step); so a buffer that nothing holds any more is kept here for the next request of its size.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smaller buffers are left to the system's allocator, which is good at them: 16 KiB.
const MIN_LEN: usize = 4 * 1024;

/// Kept bytes beyond which a request that finds no buffer of its size frees old ones first, so that what is kept replaces memory and does not
/// add to it.
const KEEP_BYTES: usize = 128 << 20;

#[derive(Default)]
struct Pool {
    /// Kept buffers by length, each with the time at which it came.
    free: BTreeMap<usize, VecDeque<(u64, Vec<f32>)>>,
    /// How many buffers of a length were given out and have not come back.
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
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let kept = self.free.get_mut(&len)?;
        let (_, buffer) = kept.pop_back()?;
        if kept.is_empty() {
            self.free.remove(&len);
        }
        self.stats.kept_bytes -= 4 * len;
        Some(buffer)
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
    *pool.out.entry(len).or_default() += 1;
    if let Some(buffer) = pool.take(len) {
        pool.stats.reused += 1;
        return buffer;
    }
    pool.make_room(4 * len);
    pool.stats.allocated += 1;
    pool.stats.allocated_bytes += 4 * len as u64;
    drop(pool);
    fresh(len)
}

/// New memory for a buffer. glibc's allocator would cut it from one heap with all others, whose holes fit no later size (gpt2-124m: 180 MB of 2.4 GB). So
/// large buffers are mapped each for itself, in huge pages where the system has them: the first touch of a page of 4 KiB costs as much as computing
/// on it. What is allocated elsewhere stays in the heap up to a few MB, where it is used again without being mapped anew.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn fresh<T: bytemuck::Zeroable>(len: usize) -> Vec<T> {
    /// Smaller buffers come from the heap.
    const MAPPED_BYTES: usize = 1 << 20;
    let large = size_of::<T>() * len >= MAPPED_BYTES;
    if large { mapped(len, MAPPED_BYTES, libc::MADV_HUGEPAGE) } else { bytemuck::zeroed_vec(len) }
}

/// Zeros, of which only the pages that are touched take memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn untouched(len: usize) -> Vec<f64> {
    /// Smaller ones are not worth pages of their own.
    const MAPPED_BYTES: usize = 64 << 10;
    // A huge page would be memory as a whole.
    if 8 * len < MAPPED_BYTES { vec![0.0; len] } else { mapped(len, MAPPED_BYTES, libc::MADV_NOHUGEPAGE) }
}

/// Zeros mapped by themselves: more than `threshold` bytes of them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn mapped<T: bytemuck::Zeroable>(len: usize, threshold: usize, advice: libc::c_int) -> Vec<T> {
    /// Everyone else's threshold. glibc's own would grow to 32 MB with the first large memory that is freed; then the heap of gpt2-124m has 100 MB more.
    const USUAL_BYTES: libc::c_int = 4 << 20;
    const PAGE: usize = 4096;
    // SAFETY: mallopt may be called at any time from any thread; one that allocates in between has its memory mapped as well.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, threshold as libc::c_int) };
    let values = bytemuck::zeroed_vec::<T>(len);
    // SAFETY: as above.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, USUAL_BYTES) };
    let (start, end) = (values.as_ptr() as usize, values.as_ptr() as usize + size_of::<T>() * len);
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

/// Zeros, of which the system may give memory to touched pages alone.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn untouched(len: usize) -> Vec<f64> {
    vec![0.0; len]
}

/// Keeps a buffer for the next request of its size, in place of one that was given out. Memory that comes from elsewhere is kept only as far as ours went
/// there: the pool does not grow from what others allocate.
pub(crate) fn recycle(buffer: Vec<f32>) {
    let len = buffer.len();
    // Spare capacity would be memory that no request can find.
    if len < MIN_LEN || buffer.capacity() != len {
        return;
    }
    let mut pool = pool();
    match pool.out.get_mut(&len) {
        Some(out) if *out > 0 => *out -= 1,
        _ => return,
    }
    pool.clock += 1;
    let time = pool.clock;
    pool.stats.kept_bytes += 4 * len;
    pool.free.entry(len).or_default().push_back((time, buffer));
}

/// What the pool has done: a training loop in its steady state takes (almost) no new memory.
pub fn stats() -> Stats {
    pool().stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_its_size_only() {
        // A size that no other test of this process uses.
        const LEN: usize = 1_048_583;
        let mut first = buffer(LEN);
        first[7] = 3.0;
        let at = first.as_ptr();
        recycle(first);
        let other = buffer(LEN + 1);
        assert_ne!(other.as_ptr(), at);
        let again = buffer(LEN);
        assert_eq!((again.as_ptr(), again.len()), (at, LEN));
        recycle(again);
    }

    #[test]
    fn memory_from_elsewhere_does_not_pile_up() {
        const LEN: usize = 1_048_601;
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
