//! Faults that tests inject into a run.

use burn::tensor::Tensor;
use firebox_optim::NamedGrads;

use super::Trainer;
use crate::task::Model;

/// Makes one element of one parameter's gradient infinite.
pub(super) struct Fault {
    /// Before the update of this step (from 0), and of those that follow until `times` is used up.
    from_step: u64,
    times: u64,
    param: &'static str,
}

impl<M: Model> Trainer<'_, M> {
    pub(super) fn inject(&mut self, grads: &mut NamedGrads) {
        let step = self.state.step;
        if let Some(fault) = self.fault.as_mut().filter(|fault| fault.times > 0 && step >= fault.from_step) {
            fault.times -= 1;
            if let Some(grad) = grads.remove(fault.param) {
                let n = grad.dims()[0];
                let bad = grad.clone().narrow(0, n - 1, 1) * f32::INFINITY;
                grads.insert(fault.param, Tensor::cat(vec![grad.narrow(0, 0, n - 1), bad], 0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;
    use std::sync::atomic::AtomicBool;

    use firebox_data::{Dataset, Source, prepare};
    use firebox_tensor::device::Backend;

    use super::*;
    use crate::observe::{Observer, Observers, RunInfo, metrics};
    use crate::{Recipe, TrainError};

    const STEPS: u64 = 200;
    const BAD_STEP: u64 = 100;

    fn recipe(extra: &[&str]) -> Recipe {
        let base = [
            "data={ tokenizer = \"char\", val_split = \"tail\", val_fraction = 0.1 }",
            "schedule={ kind = \"cosine\", min_lr_ratio = 0.0 }",
            "train={ steps = 200, batch_rows = 4, log_every = 1, max_bad_steps = 3 }",
            "model={ d_model = 64, n_layers = 1, n_heads = 2, context = 32 }",
            "eval={ every = 0, sample_tokens = 0 }",
            "checkpoint.every=40",
            "optimizer.lr=5e-3",
        ];
        Recipe::load("tiny", &base.iter().chain(extra).map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    fn dataset(dir: &Path) -> Dataset {
        let text: String = (0..900u64).map(|i| format!("{i} boxes of fire, {} of water\n", i * i % 991)).collect();
        let path = dir.join("text.txt");
        std::fs::write(&path, text).unwrap();
        prepare(&recipe(&[]).data, &[Source::new([path.display().to_string()])], &dir.join("cache"), &mut |_| {})
            .unwrap()
    }

    fn run(trainer: &mut Trainer<'_>, dir: &Path) -> Result<f64, TrainError> {
        let mut files = Observers::files();
        let info = RunInfo { dir: dir.to_path_buf(), ..trainer.info("ndarray", 1, String::new()) };
        files.on_event(&crate::observe::Event::RunStarted(&info))?;
        Ok(trainer.run(&info, &mut files, &AtomicBool::new(false))?.val_loss.unwrap())
    }

    #[test]
    fn an_infinite_gradient_is_survived_as_the_recipe_says() {
        let dir = tempfile::tempdir().unwrap();
        let device = Backend::NdArray.device().unwrap();
        let dataset = dataset(dir.path());
        let train = |name: &str, extra: &[&str], times: u64| {
            let folder = dir.path().join(name);
            let mut trainer = Trainer::new(recipe(extra), &folder, &dataset, &device, None).unwrap();
            trainer.fault = Some(Fault { from_step: BAD_STEP, times, param: "blocks.0.attn.qkv.weight" });
            let result = run(&mut trainer, &folder);
            let lines = metrics::read(&folder.join("metrics.jsonl")).unwrap().unwrap();
            (result, lines, trainer.state.clone(), folder)
        };
        let (undisturbed, ..) = train("clean", &[], 0);
        let undisturbed = undisturbed.unwrap();

        let back = "watch.on_spike=\"rollback\"";
        for (name, extra, times, reasons) in [
            ("skip", &[][..], 1, &["a gradient is not finite"][..]),
            ("back", &[back], 1, &["a gradient is not finite; back to step 80"]),
            // The fault comes again as soon as its step does; what is gone back to holds once there is nothing left to go back for.
            (
                "twice",
                &[back, "watch.max_rollbacks=1"],
                2,
                &["a gradient is not finite; back to step 80", "a gradient is not finite"],
            ),
        ] {
            let (loss, lines, state, folder) = train(name, extra, times);
            let loss = loss.unwrap();
            println!("{name}: {loss:.4}, undisturbed {undisturbed:.4}");
            assert!((loss - undisturbed).abs() < 0.02, "{name}: {loss} {undisturbed}");
            assert_eq!((state.step, state.skipped, state.bad_in_a_row), (STEPS, times, 0), "{name}");
            let said: Vec<&str> = lines.skipped.iter().map(|(_, reason)| reason.as_str()).collect();
            assert_eq!(said, reasons, "{name}");
            assert!(lines.skipped.iter().all(|(step, _)| *step == BAD_STEP + 1), "{name}: {:?}", lines.skipped);
            assert!(lines.steps.iter().all(|record| record.loss.is_finite() && record.grad_norm.is_finite()));
            let report = std::fs::read_to_string(folder.join("report.html")).unwrap();
            assert!(report.contains("Skipped steps") && reasons.iter().all(|reason| report.contains(reason)), "{name}");
        }

        // One that stays ends the run, whether it goes back in between or not.
        let (error, ..) = train("stays", &[], u64::MAX);
        assert!(matches!(error, Err(TrainError::Diverged { in_a_row: 3, last_good: BAD_STEP, .. })), "{error:?}");
        let (error, _, state, _) = train("stays-back", &[back, "watch.max_rollbacks=1"], u64::MAX);
        assert!(matches!(error, Err(TrainError::Diverged { in_a_row: 3, .. })), "{error:?}");
        assert_eq!(state.watch.rollbacks, 1);
    }
}
