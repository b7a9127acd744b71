//! What is written is what is read.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use firebox_train::checkpoint::{
    Checkpoint, CheckpointError, Dtype, LoadReport, TensorFile, TensorSpec, Writer, encode_f32, find_latest, resolve,
};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;

use super::{consistent_value, hidden, names, write};

fn write_tensors(dir: &Path, specs: &[TensorSpec], data: &[Vec<u8>]) -> Result<Checkpoint, CheckpointError> {
    let mut writer = Writer::create(dir, 1)?;
    writer.tensors("model.safetensors", &BTreeMap::from([("who".into(), "模型".into())]), specs, data)?;
    Checkpoint::open(writer.finish()?)
}

#[test]
fn odd_shapes_and_types_come_back() {
    let dir = tempfile::tempdir().unwrap();
    // Wide types first; the odd counts of narrow ones leave the next at odd places.
    let specs = [
        TensorSpec::new("step", [], Dtype::I64),
        TensorSpec::f32("a", [3, 1, 5]),
        TensorSpec::f32("empty", [4, 0, 2]),
        TensorSpec::f32("single \"quoted\" 名", []),
        TensorSpec::new("b", [7], Dtype::BF16),
        TensorSpec::new("h", [1, 1, 1, 3], Dtype::F16),
        TensorSpec::new("codes", [5], Dtype::U8),
    ];
    let values: Vec<f32> = (0..15).map(|i| (i as f32 - 7.0) * 0.3).collect();
    let data = [
        (-9i64).to_le_bytes().to_vec(),
        encode_f32(&values, Dtype::F32).unwrap().into_owned(),
        vec![],
        encode_f32(&[f32::NEG_INFINITY], Dtype::F32).unwrap().into_owned(),
        encode_f32(&values[..7], Dtype::BF16).unwrap().into_owned(),
        encode_f32(&values[..3], Dtype::F16).unwrap().into_owned(),
        vec![1, 2, 3, 4, 255],
    ];
    let checkpoint = write_tensors(dir.path(), &specs, &data).unwrap();
    let file = checkpoint.tensors("model.safetensors").unwrap();
    assert_eq!(file.metadata(), BTreeMap::from([("who", "模型")]));
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "codes", "empty", "h", "single \"quoted\" 名", "step"]);
    for (spec, bytes) in specs.iter().zip(&data) {
        assert_eq!(file.shape(&spec.name).unwrap(), spec.shape);
        assert_eq!(file.dtype(&spec.name).unwrap(), spec.dtype);
        assert_eq!(file.bytes(&spec.name).unwrap(), bytes);
    }
    assert_eq!(file.f32("a").unwrap(), values);
    assert!(file.f32("empty").unwrap().is_empty());
    assert_eq!(file.f32("single \"quoted\" 名").unwrap(), [f32::NEG_INFINITY]);
    assert_eq!(file.f32("b").unwrap(), values[..7].iter().map(|&x| bf16::from_f32(x).to_f32()).collect::<Vec<_>>());
    assert_eq!(file.f32("h").unwrap(), values[..3].iter().map(|&x| f16::from_f32(x).to_f32()).collect::<Vec<_>>());
    assert!(matches!(file.f32("codes"), Err(CheckpointError::WrongKind { .. })));
    match file.f32("cods") {
        Err(CheckpointError::NoTensor { nearest: Some(near), .. }) => assert_eq!(near, "codes"),
        other => panic!("{other:?}"),
    }
    // The library that defines the format agrees.
    let bytes = checkpoint.bytes("model.safetensors").unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), specs.len());
    for (spec, bytes) in specs.iter().zip(&data) {
        assert_eq!(theirs.tensor(&spec.name).unwrap().data(), bytes);
    }
}

#[test]
fn unaligned_floats_of_other_writers_are_read() {
    // A header of 59 bytes: the floats start at byte 67, and after one byte of another tensor.
    let dir = tempfile::tempdir().unwrap();
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}"#;
    let floats = encode_f32(&[1.5, -2.0], Dtype::F32).unwrap();
    let path = dir.path().join("x.safetensors");
    for pad in 0..4 {
        let header = [&header[..], &b"    "[..pad]].concat();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &[9], &floats].concat();
        fs::write(&path, bytes).unwrap();
        assert_eq!(TensorFile::open(&path).unwrap().f32("b").unwrap(), [1.5, -2.0]);
    }
}

