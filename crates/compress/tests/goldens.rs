//! Against the papers' formulas in numpy (`tests/golden/compress.py`), which has no factorization in common with the crate, and PyPI's `gguf`.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use firebox_compress::blocks::BlockType;
use firebox_compress::lowrank::{self, LowRank};
use firebox_compress::prune::{self, Mask, SparseGpt, Sparsity};
use firebox_compress::quantize::{self, Gptq, Ranges};
use firebox_compress::{Hessian, Matrix, ScalarFormat};
use safetensors::{Dtype, SafeTensors};

const DAMPING: f64 = 0.01;

struct Goldens {
    values: HashMap<String, Vec<f32>>,
    alphas: serde_json::Value,
}

impl Goldens {
    /// Integers become floats.
    fn open(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            let words = view.data().chunks_exact(4).map(|b| b.try_into().unwrap());
            let values: Vec<f32> = match view.dtype() {
                Dtype::I32 => words.map(|b| i32::from_le_bytes(b) as f32).collect(),
                _ => words.map(f32::from_le_bytes).collect(),
            };
            (name.to_owned(), values)
        };
        let values = tensors.iter().map(values).collect();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let about: serde_json::Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["firebox"]).unwrap();
        Self { values, alphas: about["awq"].clone() }
    }

    /// Names behind `prefix`.
    fn with(&self, prefix: &str) -> Vec<&str> {
        let mut names: Vec<&str> = self.values.keys().filter_map(|name| name.strip_prefix(prefix)).collect();
        names.sort_unstable();
        assert!(!names.is_empty(), "{prefix}");
        names
    }

    fn weights(&self) -> [Matrix; 2] {
        [0, 1].map(|i| Matrix::new(10, 160, self.values[&format!("weight.{i}")].clone()).unwrap())
    }

    /// Of the first `width` inputs.
    fn hessian(&self, width: usize) -> Hessian {
        let mut moments = vec![0.0; width * width];
        for x in self.values["inputs"].chunks(160) {
            for (i, row) in moments.chunks_mut(width).enumerate() {
                row.iter_mut().zip(x).for_each(|(sum, xj)| *sum += f64::from(x[i]) * f64::from(*xj));
            }
        }
        Hessian::new(width, moments).unwrap()
    }

    /// Of each input, `of` its 240 values.
    fn each(&self, of: impl Fn(&[f32]) -> f32) -> Vec<f32> {
        let inputs = Matrix::new(240, 160, self.values["inputs"].clone()).unwrap().transposed();
        (0..160).map(|i| of(inputs.row(i))).collect()
    }

    fn norms(&self) -> Vec<f32> {
        self.each(|x| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32)
    }

    /// max |a − b| / max |b| within `bound`.
    #[track_caller]
    fn close(&self, name: &str, ours: &[f32], bound: f32) {
        let golden = &self.values[name];
        assert_eq!(ours.len(), golden.len(), "{name}");
        let scale = golden.iter().fold(0f32, |m, x| m.max(x.abs()));
        let error = ours.iter().zip(golden).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(error <= bound * scale, "{name}: {:.2e} relative", error / scale);
    }

    #[track_caller]
    fn same(&self, name: &str, mask: &Mask) {
        let golden = &self.values[name];
        let differ = mask.keep().iter().zip(golden).filter(|(a, b)| **a != (**b != 0.0)).count();
        assert_eq!((mask.keep().len(), differ), (golden.len(), 0), "{name}");
    }
}

fn format(name: &str) -> ScalarFormat {
    name.parse().unwrap()
}

fn product(low: &LowRank) -> Vec<f32> {
    let (n, ranks) = (low.b.cols(), low.a.cols());
    let row = |i: usize| (0..n).map(move |j| (i, j));
    let at = |(i, j): (usize, usize)| (0..ranks).map(|r| low.a.row(i)[r] * low.b.row(r)[j]).sum();
    (0..low.a.rows()).flat_map(row).map(at).collect()
}

/// Every code, as one step is a hundred times the bound.
#[test]
fn rounding_is_to_the_nearest() {
    let golden = Goldens::open("compress.safetensors");
    let [weight, _] = golden.weights();
    for (prefix, ranges) in [("nearest.", Ranges::Absmax), ("mse.", Ranges::Mse)] {
        for name in golden.with(prefix) {
            let ours = quantize::nearest(&weight, format(name), ranges).unwrap().dequantize();
            golden.close(&format!("{prefix}{name}"), ours.values(), 1e-6);
        }
    }
}

#[test]
fn gptq_is_the_papers() {
    let golden = Goldens::open("compress.safetensors");
    let ([weight, _], hessian) = (golden.weights(), golden.hessian(160));
    for (prefix, act_order) in [("gptq.", false), ("ordered.", true)] {
        for name in golden.with(prefix) {
            let options = Gptq { damping: DAMPING, act_order, ..Gptq::default() };
            let ours = quantize::gptq(&weight, &hessian, format(name), &options).unwrap().dequantize();
            golden.close(&format!("{prefix}{name}"), ours.values(), 1e-6);
            let plain = quantize::nearest(&weight, format(name), Ranges::Absmax).unwrap().dequantize();
            let [ours, plain] = [ours, plain].map(|other| hessian.output_error(&weight, &other).unwrap());
            assert!(ours < 0.9 * plain, "{name}: outputs are {ours} off, {plain} round to nearest");
        }
    }
}

