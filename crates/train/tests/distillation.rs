//! The losses of students against PyTorch's, computed in float64: `tests/golden/distillation.py`.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::{self, HintLoss, LossConfig, LossParts, Relations, Sequence, SoftLoss, SoftTargets};
use firebox_train::checkpoint::TensorFile;
use firebox_train::model_io::to_host;

struct Golden {
    file: TensorFile,
    device: Device,
}

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/distillation.safetensors");
        Self { file: TensorFile::open(path).unwrap(), device: Backend::NdArray.device().unwrap() }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.file.f32(name).unwrap()
    }

    fn matrix(&self, name: &str) -> Tensor<2> {
        let shape: [usize; 2] = self.file.shape(name).unwrap().try_into().unwrap();
        Tensor::from_data(TensorData::new(self.values(name), shape), &self.device)
    }

    fn leaf(&self, name: &str) -> Tensor<2> {
        Tensor::from_inner(self.matrix(name)).require_grad()
    }

    fn targets(&self) -> Arc<[i32]> {
        let bytes = self.file.bytes("targets").unwrap();
        bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect()
    }

    #[track_caller]
    fn assert_close(&self, name: &str, got: &[f32]) {
        let want = self.values(name);
        assert_eq!(got.len(), want.len(), "{name}");
        let size = want.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        let apart = got.iter().zip(&want).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / size;
        println!("{name}: {apart:e}");
        assert!(apart < 2e-6, "{name}: {apart} apart");
    }
}

#[test]
fn losses_and_gradients_are_those_of_pytorch() {
    let golden = Golden::open();
    let targets = golden.targets();
    let scale = 1.0 / targets.iter().filter(|&&target| target >= 0).count() as f64;
    let parts = LossParts::default();
    let none = LossConfig::default();
    for (case, alpha, temperature) in [("even", 0.5, 2.0), ("soft", 0.0, 4.0), ("sharp", 0.3, 0.7)] {
        let of_teacher = SoftTargets::Head {
            hidden: golden.values("teacher_hidden").into(),
            weight: golden.matrix("teacher_weight"),
            softcap: 0.0,
        };
        let soft = SoftLoss { targets: of_teacher, alpha, temperature, parts: parts.clone() };
        let (hidden, weight) = (golden.leaf("hidden"), golden.leaf("weight"));
        let loss =
            ops::linear_distillation(hidden.clone(), weight.clone(), targets.clone(), scale, 0.0, &none, &soft, None);
        let grads = loss.clone().backward();
        golden.assert_close(&format!("{case}.loss"), &to_host(loss));
        golden.assert_close(&format!("{case}.grad.hidden"), &to_host(hidden.grad(&grads).unwrap()));
        golden.assert_close(&format!("{case}.grad.weight"), &to_host(weight.grad(&grads).unwrap()));
    }
    let hint = || HintLoss { targets: targets.clone(), scale, weight: 1.0, parts: parts.clone() };
    parts.take();

    let (hidden, projection) = (golden.leaf("hidden"), golden.leaf("projection"));
    let [n, d] = hidden.dims();
    let teacher = golden.values("teacher_hidden").into();
    let x = ops::hidden_hint(hidden.clone().reshape([1, n, d]), Some(projection.clone()), teacher, hint());
    let grads = (x * 0.0).sum().backward();
    golden.assert_close("hint.loss", &[parts.take()[LossParts::HIDDEN] as f32]);
    golden.assert_close("hint.grad.hidden", &to_host(hidden.grad(&grads).unwrap()));
    golden.assert_close("hint.grad.projection", &to_host(projection.grad(&grads).unwrap()));

    let qkv = golden.leaf("qkv");
    let [n, d] = qkv.dims();
    let relations = Relations { teacher: golden.values("teacher_qkv").into(), widths: [16, 8], heads: 2 };
    let x = ops::relation_hint(qkv.clone().reshape([1, n, d]), [8, 4], &Sequence::plain(1, n), relations, hint());
    let grads = (x * 0.0).sum().backward();
    golden.assert_close("relations.loss", &[parts.take()[LossParts::RELATIONS] as f32]);
    golden.assert_close("relations.grad.qkv", &to_host(qkv.grad(&grads).unwrap()));
}