#[test]
fn every_kind_of_file_comes_back_and_the_bytes_depend_on_nothing_else() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = a.path().join("tokenizer.source");
    fs::write(&source, vec![7u8; 3_000_000]).unwrap();
    let make = |dir: &Path| {
        let mut writer = Writer::create(dir.join("run/checkpoints"), 40).unwrap();
        let metadata = (0..20).map(|i| (format!("key{i}"), format!("{i}"))).collect();
        let specs: Vec<_> = (0..20).map(|i| TensorSpec::f32(format!("t{i}"), [i])).collect();
        writer.tensors("model.safetensors", &metadata, &specs, specs.iter().map(|s| vec![1; 4 * s.shape[0]])).unwrap();
        writer.copy("tokenizer.json", &source).unwrap();
        writer.bytes("a/b/c.bin", &[1, 2, 3]).unwrap();
        writer.bytes("empty", &[]).unwrap();
        writer.json("state.json", &json!({ "lr": 0.1, "step": 40 })).unwrap();
        writer.finish_with_metric(Some(1.25)).unwrap()
    };
    let (first, second) = (make(a.path()), make(b.path()));
    assert_eq!(first, a.path().join("run/checkpoints/step-40"));
    let checkpoint = Checkpoint::open(&first).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.metric()), (40, Some(1.25)));
    let files: Vec<_> = checkpoint.files().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(files, ["a/b/c.bin", "empty", "model.safetensors", "state.json", "tokenizer.json"]);
    assert_eq!(checkpoint.bytes("tokenizer.json").unwrap(), vec![7u8; 3_000_000]);
    assert_eq!(checkpoint.read_json::<serde_json::Value>("state.json").unwrap()["lr"], 0.1);
    assert!(matches!(checkpoint.read_json::<Vec<u8>>("state.json"), Err(CheckpointError::Json { .. })));
    let error = checkpoint.bytes("tokeniser.json").unwrap_err();
    assert!(error.to_string().contains("`tokenizer.json`"), "{error}");
    for name in files.iter().map(String::as_str).chain(["manifest.json"]) {
        assert_eq!(fs::read(first.join(name)).unwrap(), fs::read(second.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn one_tensor_is_in_memory_at_a_time() {
    struct Buffer<'a>(Vec<u8>, &'a Cell<usize>);
    impl AsRef<[u8]> for Buffer<'_> {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Buffer<'_> {
        fn drop(&mut self) {
            self.1.set(self.1.get() - 1);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let specs: Vec<_> = (0..9).map(|i| TensorSpec::f32(format!("t{i}"), [100])).collect();
    let (live, most) = (Cell::new(0), Cell::new(0));
    let data = specs.iter().map(|_| {
        live.set(live.get() + 1);
        most.set(most.get().max(live.get()));
        Buffer(vec![0; 400], &live)
    });
    Writer::create(dir.path(), 1).unwrap().tensors("m.safetensors", &BTreeMap::new(), &specs, data).unwrap();
    assert_eq!((live.get(), most.get()), (0, 1));
}

#[test]
fn writing_a_step_again_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    for value in [1.0, 2.0, 3.0] {
        write(dir.path(), 5, value, 10, None).unwrap();
        assert_eq!(consistent_value(&find_latest(dir.path()).unwrap().checkpoint), value);
        assert_eq!(names(dir.path()), ["step-5"]);
    }
    // A damaged one too.
    fs::remove_file(dir.path().join("step-5/manifest.json")).unwrap();
    write(dir.path(), 5, 4.0, 10, None).unwrap();
    assert_eq!(consistent_value(&find_latest(dir.path()).unwrap().checkpoint), 4.0);
}

#[test]
fn between_the_renames_of_a_replacement_the_former_one_is_found() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 4, 4.0, 10, None).unwrap();
    write(dir.path(), 5, 5.0, 10, None).unwrap();
    fs::rename(dir.path().join("step-5"), dir.path().join(".step-5.old-1.0")).unwrap();
    let found = find_latest(dir.path()).unwrap();
    assert_eq!((found.checkpoint.step(), found.skipped.len()), (5, 0));
    write(dir.path(), 6, 6.0, 10, None).unwrap();
    assert_eq!(names(dir.path()), ["step-4", "step-5", "step-6"]);
}

#[test]
fn a_writer_dropped_or_failed_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1.0, 10, None).unwrap();
    let mut writer = Writer::create(dir.path(), 2).unwrap();
    writer.bytes("x", b"x").unwrap();
    assert_eq!(hidden(dir.path()).len(), 1);
    drop(writer);
    assert_eq!(names(dir.path()), ["step-1"]);

    let spec = [TensorSpec::f32("a", [2]), TensorSpec::f32("b", [1])];
    let none = BTreeMap::new();
    type Fail<'a> = (&'a str, Box<dyn Fn(&mut Writer) -> Result<(), CheckpointError> + 'a>);
    let fails: [Fail; 6] = [
        ("too few", Box::new(|w| w.tensors("m", &none, &spec, [vec![0; 8]]))),
        ("too many", Box::new(|w| w.tensors("m", &none, &spec, [vec![0; 8], vec![0; 4], vec![]]))),
        ("wrong size", Box::new(|w| w.tensors("m", &none, &spec, [vec![0; 7], vec![0; 4]]))),
        ("same name", Box::new(|w| w.bytes("x", b"").and_then(|()| w.bytes("x", b"")))),
        ("no source", Box::new(|w| w.copy("tokenizer.json", dir.path().join("absent")))),
        ("no JSON", Box::new(|w| w.json("j.json", &BTreeMap::from([(vec![1], 1)])))),
    ];
    for (what, fail) in fails {
        let mut writer = Writer::create(dir.path(), 2).unwrap();
        fail(&mut writer).unwrap_err();
        assert_eq!(names(dir.path()), ["step-1"], "{what}: removed at once");
        assert!(matches!(writer.json("y.json", &1), Err(CheckpointError::Invalid { .. })), "{what}: no way on");
        assert!(writer.finish().is_err(), "{what}: cannot be finished");
        assert_eq!(names(dir.path()), ["step-1"]);
    }
}

