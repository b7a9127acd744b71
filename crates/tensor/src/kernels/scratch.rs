//! Memory that a kernel needs while it runs, kept by its thread for the next call: a fresh large allocation costs a page fault per 4 KiB.

use std::cell::RefCell;

thread_local! {
    // Several, because kernels nest: the thread that started a parallel kernel also runs some of its tasks.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values in a cache line, to which scratch memory is aligned: a vector load across lines costs two.
const LINE: usize = 16;

/// Calls `work` with `len` values of unspecified (but initialized) content, aligned to a cache line.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    if len == 0 {
        return work(&mut []);
    }
    let need = len + LINE;
    let mut buffer = SPARE.with_borrow_mut(|spare| {
        let fits = (0..spare.len()).filter(|&i| spare[i].len() >= need).min_by_key(|&i| spare[i].len());
        match fits {
            Some(i) => spare.swap_remove(i),
            None => {
                // A larger one takes the place of one that is too small.
                drop(spare.pop());
                vec![0.0; need]
            }
        }
    });
    let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let result = work(&mut buffer[start..start + len]);
    SPARE.with_borrow_mut(|spare| spare.push(buffer));
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_scratch_is_apart_aligned_and_used_again() {
        let address = |values: &mut [f32]| values.as_ptr() as usize;
        let run = || {
            with_scratch(1000, |outer| {
                outer.fill(1.0);
                let inner = with_scratch(70, |inner| {
                    inner.fill(2.0);
                    address(inner)
                });
                assert!(outer.iter().all(|&v| v == 1.0));
                (address(outer), inner)
            })
        };
        let (outer, inner) = run();
        assert!(outer % 64 == 0 && inner % 64 == 0);
        assert_eq!(run(), (outer, inner));
        assert_eq!(with_scratch(0, |none| none.len()), 0);
    }
}
