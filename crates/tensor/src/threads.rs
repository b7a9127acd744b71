//! The one pool of threads: everything that runs in parallel in this process runs on rayon's global pool.

/// The pool exists already, or the system gives no threads.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up {threads} compute threads: {source}; do it once, before anything is computed")]
pub struct ThreadsError {
    threads: usize,
    #[source]
    source: rayon::ThreadPoolBuildError,
}

/// Sets the number of compute threads; 0 takes `RAYON_NUM_THREADS`, or else one per core. The calling thread is one of them: a kernel starts on it at
/// once and wakes the others, instead of handing its work over and sleeping, which costs small models a fifth of their step.
///
/// Call it on the thread that trains, first thing. That thread must not wait for another one that computes: with one thread in the pool, nobody would do
/// the work. Without this call kernels run on a pool of one thread per core beside the calling one.
///
/// # Errors
/// [`ThreadsError`] if the pool was made before.
pub fn init(threads: usize) -> Result<usize, ThreadsError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .use_current_thread()
        .build_global()
        .map_err(|source| ThreadsError { threads, source })?;
    Ok(rayon::current_num_threads())
}