#[test]
fn a_run_folder_stands_for_its_newest_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    let dir = run.path().join("checkpoints");
    assert!(matches!(find_latest(&dir), Err(CheckpointError::Missing { .. })));
    fs::create_dir(&dir).unwrap();
    assert!(matches!(find_latest(&dir), Err(CheckpointError::Missing { .. })));
    for step in [9, 10, 100] {
        write(&dir, step, 0.0, 1, None).unwrap();
    }
    fs::create_dir(dir.join("notes")).unwrap();
    fs::write(dir.join("step-200"), "not a folder").unwrap();
    for path in [run.path(), &dir] {
        let found = resolve(path).unwrap();
        assert_eq!((found.checkpoint.step(), found.skipped.len()), (100, 1));
    }
    assert_eq!(resolve(dir.join("step-9")).unwrap().checkpoint.step(), 9);
    let error = resolve(dir.join("step-11")).unwrap_err();
    assert!(matches!(error, CheckpointError::Missing { .. }), "{error}");
    let error = Checkpoint::open(run.path()).unwrap_err();
    assert!(error.to_string().contains("run folder"), "{error}");
}

#[test]
fn a_model_of_another_architecture_is_reported_whole() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(write(dir.path(), 1, 0.0, 6, None).unwrap()).unwrap();
    let file = checkpoint.tensors("model.safetensors").unwrap();
    let expected: [(&str, &[usize]); 5] =
        [("wte", &[5, 3]), ("ln.weights", &[3]), ("scale", &[1]), ("none", &[0, 7]), ("big", &[6])];
    let report = LoadReport::compare(expected, &file);
    assert_eq!(report.missing, ["ln.weights"]);
    assert_eq!(report.unused, ["ln.weight"]);
    assert_eq!(report.wrong_shape.len(), 1);
    let message = report.into_result(file.path()).unwrap_err().to_string();
    assert!(message.contains("`ln.weights` (the file has `ln.weight`)") && !message.contains('\n'), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tensors_come_back(
        tensors in prop::collection::btree_map("[ -~]{1,12}", (prop::collection::vec(0usize..5, 0..4), 0usize..3), 0..6),
        seed in any::<u32>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let mut specs: Vec<_> = tensors.into_iter().map(|(name, (shape, t))| TensorSpec::new(name, shape, dtypes[t])).collect();
        specs.sort_by_key(|spec| spec.dtype != Dtype::F32);
        let byte = |i: usize| (seed as usize).wrapping_add(i.wrapping_mul(2_654_435_761)) as u8;
        let data: Vec<Vec<u8>> = specs.iter().map(|spec| (0..spec.n_bytes().unwrap()).map(byte).collect()).collect();
        let checkpoint = write_tensors(dir.path(), &specs, &data).unwrap();
        let file = checkpoint.tensors("model.safetensors").unwrap();
        prop_assert_eq!(file.len(), specs.len());
        for (spec, bytes) in specs.iter().zip(&data) {
            prop_assert_eq!(file.bytes(&spec.name).unwrap(), bytes);
            prop_assert_eq!(file.shape(&spec.name).unwrap(), &spec.shape);
            // Every F16 and BF16 is an F32, so that encoding what was read gives the same bytes, NaN's payload aside.
            let values = file.f32(&spec.name).unwrap();
            if values.iter().all(|x| !x.is_nan()) {
                prop_assert_eq!(&encode_f32(&values, spec.dtype).unwrap()[..], bytes);
            }
        }
    }
}
