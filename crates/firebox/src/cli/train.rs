//! `firebox train` and `firebox recipe`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use clap::Args;
use firebox::train::checkpoint::{Checkpoint, CheckpointError, Found, find_latest, resolve};
use firebox::train::observe::Summary;
use firebox::train::recipe::BUILT_IN;
use firebox::train::task::TaskRecipe;
use firebox::train::{Cooldown, Recipe, TrainError};

use super::job::{Job, program};
use super::launch::{self, LaunchArgs};
use super::prepare::DataArgs;
use super::ranks::{RankArgs, speaks};
use super::{CliError, DeviceArgs, tasks};

/// Examples:
///   firebox train                                   the default run
///   firebox train shakespeare-char --data input.txt nanoGPT's CPU setting
///   firebox train my.toml --set optimizer.lr=3e-4   your recipe, one value changed
///   firebox train --depth 6 --data 'books/*.txt'    everything follows from the depth
///   firebox train --resume --out runs/default       go on where it stopped
///   firebox train my.toml --init runs/default --out runs/tuned
///                                                   another run that starts from its parameters
///   firebox train --cooldown-from runs/long/checkpoints/step-800 --steps 200
///                                                   let its learning rate decay, in a run of its own
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct TrainArgs {
    /// Built-in name (`firebox recipe list`) or TOML file. Default: `default`, or with --resume the recipe of the run.
    recipe: Option<String>,
    #[command(flatten)]
    data: DataArgs,
    /// Folder of the run. Default: runs/NAME.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Value of the recipe, such as optimizer.lr=3e-4; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Number of blocks, from which width, learning rate, batch and length follow; instead of a recipe.
    #[arg(long, value_name = "N", conflicts_with = "recipe")]
    depth: Option<usize>,
    /// Go on from the last whole checkpoint in --out.
    #[arg(long)]
    resume: bool,
    /// Branch off a run whose learning rate is at its peak (a constant or wsd schedule): from this checkpoint, or the last of this run, the rate decays over
    /// --steps in a new run.
    #[arg(long, value_name = "CHECKPOINT", requires = "steps", conflicts_with_all = ["recipe", "depth", "resume", "seed"])]
    cooldown_from: Option<PathBuf>,
    /// Steps of the cooldown.
    #[arg(long, value_name = "N", requires = "cooldown_from")]
    steps: Option<u64>,
    /// Start from the parameters of this run, checkpoint or folder in Hugging Face's form: its shape takes the place of the recipe's, and its tokenizer.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["depth", "cooldown_from"])]
    init: Option<PathBuf>,
    /// Seed, instead of the recipe's.
    #[arg(long)]
    seed: Option<u64>,
    /// Record what each rank does in the tenth step from the start: timeline.json, for ui.perfetto.dev, and a picture in the report.
    #[arg(long)]
    timeline: bool,
    #[command(flatten)]
    ranks: RankArgs,
    #[command(flatten)]
    launch: LaunchArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// The recipe where none is given, and the name of its run.
    #[arg(skip = DEFAULT)]
    default: &'static str,
}

pub fn list() -> Result<(), CliError> {
    for (name, text) in BUILT_IN {
        let about = text.lines().next().unwrap_or_default().trim_start_matches("# ");
        println!("{name:<18} {about}");
    }
    Ok(())
}

pub fn show(name: &str) -> Result<(), CliError> {
    print!("{}", Recipe::load(name, &[])?.to_toml());
    Ok(())
}

