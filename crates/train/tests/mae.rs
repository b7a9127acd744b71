//! The masked autoencoder against transformers' `ViTMAEForPreTraining` on PyTorch: with the same masks, the losses of ten AdamW steps.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Tensor, TensorData};
use firebox_models::Staged;
use firebox_models::mae::{Mae, MaeConfig};
use firebox_models::transformer::ImageConfig;
use firebox_optim::{AdamWConfig, DecayRule, NamedGrads, Optimizer};
use firebox_tensor::device::Backend;
use firebox_train::Recipe;
use firebox_train::checkpoint::TensorFile;
use firebox_train::model_io::to_host;
use firebox_train::task::{MaskedImageRecipe, TaskRecipe};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// Sets parameters by name.
struct Values(Vec<String>, HashMap<String, Vec<f32>>);

impl ModuleMapper for Values {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.0.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.0.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.0.join(".");
        let values = self.1.remove(&name).unwrap_or_else(|| panic!("no values of {name}"));
        let data = TensorData::new(values, param.lazy_shape().to_vec());
        let (id, device) = (param.id, param.lazy_device());
        param.transform_for_load(Tensor::from_data(data, &device), id)
    }
}

/// The golden parameters under our names and in our layouts.
struct Names<'a>(&'a TensorFile, HashMap<String, Vec<f32>>);

impl Names<'_> {
    fn whole(&mut self, ours: &str, theirs: &str) {
        self.1.insert(ours.into(), self.0.f32(theirs).unwrap());
    }

    /// Some `[out, in]` beside each other as `[in, out]`, and their biases.
    fn linear(&mut self, ours: &str, theirs: &[String]) {
        let (mut rows, mut bias) = (vec![], vec![]);
        for name in theirs {
            let weight = format!("{name}.weight");
            let inputs: usize = self.0.shape(&weight).unwrap()[1..].iter().product();
            rows.extend(self.0.f32(&weight).unwrap().chunks_exact(inputs).map(<[f32]>::to_vec));
            bias.extend(self.0.f32(&format!("{name}.bias")).unwrap());
        }
        let weight = (0..rows[0].len()).flat_map(|i| rows.iter().map(move |row| row[i])).collect();
        self.1.insert(format!("{ours}.weight"), weight);
        self.1.insert(format!("{ours}.bias"), bias);
    }

    fn norm(&mut self, ours: &str, theirs: &str) {
        ["weight", "bias"].iter().for_each(|part| self.whole(&format!("{ours}.{part}"), &format!("{theirs}.{part}")));
    }

    fn block(&mut self, ours: &str, theirs: &str) {
        self.norm(&format!("{ours}.attn_norm"), &format!("{theirs}.layernorm_before"));
        self.norm(&format!("{ours}.mlp_norm"), &format!("{theirs}.layernorm_after"));
        let qkv = ["query", "key", "value"].map(|part| format!("{theirs}.attention.attention.{part}"));
        self.linear(&format!("{ours}.attn.qkv"), &qkv);
        for (own, other) in [
            ("attn.out", "attention.output.dense"),
            ("mlp.input", "intermediate.dense"),
            ("mlp.output", "output.dense"),
        ] {
            self.linear(&format!("{ours}.{own}"), &[format!("{theirs}.{other}")]);
        }
    }

    fn all(file: &TensorFile) -> HashMap<String, Vec<f32>> {
        let mut names = Names(file, HashMap::new());
        let embedding = "vit.embeddings.patch_embeddings.projection";
        names.linear("vit.embed", &[embedding.into()]);
        let bias = names.1.remove("vit.embed.bias").unwrap();
        names.1.insert("vit.patches.bias".into(), bias);
        names.whole("vit.patches.class", "vit.embeddings.cls_token");
        names.whole("vit.positions.weight", "vit.embeddings.position_embeddings");
        names.whole("mask_token", "decoder.mask_token");
        names.whole("positions", "decoder.decoder_pos_embed");
        for i in 0..2 {
            names.block(&format!("vit.blocks.{i}"), &format!("vit.encoder.layer.{i}"));
        }
        names.block("decoder.blocks.0", "decoder.decoder_layers.0");
        names.norm("vit.norm", "vit.layernorm");
        names.norm("decoder.norm", "decoder.decoder_norm");
        names.linear("embed", &["decoder.decoder_embed".into()]);
        names.linear("pixels", &["decoder.decoder_pred".into()]);
        names.1
    }
}

fn config(normalize: bool) -> MaeConfig {
    let set = [
        "model={ image = { size = 12, patch = 3, channels = 3 }, d_model = 16, n_layers = 2, n_heads = 2, d_ff = 24 }",
        "task.decoder_width=8",
        "task.decoder_layers=1",
        "task.decoder_heads=2",
    ];
    let recipe = Recipe::load("masked-image", &set.map(String::from)).unwrap();
    let TaskRecipe::MaskedImage(task) = recipe.task else { panic!("another task") };
    let mut config = MaskedImageRecipe { normalize, ..task }.shape(&recipe.model).unwrap();
    config.decoder.d_ff = 20;
    assert_eq!(config.image(), ImageConfig { size: 12, patch: 3, channels: 3, bias: true });
    config
}

#[test]
fn the_losses_are_those_of_transformers() {
    let file = TensorFile::open(golden("mae-tiny.safetensors")).unwrap();
    let device = Backend::NdArray.device().unwrap().autodiff();
    let seen: Vec<usize> = file
        .bytes("seen")
        .unwrap()
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes(b.try_into().unwrap()) as usize)
        .collect();
    for (normalize, name) in [(false, "losses"), (true, "losses_normalized")] {
        let config = config(normalize);
        let fresh = Mae::new(&config, 0, &device).unwrap();
        // Fixed positions are computed, not read.
        let values = Names::all(&file);
        for (ours, table) in [
            ("vit.positions.weight", fresh.vit.positions.as_ref().unwrap().weight.val()),
            ("positions", fresh.positions.val()),
        ] {
            let off = to_host(table.inner()).iter().zip(&values[ours]).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
            assert!(off < 1e-6, "{ours}: {off} off");
        }
        let mut model = fresh.map(&mut Values(vec![], values));
        let rows = seen.chunks_exact(4).map(<[usize]>::to_vec).collect();
        let batch = Mae::batch_of(rows, file.f32("pixels").unwrap(), 4);
        let adamw = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
        let mut optimizer = Optimizer::new(adamw, DecayRule::Matrices).unwrap();
        let want = file.f32(name).unwrap();
        assert_eq!(want.len(), 10);
        for (step, want) in want.iter().enumerate() {
            let loss = model.loss(&batch, Some(step as u64));
            let got = to_host(loss.clone().inner())[0];
            println!("{name} {step}: {got}, transformers {want}");
            // f32 against f64, through a few layers and, later, what AdamW makes of small gradients.
            assert!((got / want - 1.0).abs() < 1e-5, "{name} before step {step}: {got}, transformers {want}");
            let mut grads = NamedGrads::from_backward(&model, &mut loss.backward());
            model = optimizer.step(3e-3, model, &mut grads).unwrap();
        }
    }
}
