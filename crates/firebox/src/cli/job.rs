//! A run of any task, as commands start it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use firebox::data::Dataset;
use firebox::parallel::Communicator;
use firebox::tensor::device::{Backend, is_fused};
use firebox::tensor::peak;
use firebox::train::checkpoint::Checkpoint;
use firebox::train::engine::Recompute;
use firebox::train::observe::compare::gzip_xz;
use firebox::train::observe::{Event, Observer, Observers, Progress, Summary};
use firebox::train::task::Model;
use firebox::train::{Layout, Recipe, Trainer, Zero};

use super::CliError;
use super::ranks::{LogRanks, RankArgs, is_rank};

/// A run that is about to start, on one rank or several.
pub struct Job {
    pub recipe: Recipe,
    /// Folder of the run.
    pub dir: PathBuf,
    /// What it goes on from.
    pub found: Option<Checkpoint>,
    /// Its data, in a few words.
    pub described: String,
    pub backend: Backend,
    /// Of all ranks of this process together.
    pub threads: usize,
    pub timeline: bool,
    pub logged: Option<LogRanks>,
    pub interrupt: Arc<AtomicBool>,
}

/// What is known of a task when the data have been read; each rank makes its trainer from it.
pub trait Start: Send + Sync + 'static {
    type Model: Model;

    /// The trainer of a new run; or of one that goes on from `job.found`, which has the parameters of that checkpoint and is restored later.
    fn trainer<'a>(&'a self, job: &Job, device: &Device) -> Result<Trainer<'a, Self::Model>, CliError>;
}

impl Job {
    /// Trains on all ranks.
    pub fn run(self, ranks: RankArgs, start: impl Start) -> Result<Summary, CliError> {
        ranks.run(self.threads, move |ranks| self.train(&start, ranks))
    }

    fn train<S: Start>(&self, start: &S, ranks: Option<(Communicator, Layout)>) -> Result<Summary, CliError> {
        let Self { recipe, dir, found, .. } = self;
        let device = self.backend.device()?;
        let mut trainer = start.trainer(self, &device)?;
        let (rank, size) = ranks.as_ref().map_or((0, 1), |(comm, _)| (comm.rank(), comm.size()));
        let recomputed = ranks.as_ref().is_some_and(|(_, layout)| layout.zero == Zero::Parameters)
            && recipe.memory.recompute != Recompute::Blocks;
        if rank == 0 {
            println!("\n{}\n{}", recipe.to_toml().trim_end(), trainer.groups()?);
        }
        let logged = self.logged.as_ref().map(|logged| logged.has(rank, size)).transpose()?;
        if let Some((comm, layout)) = ranks {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        if let Some(checkpoint) = found {
            trainer.restore(checkpoint)?;
        }
        if self.timeline {
            trainer = trainer.with_timeline();
        }
        let mut info = trainer.info(self.backend.name(), self.threads, self.described.clone());
        info.program = program();
        if rank > 0 {
            let mut observers = Observers::new();
            if logged == Some(true) {
                observers.push(Progress::of_rank(rank));
                observers.on_event(&Event::RunStarted(&info))?;
            }
            return Ok(trainer.run(&info, &mut observers, &self.interrupt)?);
        }
        if size > 1 {
            let per_rank = if is_rank() { self.threads } else { (self.threads / size).max(1) };
            println!("{size} ranks of {per_rank} compute thread{}", if per_rank == 1 { "" } else { "s" });
            if recomputed {
                println!(
                    "blocks are computed again in backward, as with memory.recompute = \"blocks\": --zero 3 keeps no graph"
                );
            }
        }
        println!();
        if is_fused(&device) {
            info.peak_flops = peak::measure_matmul_flops(recipe.precision.compute.into()) * size as f64;
        }
        let mut observers = if logged.is_some() { Observers::files() } else { Observers::standard() };
        if logged.is_some() {
            // Lines, like those of the others.
            observers.push(Progress::of_rank(rank));
        }
        observers.on_event(&Event::RunStarted(&info))?;
        if let Some((dataset, _)) = trainer.task().language()
            && !dataset.val.is_empty()
            && !dir.join("baselines.json").is_file()
        {
            compare(dataset, dir)?;
        }
        Ok(trainer.run(&info, &mut observers, &self.interrupt)?)
    }
}

/// More held-out text than this is not compared: xz takes half a second for a megabyte.
const COMPARED_BYTES: u64 = 64 << 20;

/// What gzip and xz make of the held-out files, for the report.
fn compare(dataset: &Dataset, dir: &std::path::Path) -> Result<(), CliError> {
    if dataset.stats.val_bytes > COMPARED_BYTES {
        println!("the held-out text is larger than 64 MB: not compared with gzip and xz");
        return Ok(());
    }
    let baselines = gzip_xz(dataset.val_documents()).map_err(CliError::Output)?;
    baselines.save(dir)?;
    Ok(())
}

/// How this binary was called, for commands to copy.
pub fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "firebox".into())
}
