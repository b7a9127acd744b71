//! The matrix: every kind of layout on up to 8 ranks takes the ten steps of one rank, its losses to 1e-5 and its parameters to 1e-4. Blocks have grouped queries, rows are packed
//! with documents that do not see each other, embeddings are tied or not.

use std::sync::Mutex;

use firebox_models::transformer::ContextKind;
use firebox_train::observe::{Event, ObserveError, Observer};

use super::*;

/// Keeps the loss of each step and each evaluation.
#[derive(Clone, Default)]
struct Losses(Arc<Mutex<Vec<f64>>>);

impl Observer for Losses {
    fn on_event(&mut self, event: &Event<'_>) -> Result<(), ObserveError> {
        let loss = match event {
            Event::Step(record) => record.loss,
            Event::Evaluated(record) => record.val_loss,
            _ => return Ok(()),
        };
        self.0.lock().unwrap().push(loss);
        Ok(())
    }
}

/// A model of 8 blocks, dense or of experts.
fn model(tied: bool, experts: bool) -> Recipe {
    let experts = if experts { "n_experts = 4, router_aux_loss = 0.02, " } else { "n_kv_heads = 4, " };
    let model = format!(
        "model={{ d_model = 32, n_layers = 8, n_heads = 8, {experts}d_ff = 48, context = 32, dropout = 0, tied = {tied} }}"
    );
    // A gradient that is nothing but rounding must not become a whole step.
    recipe(&[&model, "eval.sample_tokens=0", "optimizer.eps=1e-5"])
}

/// Losses of ten steps and two evaluations on `ranks` (0: without any), with the last checkpoint in `dir`.
fn losses(recipe: &Recipe, ranks: usize, layout: Layout, dir: &Path, dataset: &Arc<Dataset>) -> Vec<f64> {
    let (recipe, dir, dataset, seen) = (recipe.clone(), dir.to_path_buf(), dataset.clone(), Losses::default());
    let kept = seen.clone();
    let run = move |comm: Option<Communicator>| {
        let device = Backend::NdArray.device().unwrap();
        let mut trainer = Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap();
        let mut observers = Observers::new();
        if comm.as_ref().is_none_or(|comm| comm.rank() == 0) {
            observers.push(seen.clone());
        }
        if let Some(comm) = comm {
            trainer = trainer.with_ranks(comm, layout)?;
        }
        trainer.run(&RunInfo::default(), &mut observers, &AtomicBool::new(false)).map(drop)
    };
    if ranks == 0 {
        run(None).unwrap();
    } else {
        spawn(ranks, move |comm| {
            let _threads = threads::for_rank(1).unwrap();
            run(Some(comm))
        })
        .unwrap();
    }
    let losses = kept.0.lock().unwrap().clone();
    assert_eq!(losses.len(), 12, "ten steps, two evaluations");
    losses
}

/// Each layout by name, its ranks, and whether it asks for embeddings that are not tied.
fn layouts() -> Vec<(String, usize, Layout, bool)> {
    use Schedule::{AllForwardAllBackward, Interleaved, OneForwardOneBackward, ZeroBubbleH1, ZeroBubbleV};
    let mut all = vec![("dp 8".to_owned(), 8, data(0), false)];
    for zero in [2, 3] {
        all.push((format!("zero {zero} on 8"), 8, data(zero), false));
        all.push((format!("zero {zero} on 2 x 4"), 8, Layout { dp_replicate: 2, ..data(zero) }, false));
    }
    for tp in [2, 4, 8] {
        for sequence_parallel in [false, true] {
            let layout = Layout { tp, sequence_parallel, ..data(0) };
            all.push((format!("tp {tp}, sequence parallel {sequence_parallel}"), tp, layout, false));
        }
    }
    let schedules =
        [OneForwardOneBackward, AllForwardAllBackward, Interleaved { stages_per_rank: 2 }, ZeroBubbleH1, ZeroBubbleV];
    for pp in [2, 4, 8] {
        for schedule in schedules {
            // There are 10 stages: more than that cannot be dealt out.
            let per_rank = if matches!(schedule, Interleaved { .. } | ZeroBubbleV) { 2 } else { 1 };
            if pp * per_rank <= 10 {
                all.push((format!("pp {pp}, {schedule}"), pp, Layout { pp, schedule, ..data(0) }, false));
            }
        }
    }
    for cp in [2, 4] {
        for context in [ContextKind::Ring, ContextKind::Ulysses] {
            all.push((format!("cp {cp}, {context:?}"), cp, Layout { cp, context, ..data(0) }, false));
        }
    }
    all.push(("dp 2 x tp 2 x pp 2".into(), 8, Layout { tp: 2, pp: 2, ..data(0) }, false));
    all.push(("zero 2 on 2 x tp 2 x pp 2".into(), 8, Layout { tp: 2, pp: 2, ..data(2) }, true));
    all.push(("zero 3 on 4 x tp 2".into(), 8, Layout { tp: 2, ..data(3) }, false));
    all.push(("cp 2 x tp 2 x pp 2".into(), 8, Layout { cp: 2, tp: 2, pp: 2, ..data(0) }, false));
    all
}

fn compare(name: &str, tied: bool, experts: bool, layouts: &[(String, usize, Layout, bool)]) {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, recipe) = (dataset(dir.path()), model(tied, experts));
    let one = dir.path().join("one");
    let want = losses(&recipe, 0, data(0), &one, &dataset);
    for (layout_name, ranks, layout, _) in layouts {
        let many = dir.path().join(layout_name.replace([',', ' '], "-"));
        let got = losses(&recipe, *ranks, *layout, &many, &dataset);
        let worst = want.iter().zip(&got).fold(0f64, |worst, (want, got)| worst.max((got / want - 1.0).abs()));
        let parameters = apart(&one, &many);
        println!("{name}, {layout_name}: losses {worst:.1e}, parameters {parameters:.1e} apart");
        assert!(worst < 1e-5, "{name}, {layout_name}: {got:?}, one rank {want:?}");
        assert!(parameters < 1e-4, "{name}, {layout_name}: {parameters}");
        std::fs::remove_dir_all(many).unwrap();
    }
}

#[test]
fn every_layout_trains_the_same_model() {
    let all = layouts();
    let tied: Vec<_> = all.iter().filter(|(.., untied)| !untied).cloned().collect();
    compare("tied", true, false, &tied);
    compare("untied", false, false, &all);
}

#[test]
fn divided_experts_train_the_same_model() {
    let experts = |ep, pp, zero| Layout { ep, pp, ..data(zero) };
    compare(
        "experts",
        false,
        true,
        &[
            ("ep 2".into(), 2, experts(2, 1, 0), false),
            ("ep 4".into(), 4, experts(4, 1, 0), false),
            ("zero 1 on 2 x pp 2, ep 2".into(), 4, experts(2, 2, 1), false),
            ("zero 1 on 4 x pp 2, ep 2".into(), 8, experts(2, 2, 1), false),
        ],
    );
}
