//! Memory of this process, in bytes: now and at its peak.

use std::sync::atomic::{AtomicU64, Ordering};

/// The largest value [`current_bytes`] has returned, for systems that don't keep a peak.
static SEEN: AtomicU64 = AtomicU64::new(0);

/// Resident memory now, bytes; 0 where the system does not tell.
pub fn current_bytes() -> u64 {
    let now = memory_stats::memory_stats().map_or(0, |stats| stats.physical_mem as u64);
    SEEN.fetch_max(now, Ordering::Relaxed);
    now
}

/// The highest resident memory since the process started, bytes.
///
/// Linux's own high-water mark, elsewhere on Unix `getrusage`; on other systems the highest of the values that
/// [`current_bytes`] returned.
pub fn peak_bytes() -> u64 {
    let now = current_bytes();
    high_water().unwrap_or_else(|| SEEN.load(Ordering::Relaxed)).max(now)
}

/// `VmHWM` of `/proc/self/status`. Not `getrusage`, whose `ru_maxrss` on Linux starts at the peak of the process that
/// started this one: a small child of a large parent would report the parent's memory.
#[cfg(target_os = "linux")]
fn high_water() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn high_water() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is valid for writes of one `rusage`, which is all that getrusage writes.
    let code = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    if code != 0 {
        return None;
    }
    // SAFETY: an `rusage` is plain integers, valid when zeroed, and getrusage has filled it.
    let usage = unsafe { usage.assume_init() };
    // Apple counts bytes, the BSDs KiB.
    let unit = if cfg!(target_vendor = "apple") { 1 } else { 1024 };
    u64::try_from(usage.ru_maxrss).ok().map(|n| n * unit)
}

#[cfg(not(unix))]
fn high_water() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_remembers_what_was_freed() {
        let before = current_bytes();
        assert!(before > 100_000, "a process with {before} bytes");
        const SIZE: usize = 64 << 20;
        let block = vec![1u8; SIZE];
        assert!(current_bytes() >= before + SIZE as u64 / 2);
        assert_eq!(std::hint::black_box(&block).iter().map(|&b| b as usize).sum::<usize>(), SIZE);
        drop(block);
        assert!(peak_bytes() >= before + SIZE as u64 / 2);
    }
}
