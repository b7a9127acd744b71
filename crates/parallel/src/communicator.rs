//! The handle with which a rank talks to the others of its group.

use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::collectives::{Call, Collectives, Lane, Operation, Signature};
use crate::element::{Element, ReduceOp};
use crate::error::{CommError, Result};
use crate::meter::{Meter, sent};

/// One rank's handle to a group of ranks, whatever carries their messages.
///
/// Every rank of the group must make the same collective calls in the same order; sums and other reductions are made in
/// the order of the ranks, and so have the same bits every time and on every rank. A collective returns on all ranks or fails on all,
/// at the latest after the timeout of the world.
///
/// The forms that begin with `start_` return at once with a [`Pending`]: a communication thread of this communicator makes
/// these calls, one after the other, while the caller computes. They are matched with the `start_` calls of the other ranks
/// only, so blocking calls may be made meanwhile. They own their buffers, which come back from [`Pending::wait`].
///
/// Clones are the same handle. Dropping the last one leaves the group, after what was started is done.
#[derive(Clone)]
pub struct Communicator {
    inner: Arc<Inner>,
}

struct Inner {
    link: Link,
    worker: Mutex<Option<Worker>>,
}

/// An engine whose calls are counted.
#[derive(Clone)]
struct Link {
    engine: Arc<dyn Collectives>,
    meter: Arc<Meter>,
}

impl Link {
    fn call(&self, lane: Lane, call: Call<'_>) -> Result<()> {
        let size = self.engine.world_ranks().len();
        if size == 1 {
            // Nobody to talk to.
            return self.engine.call(lane, call);
        }
        let counts = sent(&call, self.engine.rank(), size);
        self.meter.call(call.signature().operation, counts, || self.engine.call(lane, call))
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The communication thread.
struct Worker {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let worker = self.worker.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Worker { jobs, thread }) = worker {
            if thread::panicking() {
                // What was started may wait for calls that will not come now: tell the others first.
                self.link.engine.abandon("it panicked");
            }
            drop(jobs);
            // The jobs catch nothing and panic nowhere; had one panicked, its result would have been missed already.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("rank", &self.rank()).field("world_ranks", &self.world_ranks()).finish()
    }
}

impl Communicator {
    /// A handle over an engine, for the rank that is the current thread.
    pub fn new(engine: Arc<dyn Collectives>) -> Self {
        Self::metered(engine, Arc::new(Meter::new()))
    }

    fn metered(engine: Arc<dyn Collectives>, meter: Arc<Meter>) -> Self {
        Self { inner: Arc::new(Inner { link: Link { engine, meter }, worker: Mutex::new(None) }) }
    }

    /// What this rank has sent, and how long it took, in this group and all others of its world.
    pub fn meter(&self) -> &Meter {
        &self.inner.link.meter
    }

    /// The number of this rank in the group, from 0.
    pub fn rank(&self) -> usize {
        self.inner.link.engine.rank()
    }

    /// The number of ranks in the group.
    pub fn size(&self) -> usize {
        self.world_ranks().len()
    }

