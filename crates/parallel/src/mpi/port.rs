//! Framed messages over MPI: a header and, unless it is empty, a payload, each a non-blocking send of its own.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;

use crate::collectives::{Lane, Operation, Signature};
use crate::element::{Buffer, DType, ReduceOp};
use crate::error::{CommError, Result};

/// MPI's tags of headers and payloads.
const HEADER: c_int = 1;
const PAYLOAD: c_int = 2;

/// MPI counts in `int`: larger payloads go in pieces.
const PIECE: usize = 1 << 30;

/// What a message is about.
const DATA: i64 = 0;
const LEFT: i64 = 1;
const LOST: i64 = 2;

/// Between two polls of the progress thread: what a message may wait while its rank computes.
const PROGRESS: Duration = Duration::from_micros(200);

/// kind, context, channel, dtype, length; of the call: operation, its two numbers, dtype (-1 for none), length.
type Header = [i64; 10];

/// The channel of a lane's collectives. Tags have 32 bits and come before.
pub(super) fn lane_channel(lane: Lane) -> i64 {
    (1 << 32) + lane as i64
}

/// The channel of messages with a tag.
pub(super) fn tag_channel(tag: u32) -> i64 {
    i64::from(tag)
}

/// A message that has arrived.
pub(super) struct Received {
    pub call: Signature,
    pub data: Buffer,
}

/// This process's end of MPI.
pub(super) struct Link {
    pub rank: usize,
    pub size: usize,
    port: Mutex<Port>,
    stopped: AtomicBool,
    /// Threads that poll: while there are any, the progress thread need not.
    polling: AtomicUsize,
}

/// Counts a thread that polls for as long as it lives.
pub(super) struct Polling<'a>(&'a AtomicUsize);

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Port {
    inbox: Inbox,
    outgoing: Vec<Outgoing>,
    incoming: Vec<Incoming>,
}

// SAFETY: requests are handles that any thread may use while no other does, given MPI_THREAD_SERIALIZED, which `start` demands; all
// calls of MPI are made by whoever holds the lock around the port.
unsafe impl Send for Port {}

/// What has arrived and waits to be taken.
#[derive(Default)]
pub(super) struct Inbox {
    /// By sender, context, channel and place in the channel.
    messages: HashMap<(usize, i64, i64, u64), Received>,
    /// Messages begun in each channel.
    places: HashMap<(usize, i64, i64), u64>,
    /// Messages of each sender whose payload is still on its way.
    on_their_way: HashMap<usize, usize>,
    /// Ranks that have ended, and why; the first to be lost.
    left: HashMap<usize, String>,
    lost: Option<(usize, String)>,
}

impl Inbox {
    /// Whether a message is here or on its way.
    pub fn has_begun(&self, from: usize, context: i64, channel: i64, place: u64) -> bool {
        self.places.get(&(from, context, channel)).is_some_and(|begun| *begun > place)
    }

    pub fn take(&mut self, from: usize, context: i64, channel: i64, place: u64) -> Option<Received> {
        self.messages.remove(&(from, context, channel, place))
    }

    /// The first rank that failed, or one of `needed` that has ended and of which nothing is on its way.
    pub fn gone(&self, needed: &[usize]) -> Option<(usize, String)> {
        let waits = |rank: &usize| self.on_their_way.get(rank).is_some_and(|n| *n > 0);
        let left =
            || needed.iter().filter(|rank| !waits(rank)).find_map(|rank| Some((*rank, self.left.get(rank)?.clone())));
        self.lost.clone().or_else(left)
    }
}

/// A message that MPI may still read.
struct Outgoing {
    requests: Vec<ffi::MPI_Request>,
    _header: Box<Header>,
    _payload: Arc<Buffer>,
}

/// A message into which MPI may still write.
struct Incoming {
    from: usize,
    place: u64,
    header: Header,
    requests: Vec<ffi::MPI_Request>,
    data: Buffer,
}