pub fn run(args: TrainArgs, threads: usize) -> Result<(), CliError> {
    // An absent backend is said before text is read.
    args.device.backend.device()?;
    let (recipe, dir, found) = match &args.cooldown_from {
        Some(from) => args.cooldown(from)?,
        None => {
            let (recipe, dir) = args.recipe()?;
            if args.launch.elsewhere() {
                args.launch(&recipe, &dir)?;
            }
            let found = checkpoint(&dir, args.resume)?;
            (recipe, dir, found)
        }
    };
    let job = Job {
        recipe,
        dir: dir.clone(),
        found,
        described: String::new(),
        backend: args.device.backend,
        threads,
        timeline: args.timeline,
        logged: args.ranks.logged(),
        interrupt: interrupt(),
    };
    let task = job.recipe.task.clone();
    let summary = tasks::run(job, &args.data, args.ranks)?;
    if speaks() {
        conclude(&summary, &dir, &task);
    }
    Ok(())
}

/// The checkpoint to go on from; none for a new run, and for one that was killed before its first.
fn checkpoint(dir: &Path, resume: bool) -> Result<Option<Checkpoint>, CliError> {
    match find_latest(dir.join("checkpoints")) {
        Err(CheckpointError::Missing { .. }) if !resume => Ok(None),
        Err(CheckpointError::Missing { .. }) if dir.join("run.json").is_file() => {
            if speaks() {
                println!("{} has no checkpoint yet: starting from the beginning", dir.display());
            }
            Ok(None)
        }
        _ if !resume => Err(TrainError::RunExists(dir.into()).into()),
        found => {
            let found = found?;
            warn_of(&found);
            if speaks() {
                println!("resuming from {}", found.checkpoint.path().display());
            }
            Ok(Some(found.checkpoint))
        }
    }
}

fn warn_of(found: &Found) {
    for skipped in &found.skipped {
        eprintln!("warning: {skipped}");
    }
}

/// The recipe of `firebox train` where none is given.
const DEFAULT: &str = "default";

impl TrainArgs {
    /// The same with values of the recipe that those given replace.
    pub fn with_defaults(mut self, mut set: Vec<String>) -> Self {
        set.append(&mut self.set);
        Self { set, ..self }
    }

    /// The same where this recipe is meant if none is given.
    pub fn with_default_recipe(self, default: &'static str) -> Self {
        Self { default, ..self }
    }

    /// Recipe, folder and first checkpoint of a cooldown.
    fn cooldown(&self, from: &Path) -> Result<(Recipe, PathBuf, Option<Checkpoint>), CliError> {
        let found = resolve(from)?;
        warn_of(&found);
        let cooldown = Cooldown::new(&found.checkpoint, self.steps.unwrap_or_default(), &self.set)?;
        let recipe = cooldown.recipe().clone();
        let dir = self.run_dir(&recipe.name);
        println!("cooling down from {}", found.checkpoint.path().display());
        let copy = cooldown.start(&dir)?;
        Ok((recipe, dir, Some(copy)))
    }

    /// Trains in other processes, and ends as they do.
    fn launch(&self, recipe: &Recipe, dir: &Path) -> Result<(), CliError> {
        let micro_batches = recipe.train.batch_rows.div_ceil(recipe.train.micro_rows());
        let job = launch::Job {
            dir,
            same_data: self.ranks.with_the_same_data(),
            data_degrees: self.ranks.data_degrees(),
            even: self.ranks.is_even().then_some(micro_batches),
            resume: self.resume,
        };
        std::process::exit(self.launch.run(&job)?)
    }

    fn run_dir(&self, name: &str) -> PathBuf {
        self.out.clone().unwrap_or_else(|| Path::new("runs").join(name))
    }