#[test]
fn awq_and_smoothquant_are_the_papers() {
    let golden = Goldens::open("compress.safetensors");
    let ([a, b], hessian) = (golden.weights(), golden.hessian(160));
    let mean = golden.each(|x| (x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / 240.0) as f32);
    let largest = golden.each(|x| x.iter().fold(0f32, |m, x| m.max(x.abs())));
    for (name, clip) in [("int4-g32", false), ("int3-g32", true), ("int4-g32-sym", true)] {
        let ours = quantize::awq(&[&a, &b], &mean, &hessian, format(name), clip).unwrap();
        assert_eq!(ours.alpha, golden.alphas[name].as_f64().unwrap(), "{name}");
        golden.close(&format!("awq.{name}.scales"), &ours.scales, 1e-6);
        for (i, quantized) in ours.quantized.iter().enumerate() {
            golden.close(&format!("awq.{name}.{i}"), quantized.dequantize().values(), 1e-6);
        }
        let inverse: Vec<f32> = ours.scales.iter().map(|s| 1.0 / s).collect();
        let back = ours.quantized[0].dequantize().scaled_columns(&inverse).unwrap();
        let plain = quantize::nearest(&a, format(name), Ranges::Absmax).unwrap().dequantize();
        let [ours, plain] = [back, plain].map(|other| hessian.output_error(&a, &other).unwrap());
        assert!(ours < plain, "{name}: outputs are {ours} off, {plain} round to nearest");
    }
    for alpha in golden.with("smooth.") {
        let ours = quantize::smooth_scales(&largest, &[&a, &b], alpha.parse().unwrap()).unwrap();
        golden.close(&format!("smooth.{alpha}"), &ours, 1e-6);
    }
}

#[test]
fn pruning_is_the_papers() {
    let golden = Goldens::open("compress.safetensors");
    let ([a, b], hessian, norms) = (golden.weights(), golden.hessian(160), golden.norms());
    let sparsity = |text: &str| text.parse::<Sparsity>().unwrap();
    for text in golden.with("magnitude.") {
        golden.same(&format!("magnitude.{text}"), &prune::magnitude(&a, sparsity(text)).unwrap());
    }
    for (i, mask) in prune::magnitude_global(&[&a, &b], sparsity("0.3")).unwrap().iter().enumerate() {
        golden.same(&format!("global.0.3.{i}"), mask);
    }
    for text in golden.with("wanda.") {
        golden.same(&format!("wanda.{text}"), &prune::wanda(&a, &norms, sparsity(text)).unwrap());
    }
    for text in golden.with("sparsegpt.") {
        let options = SparseGpt { damping: DAMPING };
        let ours = prune::sparsegpt(&a, &hessian, sparsity(text), &options).unwrap();
        golden.close(&format!("sparsegpt.{text}"), ours.values(), 1e-6);
        let zeros = ours.values().iter().filter(|w| **w == 0.0).count();
        assert_eq!(zeros, 800, "{text}");
        // The order of the papers.
        let masked = |mask: Mask| {
            let mut weight = a.clone();
            mask.apply(&mut weight).unwrap();
            weight
        };
        let wanda = masked(prune::wanda(&a, &norms, sparsity(text)).unwrap());
        let magnitude = masked(prune::magnitude(&a, sparsity(text)).unwrap());
        let errors = [ours, wanda, magnitude].map(|other| hessian.output_error(&a, &other).unwrap());
        assert!(errors.is_sorted(), "{text}: SparseGPT, Wanda, magnitude: {errors:?}");
    }
}

#[test]
fn low_rank_is_numpys() {
    let golden = Goldens::open("compress.safetensors");
    let ([weight, _], hessian) = (golden.weights(), golden.hessian(160));
    for rank in [1, 4] {
        golden.close(&format!("low_rank.{rank}"), &product(&lowrank::truncate(&weight, rank).unwrap()), 3e-6);
        let aware = lowrank::truncate_for(&weight, &hessian, rank, DAMPING).unwrap();
        golden.close(&format!("low_rank_for.{rank}"), &product(&aware), 3e-6);
    }
    let few = golden.hessian(10);
    let upright = lowrank::truncate_for(&weight.transposed(), &few, 4, DAMPING).unwrap();
    golden.close("low_rank_for.upright", &product(&upright), 3e-6);
}

/// Bit for bit, both ways.
#[test]
fn blocks_are_ggufs() {
    let golden = Goldens::open("gguf-blocks.safetensors");
    let bytes = |name: String| -> Vec<u8> { golden.values[&name].iter().map(|x| *x as u8).collect() };
    let mut counts = [0, 0];
    for block in BlockType::ALL {
        if golden.values.contains_key(&format!("{block}.bytes")) {
            let mut ours = vec![];
            block.quantize(&golden.values["values"], 256, &mut ours).unwrap();
            let theirs = bytes(format!("{block}.bytes"));
            assert_eq!(ours.len(), theirs.len());
            let size = block.block_bytes();
            for (i, (ours, theirs)) in ours.chunks(size).zip(theirs.chunks(size)).enumerate() {
                assert_eq!(ours, theirs, "{block}, block {i}");
            }
            counts[0] += 1;
        }
        if let Some(theirs) = golden.values.get(&format!("{block}.values")) {
            let mut ours = vec![0.0; theirs.len()];
            block.dequantize(&bytes(format!("{block}.given")), &mut ours).unwrap();
            let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|x| x.to_bits()).collect() };
            assert_eq!(bits(&ours), bits(theirs), "{block}");
            counts[1] += 1;
        }
    }
    assert_eq!(counts, [6, 8]);
}