impl Link {
    /// Starts MPI.
    pub fn start() -> Result<(Universe, Self)> {
        let failed = |why: &str| CommError::Engine { operation: "start MPI", why: why.to_owned() };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| failed("it has been started in this process before"))?;
        if threading < Threading::Serialized {
            return Err(failed("this MPI was built without support for threads; MPI_THREAD_SERIALIZED is needed"));
        }
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI has been started, and its world is valid until it ends.
        unsafe {
            check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(world(), ffi::RSMPI_ERRORS_RETURN))?;
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(world(), &mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(world(), &mut size))?;
        }
        let port = Port { inbox: Inbox::default(), outgoing: vec![], incoming: vec![] };
        let link = Self {
            rank: rank as usize,
            size: size as usize,
            port: Mutex::new(port),
            stopped: AtomicBool::new(false),
            polling: AtomicUsize::new(0),
        };
        Ok((universe, link))
    }

    /// To be held by a thread for as long as it calls [`poll`](Self::poll) again and again.
    pub fn polling(&self) -> Polling<'_> {
        self.polling.fetch_add(1, Ordering::AcqRel);
        Polling(&self.polling)
    }

    /// Makes progress and looks at what has arrived. Returns whether messages are on their way, which need further polls.
    pub fn poll(&self, look: impl FnOnce(&mut Inbox) -> Result<()>) -> Result<bool> {
        let mut port = self.lock();
        port.progress()?;
        look(&mut port.inbox)?;
        Ok(port.busy())
    }

    /// Begins to send; MPI keeps a share of the payload until it is done.
    pub fn send(&self, to: usize, context: i64, channel: i64, call: Signature, payload: Arc<Buffer>) -> Result<()> {
        let (operation, a, b) = encode(call.operation);
        let (dtype, len) = call.data.map_or((-1, 0), |(dtype, len)| (dtype_code(dtype), len as i64));
        let sent = (dtype_code(payload.dtype()), payload.len() as i64);
        let header = [DATA, context, channel, sent.0, sent.1, operation, a, b, dtype, len];
        self.lock().send(to, header, payload)
    }

    /// Tells all ranks that this one ends, having made all its calls.
    pub fn say_left(&self) {
        self.say(LEFT, "it has ended");
    }

    /// Tells all ranks that this one has failed.
    pub fn say_lost(&self, why: &str) {
        self.say(LOST, why);
    }

    /// Whether another rank has told that it failed.
    pub fn lost_another(&self) -> bool {
        self.lock().inbox.lost.is_some()
    }

    fn say(&self, kind: i64, why: &str) {
        let text = Arc::new(Buffer::U8(why.as_bytes().to_vec()));
        let header = [kind, 0, 0, dtype_code(DType::U8), text.len() as i64, 0, 0, 0, -1, 0];
        let mut port = self.lock();
        for other in (0..self.size).filter(|other| *other != self.rank) {
            // A rank that cannot be told will notice by the timeout.
            let _ = port.send(other, header, text.clone());
        }
    }

    /// Makes progress until all that was sent is out, but no longer than `limit`.
    pub fn flush(&self, limit: Duration) {
        let start = Instant::now();
        while start.elapsed() < limit {
            let mut port = self.lock();
            if port.progress().is_err() || port.outgoing.is_empty() {
                return;
            }
            drop(port);
            thread::yield_now();
        }
    }

    /// Ends [`progress_until_stopped`](Self::progress_until_stopped).
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// The progress thread.
    pub fn progress_until_stopped(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            let mut busy = false;
            if self.polling.load(Ordering::Acquire) == 0 {
                let mut port = self.lock();
                if port.progress().is_err() {
                    // Whoever waits will see the same error.
                    return;
                }
                busy = port.busy();
            }
            // MPI moves large messages a piece a poll.
            if busy { thread::yield_now() } else { thread::sleep(PROGRESS) }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    fn send(&mut self, to: usize, header: Header, payload: Arc<Buffer>) -> Result<()> {
        let header = Box::new(header);
        let mut requests = vec![];
        // SAFETY: header and payload live in the entry of `outgoing` until MPI is done with them, also after an error.
        let sent = unsafe {
            isend(header.as_ptr().cast(), size_of::<Header>(), to, HEADER, &mut requests).and_then(|()| {
                payload
                    .bytes()
                    .chunks(PIECE)
                    .try_for_each(|piece| isend(piece.as_ptr(), piece.len(), to, PAYLOAD, &mut requests))
            })
        };
        self.outgoing.push(Outgoing { requests, _header: header, _payload: payload });
        sent
    }

    /// Whether messages are on their way, in or out.
    fn busy(&self) -> bool {
        !self.outgoing.is_empty() || !self.incoming.is_empty()
    }

    /// Lets MPI work, takes in new headers, and files what is complete.
    fn progress(&mut self) -> Result<()> {
        for outgoing in &mut self.outgoing {
            done(&mut outgoing.requests)?;
        }
        self.outgoing.retain(|outgoing| !outgoing.requests.is_empty());
        while let Some((from, header)) = next_header()? {
            let data = Buffer::zeros(dtype_of(header[3])?, usize::try_from(header[4]).map_err(|_| damaged())?);
            let key = (from, header[1], header[2]);
            let next = self.inbox.places.entry(key).or_default();
            let place = *next;
            if header[0] == DATA {
                *next += 1;
            }
            *self.inbox.on_their_way.entry(from).or_default() += 1;
            let mut incoming = Incoming { from, place, header, requests: vec![], data };
            let Incoming { data, requests, .. } = &mut incoming;
            // SAFETY: the buffer is on the heap and lives in the entry of `incoming` until MPI is done with it.
            let begun = data
                .bytes_mut()
                .chunks_mut(PIECE)
                .try_for_each(|piece| unsafe { irecv(piece.as_mut_ptr(), piece.len(), from, requests) });
            self.incoming.push(incoming);
            begun?;
        }
        for incoming in &mut self.incoming {
            done(&mut incoming.requests)?;
        }
        for arrived in self.incoming.extract_if(.., |incoming| incoming.requests.is_empty()) {
            self.inbox.file(arrived)?;
        }
        Ok(())
    }
}