    /// The recipe and the folder of the run.
    fn recipe(&self) -> Result<(Recipe, PathBuf), CliError> {
        let mut set = self.set.clone();
        set.extend(self.seed.map(|seed| format!("seed={seed}")));
        let recipe = match (&self.recipe, self.depth) {
            (None, Some(0)) => {
                let (expected, got) = ("at least 1".into(), "0".into());
                return Err(TrainError::Input { what: "--depth", expected, got }.into());
            }
            (None, Some(depth)) => Recipe::depth(depth).with(&set)?,
            (None, None) => {
                let dir = self.run_dir(self.default);
                let stored = dir.join("recipe.toml");
                if self.resume && stored.is_file() {
                    return Ok((Recipe::load(&stored.display().to_string(), &set)?, dir));
                }
                Recipe::load(self.default, &set)?
            }
            (Some(name), _) => Recipe::load(name, &set)?,
        };
        let recipe = match self.init.clone().or(recipe.init.clone()) {
            Some(model) => self.starting_from(recipe, &model)?,
            None => recipe,
        };
        let dir = self.run_dir(&recipe.name);
        Ok((recipe, dir))
    }
}

impl TrainArgs {
    /// The recipe with the shape and the tokenizer of a model.
    fn starting_from(&self, recipe: Recipe, model: &Path) -> Result<Recipe, CliError> {
        let shape =
            self.set.iter().find(|set| set.trim_start().starts_with("model.") && !set.contains("model.dropout"));
        if let Some(set) = shape {
            let expected = "no --set of the model's shape but model.dropout beside it: the shape is that of the model";
            return Err(TrainError::Input { what: "init", expected: expected.into(), got: set.clone() }.into());
        }
        Ok(recipe.starting_from(model)?)
    }
}

/// Set by Ctrl-C or SIGTERM, upon which the run writes a checkpoint and ends; a second one ends it at once.
pub(super) fn interrupt() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let installed = ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        if speaks() {
            eprintln!("stopping after this step; once more to stop without a checkpoint");
        }
    });
    if let Err(error) = installed {
        eprintln!("warning: Ctrl-C will not write a checkpoint: {error}");
    }
    #[cfg(unix)]
    stop_upon_usr1(&flag);
    flag
}

/// SIGUSR1 does the same: mpirun passes it on to the ranks, and Slurm sends it before a job's time is over (`--signal=USR1@120`).
#[cfg(unix)]
fn stop_upon_usr1(flag: &Arc<AtomicBool>) {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    extern "C" fn stop(_: libc::c_int) {
        if let Some(flag) = FLAG.get() {
            flag.store(true, Ordering::Relaxed);
        }
    }
    if FLAG.set(flag.clone()).is_ok() {
        // SAFETY: the handler reads what is set already and stores a flag, which a signal handler may.
        unsafe { libc::signal(libc::SIGUSR1, stop as *const () as libc::sighandler_t) };
    }
}

/// The command that one calls after a run of this task.
fn next(task: &TaskRecipe, dir: &str) -> String {
    match task {
        TaskRecipe::Language | TaskRecipe::Spans(_) => format!("generate {dir} --prompt 'fn main() {{'"),
        TaskRecipe::Chat(_) | TaskRecipe::Preference(_) => format!("chat {dir}"),
        TaskRecipe::TextToImage(_) => format!("draw {dir} --prompt TEXT --out image.png"),
        TaskRecipe::ImageTokens(_) => format!("train text-to-image --data PATH --set task.image_tokens={dir}"),
        TaskRecipe::MaskedImage(_) => format!("finetune --from {dir} --task image_classes --data PATH"),
        TaskRecipe::Masked(_) => format!("finetune --from {dir} --task classes --data PATH"),
        _ => format!("eval {dir} --data PATH"),
    }
}

fn conclude(summary: &Summary, dir: &Path, task: &TaskRecipe) {
    let (dir, program) = (dir.display(), program());
    println!();
    if let (Some(loss), Some(bpb)) = (summary.val_loss, summary.val_bpb) {
        println!("validation: loss {loss:.4}, {bpb:.4} bits per byte");
    }
    println!("report:     {dir}/report.html");
    println!("checkpoint: {dir}/checkpoints/step-{}", summary.steps);
    match summary.stopped.as_str() {
        "interrupted" => println!("continue:   {program} train --resume --out {dir}"),
        _ => println!("next:       {program} {}", next(task, &dir.to_string())),
    }
}
