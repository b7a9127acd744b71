//! `firebox lr-find`.

use std::path::Path;

use clap::Args;
use firebox::train::lr_find::{LrFound, LrPoint, LrSweep};
use firebox::train::{Recipe, Trainer};

use super::prepare::DataArgs;
use super::{CliError, DeviceArgs};

#[derive(Args)]
pub struct LrFindArgs {
    /// Built-in name (`firebox recipe list`) or TOML file.
    #[arg(default_value = "default")]
    recipe: String,
    #[command(flatten)]
    data: DataArgs,
    /// Value of the recipe, such as train.batch_rows=32; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Learning rate of the first step.
    #[arg(long, value_name = "LR", default_value_t = 1e-6)]
    lr_min: f64,
    /// Learning rate of the last step.
    #[arg(long, value_name = "LR", default_value_t = 1.0)]
    lr_max: f64,
    /// Steps from the one to the other.
    #[arg(long, value_name = "N", default_value_t = 100)]
    steps: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Lines of the table.
const LINES: usize = 25;

pub fn run(args: LrFindArgs) -> Result<(), CliError> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let recipe = match recipe.init.clone() {
        Some(model) => recipe.starting_from(&model)?,
        None => recipe,
    };
    let sweep = LrSweep { lr_min: args.lr_min, lr_max: args.lr_max, steps: args.steps };
    sweep.validate()?;
    let device = args.device.backend.device()?;
    let (dataset, _) = args.data.dataset(&recipe.data, &recipe.sources)?;
    // Where activations are offloaded to, if at all, in a file without a name.
    let init = recipe.initial_model(&device)?;
    let trainer = Trainer::new(recipe, Path::new("."), &dataset, &device, init)?;
    if !args.json {
        println!("{:>6}  {:>9}  {:>9}  {:>9}", "step", "lr", "loss", "smoothed");
    }
    let (mut step, every) = (0, (args.steps as usize).div_ceil(LINES));
    let found = trainer.find_lr(&sweep, &mut |LrPoint { lr, loss, smoothed }| {
        if !args.json && step % every == 0 {
            println!("{:>6}  {lr:>9.3e}  {loss:>9.4}  {smoothed:>9.4}", step + 1);
        }
        step += 1;
    })?;
    match args.json {
        true => print_json(&found),
        false => print_found(&found),
    }
    Ok(())
}

fn print_json(found: &LrFound) {
    let mut json = serde_json::json!(found);
    json["steepest"] = found.steepest().into();
    json["minimum_tenth"] = found.minimum_tenth().into();
    println!("{json:#}");
}

fn print_found(found: &LrFound) {
    let end = match found.diverged {
        true => "the loss grew to four times its least",
        false => "the largest rate: the loss did not grow to four times its least",
    };
    println!("\nended after {} steps at {end}", found.points.len());
    match found.steepest() {
        Some(lr) => println!("steepest descent:        {lr:.2e}"),
        None => println!("the loss never fell: try --lr-min and --lr-max further up, or more --steps"),
    }
    if let Some(lr) = found.minimum_tenth() {
        println!("a tenth of the minimum:  {lr:.2e}");
    }
    println!("try optimizer.lr between the two");
}