impl Inbox {
    fn file(&mut self, arrived: Incoming) -> Result<()> {
        let Incoming { from, place, header, data, .. } = arrived;
        if let Some(n) = self.on_their_way.get_mut(&from) {
            *n = n.saturating_sub(1);
        }
        match header[0] {
            DATA => {
                let operation = decode(header[5], header[6], header[7])?;
                let data_of_call = if header[8] < 0 { None } else { Some((dtype_of(header[8])?, header[9] as usize)) };
                let call = Signature { operation, data: data_of_call };
                self.messages.insert((from, header[1], header[2], place), Received { call, data });
            }
            kind => {
                let why = String::from_utf8_lossy(data.bytes()).into_owned();
                if kind == LOST {
                    self.lost.get_or_insert_with(|| (from, why.clone()));
                }
                self.left.insert(from, why);
            }
        }
        Ok(())
    }
}

fn world() -> ffi::MPI_Comm {
    // SAFETY: a constant of the MPI library.
    unsafe { ffi::RSMPI_COMM_WORLD }
}

fn check(operation: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    Err(CommError::Engine { operation, why: format!("MPI error {code}") })
}

fn damaged() -> CommError {
    let why = "a header that this build did not write; do all ranks run the same one?".to_owned();
    CommError::Engine { operation: "receive", why }
}

/// # Safety
///
/// The memory must stay as it is until the request that is pushed is done.
unsafe fn isend(
    data: *const u8,
    bytes: usize,
    to: usize,
    tag: c_int,
    requests: &mut Vec<ffi::MPI_Request>,
) -> Result<()> {
    // SAFETY: the caller's promise; the byte count fits, since pieces are at most 1 GiB.
    unsafe {
        let mut request = ffi::RSMPI_REQUEST_NULL;
        let code =
            ffi::MPI_Isend(data.cast(), bytes as c_int, ffi::RSMPI_UINT8_T, to as c_int, tag, world(), &mut request);
        check("MPI_Isend", code)?;
        requests.push(request);
    }
    Ok(())
}

