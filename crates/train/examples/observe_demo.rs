//! Shows what a run leaves in its folder, with numbers that are made up: no model is trained.
//!
//! ```text
//! cargo run --release -p firebox-train --example observe_demo -- [FOLDER] [STEPS]
//! ```

use std::path::PathBuf;
use std::time::Duration;

use firebox_train::observe::{EvalRecord, Event, Observer, Observers, RunInfo, StepRecord, Summary, compare, memory};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("firebox-observe-demo"), PathBuf::from);
    let steps: u64 = args.next().map_or(Ok(1_000), |steps| steps.parse())?;

    let info = RunInfo {
        dir: dir.clone(),
        name: "demo".into(),
        model: "Llama decoder that does not exist, 6 layers, width 256".into(),
        data: "none: every number on this page is made up".into(),
        recipe_toml: "[model]\nn_layers = 6\nd_model = 256\n\n[optimizer]\nname = \"adamw\"\nlr = 1e-3\n".into(),
        params: 5_310_000,
        total_steps: steps,
        tokens_per_step: 2_048,
        backend: "ndarray".into(),
        threads: 2,
        peak_flops: 150e9,
        flops_per_token: 33e6,
        ..RunInfo::default()
    };
    let mut observers = Observers::standard();
    observers.on_event(&Event::RunStarted(&info))?;

    // The held-out text to compare with: this program.
    compare::gzip_xz([include_bytes!("observe_demo.rs").to_vec()])?.save(&dir)?;

    let mut noise = Noise(1);
    let (mut skipped, mut last_eval) = (0, None);
    for step in 1..=steps {
        // Some hundred steps a second, so that there is something to watch.
        if step <= 1_000 {
            std::thread::sleep(Duration::from_millis(3));
        }
        let progress = step as f64 / steps as f64;
        let curve = 1.9 + 6.4 * (-progress * 40.0).exp() + 1.6 * (-progress * 5.0).exp();
        if step == steps / 3 {
            skipped += 1;
            observers.on_event(&Event::Skipped { step, reason: "the gradient is not finite" })?;
            continue;
        }
        let warmup = (progress * 20.0).min(1.0);
        let tokens_per_s = 2_900.0 + 120.0 * noise.next();
        let record = StepRecord {
            step,
            tokens: step * info.tokens_per_step,
            loss: curve + 0.13 * noise.next(),
            lr: 1e-3 * warmup * 0.5 * (1.1 + (std::f64::consts::PI * progress).cos() * 0.9),
            grad_norm: 0.45 + 2.0 * (-progress * 30.0).exp() + 0.08 * noise.next().abs(),
            tokens_per_s,
            mfu: info.mfu(tokens_per_s),
            memory_bytes: memory::current_bytes(),
            ..StepRecord::default()
        };
        observers.on_event(&Event::Step(&record))?;
        if step % (steps / 10).max(1) == 0 || step == steps {
            let val_loss = curve + 0.05 + 0.02 * noise.next();
            let eval = EvalRecord {
                step,
                tokens: record.tokens,
                val_loss,
                val_bpb: val_loss / 3.1 / std::f64::consts::LN_2,
                ..EvalRecord::default()
            };
            observers.on_event(&Event::Evaluated(&eval))?;
            last_eval = Some(eval.clone());
            let text = format!(
                "fn step_{step}() -> Vec<u8> {{\n    let <unknown> = \"a & b\";\n    // {progress:.1} of the way\n}}"
            );
            observers.on_event(&Event::Sampled { step, text: &text })?;
        }
    }

    // As if the machine had been busy for as long as the made-up speed says.
    let wall_s = (steps * info.tokens_per_step) as f64 / 2_900.0;
    let summary = Summary {
        params: info.params,
        steps,
        tokens: steps * info.tokens_per_step,
        wall_s,
        tokens_per_s: 2_900.0,
        val_loss: last_eval.as_ref().map(|eval| eval.val_loss),
        val_bpb: last_eval.as_ref().map(|eval| eval.val_bpb),
        peak_memory_bytes: memory::peak_bytes(),
        skipped_steps: skipped,
        stopped: "done".into(),
        ..Summary::default()
    };
    observers.on_event(&Event::Finished(&summary))?;
    println!("{}", dir.join("report.html").display());
    Ok(())
}

/// Noise from -1 to 1 in the shape of a bell: the sum of draws of a linear congruential generator (Knuth's MMIX).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        let mut sum = 0.0;
        for _ in 0..4 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (self.0 >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        }
        sum / 2.0
    }
}
