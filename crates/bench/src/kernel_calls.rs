//! The calls behind `bench kernels`: Firebox's through its public operations, and two plainer matrix products.

use std::hint::black_box;
use std::sync::Arc;

use burn::tensor::{Device, Distribution, Gradients, Tensor};
use firebox_optim::{AdamWConfig, Algorithm, ParamKind, ParamState};
use firebox_tensor::device::Backend;
use firebox_tensor::ops::{self, AttentionConfig, LossConfig, Sequence};
use firebox_train::observe::memory;
use ndarray::Array2;
use rayon::prelude::*;

use crate::contender::Contender;
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::optim;
use crate::protocol::{Ready, serve, tokens};

/// A kernel with its inputs in place; a call computes it once.
type Call = Box<dyn FnMut()>;

/// Runs the worker. A case is made, and called once, when it is first asked for; the one before it is dropped.
///
/// # Errors
/// A contender that does not compute a kernel.
pub fn work(contender: Contender, kernels: &[Kernel]) -> Result<()> {
    let software = match contender {
        Contender::Naive => "three loops".to_owned(),
        Contender::Matrixmultiply => "matrixmultiply".to_owned(),
        _ => format!("Firebox {}", env!("CARGO_PKG_VERSION")),
    };
    let ready = Ready { params: 0, loss: 0.0, rss_before_model_bytes: memory::current_bytes(), software };
    let mut prepared: Option<(usize, Call)> = None;
    serve(&ready, |case, n, clock| {
        let call = match &mut prepared {
            Some((number, call)) if *number == case => call,
            slot => {
                // The memory of the last case first.
                *slot = None;
                let mut call = make(contender, &kernels[case])?;
                call();
                &mut slot.insert((case, call)).1
            }
        };
        clock.start();
        (0..n).for_each(|_| call());
        Ok(0.0)
    })
}

fn make(contender: Contender, kernel: &Kernel) -> Result<Call> {
    match (contender, kernel) {
        (Contender::Naive, &Kernel::Sgemm { m, k, n }) => Ok(naive(m, k, n)),
        (Contender::Matrixmultiply, &Kernel::Sgemm { m, k, n }) => {
            let (a, b) = (Array2::from_elem((m, k), 0.5f32), Array2::from_elem((k, n), 0.25f32));
            Ok(Box::new(move || {
                black_box(a.dot(&b));
            }))
        }
        (Contender::Firebox, kernel) => firebox(kernel),
        (contender, _) => {
            Err(Error::NoPart { contender, task: "kernel of this name", advice: "leave it out of --contenders" })
        }
    }
}

/// Rows by columns as one writes it down, on one thread: the loop that the other numbers are seen against.
fn naive(m: usize, k: usize, n: usize) -> Call {
    let (a, b, mut c) = (vec![0.5f32; m * k], vec![0.25f32; k * n], vec![0f32; m * n]);
    Box::new(move || {
        for i in 0..m {
            for j in 0..n {
                c[i * n + j] = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
            }
        }
        black_box(&c);
    })
}

