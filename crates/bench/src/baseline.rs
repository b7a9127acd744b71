//! The contenders burn-ndarray and burn-flex: the same model of burn's own modules, operations and AdamW, as burn's users write
//! it. Built by the feature `baseline` in the profile `baseline`.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig,
    RotaryEncoding, RotaryEncodingConfig, SwiGlu, SwiGluConfig,
};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};
use firebox_models::transformer::{FeedForward, NormKind, Positions, TransformerConfig};
use firebox_tensor::device::Backend;
use firebox_train::observe::memory;

use crate::contender::Contender;
use crate::error::{Error, Result};
use crate::protocol::{Ready, Training, serve};

#[derive(Module, Debug)]
enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

#[derive(Module, Debug)]
enum Input {
    Plain(Linear),
    Gated(SwiGlu),
}

#[derive(Module, Debug)]
struct Block {
    attn_norm: Norm,
    qkv: Linear,
    out: Linear,
    mlp_norm: Norm,
    input: Input,
    output: Linear,
}

#[derive(Module, Debug)]
struct Transformer {
    embed: Embedding,
    positions: Option<Embedding>,
    blocks: Vec<Block>,
    norm: Norm,
    head: Option<Linear>,
}

/// What is not a parameter: heads, rotations, the causal mask.
struct Shared {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    exact_gelu: bool,
    rotary: Option<RotaryEncoding>,
    mask: Tensor<4, Bool>,
}

