//! An export holds one tensor at a time. In a program of its own, whose allocations are counted.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use firebox_data::Tokenizer;
use firebox_models::transformer::hf::Family;
use firebox_models::transformer::{TransformerConfig, presets};
use firebox_train::checkpoint::TensorFile;
use firebox_train::export::export;
use safetensors::tensor::{Dtype, TensorView};

/// Bytes that are allocated, and the most that ever were.
struct Counting(AtomicUsize, AtomicUsize);

// SAFETY: the system allocates; this only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let bytes = self.0.fetch_add(layout.size(), Relaxed) + layout.size();
        self.1.fetch_max(bytes, Relaxed);
        // SAFETY: as the caller of this says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        self.0.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller of this says.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static MEMORY: Counting = Counting(AtomicUsize::new(0), AtomicUsize::new(0));

#[test]
fn memory_is_twice_the_largest_tensor() {
    let config = TransformerConfig { n_layers: 24, d_model: 128, d_ff: 512, tied: true, ..presets::depth(2, 12_000) };
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("model");
    std::fs::create_dir(&from).unwrap();
    let family = Family::of(&config);
    std::fs::write(from.join("config.json"), family.config_json(&config).to_string()).unwrap();
    Tokenizer::train_bpe(&["some text"], 260).unwrap().save(from.join("tokenizer.json")).unwrap();
    let pieces: Vec<_> = family.entries(&config).into_iter().flat_map(|entry| entry.pieces).collect();
    let bytes = |shape: &[usize]| -> Vec<u8> {
        (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32 * 0.1).sin().to_le_bytes()).collect()
    };
    let values: Vec<Vec<u8>> = pieces.iter().map(|piece| bytes(&piece.shape)).collect();
    let views: BTreeMap<&str, TensorView<'_>> = pieces
        .iter()
        .zip(&values)
        .map(|(piece, bytes)| (&piece.name[..], TensorView::new(Dtype::F32, piece.shape.clone(), bytes).unwrap()))
        .collect();
    std::fs::write(from.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let (largest, all) = (values.iter().map(Vec::len).max().unwrap(), values.iter().map(Vec::len).sum::<usize>());
    drop(values);

    for target in ["hf:f32", "hf:bf16", "gguf:f32", "gguf:q8_0", "gguf:q4_k", "onnx:f32", "onnx:int8"] {
        let out = dir.path().join(target.replace(':', "-"));
        let before = MEMORY.0.load(Relaxed);
        MEMORY.1.store(before, Relaxed);
        export(&from, target.parse().unwrap(), &out).unwrap();
        let most = MEMORY.1.load(Relaxed) - before;
        println!("{target}: {most} bytes; the largest tensor has {largest}, all have {all}");
        // And what a table of contents, a vocabulary and buffers take.
        assert!(most < 2 * largest + (2 << 20), "{target}: {most} of {all}");
    }
    let [want, got] = [&from, &dir.path().join("hf-f32")].map(|path| TensorFile::open(path).unwrap());
    assert!(want.names().all(|name| want.bytes(name).unwrap() == got.bytes(name).unwrap()));
}
