//! Ranks that divide the parameters (ZeRO-3), and copies of what is divided (hybrid sharding).

use super::*;

fn copies(zero: u8, dp_replicate: usize) -> Layout {
    Layout { dp_replicate, ..data(zero) }
}

#[test]
fn divided_parameters_have_the_bits_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path());
    // Without clipping there is no sum over the ranks that could differ in its last bit.
    for (name, extra, file) in [
        ("tied", &["optimizer.clip=0", "model.tied=true", "eval.sample_tokens=4"][..], "adamw"),
        ("untied", &["optimizer.clip=0", "model.tied=false", "memory={ recompute = 2, offload = \"disk\" }"], "adamw"),
        ("muon", &["optimizer.clip=0", "optimizer.kind=muon"], "muon"),
    ] {
        let one = dir.path().join(name);
        let loss = train(0, 0, &one, &dataset, extra, None);
        for (ranks, layout) in [
            (2, data(3)),
            (3, data(3)),
            (4, data(3)),
            (8, data(3)),
            (4, copies(2, 2)),
            (8, copies(2, 2)),
            (8, copies(3, 2)),
            (8, copies(3, 4)),
            (6, copies(1, 3)),
        ] {
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
