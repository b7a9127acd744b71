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

/// The compute threads of a rank that is a thread of this process; dropping it ends them.
#[derive(Debug)]
pub struct RankThreads {
    _pool: rayon::ThreadPool,
}

/// Gives the calling thread a pool of its own of `threads`, of which it is one: what it computes runs there and nowhere else, beside other ranks.
///
/// # Errors
/// [`ThreadsError`] if the thread is part of a pool already, or the system gives no threads.
pub fn for_rank(threads: usize) -> Result<RankThreads, ThreadsError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).use_current_thread().build();
    Ok(RankThreads { _pool: pool.map_err(|source| ThreadsError { threads, source })? })
}
