//! Memory that a kernel needs while it runs, kept by its thread for the next call: a fresh large allocation costs a page fault per 4 KiB.

use std::cell::RefCell;

thread_local! {
    // A stack, because kernels nest: the thread that started a parallel kernel also runs some of its tasks.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values in a cache line, to which scratch memory is aligned: a vector load across lines costs two.
const LINE: usize = 16;

/// Calls `work` with `len` values of unspecified (but initialized) content, aligned to a cache line.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len + LINE {
        drop(std::mem::take(&mut buffer));
        buffer = vec![0.0; len + LINE];
    }
    let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let result = work(&mut buffer[start..start + len]);
    SPARE.with_borrow_mut(|spare| spare.push(buffer));
    result
}
