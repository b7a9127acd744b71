//! Ranks that divide the parameters (ZeRO-3), and copies of what is divided (hybrid sharding).

use super::*;

fn copies(zero: u8, dp_replicate: usize) -> Layout {
    Layout { dp_replicate, ..data(zero) }
}

#[test]
fn divided_parameters_have_the_bits_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    const ALL: [(usize, u8, usize); 10] =
        [(8, 3, 2), (4, 3, 1), (1, 3, 1), (2, 3, 1), (3, 3, 1), (8, 3, 1), (8, 3, 4), (4, 2, 2), (8, 2, 2), (6, 1, 3)];
    // Without clipping there is no sum over the ranks that could differ in its last bit.
    for (name, extra, file, layouts) in [
        ("tied", &["optimizer.clip=0", "model.tied=true", "eval.sample_tokens=4"][..], "adamw", &ALL[..]),
        (
            "untied",
            &["optimizer.clip=0", "model.tied=false", "memory={ recompute = 2, offload = \"disk\" }"],
            "adamw",
            &ALL[..2],
        ),
        ("muon", &["optimizer.clip=0", "optimizer.kind=muon"], "muon", &ALL[..2]),
    ] {
        let one = dir.path().join(name);
        let loss = train(0, 0, &one, &dataset, extra, None);
        for &(ranks, zero, dp_replicate) in layouts {
            let layout = copies(zero, dp_replicate);
            let what =
                format!("{name} on {ranks} ranks, zero {}, {} copies", u8::from(layout.zero), layout.dp_replicate);
            let many = dir.path().join(&what);
            let divided = train_as(ranks, layout, &many, &dataset, extra, None);
            assert_eq!(divided.to_bits(), loss.to_bits(), "{what}: {divided}, one rank {loss}");
            for file in ["model.safetensors", &format!("optimizer/{file}.safetensors")] {
                assert!(bytes(&one, 10, file) == bytes(&many, 10, file), "{what}: {file} differs");
            }
        }
    }
}

#[test]
fn divided_parameters_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (name, extra) in [
        (
            "adamw",
            &["eval.sample_tokens=4", "precision={ compute = \"bf16\", params = \"bf16\" }", "optimizer.clip=0"][..],
        ),
        ("muon", &["optimizer.kind=muon"]),
        ("soap", &["optimizer.kind=soap", "optimizer.lr=1e-3"]),
        ("adafactor", &["optimizer.kind=adafactor", "optimizer.lr=1e-3"]),
        ("lion", &["optimizer.kind=lion", "optimizer.lr=1e-4", "model.tied=false"]),
        ("adaptive", &["optimizer.clip={ adaptive = 0.1 }"]),
    ] {
        let one = OneRank::new(&dir.path().join(name), &dataset, extra);
        one.assert_same(&format!("{name}-2"), 2, data(3));
        one.assert_same(&format!("{name}-8-2"), 8, copies(3, 2));
    }
}

/// Averages have the bits of one rank, and go on from its checkpoint as it does from theirs.
#[test]
fn averages_of_divided_parameters_have_the_bits_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (name, average) in [
        ("ema", "average={ kind = \"ema\", decay = 0.9 }"),
        ("lawa", "average={ kind = \"lawa\", every = 2, count = 3 }"),
    ] {
        let extra = [average, "optimizer.kind=muon", "optimizer.clip=0"];
        let one = dir.path().join(name);
        train(0, 0, &one, &dataset, &extra, None);
        let [many, back, forth] = ["many", "back", "forth"].map(|what| dir.path().join(format!("{name}-{what}")));
        let half = |run: &Path| run.join("checkpoints/step-5");
        train_as(8, copies(3, 2), &many, &dataset, &extra, None);
        train(0, 0, &back, &dataset, &extra, Some(&half(&many)));
        train_as(3, data(3), &forth, &dataset, &extra, Some(&half(&one)));
        for run in [&many, &back, &forth] {
            for file in ["model.safetensors", "average/model.safetensors", "average/state.safetensors"] {
                assert!(bytes(&one, 10, file) == bytes(run, 10, file), "{}: {file} differs", run.display());
            }
        }
    }
}

#[test]
fn divided_parameters_of_divided_matrices_take_the_steps_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for tied in ["model.tied=true", "model.tied=false"] {
        let extra = [tied, "model.dropout=0", "eval.sample_tokens=4"];
        let one = OneRank::new(&dir.path().join(tied), &dataset, &extra);
        for (name, sequence_parallel, layout) in [
            ("zero 3 over 4, tp 2", false, data(3)),
            ("zero 3 over 4, tp 2, sequence parallel", true, data(3)),
            ("zero 3 over 2, 2 copies, tp 2", false, copies(3, 2)),
            ("zero 2 over 2, 2 copies, tp 2", true, copies(2, 2)),
        ] {
            one.assert_same(name, 8, Layout { tp: 2, sequence_parallel, ..layout });
        }
    }
}