impl Norm {
    fn new(c: &TransformerConfig, device: &Device) -> Self {
        match c.norm {
            NormKind::LayerNorm => {
                let config = LayerNormConfig::new(c.d_model).with_epsilon(c.norm_eps).with_bias(c.bias);
                Self::Layer(config.init(device))
            }
            NormKind::RmsNorm => Self::Rms(RmsNormConfig::new(c.d_model).with_epsilon(c.norm_eps).init(device)),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}

impl Block {
    fn new(c: &TransformerConfig, device: &Device) -> Self {
        let init = |std| Initializer::Normal { mean: 0.0, std };
        let linear = |i, o, std| LinearConfig::new(i, o).with_bias(c.bias).with_initializer(init(std)).init(device);
        let (d, std, residual_std) = (c.d_model, c.init_std, c.init_std / (2.0 * c.n_layers as f64).sqrt());
        Self {
            attn_norm: Norm::new(c, device),
            qkv: linear(d, c.qkv_width(), std),
            out: linear(c.n_heads * c.head_dim, d, residual_std),
            mlp_norm: Norm::new(c, device),
            input: match c.feed_forward {
                FeedForward::Gelu | FeedForward::GeluExact | FeedForward::QuickGelu => {
                    Input::Plain(linear(d, c.d_ff, std))
                }
                FeedForward::SwiGlu => {
                    let config = SwiGluConfig::new(d, c.d_ff).with_bias(c.bias).with_initializer(init(std));
                    Input::Gated(config.init(device))
                }
            },
            output: linear(c.d_ff, d, residual_std),
        }
    }

    fn forward(&self, x: Tensor<3>, shared: &Shared) -> Tensor<3> {
        let y = self.qkv.forward(self.attn_norm.forward(x.clone()));
        let x = x + self.out.forward(attention(y, shared));
        let y = self.mlp_norm.forward(x.clone());
        let y = match &self.input {
            Input::Plain(linear) if shared.exact_gelu => activation::gelu(linear.forward(y)),
            Input::Plain(linear) => activation::gelu_approximate(linear.forward(y)),
            Input::Gated(swiglu) => swiglu.forward(y),
        };
        x + self.output.forward(y)
    }
}

/// Causal attention of packed `[q | k | v]`, `[B, T, (H + 2 K) E]`.
fn attention(qkv: Tensor<3>, shared: &Shared) -> Tensor<3> {
    let Shared { n_heads: h, n_kv_heads: k, head_dim: e, .. } = *shared;
    let [b, t, _] = qkv.dims();
    let heads = |first: usize, n: usize| qkv.clone().narrow(2, first * e, n * e).reshape([b, t, n, e]).swap_dims(1, 2);
    let rotate = |x: Tensor<4>| match &shared.rotary {
        Some(rotary) => rotary.forward(x),
        None => x,
    };
    // Each key-value head serves h / k query heads.
    let serve = |x: Tensor<4>| match h / k {
        1 => x,
        group => x.reshape([b, k, 1, t, e]).repeat_dim(2, group).reshape([b, h, t, e]),
    };
    let (q, key, v) = (rotate(heads(0, h)), serve(rotate(heads(h, k))), serve(heads(h + k, k)));
    let scores = q.matmul(key.swap_dims(2, 3)).div_scalar((e as f64).sqrt());
    let weights = activation::softmax(scores.mask_fill(shared.mask.clone(), f32::NEG_INFINITY), 3);
    weights.matmul(v).swap_dims(1, 2).reshape([b, t, h * e])
}

impl Transformer {
    fn new(c: &TransformerConfig, device: &Device) -> Self {
        let init = Initializer::Normal { mean: 0.0, std: c.init_std };
        let table = |rows| EmbeddingConfig::new(rows, c.d_model).with_initializer(init.clone()).init(device);
        let head = LinearConfig::new(c.d_model, c.vocab_size).with_bias(false).with_initializer(init.clone());
        Self {
            embed: table(c.vocab_size),
            positions: (c.positions == Positions::Learned).then(|| table(c.context)),
            blocks: (0..c.n_layers).map(|_| Block::new(c, device)).collect(),
            norm: Norm::new(c, device),
            head: (!c.tied).then(|| head.init(device)),
        }
    }

    /// Logits, `[B T, V]`.
    fn forward(&self, ids: Tensor<2, Int>, shared: &Shared) -> Tensor<2> {
        let [b, t] = ids.dims();
        let device = ids.device();
        let mut x = self.embed.forward(ids);
        if let Some(positions) = &self.positions {
            x = x + positions.forward(Tensor::<1, Int>::arange(0..t as i64, &device).reshape([1, t]));
        }
        for block in &self.blocks {
            x = block.forward(x, shared);
        }
        let [_, _, d] = x.dims();
        let x = self.norm.forward(x).reshape([b * t, d]);
        match &self.head {
            Some(head) => head.forward(x),
            None => x.matmul(self.embed.weight.val().transpose()),
        }
    }
}

/// Runs the worker.
///
/// # Errors
/// A backend that this build lacks.
pub fn work(contender: Contender, task: &Training) -> Result<()> {
    let rss_before_model_bytes = memory::current_bytes();
    let (backend, software) = match contender {
        Contender::BurnNdarray => (Backend::NdArray, "burn 0.22 on burn-ndarray"),
        Contender::BurnFlex => (Backend::Flex, "burn 0.22 on burn-flex"),
        _ => {
            let advice = "this is a fault of the benchmark";
            return Err(Error::NoPart { contender, task: "model of burn's modules", advice });
        }
    };
    let device = backend.device()?.autodiff();
    let (inputs, targets) = task.batch();
    let (b, t) = (task.batch, task.tokens);
    let ids = Tensor::<2, Int>::from_data(TensorData::new(inputs, [b, t]), &device);
    let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [b * t]), &device);
    let c = &task.model;
    let shared = Shared {
        n_heads: c.n_heads,
        n_kv_heads: c.n_kv_heads,
        head_dim: c.head_dim,
        exact_gelu: c.feed_forward == FeedForward::GeluExact,
        rotary: match c.positions {
            Positions::Rotary { theta } => {
                let config = RotaryEncodingConfig::new(c.context, c.head_dim).with_theta(theta as f32);
                Some(config.init(&device))
            }
            Positions::Learned => None,
        },
        mask: Tensor::<2, Bool>::tril_mask([t, t], 0, &device).reshape([1, 1, t, t]),
    };
    // burn clips each gradient by its own norm, and decays every parameter: as much work as ours.
    let mut optimizer: ModuleOptimizer = AdamWConfig::new()
        .with_beta_1(task.beta1 as f32)
        .with_beta_2(task.beta2 as f32)
        .with_epsilon(1e-8)
        .with_weight_decay(task.weight_decay as f32)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(task.clip as f32)))
        .init();
    let loss_fn = CrossEntropyLossConfig::new().init(&device);
    let mut model = Some(Transformer::new(c, &device));
    let params = model.as_ref().map_or(0, Module::num_params) as u64;
    let mut step = || {
        let Some(current) = model.take() else { return f64::NAN };
        let loss = loss_fn.forward(current.forward(ids.clone(), &shared), targets.clone());
        let value = f64::from(loss.clone().inner().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &current);
        model = Some(optimizer.step(task.lr, current, grads));
        value
    };
    let loss = step();
    for _ in 1..task.warmup_steps {
        step();
    }
    serve(&Ready { params, loss, rss_before_model_bytes, software: software.to_owned() }, |_, n, _| {
        Ok((0..n).fold(f64::NAN, |_, _| step()))
    })
}
