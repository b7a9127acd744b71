//! On how many ranks `firebox train` runs, and how they start.

use std::time::Duration;

use clap::Args;
use firebox::models::transformer::ContextKind;
#[cfg(feature = "mpi")]
use firebox::parallel::Mpi;
use firebox::parallel::pipeline::Schedule;
use firebox::parallel::{Communicator, Failure, Threads, WorldError};
use firebox::tensor::threads::for_rank;
use firebox::train::{Layout, TrainError, Zero};

use super::CliError;

/// Options of runs on several ranks. The parameters are those of one rank, bit for bit; a run goes on with any number of ranks.
#[derive(Args, Clone)]
pub struct RankArgs {
    /// Train on N ranks, threads of this process that share the micro-batches of every step; each has its share of the compute threads. Under mpirun the ranks
    /// are its processes instead.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    ranks: Option<u16>,
    /// What ranks divide among themselves (ZeRO): 0 nothing, 1 or 2 the optimizer's state and the sums of gradients, 3 the parameters too: those of a block are
    /// brought together when it runs, and blocks are recomputed in backward.
    #[arg(long, value_name = "LEVEL", default_value = "0", value_parser = zero)]
    zero: Zero,
    /// Copies of what --zero divides, for hybrid sharding: N groups of ranks each divide it among themselves. A divisor of the ranks.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    dp_replicate: u16,
    /// Ranks that divide the model: each has some of its blocks, and they work as a pipeline. The others have copies. A divisor of the ranks.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pp: u16,
    /// In which order a pipeline works: afab, 1f1b, interleaved (2 stages a rank), zb-h1 or zb-v.
    #[arg(long, value_name = "NAME", default_value = "1f1b", value_parser = schedule)]
    schedule: Schedule,
    /// Ranks that divide the tokens of each row (context parallel): for long contexts. They have all of the model, and add up their gradients as ranks with data
    /// of their own do.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    cp: u16,
    /// How their attention comes together: ring (keys and values go round) or ulysses (each rank gets all tokens of some heads).
    #[arg(long, value_name = "NAME", default_value = "ring", value_parser = context)]
    cp_kind: ContextKind,
    /// Ranks that divide each matrix (tensor parallel): they talk twice in each block, so keep them on one machine.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    tp: u16,
    /// Divide the tokens between the matrices as well (sequence parallel), with --tp.
    #[arg(long)]
    sequence_parallel: bool,
    /// Ranks that divide the experts of a mixture (expert parallel): every token travels to the ranks of its experts and back. They share the data with the others: a
    /// divisor of the ranks that have data of their own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    ep: u16,
    /// Seconds that a rank waits for another before the run fails and names it.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    rank_timeout: u64,
    /// Ranks whose progress is shown too, by number and comma, or `all`: only the first speaks otherwise.
    #[arg(long, value_name = "RANKS", value_parser = LogRanks::parse)]
    log_rank: Option<LogRanks>,
}

/// Whose progress is shown.
#[derive(Clone)]
pub enum LogRanks {
    All,
    These(Vec<usize>),
}

impl LogRanks {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let numbers = text.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        numbers.map(Self::These).map_err(|_| format!("expected numbers of ranks such as 1,3 or all, got {text}"))
    }

    /// Whether a rank of `size` is among them.
    pub fn has(&self, rank: usize, size: usize) -> Result<bool, CliError> {
        match self {
            Self::All => Ok(true),
            Self::These(ranks) => match ranks.iter().find(|rank| **rank >= size) {
                None => Ok(ranks.contains(&rank)),
                Some(missing) => {
                    let expected = format!("numbers of ranks from 0 to {}", size - 1);
                    Err(TrainError::Input { what: "--log-rank", expected, got: missing.to_string() }.into())
                }
            },
        }
    }
}

fn zero(text: &str) -> Result<Zero, String> {
    Zero::try_from(text.parse::<u8>().map_err(|_| format!("expected 0, 1, 2 or 3, got {text}"))?)
}

fn schedule(text: &str) -> Result<Schedule, String> {
    match text {
        "afab" => Ok(Schedule::AllForwardAllBackward),
        "1f1b" => Ok(Schedule::OneForwardOneBackward),
        "interleaved" => Ok(Schedule::Interleaved { stages_per_rank: 2 }),
        "zb-h1" => Ok(Schedule::ZeroBubbleH1),
        "zb-v" => Ok(Schedule::ZeroBubbleV),
        _ => Err("expected afab, 1f1b, interleaved, zb-h1 or zb-v".to_owned()),
    }
}