    /// The world's number of each rank of the group; errors name ranks by these.
    pub fn world_ranks(&self) -> &[usize] {
        self.inner.link.engine.world_ranks()
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    ///
    /// As all collectives: [`CommError::RankLost`], [`CommError::Timeout`], [`CommError::Mismatch`].
    pub fn barrier(&self) -> Result<()> {
        self.inner.link.call(Lane::Blocking, Call::Barrier)
    }

    /// Reduces `data`, of the same length on all ranks, in place.
    ///
    /// It is a reduce-scatter, in which each rank reduces a part, and an all-gather of the parts.
    ///
    /// # Errors
    ///
    /// Other lengths, types or operations on other ranks, lost and late ranks.
    pub fn all_reduce<T: Element>(&self, data: &mut [T], op: ReduceOp) -> Result<()> {
        let data = T::bytes_mut(data);
        self.inner.link.call(Lane::Blocking, Call::AllReduce { data, dtype: T::DTYPE, op })
    }

    /// Reduces `data`, of the same length on all ranks, and gives each rank a part of the result.
    ///
    /// The parts follow each other in the order of the ranks, each as long as that rank's `out`; together they are as long as `data`.
    ///
    /// # Errors
    ///
    /// Parts of another length together, other lengths of `data`, types or operations on other ranks, lost and late ranks.
    pub fn reduce_scatter<T: Element>(&self, data: &[T], out: &mut [T], op: ReduceOp) -> Result<()> {
        let (data, out) = (T::bytes(data), T::bytes_mut(out));
        self.inner.link.call(Lane::Blocking, Call::ReduceScatter { data, out, dtype: T::DTYPE, op })
    }

    /// Puts the `data` of all ranks, which may differ in length, one after the other into `out` in the order of the ranks.
    ///
    /// # Errors
    ///
    /// An `out` that is not as long as all parts together, other lengths of `out` or types on other ranks, lost and late ranks.
    pub fn all_gather<T: Element>(&self, data: &[T], out: &mut [T]) -> Result<()> {
        let (data, out) = (T::bytes(data), T::bytes_mut(out));
        self.inner.link.call(Lane::Blocking, Call::AllGather { data, out, dtype: T::DTYPE })
    }

    /// Sends to each rank its part of `data`, `counts[rank]` elements in the order of the ranks, and returns what came for this
    /// one in the order of the senders, with the number of elements of each.
    ///
    /// # Errors
    ///
    /// Counts that are not one per rank or do not add up to `data`, other types on other ranks, lost and late ranks.
    pub fn all_to_all<T: Element>(&self, data: &[T], counts: &[usize]) -> Result<(Vec<T>, Vec<usize>)> {
        self.check_counts(data.len(), counts)?;
        all_to_all(&self.inner.link, Lane::Blocking, data, counts)
    }

    /// Copies the `data` of `root` to all other ranks, where it is of the same length.
    ///
    /// # Errors
    ///
    /// A root that is no rank of the group, other roots, lengths or types on other ranks, lost and late ranks.
    pub fn broadcast<T: Element>(&self, data: &mut [T], root: usize) -> Result<()> {
        self.check_rank("broadcast", root)?;
        let data = T::bytes_mut(data);
        self.inner.link.call(Lane::Blocking, Call::Broadcast { data, dtype: T::DTYPE, root })
    }

    /// Hands `data` over for rank `to` and returns at once: the message is on its way without a further call, and between threads it is
    /// never copied. Messages from one rank to another with one tag arrive in their order.
    ///
    /// # Errors
    ///
    /// A receiver that is no other rank of the group, or is lost.
    pub fn send<T: Element>(&self, data: Vec<T>, to: usize, tag: u32) -> Result<()> {
        self.check_peer("send", to)?;
        let Link { engine, meter } = &self.inner.link;
        let bytes = size_of_val(&data[..]) as u64;
        engine.send(to, tag, T::into_buffer(data))?;
        meter.count(bytes, 1);
        Ok(())
    }

    /// Waits for the next message from rank `from` with this tag.
    ///
    /// # Errors
    ///
    /// A sender that is no other rank of the group, is lost, or sends nothing in time; a message of another type.
    pub fn recv<T: Element>(&self, from: usize, tag: u32) -> Result<Vec<T>> {
        self.start_recv(from, tag)?.wait()
    }

    /// Takes the next message from rank `from` with this tag, which [`Pending::wait`] waits for. Messages go to `recv` and
    /// `start_recv` in the order of these calls, whatever the order of the waits.
    ///
    /// # Errors
    ///
    /// A sender that is no other rank of the group; when waiting, as [`recv`](Self::recv).
    pub fn start_recv<T: Element>(&self, from: usize, tag: u32) -> Result<Pending<Vec<T>>> {
        self.check_peer("recv", from)?;
        let Link { engine, meter } = self.inner.link.clone();
        let place = engine.post_recv(from, tag)?;
        Ok(Pending::new(move || {
            let operation = Operation::Recv { from, tag };
            let message = meter.call(operation, (0, 0), || engine.recv(from, tag, place))?;
            let got = format!("{} {}", message.len(), message.dtype());
            let ranks = engine.world_ranks();
            T::from_buffer(message).ok_or_else(|| CommError::WrongType {
                from: ranks[from],
                got,
                at: ranks[engine.rank()],
                call: Signature { operation, data: None },
            })
        }))
    }

    /// [`barrier`](Self::barrier) in the background.
    ///
    /// # Errors
    ///
    /// The communication thread cannot be started; when waiting, as `barrier`.
    pub fn start_barrier(&self) -> Result<Pending<()>> {
        self.start(Operation::Barrier, |link| link.call(Lane::Background, Call::Barrier))
    }

    /// [`all_reduce`](Self::all_reduce) in the background; gives `data` back, reduced.
    ///
    /// # Errors
    ///
    /// The communication thread cannot be started; when waiting, as `all_reduce`.
    pub fn start_all_reduce<T: Element>(&self, mut data: Vec<T>, op: ReduceOp) -> Result<Pending<Vec<T>>> {
        self.start(Operation::AllReduce(op), move |link| {
            let call = Call::AllReduce { data: T::bytes_mut(&mut data), dtype: T::DTYPE, op };
            link.call(Lane::Background, call).map(|()| data)
        })
    }

    /// [`reduce_scatter`](Self::reduce_scatter) in the background; gives `out`, then this rank's part, and `data` back.
    ///
    /// # Errors
    ///
    /// The communication thread cannot be started; when waiting, as `reduce_scatter`.
    pub fn start_reduce_scatter<T: Element>(
        &self,
        data: Vec<T>,
        mut out: Vec<T>,
        op: ReduceOp,
    ) -> Result<Pending<(Vec<T>, Vec<T>)>> {
        self.start(Operation::ReduceScatter(op), move |link| {
            let call = Call::ReduceScatter { data: T::bytes(&data), out: T::bytes_mut(&mut out), dtype: T::DTYPE, op };
            link.call(Lane::Background, call).map(|()| (out, data))
        })
    }

    /// [`all_gather`](Self::all_gather) in the background; gives all parts, `len` elements together.
    ///
    /// # Errors
    ///
    /// The communication thread cannot be started; when waiting, as `all_gather`.
    pub fn start_all_gather<T: Element>(&self, data: Vec<T>, len: usize) -> Result<Pending<Vec<T>>> {
        self.start(Operation::AllGather, move |link| {
            let mut out = vec![T::default(); len];
            let call = Call::AllGather { data: T::bytes(&data), out: T::bytes_mut(&mut out), dtype: T::DTYPE };
            link.call(Lane::Background, call).map(|()| out)
        })
    }

    /// [`all_to_all`](Self::all_to_all) in the background.
    ///
    /// # Errors
    ///
    /// Counts that are not one per rank or do not add up to `data`, or the communication thread cannot be started; when waiting, as
    /// `all_to_all`.
    pub fn start_all_to_all<T: Element>(
        &self,
        data: Vec<T>,
        counts: Vec<usize>,
    ) -> Result<Pending<(Vec<T>, Vec<usize>)>> {
        self.check_counts(data.len(), &counts)?;
        self.start(Operation::AllToAll, move |link| all_to_all(link, Lane::Background, &data, &counts))
    }

    /// [`broadcast`](Self::broadcast) in the background; gives `data` back, which is then the root's.
    ///
    /// # Errors
    ///
    /// A root that is no rank of the group, or the communication thread cannot be started; when waiting, as `broadcast`.
    pub fn start_broadcast<T: Element>(&self, mut data: Vec<T>, root: usize) -> Result<Pending<Vec<T>>> {
        self.check_rank("broadcast", root)?;
        self.start(Operation::Broadcast { root }, move |link| {
            let call = Call::Broadcast { data: T::bytes_mut(&mut data), dtype: T::DTYPE, root };
            link.call(Lane::Background, call).map(|()| data)
        })
    }

    /// Splits the group: all ranks that give the same color form a new one, ordered by `key` and, where keys are equal, by
    /// rank. Without a color a rank is in no new group and gets `None`. All ranks of the group must call it.
    ///
    /// # Errors
    ///
    /// As all collectives.
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        let Link { engine, meter } = &self.inner.link;
        let others = self.size() as u64 - 1;
        // A color and a key to each other rank.
        let counts = (2 * size_of::<i64>() as u64 * others, others);
        let part = meter.call(Operation::Split, counts, || engine.split(color, key))?;
        Ok(part.map(|engine| Self::metered(engine, meter.clone())))
    }