/// # Safety
///
/// The memory must be left alone until the request that is pushed is done.
unsafe fn irecv(data: *mut u8, bytes: usize, from: usize, requests: &mut Vec<ffi::MPI_Request>) -> Result<()> {
    // SAFETY: as in `isend`.
    unsafe {
        let mut request = ffi::RSMPI_REQUEST_NULL;
        let code = ffi::MPI_Irecv(
            data.cast(),
            bytes as c_int,
            ffi::RSMPI_UINT8_T,
            from as c_int,
            PAYLOAD,
            world(),
            &mut request,
        );
        check("MPI_Irecv", code)?;
        requests.push(request);
    }
    Ok(())
}

/// Drops the requests that are done.
fn done(requests: &mut Vec<ffi::MPI_Request>) -> Result<()> {
    let mut outcome = Ok(());
    requests.retain_mut(|request| {
        let mut flag = 0;
        // SAFETY: a request of this process that is not done yet.
        let code = unsafe { ffi::MPI_Test(request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
        if let Err(error) = check("MPI_Test", code) {
            outcome = Err(error);
        }
        flag == 0
    });
    outcome
}

/// Takes the next header from any rank, if there is one.
fn next_header() -> Result<Option<(usize, Header)>> {
    let mut header: Header = [0; 10];
    let mut flag = 0;
    // SAFETY: MPI runs; a matched message is received once, into memory of the header's size, which is what every header has.
    unsafe {
        let mut found = ffi::RSMPI_MESSAGE_NULL;
        let mut status: ffi::MPI_Status = std::mem::zeroed();
        let code = ffi::MPI_Improbe(ffi::RSMPI_ANY_SOURCE, HEADER, world(), &mut flag, &mut found, &mut status);
        check("MPI_Improbe", code)?;
        if flag == 0 {
            return Ok(None);
        }
        let bytes = size_of::<Header>() as c_int;
        let to = header.as_mut_ptr().cast();
        check("MPI_Mrecv", ffi::MPI_Mrecv(to, bytes, ffi::RSMPI_UINT8_T, &mut found, ffi::RSMPI_STATUS_IGNORE))?;
        Ok(Some((status.MPI_SOURCE as usize, header)))
    }
}

fn dtype_code(dtype: DType) -> i64 {
    DType::ALL.iter().position(|other| *other == dtype).unwrap_or_default() as i64
}

fn dtype_of(code: i64) -> Result<DType> {
    usize::try_from(code).ok().and_then(|code| DType::ALL.get(code)).copied().ok_or_else(damaged)
}

fn encode(operation: Operation) -> (i64, i64, i64) {
    let op = |op: ReduceOp| ReduceOp::ALL.iter().position(|other| *other == op).unwrap_or_default() as i64;
    match operation {
        Operation::Barrier => (0, 0, 0),
        Operation::AllReduce(reduce) => (1, op(reduce), 0),
        Operation::ReduceScatter(reduce) => (2, op(reduce), 0),
        Operation::AllGather => (3, 0, 0),
        Operation::AllToAll => (4, 0, 0),
        Operation::Broadcast { root } => (5, root as i64, 0),
        Operation::Split => (6, 0, 0),
        Operation::Send { to, tag } => (7, to as i64, i64::from(tag)),
        Operation::Recv { from, tag } => (8, from as i64, i64::from(tag)),
    }
}

fn decode(code: i64, a: i64, b: i64) -> Result<Operation> {
    let op = || usize::try_from(a).ok().and_then(|a| ReduceOp::ALL.get(a)).copied().ok_or_else(damaged);
    Ok(match code {
        0 => Operation::Barrier,
        1 => Operation::AllReduce(op()?),
        2 => Operation::ReduceScatter(op()?),
        3 => Operation::AllGather,
        4 => Operation::AllToAll,
        5 => Operation::Broadcast { root: a as usize },
        6 => Operation::Split,
        7 => Operation::Send { to: a as usize, tag: b as u32 },
        8 => Operation::Recv { from: a as usize, tag: b as u32 },
        _ => return Err(damaged()),
    })
}
