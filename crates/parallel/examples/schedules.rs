//! Checks pipeline schedules, prints what they need, and draws them: `cargo run --release -p firebox-parallel --example
//! schedules -- [FOLDER]`. With a folder, writes an SVG picture of each into it; those of `docs/` are made so.

use std::error::Error;
use std::path::PathBuf;

use firebox_parallel::pipeline::{Costs, Schedule};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let (ranks, micro_batches) = (4, 8);
    let schedules = [
        ("all-forward", Schedule::AllForwardAllBackward),
        ("1f1b", Schedule::OneForwardOneBackward),
        ("interleaved", Schedule::Interleaved { stages_per_rank: 2 }),
        ("zb-h1", Schedule::ZeroBubbleH1),
        ("zb-v", Schedule::ZeroBubbleV),
    ];
    println!("{ranks} ranks, {micro_batches} micro-batches");
    println!("| schedule | idle | activations kept per rank, in stages' | messages sent per rank |");
    println!("|---|---|---|---|");
    for (name, schedule) in schedules {
        let plan = schedule.plan(ranks, micro_batches)?;
        let checked = plan.check()?;
        // All schedules do the same work: the more stages, the less each costs.
        let mut costs = Costs::uniform(plan.stages());
        let stage = 1.0 / schedule.stages_per_rank() as f64;
        for cost in [&mut costs.forward, &mut costs.backward_input, &mut costs.backward_weight] {
            cost.fill(stage);
        }
        let timeline = plan.simulate(&costs)?;
        let list = |numbers: &[usize]| numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let share = 100.0 * timeline.bubble_share();
        println!("| {schedule} | {share:.1} % | {} | {} |", list(&checked.peak), list(&checked.sends));
        if let Some(folder) = &folder {
            let title = format!("{schedule}, {ranks} ranks, {micro_batches} micro-batches");
            std::fs::write(folder.join(format!("pipeline-{name}.svg")), timeline.svg(&title, 900.0))?;
        }
    }
    Ok(())
}