    /// Hands a job to the communication thread, which is started by the first one.
    fn start<R: Send + 'static>(
        &self,
        operation: Operation,
        job: impl FnOnce(&Link) -> Result<R> + Send + 'static,
    ) -> Result<Pending<R>> {
        let failed = |why: String| CommError::Engine { operation: "start the communication thread", why };
        let mut worker = self.inner.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = match &mut *worker {
            Some(worker) => worker,
            none => {
                let (jobs, queue) = mpsc::channel::<Job>();
                let name = format!("comm-{}", self.world_ranks()[self.rank()]);
                let work = move || queue.into_iter().for_each(|job| job());
                let thread =
                    thread::Builder::new().name(name).spawn(work).map_err(|error| failed(error.to_string()))?;
                none.insert(Worker { jobs, thread })
            }
        };
        let link = self.inner.link.clone();
        let (meter, alone) = (link.meter.clone(), self.size() == 1);
        let (result, done): (_, Receiver<Result<R>>) = mpsc::sync_channel(1);
        let job = Box::new(move || {
            // Nobody may be waiting any more: the others still need this rank's part.
            let _ = result.send(job(&link));
        });
        worker.jobs.send(job).map_err(|_| failed("it has ended".to_owned()))?;
        Ok(Pending::new(move || {
            let ended =
                |_| CommError::Engine { operation: "wait", why: "the communication thread has ended".to_owned() };
            let wait = || done.recv().map_err(ended);
            if alone { wait()? } else { meter.await_background(operation, wait)? }
        }))
    }