#[test]
fn copies_of_pipelines_divide_states() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    let extra = ["model.tied=false", "eval.sample_tokens=4"];
    let one = OneRank::new(dir.path(), &dataset, &extra);
    one.assert_same("zero 2 over 2, 2 copies, pp 2", 8, Layout { pp: 2, ..copies(2, 2) });
}

/// What each rank holds after two steps, as bytes for each byte that all parameters take in f32.
fn held(ranks: usize, layout: Layout, dir: &Path, dataset: &Arc<Dataset>, extra: &[&str]) -> Vec<[f64; 3]> {
    let extra: Vec<&str> = [&["train.steps=2", "eval.every=0"], extra].concat();
    let (recipe, dir, dataset) = (recipe(&extra), dir.to_path_buf(), dataset.clone());
    spawn(ranks, move |comm| {
        let _threads = threads::for_rank(1).unwrap();
        let device = Backend::NdArray.device().unwrap();
        let mut trainer = Trainer::new(recipe.clone(), &dir, &dataset, &device, None).unwrap();
        let all = 4.0 * trainer.model().config().num_params() as f64;
        trainer = trainer.with_ranks(comm, layout)?;
        trainer.run(&RunInfo::default(), &mut Observers::new(), &AtomicBool::new(false))?;
        let held = trainer.held();
        Ok::<_, firebox_train::TrainError>([held.parameters, held.gradients, held.state].map(|x| x as f64 / all))
    })
    .unwrap()
}

/// Of AdamW in f32: 16 bytes a parameter, of which ZeRO-1 and 2 divide 12, and ZeRO-3 all (arXiv:1910.02054, where parameters and gradients take 2 bytes).
#[test]
fn ranks_hold_what_zero_says() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (ranks, layout, parts) in [
        (4, data(0), [1.0, 1.0, 1.0]),
        (4, data(2), [1.0, 0.25, 0.25]),
        (4, data(3), [0.25, 0.25, 0.25]),
        (8, data(3), [0.125, 0.125, 0.125]),
        (8, copies(2, 2), [1.0, 0.25, 0.25]),
        (8, copies(3, 2), [0.25, 0.25, 0.25]),
    ] {
        let name = format!("{ranks} ranks, zero {}, {} copies", u8::from(layout.zero), layout.dp_replicate);
        for (rank, [parameters, gradients, state]) in
            held(ranks, layout, &dir.path().join(&name), &dataset, &[]).into_iter().enumerate()
        {
            println!("{name}, rank {rank}: parameters {parameters:.4}, gradients {gradients:.4}, state {state:.4}");
            for (got, want) in [parameters, gradients, state / 2.0].into_iter().zip(parts) {
                assert!((got / want - 1.0).abs() < 0.01, "{name}, rank {rank}: {got}, not {want}");
            }
        }
    }
    // Whole matrices go where there is the least.
    let muon = held(4, data(3), &dir.path().join("muon"), &dataset, &["optimizer.kind=muon", "model.n_layers=4"]);
    let most = muon.iter().map(|held| held.iter().sum::<f64>()).fold(0.0, f64::max);
    println!("muon: {muon:?}");
    assert!(most < 0.3 * 4.0, "{most}");
}

#[test]
fn what_divided_parameters_cannot_do_is_said_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    for (ranks, layout, extra, says) in [
        (4, Layout { pp: 2, ..data(3) }, &["model.tied=false"][..], "0, 1 or 2 with pp"),
        (4, copies(0, 2), &[], "1 with zero 0"),
        (4, copies(3, 3), &[], "dp-replicate 3"),
        (2, data(3), &["optimizer.kind=sophia"], "sophia"),
        (2, data(3), &["optimizer.kind=schedule_free"], "schedule_free"),
        (4, Layout { tp: 2, ..data(3) }, &["average={ kind = \"ema\", decay = 0.9 }"], "average"),
        (2, data(3), &["watch.on_spike=rollback"], "rollback"),
    ] {
        let (recipe, run, dataset) = (recipe(extra), dir.path().join("none"), dataset.clone());
        let error = spawn(ranks, move |comm| {
            let device = Backend::NdArray.device().unwrap();
            let trainer = Trainer::new(recipe.clone(), &run, &dataset, &device, None).unwrap();
            trainer.with_ranks(comm, layout).map(drop)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