fn context(text: &str) -> Result<ContextKind, String> {
    match text {
        "ring" => Ok(ContextKind::Ring),
        "ulysses" => Ok(ContextKind::Ulysses),
        _ => Err("expected ring or ulysses".to_owned()),
    }
}

impl RankArgs {
    /// The least number of ranks for such a layout.
    pub fn least(&self) -> usize {
        usize::from(self.dp_replicate.max(self.ep)) * self.with_the_same_data()
    }

    /// Ranks that have the same rows.
    pub fn with_the_same_data(&self) -> usize {
        [self.cp, self.pp, self.tp].into_iter().map(usize::from).product()
    }

    /// What the number of those that have other rows must be a multiple of.
    pub fn data_degrees(&self) -> [usize; 2] {
        [self.dp_replicate, self.ep].map(usize::from)
    }

    /// Whether these must have equally many micro-batches.
    pub fn is_even(&self) -> bool {
        self.pp * self.ep > 1
    }

    /// Whose progress is shown besides the first's.
    pub fn logged(&self) -> Option<LogRanks> {
        self.log_rank.clone()
    }

    /// Runs `train` on every rank, on its share of `threads`; what the first one returns.
    pub fn run<T: Send + 'static>(
        self,
        threads: usize,
        train: impl Fn(Option<(Communicator, Layout)>) -> Result<T, CliError> + Send + Sync + 'static,
    ) -> Result<T, CliError> {
        let layout = Layout {
            zero: self.zero,
            dp_replicate: usize::from(self.dp_replicate),
            pp: usize::from(self.pp),
            schedule: self.schedule,
            cp: usize::from(self.cp),
            context: self.cp_kind,
            tp: usize::from(self.tp),
            sequence_parallel: self.sequence_parallel,
            ep: usize::from(self.ep),
        };
        let timeout = Duration::from_secs(self.rank_timeout);
        #[cfg(feature = "mpi")]
        if is_rank() {
            return Mpi::default().timeout(timeout).run(|comm| train(Some((comm, layout)))).map_err(failed);
        }
        let ranks = self.ranks.map_or(self.least(), usize::from);
        if ranks == 1 {
            return train(None);
        }
        let run = move |comm: Communicator| {
            let _threads = for_rank(threads / ranks)?;
            train(Some((comm, layout)))
        };
        let mut results = Threads::new(ranks).timeout(timeout).run(run).map_err(failed)?;
        Ok(results.swap_remove(0))
    }
}

/// What MPI's launchers and Slurm call the number of a process.
const RANK: [&str; 3] = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"];

/// Whether this process was started by one of them.
pub fn is_rank() -> bool {
    RANK.iter().any(|name| std::env::var_os(name).is_some())
}

/// What launchers call the number of processes that share a machine.
const LOCAL_SIZE: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"];

/// The compute threads of this process where nobody says how many; 0 for one per core. A process of MPI has its share of the machine's cores, unless its
/// launcher has bound it to some.
pub fn default_threads() -> usize {
    let said = std::env::var_os("RAYON_NUM_THREADS").is_some();
    if said || !cfg!(feature = "mpi") || !is_rank() {
        return 0;
    }
    let local = LOCAL_SIZE.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok()).unwrap_or(1);
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    #[cfg(unix)]
    // SAFETY: a question to the system.
    let all = usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(usable);
    #[cfg(not(unix))]
    let all = usable;
    if usable == all { (usable / local.max(1)).max(1) } else { usable }
}

/// Whether this process is the one that tells the user what happens: not the second of many.
pub fn speaks() -> bool {
    let rank = RANK.iter().find_map(|name| std::env::var(name).ok());
    !cfg!(feature = "mpi") || rank.is_none_or(|rank| rank == "0")
}

/// What the user can mend is said as on one rank.
fn failed(error: WorldError<CliError>) -> CliError {
    match error {
        WorldError { failure: Failure::Error(error), .. } if error.exit_code() == 2 => error,
        other => CliError::Ranks(other.to_string()),
    }
}