/// Firebox's kernels as a training step calls them: forward, then backward from a gradient of ones.
fn firebox(kernel: &Kernel) -> Result<Call> {
    let plain = Backend::NdArray.device()?;
    let device = plain.clone().autodiff();
    Ok(match *kernel {
        Kernel::Sgemm { m, k, n } => {
            let (a, b) = (random([m, k], &plain), random([k, n], &plain));
            Box::new(move || {
                ops::release(ops::linear(a.clone(), b.clone(), None));
            })
        }
        Kernel::Linear { rows, d_in, d_out } => {
            let (x, w) = (leaf([rows, d_in], &device), leaf([d_in, d_out], &device));
            let bias = leaf([d_out], &device);
            backward(vec![keep(&x), keep(&w), keep(&bias)], move || {
                ops::linear(x.clone(), w.clone(), Some(bias.clone()))
            })
        }
        Kernel::Attention { batch, tokens, n_heads, n_kv_heads, head_dim } => {
            let config = AttentionConfig { n_heads, n_kv_heads, head_dim, window: None, softcap: 0.0, rope: None };
            let qkv = leaf([batch, tokens, config.qkv_width()], &device);
            let sequence = Sequence::plain(batch, tokens);
            backward(vec![keep(&qkv)], move || ops::attention(qkv.clone(), &config, &sequence))
        }
        Kernel::LayerNorm { rows, d } => {
            let (x, weight, bias) = (leaf([rows, d], &device), leaf([d], &device), leaf([d], &device));
            backward(vec![keep(&x), keep(&weight), keep(&bias)], move || {
                ops::layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5)
            })
        }
        Kernel::RmsNorm { rows, d } => {
            let (x, weight) = (leaf([rows, d], &device), leaf([d], &device));
            backward(vec![keep(&x), keep(&weight)], move || ops::rms_norm(x.clone(), weight.clone(), 1e-5))
        }
        Kernel::Gelu { rows, d } => {
            let x = leaf([rows, d], &device);
            backward(vec![keep(&x)], move || ops::gelu(x.clone()))
        }
        Kernel::SwiGlu { rows, d } => {
            let x = leaf([rows, 2 * d], &device);
            backward(vec![keep(&x)], move || ops::swiglu(x.clone()))
        }
        Kernel::Embedding { rows, d, vocab } => {
            let (table, ids) = (leaf([vocab, d], &device), ids(rows, vocab));
            backward(vec![keep(&table)], move || ops::embedding(table.clone(), ids.clone(), 1, rows))
        }
        Kernel::LinearCrossEntropy { rows, d, vocab } => {
            let (x, weight, targets) = (leaf([rows, d], &device), leaf([vocab, d], &device), ids(rows, vocab));
            let scale = 1.0 / rows as f64;
            backward(vec![keep(&x), keep(&weight)], move || {
                ops::linear_cross_entropy(
                    x.clone(),
                    weight.clone(),
                    targets.clone(),
                    scale,
                    0.0,
                    &LossConfig::default(),
                )
            })
        }
        Kernel::AdamW { n } => {
            let grad = random([n], &plain);
            let algorithm = Algorithm::from(AdamWConfig::default());
            let mut state = ParamState::new(&algorithm, ParamKind::Matrix, &[n], &plain);
            let mut param = Some(random([n], &plain));
            Box::new(move || {
                // Handed over, so that the update is in place, as in training.
                param = param.take().map(|param| algorithm.step(1e-4, 0.1, 1.0, param, grad.clone(), &mut state));
            })
        }
        Kernel::Optimizer { ref algorithm, bits, count, d } => {
            let known = || Algorithm::all().iter().map(Algorithm::name).collect::<Vec<_>>().join(", ");
            let algorithm = optim::named(algorithm).ok_or_else(|| Error::Unknown {
                kind: "optimizer",
                name: algorithm.clone(),
                known: known(),
            })?;
            let of_matrix = |_| {
                let state = optim::state(&algorithm, bits, d, &plain);
                (Some(random([d * d], &plain)), random([d * d], &plain), state)
            };
            let mut params: Vec<_> = (0..count).map(of_matrix).collect();
            Box::new(move || {
                for (param, grad, state) in &mut params {
                    let decay = algorithm.weight_decay();
                    *param = param.take().map(|param| algorithm.step(1e-4, decay, 1.0, param, grad.clone(), state));
                }
            })
        }
        Kernel::Copy { n } => {
            let (from, mut to) = (vec![0.5f32; n], vec![0f32; n]);
            // Parts that all threads have to do with.
            const PART: usize = 1 << 20;
            Box::new(move || {
                let parts = to.par_chunks_mut(PART).zip(from.par_chunks(PART));
                parts.for_each(|(to, from)| to.copy_from_slice(from));
                black_box(&to);
            })
        }
    })
}

/// Forward and backward; then the gradients give their memory to the next call, as they do in training, where the optimizer takes them in.
fn backward<const D: usize>(leaves: Vec<Box<dyn Leaf>>, forward: impl Fn() -> Tensor<D> + 'static) -> Call {
    let upstream = forward().inner().ones_like();
    Box::new(move || {
        let y = forward();
        let mut grads = ops::seed(y, upstream.clone()).backward();
        leaves.iter().for_each(|leaf| leaf.release(&mut grads));
    })
}

fn keep<const D: usize>(leaf: &Tensor<D>) -> Box<dyn Leaf> {
    Box::new(leaf.clone())
}

/// An input of any rank.
trait Leaf {
    fn release(&self, grads: &mut Gradients);
}

impl<const D: usize> Leaf for Tensor<D> {
    fn release(&self, grads: &mut Gradients) {
        if let Some(grad) = self.grad_remove(grads) {
            ops::release(grad);
        }
    }
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.5), device)
}

fn leaf<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    random(shape, device).require_grad()
}

fn ids(n: usize, vocab: usize) -> Arc<[i32]> {
    tokens(1337, n, vocab).into()
}