    fn check_counts(&self, len: usize, counts: &[usize]) -> Result<()> {
        if counts.len() == self.size() && counts.iter().sum::<usize>() == len {
            return Ok(());
        }
        Err(CommError::Argument {
            operation: "all_to_all",
            expected: format!("{} counts that add up to {len}", self.size()),
            got: format!("{} that add up to {}", counts.len(), counts.iter().sum::<usize>()),
        })
    }

    fn check_rank(&self, operation: &'static str, rank: usize) -> Result<()> {
        if rank < self.size() {
            return Ok(());
        }
        let expected = format!("a rank of the group, 0 to {}", self.size() - 1);
        Err(CommError::Argument { operation, expected, got: rank.to_string() })
    }

    fn check_peer(&self, operation: &'static str, rank: usize) -> Result<()> {
        self.check_rank(operation, rank)?;
        if rank != self.rank() {
            return Ok(());
        }
        let (expected, got) = ("another rank of the group".to_owned(), format!("{rank}, which is this one"));
        Err(CommError::Argument { operation, expected, got })
    }
}

fn all_to_all<T: Element>(link: &Link, lane: Lane, data: &[T], counts: &[usize]) -> Result<(Vec<T>, Vec<usize>)> {
    let (mut out, mut out_counts) = (T::into_buffer(vec![]), vec![]);
    let call =
        Call::AllToAll { data: T::bytes(data), dtype: T::DTYPE, counts, out: &mut out, out_counts: &mut out_counts };
    link.call(lane, call)?;
    // Ranks have agreed on the type.
    Ok((T::from_buffer(out).unwrap_or_default(), out_counts))
}

/// Something under way. Dropped without a wait, it is done all the same, but its result and error are lost.
#[must_use = "its result and error come from `wait`"]
pub struct Pending<R> {
    wait: Box<dyn FnOnce() -> Result<R> + Send>,
}

impl<R> Pending<R> {
    fn new(wait: impl FnOnce() -> Result<R> + Send + 'static) -> Self {
        Self { wait: Box::new(wait) }
    }

    /// Waits for the result.
    ///
    /// # Errors
    ///
    /// Those of the operation.
    pub fn wait(self) -> Result<R> {
        (self.wait)()
    }
}

impl<R> fmt::Debug for Pending<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}
